"""What the tensors of an adapter are: layers, parameters of modules, tensors stored whole."""

from __future__ import annotations

from typing import Any

import pytest

from weldment.adapters.adapter import Layer, read_layers
from weldment.adapters.config import parse_config
from weldment.checkpoint.model import TensorEntry, WeightFile
from weldment.errors import CheckpointError

FILE = WeightFile("adapter_model.safetensors", 0)


def entries(**shapes: tuple[int, ...]) -> dict[str, TensorEntry]:
    """Tensors by their names in the file, in which `__` stands for a dot."""
    names = {f"base_model.model.{name.replace('__', '.')}": shape for name, shape in shapes.items()}
    return {name: TensorEntry(name, "F32", shape, FILE, 0) for name, shape in names.items()}


def read(config: dict[str, Any], **shapes: tuple[int, ...]) -> tuple[dict[str, Layer], dict[str, TensorEntry]]:
    return read_layers(parse_config({"peft_type": "LORA", "r": 2, **config}, "config"), entries(**shapes), "a")


STACK = {"m__experts__lora_A__weight": (6, 5), "m__experts__lora_B__weight": (8, 6)}
INNER = {"m__experts__base_layer__lora_A__weight": (6, 8), "m__experts__base_layer__lora_B__weight": (10, 6)}


@pytest.mark.parametrize("names", [["m.experts.down_proj"], ["experts.down_proj"], ["down_proj"]])
def test_one_parameter_of_a_module(names: list[str]) -> None:
    layers, _ = read({"target_parameters": names, "lora_alpha": 6}, **STACK)
    (layer,) = layers.values()
    assert (layer.module, layer.tensor, layer.parameter) == ("m.experts.down_proj", "m.experts.down_proj", True)
    assert (layer.experts, layer.rank, layer.scale, layer.sizes) == (3, 2, 3.0, (8, 5))


def test_two_parameters_of_a_module_are_told_apart_by_their_nesting() -> None:
    """The module's first parameter is wrapped first and so lies innermost, whatever the order of the names."""
    config = {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
    layers, _ = read(config, **STACK, **INNER)
    assert {name: layer.b.shape for name, layer in layers.items()} == {
        "m.experts.down_proj": (8, 6),
        "m.experts.gate_up_proj": (10, 6),
    }


def test_patterns_are_compared_with_the_name_of_the_parameter() -> None:
    config = {"target_parameters": ["gate_up_proj", "down_proj"], "rank_pattern": {r".*\.gate_up_proj": 3}}
    config |= {"alpha_pattern": {r".*\.gate_up_proj": 12}, "lora_alpha": 2}
    layers, _ = read(config, **STACK, **INNER)
    assert [(layer.experts, layer.rank, layer.scale) for layer in layers.values()] == [(3, 2, 1.0), (2, 3, 4.0)]


def test_the_weight_of_a_module_that_is_named_as_a_parameter_is_that_of_the_module() -> None:
    shapes = {"mlp__gate__lora_A__weight": (4, 8), "mlp__gate__lora_B__weight": (3, 4)}
    config = {"target_parameters": ["gate.weight", "down_proj"], "rank_pattern": {"gate.weight": 4}}
    layers, _ = read(config | {"alpha_pattern": {"gate.weight": 16, "gate": 8}}, **shapes)
    layer = layers["mlp.gate"]
    assert (layer.tensor, layer.parameter, layer.experts) == ("mlp.gate.weight", False, 1)
    assert (layer.rank, layer.scale) == (4, 4.0)


def test_modules_beside_parameters() -> None:
    """A parameter that is named without its module could be any module's, but not that of a target module."""
    shapes = {"attn__q_proj__lora_A__weight": (2, 8), "attn__q_proj__lora_B__weight": (8, 2)}
    for targets in (["q_proj"], "q_proj", ".*q_proj"):
        layers, _ = read({"target_modules": targets, "target_parameters": ["down_proj"]}, **STACK, **shapes)
        assert {name: layer.parameter for name, layer in layers.items()} == {
            "m.experts.down_proj": True,
            "attn.q_proj": False,
        }


def test_layers_inside_a_wrapped_module_have_the_name_of_the_model() -> None:
    """PEFT wraps an attention module and its projection."""
    shapes = {
        "attn__base_layer__out_proj__lora_A__weight": (2, 8),
        "attn__base_layer__out_proj__lora_B__weight": (8, 2),
    }
    layers, saved = read({}, **shapes, attn__base_layer__in_proj_bias=(24,))
    assert [layer.tensor for layer in layers.values()] == ["attn.out_proj.weight"]
    assert list(saved) == ["attn.in_proj_bias"]


@pytest.mark.parametrize(
    ("config", "shapes", "text"),
    [
        ({}, STACK | INNER, r"m.experts: it has 2 layers, and target_parameters names 0 of its parameters: \[\]"),
        ({"target_parameters": ["a.w", "b.w"]}, STACK | INNER, "it has 2 layers, and target_parameters names 0"),
        ({"target_parameters": ["w1", "w2"]}, STACK, "it has 1 layers, and target_parameters names 2"),
        ({"target_parameters": ["w1", "w2"]}, STACK | INNER, "which of its 2 layers belongs to the parameter w1"),
        ({"target_parameters": ["down_proj"], "r": 4}, STACK, r"down_proj: A has 6 rows, which are not 4 \(the rank\)"),
        ({}, {"x__weight": (3,), "x__base_layer__weight": (3,)}, "are both said to be 'x.weight'"),
    ],
)
def test_what_cannot_be_told_is_refused(config: dict[str, Any], shapes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        read(config, **shapes)
