"""Where blocks of elements come from: files or tensors in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from weldment.checkpoint.dtypes import ITEM_BYTES, torch_dtype
from weldment.engine.readahead import ask_for
from weldment.engine.workspace import Workspace
from weldment.errors import CheckpointError, MergeError

if TYPE_CHECKING:
    from torch import Tensor


PIECE = 1 << 20
"""Elements that are read at a time into large blocks, whose bytes need not all be there at once."""


class Source(Protocol):
    """The elements of one tensor of one model, flattened."""

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Fill `out` (contiguous, accumulation dtype) with the elements from `start` on."""
        ...

    def raw(self, start: int, shape: tuple[int, ...], workspace: Workspace, name: Any = "read") -> Tensor:
        """The elements from `start` on in their own dtype, in main memory.

        Args:
            name: of the workspace's buffer they may be put in.
        """
        ...

    def ask_for(self, start: int, stop: int) -> None:
        """These elements will be read soon."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A tensor in a file: `descriptor` is open for reading, `offset` is the byte of the first element."""

    descriptor: int
    path: Path
    name: str
    dtype: str
    offset: int

    def raw(self, start: int, shape: tuple[int, ...], workspace: Workspace, name: Any = "read") -> Tensor:
        """Read the elements into a buffer."""
        data, numbers = workspace.landing(name, shape, torch_dtype(self.dtype))
        self.fill(start, data)
        return numbers

    def ask_for(self, start: int, stop: int) -> None:
        """Let the system read them meanwhile."""
        size = ITEM_BYTES[self.dtype]
        ask_for(self.descriptor, self.offset + start * size, self.offset + stop * size)

    def fill(self, start: int, data: memoryview) -> None:
        """Read elements into `data` until it is full."""
        position, end = 0, len(data)
        place = self.offset + start * ITEM_BYTES[self.dtype]
        while position < end:
            try:
                got = os.preadv(self.descriptor, [data[position:]], place + position)
            except OSError as error:
                raise MergeError(f"reading failed: {error.strerror}", where=str(self.path)) from error
            if got == 0:
                raise CheckpointError(
                    f"the file ended inside tensor {self.name!r}; it was changed or truncated while it was read",
                    where=str(self.path),
                    fix="Check the file and run the merge again",
                )
            position += got

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Read and convert."""
        name = workspace.turn("one")
        workspace.upload(name, self.raw(start, tuple(out.shape), workspace, name), out)


@dataclass(frozen=True)
class MemorySource:
    """A tensor in memory, flattened; it is never changed."""

    values: Tensor

    def raw(self, start: int, shape: tuple[int, ...], workspace: Workspace, name: Any = "read") -> Tensor:
        """A view of the elements."""
        return self.values[start : start + math.prod(shape)].view(shape).cpu()

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Copy and convert."""
        out.copy_(self.values[start : start + out.numel()].view(out.shape))

    def ask_for(self, start: int, stop: int) -> None:
        """They are in memory."""


def read_one(source: Source, start: int, out: Tensor, workspace: Workspace) -> None:
    """Fill `out` with the elements of a source."""
    flat = out.view(-1)
    for low in range(0, flat.numel(), PIECE):
        source.read(start + low, flat[low : low + PIECE] if flat.numel() > PIECE else out, workspace)


def read_all(sources: Sequence[Source], start: int, out: Tensor, workspace: Workspace) -> None:
    """Fill `out` (T, ...) with the elements of T sources; files of one dtype are converted together."""
    if out[0].numel() > PIECE:
        for low in range(0, out[0].numel(), PIECE):
            read_all(sources, start + low, out.view(len(out), -1)[:, low : low + PIECE], workspace)
        return
    files = [source for source in sources if isinstance(source, FileSource)]
    if len(files) < len(sources) or len({file.dtype for file in files}) > 1:
        for source, row in zip(sources, out, strict=True):
            source.read(start, row, workspace)
        return
    name = workspace.turn("all")
    data, numbers = workspace.landing(name, tuple(out.shape), torch_dtype(files[0].dtype))
    size = len(data) // len(files)
    for index, file in enumerate(files):
        file.fill(start, data[index * size : (index + 1) * size])
    workspace.upload(name, numbers, out)
