"""`weld merge RECIPE [OUT]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from weldment.adapters.merge.plan import AdapterPlan
    from weldment.merging import MergeResult
    from weldment.planning.plan import Plan

RecipeArgument = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="A recipe: YAML of mergekit's, PEFT's or DRM's kind.", show_default=False),
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the recipe; may be repeated.")
]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of random methods; replaces the recipe's.", show_default=False)
]
ShardOption = Annotated[str, typer.Option(metavar="SIZE", help="Largest size of an output file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]

ThreadsOption = Annotated[
    int | None, typer.Option(help="Workers, each on one processor.", show_default="all processors")
]
MemoryOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory to stay within, such as 2GB.", show_default=False)
]
NonfiniteOption = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Report NaN and infinity in the result instead of failing.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan, write nothing.")]


def command(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]", help="The output folder; by default a DRM file's `save_path`.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps or auto.")] = "cpu",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = None,
    seed: SeedOption = None,
    shard_size: ShardOption = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start afresh after an interrupted run.")] = False,
    allow_nonfinite: NonfiniteOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    set_: SetOption = [],  # noqa: B006  (typer copies it)
) -> None:
    """Merge models as RECIPE says and write the result to OUT.

    OUT appears only when it is complete. A merge that was interrupted goes on where it was when
    the same command is run again.
    """
    import os
    import time

    from weldment.cli.console import parse_size
    from weldment.cli.progress import reporter
    from weldment.merging import merge, output_folder, plan

    if quiet:
        # huggingface_hub, which is not imported yet, has progress bars of its own.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    shard = parse_size(shard_size, "--shard-size")
    if dry_run:
        planned = plan(recipe, overrides=set_, shard_size=shard, seed=seed)
        folder = output_folder(out, planned.recipe)
        _check(planned, recipe, folder, overwrite=overwrite)
        _show(planned, folder, device, threads, limit, as_json=as_json, quiet=quiet)
        return
    started = time.monotonic()
    try:
        with reporter(quiet) as progress:
            result = merge(
                recipe,
                out,
                overrides=set_,
                device=device,
                threads=threads,
                max_memory=limit,
                seed=seed,
                shard_size=shard,
                overwrite=overwrite,
                resume=not no_resume,
                allow_nonfinite=allow_nonfinite,
                progress=progress,
            )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_how_to_go_on(out or _saved_to(recipe, set_))) from interrupt
    _report(result, time.monotonic() - started, as_json=as_json, quiet=quiet)


def _check(planned: Plan | AdapterPlan, recipe: Path, out: Path, *, overwrite: bool) -> None:
    """OutputError if the output may not stand at `out`."""
    from weldment.adapters.merge.plan import AdapterPlan
    from weldment.merging import check_target

    if isinstance(planned, AdapterPlan):
        check_target(out, recipe, planned.adapters, overwrite=overwrite)
        return
    models = {name: model for each in (*planned.stages, planned) for name, model in each.models.items()}
    check_target(out, recipe, models, overwrite=overwrite)


def _show(
    planned: Plan | AdapterPlan,
    out: Path,
    device: str,
    threads: int | None,
    limit: int | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print the plan as it would run with these limits."""
    from weldment.adapters.merge.memory import fit_adapters
    from weldment.adapters.merge.plan import AdapterPlan
    from weldment.cli.adapter_plan import adapter_forecast, show_adapters
    from weldment.cli.plan import forecast, show
    from weldment.engine.memory import fit

    if isinstance(planned, AdapterPlan):
        cast = adapter_forecast(planned, out, fit_adapters(planned, device, threads, limit))
        show_adapters(planned, cast, as_json=as_json, quiet=quiet)
        return
    machine, block = fit(planned, device, threads, limit)
    show(planned, forecast(planned, out, machine.threads, block), as_json=as_json, quiet=quiet)


def _saved_to(recipe: Path, overrides: list[str]) -> Path | None:
    """The folder that a recipe names; None if it names none, or cannot be read again."""
    from weldment.errors import UserError
    from weldment.merging import output_folder
    from weldment.recipe import load_recipes

    try:
        return output_folder(None, load_recipes(recipe, overrides=overrides)[-1]) if recipe.is_file() else None
    except UserError:
        return None


def _how_to_go_on(out: Path | None) -> str:
    from weldment.checkpoint.staging import is_unfinished, partial_folder

    if out is None:
        return "run the same command again"
    if not is_unfinished(out):
        return "nothing was written"
    return f"run the same command again to go on from here, or delete {partial_folder(out)}"


def _report(result: MergeResult, seconds: float, *, as_json: bool, quiet: bool) -> None:
    import json

    from weldment.adapters.merge.plan import AdapterPlan
    from weldment.cli.adapter_plan import adapter_record
    from weldment.cli.console import duration, size
    from weldment.cli.plan import plan_record

    if as_json:
        planned = result.plan
        what = (
            {**adapter_record(planned), "lost": result.lost}
            if isinstance(planned, AdapterPlan)
            else plan_record(planned)
        )
        typer.echo(json.dumps({"out": str(result.path), "seconds": round(seconds, 3), **what}, indent=1))
    elif not quiet:
        written = size(_written(result))
        typer.echo(f"done: {result.path}, {written} in {duration(seconds)}, plan {result.plan.hash[:12]}")


def _written(result: MergeResult) -> int:
    """Bytes of weights; ranks are known only when an adapter is made."""
    from weldment.planning.plan import Plan

    if isinstance(result.plan, Plan):
        return result.plan.write_bytes
    return sum(path.stat().st_size for path in result.path.rglob("*.safetensors"))
