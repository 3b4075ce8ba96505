"""Checksums do not depend on the cut and see every change."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weldment.checkpoint.dtypes import safetensors_dtype
from weldment.engine.checksum import Checksum
from weldment.methods.block import CHUNK


def digest(tensor: Tensor, cuts: list[int]) -> str:
    checksum = Checksum(tensor.numel(), safetensors_dtype(tensor.dtype))
    places = [0, *sorted(cuts), tensor.numel()]
    parts = [(start, stop) for start, stop in itertools.pairwise(places) if stop > start]
    for start, stop in reversed(parts):
        checksum.add(start, tensor[start:stop])
    return checksum.digest()


def numbers(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    count=st.sampled_from([0, 1, 3, 8, 1000, CHUNK, CHUNK + 1, 3 * CHUNK + 5]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    data=st.data(),
)
def test_any_cut(count: int, dtype: torch.dtype, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, count), max_size=6))
    tensor = numbers(count, dtype)
    assert digest(tensor, cuts) == digest(tensor, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_flipped_byte_shows(dtype: torch.dtype) -> None:
    tensor = numbers(2 * CHUNK + 11, dtype)
    whole = digest(tensor, [])
    raw = tensor.view(torch.uint8)
    for place in (0, 1, 7, 12345, raw.numel() // 2, raw.numel() - 1):
        raw[place] ^= 0x40
        assert digest(tensor, [5]) != whole
        raw[place] ^= 0x40
    assert digest(tensor, []) == whole


@pytest.mark.parametrize("length", [4, 32, 512, CHUNK])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_swapped_rows_show(dtype: torch.dtype, length: int) -> None:
    tensor = numbers(2 * CHUNK, dtype)
    swapped = torch.cat([tensor[length : 2 * length], tensor[:length], tensor[2 * length :]])
    assert digest(swapped, []) != digest(tensor, [])
