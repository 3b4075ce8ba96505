"""Twin models answer what models with rebuilt weights would answer, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import weldment
from models import ARCHITECTURES
from twin_bundles import Expert, make_bundle, mixed_model, random_expert

WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.7, 0.0]])
"""One expert, all, none, another one, a part of one."""

ONE_EACH = torch.eye(3)[[2, 0, 0, 1, 2]]

FAMILIES: dict[str, list[str]] = {
    "llama": ["model.embed_tokens"],
    "qwen2": ["model.embed_tokens"],
    "qwen3": [],
    "gemma": [],
    "gpt2": ["transformer.wte", "transformer.wpe"],
    "gpt_neox": [],
    "bert": ["bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"],
    "roberta": [],
    "t5": [],
}


def built(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = ARCHITECTURES[kind].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows: int = 5, length: int = 7) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, list[Expert], Any]:
    """A shared model, its experts, and the Twin model made of them."""
    model = built(request.param)
    experts = [random_expert(model, seed, rank=seed + 1, embeddings=FAMILIES[request.param]) for seed in range(3)]
    named = dict(zip(("a", "b", "c"), experts, strict=True))
    folder = make_bundle(tmp_path_factory.mktemp(request.param) / "bundle", model, named)
    return model, experts, weldment.TwinModel.from_pretrained(folder)


def rebuilt_answers(model: PreTrainedModel, experts: Sequence[Expert], weights: Tensor, **inputs: Tensor) -> Tensor:
    rows = []
    for row, own in enumerate(weights):
        given = {key: value[row : row + 1] for key, value in inputs.items()}
        with torch.no_grad():
            rows.append(mixed_model(model, experts, own)(**given).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("weights", [WEIGHTS, ONE_EACH, WEIGHTS[[1, 1, 1, 1, 1]]], ids=["few", "one", "all"])
def test_every_row_has_the_answer_of_a_model_with_its_weights(family: Any, weights: Tensor) -> None:
    model, experts, twin = family
    inputs = {"input_ids": tokens()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(length=4)
    expected = rebuilt_answers(model, experts, weights, **inputs)
    with torch.no_grad():
        found = twin(**inputs, expert_weights=weights).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert type(twin) is type(model)
