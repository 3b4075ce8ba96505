"""Runs jobs on workers; a job is a generator of stages, a stage is a list of parallel tasks.

A generator yields the tasks of its next stage and is sent their results, in order, when all are
done. So a job of several passes reads as straight code, one tensor can keep all workers busy, and
no result depends on which worker ran what. The generators themselves run in the calling thread.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from weldment.errors import MergeError

Task = Callable[[Any], Any]
"""Called with the worker that runs it."""

Stages = Generator[list[Task], list[Any], Any]


_WAITING = 64
"""Tasks that wait for memory while lighter ones overtake them."""


class Pool(Protocol):
    """Workers that run tasks."""

    size: int

    def submit(self, task: Task) -> Future[Any]:
        """Let a worker run the task."""
        ...

    def result(self, future: Future[Any]) -> Any:
        """What a finished task returned; raises what it raised."""
        ...


@dataclass
class _Stage:
    job: Stages
    results: list[Any]
    left: int


class Interrupted(KeyboardInterrupt):
    """Raised by `run` after `stop` was called: the running tasks were finished, the others not begun."""


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `stop` instead of raising wherever the main thread is.

    A KeyboardInterrupt in the middle of waiting for workers would leave them running while their
    files are closed. Other handlers than Python's own, and other threads, are left alone.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Scheduler:
    """Runs jobs on the workers of a pool.

    Args:
        pool: the workers.
        done: called with the result of every finished task.
        weigh: bytes that a task holds while it runs, where that is much; else 0.
        budget: of such bytes, for all tasks that run at a time; None for any. A task that is heavier runs without
            others of weight.
    """

    def __init__(
        self,
        pool: Pool,
        done: Callable[[Any], None] = lambda result: None,
        *,
        weigh: Callable[[Task], int] = lambda task: 0,
        budget: int | None = None,
    ) -> None:
        self._pool = pool
        self._done = done
        self._weigh = weigh
        self._budget = budget
        self._weights: dict[Future[Any], int] = {}
        self._stopped = False
        self._ready: deque[tuple[_Stage, int, Task]] = deque()
        self._running: dict[Future[Any], tuple[_Stage, int]] = {}

    def run(self, jobs: Iterable[Stages]) -> None:
        """Run all jobs to their end, started in the order given.

        Raises:
            the first exception a task or job raised, after the running tasks have ended;
            Interrupted: after `stop`, which Ctrl-C calls too.
        """
        waiting = iter(jobs)
        with _interrupts(self.stop):
            try:
                while self._submit(waiting):
                    for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                        self._finish(future)
            except BrokenExecutor as error:  # noticed by a result, or by the next task that is submitted
                raise MergeError(
                    "a worker process was killed, perhaps because memory ran out",
                    fix="Run the same command again with fewer --threads or a --max-memory; it will go on from here",
                ) from error
            finally:
                self._drain()
        if self._stopped:
            raise Interrupted

    def stop(self) -> None:
        """Let the running tasks end and begin no others."""
        self._stopped = True

    def _submit(self, waiting: Iterator[Stages]) -> bool:
        """Keep a task in hand for every worker; whether any are running."""
        while not self._stopped and len(self._running) < 2 * self._pool.size:
            place = next((n for n, (_, _, task) in enumerate(self._ready) if self._fits(task)), None)
            if place is not None:
                stage, index, task = self._ready[place]
                del self._ready[place]
                future = self._pool.submit(task)
                self._running[future] = stage, index
                self._weights[future] = self._weigh(task)
            elif len(self._ready) < _WAITING and (job := next(waiting, None)) is not None:
                self._advance(job, None)
            else:
                break
        return bool(self._running) and not self._stopped

    def _fits(self, task: Task) -> bool:
        """Whether a task may start: those of weight only on a free worker, and within the budget."""
        weight, held = self._weigh(task), sum(self._weights.values())
        if weight == 0:
            return True
        if len(self._running) >= self._pool.size:
            return False
        return held == 0 or self._budget is None or held + weight <= self._budget

    def _finish(self, future: Future[Any]) -> None:
        stage, index = self._running.pop(future)
        self._weights.pop(future, None)
        stage.results[index] = result = self._pool.result(future)
        self._done(result)
        stage.left -= 1
        if stage.left == 0:
            self._advance(stage.job, stage.results)

    def _advance(self, job: Stages, results: list[Any] | None) -> None:
        """Move a job to its next stage that has tasks."""
        try:
            tasks = next(job) if results is None else job.send(results)
            while not tasks:
                tasks = job.send([])
        except StopIteration:
            return
        stage = _Stage(job, [None] * len(tasks), len(tasks))
        self._ready.extend((stage, index, task) for index, task in enumerate(tasks))

    def _drain(self) -> None:
        """Let the tasks end that run, and no others begin."""
        for future in self._running:
            future.cancel()
        wait(self._running)
        self._running.clear()
        self._weights.clear()
        self._ready.clear()
