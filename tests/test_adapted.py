"""Tensors that adapters change, read in pieces: against dense algebra in float64, and against themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weldment.checkpoint.compare import same_bytes
from weldment.checkpoint.model import Added, LowRank, TensorEntry
from weldment.checkpoint.opening import open_checkpoint
from weldment.engine import products, tiles, workspace
from weldment.engine.adapted import AdaptedSource, adapted
from weldment.engine.sources import FileSource, read_all
from weldment.engine.tiles import Matrices
from weldment.engine.workspace import Workspace

E, R, OUT, IN = 3, 2, 13, 10


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "w": (OUT, IN), "turned": (IN, OUT), "conv": (OUT, 5, 2), "stack": (E, OUT, IN), "turned_stack": (E, IN, OUT),
        "expert": (OUT - 4, IN), "a": (R, IN), "b": (OUT, R), "conv_a": (R, 5, 2), "conv_b": (OUT, R, 1),
        "stack_a": (E * R, IN), "stack_b": (OUT, R * E), "m": (OUT,), "bias": (OUT,), "more": (OUT,),
    }  # fmt: skip
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["stack_b"] = made["stack_b"].bfloat16()
    save_file(made, tmp_path / "model.safetensors")
    return {name: value.double() for name, value in made.items()}


@pytest.fixture
def entries(tmp_path: Path, stored: dict[str, Tensor]) -> dict[str, TensorEntry]:
    return dict(open_checkpoint(str(tmp_path / "model.safetensors")).tensors)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of several rows, panels of several tiles, and more of both than one."""
    monkeypatch.setattr(tiles, "TILE", 31)
    monkeypatch.setattr(products, "PANEL", 14)


