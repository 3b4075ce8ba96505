"""Where blocks of elements come from: files or tensors in memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from weldment.checkpoint.dtypes import ITEM_BYTES, TORCH
from weldment.engine.workspace import Workspace
from weldment.errors import CheckpointError, MergeError


class Source(Protocol):
    """The elements of one tensor of one model, flattened."""

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Fill `out` (1-D, accumulation dtype) with the elements from `start` on."""
        ...

    def raw(self, start: int, count: int, workspace: Workspace) -> Tensor:
        """`count` elements from `start` on in their own dtype, in main memory."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A tensor in a file: `descriptor` is open for reading, `offset` is the byte of the first element."""

    descriptor: int
    path: Path
    name: str
    dtype: str
    offset: int

    def raw(self, start: int, count: int, workspace: Workspace) -> Tensor:
        """Read the elements into a staging buffer."""
        size = ITEM_BYTES[self.dtype]
        buffer = workspace.staging("read", count * size)
        view = buffer.numpy().data
        position, end = 0, count * size
        while position < end:
            try:
                got = os.preadv(self.descriptor, [view[position:]], self.offset + start * size + position)
            except OSError as error:
                raise MergeError(f"reading failed: {error.strerror}", where=str(self.path)) from error
            if got == 0:
                raise CheckpointError(
                    f"the file ended inside tensor {self.name!r}; it was changed or truncated while it was read",
                    where=str(self.path),
                    fix="Check the file and run the merge again",
                )
            position += got
        return buffer.view(TORCH[self.dtype])

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Read and convert."""
        out.copy_(self.raw(start, out.numel(), workspace).to(out.device))


@dataclass(frozen=True)
class MemorySource:
    """A tensor in memory, flattened; it is never changed."""

    values: Tensor

    def raw(self, start: int, count: int, workspace: Workspace) -> Tensor:
        """A view of the elements."""
        return self.values[start : start + count].cpu()

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Copy and convert."""
        out.copy_(self.values[start : start + out.numel()])
