"""Exact order statistics of series too long to sort: sample, bracket, count, select.

A small sample gives an interval that almost surely holds the wanted number. One pass over the
series counts what lies below the interval and keeps what lies inside. If the count shows that the
number lies elsewhere, the interval is moved and the pass repeated, so the result is always exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from weldment.engine.blocks import Grid, Range
from weldment.engine.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1 << 18
"""Up to so many elements a series is sorted as a whole."""

_PIECE = 4096
_MANY = 4096
_MARGIN = 4.0
_SAMPLED = 1 << 22  # of all series together
_GATHERED = 1 << 19  # of them by one task; what it sends is in memory several times

W = TypeVar("W")
Values = Callable[[W, Range, Any], "list[Tensor]"]
Stage = Generator[list[Callable[[Workspace], Any]], list[Any], Any]


@dataclass
class _Search:
    """The state of the search for the number of one rank in one series."""

    series: int
    rank: int
    low: float = 0.0
    high: float = math.inf
    found: float | None = None
    sample: np.ndarray = field(default_factory=lambda: np.empty(0))
    margin: float = 1.0

    def narrow(self, total: int) -> None:
        """Set the interval to the sample's quantiles around the rank."""
        share = (self.rank + 0.5) / total
        below = math.floor((share - self.margin) * self.sample.size)
        above = math.ceil((share + self.margin) * self.sample.size)
        self.low = 0.0 if below < 0 or np.isnan(self.sample[below]) else float(self.sample[below])
        self.high = math.inf if above >= self.sample.size or np.isnan(self.sample[above]) else float(self.sample[above])

    def settle(self, below: int, inside: list[tuple[np.ndarray, np.ndarray | None]]) -> None:
        """Take the number if the interval holds it; otherwise ask for a wider one."""
        place = self.rank - below
        if 0 <= place < (count := sum(_count(part) for part in inside)):
            self.found = _pick(inside, place, count)
        elif self.low == 0.0 and self.high == math.inf:
            self.found = math.nan  # only NaN lies outside this interval
        else:
            self.margin *= 4.0


def select(items: Sequence[tuple[W, Grid]], values: Values[W], ranks: Sequence[Sequence[int]]) -> Stage:
    """The numbers of the given ranks (0 = smallest) in each series.

    Args:
        items: what stands for the tensors that the series run over, with their cutting; goes into tasks.
        values: gives the series' non-negative numbers in a range of an item.
        ranks: for each series the wanted ranks.

    Returns:
        for each series the wanted numbers.
    """
    total = sum(grid.numel for _, grid in items)
    if total <= SMALL:
        sorted_series = yield from _sorted(items, values, len(ranks))
        return [[float(series[rank]) for rank in wanted] for series, wanted in zip(sorted_series, ranks, strict=True)]
    searches = [_Search(number, rank) for number, wanted in enumerate(ranks) for rank in wanted]
    yield from _start(items, values, searches, total)
    while pending := [search for search in searches if search.found is None]:
        for search in pending:
            search.narrow(total)
        bounds = [(search.series, search.low, search.high) for search in pending]
        tasks = [
            partial(_count_span, item, grid, span, values, bounds) for item, grid in items for span in grid.spans()
        ]
        parts = yield tasks
        for number, search in enumerate(pending):
            search.settle(sum(part[number][0] for part in parts), [part[number][1] for part in parts])
    answers = iter(searches)
    return [[next(answers).found for _ in wanted] for wanted in ranks]


def _sorted(items: Sequence[tuple[W, Grid]], values: Values[W], count: int) -> Stage:
    tasks = [partial(_gather, item, list(grid.blocks((0, grid.numel))), values) for item, grid in items if grid.numel]
    parts = yield tasks
    return [np.sort(np.concatenate([piece for part in parts for piece in part[n]])) for n in range(count)]


def _gather(item: W, cuts: Sequence[Range], values: Values[W], workspace: Workspace) -> list[list[np.ndarray]]:
    rows = [[series.cpu().numpy().copy() for series in values(item, cut, workspace)] for cut in cuts]
    return [list(column) for column in zip(*rows, strict=True)]


