"""What is given to a diagnosis: models, adapters, bases, and what is wrong with that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from doctor_models import TOKENS, base_state, save
from lora_folders import write_lora
from models import perturbed
from weldment.checkpoint.opening import open_checkpoint
from weldment.doctor import diagnose
from weldment.doctor.cases import compare_tensors, joints_of, open_cases
from weldment.doctor.tokens import Tokens
from weldment.errors import CheckpointError, UserError

MODULES = {"model.layers.0.self_attn.q_proj": (16, 16)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("cases") / "base", base_state())


def test_a_model_given_twice(base: Path) -> None:
    with pytest.raises(UserError, match="given twice"):
        open_cases([str(base), f"{base}/../base"], None)
    with pytest.raises(UserError, match="also given as --base"):
        open_cases([str(base)], f"{base}/")


def test_all_models_that_cannot_be_opened_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="2 problems") as error:
        open_cases([str(tmp_path / "none"), str(base), str(tmp_path / "text.txt")], None)
    assert "is not a file of weights" in str(error.value)


def test_no_model_and_no_workers(base: Path) -> None:
    with pytest.raises(UserError, match="no model"):
        diagnose([])
    with pytest.raises(UserError, match="threads"):
        diagnose(str(base), threads=0)


def test_an_adapter_alone_is_its_base_with_it(base: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", modules=MODULES, base_model_name_or_path=str(base))
    cases = open_cases([str(adapter)], None)
    assert cases.base
    assert cases.given == (str(base), str(adapter))
    assert cases.models[1].reference == f"{base}+{adapter}"
    assert list(cases.experts) == [1]


def test_a_base_for_adapters_that_name_another_one(base: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", modules=MODULES, base_model_name_or_path="gone/away")
    assert open_cases([str(adapter)], str(base)).models[1].reference == f"{base}+{adapter}"
    with pytest.raises(CheckpointError, match="gone"):
        open_cases([str(adapter)], None)


def test_an_adapter_that_names_no_base(base: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", modules=MODULES, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"does not say what its base is.*--base MODEL"):
        open_cases([str(adapter)], None)


def test_adapters_of_different_bases_have_no_common_one(base: Path, tmp_path: Path) -> None:
    second = save(tmp_path / "second", perturbed(base_state(), 1))
    adapters = [
        write_lora(tmp_path / f"lora{n}", modules=MODULES, base_model_name_or_path=str(path))
        for n, path in enumerate((base, second))
    ]
    assert not open_cases([str(adapter) for adapter in adapters], None).base


def test_names_with_another_prefix_are_matched(base: Path, tmp_path: Path) -> None:
    state = {f"wrapped.{name}": tensor for name, tensor in base_state().items()}
    cases = open_cases([str(save(tmp_path / "wrapped", state))], str(base))
    assert cases.tensors[1].keys() == cases.tensors[0].keys()


class TestOtherTensors:
    def other(self, base: Path, path: Path, state: dict[str, torch.Tensor]) -> list[str]:
        cases = open_cases([str(save(path, state))], str(base))
        return [finding.text for finding in compare_tensors(cases)]

    def test_equal_names_and_shapes_heads_and_rows_are_no_matter(self, base: Path, tmp_path: Path) -> None:
        heads = {"lm_head.weight": torch.ones(24, 16), "classifier.weight": torch.ones(2, 16)}
        assert self.other(base, tmp_path / "m", {**base_state(rows=30), **heads}) == []

    def test_are_named(self, base: Path, tmp_path: Path) -> None:
        state = {**base_state(), "gate": torch.ones(3), "model.layers.2.mlp.up_proj.weight": torch.ones(16, 32)}
        del state["model.norm.weight"]
        (text,) = self.other(base, tmp_path / "m", state)
        assert "1 only here (gate)" in text
        assert f"1 only in {base} (model.norm.weight)" in text
        assert "1 of another shape (model.layers.2.mlp.up_proj.weight)" in text


class TestJoints:
    def joints(self, folder: Path, *states: dict[str, torch.Tensor], words: list[list[str]] | None = None):
        opened = [open_checkpoint(str(save(folder / str(n), state))).tensors for n, state in enumerate(states)]
        tokens = [Tokens({t: n for n, t in enumerate(own)}, {}, {}) for own in words or []]
        return joints_of(opened, tokens or [None] * len(states))

    def test_of_other_shapes_stand_alone(self, tmp_path: Path) -> None:
        other = {**base_state(), "model.norm.weight": torch.ones(5)}
        found = [j for j in self.joints(tmp_path, base_state(), other) if j.name == "model.norm.weight"]
        assert [list(joint.entries) for joint in found] == [[0], [1]]

    def test_of_more_rows_are_compared_as_far_as_both_have_them(self, tmp_path: Path) -> None:
        found = self.joints(tmp_path, base_state(), base_state(rows=30))
        (rows,) = [joint for joint in found if joint.group == "embeddings"]
        assert (list(rows.entries), rows.numel) == ([0, 1], 24 * 16)

    def test_of_other_tokens_stand_alone(self, tmp_path: Path) -> None:
        found = self.joints(tmp_path, *[base_state()] * 3, words=[TOKENS, TOKENS, TOKENS[::-1]])
        assert [list(joint.entries) for joint in found if joint.group == "embeddings"] == [[0, 1], [2]]
