"""The `weld` command: one small file for each subcommand, heavy imports inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from weldment.cli import merge, methods, plan, verify
from weldment.errors import WeldmentError
from weldment.version import __version__

app = typer.Typer(
    name="weld",
    help="Merge fine-tuned neural networks into one model, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("merge")(merge.command)
app.command("plan")(plan.command)
app.command("methods")(methods.command)
app.command("verify")(verify.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weldment {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
) -> None:
    """Options that stand before the subcommand."""


def main() -> None:
    """Run the command line: exit code 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    debug = "--debug" in sys.argv
    # --debug may stand anywhere; the root option only documents it.
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except WeldmentError as error:
        if debug:
            raise
        from weldment.cli.console import complain

        complain(error)
        sys.exit(error.exit_code)
    except BaseException as error:
        if debug or type(error).__name__ != "Interrupted":
            raise
        typer.echo("interrupted; run the same command again to go on from here", err=True)
        sys.exit(130)
