"""Workers: threads and processes do the same work, and fail in the same words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from folders import tree, write_model
from weldment import merge
from weldment.engine import memory
from weldment.engine.pools import can_fork, process_pool, thread_pool
from weldment.engine.scheduler import Pool, Scheduler
from weldment.errors import CheckpointError, MergeError

Start = Callable[[int, Callable[[], Any]], AbstractContextManager[Pool]]

needs_fork = pytest.mark.skipif(not can_fork(), reason="workers are processes on Linux only")
POOLS = [thread_pool, pytest.param(process_pool, marks=needs_fork)]


class Worker:
    """Something that every worker makes once."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.tasks = 0


def double(number: Any, worker: Worker) -> Any:
    worker.tasks += 1
    return number * 2


def where(worker: Worker) -> tuple[int, int]:
    time.sleep(0.01)
    return worker.process, os.getpid()


def refuse(worker: Worker) -> None:
    raise CheckpointError("the file ended", where="a.safetensors", fix="Check it")


def die(worker: Worker) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(start: Start, *stages: list[Any]) -> list[list[Any]]:
    """The results of the stages of one job."""
    results: list[list[Any]] = []

    def job() -> Generator[Any, list[Any], None]:
        for stage in stages:
            results.append((yield stage))

    with start(2, Worker) as pool:
        Scheduler(pool).run([job()])
    return results


@pytest.mark.parametrize("start", POOLS)
def test_results_come_back_in_order(start: Start) -> None:
    first, second = run(start, [partial(double, n) for n in range(50)], [partial(double, torch.arange(3.0))])
    assert first == list(range(0, 100, 2))
    assert second[0].tolist() == [0.0, 2.0, 4.0]


@needs_fork
def test_processes_run_beside_the_caller() -> None:
    (found,) = run(process_pool, [where] * 20)
    assert all(made_in == ran_in != os.getpid() for made_in, ran_in in found)
    assert len(set(found)) == 2


@pytest.mark.parametrize("start", POOLS)
def test_an_error_keeps_its_words(start: Start) -> None:
    with pytest.raises(CheckpointError) as caught:
        run(start, [refuse])
    assert (caught.value.cause, caught.value.where, caught.value.fix) == ("the file ended", "a.safetensors", "Check it")


@needs_fork
def test_a_worker_that_is_killed_is_explained() -> None:
    with pytest.raises(MergeError, match="worker process was killed") as caught:
        run(process_pool, [die])
    assert "--max-memory" in str(caught.value)


CALLER = """
import os, sys, time
from weldment.engine.pools import process_pool
def forever(worker):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece: two workers write
    time.sleep(600)
with process_pool(2, lambda: None) as pool:
    tasks = [pool._executor.submit(forever, None) for _ in range(2)]
    time.sleep(600)
"""


@needs_fork
def test_workers_end_with_a_caller_that_is_killed() -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    workers = [int(caller.stdout.readline()) for _ in range(2)]
    caller.kill()
    caller.wait()
    caller.stdout.close()
    end = time.monotonic() + 20
    while any(_lives(worker) for worker in workers):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.02)


def _lives(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


METHODS = {
    "linear": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.4},
    "ties, global": {"density": 0.4, "trim": "global", "sign_ties": "majority"},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "model_stock": {},
    "sce": {"select_topk": 0.3},
    "multislerp": {},
}


@needs_fork
@pytest.mark.parametrize("name", METHODS)
def test_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for seed, model in enumerate(("base", "a", "b")):
        write_model(tmp_path / model, seed, layers=2, vocabulary=3000, hidden=256)
    monkeypatch.chdir(tmp_path)
    method = name.partition(",")[0]
    recipe = {"merge_method": method, "models": [{"model": "a"}, {"model": "b"}], "parameters": METHODS[name]}
    if method != "linear":
        recipe["base_model"] = "base"
    merge(recipe, "threads", threads=1)
    monkeypatch.setattr(memory, "FORK_ELEMENTS", 0)
    merge(recipe, "processes", threads=3)
    assert tree(Path("processes")) == tree(Path("threads"))


@needs_fork
def test_processes_after_torch_has_used_threads_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread pool does not live on in a forked process; a worker that needed it would hang."""
    torch.randn(700, 700) @ torch.randn(700, 700)
    torch.ones(1 << 22).add_(1.0)
    for seed, model in enumerate(("a", "b")):
        write_model(tmp_path / model, seed, layers=2, vocabulary=3000, hidden=256)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "FORK_ELEMENTS", 0)
    before = torch.get_num_threads()
    merge({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}, "out", threads=2)
    assert torch.get_num_threads() == before
    assert (tmp_path / "out" / "model.safetensors").exists()
