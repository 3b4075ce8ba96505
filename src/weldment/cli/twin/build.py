"""`weld twin build RECIPE OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weldment.cli.merge import MemoryOption, QuietOption, RecipeArgument, SetOption, ThreadsOption


def command(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder.", show_default=False)],
    threads: ThreadsOption = None,
    max_memory: MemoryOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    quiet: QuietOption = False,
    set_: SetOption = [],  # noqa: B006  (typer copies it)
) -> None:
    """Build a Twin bundle: a shared model, what each expert has beyond it, compressed, and a router."""
    from weldment.cli.console import parse_size
    from weldment.cli.progress import reporter
    from weldment.twin.build import build

    limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    with reporter(quiet) as progress:
        build(recipe, out, overrides=set_, threads=threads, max_memory=limit, overwrite=overwrite, progress=progress)
