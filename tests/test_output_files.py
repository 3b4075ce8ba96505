from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from folders import mounted
from weldment.checkpoint.layout import Slot, lay_out
from weldment.checkpoint.output_files import PAGE, OutputFiles
from weldment.engine.outputs import FileOutput
from weldment.engine.workspace import Workspace
from weldment.errors import MergeError


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def test_output_files_have_their_full_size_at_once(tmp_path: Path) -> None:
    layout = lay_out([("a", "F32", (2, 3)), ("b", "BF16", (4,))])
    (tmp_path / "model.safetensors").write_bytes(b"left by an earlier run" * 100)
    files = OutputFiles(tmp_path, layout)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert content.startswith(layout.files[0].header)
    assert len(content) == layout.files[0].size
    slot = layout.slots[1]
    files.write(slot.file, slot.offset, np.frombuffer(b"12345678", dtype=np.uint8))
    assert (tmp_path / "model.safetensors").read_bytes()[slot.offset :] == b"12345678"
    files.close()


def test_a_disk_that_fills_up_is_explained(disk: Path) -> None:
    layout = lay_out([("a", "F32", (1 << 20,))])
    files = OutputFiles(disk, layout)
    with pytest.raises(MergeError, match="the disk is full") as caught:
        files.write("model.safetensors", 0, np.zeros(4 << 20, dtype=np.uint8))
    files.close()
    assert caught.value.where == str(disk / "model.safetensors")


def place(size: int, skew: int, draw: np.random.Generator) -> np.ndarray:
    """Random bytes that begin `skew` bytes after a multiple of the page in memory."""
    raw = np.empty(size + 2 * PAGE, dtype=np.uint8)
    start = -raw.ctypes.data % PAGE + skew
    raw[start : start + size] = draw.integers(0, 256, size, dtype=np.uint8)
    return raw[start : start + size]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("offset", "size"), [(0, PAGE), (3, 5), (PAGE - 1, 2), (100, 3 * PAGE), (PAGE, 2 * PAGE + 1), (7 * PAGE - 5, PAGE)]
)
def test_any_bytes_at_any_place(tmp_path: Path, offset: int, size: int, aligned: bool) -> None:
    layout = lay_out([("a", "U8", (16 * PAGE,))])
    files = OutputFiles(tmp_path, layout)
    draw = np.random.default_rng(0)
    start = layout.slots[0].offset + offset
    data = place(size, start % PAGE if aligned else (start + 1) % PAGE, draw)
    files.write("model.safetensors", start, data)
    files.close()
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written[start : start + size] == data.tobytes()
    assert written[: len(layout.files[0].header)] == layout.files[0].header
    assert not any(written[len(layout.files[0].header) : start])
    assert not any(written[start + size :])


def test_a_disk_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems let a file be opened for direct writes and refuse the write."""
    layout = lay_out([("a", "U8", (16 * PAGE,))])
    files = OutputFiles(tmp_path, layout)
    buffered = files.descriptor("model.safetensors")
    write, refused = os.pwrite, []

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor != buffered:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    data = place(4 * PAGE, 0, np.random.default_rng(1))
    for start in (PAGE, 8 * PAGE):
        files.write("model.safetensors", start, data)
    files.close()
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written[PAGE : 5 * PAGE] == written[8 * PAGE : 12 * PAGE] == data.tobytes()
    assert refused == [PAGE], "it is asked once"


@pytest.mark.parametrize(
    ("before", "dtype", "pieces"),
    [
        (0, "BF16", [5, 3000, 1 << 18, 1 << 20, 7]),
        (1, "BF16", [1 << 18, 11, 1 << 19]),  # an odd address: two-byte numbers cannot lie as in the file
        (3 * PAGE + 8, "F32", [1 << 19, 1 << 19, 1]),
        (5, "U8", [1, PAGE, 2 * PAGE, 1 << 21, 3]),
    ],
)
def test_spans_put_every_piece_in_its_place(tmp_path: Path, before: int, dtype: str, pieces: list[int]) -> None:
    count = sum(pieces)
    layout = lay_out([("a", dtype, (count + 8,))])
    slot = layout.slots[0]
    slot = Slot(slot.name, slot.dtype, slot.shape, slot.file, slot.offset + before)
    draw = torch.Generator().manual_seed(0)
    workspace = Workspace(torch.device("cpu"), torch.float32)
    sent: list[torch.Tensor] = []
    files = OutputFiles(tmp_path, layout)
    os.ftruncate(files.descriptor(slot.file), layout.files[0].size + before)
    span = FileOutput(files, slot).span(0, workspace)
    for size in pieces:
        room = span.room(size)
        room.view(torch.uint8).random_(0, 256, generator=draw)
        sent.append(room.view(torch.uint8).clone())
        span.send()
    span.close()
    files.close()
    written = np.fromfile(tmp_path / slot.file, dtype=np.uint8)
    expected = torch.cat(sent).numpy()
    assert np.array_equal(written[slot.offset : slot.offset + expected.size], expected)
    assert not written[slot.offset + expected.size :].any()
