"""Progress of a merge: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from weldment.cli.console import duration, size
from weldment.engine.progress import Amount, Progress, Silent

if TYPE_CHECKING:
    from rich.text import Text

LINE_EVERY = 10.0
"""Seconds between plain lines."""

_BAR = 12


class Meter:
    """How far a merge is: bytes to show, and the work they are to tell the time that is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin(Amount.of(0), Amount.of(0))

    def begin(self, total: Amount, done: Amount) -> None:
        """So much is to do in all; what an earlier run dealt with does not count for the rate."""
        self.total, self.done, self._before = total, done, done
        self.tensor = ""
        self._start = self._clock()

    def add(self, tensor: str, amount: Amount) -> None:
        """So much more was done."""
        self.done = Amount(self.done.nbytes + amount.nbytes, self.done.work + amount.work)
        self.tensor = tensor

    @property
    def share(self) -> float:
        """Of the work, from 0 to 1."""
        return min(1.0, self.done.work / self.total.work) if self.total.work else 1.0

    def words(self) -> str:
        """` 45%  4.5 GB of 9.9 GB, 1.20 GB/s, 4.5 s left`."""
        seconds = max(self._clock() - self._start, 1e-9)
        rate = (self.done.nbytes - self._before.nbytes) / seconds
        pace = (self.done.work - self._before.work) / seconds
        left = f"{duration(max(0.0, self.total.work - self.done.work) / pace)} left" if pace > 0 else "? left"
        last = "finishing" if self.done.nbytes >= self.total.nbytes else left
        done, total = size(self.done.nbytes), size(self.total.nbytes)
        return f"{self.share:4.0%}  {done} of {total}, {rate / 1e9:.2f} GB/s, {last}"


class Plain:
    """A line at the start, one every ten seconds, and one for each message."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._meter = Meter(clock)
        self._next = 0.0

    def begin(self, total: Amount, done: Amount) -> None:
        """Say how much there is to read."""
        self._meter.begin(total, done)
        self._next = self._clock() + LINE_EVERY
        left = f", {size(done.nbytes)} of it done" if done.nbytes else ""
        self.message(f"merging: {size(total.nbytes)} to read{left}")

    def advance(self, tensor: str, amount: Amount) -> None:
        """Count, and speak up every ten seconds."""
        self._meter.add(tensor, amount)
        if self._clock() >= self._next:
            self._next = self._clock() + LINE_EVERY
            self.message(f"{self._meter.words()}  {tensor}")

    def message(self, text: str) -> None:
        """Print it."""
        self._stream.write(text + "\n")
        self._stream.flush()


class Live:
    """One line that is redrawn: bar, share, bytes, GB/s, time left, current tensor."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live as Display

        self._meter = Meter()
        self._display = Display(
            console=Console(stderr=True), get_renderable=self._line, transient=True, refresh_per_second=8
        )

    def close(self) -> None:
        """Remove the line."""
        self._display.stop()

    def begin(self, total: Amount, done: Amount) -> None:
        """Show the line."""
        self._meter.begin(total, done)
        self._display.start()

    def advance(self, tensor: str, amount: Amount) -> None:
        """Move the bar."""
        self._meter.add(tensor, amount)

    def message(self, text: str) -> None:
        """Print it above the line."""
        self._display.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> Text:
        from rich.text import Text

        full = int(self._meter.share * _BAR)
        parts = [("━" * full, "green"), ("━" * (_BAR - full), "bright_black"), f" {self._meter.words()}  "]
        return Text.assemble(*parts, (self._meter.tensor, "dim"), no_wrap=True, overflow="ellipsis")


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
