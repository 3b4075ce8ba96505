"""`weld twin export BUNDLE DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weldment.cli.merge import QuietOption


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What was built.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The export's folder.", show_default=False)],
    export: Annotated[str, typer.Option("--export", metavar="FORMAT", help="For whom: vllm.")] = "vllm",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is not empty.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a bundle for vLLM, with a LoRA adapter for each expert.

    vLLM applies the adapter that a request names: the expert that the router puts first.
    """
    from weldment.errors import UserError
    from weldment.twin.export import export_vllm

    if export != "vllm":
        raise UserError(f"{export!r} is not a format to export to", where="--export", fix="Write vllm")
    start = export_vllm(bundle, out, overwrite=overwrite)
    if not quiet:
        typer.echo(f"done: {out}; in that folder: {start}")
