"""Train four experts, merge them by five methods, and compare: `python examples/digits/demo.py`.

Writes the models, the recipes, the merged models, a table and a page into `demo_output/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from page import page
from results import Results, Row
from rich.console import Console
from rich.table import Table
from training import QUICK, TASKS, Effort, Images, accuracies, load_images, load_part, train_models

import weldment

HERE = Path(__file__).resolve().parent
METHODS = ("linear", "task_arithmetic", "ties", "della_linear", "consensus_ta")


def merge_all(console: Console) -> None:
    """Merge the experts as each recipe says."""
    for method in METHODS:
        started = time.perf_counter()
        result = weldment.merge(f"recipes/{method}.yml", f"merged/{method}", overwrite=True)
        checked = weldment.verify(result.path)
        took = time.perf_counter() - started
        console.print(f"  {method:16} {checked.tensors} tensors written and verified in {took:.2f} s")


def measure(images: Images) -> Results:
    """Accuracy of every model in every task, on images that no model was trained on."""
    models, merged = Path("models"), Path("merged")
    experts = {task.name: models / task.name / "model.safetensors" for task in TASKS}
    rows = [
        Row("base", "base", accuracies(load_part(models / "base" / "model.safetensors", "backbone"), experts, images))
    ]
    rows += [
        Row(name, "expert", accuracies(load_part(file, "backbone"), experts, images)) for name, file in experts.items()
    ]
    for method in METHODS:
        weights = load_part(merged / method / "model.safetensors", "backbone")
        heads = {task.name: merged / method / "heads" / f"{task.name}.safetensors" for task in TASKS}
        rows.append(Row(method, "merge", accuracies(weights, heads, images)))
    return Results({task.name: task.question for task in TASKS}, len(images.digits), tuple(rows))


def table(results: Results) -> Table:
    """The accuracies in percent; each expert's own task and the best merge stand out."""
    shown = Table(title=f"accuracy in %, {results.images} held-out images", title_justify="left", header_style="bold")
    shown.add_column("backbone")
    for name in (*results.tasks, "mean"):
        shown.add_column(name, justify="right")
    kind = "base"
    for row in results.rows:
        if row.kind != kind:
            shown.add_section()
            kind = row.kind
        cells = [
            f"[bold]{100 * value:.1f}[/]" if name == row.name else f"{100 * value:.1f}"
            for name, value in row.accuracy.items()
        ]
        mean = f"{100 * row.mean:.1f}"
        label = f"expert in {row.name}" if row.kind == "expert" else row.name
        shown.add_row(label, *cells, f"[bold green]{mean}[/]" if row is results.best_merge else mean)
    return shown


def run(out: Path, effort: Effort, console: Console) -> None:
    """The whole demo, in the folder `out`."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    for folder in ("models", "recipes", "merged"):
        shutil.rmtree(out / folder, ignore_errors=True)
    shutil.copytree(HERE / "recipes", out / "recipes")
    os.chdir(out)
    train, test = load_images()
    console.print("[bold]1. train[/] a backbone and four experts on scikit-learn's digits")
    train_models(Path("models"), train, effort)
    console.print(f"[bold]2. merge[/] the experts by {len(METHODS)} methods")
    merge_all(console)
    console.print("[bold]3. compare[/]")
    results = measure(test)
    console.print(table(results))
    Path("results.json").write_text(json.dumps(results.record(), indent=1) + "\n", encoding="utf-8")
    Path("index.html").write_text(page(results, Path("recipes")), encoding="utf-8")
    console.print(
        f"page: {out / 'index.html'}   ({time.perf_counter() - started:.0f} s)", highlight=False, soft_wrap=True
    )
    weld = os.path.relpath(Path(sys.executable).with_name("weld"), out)
    console.print(f"try:  cd {out.name} && {weld} plan recipes/ties.yml", highlight=False, soft_wrap=True)


def main() -> None:
    """Read the options and run."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("demo_output"), help="folder to write into")
    options.add_argument("--quick", action="store_true", help="train less, for a try: lower accuracies")
    chosen = options.parse_args()
    run(chosen.out.absolute(), QUICK if chosen.quick else Effort(), Console())


if __name__ == "__main__":
    main()
