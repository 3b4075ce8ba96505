"""Tensors that adapters change, calculated while they are read.

W' = W + sum of scale * B A, and with DoRA W' = m * (W + scale * B A) / ||W + scale * B A||. Products
are calculated in tiles that depend on the tensor's shape alone, always by the same operations on the
same shapes: the elements are the same wherever a block begins, and whoever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from weldment.checkpoint.dtypes import torch_dtype
from weldment.checkpoint.model import Added, LowRank, TensorEntry
from weldment.engine.products import Factor, Product, prepared
from weldment.engine.sources import FileSource
from weldment.engine.tiles import Matrices, Tile
from weldment.engine.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sum:
    """scale * a tensor of the same shape."""

    values: FileSource
    scale: float

    def add(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Add the elements from `start` on."""
        values = workspace.numbers("added", tuple(out.shape))
        self.values.read(start, values, workspace)
        out.add_(values.mul_(self.scale))


@dataclass(frozen=True)
class AdaptedSource:
    """A tensor with what adapters add to it."""

    stored: FileSource
    matrices: Matrices
    changes: tuple[Product | Sum, ...]

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Read, and add the changes in their order."""
        self.stored.read(start, out, workspace)
        flat = out.view(-1)
        for change in self.changes:
            if isinstance(change, Sum):
                change.add(start, flat, workspace)
                continue
            for tile in self.matrices.tiles(start, start + flat.numel()):
                inside, outside = tile.overlap(start, start + flat.numel())
                part = change.tile(tile, workspace, whole=inside == slice(0, tile.numel)).view(-1)[inside]
                flat[outside].add_(part)

    def raw(self, start: int, shape: tuple[int, ...], workspace: Workspace, name: Any = "read") -> Tensor:
        """Calculate the elements and round them to the dtype of the stored tensor."""
        numbers = workspace.numbers("adapted", shape)
        self.read(start, numbers, workspace)
        room = workspace.landing((name, "adapted"), shape, torch_dtype(self.stored.dtype)).numbers
        workspace.download(numbers.view(-1), room.view(-1))
        return room

    def ask_for(self, start: int, stop: int) -> None:
        """Let the system read the stored elements; factors are small."""
        self.stored.ask_for(start, stop)


@dataclass(frozen=True)
class DoraSource(AdaptedSource):
    """A tensor with the one DoRA adapter that changes it: directions from W + scale * B A, lengths from the adapter.

    Attributes:
        magnitude: the length of each row, of each column if the change is transposed.
    """

    magnitude: FileSource
    length: int

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Calculate the tiles that the elements lie in."""
        flat = out.view(-1)
        by_columns = self._product.change.transposed
        lengths = self._keep(workspace, self._column_factors if by_columns else self._lengths)
        for tile in self.matrices.tiles(start, start + flat.numel()):
            inside, outside = tile.overlap(start, start + flat.numel())
            directed = self._directed(tile, workspace, whole=inside == slice(0, tile.numel))
            if by_columns:
                directed.mul_(lengths)
            else:
                now = torch.linalg.vector_norm(directed, dim=1)
                directed.mul_((lengths[tile.first : tile.stop] / now).unsqueeze(1))
            flat[outside].copy_(directed.view(-1)[inside])

    @property
    def _product(self) -> Product:
        (change,) = self.changes
        assert isinstance(change, Product)
        return change

    def _directed(self, tile: Tile, workspace: Workspace, *, whole: bool = True) -> Tensor:
        """W + scale * B A in one tile."""
        out = workspace.numbers("directed", tile.shape)
        self.stored.read(tile.start, out, workspace)
        return out.add_(self._product.tile(tile, workspace, whole=whole))

    def _keep(self, workspace: Workspace, make: Callable[[Workspace], Tensor]) -> Tensor:
        # What columns are multiplied with depends on the stored tensor too, which other bases may have another of.
        origin = self.stored.descriptor, self.stored.offset, self.magnitude.descriptor, self.magnitude.offset
        return workspace.kept(origin, partial(make, workspace))

    def _lengths(self, workspace: Workspace) -> Tensor:
        return prepared(Factor(self.magnitude, (1, self.length)).rows(0, 1).view(-1), workspace)

    def _column_factors(self, workspace: Workspace) -> Tensor:
        """Every column's length from the adapter by what it is before, from one pass over the tensor."""
        squares = torch.zeros(self.matrices.columns, dtype=torch.float64)
        for tile in self.matrices.tiles(0, self.matrices.rows * self.matrices.columns):
            squares += self._directed(tile, workspace).square().sum(dim=0).cpu().double()
        return self._lengths(workspace) / squares.sqrt().to(workspace.dtype).to(workspace.device)


def adapted(stored: FileSource, entry: TensorEntry, find: Callable[[TensorEntry], FileSource]) -> AdaptedSource:
    """A tensor that adapters change.

    Args:
        stored: the tensor as it is in its file.
        entry: the tensor, with its changes.
        find: opens the adapters' tensors.
    """
    first = next((change for change in entry.changes if isinstance(change, LowRank)), None)
    matrices = _matrices(entry.shape, first)
    changes = tuple(_change(change, matrices, find) for change in entry.changes)
    magnitude = None if first is None else first.magnitude
    if magnitude is None:
        return AdaptedSource(stored, matrices, changes)
    return DoraSource(stored, matrices, changes, find(magnitude), magnitude.numel)


def _matrices(shape: tuple[int, ...], change: LowRank | None) -> Matrices:
    if change is not None and change.experts > 1 and change.expert is None:
        return Matrices(shape[0], shape[1], shape[2])
    return Matrices(1, shape[0] if shape else 1, math.prod(shape[1:]))


def _change(change: LowRank | Added, matrices: Matrices, find: Callable[[TensorEntry], FileSource]) -> Product | Sum:
    if isinstance(change, Added):
        return Sum(find(change.values), change.scale)
    a, b = Factor(find(change.a), change.a.shape), Factor(find(change.b), change.b.shape)
    return Product(change, a, b, matrices)
