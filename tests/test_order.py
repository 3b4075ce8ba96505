"""Exact order statistics, whatever the numbers look like."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weldment.engine import order
from weldment.engine.blocks import Grid, Range
from weldment.engine.workspace import Workspace

WORKSPACE = Workspace(torch.device("cpu"), torch.float32)


def drive(stages: Generator[list[Any], list[Any], Any]) -> tuple[Any, int]:
    """The result of a generator of stages, and how many stages it took."""
    count = 0
    try:
        tasks = next(stages)
        while True:
            count += 1
            tasks = stages.send([task(WORKSPACE) for task in tasks])
    except StopIteration as stop:
        return stop.value, count


def find(series: list[np.ndarray], ranks: list[list[int]]) -> tuple[list[list[float]], int]:
    """Order statistics of series that all run over one tensor."""

    def values(item: list[np.ndarray], cut: Range, workspace: Workspace) -> list[Tensor]:
        return [torch.from_numpy(numbers[cut.start : cut.stop].copy()) for numbers in item]

    grid = Grid((series[0].size,), "element", 1 << 16)
    return drive(order.select([(series, grid)], values, ranks))


def shapes() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    n = 700_001
    normal = np.abs(draw.standard_normal(n)).astype(np.float32)
    clustered = normal * np.repeat(draw.uniform(1e-3, 1e3, n // 1000 + 1), 1000)[:n].astype(np.float32)
    sparse = np.where(draw.random(n) < 0.001, normal, 0).astype(np.float32)
    hidden = np.zeros(n, np.float32)
    hidden[123_456:123_956] = normal[:500]
    return {
        "normal": normal,
        "few distinct values": np.round(normal, 1),
        "all equal": np.full(n, 0.25, np.float32),
        "all zero": np.zeros(n, np.float32),
        "mostly zero": sparse,
        "one hidden run": hidden,
        "sorted": np.sort(normal),
        "clustered": clustered,
        "tiny and huge": (normal**20).astype(np.float32),
        "subnormal": (normal * 1e-42).astype(np.float32),
    }


@pytest.mark.parametrize("name", shapes())
def test_long_series(name: str) -> None:
    numbers = shapes()[name]
    n = numbers.size
    ranks = [0, 1, n // 5, n // 2, int(n * 0.8), n - 700, n - 2, n - 1]
    found, _ = find([numbers], [ranks])
    ordered = np.sort(numbers)
    assert found[0] == [float(ordered[rank]) for rank in ranks]


def test_a_good_sample_needs_one_pass() -> None:
    """Sample, then count and select: two stages."""
    found, stages = find([shapes()["normal"]], [[560_000]])
    assert stages == 2
    assert found[0][0] is not None


def test_several_series() -> None:
    first, second = shapes()["normal"], shapes()["mostly zero"]
    found, _ = find([first, second], [[5], [first.size - 3, first.size - 30]])
    assert found[0] == [float(np.sort(first)[5])]
    assert found[1] == [float(np.sort(second)[-3]), float(np.sort(second)[-30])]


def test_samples_are_gathered_by_many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task holds what it sends several times, so many series make more tasks, not larger ones."""
    monkeypatch.setattr(order, "_GATHERED", 1 << 14)
    series = [shapes()["normal"]] * 3

    def values(item: int, cut: Range, workspace: Workspace) -> list[Tensor]:
        return [torch.from_numpy(numbers[cut.start : cut.stop].copy()) for numbers in series]

    n = series[0].size
    stages = order.select([(0, Grid((n,), "element", 1 << 16))], values, [[5], [n // 2], [n - 1]])
    sent = [sum(piece.size for column in task(WORKSPACE) for piece in column) for task in next(stages)]
    assert len(sent) > 4
    assert max(sent) <= 1 << 14


def test_over_several_tensors() -> None:
    """A series may run over all tensors of a model, small and large."""
    draw = np.random.default_rng(1)
    parts = [
        np.abs(draw.standard_normal(size)).astype(np.float32) * scale
        for size, scale in ((400_000, 1), (7, 50), (90_000, 0.01))
    ]

    def values(item: np.ndarray, cut: Range, workspace: Workspace) -> list[Tensor]:
        return [torch.from_numpy(item[cut.start : cut.stop].copy())]

    items = [(part, Grid(part.shape, "element", 1 << 16)) for part in parts]
    total = np.sort(np.concatenate(parts))
    ranks = [0, 1000, 90_000, 300_000, total.size - 3]
    found, _ = drive(order.select(items, values, [ranks]))
    assert found[0] == [float(total[rank]) for rank in ranks]


def test_nan_ends_the_search() -> None:
    numbers = shapes()["normal"].copy()
    numbers[:400_000] = np.nan
    found, _ = find([numbers], [[numbers.size - 1]])
    assert np.isnan(found[0][0])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=50),
    copies=st.integers(1, 40),
    data=st.data(),
)
def test_any_numbers(values: list[float], copies: int, data: st.DataObject) -> None:
    numbers = np.array(values * copies, dtype=np.float32)
    rank = data.draw(st.integers(0, numbers.size - 1))
    found, _ = find([numbers], [[rank]])
    assert found[0][0] == float(np.sort(numbers)[rank])


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_numbers_in_long_series(values: list[float], share: float, seed: int) -> None:
    """Few distinct values, many times each, in random order: brackets full of equal numbers."""
    numbers = np.random.default_rng(seed).choice(np.array(values, dtype=np.float32), 300_000)
    rank = min(int(share * numbers.size), numbers.size - 1)
    found, _ = find([numbers], [[rank]])
    assert found[0][0] == float(np.sort(numbers)[rank])
