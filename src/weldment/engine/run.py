"""Runs tensor jobs: model-wide statistics first, then every tensor."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from weldment.engine.checksum import Outcome
from weldment.engine.copying import Copy, copy_stages
from weldment.engine.scheduler import Scheduler, Stages
from weldment.engine.work import Work, statistic_stages, tensor_stages
from weldment.engine.workspace import Workspace


@dataclass(frozen=True)
class Machine:
    """Where and how wide to run.

    Attributes:
        device: "cpu", "cuda" or "mps".
        threads: worker threads.
        accumulate: "float32" or "float64".
    """

    device: str = "cpu"
    threads: int = 1
    accumulate: str = "float32"

    def workspace(self) -> Workspace:
        """A thread's buffers."""
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
        finished: called in a worker thread when a tensor is written.
        report: called with the number of elements merged since the last call.
        pending: tensors for which it is false are left out, though model-wide statistics count them.

    Raises:
        Interrupted: the user pressed Ctrl-C.
    """
    before = torch.get_num_threads()
    runner: Scheduler[Workspace] = Scheduler(machine.threads, partial(_begin_thread, machine))
    try:
        shared = _model_statistics(works, runner)
        runner.run(_stages(works, shared, finished, report, pending))
    finally:
        torch.set_num_threads(before)


def _begin_thread(machine: Machine) -> Workspace:
    """A worker's buffers; the workers are the parallelism, so torch gets one thread in each."""
    torch.set_num_threads(1)
    return machine.workspace()


def _stages(
    works: Sequence[Work | Copy],
    shared: Mapping[int, Mapping[str, Any]],
    finished: Finished,
    report: Callable[[Work | Copy, int], None],
    pending: Callable[[Work | Copy], bool],
) -> Iterator[Stages[Workspace]]:
    for place, work in enumerate(works):
        if not pending(work):
            continue
        if isinstance(work, Copy):
            yield copy_stages(work, partial(finished, work), partial(report, work))
        else:
            whole = replace(work, statistics=shared.get(place, {}))
            yield tensor_stages(whole, partial(finished, work), partial(report, work))


def _group(work: Work) -> tuple[Any, ...]:
    return work.method.name, repr(sorted(work.parameters.items()))


def _model_statistics(works: Sequence[Work | Copy], runner: Scheduler[Workspace]) -> dict[int, dict[str, Any]]:
    """Statistics over all tensors that share a method and its parameters."""
    found: dict[int, dict[str, Any]] = {}
    indexed = [(n, w) for n, w in enumerate(works) if isinstance(w, Work) and _needs_model(w)]
    for _, group in itertools.groupby(sorted(indexed, key=lambda pair: _group(pair[1])), lambda pair: _group(pair[1])):
        members = list(group)
        statistics: dict[str, Any] = {}
        runner.run([_collect([work for _, work in members], statistics)])
        found.update({place: statistics for place, _ in members})
    return found


def _needs_model(work: Work) -> bool:
    return any(statistic.scope == "model" for statistic in work.method.statistics_for(work.parameters))


def _collect(works: Iterable[Work], into: dict[str, Any]) -> Stages[Workspace]:
    works = list(works)
    for statistic in works[0].method.statistics_for(works[0].parameters):
        if statistic.scope == "model":
            into[statistic.name] = yield from statistic_stages(works, statistic, into)
