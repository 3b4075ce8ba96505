"""What the commands that evaluate models share: heads on the command line, and a progress bar."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from weldment.errors import UserError

if TYPE_CHECKING:
    from weldment.evaluation.evaluate import Report


def parse_heads(given: Sequence[str], option: str = "--head") -> dict[str, str]:
    """`TASK=PLACE` pairs as a mapping; `option` is the one that they are given by.

    Raises:
        UserError: one is not such a pair, or two are for one task.
    """
    heads: dict[str, str] = {}
    for pair in given:
        task, equals, place = pair.partition("=")
        if not equals or not task or not place:
            raise UserError(f"{pair!r} is not TASK=PLACE", where=option, fix=f"Write it like {option} sst2=models/sst2")
        if task in heads:
            raise UserError(f"two {option.strip('-')}s for the task {task!r}", where=option, fix="Give one")
        heads[task] = place
    return heads


@contextmanager
def scoring(quiet: bool) -> Iterator[Report]:
    """A bar on a terminal for what is scored at the moment; nothing elsewhere. Warnings about tasks become notes."""
    with _notes(), _bar(quiet) as report:
        yield report


@contextmanager
def _notes() -> Iterator[None]:
    from weldment.evaluation.tasks import TaskWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", TaskWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            if issubclass(category, TaskWarning):
                typer.echo(f"note: {message}", err=True)
            else:
                others(message, category, *rest, **named)

        warnings.showwarning = show
        yield


@contextmanager
def _bar(quiet: bool) -> Iterator[Report]:
    if quiet or not sys.stderr.isatty():
        yield lambda what, count, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)
        shown = ""

        def report(what: str, count: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                progress.reset(bar, total=total, description=what)
            progress.advance(bar, count)

        yield report
