"""What every request passes first: limits of its body, and the numbers that are kept of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weldment.errors import RequestError
from weldment.serving import failures

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from weldment.serving.service import Service


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        body: bytes.
        seconds: until the whole answer; also until the whole body has come.
        tokens: that may be generated for one text.
    """

    body: int = 1 << 20
    seconds: float = 60.0
    tokens: int = 1024


class BodyLimit:
    """Reads the body of each POST before the application sees the request, and refuses what is no JSON, or too much."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(dict(scope["headers"]), receive)
        except RequestError as error:
            # The rest of the body stays unread, so the connection is of no more use.
            refusal = failures.answer(error)
            refusal.headers["Connection"] = "close"
            await refusal(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            cause = f"the content type is {kind.decode('latin-1') or 'missing'}"
            fix = "Send JSON, and say so: Content-Type: application/json"
            raise RequestError(cause, status=415, code="unsupported_media_type", fix=fix)
        length = headers.get(b"content-length", b"0")
        self._check(int(length) if length.isdigit() else 0)
        try:
            return await asyncio.wait_for(self._collect(receive), self._limits.seconds)
        except asyncio.TimeoutError:
            cause = f"the body did not come within {self._limits.seconds:g} s"
            raise RequestError(cause, status=408, code="timeout") from None

    async def _collect(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise failures.client_left()
            body += message.get("body", b"")
            self._check(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def _check(self, size: int) -> None:
        if size > self._limits.body:
            cause = f"the body has more than the {self._limits.body} bytes that are allowed"
            raise RequestError(cause, status=413, code="request_too_large", fix="Send several smaller requests")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more; then what the client does next."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


class Counted:
    """Counts and measures requests, the outermost layer; while the server stops, an answer ends its connection."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app = app
        self._service = service
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Any path may be asked for, and each label costs memory.
        path = scope["path"] if scope["path"] in self._paths else "other"
        status = 500
        began = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.stopping:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        self._service.in_flight += 1
        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            # The server gave up waiting for it; clients that leave do not come here.
            self._service.lost += 1
            raise
        finally:
            self._service.in_flight -= 1
            self._service.metrics.answered(path, status, time.perf_counter() - began)
