"""`weld merge RECIPE OUT`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: mergekit-style YAML.", show_default=False)]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a value of the recipe; may be repeated.")
]
SeedOption = Annotated[int | None, typer.Option(help="Seed of random methods; replaces the recipe's.", show_default=False)]
ShardOption = Annotated[str, typer.Option(metavar="SIZE", help="Largest size of an output file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def command(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output folder.", show_default=False)],
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Worker threads.", show_default="all processors")] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to stay within, such as 2GB.", show_default=False)
    ] = None,
    seed: SeedOption = None,
    shard_size: ShardOption = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start afresh after an interrupted run.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Report NaN and infinity in the result instead of failing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the plan, write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    as_json: JsonOption = False,
    set_: SetOption = [],  # noqa: B006  (typer copies it)
) -> None:
    """Merge models as RECIPE says and write the merged model to OUT.

    OUT appears only when it is complete. A merge that was interrupted goes on where it was when
    the same command is run again.
    """
    import time

    from weldment.cli.console import duration, parse_size, size
    from weldment.cli.plan import forecast, plan_record, show_plan
    from weldment.cli.progress import reporter
    from weldment.merging import merge, plan

    limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    shard = parse_size(shard_size, "--shard-size")
    if dry_run:
        from weldment.checkpoint.staging import check_output
        from weldment.engine.memory import fit

        planned = plan(recipe, overrides=set_, shard_size=shard, seed=seed)
        check_output(out, overwrite=overwrite)
        machine, block = fit(planned, device, threads, limit)
        if as_json:
            typer.echo(json.dumps(plan_record(planned), indent=1))
        elif not quiet:
            show_plan(planned, forecast(planned, out, machine.threads, block))
        return
    started = time.monotonic()
    with reporter(quiet or as_json) as progress:
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
    seconds = time.monotonic() - started
    if as_json:
        record = {"out": str(result.path), "seconds": round(seconds, 3), **plan_record(result.plan)}
        typer.echo(json.dumps(record, indent=1))
    elif not quiet:
        written = result.plan.write_bytes
        typer.echo(f"done  {result.path}  {size(written)} in {duration(seconds)}  plan {result.plan.hash[:12]}")