def changed(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """A tensor of each kind."""
    low = LowRank(entries["a"], entries["b"], 0.3)
    stack = LowRank(entries["stack_a"], entries["stack_b"], 0.7, experts=E)
    conv = LowRank(entries["conv_a"], entries["conv_b"], 2.0)
    changes = {
        "rows": ("w", low), "columns": ("turned", replace(low, transposed=True)), "conv": ("conv", conv),
        "stack": ("stack", stack), "turned_stack": ("turned_stack", replace(stack, transposed=True)),
        "expert": ("expert", replace(stack, expert=1, row=4)),
        "dora": ("w", replace(low, magnitude=entries["m"])),
        "dora_conv": ("conv", replace(conv, magnitude=entries["m"])),
        "dora_columns": ("turned", replace(low, transposed=True, magnitude=entries["m"])),
        "bias": ("bias", Added(entries["more"], 0.3)),
    }  # fmt: skip
    found = {kind: replace(entries[name], changes=(change,)) for kind, (name, change) in changes.items()}
    twice = replace(entries["w"], changes=(low, replace(low, scale=-1.7)))
    return {**found, "twice": twice}


def dense(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by formula."""
    w, product = stored["w"], stored["b"] @ stored["a"]
    conv = stored["conv"] + 2 * (stored["conv_b"][..., 0] @ stored["conv_a"].view(R, 10)).view(OUT, 5, 2)
    each = [stored["stack_b"][:, e::E] @ stored["stack_a"][e * R : e * R + R] for e in range(E)]
    stack = 0.7 * torch.stack(each)
    whole = w + 0.3 * product
    turned = stored["turned"] + 0.3 * product.T
    lengths = stored["m"]
    return {
        "rows": whole, "columns": turned, "conv": conv,
        "stack": stored["stack"] + stack, "turned_stack": stored["turned_stack"] + stack.transpose(1, 2),
        "expert": stored["expert"] + stack[1, 4:],
        "dora": whole * (lengths / whole.norm(dim=1))[:, None],
        "dora_conv": conv * (lengths / conv.flatten(1).norm(dim=1))[:, None, None],
        "dora_columns": turned * (lengths / turned.norm(dim=0)),
        "bias": stored["bias"] + 0.3 * stored["more"], "twice": w - 1.4 * product,
    }  # fmt: skip


@pytest.fixture
def opened(tmp_path: Path, entries: dict[str, TensorEntry]) -> Iterator[dict[str, AdaptedSource]]:
    path = tmp_path / "model.safetensors"
    descriptor = os.open(path, os.O_RDONLY)

    def find(entry: TensorEntry) -> FileSource:
        return FileSource(descriptor, path, entry.name, entry.dtype, entry.offset)

    yield {kind: adapted(find(entry), entry, find) for kind, entry in changed(entries).items()}
    os.close(descriptor)


KINDS = [
    "rows", "columns", "conv", "stack", "turned_stack", "expert", "dora", "dora_conv", "dora_columns", "bias", "twice",
]  # fmt: skip


def in_float32() -> Workspace:
    return Workspace(torch.device("cpu"), torch.float32)


def read(source: AdaptedSource, start: int, count: int, space: Workspace) -> Tensor:
    out = torch.empty(count, dtype=space.dtype)
    source.read(start, out, space)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_formula_says(opened: dict[str, AdaptedSource], stored: dict[str, Tensor], kind: str) -> None:
    expected = dense(stored)[kind].flatten()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        found = read(opened[kind], 0, expected.numel(), Workspace(torch.device("cpu"), dtype))
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_parts_of_the_whole(
    opened: dict[str, AdaptedSource], stored: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, kind: str, kept: int
) -> None:
    """Bit by bit, wherever they begin and end, and whatever is remembered."""
    monkeypatch.setattr(workspace, "KEPT_BYTES", kept)
    numel = dense(stored)[kind].numel()
    whole = read(opened[kind], 0, numel, in_float32())
    space = in_float32()
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        start, stop = sorted(torch.randint(0, numel + 1, (2,), generator=generator).tolist())
        if start < stop:
            assert torch.equal(read(opened[kind], start, stop - start, space), whole[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_raw_elements_are_rounded_to_the_stored_dtype(opened: dict[str, AdaptedSource], kind: str) -> None:
    source = opened[kind]
    found = source.raw(3, (2, 4), in_float32())
    assert found.shape == (2, 4)
    assert torch.equal(found.flatten(), read(source, 3, 8, in_float32()))
    narrow = replace(source, stored=replace(source.stored, dtype="BF16"))
    assert narrow.raw(0, (4,), in_float32()).dtype == torch.bfloat16


def test_reading_several_at_once(opened: dict[str, AdaptedSource]) -> None:
    """Adapted tensors and stored ones together."""
    sources = [opened["rows"], opened["rows"].stored, opened["dora"]]
    out = torch.empty(3, 17)
    read_all(sources, 5, out, in_float32())
    for row, source in zip(out, sources, strict=True):
        expected = torch.empty(17)
        source.read(5, expected, in_float32())
        assert torch.equal(row, expected)


def test_bytes_that_are_read_count_the_changes(entries: dict[str, TensorEntry]) -> None:
    found = {kind: entry.read_bytes - entry.nbytes for kind, entry in changed(entries).items()}
    low, stack = 4 * R * (IN + OUT), 4 * E * R * IN + 2 * E * R * OUT
    assert (found["rows"], found["dora"], found["twice"]) == (low, low + 4 * OUT, 2 * low)
    assert (found["stack"], found["expert"], found["bias"]) == (stack, stack // E, 4 * OUT)


def test_tensors_with_other_changes_hold_other_bytes(entries: dict[str, TensorEntry]) -> None:
    found = changed(entries)
    assert same_bytes(found["rows"], found["rows"]) is True
    assert same_bytes(found["rows"], replace(found["rows"], name="copy")) is True
    assert same_bytes(found["rows"], entries["w"]) is False
    assert same_bytes(found["rows"], found["dora"]) is False


@pytest.mark.parametrize(
    "matrices", [Matrices(1, 13, 10), Matrices(3, 13, 10), Matrices(2, 1, 50), Matrices(1, 100, 1)]
)
def test_tiles_depend_on_the_shape_alone(matrices: Matrices) -> None:
    """Together they are the tensor, and those of a part are some of them."""
    numel = matrices.count * matrices.rows * matrices.columns
    whole = list(matrices.tiles(0, numel))
    assert [tile.start for tile in whole] == [sum(tile.numel for tile in whole[:n]) for n in range(len(whole))]
    assert sum(tile.numel for tile in whole) == numel
    assert all(math.prod(tile.shape) <= max(31, matrices.columns) for tile in whole)
    for start in range(0, numel, 7):
        for stop in range(start + 1, numel + 1, 11):
            wanted = [tile for tile in whole if tile.start < stop and tile.start + tile.numel > start]
            assert list(matrices.tiles(start, stop)) == wanted


def test_a_workspace_forgets_what_was_not_asked_for_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "KEPT_BYTES", 3 * 8)
    space, made = in_float32(), []

    def ask(name: str, count: int = 2) -> None:
        space.kept(name, lambda: made.append(name) or torch.empty(count))

    for name in "abcab":
        ask(name)
    assert made == ["a", "b", "c"]
    ask("d")  # forgets c
    ask("a")
    ask("c")
    assert made == ["a", "b", "c", "d", "c"]
    ask("large", 100)  # forgets all others, and is kept nevertheless
    ask("large", 100)
    ask("a")
    ask("large", 100)
    assert made[5:] == ["large", "a", "large"]
