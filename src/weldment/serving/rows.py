"""What the model's thread works on: rows, and how it tells requests about them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from weldment.errors import RequestError


@dataclass(eq=False)
class Row:
    """One input of a request.

    Attributes:
        ticket: of the request.
        index: of the input in the request.
        arrived: when, by the monotonic clock.
    """

    ticket: Ticket
    index: int
    arrived: float = field(default_factory=time.monotonic, init=False)

    @property
    def length(self) -> int:
        """In tokens."""
        raise NotImplementedError

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self.ticket.cancelled

    def send(self, event: Any) -> None:
        """Tell the request; from any thread."""
        self.ticket.send(self.index, event)

    def refuse_nan(self) -> None:
        """Tell the request that the model calculated no numbers for this row."""
        cause = "the model's result for this input is not a number: its arithmetic overflowed"
        fix = "The server's operator may serve it with --dtype float32"
        self.send(RequestError(cause, status=500, code="not_a_number", fix=fix))


class Ticket:
    """What a request waits at: the events of its rows, until the last one of each.

    Made in the event loop's thread.

    Attributes:
        cancelled: whether nobody waits any more; the rows are dropped before the model's next step then.
    """

    def __init__(self, deadline: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._deadline = deadline
        self.cancelled = False

    def send(self, index: int, event: Any) -> None:
        """Add an event of a row; from any thread. An exception ends the request."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def events(self, rows: Sequence[Row]) -> AsyncIterator[tuple[int, Any]]:
        """Pairs of a row's index and what happened, until each row had an event that is `last`.

        Raises:
            RequestError: it takes too long (504).
            Exception: what the model's thread ran into.
        """
        left = len(rows)
        try:
            while left:
                index, event = await self._next()
                if isinstance(event, BaseException):
                    raise event
                left -= event.last
                yield index, event
        finally:
            self.cancelled = True

    async def _next(self) -> tuple[int, Any]:
        try:
            return await asyncio.wait_for(self._events.get(), max(0.0, self._deadline - self._loop.time()))
        except asyncio.TimeoutError:
            raise RequestError(
                "the request took too long", status=504, code="timeout", fix="Ask for less at once, or try again later"
            ) from None
