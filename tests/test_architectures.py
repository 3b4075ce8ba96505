"""Real models of many families: merged, loaded back, run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
from models import ARCHITECTURES, Architecture, Family
from weldment import merge, plan

NAMES = sorted(ARCHITECTURES)


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Architecture, Family]:
    architecture = ARCHITECTURES[request.param]
    return architecture, models.save_family(architecture, tmp_path_factory.mktemp(request.param))


def test_linear_is_the_average_of_the_state_dicts_and_loads(case: tuple[Architecture, Family], tmp_path: Path) -> None:
    architecture, family = case
    merge(models.recipe("linear", *family.experts), tmp_path / "out")
    expected = models.average(*map(models.read_state, family.experts))
    models.assert_same(models.read_state(tmp_path / "out"), expected)

    merged = models.loaded(architecture, tmp_path / "out")
    first, second = (models.loaded(architecture, expert) for expert in family.experts)
    with torch.no_grad():
        for own, other in zip(first.parameters(), second.parameters(), strict=True):
            own.copy_((own + other) / 2)
    torch.testing.assert_close(
        models.outputs(architecture, merged), models.outputs(architecture, first), rtol=1e-4, atol=1e-5
    )


def test_ties_with_a_base_loads_and_runs(case: tuple[Architecture, Family], tmp_path: Path) -> None:
    architecture, family = case
    recipe = models.recipe("ties", *family.experts, base=family.base, parameters={"density": 0.5, "weight": 0.5})
    merge(recipe, tmp_path / "out")
    merged = models.loaded(architecture, tmp_path / "out")
    found = models.outputs(architecture, merged)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, models.outputs(architecture, models.loaded(architecture, family.base)))
    assert models.read_state(tmp_path / "out").keys() == models.read_state(family.base).keys()


def test_every_tensor_of_every_model_is_merged(case: tuple[Architecture, Family]) -> None:
    _, family = case
    planned = plan(models.recipe("task_arithmetic", *family.experts, base=family.base, parameters={"weight": 0.5}))
    assert planned.counts() == {"merged": sum(len(models.read_state(model)) for model in family.all)}
    assert planned.notes == ()
    assert planned.config == models.read_config(family.base)


def _newer_llava(name: str) -> str:
    """The names of a LLaVA as newer versions of transformers hold them in memory."""
    name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
    return f"model.{name}" if name.startswith(("vision_tower", "multi_modal")) else name


RENAMES: dict[str, Callable[[str], str]] = {
    "llava": _newer_llava,
    "gpt2": lambda name: name.removeprefix("transformer."),
    "bert": lambda name: name.removeprefix("bert."),
    "llama": lambda name: f"language_model.{name}",
}


@pytest.mark.parametrize("name", RENAMES)
def test_experts_under_other_prefixes_merge_as_if_they_had_the_names_of_the_base(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    family = models.save_family(architecture, tmp_path)
    recipe = models.recipe("task_arithmetic", *family.experts, base=family.base, parameters={"weight": 0.5})
    merge(recipe, tmp_path / "expected")
    renamed = {RENAMES[name](key): tensor for key, tensor in models.read_state(family.experts[0]).items()}
    assert renamed.keys() != models.read_state(family.base).keys()
    models.save_state(family.experts[0], renamed)
    result = merge(recipe, tmp_path / "out")
    models.assert_same(models.read_state(tmp_path / "out"), models.read_state(tmp_path / "expected"), exact=True)
    models.loaded(architecture, tmp_path / "out")
    assert any("matched" in note for note in result.plan.notes)


def test_bfloat16_rounds_once(tmp_path: Path) -> None:
    family = models.save_family(ARCHITECTURES["llama"], tmp_path, torch.bfloat16)
    recipe = models.recipe("task_arithmetic", *family.experts, base=family.base, parameters={"weight": 0.3})
    merge(recipe, tmp_path / "out")
    base, first, second = (models.read_state(model) for model in family.all)
    found = models.read_state(tmp_path / "out")
    for name, tensor in base.items():
        start = tensor.double()
        exact = start + 0.3 * (first[name].double() - start) + 0.3 * (second[name].double() - start)
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].double(), exact, rtol=2**-8, atol=1e-7)
    assert models.loaded(ARCHITECTURES["llama"], tmp_path / "out").dtype == torch.bfloat16
    assert models.read_config(tmp_path / "out")["dtype"] == "bfloat16"
