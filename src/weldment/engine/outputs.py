"""Where the elements of merged tensors go: files, written in the background, or tensors in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from weldment.checkpoint.dtypes import ITEM_BYTES, torch_dtype
from weldment.checkpoint.layout import Slot
from weldment.checkpoint.output_files import PAGE, OutputFiles
from weldment.engine.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

_WRITE_BYTES = 2 << 20
"""Bytes of a write: every one has a price of its own."""


class Output(Protocol):
    """The elements of one merged tensor, flattened."""

    def span(self, start: int, workspace: Workspace) -> Span:
        """Begin to write the elements from `start` on."""
        ...


class Span(Protocol):
    """A run of elements that one thread writes, piece after piece."""

    def room(self, count: int) -> Tensor:
        """Where to put the next `count` elements: contiguous, in main memory, in the output's dtype."""
        ...

    def send(self) -> None:
        """The room is filled; it may be taken again after `room` is called next."""
        ...

    def close(self) -> None:
        """No more elements follow; returns when all are written."""
        ...


@dataclass(frozen=True)
class MemoryOutput:
    """A contiguous tensor in main memory."""

    values: Tensor

    def span(self, start: int, workspace: Workspace) -> Span:
        """See `Output`."""
        return _MemorySpan(self.values.view(-1), start)


class _MemorySpan:
    def __init__(self, values: Tensor, start: int) -> None:
        self._values = values
        self._next = start

    def room(self, count: int) -> Tensor:
        start, self._next = self._next, self._next + count
        return self._values[start : self._next]

    def send(self) -> None:
        """The room was the tensor itself."""

    def close(self) -> None:
        """The room was the tensor itself."""


@dataclass(frozen=True)
class FileOutput:
    """The place of a tensor in an output file."""

    files: OutputFiles
    slot: Slot

    def span(self, start: int, workspace: Workspace) -> Span:
        """See `Output`."""
        return _FileSpan(self, start, workspace)


class _FileSpan:
    """Places elements in page-aligned buffers as they will lie in the file, and hands whole pages to the outbox.

    The bytes after the last whole page wait for the next buffer.
    """

    def __init__(self, output: FileOutput, start: int, workspace: Workspace) -> None:
        self._output = output
        self._outbox = workspace.outbox
        self._dtype = torch_dtype(output.slot.dtype)
        self._item = ITEM_BYTES[output.slot.dtype]
        self._position = output.slot.offset + start * self._item
        self._buffer = np.empty(0, dtype=np.uint8)
        self._begin = self._end = 0

    def room(self, count: int) -> Tensor:
        size = count * self._item
        if self._end + size > self._buffer.size:
            self._next_buffer(size)
        self._filled = self._end + size
        return torch.from_numpy(self._buffer[self._end : self._filled]).view(self._dtype)

    def send(self) -> None:
        self._end = self._filled

    def close(self) -> None:
        if self._end > self._begin:
            self._write(self._end)
        self._outbox.flush()

    def _next_buffer(self, size: int) -> None:
        """Write the whole pages, and begin the next buffer with what is left."""
        stop = self._position + self._end - self._begin
        pages = max(self._end - stop % PAGE, self._begin)
        rest = self._buffer[pages : self._end].copy()
        if pages > self._begin:
            self._write(pages)
        # A tensor may begin between two multiples of its elements' size; it cannot lie as in the file then.
        lead = stop % PAGE if stop % self._item == 0 else PAGE
        self._position = stop - rest.size
        self._begin, self._end = lead - rest.size, lead
        self._buffer = self._outbox.take(max(PAGE + size, _WRITE_BYTES))
        self._buffer[self._begin : self._end] = rest

    def _write(self, end: int) -> None:
        data = self._buffer[self._begin : end]
        self._outbox.send(self._output.files.write, self._output.slot.file, self._position, data)
