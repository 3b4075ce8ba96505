"""Torch checkpoints: every tensor is found where torch put it, and nothing of the file is trusted."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weldment.checkpoint.dtypes import TORCH, torch_dtype
from weldment.checkpoint.pickles import PickleEntry, read_pickle
from weldment.errors import CheckpointError


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def loaded(path: Path, entry: PickleEntry) -> torch.Tensor:
    """The tensor, read from where the entry says it lies."""
    dtype = torch_dtype(entry.dtype)
    count = torch.Size(entry.shape).numel()
    raw = bytearray(path.read_bytes()[entry.offset : entry.offset + count * dtype.itemsize])
    return (torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)).view(entry.shape)


def assert_found(path: Path, expected: dict[str, torch.Tensor]) -> None:
    entries = read_pickle(path)
    assert set(entries) == set(expected)
    for name, entry in entries.items():
        assert entry.name == name
        assert torch.equal(loaded(path, entry), expected[name])
        assert loaded(path, entry).dtype == expected[name].dtype


@pytest.mark.parametrize("dtype", [torch_dtype(name) for name in TORCH], ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "b": torch.tensor(1).to(dtype)}
    assert_found(saved(tmp_path / "m.pt", tensors), tensors)


def test_views_shared_storages_parameters_and_empty_tensors(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": whole,
        "tied": whole,
        "rows": whole[1:3],
        "flat": whole.view(-1)[5:],
        "column of one": whole[2:3, 3:4],
        "stretched": torch.as_strided(whole, (1, 6), (999, 1), 6),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "empty": torch.zeros(0, 3).t(),
    }
    assert_found(saved(tmp_path / "m.pt", tensors), tensors)


def test_a_module_state_dict(tmp_path: Path) -> None:
    """It is an OrderedDict with attributes of its own."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    assert_found(saved(tmp_path / "pytorch_model.bin", model.state_dict()), model.state_dict())


def test_dtypes_without_a_storage_class_of_their_own(tmp_path: Path) -> None:
    tensors = {"u": torch.zeros(3, dtype=torch.uint16), "f": torch.zeros(4, dtype=torch.float8_e4m3fn)}
    entries = read_pickle(saved(tmp_path / "m.pt", tensors))
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "u": ("U16", (3,)),
        "f": ("F8_E4M3", (4,)),
    }


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_a_training_checkpoint_gives_its_model(tmp_path: Path, wrapper: str) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    content = {wrapper: model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "note": None}
    assert_found(saved(tmp_path / "m.pth", content), dict(model.state_dict()))


def test_values_that_are_no_tensors_are_not_weights(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2)}
    assert_found(
        saved(tmp_path / "m.pt", {**tensors, "step": 3, "name": "x", "lr": [0.1], "sizes": torch.Size([2])}), tensors
    )


class Payload:
    """What an attacker would pickle: a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_code_in_the_pickle_is_refused_and_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = saved(tmp_path / "m.pt", {"w": torch.ones(2), "x": Payload(f"touch {marker}")})
    with pytest.raises(CheckpointError, match=r"m.pt: its pickle asks for (posix|nt).system, .*save_file"):
        read_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch.storage._load_from_bytes", "a.b.c"]
)
def test_a_name_that_is_not_listed_is_refused(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    path = archive(tmp_path / "m.pt", b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b".")
    with pytest.raises(CheckpointError, match=f"its pickle asks for {name}"):
        read_pickle(path)


def archive(path: Path, description: bytes, members: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    """A zip archive like torch's, with this pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", description)
        for name, data in (members or {}).items():
            file.writestr(name, data)
    return path


