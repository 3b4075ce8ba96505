"""What a running merge tells its watchers."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Amount(NamedTuple):
    """A part of a merge.

    Attributes:
        nbytes: input bytes.
        work: how long they take, as a number of bytes that are only read, averaged and written.
    """

    nbytes: int
    work: float

    @classmethod
    def of(cls, nbytes: int) -> Amount:
        """Bytes that take as long as bytes do."""
        return cls(nbytes, float(nbytes))


class Progress(Protocol):
    """Receives events in the thread that called `merge`; implementations must be quick."""

    def begin(self, total: Amount, done: Amount) -> None:
        """What there is to do in all, and what an earlier run already dealt with."""
        ...

    def advance(self, tensor: str, amount: Amount) -> None:
        """So much of a tensor was merged."""
        ...

    def message(self, text: str) -> None:
        """Something the user should know."""
        ...


class Silent:
    """Ignores everything."""

    def begin(self, total: Amount, done: Amount) -> None:
        """Ignored."""

    def advance(self, tensor: str, amount: Amount) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""
