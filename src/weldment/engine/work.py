"""One tensor to merge, and the stages it goes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weldment.engine.blocks import BLOCK, Grid, Range, chunks
from weldment.engine.checksum import Checksum, Outcome
from weldment.engine.order import select
from weldment.engine.outputs import Output, Span, Writes
from weldment.engine.scheduler import Stages
from weldment.engine.sources import Source
from weldment.engine.workspace import Workspace
from weldment.methods.block import Block, OrderStatistic, Statistic, Total
from weldment.methods.method import Method

if TYPE_CHECKING:
    from torch import Tensor

Part = tuple[int, Writes]
"""Of a span: its elements that are not finite, and the writes that are under way."""


@dataclass(frozen=True)
class Work:
    """A tensor to merge.

    Attributes:
        parameters: the kernel's keyword arguments.
        keys: random keys, one per model.
        statistics: results of model-wide passes, by name.
        dtype: safetensors name of the output's dtype.
        block: elements of a block.
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
    statistics: Mapping[str, Any] = field(default_factory=dict)
    block: int = BLOCK

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.method.unit_for(self.parameters), self.block)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def load(self, cut: Range, statistics: Mapping[str, Any], workspace: Workspace) -> Block:
        """Read the same elements of every model."""
        models = [self._read(source, ("model", n), cut, workspace) for n, source in enumerate(self.sources)]
        base = None if self.base is None else self._read(self.base, "base", cut, workspace)
        return Block(models, base, self.shape, cut.start, statistics=statistics, keys=self.keys, pool=workspace.scratch)

    def _read(self, source: Source, name: Any, cut: Range, workspace: Workspace) -> Tensor:
        out = workspace.numbers(name, cut.view)
        source.read(cut.start, out, workspace)
        return out


def tensor_stages(work: Work, finished: Callable[[Outcome], None], report: Callable[[int], None]) -> Stages[Workspace]:
    """The passes over one tensor: its statistics, then the merge; `finished` gets the outcome.

    `report` is called with the number of elements merged, block by block.
    """
    statistics = dict(work.statistics)
    for statistic in work.method.statistics_for(work.parameters) if work.numel else ():
        if statistic.name not in statistics:
            statistics[statistic.name] = yield from statistic_stages([work], statistic, statistics)
    checksum = Checksum(work.numel, work.dtype)
    parts = yield [partial(_merge_span, work, span, statistics, checksum, report) for span in work.grid.spans()]
    finished(outcome(checksum, parts))


def outcome(checksum: Checksum, parts: Sequence[Part]) -> Outcome:
    """The outcome of a tensor when all its spans are in the file."""
    for _, writes in parts:
        for write in writes:
            write.result()
    return Outcome(checksum, sum(nonfinite for nonfinite, _ in parts))


def statistic_stages(works: Sequence[Work], statistic: Statistic, known: Mapping[str, Any]) -> Stages[Workspace]:
    """One statistic over one tensor, or over all tensors of a model."""
    if isinstance(statistic, Total):
        return (yield from _total_stages(works, statistic, known))
    return (yield from _order_stages(works, statistic, known))


def _total_stages(works: Sequence[Work], statistic: Total, known: Mapping[str, Any]) -> Stages[Workspace]:
    tasks = [partial(_total_span, work, span, statistic, known) for work in works for span in work.grid.spans()]
    parts = yield tasks
    if not parts:
        return None
    total = torch.cat(parts).sum(dim=0)
    return total if statistic.finish is None else statistic.finish(total)


def _total_span(
    work: Work, span: tuple[int, int], statistic: Total, known: Mapping[str, Any], workspace: Workspace
) -> Tensor:
    """The partial sums of the chunks of a span, stacked."""
    partials: list[Tensor] = []
    for cut in work.grid.blocks(span):
        block = work.load(cut, known, workspace)
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
        start=block.start + start,
        _taken=0,
    )


def _order_stages(works: Sequence[Work], statistic: OrderStatistic, known: Mapping[str, Any]) -> Stages[Workspace]:
    total = sum(work.numel for work in works)
    ranks = statistic.ranks(total, statistics=known, **works[0].parameters)
    if all(rank is None for series in ranks for rank in series):
        return [[None for _ in series] for series in ranks]
    wanted = [n for n, series in enumerate(ranks) if any(rank is not None for rank in series)]

    def values(work: Work, cut: Range, workspace: Workspace) -> list[Tensor]:
        found = statistic.of(work.load(cut, known, workspace), **work.parameters)
        return [found[n].reshape(-1) for n in wanted]

    places = [[rank for rank in ranks[n] if rank is not None] for n in wanted]
    found = yield from select([(work, work.grid) for work in works], values, places)
    answers = {n: iter(series) for n, series in zip(wanted, found, strict=True)}
    return [[None if rank is None else next(answers[n]) for rank in series] for n, series in enumerate(ranks)]


def _merge_span(
    work: Work,
    span: tuple[int, int],
    statistics: Mapping[str, Any],
    checksum: Checksum,
    report: Callable[[int], None],
    workspace: Workspace,
) -> Part:
    """Merge a span and send it to the output."""
    nonfinite = 0
    output = work.output.span(span[0], workspace)
    for cut in work.grid.blocks(span):
        merged = work.method.kernel(work.load(cut, statistics, workspace), **work.parameters).reshape(-1)
        for start in range(0, cut.numel, BLOCK):
            nonfinite += emit(merged[start : start + BLOCK], cut.start + start, output, checksum)
        report(cut.numel)
    return nonfinite, output.close()


def emit(merged: Tensor, start: int, output: Span, checksum: Checksum) -> int:
    """Round elements and send them to the output; the number of them that are not finite.

    Args:
        start: index of the first element in the flattened tensor.
    """
    room = output.room(merged.numel())
    room.copy_(merged)
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
