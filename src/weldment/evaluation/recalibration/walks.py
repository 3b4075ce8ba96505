"""Batches on their way through a network, which rest before every one of some layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weldment.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weldment.evaluation.recalibration.unlabelled import Batch

_LONGEST = 200

Arrival = tuple[str, "Tensor"]
"""A layer's name, and the activations that have reached it."""


class Walk(Protocol):
    """One batch in one network."""

    def advance(self) -> Arrival | None:
        """Go on to the next of the layers; None at the end of the network.

        Raises:
            TaskError: the network cannot take the inputs.
        """
        ...

    def meet(self, arrival: Arrival) -> None:
        """A layer has been reached."""
        ...

    def close(self) -> None:
        """Give up the walk."""
        ...


class _Halt(Exception):  # noqa: N818  (it is no error)
    """Leaves a forward pass that is no longer wanted."""


@dataclass(frozen=True)
class Route:
    """A network with hooks before its layers.

    Attributes:
        name: of the model, for messages.
        current: the walk of each thread.
    """

    network: nn.Module
    name: str
    current: threading.local

    def walk(self, batch: Batch, walk: Walk) -> None:
        """One forward pass, as `walk`."""
        self.current.walk = walk
        try:
            with torch.inference_mode():
                self.network(**batch)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items())
            reason = " ".join(str(error).split())[:_LONGEST]
            cause = f"{type(self.network).__name__} cannot take the inputs {shapes}: {reason}"
            main = getattr(self.network, "main_input_name", "x")
            fix = f"Give inputs as in training, under the network's names for them, such as {main}"
            raise TaskError(cause, where=self.name, fix=fix) from error


@contextmanager
def route(network: nn.Module, layers: Mapping[str, nn.Module], name: str) -> Iterator[Route]:
    """The network with hooks before some layers, which tell the walk of the thread that they were reached."""
    current = threading.local()

    def before(layer: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        current.walk.meet((layer, args[0]))

    hooks = [module.register_forward_pre_hook(partial(before, layer)) for layer, module in layers.items()]
    try:
        yield Route(network, name, current)
    finally:
        for hook in hooks:
            hook.remove()


class Rerun:
    """A walk that begins again each time, and keeps nothing in between."""

    def __init__(self, route: Route, batch: Batch) -> None:
        self._route = route
        self._batch = batch
        self._passed = 0
        self._left = 0
        self._arrival: Arrival | None = None

    def advance(self) -> Arrival | None:
        """See `Walk`."""
        self._left, self._passed = self._passed, self._passed + 1
        self._arrival = None
        with suppress(_Halt):
            self._route.walk(self._batch, self)
        arrival, self._arrival = self._arrival, None
        return arrival

    def meet(self, arrival: Arrival) -> None:
        """See `Walk`."""
        if self._left == 0:
            self._arrival = arrival
            raise _Halt
        self._left -= 1

    def close(self) -> None:
        """Nothing is kept."""


class Held:
    """A walk in a thread of its own, which rests where it is and keeps its activations."""

    def __init__(self, route: Route, batch: Batch) -> None:
        self._route = route
        self._batch = batch
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._end: Future[None] | None = None
        self._arrivals: SimpleQueue[Arrival | None] = SimpleQueue()
        self._go = threading.Semaphore(0)
        self._is_closed = False

    def advance(self) -> Arrival | None:
        """See `Walk`."""
        if self._end is None:
            self._end = self._thread.submit(self._route.walk, self._batch, self)
            self._end.add_done_callback(lambda end: self._arrivals.put(None))
        else:
            self._go.release()
        arrival = self._arrivals.get()
        if arrival is None:
            self._end.result()
        return arrival

    def meet(self, arrival: Arrival) -> None:
        """See `Walk`."""
        self._arrivals.put(arrival)
        self._go.acquire()
        if self._is_closed:
            raise _Halt

    def close(self) -> None:
        """See `Walk`."""
        self._is_closed = True
        self._go.release()
        self._thread.shutdown()
