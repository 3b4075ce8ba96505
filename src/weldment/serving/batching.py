"""The queue, and the one thread that owns the model and makes batches of what waits in it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from weldment.errors import RequestError
from weldment.serving.classification import Answer, Question
from weldment.serving.engine import TOKENS
from weldment.serving.generation import Pool, Writing
from weldment.serving.rows import Row

if TYPE_CHECKING:
    from weldment.serving.engine import Engine, Mixture
    from weldment.serving.metrics import Metrics

WINDOW = 4
"""Batches of questions that are taken at a time: enough to put similar lengths together, and none waits for long."""

_log = logging.getLogger(__name__)

AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class Batching:
    """How batches are made.

    Attributes:
        rows: the most of a batch.
        wait: seconds that the first row waits for others when the model is idle.
        queue: the most rows that wait.
    """

    rows: int = 32
    wait: float = 0.005
    queue: int = 1024


class Worker:
    """Answers rows, in a thread of its own, until it is stopped; what is queued then is still answered."""

    def __init__(self, engine: Engine, batching: Batching, metrics: Metrics) -> None:
        self._engine = engine
        self._batching = batching
        self._metrics = metrics
        self._pool = Pool(engine)
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="weldment-model", daemon=True)
        metrics.queued.set_function(lambda: self.waiting)
        metrics.writing.set_function(lambda: len(self._pool))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer what is there, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._waiting)

    @property
    def is_working(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def check_count(self, count: int, field: str) -> None:
        """Refuse a request before anything is done for its rows.

        Args:
            count: of its rows.
            field: with its inputs.

        Raises:
            RequestError: there is never room for so many.
        """
        most = self._batching.queue
        if count > most:
            cause = f"the request has {count} inputs, each choice counted, and at most {most} can wait at once"
            raise RequestError(cause, where=field, code="too_many_inputs", fix="Send them in several requests")

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue the rows of a request, all or none; their count is checked.

        Raises:
            RequestError: there is no room for them (429), or the server stops (503).
        """
        most = self._batching.queue
        with self._changed:
            if not self.is_working:
                raise RequestError("the server is stopping", status=503, code="stopping", retry_after=1)
            if len(self._waiting) + len(rows) > most:
                self._drop_cancelled()
            if len(self._waiting) + len(rows) > most:
                cause = f"the queue is full: {len(self._waiting)} of {most} places are taken"
                raise RequestError(cause, status=429, code="queue_full", fix="Try again later", retry_after=1)
            self._waiting.extend(rows)
            self._changed.notify()

    def _drop_cancelled(self) -> None:
        """Free the places of rows that nobody waits for any more; with the lock held."""
        self._waiting = deque(self._wanted(self._waiting))

    def _wanted(self, rows: Collection[AnyRow]) -> list[AnyRow]:
        """Those that somebody waits for; the others are counted."""
        kept = [row for row in rows if not row.cancelled]
        self._metrics.cancelled.inc(len(rows) - len(kept))
        return kept

    def _work(self) -> None:
        while self._has_work():
            questions, writings = self._take()
            for batch in batches(questions, self._batching.rows, TOKENS):
                self._answer(self._wanted(batch))
            if writings:
                self._begin(writings)
            if len(self._pool):
                self._go_on()

    def _has_work(self) -> bool:
        """Wait for rows; false if none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or len(self._pool) or self._stopping)
            if not len(self._pool):
                self._gather()
            return bool(self._waiting) or bool(len(self._pool))

    def _gather(self) -> None:
        """Let the first row that waits wait a little for others."""

        def is_time() -> bool:
            return len(self._waiting) >= self._batching.rows or self._stopping or not self._waiting

        if self._waiting:
            until = self._waiting[0].arrived + self._batching.wait
            self._changed.wait_for(is_time, max(0.0, until - time.monotonic()))

    def _take(self) -> tuple[list[Question], list[Writing]]:
        """Questions and prompts that come next; what cannot start yet goes on waiting."""
        questions: list[Question] = []
        writings: list[Writing] = []
        left: deque[Row] = deque()
        room = self._batching.rows - len(self._pool) if self._pool.is_open else 0
        with self._changed:
            self._drop_cancelled()
            for row in self._waiting:
                if isinstance(row, Question) and len(questions) < WINDOW * self._batching.rows:
                    questions.append(row)
                elif isinstance(row, Question):
                    left.append(row)
                elif isinstance(row, Writing) and room and _fits(writings, row, TOKENS):
                    writings.append(row)
                    room -= 1
                else:
                    room = 0
                    left.append(row)
            self._waiting = left
        return questions, writings

    def _answer(self, batch: Sequence[Question]) -> None:
        if not batch:
            return
        answered: list[tuple[Question, Answer]] = []
        with _Failing(batch):
            for part in batches(batch, len(batch), self._engine.together):
                answered += zip(part, self._engine.answer(part), strict=True)
                self._metrics.read("classify", [row.length for row in part])
            self._count([answer.mixture for _, answer in answered])
            # Together, so that clients that ask again meet in one batch.
            for row, answer in answered:
                if answer.is_nan:
                    row.refuse_nan()
                else:
                    row.send(answer)

    def _begin(self, writings: Sequence[Writing]) -> None:
        with _Failing(writings):
            mixtures = self._pool.admit(writings)
            self._metrics.read("prompt", [row.length for row in writings])
            self._metrics.tokens.labels("generated").inc(len(writings))
            self._count(mixtures)
            for row in writings:
                self._metrics.first_token.observe(time.monotonic() - row.arrived)

    def _go_on(self) -> None:
        self._metrics.cancelled.inc(self._pool.drop_cancelled())
        rows = self._pool.rows
        if not rows:
            return
        with _Failing(rows, self._pool):
            self._pool.step()
            self._metrics.batches.labels("token").observe(len(rows))
            self._metrics.tokens.labels("generated").inc(len(rows))

    def _count(self, mixtures: Sequence[Mixture]) -> None:
        for mixture in mixtures:
            self._metrics.experts.labels(mixture.expert or "shared").inc()


class _Failing:
    """What goes wrong inside is told to these rows, and the thread lives on; a pool is emptied then."""

    def __init__(self, rows: Sequence[Row], pool: Pool | None = None) -> None:
        self._rows = rows
        self._pool = pool

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if not isinstance(error, Exception):
            return False
        _log.error("a batch of %d failed", len(self._rows), exc_info=error)
        if self._pool is not None:
            self._pool.clear()
        cause = "the model failed to answer; the server's log says why"
        for row in self._rows:
            row.send(RequestError(cause, status=500, code="internal_error"))
        return True


def _fits(rows: Sequence[Row], row: Row, tokens: int) -> bool:
    """Whether a batch of inputs has room for one more."""
    return not rows or (len(rows) + 1) * max(row.length, *(other.length for other in rows)) <= tokens


def batches(questions: Sequence[Question], most: int, tokens: int) -> Iterator[list[Question]]:
    """Batches of questions of one kind and similar lengths, the longest first.

    Args:
        most: questions of a batch.
        tokens: the most of a batch, padding included; a question that has more is a batch of its own.
    """
    batch: list[Question] = []
    for row in sorted(questions, key=lambda row: (row.kind, -row.length)):
        if batch and (len(batch) == most or row.kind != batch[0].kind or not _fits(batch, row, tokens)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
