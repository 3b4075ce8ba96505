"""`weld twin eval OUT --task DIR...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weldment.cli.eval import (
    BatchOption,
    EvalDeviceOption,
    EvalDtypeOption,
    LengthOption,
    LimitOption,
    SplitOption,
)

if TYPE_CHECKING:
    from weldment.twin.evaluation import TwinComparison

TaskFolders = Annotated[
    list[str],
    typer.Option(
        "--task",
        metavar="TASK",
        help="A task folder, a file of examples or org/name of a dataset; may be repeated.",
        show_default=False,
    ),
]


def command(
    bundle: Annotated[Path, typer.Argument(metavar="OUT", help="What `weld twin build` wrote.", show_default=False)],
    task: TaskFolders,
    expert: Annotated[
        list[str],
        typer.Option(metavar="TASK=NAME", help="The expert of a task; by default the one of the task's name."),
    ] = [],  # noqa: B006  (typer copies it)
    original: Annotated[
        list[str],
        typer.Option(metavar="NAME=MODEL", help="The model that an expert was made of, if it is not where it was."),
    ] = [],  # noqa: B006  (typer copies it)
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="LEVELS",
            help="Also score the bundle cut to fewer singular values: ranks or percents, such as 0.5%,2%,10% or 4,16.",
            show_default=False,
        ),
    ] = None,
    split: SplitOption = "test",
    limit: LimitOption = None,
    batch_size: BatchOption = 64,
    max_length: LengthOption = None,
    device: EvalDeviceOption = "cpu",
    dtype: EvalDtypeOption = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="A folder to save comparison.md, .csv, .json and .html in.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files in DIR that are in the way.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")] = False,
) -> None:
    """Score a bundle: shared model, experts, and all in one, routed."""
    from weldment.cli.scoring import parse_heads, scoring
    from weldment.engine.memory import pick_device
    from weldment.evaluation.comparison import saving
    from weldment.twin.cutting import levels
    from weldment.twin.evaluation import evaluate_twin
    from weldment.twin.evaluation_page import sections

    wanted = () if sweep is None else levels(sweep)
    experts = parse_heads(expert, "--expert")
    originals = parse_heads(original, "--original")
    if out is not None:
        saving.check_folder(out, overwrite=overwrite)
    with scoring(quiet) as report:
        found = evaluate_twin(
            bundle,
            task,
            experts=experts,
            originals=originals,
            sweep=wanted,
            report=report,
            split=split,
            limit=limit,
            batch=batch_size,
            max_length=max_length,
            device=pick_device(device),
            dtype=dtype,
        )
    written = [] if out is None else saving.save(found, out, list(sections(found)))
    typer.echo(saving.as_json(found) if as_json else _text(found), nl=not as_json)
    if written and not quiet:
        typer.echo(f"saved {', '.join(path.name for path in written)} in {out}", err=True)


def _text(found: TwinComparison) -> str:
    from weldment.cli.console import has_colors
    from weldment.evaluation.comparison import tables
    from weldment.twin.evaluation_page import routes_text

    return "\n".join([tables.as_text(found, color=has_colors()), "", *routes_text(found)])
