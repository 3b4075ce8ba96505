"""The buffers of one thread, reused from block to block."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from weldment.checkpoint.output_files import PAGE
from weldment.engine.lanes import Lane, Mark

if TYPE_CHECKING:
    from torch import Tensor


_VIEWS = 256
"""Views that a workspace remembers; tensors of many shapes make new ones all the time."""


KEPT_BYTES = 48 << 20
"""Of what a workspace keeps from block to block: the factors that the adapters of a tensor need."""


class Landing(NamedTuple):
    """A buffer that a file is read into: as bytes, and as numbers."""

    data: memoryview
    numbers: Tensor


class Workspace:
    """Named buffers on one device; a buffer grows to the largest size asked of it and stays.

    Args:
        device: where the arithmetic runs.
        dtype: accumulation dtype, float32 or float64.
        lane: copies to and from the device.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, lane: Lane | None = None) -> None:
        self.device = device
        self.dtype = dtype
        self.outbox = Outbox()
        self._lane = lane
        self._sent: dict[Any, Mark] = {}
        self._turn = 0
        self._buffers: dict[Any, Tensor] = {}
        self._views: dict[Any, Any] = {}  # making one takes as long as adding thousands of numbers
        self._kept: dict[Any, Tensor] = {}
        self._kept_bytes = 0

    def numbers(self, name: Any, shape: tuple[int, ...]) -> Tensor:
        """Numbers of the accumulation dtype, on the device."""
        key = (name, shape)
        found = self._views.get(key)
        if found is None:
            found = self._buffer(name, math.prod(shape), self.dtype, self.device).view(shape)
            self._views[key] = found
        return found

    def stack(self, count: int, shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """`count` tensors of numbers in one, and each by itself."""
        key = ("stack", count, shape)
        found = self._views.get(key)
        if found is None:
            stack = self.numbers("stack", (count, *shape))
            found = stack, list(stack)
            self._views[key] = found
        return found

    def turn(self, name: str) -> Any:
        """A name that alternates with another where copies go on while the next block is read."""
        self._turn ^= self._lane is not None
        return name, self._turn

    def landing(self, name: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Landing:
        """Numbers of any dtype in main memory, with their bytes, to read a file into."""
        if (mark := self._sent.pop(name, None)) is not None:
            mark.wait()
        key = (name, shape, dtype)
        found = self._views.get(key)
        if found is None:
            buffer = self.staging(name, math.prod(shape) * dtype.itemsize)
            found = Landing(buffer.numpy().data, buffer.view(dtype).view(shape))
            self._views[key] = found
        return found

    def upload(self, name: Any, numbers: Tensor, out: Tensor) -> None:
        """Convert what has landed under `name` to the accumulation dtype, on the device."""
        if self._lane is not None:
            raw = self._buffer(("raw", numbers.dtype), numbers.numel(), numbers.dtype, self.device).view(numbers.shape)
            self._lane.send(numbers, raw)
            self._sent[name] = self._lane.mark()
            numbers = raw
        out.copy_(numbers)

    def download(self, merged: Tensor, room: Tensor) -> None:
        """Round to the dtype of `room`, in main memory."""
        if self._lane is not None:
            rounded = self._buffer(("rounded", room.dtype), room.numel(), room.dtype, self.device)
            rounded.copy_(merged)
            merged = self.staging("fetched", room.numel() * room.dtype.itemsize).view(room.dtype)
            self._lane.fetch(rounded, merged)
            self._lane.mark().wait()
        room.copy_(merged)

    def kept(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returned for this key; what was not asked for lately is forgotten, beyond `KEPT_BYTES` in all."""
        found = self._kept.pop(key, None)
        if found is None:
            found = make()
            self._kept_bytes += found.nbytes
        self._kept[key] = found  # the last that was asked for is at the end
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return found

    def staging(self, name: Any, nbytes: int) -> Tensor:
        """`nbytes` bytes in main memory, pinned where that speeds copies to the device."""
        return self._buffer((name, "bytes"), nbytes, torch.uint8, torch.device("cpu"))

    def scratch(self, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The index-th scratch tensor of a block, on the device."""
        key = ("scratch", index, shape, dtype)
        found = self._views.get(key)
        if found is None:
            found = self._buffer(("scratch", index, dtype), math.prod(shape), dtype, self.device).view(shape)
            self._views[key] = found
        return found

    def release(self) -> None:
        """Give all buffers back: what comes next may need far smaller ones."""
        for mark in self._sent.values():
            mark.wait()
        self._sent.clear()
        self._views.clear()
        self._buffers.clear()

    def _buffer(self, name: Any, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            pin = device.type == "cpu" and self.device.type == "cuda"
            buffer = torch.empty(count, dtype=dtype, device=device, pin_memory=pin)
            self._buffers[name] = buffer
            self._views.clear()  # they would keep the old buffer alive
        elif len(self._views) >= _VIEWS:
            self._views.clear()
        return buffer[:count]


class Outbox:
    """Page-aligned buffers that are filled in turn while a thread writes the ones before them."""

    COUNT = 3

    def __init__(self) -> None:
        self._buffers = [np.empty(0, dtype=np.uint8)] * self.COUNT
        self._writes: list[Future[None] | None] = [None] * self.COUNT
        self._current = 0
        self._writer = ThreadPoolExecutor(1, "weld-write")

    def take(self, nbytes: int) -> np.ndarray:
        """The next buffer, at least `nbytes` long, when what was in it is written."""
        self._current = (self._current + 1) % self.COUNT
        self._wait(self._current)
        if self._buffers[self._current].size < nbytes:
            raw = np.empty(nbytes + PAGE, dtype=np.uint8)
            skew = -raw.ctypes.data % PAGE
            self._buffers[self._current] = raw[skew : skew + nbytes]
        return self._buffers[self._current]

    def send(self, write: Callable[..., None], *arguments: object) -> None:
        """Let the thread write what is in the buffer taken last."""
        self._writes[self._current] = self._writer.submit(write, *arguments)

    def flush(self) -> None:
        """Wait until everything is written; raises what went wrong."""
        wait([write for write in self._writes if write is not None])
        for number in range(self.COUNT):
            self._wait(number)

    def _wait(self, number: int) -> None:
        write, self._writes[number] = self._writes[number], None
        if write is not None:
            write.result()
