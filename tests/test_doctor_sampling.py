"""Which elements are read: within the budget, of every tensor, spread, the same every time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weldment.doctor.sampling import LEAST, RUN, blocks, sample

SIZES = st.lists(st.integers(0, 1 << 24), max_size=12)


@given(SIZES)
def test_runs_lie_in_their_tensors_in_order_and_do_not_overlap(sizes: list[int]) -> None:
    found = sample(sizes, budget=1 << 22)
    assert found == sample(sizes, budget=1 << 22)
    for size, runs in zip(sizes, found, strict=True):
        places = [place for run in runs for place in run]
        assert places == sorted(places)
        assert all(start < stop for start, stop in runs)
        assert not places or (places[0] >= 0 and places[-1] <= size)


@given(SIZES)
def test_of_every_tensor_something_is_read_and_of_small_ones_all(sizes: list[int]) -> None:
    for size, runs in zip(sizes, sample(sizes, budget=1 << 22), strict=True):
        read = sum(stop - start for start, stop in runs)
        assert read >= min(size, LEAST // 2)
        assert read == size or size > LEAST


def test_a_large_model_is_read_within_the_budget() -> None:
    sizes = [1 << 26] * 100 + [4096] * 65
    read = sum(stop - start for runs in sample(sizes, budget=1 << 24) for start, stop in runs)
    assert (1 << 24) <= read <= 1.1 * (1 << 24)


def test_models_of_very_many_tensors_are_read_within_twice_the_budget() -> None:
    sizes = [1 << 20] * 5000
    read = sum(stop - start for runs in sample(sizes, budget=1 << 24) for start, stop in runs)
    assert read <= max(2 * (1 << 24), len(sizes) * RUN)


def test_runs_reach_all_parts_of_a_tensor_and_all_columns() -> None:
    (runs,) = sample([1 << 26], budget=1 << 21)
    parts = {start * 64 // (1 << 26) for start, _ in runs}
    assert len(parts) == 64
    columns = {start % (1 << 14) // (1 << 11) for start, _ in runs}
    assert len(columns) == 8


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 40))
def test_blocks_hold_all_elements_in_order(lengths: list[int], room: int) -> None:
    runs = []
    place = 0
    for length in lengths:
        runs.append((place, place + length))
        place += length + 3
    found = list(blocks(runs, room))
    assert [n for group in found for run in group for n in range(*run)] == [n for run in runs for n in range(*run)]
    sizes = [sum(stop - start for start, stop in group) for group in found]
    assert all(size == room for size in sizes[:-1])
    assert all(0 < size <= room for size in sizes)
