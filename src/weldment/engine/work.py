"""One tensor to merge, and the stages it goes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weldment.engine.blocks import BLOCK, Grid, Range, chunks
from weldment.engine.checksum import Checksum, Outcome
from weldment.engine.lanes import Lane
from weldment.engine.order import select
from weldment.engine.outputs import Output, Span
from weldment.engine.scheduler import Stages
from weldment.engine.sources import Source, read_all, read_one
from weldment.engine.workspace import Workspace
from weldment.methods.block import Block, OrderStatistic, Statistic, Total, required
from weldment.methods.finish import Finish, finished
from weldment.methods.method import Method

if TYPE_CHECKING:
    from torch import Tensor


AHEAD = 1 << 23
"""Elements of each model that are asked for before they are read."""

STRIDE = 1 << 20
"""So many at a time: looking whether they are there costs as much as reading thousands."""


@dataclass(frozen=True)
class Part:
    """A finished span of a tensor.

    Attributes:
        place: the tensor's place among the works.
        count: elements.
        nonfinite: those that are NaN or infinite.
    """

    place: int
    count: int
    nonfinite: int
    checksum: Checksum


@dataclass(frozen=True)
class Work:
    """A tensor to merge.

    Attributes:
        parameters: the kernel's keyword arguments.
        keys: random keys, one per model.
        weight: bytes that a task holds while it runs, where that is much; else 0.
        dtype: safetensors name of the output's dtype.
        block: elements of a block.
        finish: what is done to what the kernel gives, with the base's elements.
    """

    name: str
    shape: tuple[int, ...]
    method: Method
    parameters: Mapping[str, Any]
    sources: Sequence[Source]
    base: Source | None
    dtype: str
    output: Output
    keys: Sequence[int] = ()
    block: int = BLOCK
    finish: Finish | None = None
    weight: int = 0

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.method.unit_for(self.parameters), self.block)

    @property
    def merge_grid(self) -> Grid:
        """The cutting for the pass that merges: one block, in the kernel's own view, where all elements are needed."""
        is_whole = self.finish is not None and self.finish.is_whole
        return replace(self.grid, block=max(self.block, self.numel)) if is_whole else self.grid

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def inputs(self) -> list[Source]:
        """The models and the base."""
        return [*self.sources, *([] if self.base is None else [self.base])]

    def load(self, cut: Range, statistics: Mapping[str, Any], workspace: Workspace) -> Block:
        """Read the same elements of every model."""
        stack, models = workspace.stack(len(self.sources), cut.view)
        read_all(self.sources, cut.start, stack, workspace)
        base = self._base(cut, workspace) if self.method.takes_base else None
        return Block(
            list(models),
            base,
            self.shape,
            cut.start,
            statistics=statistics,
            keys=self.keys,
            pool=workspace.scratch,
            stack=stack,
        )

    def _base(self, cut: Range, workspace: Workspace) -> Tensor | None:
        if self.base is None:
            return None
        base = workspace.numbers("base", cut.view)
        read_one(self.base, cut.start, base, workspace)
        return base

    def merge(self, block: Block, cut: Range, workspace: Workspace) -> Tensor:
        """The merged elements of a block, finished."""
        merged = self.method.kernel(block, **self.parameters)
        if self.finish is None:
            return merged
        base = self._base(cut, workspace) if block.base is None else block.base
        return finished(merged, required(base), self.finish)


