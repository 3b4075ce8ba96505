"""What a merge changes in the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from weldment import merge, plan
from weldment.planning.config import main_dtype, with_dtype, with_layers, with_rows

CHOSEN = (0, 2, 2)


def resliced(**config: Any) -> dict[str, Any]:
    whole = {"num_hidden_layers": 4, **config}
    return with_layers(whole, [(whole, index) for index in CHOSEN])


def test_count_of_layers_is_replaced() -> None:
    assert resliced(hidden_size=4) == {"num_hidden_layers": 3, "hidden_size": 4}
    assert with_layers({"n_layer": 2}, [({}, 0)]) == {"n_layer": 1}


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["a", "c", "c"]),
        ("no_rope_layers", [1, 1, 0, 1], [1, 0, 0]),
        ("num_key_value_heads", [1, 2, 3, 4], [1, 3, 3]),
        ("num_key_value_heads", 8, 8),
        ("mlp_only_layers", [2], [1, 2]),
        ("mlp_only_layers", [0, 1], [0]),
        ("mlp_only_layers", [], []),
        ("architectures", ["a", "b", "c", "d"], ["a", "b", "c", "d"]),
        ("vision_feature_layer", [-2, -1], [-2, -1]),
        ("eos_token_id", [1, 2, 3, 4], [1, 2, 3, 4]),
    ],
)
def test_lists_per_layer_follow_the_layers(key: str, before: Any, after: Any) -> None:
    assert resliced(**{key: before})[key] == after


def test_values_come_from_the_config_of_each_layers_own_model() -> None:
    first = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    deeper = {"num_hidden_layers": 4, "layer_types": ["w", "x", "y", "z"]}
    assert with_layers(first, [(first, 0), (deeper, 3)])["layer_types"] == ["a", "z"]


def test_layers_of_the_text_model_are_counted_in_the_text_config() -> None:
    config = {
        "num_hidden_layers": 4,
        "text_config": {"num_hidden_layers": 4},
        "vision_config": {"num_hidden_layers": 4},
    }
    changed = with_layers(config, [(config, 0)])
    assert changed["text_config"]["num_hidden_layers"] == 1
    assert changed["vision_config"]["num_hidden_layers"] == 4


def test_dtype_is_stated_where_it_was_and_once_at_least() -> None:
    assert with_dtype({}, "BF16") == {"torch_dtype": "bfloat16"}
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "a": 1}, "vision_config": {}}
    expected = {"dtype": "float16", "text_config": {"torch_dtype": "float16", "a": 1}, "vision_config": {}}
    assert with_dtype(config, "F16") == expected


def test_vocabulary_size_is_changed_where_it_was_the_old_one() -> None:
    config = {"vocab_size": 9, "text_config": {"vocab_size": 9}, "vision_config": {"vocab_size": 9}}
    changed = with_rows(config, 9, 11)
    assert (changed["vocab_size"], changed["text_config"]["vocab_size"]) == (11, 11)
    assert changed["vision_config"]["vocab_size"] == 9
    assert with_rows({"vocab_size": 10}, 9, 11) == {"vocab_size": 10}


def test_main_dtype_is_that_of_most_elements() -> None:
    assert main_dtype([("F32", 10), ("BF16", 8), ("BF16", 3), ("I64", 100)]) == "BF16"
    assert main_dtype([("I64", 1)]) is None


def save(path: Path, stored: torch.dtype, stated: str) -> Path:
    state = {name: tensor.to(stored) for name, tensor in models.decoder_state().items()}
    return models.save_state(path, state, {**models.decoder_config(), "dtype": stated})


@pytest.mark.parametrize("wanted", [None, "float16"])
def test_stated_dtype_is_that_of_the_output(wanted: str | None, tmp_path: Path) -> None:
    base = save(tmp_path / "base", torch.bfloat16, "bfloat16")
    experts = [save(tmp_path / str(number), torch.float32, "float32") for number in range(2)]
    merge(models.recipe("linear", *experts, base=base, dtype=wanted), tmp_path / "out")
    stored = {tensor.dtype for tensor in models.read_state(tmp_path / "out").values()}
    assert stored == {torch.float32 if wanted is None else torch.float16}
    assert models.read_config(tmp_path / "out")["dtype"] == (wanted or "float32")


def test_config_that_never_told_the_dtype_truly_is_left_alone(tmp_path: Path) -> None:
    experts = [save(tmp_path / str(number), torch.float32, "float16") for number in range(2)]
    assert plan(models.recipe("linear", *experts)).config["dtype"] == "float16"


def test_embeddings_taken_from_a_model_with_more_rows(tmp_path: Path) -> None:
    base = models.save_decoder(tmp_path / "base")
    longer = models.save_decoder(tmp_path / "longer", rows=14, seed=1)
    recipe = models.recipe("ties", longer, base=base, take={"model.embed_tokens.weight": str(longer)})
    assert plan(recipe).config["vocab_size"] == 14
    assert plan(recipe).tokenizer.reference == str(longer)


def test_plain_state_dicts_have_no_config(tmp_path: Path) -> None:
    files = [models.save_state(tmp_path / str(seed), models.decoder_state(seed=seed)) for seed in range(2)]
    merge(models.recipe("linear", *(file / "model.safetensors" for file in files)), tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"README.md", "model.safetensors", "weldment.json"}


def test_configuration_comes_from_an_expert_if_the_base_is_a_plain_file(tmp_path: Path) -> None:
    base = models.save_state(tmp_path / "base", models.decoder_state()) / "model.safetensors"
    expert = models.save_decoder(tmp_path / "expert", seed=1)
    planned = plan(models.recipe("task_arithmetic", expert, base=base))
    assert planned.config == models.read_config(expert)
    assert planned.side.reference == str(expert)
    assert any(f"it comes from {expert}" in note for note in planned.notes)
