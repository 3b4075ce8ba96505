"""Configurations that differ in what matters to a merge, and in what does not."""

from __future__ import annotations

from typing import Any

import pytest

from weldment.checkpoint.model import Checkpoint
from weldment.doctor.configs import compare_configs
from weldment.doctor.findings import Finding

LLAMA = {"model_type": "llama", "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "head_dim": 64}


def compared(*configs: dict[str, Any]) -> list[Finding]:
    return compare_configs([Checkpoint(f"m{n}", {}, (), config=config) for n, config in enumerate(configs)])


def test_equal_configurations_are_no_matter() -> None:
    assert compared(LLAMA, dict(LLAMA), {**LLAMA, "use_cache": False, "torch_dtype": "float16", "vocab_size": 3}) == []


def test_models_without_configuration_are_not_compared() -> None:
    assert compared(LLAMA, {}) == []


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"rope_theta": 500000.0}, "RoPE base", "warning"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_theta": None}, "RoPE base", "warning"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, "RoPE scaling", "warning"),
        ({"rms_norm_eps": 1e-6}, "epsilon of norms", "warning"),
        ({"hidden_act": "gelu"}, "activation", "warning"),
        ({"sliding_window": 4096}, "sliding window", "warning"),
        ({"head_dim": 128}, "size of a head", "problem"),
    ],
)
def test_differences_are_named(change: dict[str, Any], name: str, level: str) -> None:
    (found,) = compared(LLAMA, {**LLAMA, **change}, LLAMA)
    assert (found.code, found.level, found.evidence["setting"]) == ("config", level, name)
    assert "m0 and m2" in found.text
    assert found.text.startswith(f"{name} differs: ")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_theta": 10000.0}, {}),
        ({"rope_theta": 10000}, {"rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ({"rope_scaling": None}, {"rope_scaling": {"type": "default"}}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_parameters": {"rope_type": "linear", "factor": 2}}),
        ({"num_key_value_heads": 4}, {}),
        ({"sliding_window": None}, {}),
        ({"hidden_size": 8}, {"text_config": {"hidden_size": 8}}),
    ],
)
def test_ways_to_say_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert compared(one, other) == []


def test_another_architecture_explains_everything() -> None:
    (found,) = compared(LLAMA, {"model_type": "gpt2", "n_head": 3, "activation_function": "gelu"})
    assert (found.code, found.level) == ("architecture", "problem")
    assert found.text == "models of different architecture: llama in m0, gpt2 in m1"


def test_heads_that_no_shape_shows() -> None:
    sizes = {"model_type": "llama", "hidden_size": 64}
    (found,) = compared({**sizes, "num_attention_heads": 4}, {**sizes, "num_attention_heads": 8})
    assert found.level == "problem"
    assert "cut into heads differently" in found.text