def _start(items: Sequence[tuple[W, Grid]], values: Values[W], searches: list[_Search], total: int) -> Stage:
    """Sample every item in proportion to its size and set the margins of the searches."""
    series = 1 + max(search.series for search in searches)
    wanted = min(max(total >> 6, 1 << 16), _SAMPLED // max(series, 4))
    samples = [
        (item, grid.samples(max(1, round(wanted * grid.numel / total / _PIECE)), _PIECE))
        for item, grid in items
        if grid.numel
    ]
    tasks = [partial(_gather, item, few, values) for item, cuts in samples for few in _groups(cuts, series)]
    parts = yield tasks
    pieces = [[piece for part in parts for piece in part[n]] for n in range(len(parts[0]))]
    pooled = [np.concatenate(series) for series in pieces]
    for sample in pooled:
        sample.sort()
    for search in searches:
        search.sample = pooled[search.series]
        search.margin = _uncertainty(pieces[search.series], search.sample, (search.rank + 0.5) / total)


def _groups(cuts: Sequence[Range], series: int) -> Iterator[Sequence[Range]]:
    """Cuts that one task gathers."""
    step = max(1, _GATHERED // (series * max(cut.numel for cut in cuts)))
    for start in range(0, len(cuts), step):
        yield cuts[start : start + step]


def _uncertainty(pieces: list[np.ndarray], pooled: np.ndarray, share: float) -> float:
    """How far, as a share of the sample, the wanted number may lie from the sample's own quantile.

    Neighbouring elements resemble each other, so the spread between the pieces counts, not the
    number of elements.
    """
    guess = pooled[min(int(share * pooled.size), pooled.size - 1)]
    shares = np.array([np.count_nonzero(piece < guess) / piece.size for piece in pieces if piece.size])
    between = shares.std() / math.sqrt(shares.size) if shares.size > 1 else 0.5
    within = math.sqrt(share * (1.0 - share) / pooled.size)
    return _MARGIN * max(between, within) + 2.0 / pooled.size


Inside = tuple["np.ndarray", "np.ndarray | None"]


def _count_span(
    item: W,
    grid: Grid,
    span: tuple[int, int],
    values: Values[W],
    bounds: Sequence[tuple[int, float, float]],
    workspace: Workspace,
) -> list[tuple[int, Inside]]:
    """For each series with an interval: how many numbers of the span lie below it, and those inside."""
    below = [0] * len(bounds)
    inside: list[list[np.ndarray]] = [[] for _ in bounds]
    for cut in grid.blocks(span):
        series = values(item, cut, workspace)
        for number, (place, low, high) in enumerate(bounds):
            count, kept = _split(series[place], low, high, workspace)
            below[number] += count
            inside[number].append(kept)
    return [(count, _compact(np.concatenate(kept))) for count, kept in zip(below, inside, strict=True)]


def _split(numbers: Tensor, low: float, high: float, workspace: Workspace) -> tuple[int, np.ndarray]:
    """How many numbers lie below `low`, and those from `low` to `high`."""
    if numbers.device.type != "cpu":
        count = int((numbers < low).sum()) if low > 0.0 else 0
        return count, torch.masked_select(numbers, (numbers >= low) & (numbers <= high)).cpu().numpy()
    array = numbers.numpy()
    number = array.dtype.type
    below, until = (workspace.staging(name, array.size).numpy().view(np.bool_) for name in ("below", "until"))
    np.less(array, number(low), out=below)
    np.less_equal(array, number(high), out=until)
    return int(np.count_nonzero(below)), array.take(_differences(below, until))


def _differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where two flags differ."""
    if one.size % 8:
        return np.flatnonzero(one != other)
    ones, others = one.view(np.uint64), other.view(np.uint64)
    eights = np.flatnonzero(ones != others)
    if 2 * eights.size > ones.size:
        return np.flatnonzero((ones ^ others).view(np.bool_))
    places = np.flatnonzero((ones.take(eights) ^ others.take(eights)).view(np.bool_))
    return (eights << 3).take(places >> 3) + (places & 7)


def _compact(numbers: np.ndarray) -> Inside:
    """Numbers that repeat a lot, as differences of bfloat16 do, are kept once, with their counts."""
    if numbers.size > _MANY:
        distinct, counts = np.unique(numbers, return_counts=True)
        if distinct.size < numbers.size // 2:
            return distinct, counts
    return numbers, None


def _count(part: Inside) -> int:
    numbers, counts = part
    return numbers.size if counts is None else int(counts.sum())


def _pick(inside: list[Inside], place: int, total: int) -> float:
    """The number at `place` in the sorted union."""
    numbers = np.concatenate([part[0] for part in inside])
    if all(part[1] is None for part in inside):
        return float(np.partition(numbers, place)[place])
    counts = np.concatenate([np.ones(n.size, np.int64) if c is None else c for n, c in inside])
    order = np.argsort(numbers, kind="stable")
    return float(numbers[order][np.searchsorted(np.cumsum(counts[order]), place, side="right")])
