"""Safetensors headers: what the reference implementation writes is read, what breaks a rule is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from weldment.checkpoint.dtypes import ITEM_BYTES, TORCH, torch_dtype
from weldment.checkpoint.headers import HEADER_LIMIT, header_length, parse_header, read_header
from weldment.errors import CheckpointError

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(min_size=1, max_size=8)


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def encode(content: Any) -> bytes:
    return json.dumps(content).encode()


def parse(content: Any, data_bytes: int | None = 24) -> Any:
    return parse_header(encode(content), data_bytes, "m.safetensors")


def write(path: Path, content: Any, data: bytes = b"\0" * 24) -> Path:
    raw = encode(content)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH)), shapes), min_size=1), st.dictionaries(names, names)
)
def test_reads_what_the_reference_implementation_writes(
    specs: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    tensors = {name: torch.ones(shape, dtype=torch_dtype(dtype)) for name, (dtype, shape) in specs.items()}
    file = save(tensors, metadata)
    length = header_length(file, len(file), "f")
    header = parse_header(file[8 : 8 + length], len(file) - 8 - length, "f")
    assert {name: (e.dtype, e.shape) for name, e in header.tensors.items()} == specs
    assert header.metadata == metadata
    for name, fields in deserialize(file):
        found = header.tensors[name]
        assert file[header.data_start + found.start : header.data_start + found.end] == bytes(fields["data"])


def test_reads_a_file_without_its_data(tmp_path: Path) -> None:
    """A sparse file of 4 GiB takes no time and no memory."""
    size = 1 << 32
    raw = encode({"w": entry("U8", [size], [0, size])})
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + size)
    assert read_header(path).tensors["w"].end == size


RULES: list[tuple[str, Any, int, str]] = [
    ("unknown dtype", {"w": entry("F4")}, 24, "dtype 'F4' is not one of"),
    ("dtype is no text", {"w": entry(["F32"])}, 24, "dtype"),
    ("negative size", {"w": entry(shape=[-2, -3])}, 24, "shape"),
    ("fractional size", {"w": entry(shape=[2.0, 3])}, 24, "shape"),
    ("true as a size", {"w": entry(shape=[True, 6])}, 24, "shape"),
    ("size beyond 63 bits", {"w": entry(shape=[1 << 70, 0], offsets=[0, 0])}, 0, "shape"),
    ("shape is no list", {"w": entry(shape=6)}, 24, "shape"),
    ("size is not dtype times shape", {"w": entry(offsets=[0, 20])}, 20, "20 bytes do not hold F32 of shape"),
    ("offsets are turned around", {"w": entry(offsets=[24, 0])}, 24, "are not"),
    ("three offsets", {"w": entry(offsets=[0, 24, 24])}, 24, "are not"),
    ("negative offset", {"w": entry(offsets=[-24, 0])}, 24, "data_offsets"),
    ("missing key", {"w": {"dtype": "F32", "shape": [6]}}, 24, "exactly the keys"),
    ("unknown key", {"w": {**entry(), "x": 1}}, 24, "exactly the keys"),
    ("entry is no object", {"w": 3}, 24, "exactly the keys"),
    ("overlap", {"v": entry(), "w": entry(offsets=[20, 44])}, 44, "overlap those of 'v'"),
    ("same bytes twice", {"v": entry(), "w": entry()}, 24, "overlap those of 'v'"),
    ("gap", {"v": entry(), "w": entry(offsets=[28, 52])}, 52, "bytes 24 to 28 before its data belong to no tensor"),
    ("gap at the start", {"w": entry(offsets=[4, 28])}, 28, "bytes 0 to 4"),
    ("truncated", {"v": entry(), "w": entry(offsets=[24, 48])}, 47, "truncated"),
    ("half a character", {"w\ud800": entry()}, 24, "not Unicode"),
]


@pytest.mark.parametrize(("content", "data_bytes", "text"), [r[1:] for r in RULES], ids=[r[0] for r in RULES])
def test_a_broken_rule_names_file_and_tensor(content: Any, data_bytes: int, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        parse(content, data_bytes)
    assert caught.value.where is not None
    assert caught.value.where.startswith("m.safetensors: tensor 'w")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"w": 1, "w": 2}', "names 'w' twice"),
        (b'{"w": {"dtype": "F32", "dtype": "F16"}}', "names 'dtype' twice"),
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"__metadata__": {"a": 1}}', "not a mapping from text to text"),
        (b'{"__metadata__": []}', "not a mapping from text to text"),
        (b'{"__metadata__": {"a": "\\ud800"}}', "not a mapping from text to text"),
        (b"{}", "24 bytes after the last tensor"),
    ],
)
def test_a_broken_header_names_the_file(raw: bytes, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        parse_header(raw, 24, "m.safetensors")
    assert caught.value.where == "m.safetensors"


def test_bytes_after_the_last_tensor_are_refused_only_if_the_size_is_known() -> None:
    with pytest.raises(CheckpointError, match="1 bytes after the last tensor"):
        parse({"w": entry()}, 25)
    assert parse({"w": entry()}, None).tensors["w"].shape == (2, 3)


def test_an_empty_tensor_shares_a_place_with_its_neighbour() -> None:
    header = parse({"e": entry(shape=[0, 3], offsets=[24, 24]), "w": entry(), "d": entry(shape=[0], offsets=[0, 0])})
    assert set(header.tensors) == {"d", "e", "w"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it has only 0 bytes"),
        (b"1234567", "it has only 7 bytes"),
        ((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}", "the limit is"),
        ((99).to_bytes(8, "little") + b"{}", "truncated: its header has 99 bytes, the whole file has 10"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        read_header(path)
    assert caught.value.where == str(path)


def test_a_file_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"v": entry(), "w": entry(offsets=[24, 48])}, b"\0" * 40)
    with pytest.raises(CheckpointError, match=r"m.safetensors: tensor 'w': the file is truncated"):
        read_header(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: cannot be read"):
            read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
sizes = st.integers(-1, 5) | st.integers() | json_values
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*ITEM_BYTES, "F4", ""]), "shape": st.lists(sizes, max_size=3) | json_values},
    optional={"data_offsets": st.lists(sizes, max_size=3) | json_values, "other": json_values},
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | names, entries | json_values, max_size=4)


@given(st.binary() | headers.map(encode), st.none() | st.integers(0, 100))
def test_no_header_causes_anything_but_a_checkpoint_error(raw: bytes, data_bytes: int | None) -> None:
    try:
        header = parse_header(raw, data_bytes, "f")
    except CheckpointError:
        return
    for found in header.tensors.values():
        assert found.end - found.start == math.prod(found.shape) * ITEM_BYTES[found.dtype]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A good file of two tensors with a few bytes changed, removed or added."""
    file = bytearray(save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"k": "v"}))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(file)))
        file[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(file)


@given(damaged_files())
def test_a_damaged_file_is_accepted_only_if_the_reference_implementation_accepts_it(file: bytes) -> None:
    try:
        length = header_length(file[:32], len(file), "f")
        header = parse_header(file[8 : 8 + length], len(file) - 8 - length, "f")
    except CheckpointError:
        return
    try:
        reference = dict(deserialize(file))
    except SafetensorError as error:
        pytest.fail(f"accepted, but the reference implementation says {error}")
    assert {name: (e.dtype, list(e.shape)) for name, e in header.tensors.items()} == {
        name: (fields["dtype"], fields["shape"]) for name, fields in reference.items()
    }
