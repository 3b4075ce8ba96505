"""Products of an adapter's factors, tile by tile; parts of the factors are read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from weldment.checkpoint.dtypes import torch_dtype
from weldment.checkpoint.model import LowRank
from weldment.engine.sources import FileSource
from weldment.engine.tiles import Matrices, Tile
from weldment.engine.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 1 << 20
"""Elements of the left factor that are in memory at a time."""


@dataclass(frozen=True)
class Factor:
    """A stored factor, of which parts are read."""

    source: FileSource
    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int]:
        """Tells it from all others."""
        return self.source.descriptor, self.source.offset

    @property
    def width(self) -> int:
        return math.prod(self.shape[1:])

    def rows(self, first: int, stop: int) -> Tensor:
        """Some rows, in the dtype they are stored in."""
        out = torch.empty((stop - first, self.width), dtype=torch_dtype(self.source.dtype))
        self.source.fill(first * self.width, _bytes(out))
        return out

    def columns(self, first: int, stop: int, rows: tuple[int, int]) -> Tensor:
        """Some columns of some rows."""
        out = torch.empty((rows[1] - rows[0], stop - first), dtype=torch_dtype(self.source.dtype))
        for place, row in enumerate(range(*rows)):
            self.source.fill(row * self.width + first, _bytes(out[place]))
        return out


def _bytes(numbers: Tensor) -> memoryview:
    return numbers.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Product:
    """scale * B A, or its transpose, as `left` (rows, r) times `right` (r, columns) of each matrix."""

    change: LowRank
    a: Factor
    b: Factor
    matrices: Matrices

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.change.experts

    def tile(self, tile: Tile, workspace: Workspace, *, whole: bool) -> Tensor:
        """The product in one tile.

        Args:
            whole: all of it is wanted now; else the rest may be wanted next, and the tile is kept.
        """
        if whole:
            return self._multiplied(tile, workspace, workspace.numbers("product", tile.shape))

        def kept() -> Tensor:
            out = torch.empty(tile.shape, dtype=workspace.dtype, device=workspace.device)
            return self._multiplied(tile, workspace, out)

        return self._keep(workspace, tile.matrix, ("tile", tile.first), kept)

    def _multiplied(self, tile: Tile, workspace: Workspace, out: Tensor) -> Tensor:
        panel = max(self.matrices.tile, PANEL // self.rank // self.matrices.tile * self.matrices.tile)
        number = tile.first // panel
        first, stop = number * panel, min((number + 1) * panel, self.matrices.rows)
        keep = partial(self._keep, workspace, tile.matrix)
        left = keep(("left", number), lambda: self._left(tile.matrix, first, stop, workspace))
        right = keep("right", lambda: self._right(tile.matrix, workspace))
        return torch.matmul(left[tile.first - first : tile.stop - first], right, out=out)

    def _keep(self, workspace: Workspace, matrix: int, what: Any, make: Callable[[], Tensor]) -> Tensor:
        change = self.change
        key = (what, matrix, change.expert, change.row, change.transposed, change.scale, self.a.key, self.b.key)
        return workspace.kept(key, make)

    def _left(self, matrix: int, first: int, stop: int, workspace: Workspace) -> Tensor:
        expert = self._expert(matrix)
        first, stop = first + self.change.row, stop + self.change.row
        if self.change.transposed:
            return prepared(self.a.columns(first, stop, self._a_rows(expert)).T, workspace)
        return self._scaled(self._b(expert, first, stop, workspace), workspace)

    def _right(self, matrix: int, workspace: Workspace) -> Tensor:
        expert = self._expert(matrix)
        if self.change.transposed:
            return self._scaled(self._b(expert, 0, self.b.shape[0], workspace).T, workspace)
        return prepared(self.a.rows(*self._a_rows(expert)), workspace)

    def _expert(self, matrix: int) -> int:
        return matrix if self.change.expert is None else self.change.expert

    def _a_rows(self, expert: int) -> tuple[int, int]:
        return expert * self.rank, (expert + 1) * self.rank

    def _b(self, expert: int, first: int, stop: int, workspace: Workspace) -> Tensor:
        """Rows of B of one expert, whose columns lie between those of the others."""
        if self.change.experts == 1:
            return self.b.rows(first, stop)
        return workspace.kept(("experts", self.b.key), self._all_experts)[expert, first:stop]

    def _all_experts(self) -> Tensor:
        """B as (experts, outputs, r)."""
        outputs = self.b.shape[0]
        whole = self.b.rows(0, outputs).view(outputs, self.rank, self.change.experts)
        return whole.permute(2, 0, 1).contiguous()

    def _scaled(self, factor: Tensor, workspace: Workspace) -> Tensor:
        return prepared(factor, workspace).mul_(self.change.scale)


def prepared(factor: Tensor, workspace: Workspace) -> Tensor:
    """A contiguous tensor of its own in the accumulation dtype, on the device."""
    return torch.empty(factor.shape, dtype=workspace.dtype, device=workspace.device).copy_(factor)
