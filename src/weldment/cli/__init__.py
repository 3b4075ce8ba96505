"""The `weld` command: one small file for each subcommand, heavy imports inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from weldment.cli import compare, extract, merge, methods, plan, search, soup, twin, verify
from weldment.cli import eval as evaluate
from weldment.cli.console import complain, complain_of_output, interruptible
from weldment.cli.startup import postpone
from weldment.errors import WeldmentError
from weldment.version import __version__

app = typer.Typer(
    name="weld",
    help="Merge fine-tuned neural networks into one model, without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _name, _command in {
    "merge": merge.command,
    "plan": plan.command,
    "methods": methods.command,
    "verify": verify.command,
    "extract": extract.command,
    "eval": evaluate.command,
    "compare": compare.command,
    "search": search.command,
    "soup": soup.command,
}.items():
    app.command(_name)(interruptible(_command))
app.add_typer(twin.app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weldment {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback with every error; may stand anywhere.")
    ] = False,
) -> None:
    """Options that stand before the subcommand."""


def _merges_on_the_cpu(given: Sequence[str]) -> bool:
    command = next((argument for argument in given if not argument.startswith("-")), "")
    return command == "merge" and not any(argument.startswith("--device") for argument in given)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    Args:
        arguments: those of the process by default. If they are given, the process is the caller's, and
            its imports stay as they are (see `startup`).

    Raises:
        SystemExit: with code 0 (done), 1 (failed), 2 (the user's mistake) or 130 (interrupted).
    """
    given = sys.argv[1:] if arguments is None else arguments
    if arguments is None:
        postpone(parts=_merges_on_the_cpu(given))
    try:
        # The root command only documents --debug, so that it may stand after the subcommand too.
        app(args=[argument for argument in given if argument != "--debug"], prog_name="weld")
    except WeldmentError as error:
        if "--debug" in given:
            raise
        complain(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if "--debug" in given:
            raise
        complain_of_output(error)
        sys.exit(1)
    sys.exit(0)
