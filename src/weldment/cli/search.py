"""`weld search RECIPE --task DIR... --trials N`."""

from __future__ import annotations

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
    TaskOption,
)
from weldment.cli.merge import JsonOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from weldment.evaluation.search.result import SearchResult
    from weldment.evaluation.search.trials import Goal, Trial

StorageOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|URL",
        help="Where trials are kept: a SQLite file or an address that Optuna knows; may be shared by many processes.",
        show_default="RECIPE.search.db",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Where the best recipe is written.", show_default="RECIPE.best.yml"),
]


def command(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe with marks for values: {search: [0.1, 0.9]}, with `log: true` or `step: 0.1`, or "
            "{choices: [a, b]}.",
            show_default=False,
        ),
    ],
    task: TaskOption,
    trials: Annotated[int, typer.Option(help="Trials in all, those of earlier runs included.")] = 50,
    sampler: Annotated[str, typer.Option(help="How points are chosen: tpe, cmaes, random or grid.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    storage: StorageOption = None,
    out: OutOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the trials of earlier runs.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE even if no search wrote it.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Begin no trial after that time.", show_default="none")
    ] = None,
    base: BaseOption = None,
    expert: ExpertOption = [],  # noqa: B006  (typer copies it)
    head: HeadOption = [],  # noqa: B006
    limit: LimitOption = None,
    batch_size: BatchOption = 64,
    max_length: LengthOption = None,
    device: EvalDeviceOption = "cpu",
    dtype: EvalDtypeOption = "float32",
    recalibrate: RecalibrateOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the best values for the marks in RECIPE.

    Trials are merged in memory and chosen by the tasks' validation splits; the table at the end is of their test
    splits. The same command goes on where it was. Tasks are scored in the order given, and a trial that is worse
    than most is given up early: quick tasks first.
    """
    import json
    from functools import partial

    from weldment.cli.scoring import parse_heads, scoring
    from weldment.engine.memory import pick_device
    from weldment.evaluation.search.search import Messages, search
    from weldment.evaluation.states import short_name

    heads, experts = parse_heads(head), parse_heads(expert, "--expert")
    with scoring(quiet) as report:
        say: Callable[[str], None] = (lambda text: None) if quiet else partial(typer.echo, err=True)
        shown = Messages(say, lambda trial, best, goal: say(_line(trial, best, goal)), report)
        result = search(
            recipe,
            task,
            trials=trials,
            sampler=sampler,
            seed=seed,
            storage=storage,
            out=out or f"{short_name(str(recipe))}.best.yml",
            fresh=fresh,
            overwrite=overwrite,
            timeout=timeout,
            base=base,
            experts=experts,
            heads=heads,
            messages=shown,
            limit=limit,
            batch=batch_size,
            max_length=max_length,
            device=pick_device(device),
            dtype=dtype,
            recalibrate=recalibrate,
        )
    if as_json:
        typer.echo(json.dumps(result.record(), indent=1))
    else:
        _show(result)


def _line(trial: Trial, best: Trial | None, goal: Goal) -> str:
    """`trial 7: parameters.lambda = 0.412: 87.3 % of the experts, best so far: 88.1 (trial 4)`."""
    from weldment.evaluation.search.space import point

    came = f"failed: {trial.failure}" if trial.failure else trial.state
    if trial.value is not None:
        came = goal.shown(trial.value)
    elif trial.state == "pruned":
        came = f"given up after {', '.join(trial.scores)}"
    so_far = ""
    if best is not None and best.value is not None:
        is_new = best.number == trial.number
        so_far = ", the best so far" if is_new else f"; best so far {goal.shown(best.value)} (trial {best.number})"
    return f"trial {trial.number}: {point(trial.values)}: {came}{so_far}"


def _show(result: SearchResult) -> None:
    """The table on the test split, and the best point."""
    from weldment.cli.console import has_colors, plural
    from weldment.evaluation.comparison.tables import as_text
    from weldment.evaluation.search.space import point

    best, table = result.best, result.comparison
    typer.echo(as_text(table, color=has_colors()))
    number = f"trial {best.number} of {plural(len(result.trials), 'trial')}"
    typer.echo(f"best: {number}, {point(best.values)}; on validation {result.goal.shown(best.value or 0.0)}")
    if result.settings.out is not None:
        typer.echo(f"written: {result.settings.out}")
