"""Stacks of layers in tensor names."""

from __future__ import annotations

from typing import Any

import pytest

from weldment.errors import PlanError
from weldment.planning.layers import depth_of, depths, is_embedding, layer_of, position, sliced_stack


@pytest.mark.parametrize(
    ("name", "stack", "index", "rest"),
    [
        ("model.layers.7.mlp.up_proj.weight", "model.layers", 7, "mlp.up_proj.weight"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h", 0, "attn.c_attn.bias"),
        ("h.11.ln_1.weight", "h", 11, "ln_1.weight"),
        ("decoder.block.3.layer.1.EncDecAttention.q.weight", "decoder.block", 3, "layer.1.EncDecAttention.q.weight"),
        (
            "model.layers.2.block_sparse_moe.experts.5.w1.weight",
            "model.layers",
            2,
            "block_sparse_moe.experts.5.w1.weight",
        ),
        (
            "vision_model.encoder.layers.1.self_attn.k_proj.bias",
            "vision_model.encoder.layers",
            1,
            "self_attn.k_proj.bias",
        ),
    ],
)
def test_layer_of_a_name(name: str, stack: str, index: int, rest: str) -> None:
    layer = layer_of(name)
    assert layer is not None
    assert (layer.stack, layer.index, layer.rest) == (stack, index, rest)
    assert layer.name == name


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "0.weight", "model.layers.7", "weight"])
def test_names_outside_layers(name: str) -> None:
    assert layer_of(name) is None


def test_depths_keep_encoder_and_decoder_apart() -> None:
    names = (
        [f"encoder.block.{n}.w.b" for n in range(3)] + [f"decoder.block.{n}.w.b" for n in range(5)] + ["shared.weight"]
    )
    assert depths(names) == {"encoder.block": 3, "decoder.block": 5}


@pytest.mark.parametrize(
    ("name", "is_before"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("transformer.wpe.weight", True),
        ("shared.weight", True),
        ("bert.embeddings.LayerNorm.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
        ("classifier.weight", False),
    ],
)
def test_embeddings_come_before_the_layers(name: str, is_before: bool) -> None:
    assert is_embedding(name) is is_before


def test_positions_go_from_the_first_layer_to_the_last() -> None:
    stacks = {"h": 5, "one": 1}
    assert [position(f"h.{n}.w.b", stacks) for n in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert position("one.0.w.b", stacks) == 0.0
    assert position("norm.weight", stacks) is None


@pytest.mark.parametrize(
    ("stacks", "config", "expected"),
    [
        ({"model.layers": 4}, {}, "model.layers"),
        ({"model.layers": 4, "visual.blocks": 4}, {"num_hidden_layers": 4}, "model.layers"),
        (
            {"language_model.model.layers": 6, "vision_tower.layers": 6},
            {"text_config": {"num_hidden_layers": 6}},
            "language_model.model.layers",
        ),
        ({"model.layers": 4, "projector.linear": 2}, {"num_hidden_layers": 4}, "model.layers"),
        ({"h": 4, "other": 2}, {"n_layer": 4}, "h"),
    ],
)
def test_stack_that_slices_speak_of(stacks: dict[str, int], config: dict[str, Any], expected: str) -> None:
    assert sliced_stack(stacks, config, "recipe.yml: slices") == expected


@pytest.mark.parametrize(
    ("stacks", "listing"),
    [({}, "none"), ({"encoder.block": 3, "decoder.block": 3}, "encoder.block (3 layers), decoder.block (3 layers)")],
)
def test_slices_without_one_stack_are_refused(stacks: dict[str, int], listing: str) -> None:
    with pytest.raises(PlanError) as error:
        sliced_stack(stacks, {"num_layers": 3}, "recipe.yml: slices")
    assert listing in str(error.value)
    assert str(error.value).startswith("recipe.yml: slices")


def test_depth_of_a_config() -> None:
    assert depth_of({"n_layer": 3}) == 3
    assert depth_of({"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 5}}) == 5
    assert depth_of({"hidden_size": 3}) is None
