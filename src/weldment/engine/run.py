"""Runs tensor jobs: model-wide statistics first, then every tensor."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from weldment.engine.checksum import Outcome
from weldment.engine.copying import Copy, copy_stages
from weldment.engine.lanes import lane_for
from weldment.engine.pools import process_pool, thread_pool
from weldment.engine.scheduler import Scheduler, Stages, Task
from weldment.engine.work import Part, Work, Worker, Works, merge_span, statistic_stages, tensor_stages
from weldment.engine.workspace import Workspace


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch: sums of linear algebra come out the same whatever the number of processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Machine:
    """Where and how wide to run.

    Attributes:
        device: "cpu", "cuda" or "mps".
        threads: workers.
        accumulate: "float32" or "float64".
        processes: workers are processes, not threads (see `pools`).
        budget: bytes that tasks of weight (`Work.weight`) may hold at a time, or None.
    """

    device: str = "cpu"
    threads: int = 1
    accumulate: str = "float32"
    processes: bool = False
    budget: int | None = None

    def workspace(self) -> Workspace:
        """A worker's buffers."""
        return Workspace(torch.device(self.device), getattr(torch, self.accumulate))


def default_threads() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


Finished = Callable[["Work | Copy", Outcome], None]


def run_works(
    works: Sequence[Work | Copy],
    machine: Machine,
    *,
    finished: Finished,
    report: Callable[[Work | Copy, int], None] = lambda work, count: None,
    pending: Callable[[Work | Copy], bool] = lambda work: True,
) -> None:
    """Merge all tensors.

    Args:
        finished: called when a tensor is written.
        report: called with the number of elements merged since the last call.
        pending: tensors for which it is false are left out, though model-wide statistics count them.

    Raises:
        Interrupted: the user pressed Ctrl-C.
    """
    before = torch.get_num_threads()
    start = process_pool if machine.processes and machine.threads > 1 else thread_pool

    def done(result: Any) -> None:
        if isinstance(result, Part):
            report(works[result.place], result.count)

    try:
        with start(machine.threads, partial(_worker, machine, works)) as pool:
            runner = Scheduler(pool, done, weigh=partial(_weight, works), budget=machine.budget)
            shared = _model_statistics(works, runner)
            runner.run(_stages(works, shared, finished, pending))
    finally:
        torch.set_num_threads(before)


def _weight(works: Sequence[Work | Copy], task: Task) -> int:
    """Of a task that merges a tensor as a whole; other tasks work on blocks."""
    if not isinstance(task, partial) or task.func is not merge_span:
        return 0
    work = works[task.args[0]]
    return work.weight if isinstance(work, Work) else 0


def _worker(machine: Machine, works: Sequence[Work | Copy]) -> Worker:
    """A worker's buffers; the workers are the parallelism, so torch gets one thread in each."""
    torch.set_num_threads(1)
    device = torch.device(machine.device)
    return Worker(device, getattr(torch, machine.accumulate), works, lane_for(device))


def _stages(
    works: Sequence[Work | Copy],
    shared: Mapping[int, Mapping[str, Any]],
    finished: Finished,
    pending: Callable[[Work | Copy], bool],
) -> Iterator[Stages]:
    for place, work in enumerate(works):
        if not pending(work):
            continue
        if isinstance(work, Copy):
            yield copy_stages(place, work, partial(finished, work))
        else:
            yield tensor_stages(place, work, shared.get(place, {}), partial(finished, work))


def _group(work: Work) -> tuple[Any, ...]:
    return work.method.name, repr(sorted(work.parameters.items()))


def _model_statistics(works: Sequence[Work | Copy], runner: Scheduler) -> dict[int, dict[str, Any]]:
    """Statistics over all tensors that share a method and its parameters."""
    found: dict[int, dict[str, Any]] = {}
    indexed = [(n, w) for n, w in enumerate(works) if isinstance(w, Work) and _needs_model(w)]
    for _, group in itertools.groupby(sorted(indexed, key=lambda pair: _group(pair[1])), lambda pair: _group(pair[1])):
        members = dict(group)
        statistics: dict[str, Any] = {}
        runner.run([_collect(members, statistics)])
        found.update(dict.fromkeys(members, statistics))
    return found


def _needs_model(work: Work) -> bool:
    return any(statistic.scope == "model" for statistic in work.method.statistics_for(work.parameters))


def _collect(works: Works, into: dict[str, Any]) -> Stages:
    first = next(iter(works.values()))
    for statistic in first.method.statistics_for(first.parameters):
        if statistic.scope == "model":
            into[statistic.name] = yield from statistic_stages(works, statistic, into)
