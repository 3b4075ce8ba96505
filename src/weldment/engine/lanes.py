"""Copies between main memory and a device that go on while the processor does something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Mark(Protocol):
    """A point in a lane."""

    def wait(self) -> None:
        """Return when all that was asked of the lane before is done."""
        ...


class Lane(Protocol):
    """Work for a device, done in the order it was asked for; every worker has a lane of its own.

    Until a later mark was waited for, what is copied from must not change, and what is copied to
    main memory must not be read. Operations on the device that are asked for later see the copies.
    """

    def send(self, numbers: Tensor, device: Tensor) -> None:
        """Copy from main memory to the device."""
        ...

    def fetch(self, device: Tensor, numbers: Tensor) -> None:
        """Copy from the device to main memory."""
        ...

    def mark(self) -> Mark:
        """The present end of the lane."""
        ...


class CudaLane:
    """A CUDA stream, current in the thread that makes it; copies overlap if main memory is pinned."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        torch.cuda.set_stream(self._stream)

    def send(self, numbers: Tensor, device: Tensor) -> None:
        """See `Lane`."""
        device.copy_(numbers, non_blocking=True)

    def fetch(self, device: Tensor, numbers: Tensor) -> None:
        """See `Lane`."""
        numbers.copy_(device, non_blocking=True)

    def mark(self) -> Mark:
        """See `Lane`."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return _Event(event)


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """See `Mark`."""
        self._event.synchronize()


def lane_for(device: torch.device) -> Lane | None:
    """A lane of the calling thread; None if arithmetic happens in main memory or the device copies by itself."""
    return CudaLane(device) if device.type == "cuda" else None
