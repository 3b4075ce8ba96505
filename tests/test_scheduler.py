"""Jobs as generators of stages on threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable
from typing import Any

import pytest

from weldment.engine.pools import thread_pool
from weldment.engine.scheduler import Interrupted, Scheduler, Stages


class Runner:
    """A scheduler with threads of its own for each run."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._scheduler: Scheduler | None = None

    def run(self, jobs: Iterable[Stages]) -> None:
        with thread_pool(self._threads, lambda: threading.current_thread().name) as pool:
            self._scheduler = Scheduler(pool)
            self._scheduler.run(jobs)

    def stop(self) -> None:
        assert self._scheduler is not None
        self._scheduler.stop()


def scheduler(threads: int = 3) -> Runner:
    return Runner(threads)


def counting(size: int, into: list[Any]) -> Generator[Any, list[Any], None]:
    """Two stages; the second sees the first's results in order."""
    first = yield [lambda _, n=n: n * n for n in range(size)]
    second = yield [lambda _, n=n: first[n] + 1 for n in range(size)]
    into.append(second)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_stages_and_order(threads: int) -> None:
    found: list[Any] = []
    scheduler(threads).run([counting(size, found) for size in (1, 7, 100, 3)])
    assert sorted(found) == sorted([n * n + 1 for n in range(size)] for size in (1, 7, 100, 3))


def test_empty_stages_and_no_jobs() -> None:
    ended: list[int] = []

    def job() -> Generator[Any, list[Any], None]:
        assert (yield []) == []
        assert (yield []) == []
        ended.append(1)

    scheduler().run([])
    scheduler().run([job(), job()])
    assert len(ended) == 2


def test_one_job_uses_all_threads() -> None:
    """Tasks of one stage run at the same time."""
    barrier = threading.Barrier(3, timeout=20)

    def job() -> Generator[Any, list[Any], None]:
        yield [lambda _: barrier.wait() for _ in range(3)]

    scheduler(3).run([job()])
    assert not barrier.broken


def test_few_jobs_are_open_at_once() -> None:
    """A job begins only when no task of an earlier one waits."""
    open_now, most = 0, 0
    lock = threading.Lock()

    def job() -> Generator[Any, list[Any], None]:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        yield [lambda _: time.sleep(0.001) for _ in range(4)]
        with lock:
            open_now -= 1

    scheduler(2).run(job() for _ in range(40))
    assert most <= 3


@pytest.mark.parametrize("place", ["task", "job"])
def test_failure_is_raised_and_ends_everything(place: str) -> None:
    begun: list[int] = []

    def job(number: int) -> Generator[Any, list[Any], None]:
        begun.append(number)

        def task(_: str) -> None:
            if place == "task" and number == 5:
                raise ValueError("in a task")

        yield [task]
        if place == "job" and number == 5:
            raise ValueError("in a job")

    with pytest.raises(ValueError, match=f"in a {place}"):
        scheduler(2).run(job(number) for number in range(1000))
    assert len(begun) < 100


def test_stop_finishes_what_runs() -> None:
    runner = scheduler(2)
    done: list[int] = []

    def job(number: int) -> Generator[Any, list[Any], None]:
        def task(_: str) -> None:
            if number == 3:
                runner.stop()
            time.sleep(0.01)
            done.append(number)

        yield [task]

    with pytest.raises(Interrupted):
        runner.run(job(number) for number in range(1000))
    assert 3 in done
    assert len(done) < 10


def test_each_thread_has_its_workspace() -> None:
    seen: set[tuple[str, str]] = set()

    def job() -> Generator[Any, list[Any], None]:
        yield [lambda name: seen.add((name, threading.current_thread().name)) for _ in range(200)]

    scheduler(3).run([job()])
    assert all(made_in == ran_in for made_in, ran_in in seen)