class Worker(Workspace):
    """What runs tasks: buffers of its own, and the works that tasks name by their place.

    Args:
        device: where the arithmetic runs.
        dtype: accumulation dtype.
        lane: copies to and from the device.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, works: Sequence[Any], lane: Lane | None = None
    ) -> None:
        super().__init__(device, dtype, lane)
        self.works = works

    def load(self, place: int, cut: Range, statistics: Mapping[str, Any]) -> Block:
        """The elements of every model of one work; those that lie a little further on are asked for."""
        self.look_ahead(place, cut)
        return self.works[place].load(cut, statistics, self)

    def look_ahead(self, place: int, cut: Range) -> None:
        """Where a stride of the tensor begins in `cut`, ask for the elements that lie `AHEAD` after it in the works."""
        first = -(-cut.start // STRIDE) * STRIDE
        if first >= cut.stop:
            return
        start, stop = first + AHEAD, min(first + STRIDE, self.works[place].numel) + AHEAD
        while start < stop and place < len(self.works):
            work = self.works[place]
            if start < work.numel:
                end = min(stop, work.numel)
                for source in work.inputs:
                    source.ask_for(start, end)
                start = end
            start, stop, place = start - work.numel, stop - work.numel, place + 1


Works = Mapping[int, Work]
"""Tensors by their place among all works."""


def tensor_stages(place: int, work: Work, shared: Mapping[str, Any], finished: Callable[[Outcome], None]) -> Stages:
    """The passes over one tensor: its statistics, then the merge; `finished` gets the outcome.

    Args:
        shared: results of model-wide passes, by name.
    """
    statistics = dict(shared)
    for statistic in work.method.statistics_for(work.parameters) if work.numel else ():
        if statistic.name not in statistics:
            statistics[statistic.name] = yield from statistic_stages({place: work}, statistic, statistics)
    parts = yield [partial(merge_span, place, span, statistics) for span in work.merge_grid.spans()]
    finished(joined(Checksum(work.numel, work.dtype), parts))


def joined(checksum: Checksum, parts: Sequence[Part]) -> Outcome:
    """The outcome of a tensor whose spans are all written."""
    for part in parts:
        checksum.join(part.checksum)
    return Outcome(checksum, sum(part.nonfinite for part in parts))


def statistic_stages(works: Works, statistic: Statistic, known: Mapping[str, Any]) -> Stages:
    """One statistic over one tensor, or over all tensors of a model."""
    if isinstance(statistic, Total):
        return (yield from _total_stages(works, statistic, known))
    return (yield from _order_stages(works, statistic, known))


def _statistic(work: Work, name: str) -> Any:
    return next(found for found in work.method.statistics_for(work.parameters) if found.name == name)


def _total_stages(works: Works, statistic: Total, known: Mapping[str, Any]) -> Stages:
    tasks = [
        partial(_total_span, place, span, statistic.name, known)
        for place, work in works.items()
        for span in work.grid.spans()
    ]
    parts = yield tasks
    if not parts:
        return None
    total = torch.cat(parts).sum(dim=0)
    return total if statistic.finish is None else statistic.finish(total)


def _total_span(place: int, span: tuple[int, int], name: str, known: Mapping[str, Any], worker: Worker) -> Tensor:
    """The partial sums of the chunks of a span, stacked."""
    work = worker.works[place]
    statistic = _statistic(work, name)
    partials: list[Tensor] = []
    for cut in work.grid.blocks(span):
        block = worker.load(place, cut, known)
        pieces = chunks(cut.numel) if work.grid.unit == "element" else [(0, cut.numel)]
        for start, stop in pieces:
            piece = block if len(pieces) == 1 else _piece(block, start, stop)
            partials.append(statistic.of(piece, **work.parameters).cpu().double())
    return torch.stack(partials)


def _piece(block: Block, start: int, stop: int) -> Block:
    return replace(
        block,
        models=[model[start:stop] for model in block.models],
        base=None if block.base is None else block.base[start:stop],
        stack=None if block.stack is None else block.stack[:, start:stop],
        start=block.start + start,
        _taken=0,
    )


def _order_stages(works: Works, statistic: OrderStatistic, known: Mapping[str, Any]) -> Stages:
    total = sum(work.numel for work in works.values())
    first = next(iter(works.values()))
    ranks = statistic.ranks(total, statistics=known, **first.parameters)
    if all(rank is None for series in ranks for rank in series):
        return [[None for _ in series] for series in ranks]
    wanted = [n for n, series in enumerate(ranks) if any(rank is not None for rank in series)]
    places = [[rank for rank in ranks[n] if rank is not None] for n in wanted]
    values = partial(_series, statistic.name, wanted, known)
    found = yield from select([(place, work.grid) for place, work in works.items()], values, places)
    answers = {n: iter(series) for n, series in zip(wanted, found, strict=True)}
    return [[None if rank is None else next(answers[n]) for rank in series] for n, series in enumerate(ranks)]


def _series(
    name: str, wanted: Sequence[int], known: Mapping[str, Any], place: int, cut: Range, worker: Worker
) -> list[Tensor]:
    """The wanted series of an order statistic in a range of a tensor."""
    work = worker.works[place]
    found = _statistic(work, name).of(worker.load(place, cut, known), **work.parameters)
    return [found[n].reshape(-1) for n in wanted]


def merge_span(place: int, span: tuple[int, int], statistics: Mapping[str, Any], worker: Worker) -> Part:
    """Merge and write a span."""
    work = worker.works[place]
    nonfinite = 0
    checksum = Checksum(work.numel, work.dtype).part(*span)
    with closing(work.output.span(span[0], worker)) as output:
        for cut in work.merge_grid.blocks(span):
            merged = work.merge(worker.load(place, cut, statistics), cut, worker).reshape(-1)
            for start in range(0, cut.numel, BLOCK):
                nonfinite += emit(merged[start : start + BLOCK], cut.start + start, output, checksum, worker)
    if work.weight:
        worker.release()
    return Part(place, span[1] - span[0], nonfinite, checksum)


def emit(merged: Tensor, start: int, output: Span, checksum: Checksum, workspace: Workspace) -> int:
    """Round elements and send them to the output; the number of them that are not finite.

    Args:
        start: index of the first element in the flattened tensor.
    """
    room = output.room(merged.numel())
    workspace.download(merged, room)
    return commit(room, start, output, checksum)


def commit(room: Tensor, start: int, output: Span, checksum: Checksum) -> int:
    """Check and send the elements in `room`, the first of which has the index `start`; how many are not finite."""
    nonfinite = count_nonfinite(room)
    checksum.add(start, room)
    output.send()
    return nonfinite


def count_nonfinite(numbers: Tensor) -> int:
    """How many of the numbers (contiguous, in main memory) are NaN or infinite.

    Read as integers, they are larger than infinity or equal to it: without their sign bit, and with it.
    """
    if numbers.numel() == 0 or not numbers.is_floating_point():
        return 0
    words = _words(numbers)
    positive = _infinity(numbers.dtype)
    negative = positive | 1 << 8 * words.itemsize - 1
    if words.max() < positive and words.view(f"u{words.itemsize}").max() < negative:
        return 0
    return int((~torch.isfinite(numbers)).sum())


def _words(numbers: Tensor) -> np.ndarray:
    """The bits of floats as signed integers."""
    return numbers.view(getattr(torch, f"int{8 * numbers.dtype.itemsize}")).numpy()


@lru_cache
def _infinity(dtype: torch.dtype) -> int:
    return int(_words(torch.tensor([math.inf], dtype=dtype))[0])
