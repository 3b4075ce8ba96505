"""Workers: processes of our own where the system can fork them, threads elsewhere.

Python's interpreter lock lets one thread of a process run at a time between two torch operations,
and every operation gives it up and takes it back. Two threads are therefore hardly faster than one
(benchmarks/README.md), two processes are twice as fast.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from weldment.engine.scheduler import Pool, Task

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

_PR_SET_PDEATHSIG = 1
_local = threading.local()


class _Threads:
    def __init__(self, executor: ThreadPoolExecutor, size: int) -> None:
        self._executor = executor
        self.size = size

    def submit(self, task: Task) -> Future[Any]:
        return self._executor.submit(_perform, task)

    def result(self, future: Future[Any]) -> Any:
        return future.result()


class _Processes:
    def __init__(self, executor: ProcessPoolExecutor, size: int) -> None:
        self._executor = executor
        self.size = size

    def submit(self, task: Task) -> Future[Any]:
        # Pickled here and not by multiprocessing, which would send tensors through shared memory.
        return self._executor.submit(_perform_pickled, pickle.dumps(task))

    def result(self, future: Future[Any]) -> Any:
        return pickle.loads(future.result())


def can_fork() -> bool:
    """Whether workers can be processes.

    Elsewhere than on Linux a forked process may not use system libraries, some containers have no
    shared memory to synchronise processes with, and daemonic processes may not have any.
    """
    if sys.platform != "linux":
        return False
    import multiprocessing

    if multiprocessing.current_process().daemon:
        return False
    try:
        multiprocessing.get_context("fork").Lock()
    except (ImportError, OSError):
        return False
    return True


@contextmanager
def thread_pool(size: int, worker: Callable[[], Any]) -> Iterator[Pool]:
    """Threads; `worker` is called once in each, and its result is passed to every task run there."""
    with ThreadPoolExecutor(size, "weld", _begin, (worker,)) as executor:
        yield _Threads(executor, size)


@contextmanager
def process_pool(size: int, worker: Callable[[], Any]) -> Iterator[Pool]:
    """Forked processes; they see what exists now, tasks and results are pickled.

    They end when the calling process does, even if it is killed.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(size, context, _begin_process, (worker, os.getpid())) as executor:
        with warnings.catch_warnings():
            # Threads of the caller do not live on in the workers, and these do not need them.
            warnings.simplefilter("ignore", DeprecationWarning)
            frozen = gc.get_freeze_count()
            gc.freeze()  # a collection in a worker would copy every page it looks at
            try:
                executor.submit(_nothing).result()
            finally:
                if not frozen:  # what the caller has frozen stays so
                    gc.unfreeze()
        yield _Processes(executor, size)


def _begin(worker: Callable[[], Any]) -> None:
    _local.worker = worker()


def _begin_process(worker: Callable[[], Any], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent sees to it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _begin(worker)


def _perform(task: Task) -> Any:
    return task(_local.worker)


def _perform_pickled(task: bytes) -> bytes:
    return pickle.dumps(_perform(pickle.loads(task)))


def _nothing() -> None:
    """Makes the pool start its processes."""
