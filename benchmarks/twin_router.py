"""What a router should see of an input, chosen on validation; the choice alone is then scored on test, once.

    python benchmarks/twin_router.py BUNDLE TASKS [--examples 1000] [--seeds 3]

BUNDLE's shared model reads the inputs; its experts are called as the task folders in TASKS. For every set of layers a
network is trained on examples of train, by as many seeds, and stopped on one half of 500 examples of validation. What
decides is the accuracy on the other half. Of the sets that a recipe can name (`last`, `spread`), the best is chosen
where it is more than two standard errors of the paired difference ahead of `last`, which Twin-Merging has. No number
of a test split takes part in the choice.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weldment.evaluation.tasks import Task, load_task
from weldment.twin.bundle import read_bundle
from weldment.twin.features import spread_layers
from weldment.twin.fitting import Sample, train_mlp
from weldment.twin.router import Router, RouterConfig
from weldment.twin.training import Reader, confusion, shuffled

OFFERED = ("last", "spread")
WIDTH, EPOCHS = 128, 60


def sample(reader: Reader, tasks: Sequence[Task], name: str, limit: int | None) -> Sample:
    """Features of all layers side by side, (n, layers * hidden), of as many examples of every task's split."""
    parts: list[Tensor] = []
    for task in tasks:
        split = shuffled(task.split(name), 0)
        parts.append(reader(split if limit is None else split.first(limit), f"{task.name}, {name}"))
    experts = [torch.full((len(part),), place) for place, part in enumerate(parts)]
    return Sample(torch.cat(parts), torch.cat(experts))


def seen(whole: Sample, layers: Sequence[int], width: int) -> Sample:
    """Of some layers only."""
    columns = [whole.features[:, layer * width : (layer + 1) * width] for layer in layers]
    return Sample(torch.cat(columns, dim=1), whole.experts)


def halves(whole: Sample) -> tuple[Sample, Sample]:
    """Every second example: to stop by, and to choose by."""
    first, second = (Sample(whole.features[start::2], whole.experts[start::2]) for start in (0, 1))
    return first, second


def choices(parts: Sequence[Sample], names: tuple[str, ...], seed: int) -> Tensor:
    """Train on the first part, stop by the second; the first choice for every example of the third."""
    train, stop, other = parts
    state = train_mlp(train, stop, len(names), width=WIDTH, epochs=EPOCHS, seed=seed)
    return Router(RouterConfig("mlp", names), state).scores(other.features).argmax(dim=1)


def compare(
    train: Sample,
    stop: Sample,
    other: Sample,
    sets: Mapping[str, Sequence[int]],
    width: int,
    names: tuple[str, ...],
    seeds: int,
) -> str:
    """Print the accuracies of all sets on the other half of validation, and say which one is chosen."""
    right: dict[str, Tensor] = {}
    for name, layers in sets.items():
        parts = [seen(each, layers, width) for each in (train, stop, other)]
        runs = [choices(parts, names, seed) == other.experts for seed in range(seeds)]
        right[name] = torch.stack(runs).double().mean(dim=0)
        each = ", ".join(f"{float(run.double().mean()):.4f}" for run in runs)
        print(f"validation {name:8} layers {tuple(layers)!s:24} {float(right[name].mean()):.4f}  ({each})")
    ahead = right["spread"] - right["last"]
    error = float(ahead.std()) / len(ahead) ** 0.5
    chosen = "spread" if float(ahead.mean()) > 2 * error else "last"
    print(f"spread - last on validation: {float(ahead.mean()):+.4f}, standard error {error:.4f}: {chosen} is chosen")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    names = read_bundle(arguments.bundle).names
    tasks = [task for name in names if isinstance(task := load_task(arguments.tasks / name), Task)]
    reader = Reader(arguments.bundle, "last", 128)
    spread = spread_layers(reader.network)
    last = int(reader.network.config.num_hidden_layers)
    reader.layers = tuple(range(last + 1))
    width = int(reader.network.config.hidden_size)
    offered = {"last": (last,), "spread": (*spread[:-1], last)}
    sets = {**offered, "first": (0, last), "all": reader.layers}
    train, held = sample(reader, tasks, "train", arguments.examples), sample(reader, tasks, "validation", 500)
    stop, other = halves(held)
    chosen = sets[compare(train, stop, other, sets, width, names, arguments.seeds)]
    test = sample(reader, tasks, "test", None)
    parts = [seen(each, chosen, width) for each in (train, stop, test)]
    found = choices(parts, names, 0)
    table = confusion(test.experts, found, len(names))
    print(f"test, the choice alone, seed 0: {float((found == test.experts).double().mean()):.4f}")
    for name, row in zip(names, table, strict=True):
        print(f"{name:8} {row[names.index(name)] / sum(row):.3f} {' '.join(f'{n:5}' for n in row)}")


if __name__ == "__main__":
    main()
