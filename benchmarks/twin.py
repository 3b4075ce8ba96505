"""How fast a Twin model answers a batch of mixed inputs, against its shared model and against rebuilding all weights.

    python benchmarks/twin.py throughput BUNDLE TASKS [--batch 64] [--threads 1] [--repeats 7]

BUNDLE is a Twin bundle of classifiers whose experts are called as the task folders in TASKS; equally many test inputs
of each make a batch. The peer does what the authors' code does: for every input it adds all experts' dense changes, by
their weights, to all tensors of the shared model, and runs that on a batch of one. Times are medians, of the peer for
one input times the batch; "identical" is the largest difference of the encoder's last hidden states.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import weldment
from weldment.evaluation.tasks import Task, load_task
from weldment.twin.attaching import read_tensors
from weldment.twin.bundle import Bundle

State = dict[str, Tensor]
ROUTED = "with the routing pass"


def inputs_of(folder: Path, tasks: Path, names: tuple[str, ...], batch: int) -> tuple[Any, list[int]]:
    """A padded batch with equally many test inputs of every task, in turns, and the experts they belong to."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows: list[dict[str, Any]] = []
    experts: list[int] = []
    for place in range(batch):
        expert, number = place % len(names), place // len(names)
        task = load_task(tasks / names[expert])
        assert isinstance(task, Task)
        split = task.split("test").first(number + 1)
        pair = None if split.pairs is None else split.pairs[number]
        rows.append(dict(tokenizer(split.texts[number], pair, truncation=True, max_length=128)))
        experts.append(expert)
    return tokenizer.pad(rows, return_tensors="pt"), experts


def changes_of(bundle: Bundle, shared: Any) -> list[State]:
    """theta_t - theta_shared of every expert as dense tensors, as the authors keep them."""
    names = shared.state_dict()
    found: list[State] = []
    for expert in bundle.experts:
        state = {name: torch.zeros_like(tensor) for name, tensor in names.items() if tensor.is_floating_point()}
        if expert.adapter is not None:
            tensors = read_tensors(expert.adapter / "adapter_model.safetensors")
            for name in [name for name in tensors if ".lora_A." in name]:
                weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                state[weight] += tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        for name, change in (read_tensors(expert.changes) if expert.changes else {}).items():
            state[name] += change
        found.append(state)
    return found


def rebuilt(shared: Any, own: State, changes: list[State], weights: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Last hidden states (length, hidden) of one input, with all weights rebuilt for it."""
    state = {
        name: tensor + sum(float(w) * change[name] for w, change in zip(weights, changes, strict=True))
        if name in changes[0]
        else tensor
        for name, tensor in own.items()
    }
    shared.load_state_dict(state)
    return shared(**inputs).last_hidden_state[0]


def median(call: Callable[[], Any], repeats: int) -> float:
    """Seconds."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def throughput(folder: Path, tasks: Path, batch: int, repeats: int) -> None:
    model: Any = weldment.TwinModel.from_pretrained(folder)
    bundle = model.twin.bundle
    inputs, experts = inputs_of(folder, tasks, model.expert_names, batch)
    shared: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    count = len(bundle.experts)
    chance = torch.Generator().manual_seed(0)
    routing = model.route(**inputs)
    cases = {
        "one expert for each input": torch.eye(count)[experts],
        "as routed": routing.weights,
        "all experts for each input": torch.rand(batch, count, generator=chance).softmax(dim=1),
    }
    tokens = int(inputs["attention_mask"].sum())
    shape = list(inputs["input_ids"].shape)
    print(f"{count} experts, batch {shape}, {tokens} tokens, {torch.get_num_threads()} threads")
    alone = median(lambda: shared(**inputs), repeats)
    print(f"{'shared model alone':40} {alone:7.3f} s")
    times: dict[str, float] = {}
    for name, weights in cases.items():
        times[name] = median(lambda w=weights: model(**inputs, expert_weights=w), repeats)
        used = float((weights != 0).sum(dim=1).float().mean())
        print(f"{name:40} {times[name]:7.3f} s  {times[name] / alone:5.2f} x shared  ({used:.2f} experts an input)")
    whole = median(lambda: model(**inputs), repeats)
    print(f"{'with the routing pass':40} {whole:7.3f} s  {whole / alone:5.2f} x shared")
    print("model.classify, which leaves out padding:")
    for name, weights in cases.items():
        times[name] = median(lambda w=weights: model.classify(inputs, expert_weights=w), repeats)
        print(f"{name:40} {times[name]:7.3f} s")
    times[ROUTED] = median(lambda: model.classify(inputs), repeats)
    print(f"{ROUTED:40} {times[ROUTED]:7.3f} s")
    peer(model, bundle, shared, inputs, cases, times)


def peer(model: Any, bundle: Bundle, shared: Any, inputs: Any, cases: Mapping[str, Tensor], times: Any) -> None:
    """Time the authors' scheme on the same inputs, and compare the outputs."""
    own = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    changes = changes_of(bundle, shared)
    for name, weights in cases.items():
        rows: list[Tensor] = []
        spent: list[float] = []
        for row, own_weights in enumerate(weights):
            length = int(inputs["attention_mask"][row].sum())
            one = {key: value[row : row + 1, :length] for key, value in inputs.items()}
            start = time.perf_counter()
            rows.append(rebuilt(shared, own, changes, own_weights, one))
            spent.append(time.perf_counter() - start)
        seconds = statistics.median(spent) * len(rows)
        found = model(**inputs, expert_weights=weights, output_hidden_states=True).hidden_states[-1]
        apart = max(float((found[row, : len(rest)] - rest).abs().max()) for row, rest in enumerate(rows))
        print(f"rebuilt for every input: {name:32} {seconds:7.3f} s  identical within {apart:.1e}")
        print(f"  model.classify with given weights is {seconds / times[name]:.1f} times as fast")
        if name == "as routed":
            print(f"  and {seconds / times[ROUTED]:.1f} times with its routing pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        throughput(arguments.bundle, arguments.tasks, arguments.batch, arguments.repeats)


if __name__ == "__main__":
    main()
