"""Progress of a merge: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from weldment.cli.console import duration, size
from weldment.engine.progress import Progress, Silent

_LINE_EVERY = 10.0


class Plain:
    """A line at the start, one every ten seconds, and one for each message."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._total = self._done = self._begun = 0
        self._start = self._last = time.monotonic()

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        """Say how much there is to read."""
        self._total, self._done, self._begun = total_bytes, done_bytes, done_bytes
        self._start = self._last = time.monotonic()
        self._say(f"merging  {size(total_bytes)} to read")

    def advance(self, tensor: str, nbytes: int) -> None:
        """Count, and speak up every ten seconds."""
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._last < _LINE_EVERY:
                return
            self._last = now
        rate = (self._done - self._begun) / max(now - self._start, 1e-9)
        left = duration((self._total - self._done) / rate) if rate > 0 else "?"
        self._say(f"{self._done / max(1, self._total):4.0%}  {rate / 1e9:.2f} GB/s  {left} left  {tensor}")

    def message(self, text: str) -> None:
        """Print it."""
        self._say(text)

    def _say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class Live:
    """One line that is redrawn: bar, bytes, GB/s, time left, current tensor."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._rich = Progress(
            TextColumn("merging"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[tensor]}", markup=True),
            transient=True,
        )
        self._task = None

    def __enter__(self) -> Live:
        return self

    def close(self) -> None:
        """Remove the line."""
        self._rich.stop()

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        """Show the bar."""
        self._rich.start()
        if self._task is not None:
            self._rich.remove_task(self._task)
        self._task = self._rich.add_task("", total=total_bytes, completed=done_bytes, tensor="")

    def advance(self, tensor: str, nbytes: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._rich.update(self._task, advance=nbytes, tensor=tensor)

    def message(self, text: str) -> None:
        """Print it above the bar."""
        self._rich.console.print(text, highlight=False, markup=False)


@contextmanager
def reporter(quiet: bool) -> Iterator[Progress]:
    """The progress display that fits standard error."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        live = Live()
        try:
            yield live
        finally:
            live.close()
    else:
        yield Plain(sys.stderr)
