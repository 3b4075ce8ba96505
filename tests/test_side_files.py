"""Files beside the weights, and comparing tensors in files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models
from weldment.checkpoint.compare import same_bytes
from weldment.checkpoint.local import open_folder
from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.side_files import copy_side_files, is_tokenizer_file, write_json


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("tokenizer_config.json", True),
        ("vocab.json", True),
        ("vocab.txt", True),
        ("merges.txt", True),
        ("special_tokens_map.json", True),
        ("added_tokens.json", True),
        ("spiece.model", True),
        ("sentencepiece.bpe.model", True),
        ("qwen.tiktoken", True),
        ("chat_template.jinja", True),
        ("chat_template.json", True),
        ("chat_templates/tool_use.jinja", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("generation_config.json", False),
        ("preprocessor_config.json", False),
        ("tokenization_own.py", False),
        ("1_Pooling/config.json", False),
        ("module/tokenizer.json", False),
    ],
)
def test_files_of_a_tokenizer(name: str, expected: bool) -> None:
    assert is_tokenizer_file(name) is expected


def test_one_model_gives_everything_if_it_is_both(tmp_path: Path) -> None:
    model = open_folder(models.save_decoder(tmp_path / "a"), "a")
    files = {"tokenizer.json": "t", "nested/deep/file.txt": "d"}
    for name, text in files.items():
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(text)
    copy_side_files(tmp_path / "out", replace(model, side_files=tuple(files)), replace(model, side_files=tuple(files)))
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files


def test_links_are_followed(tmp_path: Path) -> None:
    """The Hub's cache consists of links."""
    (tmp_path / "blob").write_text("content")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.json").symlink_to(tmp_path / "blob")
    model = Checkpoint("a", {}, (), root=tmp_path / "a", side_files=("tokenizer.json",))
    copy_side_files(tmp_path / "out", model, model)
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "content"


def test_json_is_written_as_it_is_meant(tmp_path: Path) -> None:
    content = {"name": "é", "list": [1, 2], "nested": {"a": None}}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "é" in text
    assert text.endswith("}\n")


def test_tensors_are_compared_byte_by_byte(tmp_path: Path) -> None:
    values = torch.randn(70, 3)
    other = values.clone()
    other[69, 2] += 1
    state = {
        "a": values,
        "same": values.clone(),
        "other": other,
        "shape": values.clone().reshape(3, 70),
        "dtype": values.clone().view(torch.int32),
    }
    found = open_folder(models.save_state(tmp_path / "m", state), "m").tensors
    assert same_bytes(found["a"], found["a"]) is True
    assert same_bytes(found["a"], found["same"]) is True
    assert same_bytes(found["a"], found["other"]) is False
    assert same_bytes(found["a"], found["shape"]) is False
    assert same_bytes(found["a"], found["dtype"]) is False


def test_what_is_not_here_cannot_be_compared(tmp_path: Path) -> None:
    found = open_folder(models.save_state(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)}), "m").tensors
    remote = replace(found["b"], file=replace(found["b"].file, path=None))
    assert same_bytes(found["a"], remote) is None
    assert same_bytes(remote, remote) is True


def test_large_tensors_are_compared_to_their_ends(tmp_path: Path) -> None:
    values = torch.zeros((1 << 24) + 5, dtype=torch.int8)
    other = values.clone()
    other[-1] = 1
    found = open_folder(models.save_state(tmp_path / "m", {"a": values, "b": values.clone(), "c": other}), "m").tensors
    assert same_bytes(found["a"], found["b"]) is True
    assert same_bytes(found["a"], found["c"]) is False
