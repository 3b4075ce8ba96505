"""How a tensor is cut: into spans, one task each, and spans into blocks, one kernel call each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from weldment.methods.block import CHUNK, Unit

BLOCK = 1 << 18
"""Elements of a block by default: float32 buffers of 1 MB, which stay in the cache."""

SPAN_BLOCKS = 32
"""Blocks of a task: long enough to be cheap to hand out, short enough to balance the threads."""


@dataclass(frozen=True)
class Range:
    """Elements [start, stop) of a flattened tensor, seen as `view` by kernels."""

    start: int
    stop: int
    view: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Grid:
    """The cutting of one tensor.

    Args:
        shape: shape of the tensor.
        unit: what may not be cut.
        block: elements of a block, a multiple of `CHUNK`.
    """

    shape: tuple[int, ...]
    unit: Unit
    block: int = BLOCK

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Length of a row: a tensor of fewer than two dimensions is one row."""
        return self.numel if len(self.shape) < 2 else math.prod(self.shape[1:])

    def _step(self) -> int:
        if self.unit == "element":
            return self.block
        if self.unit == "matrix":
            return max(1, self.numel)
        return max(1, self.block // max(1, self.columns)) * max(1, self.columns)

    def _view(self, start: int, stop: int) -> tuple[int, ...]:
        if self.unit == "matrix":
            return self.shape
        return (stop - start,) if self.unit == "element" else ((stop - start) // max(1, self.columns), self.columns)

    def spans(self) -> list[tuple[int, int]]:
        """Element ranges of the tasks; an empty tensor has none."""
        length = self._step() * SPAN_BLOCKS
        return [(start, min(start + length, self.numel)) for start in range(0, self.numel, length)]

    def blocks(self, span: tuple[int, int]) -> Iterator[Range]:
        """The blocks of a span."""
        step = self._step()
        for start in range(*span, step):
            stop = min(start + step, span[1])
            yield Range(start, stop, self._view(start, stop))

    def samples(self, count: int, length: int) -> list[Range]:
        """About `count` short runs of `length` elements (or single rows), evenly spaced over the tensor."""
        if self.unit == "matrix":
            return [Range(0, self.numel, self.shape)]
        size = self.columns if self.unit == "row" else length
        places = max(1, self.numel // max(1, size))
        count = min(count, places)
        starts = sorted({(index * places // count) * size for index in range(count)})
        return [
            Range(start, stop, self._view(start, stop)) for start in starts for stop in [min(start + size, self.numel)]
        ]


def chunks(numel: int) -> list[tuple[int, int]]:
    """[start, stop) of the chunks of a block of `numel` elements."""
    return [(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK)]
