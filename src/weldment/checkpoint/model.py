"""What is known of a model before a byte of its weights is read."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from weldment.checkpoint.dtypes import ITEM_BYTES


@dataclass(frozen=True)
class WeightFile:
    """One file of weights.

    `path` is None while the file is only on the Hub. `sha256` is known where it costs nothing
    (the Hub's cache names its files by it). `stamp` tells two versions of a local file apart:
    its size and modification time in nanoseconds.
    """

    name: str
    size: int
    path: Path | None = None
    sha256: str | None = None
    stamp: tuple[int, int] | None = None


@dataclass(frozen=True)
class LowRank:
    """A change of a tensor that an adapter makes: scale * B A, and with DoRA a new length of its vectors.

    The tensor is seen as a matrix (shape[0], rest); a tensor of E stacked experts as E matrices.

    Attributes:
        a: (E * r, inputs), or of more dimensions, its first being r (convolutions).
        b: (outputs, r * E), or of more dimensions that are 1; column j * E + e is the j-th of expert e.
        transposed: the change is (B A)^T: `fan_in_fan_out` layers, embeddings, some stacks of experts.
        experts: E; 1 for ordinary layers.
        magnitude: with DoRA, the length of every output's vector of weights (embedding: of every column).
        expert: the only one of the experts that the tensor belongs to, where it is not a stack of all of them.
        row: the row of that expert's matrix that the tensor begins with.
    """

    a: TensorEntry
    b: TensorEntry
    scale: float
    transposed: bool = False
    experts: int = 1
    magnitude: TensorEntry | None = None
    expert: int | None = None
    row: int = 0

    @property
    def read_bytes(self) -> int:
        """Bytes of the factors that this tensor needs."""
        share = 1 if self.expert is None else self.experts
        return (self.a.nbytes + self.b.nbytes) // share + (self.magnitude.nbytes if self.magnitude else 0)


@dataclass(frozen=True)
class Added:
    """A change of a tensor that an adapter makes: scale * another tensor of the same shape (LoRA's bias)."""

    values: TensorEntry
    scale: float

    @property
    def read_bytes(self) -> int:
        return self.values.nbytes


ZERO, MEAN = -1, -2
"""In place of a model's number: a row of zeros, or the mean of several rows."""

RowPlace = tuple[int, int]
"""A model's number and a row of it."""


@dataclass(frozen=True, eq=False)
class RowMap:
    """For every row of a tensor: the model and the row of it that it is taken from.

    Attributes:
        models: numbers of models, or ZERO, or MEAN.
        rows: rows of these models.
        means: the rows whose mean a row is, by that row.
    """

    models: array[int]
    rows: array[int]
    means: Mapping[int, tuple[RowPlace, ...]]

    @cached_property
    def digest(self) -> str:
        """Tells maps apart."""
        digest = hashlib.sha256(self.models.tobytes() + self.rows.tobytes())
        digest.update(repr(sorted(self.means.items())).encode())
        return digest.hexdigest()

    @cached_property
    def used(self) -> frozenset[int]:
        """The numbers of the models that rows are taken from."""
        averaged = {model for places in self.means.values() for model, _ in places}
        return frozenset({model for model in set(self.models) if model >= 0} | averaged)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a tensor, taken from tensors of several models.

    Attributes:
        sources: by the number of their model: the model's reference and the tensor.
        place: what is taken from where.
    """

    sources: Mapping[int, tuple[str, TensorEntry]]
    place: RowMap


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its elements, row-major, start at byte `offset` of `file`.

    `changes` are what adapters add to it, in order. A tensor with `rows` is put together of rows of itself and
    of other models' tensors: its shape is that of the result, its place that of its own rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: WeightFile
    offset: int
    changes: tuple[LowRank | Added, ...] = ()
    rows: Rows | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def read_bytes(self) -> int:
        """Bytes that are read to know its elements: its own and those of its changes."""
        return self.nbytes + sum(change.read_bytes for entry in self.parts for change in entry.changes)

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that it is put together of: itself, unless its rows come from several."""
        return (self,) if self.rows is None else tuple(entry for _, entry in self.rows.sources.values())

    @property
    def is_adapted(self) -> bool:
        """Whether adapters change it."""
        return any(entry.changes for entry in self.parts)


@dataclass(frozen=True)
class Checkpoint:
    """One model: its tensors, configuration and the other files beside them.

    `root` is the local folder (None for a repo that is only on the Hub, and for a single file
    it is the folder that holds it). `side_files` are the names, relative to the root, of the
    files that are not weights of this model; `elsewhere` says where those lie that adapters brought.
    `revision` is the commit for a Hub model. `notes` are what the user should know of it.
    """

    reference: str
    tensors: Mapping[str, TensorEntry]
    weight_files: tuple[WeightFile, ...]
    root: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    side_files: tuple[str, ...] = ()
    repo: str | None = None
    revision: str | None = None
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def side_path(self, name: str) -> Path | None:
        """Where a side file lies; None while it is only on the Hub."""
        return self.elsewhere.get(name) or (self.root / name if self.root is not None else None)

    @property
    def is_local(self) -> bool:
        """Whether all weights are on this machine."""
        return all(file.path is not None for file in self.weight_files)
