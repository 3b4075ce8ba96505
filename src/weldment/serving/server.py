"""The server's process: a port, signals, and an end at which nothing is lost."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from weldment.errors import UserError
from weldment.serving.service import Service

DRAIN = 0.5
"""Seconds between the wish to stop and the end of listening, in which balancers and clients learn of it."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """Serves an application until it is stopped, and then answers what has come.

    A first signal (or `stop`) makes `/health` say 503 and every answer end its connection; `DRAIN` seconds later no
    more connections are taken, and what is in flight has `grace` seconds. A second signal ends all at once.

    Args:
        app: from `create_app`.
        listener: a socket that listens, as `listen` makes it.
        grace: seconds.
        ready: called when requests are taken.
    """

    def __init__(
        self, app: FastAPI, listener: socket.socket, *, grace: float = 30.0, ready: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            # uvicorn takes whole seconds, and passes fractions on as they are.
            timeout_graceful_shutdown=grace,  # pyright: ignore[reportArgumentType]
        )
        super().__init__(config)
        self._service: Service = app.state.service
        self._listener = listener
        self._ready = ready
        self._ends: float | None = None

    @property
    def lost(self) -> int:
        """Requests that were cut off."""
        return self._service.lost

    def serve_all(self) -> None:
        """Serve until the end."""
        self.run(sockets=[self._listener])

    def stop(self) -> None:
        """As a signal does; from any thread."""
        if self._service.stopping:
            self.should_exit = self.force_exit = True
        self._service.stopping = True
        self._ends = time.monotonic() + DRAIN

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop listening; asked ten times a second."""
        return await super().on_tick(counter) or (self._ends is not None and time.monotonic() >= self._ends)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the main thread; unlike uvicorn's, they are not raised again after a graceful end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[Any, Any] = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        UserError: the address is taken, or is none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "Give another --port (0 takes any free one) or --host"
        raise UserError(f"cannot listen: {reason}", where=f"{host}:{port}", fix=fix) from error


def url_of(listener: socket.socket) -> str:
    """Where clients on this machine find the server."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
