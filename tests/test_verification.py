"""`weld verify` finds whatever was changed after the merge."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import weld, write_model, write_recipe
from weldment import UserError, VerificationError, verify
from weldment.checkpoint.headers import read_header

TENSOR = "model.layers.1.mlp.up_proj.weight"
HEADS = {
    "merge_method": "linear",
    "models": [{"model": "a"}, {"model": "b"}],
    "heads": ["classifier.*"],
}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge in two shards, with a head for each expert and a side file."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        folder = write_model(tmp_path / name, seed)
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "classifier.weight": torch.ones(seed + 2, 8)}, folder / "model.safetensors")
        (folder / "tokenizer.json").write_text("{}")
    result = weld("merge", write_recipe(tmp_path / "r.yml", HEADS), "out", "--shard-size", "1500B")
    assert result.code == 0, result
    return tmp_path / "out"


def place(out: Path, tensor: str) -> tuple[Path, int]:
    """The file and the byte where a tensor begins."""
    name = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][tensor]
    header = read_header(out / name)
    return out / name, header.data_start + header.tensors[tensor].start


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def append_tensor(out: Path) -> None:
    path, _ = place(out, TENSOR)
    save_file({**load_file(path), "extra": torch.zeros(2)}, path, metadata={"format": "pt"})


def test_an_output_is_what_was_written(out: Path) -> None:
    found = verify(out)
    assert (found.tensors, found.problems) == (12, ())
    assert found.nbytes == sum(p.stat().st_size - read_header(p).data_start for p in out.rglob("*.safetensors"))
    assert verify(out, threads=1) == found


@pytest.mark.parametrize("offset", [0, 1, 17, 8 * 24 * 2 - 1])
def test_any_flipped_byte_names_its_tensor(out: Path, offset: int) -> None:
    path, start = place(out, TENSOR)
    flip(path, start + offset)
    with pytest.raises(VerificationError, match="1 difference") as caught:
        verify(out)
    assert f"tensor {TENSOR} in {path.name} was changed" in str(caught.value)


CHANGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "config": (lambda out: (out / "config.json").write_text("{}"), ("file config.json was changed",)),
    "README": (lambda out: (out / "README.md").open("a").write("x"), ("file README.md was changed",)),
    "side file": (lambda out: (out / "tokenizer.json").write_text("{ }"), ("file tokenizer.json was changed",)),
    "missing file": (lambda out: (out / "tokenizer.json").unlink(), ("file tokenizer.json is missing",)),
    "index": (
        lambda out: (out / "model.safetensors.index.json").write_text("{}"),
        ("file model.safetensors.index.json was changed",),
    ),
    "header": (lambda out: flip(place(out, TENSOR)[0], 12), ("file model-0000",)),
    "metadata": (
        lambda out: place(out, TENSOR)[0].write_bytes(place(out, TENSOR)[0].read_bytes().replace(b'"pt"', b'"pf"')),
        ("the header of model-0000", "was changed"),
    ),
    "extra tensor": (append_tensor, ("the header of model-0000", "tensor extra is not in the manifest")),
    "truncated": (
        lambda out: os.truncate(place(out, TENSOR)[0], place(out, TENSOR)[0].stat().st_size - 1),
        ("truncated", "tensors are missing with that, such as"),
    ),
    "empty": (lambda out: os.truncate(place(out, TENSOR)[0], 0), ("not a safetensors file", "are missing with that")),
    "missing shard": (
        lambda out: place(out, TENSOR)[0].unlink(),
        ("file model-0000", "is missing", "tensors are missing with that"),
    ),
    "extra weights": (
        lambda out: (out / "model.safetensors").write_bytes(b""),
        ("file model.safetensors is not in the manifest",),
    ),
    "head": (
        lambda out: save_file({"classifier.weight": torch.zeros(2, 8)}, out / "heads/a.safetensors"),
        ("tensor classifier.weight in heads/a.safetensors was changed",),
    ),
    "missing head": (lambda out: (out / "heads/b.safetensors").unlink(), ("file heads/b.safetensors is missing",)),
    "a folder for a file": (
        lambda out: ((out / "tokenizer.json").unlink(), (out / "tokenizer.json").mkdir()),
        ("file tokenizer.json cannot be read",),
    ),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_found_and_named(out: Path, change: Callable[[Path], object], words: tuple[str, ...]) -> None:
    change(out)
    result = weld("verify", "out")
    assert (result.code, result.out) == (1, "")
    for word in words:
        assert word in result.err, result.err
    as_json = weld("verify", "out", "--json")
    listed = json.loads(as_json.out)
    assert listed["ok"] is False
    (line,) = as_json.err.splitlines()
    assert re.fullmatch(r"error: out: \d+ differences? from what was written", line)
    assert all(problem in result.err for problem in listed["problems"])


def test_other_files_may_be_added(out: Path) -> None:
    """What a publishing user adds: pictures, Git's files, quantised variants in folders of their own."""
    (out / ".gitattributes").touch()
    (out / "onnx").mkdir()
    (out / "onnx/model.onnx").touch()
    assert verify(out).problems == ()


def test_all_changes_are_listed_at_once_and_many_are_cut(out: Path) -> None:
    manifest = json.loads((out / "weldment.json").read_text())
    manifest["tensors"] |= {f"|tensor.{number}": "0" for number in range(60)}
    (out / "weldment.json").write_text(json.dumps(manifest))
    (out / "config.json").unlink()
    with pytest.raises(VerificationError, match="61 differences") as caught:
        verify(out)
    assert "file config.json is missing" in str(caught.value)
    assert "and 11 more" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"tensors": {}}', '{"tensors": {}, "files": {"a": 1}}'])
def test_a_manifest_that_is_none_is_the_users_mistake(out: Path, content: str) -> None:
    (out / "weldment.json").write_text(content)
    with pytest.raises(UserError, match="manifest"):
        verify(out)


def test_other_folders_are_refused(out: Path) -> None:
    for folder, words in (("a", "there is no weldment.json here"), ("nowhere", "there is no such folder")):
        result = weld("verify", folder)
        assert (result.code, result.out) == (2, "")
        assert f"error: {folder}: {words}" in result.err
        assert "fix: Give a folder that `weld merge` wrote" in result.err
    with pytest.raises(UserError, match="at least 1"):
        verify(out, threads=0)
