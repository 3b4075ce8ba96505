"""`weld twin`: one small file for each command, heavy imports inside the commands."""

from __future__ import annotations

import typer

from weldment.cli.console import interruptible
from weldment.cli.twin import build, eval, export, serve

app = typer.Typer(
    name="twin",
    help="Twin-Merging: merges that mix experts for every input.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command in {
    "build": build.command,
    "eval": eval.command,
    "export": export.command,
    "serve": serve.command,
}.items():
    app.command(_name)(interruptible(_command))
