"""What is known of a model before a byte of its weights is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
class TensorEntry:
    """Where one tensor lies: its elements, row-major, start at byte `offset` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: WeightFile
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """One model: its tensors, configuration and the other files beside them.

    `root` is the local folder (None for a repo that is only on the Hub, and for a single file
    it is the folder that holds it). `side_files` are the names, relative to the root, of the
    files that are not weights of this model. `revision` is the commit for a Hub model.
    """

    reference: str
    tensors: Mapping[str, TensorEntry]
    weight_files: tuple[WeightFile, ...]
    root: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    side_files: tuple[str, ...] = ()
    repo: str | None = None
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether all weights are on this machine."""
        return all(file.path is not None for file in self.weight_files)
