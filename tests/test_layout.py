"""Where every tensor of an output lies."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.checkpoint.headers import read_header
from weldment.checkpoint.layout import Layout, Spec, lay_out, shards, spec_bytes

SPECS = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.sampled_from(["F64", "F32", "BF16", "F16", "I64", "I8", "BOOL"]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda spec: spec[0],
)


def write(layout: Layout, folder: Path) -> None:
    for file in layout.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.header + bytes(file.size - len(file.header)))


@given(specs=SPECS, limit=st.integers(1, 400))
def test_every_tensor_has_a_place_of_its_own_and_alignment(specs: list[Spec], limit: int) -> None:
    layout = lay_out(specs, shard_bytes=limit)
    assert sorted((slot.name, slot.dtype, slot.shape) for slot in layout.slots) == sorted(specs)
    for file in layout.files:
        slots = sorted(
            (slot for slot in layout.slots if slot.file == file.name), key=lambda slot: (slot.offset, slot.nbytes)
        )
        position = len(file.header)
        for slot in slots:
            assert slot.offset == position
            assert slot.offset % ITEM_BYTES[slot.dtype] == 0
            position += slot.nbytes
        assert position == file.size


@given(specs=SPECS, limit=st.integers(1, 400))
def test_shards_keep_the_order_and_the_limit(specs: list[Spec], limit: int) -> None:
    groups = shards(specs, limit)
    assert [spec for group in groups for spec in group] == specs
    assert all(groups)
    for group in groups:
        assert len(group) == 1 or sum(map(spec_bytes, group)) <= limit
    for group, following in itertools.pairwise(groups):
        assert sum(map(spec_bytes, group)) + spec_bytes(following[0]) > limit


def test_files_are_read_by_safetensors(tmp_path: Path) -> None:
    specs: list[Spec] = [("b", "BF16", (3,)), ("a", "F64", (2, 2)), ("ä\n", "I8", ()), ("empty", "F32", (0, 4))]
    write(lay_out(specs), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(name for name, _, _ in specs)
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("a").shape == (2, 2)
        assert file.get_tensor("empty").shape == (0, 4)
    assert read_header(tmp_path / "model.safetensors").tensors["b"].shape == (3,)


def test_one_file_needs_no_index() -> None:
    layout = lay_out([("a", "F32", (2,))], extra={"heads/x.safetensors": [("h", "F32", (1,))]})
    assert [file.name for file in layout.files] == ["model.safetensors", "heads/x.safetensors"]
    assert layout.index() is None


def test_index_names_every_tensor_of_the_model_and_its_bytes() -> None:
    specs: list[Spec] = [("b", "F32", (2,)), ("a", "BF16", (2,)), ("c", "F32", (3,))]
    layout = lay_out(specs, shard_bytes=12, extra={"heads/x.safetensors": [("h", "F32", (1,))]})
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert [file.name for file in layout.files] == [*names, "heads/x.safetensors"]
    index = layout.index()
    assert index == {
        "metadata": {"total_size": 24},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
    }
    assert json.dumps(index)


def test_a_tensor_that_exceeds_the_limit_stands_alone() -> None:
    layout = lay_out([("a", "F32", (1,)), ("b", "F32", (9,)), ("c", "F32", (1,))], shard_bytes=8)
    assert [slot.file[6:11] for slot in layout.slots] == ["00001", "00002", "00003"]


def test_layout_depends_on_nothing_but_its_arguments() -> None:
    specs: list[Spec] = [(f"t{n}", dtype, (n,)) for n, dtype in enumerate(["F32", "BF16", "F64"] * 4)]
    assert lay_out(specs, shard_bytes=64) == lay_out(list(specs), shard_bytes=64)
