"""Finished merges against what they were made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from doctor_models import ROWS, base_state, codes, family, only, save
from lora_folders import write_lora
from models import ARCHITECTURES, perturbed, recipe, save_family
from test_language import letters
from weldment import merge
from weldment.doctor import Diagnosis, diagnose
from weldment.errors import TaskError, UserError

Folders = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return family(tmp_path_factory.mktemp("two"))


def merged(out: Path, method: str, two: Folders, **keys: Any) -> Diagnosis:
    return diagnose(str(merge(recipe(method, *two[1], base=two[0], **keys), out).path))


def test_a_healthy_merge(two: Folders, tmp_path: Path) -> None:
    found = merged(tmp_path / "out", "task_arithmetic", two, parameters={"weight": 0.5})
    assert codes(found, "problem", "warning") == []
    made = found.merge
    assert made is not None
    assert (made.method, made.base) == ("task_arithmetic", 1)
    assert made.references == (str(tmp_path / "out"), str(two[0]), *map(str, two[1]))
    assert made.kept == {2: pytest.approx(0.5, abs=0.02), 3: pytest.approx(0.5, abs=0.02)}
    assert made.change[1] == pytest.approx(0.05 * 0.5**0.5, rel=0.1)
    assert made.groups["mlp"][0] == pytest.approx(made.groups["mlp"][2] * 0.5**0.5, rel=0.1)
    assert found.comparison is None
    assert found.advice is None


def test_tensors_of_one_parent_are_counted(two: Folders, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    found = merged(tmp_path / "out", "linear", two, take={name: str(two[1][0])})
    finding = only(found, "same-tensors")
    assert finding.evidence == {"parent": str(two[1][0]), "tensors": [name], "compared": 11}


def test_tensors_that_no_model_changed_are_said_once(tmp_path: Path) -> None:
    base, experts = family(tmp_path / "all")
    frozen = base_state()["model.norm.weight"]
    for number, expert in enumerate(experts, 1):
        save(expert, {**perturbed(base_state(), number, scale=0.05), "model.norm.weight": frozen})
    found = merged(tmp_path / "out", "task_arithmetic", (base, experts))
    assert only(found, "shared-tensors").evidence["tensors"] == ["model.norm.weight"]
    assert "same-tensors" not in codes(found)


def test_a_merge_that_did_nothing(two: Folders, tmp_path: Path) -> None:
    found = merged(tmp_path / "out", "task_arithmetic", two, parameters={"weight": 0.0})
    finding = only(found, "like-parent")
    assert finding.level == "warning"
    assert finding.evidence["parent"] == str(two[0])
    assert codes(found).count("expert-lost") == 2


def test_an_expert_of_which_nothing_is_left(two: Folders, tmp_path: Path) -> None:
    models = [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(two[1], (1.0, 0.02), strict=True)]
    path = merge(
        {"merge_method": "task_arithmetic", "base_model": str(two[0]), "models": models}, tmp_path / "out"
    ).path
    assert only(diagnose(str(path)), "expert-lost").text.endswith(f"change of {two[1][1]}")


def test_a_change_that_is_too_large(two: Folders, tmp_path: Path) -> None:
    found = merged(tmp_path / "out", "task_arithmetic", two, parameters={"lambda": 4.0})
    assert only(found, "excess-change").evidence["ratio"] > 2


@pytest.mark.parametrize("count", [2, 3])
def test_norms_that_collapsed(tmp_path: Path, count: int) -> None:
    models = [save(tmp_path / f"{n}", base_state(seed=n)) for n in range(count)]
    path = merge(recipe("linear", *models), tmp_path / "out").path
    finding = only(diagnose(str(path)), "collapsed-norm")
    assert finding.evidence["model.layers.1.mlp.up_proj.weight"] == pytest.approx(count**-0.5, abs=0.05)
    healthy = [save(tmp_path / f"h{n}", perturbed(base_state(), n, scale=0.05)) for n in range(3)]
    again = merge(recipe("linear", *healthy), tmp_path / "again").path
    assert "collapsed-norm" not in codes(diagnose(str(again)))


def test_parents_that_are_gone_are_said_and_the_rest_is_done(tmp_path: Path) -> None:
    base, experts = family(tmp_path)
    out = merge(recipe("task_arithmetic", *experts, base=base), tmp_path / "out").path
    shutil.rmtree(experts[1])
    found = diagnose(str(out))
    assert str(experts[1]) in only(found, "parents-gone").text
    assert found.merge is not None
    assert len(found.merge.references) == 3
    shutil.rmtree(base)
    shutil.rmtree(experts[0])
    alone = diagnose(str(out))
    assert alone.merge is not None
    assert alone.merge.references == (str(out),)
    assert not alone.has_problems


def test_slices_are_not_compared_by_name(two: Folders, tmp_path: Path) -> None:
    pieces = [{"sources": [{"model": str(path), "layer_range": [0, 2]}]} for path in two[1]]
    out = merge({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out").path
    found = diagnose(str(out))
    assert "slices" in codes(found)
    assert len(found.facts) == 1


def test_the_output_itself_is_examined(two: Folders, tmp_path: Path) -> None:
    out = merge(recipe("linear", *two[1]), tmp_path / "out").path
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": ROWS + 1}))
    assert only(diagnose(str(out)), "vocab-size").subject == str(out)


def test_merged_adapters(tmp_path: Path) -> None:
    base = save(tmp_path / "base", base_state())
    modules = {f"model.layers.{n}.self_attn.q_proj": (16, 16) for n in range(3)}
    named = {"base_model_name_or_path": str(base)}
    parents = [write_lora(tmp_path / f"{n}", modules=modules, seed=n, **named) for n in (1, 2)]
    out = merge({"merge_method": "linear", "models": [str(p) for p in parents], "rank": 4}, tmp_path / "out").path
    found = diagnose(str(out))
    assert found.merge is not None
    assert found.merge.references == (str(out), str(base), *map(str, parents))
    assert found.merge.kept == {2: pytest.approx(0.5, abs=0.1), 3: pytest.approx(0.5, abs=0.1)}
    assert not found.has_problems


def test_a_manifest_that_cannot_be_read(two: Folders, tmp_path: Path) -> None:
    out = merge(recipe("linear", *two[1]), tmp_path / "out").path
    (out / "weldment.json").write_text("{")
    with pytest.raises(UserError, match="the manifest cannot be read"):
        diagnose(str(out))


class TestPerplexity:
    @pytest.fixture(scope="class")
    @classmethod
    def writer(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("writer")
        made = save_family(ARCHITECTURES["llama"], folder)
        for path in made.all:
            letters(bos=False).save_pretrained(path)
        text = folder / "text.txt"
        text.write_text("the bee and the flower. " * 8)
        out = merge(recipe("linear", *made.experts, base=made.base), folder / "out").path
        return out, text

    def test_of_the_merge_and_its_parents(self, writer: tuple[Path, Path]) -> None:
        out, text = writer
        found = diagnose(str(out), text=str(text))
        assert [Path(name).name for name in found.scores] == ["out", "base", "expert-1", "expert-2"]
        assert all(10 < score.value < 1000 for score in found.scores.values())
        assert found.record()["perplexity"][str(out)]["metric"] == "perplexity"

    def test_without_the_extra(self, writer: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "transformers.utils", None)
        with pytest.raises(TaskError, match=r"weldment\[eval\]"):
            diagnose(str(writer[0]), text=str(writer[1]))

    def test_of_a_text_that_is_not_there(self, writer: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none\.txt"):
            diagnose(str(writer[0]), text=str(tmp_path / "none.txt"))


def test_the_change_is_that_of_plain_arithmetic(two: Folders, tmp_path: Path) -> None:
    found = merged(tmp_path / "out", "linear", two)
    start = base_state()
    one, other = (perturbed(start, n, scale=0.05) for n in (1, 2))
    mean = {name: (one[name] + other[name]) / 2 for name in start}
    whole = torch.cat([tensor.flatten() for tensor in mean.values()])
    apart = torch.cat([(mean[name] - one[name]).flatten() for name in start])
    assert found.merge is not None
    first = found.merge.references.index(str(two[1][0]))
    assert found.merge.change[first] == pytest.approx(float(apart.norm() / whole.norm()), rel=1e-3)
