"""`weld soup MODEL... --task DIR... --out OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weldment.cli.eval import (
    BatchOption,
    EvalDeviceOption,
    EvalDtypeOption,
    HeadOption,
    LengthOption,
    LimitOption,
    TaskOption,
)
from weldment.cli.merge import JsonOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weldment.evaluation.scores import Scores
    from weldment.evaluation.soups.soup import Candidate, How, SoupResult, Told

Row = tuple[str, ...]


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Models that were fine-tuned from one start on the same task: folders, org/name, or base+adapter.",
            show_default=False,
        ),
    ],
    task: TaskOption,
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="The output folder.", show_default=False)],
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Add models while the mean gets no worse (default).")
    ] = False,
    uniform: Annotated[bool, typer.Option("--uniform", help="The mean of all models.")] = False,
    learned: Annotated[bool, typer.Option("--learned", help="Search the models' weights with Optuna.")] = False,
    trials: Annotated[int | None, typer.Option(help="Means that --learned scores.", show_default="30")] = None,
    head: HeadOption = [],  # noqa: B006  (typer copies it)
    limit: LimitOption = None,
    batch_size: BatchOption = 64,
    max_length: LengthOption = None,
    device: EvalDeviceOption = "cpu",
    dtype: EvalDtypeOption = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Average the models that are best together.

    They are chosen on the tasks' validation splits, and their mean is written to OUT. Scores on the test splits are
    shown beside, and never used to choose.
    """
    import json

    from weldment.cli.scoring import parse_heads, scoring
    from weldment.engine.memory import pick_device
    from weldment.evaluation.soups.soup import TRIALS, soup

    how = _how(greedy, uniform, learned, trials)
    heads = parse_heads(head)
    with scoring(quiet) as report:
        result = soup(
            models,
            task,
            out,
            how=how,
            trials=TRIALS if trials is None else trials,
            heads=heads,
            overwrite=overwrite,
            report=report,
            told=_teller(quiet),
            limit=limit,
            batch=batch_size,
            max_length=max_length,
            device=pick_device(device),
            dtype=dtype,
        )
    if as_json:
        typer.echo(json.dumps(_record(result), indent=1))
    else:
        _show(result)


def _how(greedy: bool, uniform: bool, learned: bool, trials: int | None) -> How:
    """Which soup is asked for.

    Raises:
        UserError: more than one, or trials of one that has none.
    """
    from weldment.errors import UserError

    if greedy + uniform + learned > 1:
        raise UserError("more than one kind of soup", fix="Give one of --greedy, --uniform and --learned")
    if trials is not None and not learned:
        raise UserError("only --learned has trials", where="--trials", fix="Add --learned, or leave --trials out")
    return "uniform" if uniform else "learned" if learned else "greedy"


def _teller(quiet: bool) -> Told:
    """Prints a line to standard error for all that is scored."""

    def told(what: str, value: float, kept: bool | None) -> None:
        verdict = "" if kept is None else "  kept" if kept else "  not kept"
        typer.echo(f"{value:.4f}  {what}{verdict}", err=True)

    return (lambda what, value, kept: None) if quiet else told


def _show(result: SoupResult) -> None:
    """The table of scores, the recipe, and what was written."""
    import yaml

    from weldment.cli.console import columns, plural, size

    for note in result.merged.plan.notes:
        typer.echo(f"note: {note}", err=True)
    for line in columns(_rows(result), 100, right=(1, 2)):
        typer.echo(line)
    typer.echo()
    typer.echo(yaml.safe_dump(dict(result.recipe), sort_keys=False).rstrip())
    typer.echo()
    written = size(sum(path.stat().st_size for path in result.path.glob("*.safetensors")))
    among = f"{len(result.soup.weights)} of {plural(len(result.models), 'model')}"
    typer.echo(f"done: {result.path}, {written}, {among}, plan {result.merged.plan.hash[:12]}")


def _rows(result: SoupResult) -> list[Row]:
    tasks = list(result.soup.validation)
    mean = f" (mean of {len(tasks)} tasks)" if len(tasks) > 1 else ""
    rows: list[Row] = [("model", f"validation{mean}", f"test{mean}", "95 % interval", "")]
    rows += [_row(single, _share(single, result.soup)) for single in result.models]
    return [*rows, _row(result.uniform, ""), _row(result.soup, "written")]


def _share(single: Candidate, soup: Candidate) -> str:
    """What part of the soup a model is."""
    weight = soup.weights.get(next(iter(single.weights)), 0.0)
    return f"{weight / sum(soup.weights.values()):.0%} of the soup" if weight else "left out"


def _row(candidate: Candidate, note: str) -> Row:
    from weldment.evaluation.soups.soup import mean_of

    if not candidate.test:
        return candidate.name, f"{candidate.value:.3f}", "–", "–", note
    test = mean_of(candidate.test)
    low, high = test.interval
    return candidate.name, f"{candidate.value:.3f}", f"{test.value:.3f}", f"{low:.3f} to {high:.3f}", note


def _record(result: SoupResult) -> dict[str, Any]:
    return {
        "out": str(result.path),
        "how": result.how,
        "plan": result.merged.plan.hash,
        "recipe": result.recipe,
        "soup": _scored(result.soup),
        "uniform": _scored(result.uniform),
        "models": _all_scored(result.models),
        "tried": _all_scored(result.tried),
    }


def _all_scored(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    return [_scored(candidate) for candidate in candidates]


def _scored(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "weights": dict(candidate.weights),
        "validation": _records(candidate.validation),
        "test": _records(candidate.test),
    }


def _records(scores: Scores) -> list[dict[str, Any]]:
    return [score.record() for score in scores.values()]
