"""`weld compare RECIPE... --task DIR...`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weldment.cli.eval import (
    BaseOption,
    BatchOption,
    EvalDeviceOption,
    EvalDtypeOption,
    ExpertOption,
    HeadOption,
    LengthOption,
    LimitOption,
    RecalibrateOption,
    SplitOption,
    TaskOption,
)
from weldment.errors import UserError

if TYPE_CHECKING:
    from weldment.evaluation.comparison.rows import Row


def command(
    recipe: Annotated[list[str], typer.Argument(metavar="RECIPE", help="Recipes, YAML files.", show_default=False)],
    task: TaskOption,
    base: BaseOption = None,
    expert: ExpertOption = [],  # noqa: B006  (typer copies it)
    head: HeadOption = [],  # noqa: B006  (typer copies it)
    seeds: Annotated[int, typer.Option(help="How often merges with random masks are made, each with its seed.")] = 1,
    split: SplitOption = "test",
    limit: LimitOption = None,
    batch_size: BatchOption = 64,
    max_length: LengthOption = None,
    device: EvalDeviceOption = "cpu",
    dtype: EvalDtypeOption = "float32",
    recalibrate: RecalibrateOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder to save comparison.md, .csv, .json and .html in.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files in DIR that are in the way.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")] = False,
) -> None:
    """Score merges beside their experts and baselines.

    The recipes are merged in memory; the baselines are the base, the plain average and task arithmetic.
    """
    from weldment.cli.console import has_colors
    from weldment.cli.scoring import parse_heads, scoring
    from weldment.engine.memory import pick_device
    from weldment.evaluation.comparison import saving, tables
    from weldment.evaluation.comparison.compare import compare

    _refuse_tasks(recipe)
    experts = parse_heads(expert, "--expert")
    heads = parse_heads(head)
    if out is not None:
        saving.check_folder(out, overwrite=overwrite)
    with scoring(quiet) as report:
        found = compare(
            recipe,
            task,
            base=base,
            experts=experts,
            heads=heads,
            seeds=seeds,
            report=report,
            finished=_speaker(quiet),
            split=split,
            limit=limit,
            batch=batch_size,
            max_length=max_length,
            device=pick_device(device),
            dtype=dtype,
            recalibrate=recalibrate,
        )
    written = [] if out is None else saving.save(found, out)
    typer.echo(saving.as_json(found) if as_json else tables.as_text(found, color=has_colors()), nl=not as_json)
    if written and not quiet:
        typer.echo(f"saved {', '.join(path.name for path in written)} in {out}", err=True)


def _refuse_tasks(recipes: Sequence[str]) -> None:
    """UserError for task folders among the recipes: an option takes one value."""
    for place in recipes:
        if (Path(place) / "task.json").is_file():
            raise UserError("is a task, not a recipe", where=place, fix="Write --task before each task")


def _speaker(quiet: bool) -> Callable[[Row], None]:
    """Says what is done, where there is no bar to see it."""

    def say(row: Row) -> None:
        if not quiet and not sys.stderr.isatty():
            scores = ", ".join(f"{task} {score.value:.3f}" for task, score in row.scores.items())
            typer.echo(f"{row.name}: {scores or 'no task'}", err=True)

    return say
