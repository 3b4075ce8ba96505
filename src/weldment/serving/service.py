"""What all routes of a server share, and how they wait for the model."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from weldment.errors import RequestError
from weldment.serving import failures
from weldment.serving.batching import Batching, Worker
from weldment.serving.engine import Engine, Mixture
from weldment.serving.limits import Limits
from weldment.serving.metrics import Metrics
from weldment.serving.rows import Ticket
from weldment.serving.wire import Routing

T = TypeVar("T")


class Service:
    """The model, its queue and its numbers.

    Attributes:
        stopping: no more requests are wanted; those that come are answered as long as the port is open.
        in_flight: requests without a full answer.
        lost: requests that were cut off because the time to stop was over.
    """

    def __init__(self, engine: Engine, batching: Batching, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = Metrics()
        self.worker = Worker(engine, batching, self.metrics)
        self.started = int(time.time())
        self.stopping = False
        self.in_flight = 0
        self.lost = 0
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        # Tokenizers are not made for several threads.
        self._tokenizing = ThreadPoolExecutor(1, "weldment-tokenizer")

    def ticket(self) -> Ticket:
        """For a request that comes now."""
        return Ticket(asyncio.get_running_loop().time() + self.limits.seconds)

    async def tokens(self, of: Callable[[], T]) -> T:
        """The result of something that takes texts apart, which may take a while for long ones."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, of)

    def header(self, kind: str, prefix: str) -> dict[str, Any]:
        """How each answer begins."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.engine.name,
        }

    def routing(self, mixture: Mixture) -> Routing:
        """Which experts answered, with all their weights."""
        weights = dict(zip(self.engine.experts, mixture.weights, strict=True))
        return Routing(expert=mixture.expert, weights=weights, fallback=mixture.fallback)

    def check_model(self, name: str | None) -> None:
        """Refuse other models.

        Raises:
            RequestError: this one has another name (404).
        """
        if name is not None and name != self.engine.name:
            cause = f"the model {name!r} is not served here"
            fix = f"Ask for {self.engine.name!r}"
            raise RequestError(cause, where="model", status=404, code="model_not_found", fix=fix)

    def check_expert(self, name: str | None, field: str, known: Sequence[str]) -> None:
        """Refuse names of experts that are not there.

        Args:
            field: of the request.
            known: the names there are.

        Raises:
            RequestError: it is none of them.
        """
        if name is not None and name not in known:
            fix = f"It is one of {', '.join(known)}" if known else "Leave it out"
            raise RequestError(f"there is no {field} {name!r}", where=field, code=f"unknown_{field}", fix=fix)


async def unless_left(request: Request, answer: Awaitable[T]) -> T:
    """The answer, as long as the client waits for it.

    Raises:
        RequestError: the client went away; waiting for the answer ended.
    """
    waiting = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise failures.client_left()
        return waiting.result()
    finally:
        waiting.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
