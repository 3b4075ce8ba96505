"""What a tensor is, told by its name."""

from __future__ import annotations

import pytest

from weldment.planning.roles import head_name, input_embedding, is_recomputed, matches, original_of


@pytest.mark.parametrize(
    ("names", "head", "embedding"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], "lm_head.weight", "model.embed_tokens.weight"),
        (["transformer.wte.weight", "transformer.wpe.weight"], None, "transformer.wte.weight"),
        (["gpt_neox.embed_in.weight", "embed_out.weight"], "embed_out.weight", "gpt_neox.embed_in.weight"),
        (
            ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
            "cls.predictions.decoder.weight",
            "bert.embeddings.word_embeddings.weight",
        ),
        (
            ["roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight", "lm_head.dense.weight"],
            "lm_head.decoder.weight",
            "roberta.embeddings.word_embeddings.weight",
        ),
        (["encoder.embed_tokens.weight", "shared.weight", "lm_head.weight"], "lm_head.weight", "shared.weight"),
        (["backbone.embeddings.weight"], None, "backbone.embeddings.weight"),
        (["vision_model.embedding.weight", "text.embed_tokens.weight"], None, "text.embed_tokens.weight"),
        (["vit.embeddings.position_embeddings", "classifier.weight"], None, None),
    ],
)
def test_heads_and_embeddings(names: list[str], head: str | None, embedding: str | None) -> None:
    assert head_name(names) == head
    assert input_embedding(names) == embedding


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), True),
        ("bert.embeddings.position_ids", (1, 512), True),
        ("transformer.h.0.attn.bias", (1, 1, 16, 16), True),
        ("transformer.h.0.attn.bias", (16,), False),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 16, 16), True),
        ("gpt_neox.layers.0.attention.masked_bias", (), True),
        ("bn.running_mean", (4,), False),
        ("model.norm.weight", (4,), False),
    ],
)
def test_constants_that_code_computes(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_recomputed(name, shape) is expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("classifier.*", "classifier.weight", True),
        ("classifier.*", "bert.classifier.weight", True),
        ("classifier.*", "myclassifier.weight", False),
        ("lm_head.weight", "lm_head.weight", True),
        ("lm_head.weight", "lm_head.weights", False),
        ("*.bias", "a.b.bias", True),
        ("h.?.w", "h.3.w", True),
        ("CLASSIFIER.*", "classifier.weight", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches((pattern,), name) is expected
    assert matches(("nothing", pattern), "other", name) is expected


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("model.decoder.embed_tokens.weight", "model.shared.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("lm_head.decoder.bias", "lm_head.bias"),
        ("model.embed_tokens.weight", None),
        ("lm_head.bias", None),
    ],
)
def test_tensors_that_are_stored_twice(name: str, original: str | None) -> None:
    assert original_of(name) == original
