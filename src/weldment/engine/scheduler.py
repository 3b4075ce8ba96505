"""Threads that run jobs; a job is a generator of stages, a stage is a list of parallel tasks.

A generator yields the tasks of its next stage and is sent their results, in order, when all are
done. So a job of several passes reads as straight code, one tensor can keep all threads busy, and
no result depends on which thread ran what.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

W = TypeVar("W")
Task = Callable[[W], Any]
Stages = Generator[list[Callable[[W], Any]], list[Any], Any]


@dataclass
class _Stage(Generic[W]):
    job: Stages[W]
    results: list[Any]
    left: int


@dataclass
class _State(Generic[W]):
    waiting: Iterator[Stages[W]]
    ready: deque[tuple[_Stage[W], int, Callable[[W], Any]]] = field(default_factory=deque)
    active: int = 0
    failure: BaseException | None = None
    stopped: bool = False


class Interrupted(KeyboardInterrupt):
    """Raised by `run` after `stop` was called: the running tasks were finished, the others not begun."""


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `stop` instead of raising wherever the main thread is.

    A KeyboardInterrupt in the middle of waiting for threads would leave them running while their
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


class Scheduler(Generic[W]):
    """Runs jobs on `threads` threads; each thread has a workspace of its own.

    Args:
        threads: number of threads.
        workspace: called once in each thread; its result is passed to every task run there.
    """

    def __init__(self, threads: int, workspace: Callable[[], W]) -> None:
        self._threads = threads
        self._workspace = workspace
        self._condition = threading.Condition()
        self._state: _State[W] = _State(iter(()))
        self._running = 0
        self._ended = threading.Event()

    def run(self, jobs: Iterable[Stages[W]]) -> None:
        """Run all jobs to their end, started in the order given.

        Raises:
            the first exception a task or job raised, after the running tasks have ended;
            Interrupted: after `stop`, which Ctrl-C calls too.
        """
        self._state = _State(iter(jobs))
        self._running = self._threads
        self._ended.clear()
        workers = [threading.Thread(target=self._work, name=f"weld-{n}", daemon=True) for n in range(self._threads)]
        with _interrupts(self.stop):
            for worker in workers:
                worker.start()
            while not self._ended.wait(timeout=0.2):
                pass
        for worker in workers:
            worker.join()
        if self._state.failure is not None:
            raise self._state.failure
        if self._state.stopped:
            raise Interrupted

    def stop(self) -> None:
        """Let the running tasks end and begin no others."""
        self._state.stopped = True
        with self._condition:
            self._condition.notify_all()

    def _work(self) -> None:
        try:
            workspace = self._workspace()
            while (taken := self._take()) is not None:
                stage, index, task = taken
                stage.results[index] = task(workspace)
                self._finish(stage)
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits in `run`)
            with self._condition:
                self._state.failure = self._state.failure or error
                self._condition.notify_all()
        finally:
            with self._condition:
                self._running -= 1
                if self._running == 0:
                    self._ended.set()

    def _take(self) -> tuple[_Stage[W], int, Callable[[W], Any]] | None:
        state = self._state
        with self._condition:
            while True:
                if state.stopped or state.failure is not None:
                    return None
                if state.ready:
                    return state.ready.popleft()
                job = next(state.waiting, None)
                if job is not None:
                    state.active += 1
                    self._advance(job, None)
                elif state.active == 0:
                    self._condition.notify_all()
                    return None
                else:
                    self._condition.wait()

    def _finish(self, stage: _Stage[W]) -> None:
        with self._condition:
            stage.left -= 1
            done = stage.left == 0
        if done:
            self._advance(stage.job, stage.results)

    def _advance(self, job: Stages[W], results: list[Any] | None) -> None:
        """Move a job to its next stage that has tasks; runs the job's own code outside the lock where it can."""
        try:
            tasks = next(job) if results is None else job.send(results)
            while not tasks:
                tasks = job.send([])
        except StopIteration:
            with self._condition:
                self._state.active -= 1
                self._condition.notify_all()
            return
        stage = _Stage(job, [None] * len(tasks), len(tasks))
        with self._condition:
            self._state.ready.extend((stage, index, task) for index, task in enumerate(tasks))
            self._condition.notify_all()
