"""Cutting tensors: everything once, units whole."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weldment.engine.blocks import Grid
from weldment.methods.block import CHUNK, Unit

SHAPES = st.lists(st.integers(0, 700), max_size=3).map(tuple).filter(lambda shape: math.prod(shape) < 2_000_000)


@given(shape=SHAPES, unit=st.sampled_from(["element", "row", "matrix"]), factor=st.integers(1, 4))
def test_blocks_cover_the_tensor_once(shape: tuple[int, ...], unit: Unit, factor: int) -> None:
    grid = Grid(shape, unit, factor * CHUNK)
    blocks = [block for span in grid.spans() for block in grid.blocks(span)]
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks)][: len(blocks)]
    assert sum(block.numel for block in blocks) == math.prod(shape)
    assert all(math.prod(block.view) == block.numel for block in blocks)


@given(shape=SHAPES)
def test_rows_stay_whole(shape: tuple[int, ...]) -> None:
    grid = Grid(shape, "row", CHUNK)
    for span in grid.spans():
        for block in grid.blocks(span):
            assert block.view[1] == grid.columns
            assert block.start % grid.columns == 0


@pytest.mark.parametrize("shape", [(5, 7), (7,), (), (2, 3, 4)])
def test_matrices_keep_their_shape(shape: tuple[int, ...]) -> None:
    grid = Grid(shape, "matrix")
    (block,) = [block for span in grid.spans() for block in grid.blocks(span)]
    assert block.view == shape


@given(shape=SHAPES.filter(lambda shape: math.prod(shape) > 0), count=st.integers(1, 50))
def test_samples_lie_inside(shape: tuple[int, ...], count: int) -> None:
    for unit in ("element", "row"):
        found = Grid(shape, unit).samples(count, 64)
        assert found
        assert all(0 <= part.start < part.stop <= math.prod(shape) for part in found)
        assert all(before.stop <= after.start for before, after in itertools.pairwise(found))
