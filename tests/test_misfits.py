"""Models that do not fit together: one clear problem for each cause, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models import ARCHITECTURES, State
from weldment import PlanError, merge, plan


def complaint(recipe: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as error:
        plan(recipe)
    return str(error.value)


def backbone(**more: torch.Tensor) -> State:
    names = {f"body.layers.{n}.fc.weight": torch.ones(2, 2) for n in range(3)}
    return {**names, "body.norm.weight": torch.ones(2), **more}


def advised(message: str, key: str) -> Any:
    """The value that the message suggests for a key."""
    return json.loads(message.partition(f"`{key}: ")[2].partition("`")[0])


def test_heads_of_different_shapes_are_one_problem_whose_advice_works(tmp_path: Path) -> None:
    experts = [
        models.save_state(
            tmp_path / f"e{rows}",
            backbone(**{"classifier.weight": torch.ones(rows, 2), "classifier.bias": torch.ones(rows)}),
        )
        for rows in (3, 5, 7)
    ]
    recipe = models.recipe("linear", *experts)
    message = complaint(recipe)
    assert "problems" not in message
    assert "2 tensors ('classifier.bias', 'classifier.weight'): [3] in" in message
    assert all(f"[{rows}] in {expert}" in message for rows, expert in zip((3, 5, 7), experts, strict=True))
    merge({**recipe, "heads": advised(message, "heads")}, tmp_path / "out")
    assert len(list((tmp_path / "out" / "heads").iterdir())) == 3


def test_heads_that_only_some_models_have(tmp_path: Path) -> None:
    plain = [models.save_state(tmp_path / name, backbone()) for name in ("base", "a", "b")]
    extra = models.save_state(
        tmp_path / "c", backbone(**{"score.weight": torch.ones(1, 2), "body.pooler.dense.weight": torch.ones(2, 2)})
    )
    recipe = models.recipe("ties", *plain[1:], extra, base=plain[0])
    message = complaint(recipe)
    assert "problems" not in message
    assert f"only in {extra}" in message
    assert advised(message, "heads") == ["body.pooler.*", "score.*"]
    merge({**recipe, "heads": advised(message, "heads")}, tmp_path / "out")


def test_tensor_that_one_model_lacks(tmp_path: Path) -> None:
    whole = [models.save_state(tmp_path / name, backbone()) for name in ("a", "b")]
    state = backbone()
    del state["body.norm.weight"]
    lacking = models.save_state(tmp_path / "c", state)
    message = complaint(models.recipe("linear", *whole, lacking))
    assert f"tensor 'body.norm.weight': missing from {lacking}" in message


def test_tensors_of_layers_are_not_taken_for_heads(tmp_path: Path) -> None:
    first = models.save_state(tmp_path / "a", backbone(**{"body.layers.1.q_norm.weight": torch.ones(2)}))
    second = models.save_state(tmp_path / "b", backbone())
    recipe = models.recipe("linear", first, second)
    message = complaint(recipe)
    assert "heads" not in message
    merge({**recipe, "drop": advised(message, "drop")}, tmp_path / "out")


def test_different_vocabularies(tmp_path: Path) -> None:
    first = models.save_decoder(tmp_path / "a", tied=False)
    second = models.save_decoder(tmp_path / "b", tied=False, rows=14, seed=1)
    recipe = models.recipe("linear", first, second)
    message = complaint(recipe)
    assert "different vocabularies: 2 tensors ('lm_head.weight', 'model.embed_tokens.weight')" in message
    assert f"[12, 4] in {first}, [14, 4] in {second}" in message
    merge({**recipe, "take": advised(message, "take")}, tmp_path / "out")
    assert models.read_state(tmp_path / "out")["lm_head.weight"].shape == (12, 4)


def test_different_numbers_of_layers(tmp_path: Path) -> None:
    first = models.save_decoder(tmp_path / "a", layers=2)
    second = models.save_decoder(tmp_path / "b", layers=3)
    message = complaint(models.recipe("linear", first, second))
    assert f"different numbers of layers: model.layers has 3 in {second} and 2 in {first}" in message
    assert "`slices` and `layer_range`" in message
    assert "problems" not in message


def test_different_architectures(tmp_path: Path) -> None:
    families = [models.save_family(ARCHITECTURES[name], tmp_path / name) for name in ("llama", "gpt2")]
    first, second = (family.base for family in families)
    message = complaint(models.recipe("linear", first, second))
    assert f"different architecture: {second} is gpt2, {first} is llama" in message
    assert "problems" not in message


def test_different_sizes(tmp_path: Path) -> None:
    inputs = [
        models.save_state(tmp_path / str(width), models.decoder_state(width=width), models.decoder_config())
        for width in (4, 6)
    ]
    message = complaint(models.recipe("linear", *inputs))
    assert "models of different size: 8 tensors" in message
    assert "[12, 4] in" in message
    assert "[12, 6] in" in message
    assert "problems" not in message


def test_state_dicts_with_nothing_in_common(tmp_path: Path) -> None:
    first = models.save_state(tmp_path / "a", {"x.w": torch.ones(2), "y.w": torch.ones(2)})
    second = models.save_state(tmp_path / "b", {"u.w": torch.ones(3), "v.w": torch.ones(3)})
    assert "almost no tensor in common" in complaint(models.recipe("linear", first, second))


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    first = models.save_state(tmp_path / "a", backbone(**{"head.w": torch.ones(2), "n.steps": torch.tensor(1)}))
    second = models.save_state(tmp_path / "b", backbone(**{"head.w": torch.ones(3), "n.steps": torch.tensor(2)}))
    message = complaint(models.recipe("linear", first, second, drop=["nothing"], take={"head.w": "nobody"}))
    assert message.startswith("3 problems:")
    assert all(word in message for word in ("'nothing'", "nobody", "'n.steps'"))


def test_no_output_and_nothing_beside_it_is_left_behind(tmp_path: Path) -> None:
    first = models.save_decoder(tmp_path / "a", layers=2)
    second = models.save_decoder(tmp_path / "b", layers=3)
    with pytest.raises(PlanError):
        merge(models.recipe("linear", first, second), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_layers_of_different_shapes_of_one_model_do_not_fit(tmp_path: Path) -> None:
    state = {"layers.0.fc.weight": torch.ones(2, 2), "layers.1.fc.weight": torch.ones(3, 2)}
    model = str(models.save_state(tmp_path / "a", state))
    sources = [{"model": model, "layer_range": [0, 1]}, {"model": model, "layer_range": [1, 2]}]
    message = complaint({"merge_method": "linear", "slices": [{"sources": sources}]})
    assert "different shapes: tensor 'layers.0.fc.weight': [2, 2] in" in message


def test_layers_of_models_of_different_width_are_not_stacked(tmp_path: Path) -> None:
    narrow = models.save_decoder(tmp_path / "narrow")
    wide = models.save_state(tmp_path / "wide", models.decoder_state(width=6), models.decoder_config())
    pieces = [{"sources": [{"model": str(model), "layer_range": [0, 1]}]} for model in (narrow, wide)]
    message = complaint({"merge_method": "passthrough", "slices": pieces})
    assert "models of different size: 4 tensors" in message
    assert str(wide) in message
    assert str(narrow) in message


def test_base_that_gives_only_the_configuration_must_fit_too(tmp_path: Path) -> None:
    experts = [models.save_decoder(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    wide = models.save_state(tmp_path / "wide", models.decoder_state(width=6), models.decoder_config())
    assert "models of different size" in complaint(models.recipe("linear", *experts, base=wide))
    deep = models.save_decoder(tmp_path / "deep", layers=3)
    assert "different numbers of layers" in complaint(models.recipe("linear", *experts, base=deep))
    fitting = models.save_decoder(tmp_path / "fitting", seed=5, rope_theta=7)
    assert plan(models.recipe("linear", *experts, base=fitting)).config["rope_theta"] == 7
