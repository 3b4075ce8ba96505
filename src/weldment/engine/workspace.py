"""The buffers of one thread, reused from block to block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Workspace:
    """Named buffers on one device; a buffer grows to the largest size asked of it and stays.

    Args:
        device: where the arithmetic runs.
        dtype: accumulation dtype, float32 or float64.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._buffers: dict[Any, Tensor] = {}

    def numbers(self, name: Any, count: int) -> Tensor:
        """`count` numbers of the accumulation dtype, on the device."""
        return self._buffer(name, count, self.dtype, self.device)

    def staging(self, name: Any, nbytes: int) -> Tensor:
        """`nbytes` bytes in main memory, pinned where that speeds copies to the device."""
        return self._buffer((name, "bytes"), nbytes, torch.uint8, torch.device("cpu"))

    def scratch(self, index: int, like: Tensor) -> Tensor:
        """The index-th scratch tensor, shaped like `like`."""
        return self.numbers(("scratch", index), like.numel()).view(like.shape)

    def _buffer(self, name: Any, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            pin = device.type == "cpu" and self.device.type == "cuda"
            buffer = torch.empty(count, dtype=dtype, device=device, pin_memory=pin)
            self._buffers[name] = buffer
        return buffer[:count]
