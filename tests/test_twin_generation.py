"""Generation with experts of each row's own: routed once on the prompt, kept with the key-value cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, StaticCache, pipeline

import weldment
from models import ARCHITECTURES
from twin_bundles import Expert, make_bundle, mixed_model, random_expert
from weldment.errors import UserError
from weldment.twin.router import Router, RouterConfig

WEIGHTS = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [0, 13, 14, 15, 16]])
MASK = (PROMPTS != 0).long()
LONG: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


def a_router(width: int, layers: int) -> Router:
    """Nearest of two centres, which inputs lie between."""
    chance = torch.Generator().manual_seed(3)
    hidden = width * layers
    state = {"whitening": torch.eye(hidden), "centres": torch.randn(2, hidden, generator=chance)}
    return Router(RouterConfig("centroid", ("a", "b"), hidden, (0, -1)[-layers:], temperature=20.0), state)


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def writers(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, list[Expert], Any]:
    torch.manual_seed(0)
    model = ARCHITECTURES[request.param].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    experts = [random_expert(model, seed) for seed in range(2)]
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    router = a_router(int(getattr(model.config, "d_model", None) or model.config.hidden_size), 2)
    make_bundle(folder, model, {"a": experts[0], "b": experts[1]}, router)
    return model, experts, weldment.TwinModel.from_pretrained(folder)


def expected(writers: Any, weights: Tensor, **keys: Any) -> list[list[int]]:
    """What rebuilt models write of each prompt by itself, without padding."""
    model, experts, _ = writers
    found: list[list[int]] = []
    for row, own in enumerate(weights):
        prompt = PROMPTS[row : row + 1, MASK[row].bool()]
        written = mixed_model(model, experts, own).generate(prompt, attention_mask=torch.ones_like(prompt), **keys)
        start = 0 if model.config.is_encoder_decoder else prompt.shape[1]
        found += written[:, start:].tolist()
    return found


def written(writers: Any, **keys: Any) -> list[list[int]]:
    model, _, twin = writers
    out = twin.generate(PROMPTS, attention_mask=MASK, **keys)
    return out[:, 0 if model.config.is_encoder_decoder else PROMPTS.shape[1] :].tolist()


@pytest.mark.parametrize("cached", [True, False])
def test_each_row_is_written_by_its_experts(writers: Any, cached: bool) -> None:
    assert written(writers, expert_weights=WEIGHTS, use_cache=cached, **LONG) == expected(writers, WEIGHTS, **LONG)


def test_beams_keep_the_weights_of_their_row(writers: Any) -> None:
    keys = {**LONG, "num_beams": 3, "num_return_sequences": 2}
    assert written(writers, expert_weights=WEIGHTS, **keys) == expected(writers, WEIGHTS, **keys)


def test_prompts_are_routed_once_and_alike_with_padding_and_without(writers: Any) -> None:
    _, _, twin = writers
    routed = twin.route(PROMPTS, MASK).weights
    alone = torch.cat([twin.route(PROMPTS[row : row + 1, MASK[row].bool()]).weights for row in range(3)])
    torch.testing.assert_close(routed, alone, rtol=1e-4, atol=1e-5)
    assert 0.01 < float(routed.min()) < 0.99
    assert written(writers, **LONG) == expected(writers, routed, **LONG)


def test_a_pipeline_writes(writers: Any, tmp_path: Path) -> None:
    model, _, twin = writers
    if model.config.is_encoder_decoder:
        pytest.skip("transformers has no pipeline for this class any more")
    tokenizer = AutoTokenizer.from_pretrained(twin.twin.bundle.folder)
    pipe: Any = pipeline("text-generation", model=twin, tokenizer=tokenizer)
    assert pipe("w1 w2 w3", max_new_tokens=3)[0]["generated_text"].startswith("w1 w2 w3")


def test_a_loop_of_ones_own_keeps_the_weights_with_the_cache(writers: Any) -> None:
    model, _, twin = writers
    if model.config.is_encoder_decoder:
        pytest.skip("its prompt is read by the encoder")
    prompt = PROMPTS[1:2]
    with torch.no_grad():
        first = twin(prompt, use_cache=True)
        cache = first["cache"] if "cache" in first else first["past_key_values"]
        key = "cache" if "cache" in first else "past_key_values"
        second = twin(torch.tensor([[20]]), use_cache=True, **{key: cache}).logits[:, -1]
        whole = twin(torch.cat([prompt, torch.tensor([[20]])], 1), expert_weights=twin.route(prompt).weights).logits
    torch.testing.assert_close(second, whole[:, -1], rtol=1e-4, atol=1e-4)


def test_a_cache_that_was_emptied_is_routed_anew(writers: Any) -> None:
    model, _, twin = writers
    if model.config.is_encoder_decoder:
        pytest.skip("its prompt is read by the encoder")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        for row in (1, 2):
            prompt = PROMPTS[row : row + 1]
            cache.reset()
            found = twin(prompt, past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(found, twin(prompt, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_copy_works_by_itself(writers: Any) -> None:
    _, _, twin = writers
    twice = copy.deepcopy(twin)
    assert twice.twin.network is twice
    twice.twin.router = Router(RouterConfig("fixed", ("a", "b"), expert="a"), {})
    inputs = {"input_ids": PROMPTS[1:2]}
    assert twice.route(**inputs).weights.tolist() == [[1.0, 0.0]]
    assert twin.route(**inputs).weights.tolist() != [[1.0, 0.0]]


def test_bfloat16_follows_float32(writers: Any) -> None:
    _, _, twin = writers
    low = copy.deepcopy(twin).to(torch.bfloat16)
    inputs = {"input_ids": PROMPTS, "attention_mask": MASK}
    if twin.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = PROMPTS
    with torch.no_grad():
        found, exact = (model(**inputs, expert_weights=WEIGHTS).logits for model in (low, twin))
    assert found.dtype == torch.bfloat16
    assert float((found.float() - exact).norm() / exact.norm()) < 0.05
    assert all(tensor.dtype == torch.float32 for tensor in low.twin.router.buffers())


def test_the_models_limit_is_named(writers: Any) -> None:
    _, _, twin = writers
    if getattr(twin.config, "max_position_embeddings", None) is None:
        pytest.skip("it takes inputs of any length")
    with pytest.raises(UserError, match="the input has 65 tokens, and the model takes 64"):
        twin.generate(torch.full((1, 65), 5))
    with pytest.raises(UserError, match="the input has 65 tokens, and the model takes 64"):
        twin(torch.full((1, 65), 5), experts="a")
