"""Parts of networks by names of tensors, of several families."""

from __future__ import annotations

import pytest

from models import ARCHITECTURES
from weldment.doctor.groups import group_of, is_task_head


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("bert.embeddings.position_embeddings.weight", "embeddings"),
        ("bert.embeddings.LayerNorm.weight", "norms"),
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("encoder.layer.0.attention.output.dense.weight", "attention"),
        ("encoder.layer.0.output.dense.weight", "mlp"),
        ("encoder.layer.0.intermediate.dense.bias", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "mlp"),
        ("h.0.attn.c_attn.weight", "attention"),
        ("h.0.mlp.c_fc.weight", "mlp"),
        ("h.0.ln_1.weight", "norms"),
        ("model.norm.weight", "norms"),
        ("lm_head.weight", "head"),
        ("classifier.bias", "head"),
        ("score.weight", "head"),
        ("backbone.layers.0.mixer.A_log", "other"),
    ],
)
def test_names(name: str, group: str) -> None:
    assert group_of(name) == group


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit", "gpt_neox"])
def test_most_parameters_of_known_families_have_a_group(kind: str) -> None:
    sizes: dict[str, int] = {}
    for name, parameter in ARCHITECTURES[kind].build().named_parameters():
        sizes[group_of(name)] = sizes.get(group_of(name), 0) + parameter.numel()
    assert {"embeddings", "attention", "mlp", "norms"} <= sizes.keys()
    assert sizes.get("other", 0) < 0.1 * sum(sizes.values())


def test_only_tensors_outside_layers_are_task_heads() -> None:
    assert is_task_head("classifier.weight")
    assert not is_task_head("layers.0.classifier.weight")
    assert not is_task_head("lm_head.weight")
