"""Words and numbers for people: sizes, durations, errors."""

from __future__ import annotations

import errno
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from weldment.errors import UserError, WeldmentError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_LEAST_BARE = 10**6
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

INTERRUPTED = 130


def parse_size(text: str, option: str) -> int:
    """Bytes from `5GB`, `512MiB` or a plain number of at least a million.

    Raises:
        UserError: not a size, or a number so small that its unit must have been forgotten.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    number = 0 if match is None else float(match[1]) * _UNITS.get(match[2].upper(), 0)
    if match is None or not 1 <= number < math.inf:
        raise UserError(f"{text!r} is not a size", where=option, fix="Write it like 5GB, 500MB or 2GiB")
    if not match[2] and number < _LEAST_BARE:
        fix = f"Write {match[1]}GB, or {match[1]}B if bytes are meant"
        raise UserError(f"{text!r} has no unit, and so few bytes must be a slip", where=option, fix=fix)
    return int(number)


def size(nbytes: float) -> str:
    """`1.24 GB`, three significant digits."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def count(number: int) -> str:
    """`1.24B` parameters."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def plural(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def columns(rows: Sequence[Sequence[str]], width: int, right: Sequence[int] = ()) -> list[str]:
    """Lines of aligned cells, two spaces apart; the last cell goes on below itself where it exceeds `width`.

    Args:
        rows: cells, equally many in each row.
        width: of the terminal.
        right: indices of the columns that are aligned to the right.
    """
    from textwrap import wrap

    *firsts, _ = [max(map(len, cells)) for cells in zip(*rows, strict=True)] or [0]
    start = sum(firsts) + 2 * len(firsts)
    lines: list[str] = []
    for *cells, last in rows:
        padded = [c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(cells, firsts, strict=True))]
        first, *rest = wrap(last, max(24, width - start), break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"{'  '.join([*padded, first])}".rstrip(), *(" " * start + line for line in rest)]
    return lines


def styled(text: str, **style: Any) -> str:
    """The text with colours and weights, unless the variable NO_COLOR asks for none."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


def has_colors() -> bool:
    """Whether tables on standard output may have colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def complain(error: WeldmentError) -> None:
    """Print an error to standard error: place, cause, fix."""
    place = styled(f"{error.where}: ", bold=True) if error.where else ""
    typer.echo(f"{styled('error: ', fg='red', bold=True)}{place}{error.cause}", err=True)
    if error.fix:
        typer.echo(f"{styled('  fix: ', dim=True)}{error.fix}", err=True)


def complain_of_output(error: OSError) -> None:
    """Say that standard output cannot be written, if the error is of that kind; otherwise raise it.

    Full disks are the only failures to write that commands leave to their caller, and output that
    is redirected there is the only thing that they write outside a merge.
    """
    if error.errno not in _FULL or error.filename is not None:
        raise error
    # Python would try to write the rest once more, and complain, when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    complain(WeldmentError(f"cannot be written: {error.strerror}", where="standard output"))


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with a sentence and exit code 130 for Ctrl-C; the interrupt's text says what to do next."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt as interrupt:
            typer.echo(": ".join(["interrupted", *map(str, interrupt.args)]), err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run
