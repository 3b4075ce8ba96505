"""Rows gathered from several tensors while they are read."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from weldment.checkpoint.model import MEAN, ZERO, LowRank, RowMap, Rows, TensorEntry
from weldment.checkpoint.opening import open_checkpoint
from weldment.engine.aligned import AlignedSource, aligned
from weldment.engine.works import Inputs
from weldment.engine.workspace import Workspace

WIDTH = 3
SHAPES = {0: 7, 1: 5, 2: 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def entry_of(folder: Path, number: int, dtype: torch.dtype = torch.float32) -> tuple[TensorEntry, Tensor]:
    """A tensor in a file, and its values."""
    path = folder / f"{number}-{dtype}.safetensors"
    values = torch.arange(SHAPES[number] * WIDTH, dtype=torch.float32).view(-1, WIDTH).add(100 * number).to(dtype)
    if not path.exists():
        save_file({"rows": values}, path)
    return open_checkpoint(str(path)).tensors["rows"], values


def place_of(rows: list[tuple[int, int] | list[tuple[int, int]] | None]) -> RowMap:
    """A map: a place, several places to average, or None for zeros."""
    models = array("h", [r[0] if isinstance(r, tuple) else MEAN if r else ZERO for r in rows])
    numbers = array("i", [r[1] if isinstance(r, tuple) else 0 for r in rows])
    return RowMap(models, numbers, {n: tuple(r) for n, r in enumerate(rows) if isinstance(r, list)})


PLACE = st.integers(0, 2).flatmap(lambda model: st.tuples(st.just(model), st.integers(0, SHAPES[model] - 1)))
ROWS = st.lists(st.one_of(PLACE, st.lists(PLACE, min_size=2, max_size=3), st.none()), min_size=1, max_size=12)


def expected(rows: list[tuple[int, int] | list[tuple[int, int]] | None], values: dict[int, Tensor]) -> Tensor:
    def one(row: tuple[int, int] | list[tuple[int, int]] | None) -> Tensor:
        if row is None:
            return torch.zeros(WIDTH)
        if isinstance(row, tuple):
            return values[row[0]][row[1]].float()
        return torch.stack([values[model][number].float() for model, number in row]).double().mean(dim=0).float()

    return torch.stack([one(row) for row in rows])


def source_of(
    folder: Path, stack: ExitStack, place: RowMap, length: int, dtypes: tuple[torch.dtype, ...]
) -> tuple[AlignedSource, dict[int, Tensor]]:
    found = {number: entry_of(folder, number, dtype) for number, dtype in enumerate(dtypes)}
    sources = {number: (f"model {number}", found[number][0]) for number in sorted(place.used)}
    entry = found[0][0]
    inputs = Inputs(stack, lambda file: file.path or Path())
    whole = TensorEntry(entry.name, entry.dtype, (length, WIDTH), entry.file, entry.offset, rows=Rows(sources, place))
    return aligned(whole, inputs.source), {number: values for number, (_, values) in found.items()}


@settings(max_examples=60)
@given(rows=ROWS, cut=st.integers(1, 40), mixed=st.booleans())
def test_any_map_read_in_any_blocks(folder: Path, stack: ExitStack, rows: list, cut: int, mixed: bool) -> None:
    dtypes = (torch.float32, torch.bfloat16 if mixed else torch.float32, torch.float32)
    source, values = source_of(folder, stack, place_of(rows), len(rows), dtypes)
    workspace = Workspace(torch.device("cpu"), torch.float32)
    out = torch.full((len(rows) * WIDTH,), float("nan"))
    for start in range(0, len(out), cut):
        source.ask_for(start, min(start + cut, len(out)))
        source.read(start, out[start : start + cut], workspace)
    wanted = expected(rows, values).view(-1)
    assert torch.allclose(out, wanted, rtol=1e-6)
    whole = torch.empty_like(out)
    source.read(0, whole, workspace)
    assert torch.equal(out, whole), "the bytes depend on the blocks"
    assert torch.equal(source.raw(0, (len(out),), workspace), whole)


def test_raw_rows_are_the_bytes_of_the_file(folder: Path, stack: ExitStack) -> None:
    """float64 rows are not rounded to the accumulation dtype where they are only copied."""
    path = folder / "exact.safetensors"
    values = torch.tensor([[1 / 3, 1e-300, 2.0], [1e300, 0.1, 0.7]], dtype=torch.float64)
    save_file({"rows": values}, path)
    entry = open_checkpoint(str(path)).tensors["rows"]
    place = place_of([(0, 1), None, (0, 0)])
    whole = TensorEntry("rows", "F64", (3, 3), entry.file, entry.offset, rows=Rows({0: ("m", entry)}, place))
    source = aligned(whole, Inputs(stack, lambda file: file.path or Path()).source)
    got = source.raw(0, (3, 3), Workspace(torch.device("cpu"), torch.float32))
    assert torch.equal(got, torch.stack([values[1], torch.zeros(3, dtype=torch.float64), values[0]]))


def test_adapted_rows_are_aligned_after_the_adapter(folder: Path, stack: ExitStack) -> None:
    """Rows that an adapter changes are lent with its change."""
    entry, values = entry_of(folder, 0)
    a, b = torch.randn(2, WIDTH), torch.randn(SHAPES[0], 2)
    path = folder / "adapter.safetensors"
    save_file({"a": a, "b": b}, path)
    factors = open_checkpoint(str(path)).tensors
    changed = TensorEntry(
        entry.name, entry.dtype, entry.shape, entry.file, entry.offset, (LowRank(factors["a"], factors["b"], 0.5),)
    )
    place = place_of([(0, 6), (0, 0), (0, 1)])
    whole = TensorEntry("rows", "F32", (3, WIDTH), entry.file, entry.offset, rows=Rows({0: ("m", changed)}, place))
    assert whole.is_adapted
    source = aligned(whole, Inputs(stack, lambda file: file.path or Path()).source)
    out = torch.empty(3, WIDTH)
    source.read(0, out, Workspace(torch.device("cpu"), torch.float32))
    assert torch.allclose(out, (values + 0.5 * b @ a)[[6, 0, 1]], atol=1e-5)


def test_maps_are_told_apart() -> None:
    one, same, other = (
        place_of([(0, 1), [(0, 1), (1, 2)]]),
        place_of([(0, 1), [(0, 1), (1, 2)]]),
        place_of([(0, 1), None]),
    )
    assert one.digest == same.digest != other.digest
    assert place_of([(0, 1), [(0, 1), (1, 3)]]).digest != one.digest
    assert one.used == {0, 1}
    assert other.used == {0}