CONTENT: list[tuple[str, Callable[[], Any], str]] = [
    ("transposed", lambda: {"w": torch.ones(2, 3).t()}, "tensor 'w': is not stored row by row"),
    ("every second element", lambda: {"w": torch.ones(6)[::2]}, "tensor 'w': is not stored row by row"),
    ("expanded", lambda: {"w": torch.ones(1).expand(4)}, "tensor 'w': is not stored row by row"),
    ("conjugate view", lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()}, "tensor 'w': is not stored"),
    ("sparse", lambda: {"w": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
    ("whole module", lambda: torch.nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
    ("single tensor", lambda: torch.ones(2), "does not hold a state dict"),
    ("list", lambda: [torch.ones(2)], "does not hold a state dict"),
    ("no tensors", lambda: {"epoch": 1}, r"holds no state dict, but the keys \['epoch'\]"),
    (
        "two state dicts",
        lambda: {"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.ones(2)}},
        "several state dicts",
    ),
    ("hidden tensors", lambda: {"w": torch.ones(2), "more": [{"v": torch.ones(2)}]}, "'more' holds tensors of its own"),
    ("number as a name", lambda: {1: torch.ones(2)}, "has the key 1"),
]


@pytest.mark.parametrize(("content", "text"), [c[1:] for c in CONTENT], ids=[c[0] for c in CONTENT])
def test_what_is_no_plain_state_dict_is_refused(tmp_path: Path, content: Callable[[], Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        read_pickle(saved(tmp_path / "m.pt", content()))
    assert caught.value.fix
    assert str(tmp_path / "m.pt") in str(caught.value)


def test_a_value_that_contains_itself(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    path = saved(tmp_path / "m.pt", {"w": torch.ones(2), "loop": loop})
    assert set(read_pickle(path)) == {"w"}


def test_the_legacy_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch's legacy format.*torch.load.*save_file"):
        read_pickle(path)


def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", pickle.dumps({}, 2), {"archive/constants.pkl": b""})
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_pickle(path)


def repacked(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """A good checkpoint with its members changed; None drops one."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(64)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", compression) as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return path


@pytest.mark.parametrize(
    ("member", "data", "text"),
    [
        ("byteorder", b"big", "big-endian"),
        ("data.pkl", None, "without data.pkl"),
        ("data.pkl", b"", "its pickle is damaged"),
        ("data.pkl", b"\x80\x02]q\x00.", "does not hold a state dict"),
        ("data/0", None, "tensor 'w': its storage '0' is missing"),
        ("data/0", b"\0" * 255, "tensor 'w': lies beyond the end of its storage"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, member: str, data: bytes | None, text: str) -> None:
    path = repacked(tmp_path / "m.pt", lambda name, old: data if name == member else old)
    with pytest.raises(CheckpointError, match=text):
        read_pickle(path)


def test_an_archive_without_a_byte_order_is_of_an_older_torch_and_little_endian(tmp_path: Path) -> None:
    path = repacked(tmp_path / "m.pt", lambda name, old: None if name == "byteorder" else old)
    assert_found(path, {"w": torch.ones(64)})


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = repacked(tmp_path / "m.pt", lambda _, old: old, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"data.pkl is compressed.*save_file"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a torch checkpoint"),
        (b"hello", "not a torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"PK\x03\x04 and nothing else", "zip archive is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        read_pickle(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_pickle(tmp_path / "absent.pt")


def good_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": OrderedDict(a=torch.ones(2, 3), b=torch.nn.Parameter(torch.ones(4))), "n": 1}, buffer)
    with zipfile.ZipFile(buffer) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def good_archive() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2, 3)}, buffer)
    return buffer.getvalue()


GOOD_PICKLE, GOOD_ARCHIVE = good_pickle(), good_archive()


def changes(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with one to three short runs of bytes replaced."""
    change = st.tuples(st.integers(0, len(content)), st.integers(0, 3), st.binary(max_size=3))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        changed = bytearray(content)
        for at, removed, added in edits:
            changed[at : at + removed] = added
        return bytes(changed)

    return st.lists(change, min_size=1, max_size=3).map(apply)


def check_safe(path: Path) -> None:
    """Entries within the file, or a CheckpointError."""
    size = path.stat().st_size
    try:
        entries = read_pickle(path)
    except CheckpointError:
        return
    for entry in entries.values():
        assert 0 < entry.offset <= size


@given(changes(GOOD_PICKLE) | st.binary(max_size=40).map(lambda tail: b"\x80\x02" + tail))
def test_no_pickle_causes_anything_but_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, description: bytes
) -> None:
    storages = {f"archive/data/{key}": b"\0" * 32 for key in range(2)}
    check_safe(archive(tmp_path_factory.getbasetemp() / "fuzzed.pt", description, storages))


@given(changes(GOOD_ARCHIVE))
def test_no_archive_causes_anything_but_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    check_safe(path)


def test_the_place_of_data_comes_from_the_local_header(tmp_path: Path) -> None:
    """Its extra field differs from the directory's; padding moves the data and nothing else."""
    tensors = {"w": torch.arange(5.0)}
    path = saved(tmp_path / "m.pt", tensors)
    with zipfile.ZipFile(path) as file:
        info = next(info for info in file.infolist() if info.filename.endswith("data/0"))
    local = struct.unpack("<HH", path.read_bytes()[info.header_offset + 26 : info.header_offset + 30])
    assert len(info.extra) != local[1]
    assert_found(path, tensors)
