"""How products of factors are cut: into tiles of whole rows that depend on a tensor's shape alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TILE = 1 << 17
"""Elements of a tile, if a row is not longer: with fewer rows, the other factor is read from memory too often."""


@dataclass(frozen=True)
class Matrices:
    """A tensor as a stack of equal matrices, one for ordinary tensors.

    Attributes:
        rows: of one matrix.
    """

    count: int
    rows: int
    columns: int

    @property
    def tile(self) -> int:
        """Rows of a tile; none reaches into two matrices."""
        return min(self.rows, max(1, TILE // max(1, self.columns)))

    def tiles(self, start: int, stop: int) -> Iterator[Tile]:
        """The tiles that elements [start, stop) lie in."""
        step = self.tile
        first, last = start // self.columns, (stop - 1) // self.columns
        for number in range(first // self.rows, last // self.rows + 1):
            before = number * self.rows
            low, high = max(first - before, 0), min(last - before, self.rows - 1)
            for row in range(low // step * step, high + 1, step):
                yield Tile(number, row, min(row + step, self.rows), (before + row) * self.columns, self.columns)


@dataclass(frozen=True)
class Tile:
    """Rows [first, stop) of one matrix; `start` is the place of the first element in the tensor."""

    matrix: int
    first: int
    stop: int
    start: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.first, self.columns

    @property
    def numel(self) -> int:
        return (self.stop - self.first) * self.columns

    def overlap(self, start: int, stop: int) -> tuple[slice, slice]:
        """What elements [start, stop) of the tensor are of the tile, and where these are among those."""
        low = max(start, self.start)
        high = min(stop, self.start + self.numel)
        return slice(low - self.start, high - self.start), slice(low - start, high - start)
