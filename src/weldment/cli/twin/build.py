"""`weld twin build RECIPE OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weldment.cli.merge import (
    JsonOption,
    MemoryOption,
    QuietOption,
    RecipeArgument,
    SeedOption,
    SetOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from weldment.twin.bundle import Bundle


def command(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder.", show_default=False)],
    threads: ThreadsOption = None,
    max_memory: MemoryOption = None,
    seed: SeedOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    set_: SetOption = [],  # noqa: B006  (typer copies it)
) -> None:
    """Build a bundle: a shared model, what experts add to it, a router.

    OUT appears only when it is complete. A build that was interrupted leaves it as it was, and starts
    from the beginning when the same command is run again.
    """
    import time

    from weldment.cli.console import parse_size
    from weldment.cli.progress import reporter
    from weldment.twin.build import build

    limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    started = time.monotonic()
    with reporter(quiet) as progress:
        bundle = build(
            recipe,
            out,
            overrides=set_,
            threads=threads,
            max_memory=limit,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    _report(bundle, time.monotonic() - started, as_json=as_json, quiet=quiet)


def _report(bundle: Bundle, seconds: float, *, as_json: bool, quiet: bool) -> None:
    import json

    from weldment.cli.console import columns, duration, size

    total = sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file())
    if as_json:
        experts = [{"name": part.name, "bytes": part.nbytes, "kept": part.kept} for part in bundle.experts]
        record = {"out": str(bundle.folder), "seconds": round(seconds, 3), "bytes": total, "experts": experts}
        typer.echo(json.dumps(record, indent=1))
    elif not quiet:
        kept = ("–" if part.kept is None else f"{part.kept:.1%}" for part in bundle.experts)
        rows = [(part.name, size(part.nbytes), share) for part, share in zip(bundle.experts, kept, strict=True)]
        typer.echo("\n".join(columns([("expert", "size", "squared difference kept"), *rows], 100, right=(1,))))
        typer.echo(f"done: {bundle.folder}, {size(total)} in {duration(seconds)}")
