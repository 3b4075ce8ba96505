"""`weld verify OUT`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from weldment.cli.merge import JsonOption


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `weld merge` wrote.", show_default=False)],
    threads: Annotated[int | None, typer.Option(help="Worker threads.", show_default="all processors")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a merged model still is what was written: every tensor, every file."""
    from weldment.cli.console import size
    from weldment.verification import verify

    found = verify(out, threads=threads)
    if as_json:
        typer.echo(json.dumps({"ok": True, "tensors": found.tensors, "files": found.files, "bytes": found.nbytes}))
    else:
        typer.echo(f"ok  {found.tensors} tensors, {found.files} files, {size(found.nbytes)}")
