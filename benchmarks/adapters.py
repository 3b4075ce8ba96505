"""Time merges of LoRA adapters, as files and inside a loaded model against PEFT.

    python benchmarks/adapters.py files [--shape llama-8b] [--dtype bfloat16] [--runs 3]
    python benchmarks/adapters.py live [--layers 16] [--type svd]

`files` makes three adapters of all linear layers (r 16, 64 and 128, random), merges them with `weld merge` in
different spaces, without a base, and prints wall time, CPU time and peak memory of the process and its workers.
`live` puts the same adapters of the 1.24B shape on a model of that shape, whose own weights do not matter, and calls
PEFT's `add_weighted_adapter` and ours, one after the other in one process. PEFT's `svd` decomposes every dense
matrix, which takes minutes; --layers takes the first layers only, for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from make_checkpoints import SHAPES, config, tensors
from run import WORK, Run, measured, settle_memory

RANKS = (16, 64, 128)
WEIGHTS = (0.5, 0.3, 0.2)
RECIPES: dict[str, dict[str, Any]] = {
    "cat": {"merge_method": "task_arithmetic", "space": "cat", "rank": "full"},
    "core, rank 16": {"merge_method": "task_arithmetic", "space": "core", "rank": 16},
    "delta, rank 16": {"merge_method": "task_arithmetic", "space": "delta", "rank": 16},
    "core, ties, rank 16": {"merge_method": "ties", "space": "core", "rank": 16, "parameters": {"density": 0.5}},
}


def linear_layers(shape: dict[str, int], layers: int | None = None) -> list[tuple[str, tuple[int, ...]]]:
    """(module, (outputs, inputs)) of the seven linear modules of every layer."""
    wanted = shape | ({"layers": layers} if layers is not None else {})
    return [(name.removesuffix(".weight"), size) for name, size in tensors(wanted) if name.endswith("proj.weight")]


def adapter_config(rank: int, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "inference_mode": True,
    }


def make_adapter(
    folder: Path, base: str, modules: Sequence[tuple[str, tuple[int, ...]]], rank: int, dtype: str
) -> None:
    """An adapter of these modules with random A and B, the same whenever it is made again."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(rank)
    found: dict[str, torch.Tensor] = {}
    for module, (outputs, inputs) in modules:
        for part, size in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            values = torch.randn(size, generator=generator).mul_(0.02)
            found[f"base_model.model.{module}.{part}.weight"] = values.to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(rank, base), indent=1))


def adapters(shape: str, dtype: str, layers: int | None = None) -> list[Path]:
    """The folders of the adapters, made if they are not there."""
    depth = layers if layers is not None else SHAPES[shape]["layers"]
    folders = [WORK / "adapters" / f"{shape}-{depth}-{dtype}" / f"r{rank}" for rank in RANKS]
    for folder, rank in zip(folders, RANKS, strict=True):
        if not (folder / "adapter_config.json").exists():
            make_adapter(folder, f"benchmarks/{shape}", linear_layers(SHAPES[shape], layers), rank, dtype)
    return folders


def recipe(content: dict[str, Any], folders: Sequence[Path]) -> str:
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, WEIGHTS, strict=True)]
    return json.dumps({**content, "models": models})


def merges(options: argparse.Namespace) -> list[str]:
    """A line for each recipe."""
    folders = adapters(options.shape, options.dtype)
    size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
    lines = [
        f"three adapters of {options.shape}, r {RANKS}, {options.dtype}, {size / 1e6:.0f} MB; "
        f"{machine(options.threads)}; medians of {options.runs}",
        "",
        "| recipe | wall s | merge s | CPU s | peak MB | written MB |\n" + "|---" * 6 + "|",
    ]
    print("\n".join(lines), flush=True)
    for label in options.recipes.split(";"):
        lines.append(one_recipe(label, folders, options))
        print(lines[-1], flush=True)
    return lines


def one_recipe(label: str, folders: Sequence[Path], options: argparse.Namespace) -> str:
    file, out = WORK / "adapters.yml", WORK / "adapter-out"
    file.write_text(recipe(RECIPES[label], folders))
    command = [sys.executable, "-m", "weldment", "merge", str(file), str(out), "--json", "--quiet", "--overwrite"]
    runs: list[Run] = []
    for _ in range(options.runs):
        shutil.rmtree(out, ignore_errors=True)
        settle_memory()
        for folder in folders:
            (folder / "adapter_model.safetensors").read_bytes()
        runs.append(measured([*command, "--threads", str(options.threads)]))
    written = (out / "adapter_model.safetensors").stat().st_size
    shutil.rmtree(out, ignore_errors=True)
    wall, inner, cpu, peak = (
        statistics.median(getattr(run, f) for run in runs) for f in ("wall", "inner", "cpu", "peak")
    )
    return f"| {label} | {wall:.1f} | {inner:.1f} | {cpu:.1f} | {peak / 1e6:.0f} | {written / 1e6:.0f} |"


def empty_model(shape: dict[str, int], layers: int) -> Any:
    """A model of this shape whose weights are whatever memory holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(**(config(shape) | {"num_hidden_layers": layers}))
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    return model.to(torch.bfloat16).to_empty(device="cpu")


def live(options: argparse.Namespace) -> list[str]:
    """PEFT's call and ours on one model."""
    from peft import PeftModel

    from weldment import add_weighted_adapter

    folders = adapters("llama-1b", "float32", options.layers)
    model = PeftModel.from_pretrained(empty_model(SHAPES["llama-1b"], options.layers), folders[0], adapter_name="a0")
    names = ["a0"]
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{number}")
        names.append(f"a{number}")
    arguments: dict[str, Any] = {"combination_type": options.type}
    if "svd" in options.type:
        arguments["svd_rank"] = 16
    if options.type.partition("_")[0] in ("ties", "dare", "magnitude"):
        arguments["density"] = 0.5
    ours = timed(lambda: add_weighted_adapter(model, names, list(WEIGHTS), "ours", **arguments))
    theirs = timed(lambda: model.add_weighted_adapter(names, list(WEIGHTS), "theirs", **arguments))
    lines = [
        f"add_weighted_adapter on {options.layers} layers of the 1.24B shape, r {RANKS}; {machine(options.threads)}",
        "",
        "| type | ours s | PEFT s | PEFT / ours | largest difference of B A |\n" + "|---" * 5 + "|",
        f"| {options.type} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.0f}x | {difference(model):.1e} |",
    ]
    print("\n".join(lines), flush=True)
    return lines


def difference(model: Any) -> float:
    """The largest relative difference of the two merged adapters' B A in the modules of the first layer."""
    worst = 0.0
    for name, module in model.named_modules():
        if ".layers.0." in name and hasattr(module, "lora_A") and "ours" in module.lora_A:
            first, second = (
                module.scaling[key] * (module.lora_B[key].weight.double() @ module.lora_A[key].weight.double())
                for key in ("ours", "theirs")
            )
            worst = max(worst, float((first - second).norm() / second.norm()))
    return worst


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def machine(threads: int) -> str:
    return f"{platform.processor() or platform.machine()}, {threads} threads, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time merges of LoRA adapters.")
    parser.add_argument("what", choices=("files", "live", "make"))
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--recipes", default=";".join(RECIPES), help="labels, separated by semicolons")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=SHAPES["llama-1b"]["layers"], help="of the model of `live`")
    parser.add_argument("--type", default="svd", help="combination_type of `live`")
    options = parser.parse_args()
    if options.what == "make":
        print("\n".join(map(str, adapters(options.shape, options.dtype))))
        return
    lines = merges(options) if options.what == "files" else live(options)
    (WORK / "adapters.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
