"""The model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import models
from weldment import plan
from weldment.checkpoint.local import open_folder
from weldment.planning.plan import Plan
from weldment.planning.stages import plan_merges
from weldment.recipe import load_recipes
from weldment.report.card import model_card, parents


def metadata(card: str) -> dict[str, Any]:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def recipe_in(card: str) -> list[Any]:
    return list(yaml.safe_load_all(card.partition("```yaml\n")[2].partition("\n```")[0]))


def hub_plan(tmp_path: Path, documents: Any, repos: dict[str, str]) -> Plan:
    """A plan of models that came from the Hub; `repos` names the repo of each reference."""
    opened = {}
    for seed, (reference, repo) in enumerate(repos.items()):
        folder = models.save_decoder(tmp_path / str(seed), seed=seed)
        opened[reference] = open_folder(folder, reference, repo=repo or None, revision="c" * 40 if repo else None)
    return plan_merges(load_recipes(documents), opened)


def test_lineage_names_hub_models_only(tmp_path: Path) -> None:
    document = models.recipe("ties", Path("org/one@v2"), Path("local"), base=Path("org/base"))
    planned = hub_plan(tmp_path, document, {"org/one@v2": "org/one", "local": "", "org/base": "org/base"})
    card = model_card(planned)
    found = metadata(card)
    assert sorted(found["base_model"]) == ["org/base", "org/one"]
    assert found["base_model_relation"] == "merge"
    assert found["library_name"] == "transformers"
    assert found["tags"] == ["weldment", "merge", "ties"]
    assert "[org/one@v2](https://huggingface.co/org/one)" in card
    assert "- `local`" in card
    assert "arxiv.org/abs/2306.01708" in card


def test_models_on_this_machine_are_no_lineage_whatever_their_config_says(tmp_path: Path) -> None:
    inputs = [models.save_decoder(tmp_path / name, _name_or_path="org/name") for name in "ab"]
    card = model_card(plan(models.recipe("linear", *inputs)))
    assert "base_model" not in metadata(card)
    assert "huggingface.co" not in card


def test_models_of_intermediate_merges_are_lineage_and_the_merges_are_not(tmp_path: Path) -> None:
    soup = {"name": "soup", **models.recipe("linear", Path("org/a"), Path("org/b"))}
    documents = [soup, models.recipe("linear", Path("soup"), Path("org/c"))]
    planned = hub_plan(tmp_path, documents, {f"org/{name}": f"org/{name}" for name in "abc"})
    assert sorted(metadata(model_card(planned))["base_model"]) == ["org/a", "org/b", "org/c"]
    assert len(parents(planned)) == 3
    assert recipe_in(model_card(planned)) == documents


def test_recipe_in_the_card_makes_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = [models.save_decoder(Path(name)) for name in "ab"]
    recipe = models.recipe("linear", *inputs, parameters={"weight": [0.1, {"a": 1}["a"]]})
    planned = plan(recipe)
    (written,) = recipe_in(model_card(planned))
    assert plan(written).hash == planned.hash
    assert planned.hash[:16] in model_card(planned)


def test_paths_of_this_machine_are_shown_by_their_last_part(tmp_path: Path) -> None:
    inputs = [models.save_decoder(tmp_path / name) for name in ("mathematics", "poetry")]
    card = model_card(plan(models.recipe("linear", *inputs)))
    assert "- `mathematics`\n- `poetry`" in card
    assert recipe_in(card) == [models.recipe("linear", Path("mathematics"), Path("poetry"))]
    assert str(tmp_path) not in card


def test_paths_are_shortened_wherever_the_recipe_names_a_model(tmp_path: Path) -> None:
    base, one, two = (models.save_decoder(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "a", "b")))
    for model in (base, one, two):
        (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}')
    sources = [{"model": {"path": f"{model}/"}, "layer_range": [0, 2]} for model in (one, two)]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "slices": [{"sources": sources}],
        "input_model_parameters": {str(one): {"weight": [{"filter": str(tmp_path), "value": 0.5}, {"value": 1}]}},
        "tokenizer_source": f"model:{two}",
    }
    planned = plan(recipe)
    (written,) = recipe_in(model_card(planned))
    assert written["base_model"] == "base"
    assert [source["model"] for source in written["slices"][0]["sources"]] == [{"path": "a"}, {"path": "b"}]
    assert list(written["input_model_parameters"]) == ["a"]
    assert written["tokenizer_source"] == "b"
    assert planned.recipe.source == recipe


@pytest.mark.parametrize(
    ("files", "config", "library"),
    [
        ({}, {"model_type": "x"}, "transformers"),
        ({"modules.json": "[]"}, {"model_type": "x"}, "sentence-transformers"),
        ({}, {"anything": 1}, None),
    ],
)
def test_library(files: dict[str, str], config: dict[str, Any], library: str | None, tmp_path: Path) -> None:
    inputs = [models.save_state(tmp_path / name, models.decoder_state(), config, **files) for name in "ab"]
    assert metadata(model_card(plan(models.recipe("linear", *inputs)))).get("library_name") == library


def test_title_is_the_name_of_the_merge_or_of_what_it_started_from(tmp_path: Path) -> None:
    inputs = [models.save_decoder(tmp_path / name) for name in ("first", "second")]
    recipe = models.recipe("linear", *inputs)
    assert "\n# first, merged by linear\n" in model_card(plan(recipe))
    assert "\n# blend\n" in model_card(plan({**recipe, "name": "blend"}))
