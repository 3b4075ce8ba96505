"""What a running merge tells its watchers."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives events in the thread that called `merge`; implementations must be quick."""

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        """The bytes to read in all, and those that an earlier run already dealt with."""
        ...

    def advance(self, tensor: str, nbytes: int) -> None:
        """So many input bytes of a tensor were merged."""
        ...

    def message(self, text: str) -> None:
        """Something the user should know."""
        ...


class Silent:
    """Ignores everything."""

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        """Ignored."""

    def advance(self, tensor: str, nbytes: int) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""
