"""A folder is known to be a whole bundle, or it is said what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weldment.errors import CheckpointError
from weldment.twin.bundle import expert_part, read_bundle, write_twin_json

EXPERT = {"name": "one", "reference": "models/one", "adapter": True, "changes": False, "head": True, "nbytes": 9}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The files of one expert, and what says so."""
    folder = tmp_path / "experts" / "one"
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "head.safetensors", "head.json"):
        (folder / name).write_text(name)
    (tmp_path / "README.md").write_text("may change")
    record = {**EXPERT, "labels": ["no", "yes"], "kept": 0.5, "problem_type": None}
    write_twin_json(tmp_path, shared={"class": "BertModel"}, exclusive={"kind": "svd"}, experts=[record])
    return tmp_path


def test_what_was_written_is_read(bundle: Path) -> None:
    found = read_bundle(bundle)
    (part,) = found.experts
    assert (part.name, part.labels, part.kept, part.changes) == ("one", ("no", "yes"), 0.5, None)
    assert part.adapter == bundle / "experts" / "one"
    assert part.head == bundle / "experts" / "one" / "head.safetensors"
    assert found.router == bundle / "router"
    assert found.shared == {"class": "BertModel"}


def test_the_card_may_change(bundle: Path) -> None:
    (bundle / "README.md").write_text("changed")
    assert read_bundle(bundle).names == ("one",)


def test_digests_are_compared_unless_asked_not_to(bundle: Path) -> None:
    path = bundle / "experts" / "one" / "head.json"
    path.write_text("HEAD.json")
    assert read_bundle(bundle, check=False).names == ("one",)
    with pytest.raises(CheckpointError, match="SHA-256 is not the one"):
        read_bundle(bundle)
    path.write_text("longer than it was")
    with pytest.raises(CheckpointError, match="it has 18 bytes"):
        read_bundle(bundle, check=False)


def test_a_folder_without_twin_json_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this is no Twin bundle"):
        read_bundle(tmp_path)
    with pytest.raises(CheckpointError, match="this is no Twin bundle"):
        read_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, and this version reads format 1"),
        ({"experts": [{"name": "one"}]}, "not the description"),
        ({"experts": [{**EXPERT, "name": "../../etc"}]}, "not the description"),
        ({"experts": [{**EXPERT, "changes": True}]}, "not the description"),
        ({"files": {"../secret": {"size": 1, "sha256": ""}}}, "not the description"),
        ({"files": None}, "not the description"),
    ],
)
def test_descriptions_that_are_none_are_refused(bundle: Path, change: dict[str, Any], message: str) -> None:
    path = bundle / "twin.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        read_bundle(bundle)


def test_text_that_is_no_json_is_refused(bundle: Path) -> None:
    (bundle / "twin.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_bundle(bundle)


def test_what_an_expert_has_not_is_none(tmp_path: Path) -> None:
    part = expert_part(tmp_path, "one", {**EXPERT, "adapter": False, "head": False})
    assert part.adapter is part.head is part.head_config is part.labels is None
