"""What is advised, and why; every recipe that is given is merged here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from doctor_models import TOKENS, base_state, codes, family, save, tokenizer
from lora_folders import write_lora
from models import perturbed, read_state, save_state
from weldment import merge
from weldment.doctor import Diagnosis, diagnose
from weldment.doctor import advice as advising
from weldment.doctor.advice import Advice

Folders = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return family(tmp_path_factory.mktemp("three"), 3)


def against(base: Path | None, *models: Path) -> Diagnosis:
    return diagnose([str(model) for model in models], base=None if base is None else str(base))


def advised(base: Path | None, *models: Path) -> Advice:
    found = against(base, *models).advice
    assert found is not None
    return found


def pasted(advice: Advice, folder: Path) -> dict[str, torch.Tensor]:
    """The text of a recipe, saved as a file and merged."""
    recipe = folder / "recipe.yml"
    recipe.write_text(advice.text)
    assert yaml.safe_load(advice.text) == advice.recipe
    return read_state(merge(recipe, folder / "out").path)


def test_small_matrices_are_decomposed(three: Folders, tmp_path: Path) -> None:
    advice = advised(three[0], *three[1])
    assert advice.method == "swudi"
    assert advice.recipe["base_model"] == str(three[0])
    assert "16 wide" in advice.reasons[0]
    merged = pasted(advice, tmp_path)
    assert merged.keys() == base_state().keys()
    found = diagnose(str(tmp_path / "out"))
    assert codes(found, "problem", "warning") == []


def test_of_large_ones_several_vote_and_two_are_added(
    three: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advising, "SMALL", 8)
    several = advised(three[0], *three[1])
    assert (several.method, several.recipe["parameters"]["density"]) == ("ties", 0.2)
    two = advised(three[0], *three[1][:2])
    assert two.method == "task_arithmetic"
    weights = [model["parameters"]["weight"] for model in two.recipe["models"]]
    assert weights == pytest.approx([2**-0.5] * 2, abs=0.03)
    base, merged = base_state(), pasted(two, tmp_path)
    lengths = [
        sum(float((state[n] - base[n]).square().sum()) for n in base) ** 0.5
        for state in (merged, read_state(three[1][0]))
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1), "the sum is as large as one of them"
    (tmp_path / "several").mkdir()
    assert pasted(several, tmp_path / "several")


def test_without_a_base_two_models_lie_on_an_arc_and_more_are_averaged(three: Folders, tmp_path: Path) -> None:
    two = advised(None, *three[1][:2])
    assert (two.method, two.recipe["parameters"]) == ("slerp", {"t": 0.5})
    assert pasted(two, tmp_path)
    assert advised(None, *three[1]).method == "linear"


def test_runs_of_one_training_are_averaged(tmp_path: Path) -> None:
    state = base_state()
    common = perturbed(state, 1, scale=0.05)
    runs = [save(tmp_path / f"run{n}", perturbed(common, n, scale=0.02)) for n in (2, 3)]
    advice = advised(save(tmp_path / "base", state), *runs)
    assert advice.method == "linear"
    assert "point the same way" in advice.reasons[0]
    assert pasted(advice, tmp_path)


def test_changes_that_undo_each_other_are_voted_on(tmp_path: Path) -> None:
    state = base_state()
    common = perturbed(state, 1, scale=0.05)
    back = {name: 2 * state[name] - tensor for name, tensor in common.items()}
    models = [save(tmp_path / f"m{n}", perturbed(own, n, scale=0.02)) for n, own in enumerate((common, back))]
    advice = advised(save(tmp_path / "base", state), *models)
    assert advice.method == "ties"
    assert "undo each other" in advice.reasons[0]
    assert pasted(advice, tmp_path)


def test_much_larger_changes_get_smaller_weights(tmp_path: Path) -> None:
    state = base_state()
    models = [save(tmp_path / f"{s}", perturbed(state, n, scale=s)) for n, s in enumerate((0.01, 0.16))]
    advice = advised(save(tmp_path / "base", state), *models)
    small, large = (model["parameters"]["weight"] for model in advice.recipe["models"])
    assert small == 1.0
    assert large == pytest.approx(0.25, rel=0.1)


def test_what_cannot_be_merged_is_left_out(three: Folders, tmp_path: Path) -> None:
    other = save(tmp_path / "other", base_state(seed=9))
    state = perturbed(base_state(), 8)
    state["model.norm.weight"][0] = torch.nan
    broken = save(tmp_path / "broken", state)
    same = save(tmp_path / "same", base_state())
    twin = save(tmp_path / "twin", read_state(three[1][0]))
    advice = advised(three[0], *three[1][:2], other, broken, same, twin)
    assert [model["model"] for model in advice.recipe["models"]] == [str(model) for model in three[1][:2]]
    assert sum("left out" in reason for reason in advice.reasons) == 4
    assert against(three[0], three[1][0], broken).advice is None


class TestHeads:
    @staticmethod
    def classifier(path: Path, seed: int, labels: int, names: str = "x") -> Path:
        state: dict[str, Any] = perturbed(base_state(), seed, scale=0.05)
        state["classifier.weight"] = torch.randn(labels, 16, generator=torch.Generator().manual_seed(seed))
        state["classifier.bias"] = torch.zeros(labels)
        return save(path, state, id2label={str(n): f"{names}{n}" for n in range(labels)})

    def test_of_different_sizes_are_kept_apart(self, three: Folders, tmp_path: Path) -> None:
        models = [self.classifier(tmp_path / f"c{n}", n, n) for n in (2, 3)]
        advice = advised(three[0], *models)
        assert advice.recipe["heads"] == ["classifier*"]
        merged = pasted(advice, tmp_path)
        assert not any(name.startswith("classifier") for name in merged)
        assert sorted(path.name for path in (tmp_path / "out" / "heads").glob("*.safetensors")) == [
            "c2.safetensors",
            "c3.safetensors",
        ]

    def test_of_one_size_for_other_labels_too(self, tmp_path: Path) -> None:
        models = [self.classifier(tmp_path / name, n, 2, name) for n, name in enumerate("ab")]
        assert advised(None, *models).recipe["heads"] == ["classifier*"]

    def test_of_one_task_are_merged(self, tmp_path: Path) -> None:
        models = [self.classifier(tmp_path / name, n, 2) for n, name in enumerate("ab")]
        assert "heads" not in advised(None, *models).recipe

    def test_what_only_the_base_has_is_dropped(self, three: Folders, tmp_path: Path) -> None:
        base = save(tmp_path / "base", {**base_state(), "pooler.weight": torch.ones(3, 3)})
        advice = advised(base, *three[1])
        assert advice.recipe["drop"] == ["pooler.weight"]
        assert "pooler.weight" not in pasted(advice, tmp_path)


def test_other_vocabularies_ask_for_their_union(three: Folders, tmp_path: Path) -> None:
    more = save(tmp_path / "more", perturbed(base_state(), 5), tokens=[*TOKENS, "new"])
    assert advised(three[0], three[1][0], more).recipe["tokenizer"] == {"source": "union"}


def test_a_recipe_that_the_planner_refuses_is_a_problem_and_not_given(three: Folders, tmp_path: Path) -> None:
    state = perturbed(base_state(), 7)
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(8, 16)
    found = against(three[0], three[1][0], save(tmp_path / "odd", state))
    assert found.advice is None
    (finding,) = [finding for finding in found.findings if finding.code == "not-mergeable"]
    assert "model.layers.1.mlp.up_proj.weight" in finding.text


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("adapters")
    base = save(folder / "base", base_state())
    modules = {f"model.layers.{n}.self_attn.q_proj": (16, 16) for n in range(3)}
    named = {"base_model_name_or_path": str(base)}
    return base, [write_lora(folder / f"lora{n}", modules=modules, seed=n, **named) for n in (1, 2)]


class TestAdapters:
    def test_merge_to_an_adapter_and_say_their_base_themselves(self, adapters: Folders, tmp_path: Path) -> None:
        found = against(None, *adapters[1])
        assert found.comparison is not None
        assert found.comparison.name(0) == str(adapters[0])
        assert {"low-rank", "unchanged-tensors"} & set(codes(found)) == set()
        assert found.advice is not None
        assert found.advice.method == "task_arithmetic"
        assert "base_model" not in found.advice.recipe
        assert any("lora_A" in name for name in pasted(found.advice, tmp_path))

    def test_with_tokens_of_their_own_get_a_recipe_for_adapters(self, adapters: Folders, tmp_path: Path) -> None:
        """Merges of adapters to an adapter take no `tokenizer`."""
        more = shutil.copytree(adapters[1][1], tmp_path / "more")
        (more / "tokenizer.json").write_text(tokenizer([*TOKENS, "new"]))
        found = against(None, adapters[1][0], more)
        assert "not-mergeable" not in codes(found)
        assert found.advice is not None
        assert "tokenizer" not in found.advice.recipe
        assert any("lora_A" in name for name in pasted(found.advice, tmp_path))

    def test_on_a_base_are_models(self, adapters: Folders, tmp_path: Path) -> None:
        names = [f"{adapters[0]}+{adapter}" for adapter in adapters[1]]
        found = diagnose(names)
        assert found.comparison is not None
        assert found.comparison.base == 0
        assert found.comparison.groups["attention"].relative(1) > 0.0
        assert found.comparison.groups["mlp"].relative(1) == 0.0
        assert found.advice is not None
        assert pasted(found.advice, tmp_path).keys() == base_state().keys()

    def test_among_full_models_are_written_with_their_base(self, adapters: Folders, tmp_path: Path) -> None:
        full = save(tmp_path / "full", perturbed(base_state(), 1, scale=0.3))
        advice = advised(adapters[0], adapters[1][0], full)
        assert advice.recipe["models"][0]["model"] == f"{adapters[0]}+{adapters[1][0]}"
        assert pasted(advice, tmp_path)


def test_an_unknown_dtype_of_nothing_is_left_out(tmp_path: Path) -> None:
    models = [save_state(tmp_path / name, base_state(seed=0)) for name in "a"]
    assert against(None, *models).advice is None
