"""`weldment.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

import models
from weldment import MergeResult, UserError, __version__, merge, plan
from weldment.report.manifest import file_digest, inputs, ledger, read_manifest, recipes


@pytest.fixture
def merged(tmp_path: Path) -> MergeResult:
    base, *experts = (models.save_decoder(tmp_path / f"m{seed}", seed=seed) for seed in range(3))
    soup = {"name": "soup", **models.recipe("linear", *experts)}
    return merge(
        [soup, models.recipe("ties", Path("soup"), base=base, drop=["*.norm.weight"], seed=4)], tmp_path / "out"
    )


def test_manifest_says_how_the_output_was_made(merged: MergeResult, tmp_path: Path) -> None:
    found = read_manifest(tmp_path / "out")
    assert found["format"] == 1
    assert found["versions"] == {"weldment": __version__, "torch": torch.__version__, "numpy": numpy.__version__}
    assert found["plan"] == merged.plan.hash
    assert found["seed"] == 4
    assert found["recipe"] == recipes(merged.plan)
    assert plan(found["recipe"]).hash == merged.plan.hash
    assert found["tensors"] == dict(merged.checksums)
    assert found["tensors"].keys() == {f"|{name}" for name in models.read_state(tmp_path / "out")}


def test_manifest_has_the_size_of_every_input_file(merged: MergeResult, tmp_path: Path) -> None:
    found = read_manifest(tmp_path / "out")["inputs"]
    assert found.keys() == {str(tmp_path / f"m{seed}") for seed in range(3)}
    for model, record in found.items():
        size = (Path(model) / "model.safetensors").stat().st_size
        assert record == {"files": [{"name": "model.safetensors", "size": size}]}


def test_manifest_has_revision_and_sha256_where_they_are_known(merged: MergeResult) -> None:
    reference, model = next(item for item in merged.plan.models.items() if item[1].weight_files)
    (file,) = model.weight_files
    known = replace(model, revision="c" * 40, weight_files=(replace(file, sha256="d" * 64),))
    record = inputs(replace(merged.plan, models={reference: known}, stages=()))[reference]
    assert record == {"revision": "c" * 40, "files": [{"name": file.name, "size": file.size, "sha256": "d" * 64}]}


def test_manifest_accounts_for_every_tensor_of_every_model(merged: MergeResult, tmp_path: Path) -> None:
    found = read_manifest(tmp_path / "out")["ledger"]
    assert found == ledger(merged.plan)
    assert found.keys() == {str(tmp_path / "m0"), "soup", f"soup/{tmp_path / 'm1'}", f"soup/{tmp_path / 'm2'}"}
    names = models.read_state(tmp_path / "m0").keys()
    for fates in found.values():
        assert sorted(name for tensors in fates.values() for name in tensors) == sorted(names)
    assert found["soup"]["dropped"] == {"model.norm.weight": "the recipe drops *.norm.weight"}
    assert found[f"soup/{tmp_path / 'm1'}"]["dropped"] == {
        "model.norm.weight": "no later merge reads what it goes into"
    }


def test_manifest_has_the_digest_of_every_other_file(merged: MergeResult, tmp_path: Path) -> None:
    found = read_manifest(tmp_path / "out")["files"]
    assert found.keys() == {path.name for path in (tmp_path / "out").iterdir()} - {"weldment.json"}
    whole = hashlib.sha256((tmp_path / "out" / "README.md").read_bytes()).hexdigest()
    assert found["README.md"] == whole == file_digest(tmp_path / "out" / "README.md")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    assert found["model.safetensors"] == hashlib.sha256(weights[:header]).hexdigest()
    assert merged.plan.layout.files[0].header == weights[:header]


def test_digest_of_the_beginning_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20) + b"abc")
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file_digest(path, 3) == hashlib.sha256(b"xxx").hexdigest()
    assert file_digest(path, 0) == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"tensors": []}', '{"tensors": {}}', "\ud800".encode("utf-8", "surrogatepass")]
)
def test_file_that_is_no_manifest(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "weldment.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"weldment\.json"):
        read_manifest(tmp_path)


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weldment\.json here.*`weld merge` wrote"):
        read_manifest(tmp_path)


def test_manifest_is_json_with_text_as_it_is(merged: MergeResult, tmp_path: Path) -> None:
    text = (tmp_path / "out" / "weldment.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert json.loads(text) == read_manifest(tmp_path / "out")
