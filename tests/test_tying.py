"""Heads that are the token embeddings, in some models, all or none."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models import ARCHITECTURES, State
from weldment import merge, plan

LLAMA = ARCHITECTURES["llama"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_llama(path: Path, kind: str, seed: int, declared: bool | None = None) -> Path:
    """A llama whose head is stored or not: "absent", "equal" or "diverging"."""
    torch.manual_seed(seed)
    config = LLAMA.make_config()
    config.tie_word_embeddings = kind != "diverging"
    LLAMA.build(config).save_pretrained(path)
    if kind == "equal":
        state = models.read_state(path)
        models.save_state(path, {**state, HEAD: state[EMBEDDING].clone()})
    written = models.read_config(path)
    written["tie_word_embeddings"] = config.tie_word_embeddings if declared is None else declared
    models.save_state(path, models.read_state(path), written)
    return path


def meaning(state: State) -> State:
    """The tensors with the head that they mean."""
    return {**state, HEAD: state.get(HEAD, state[EMBEDDING])}


def logits_of(state: State) -> torch.Tensor:
    """What a model with exactly these tensors and an own head says."""
    model = LLAMA.build()
    assert model.config.tie_word_embeddings is False
    model.load_state_dict(state)
    return models.outputs(LLAMA, model)


@pytest.mark.parametrize("kinds", list(itertools.product(("absent", "equal", "diverging"), repeat=2)))
def test_output_has_a_head_of_its_own_if_any_model_has(kinds: tuple[str, str], tmp_path: Path) -> None:
    inputs = [save_llama(tmp_path / str(number), kind, number) for number, kind in enumerate(kinds)]
    merge(models.recipe("linear", *inputs), tmp_path / "out")
    found = models.read_state(tmp_path / "out")
    is_tied = "diverging" not in kinds
    assert (HEAD not in found) == is_tied
    assert models.read_config(tmp_path / "out")["tie_word_embeddings"] is is_tied
    expected = models.average(*(meaning(models.read_state(path)) for path in inputs))
    models.assert_same(meaning(found), expected)
    merged = models.loaded(LLAMA, tmp_path / "out")
    torch.testing.assert_close(models.outputs(LLAMA, merged), logits_of(expected), rtol=1e-4, atol=1e-6)


def test_base_that_is_tied_gives_its_embeddings_for_the_head_of_untied_experts(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", "absent", 0)
    experts = [save_llama(tmp_path / f"e{seed}", "diverging", seed) for seed in (1, 2)]
    recipe = models.recipe("task_arithmetic", *experts, base=base, parameters={"weight": 0.5})
    merge(recipe, tmp_path / "out")
    found = models.read_state(tmp_path / "out")
    expected = models.average(*(models.read_state(expert) for expert in experts))
    torch.testing.assert_close(found[HEAD], expected[HEAD], rtol=1e-5, atol=1e-6)
    assert models.read_config(tmp_path / "out")["tie_word_embeddings"] is False
    torch.testing.assert_close(
        models.outputs(LLAMA, models.loaded(LLAMA, tmp_path / "out")), logits_of(expected), rtol=1e-3, atol=1e-5
    )
    (note,) = plan(recipe).notes
    assert "base: its head is tied" in note


def test_head_that_is_stored_although_tied_is_dropped_for_a_stated_reason(tmp_path: Path) -> None:
    inputs = [save_llama(tmp_path / kind, kind, 3) for kind in ("absent", "equal")]
    planned = plan(models.recipe("linear", *inputs))
    (dropped,) = [entry for entry in planned.ledger if entry.fate == "dropped"]
    assert (dropped.model, dropped.tensor) == (str(inputs[1]), HEAD)
    assert "equal to the token embeddings" in dropped.detail


def test_head_declared_tied_that_differs_is_not_lost(tmp_path: Path) -> None:
    inputs = [save_llama(tmp_path / str(seed), "diverging", seed, declared=True) for seed in (1, 2)]
    merge(models.recipe("linear", *inputs), tmp_path / "out")
    assert models.read_config(tmp_path / "out")["tie_word_embeddings"] is False
    expected = models.average(*map(models.read_state, inputs))
    merged = models.loaded(LLAMA, tmp_path / "out")
    torch.testing.assert_close(models.outputs(LLAMA, merged), logits_of(expected), rtol=1e-4, atol=1e-6)


def test_head_declared_untied_stays_even_if_it_equals_the_embeddings(tmp_path: Path) -> None:
    inputs = [save_llama(tmp_path / str(seed), "equal", seed, declared=False) for seed in (1, 2)]
    merge(models.recipe("linear", *inputs), tmp_path / "out")
    assert HEAD in models.read_state(tmp_path / "out")
    assert models.read_config(tmp_path / "out")["tie_word_embeddings"] is False


def save_silent(path: Path, seed: int, *, tied: bool) -> Path:
    """A model whose config does not speak of tying."""
    config = models.decoder_config(tied=tied)
    del config["tie_word_embeddings"]
    return models.save_state(path, models.decoder_state(tied=tied, seed=seed), config)


def test_model_without_head_and_word_about_it_is_tied_where_another_has_a_head(tmp_path: Path) -> None:
    inputs = [save_silent(tmp_path / "a", 0, tied=True), save_silent(tmp_path / "b", 1, tied=False)]
    merge(models.recipe("linear", *inputs), tmp_path / "out")
    first, second = map(models.read_state, inputs)
    torch.testing.assert_close(models.read_state(tmp_path / "out")[HEAD], (first[EMBEDDING] + second[HEAD]) / 2)
    assert models.read_config(tmp_path / "out")["tie_word_embeddings"] is False


def test_config_that_does_not_speak_of_tying_is_left_alone_where_no_model_has_a_head(tmp_path: Path) -> None:
    inputs = [save_silent(tmp_path / str(seed), seed, tied=True) for seed in (0, 1)]
    assert "tie_word_embeddings" not in plan(models.recipe("linear", *inputs)).config


def test_model_that_says_it_has_no_head_lacks_it(tmp_path: Path) -> None:
    bare = models.decoder_config(tied=False)
    first = models.save_state(tmp_path / "bare", models.decoder_state(tied=True), bare)
    second = models.save_decoder(tmp_path / "whole", tied=False)
    with pytest.raises(Exception, match=r"lm_head\.weight.*missing from .*bare.*heads: \[\"lm_head\.\*\"\]"):
        plan(models.recipe("linear", first, second))


@pytest.mark.parametrize("key", ["tie_word_embeddings", "text_config"])
def test_tying_is_also_written_where_the_text_config_states_it(key: str, tmp_path: Path) -> None:
    text: dict[str, Any] = {"tie_word_embeddings": True}
    config = {"model_type": "x", **(text if key == "tie_word_embeddings" else {"text_config": text})}
    inputs = [
        models.save_state(tmp_path / "a", models.decoder_state(tied=True), config),
        models.save_state(tmp_path / "b", models.decoder_state(tied=False, seed=1), config),
    ]
    planned = plan(models.recipe("linear", *inputs))
    assert planned.config["tie_word_embeddings"] is False
    if key == "text_config":
        assert planned.config["text_config"]["tie_word_embeddings"] is False


def test_head_taken_from_one_model_makes_the_output_untied(tmp_path: Path) -> None:
    tied = models.save_decoder(tmp_path / "tied")
    untied = models.save_decoder(tmp_path / "untied", tied=False, seed=1)
    merge(models.recipe("linear", tied, untied, take={HEAD: str(untied)}), tmp_path / "out")
    found = models.read_state(tmp_path / "out")
    assert torch.equal(found[HEAD], models.read_state(untied)[HEAD])
    assert models.read_config(tmp_path / "out")["tie_word_embeddings"] is False


def test_embeddings_taken_from_one_model_still_stand_in_for_its_head(tmp_path: Path) -> None:
    tied = models.save_decoder(tmp_path / "tied")
    untied = models.save_decoder(tmp_path / "untied", tied=False, seed=1)
    merge(models.recipe("linear", tied, untied, take={EMBEDDING: str(tied)}), tmp_path / "out")
    first, second, found = (models.read_state(path) for path in (tied, untied, tmp_path / "out"))
    assert torch.equal(found[EMBEDDING], first[EMBEDDING])
    torch.testing.assert_close(found[HEAD], (first[EMBEDDING] + second[HEAD]) / 2)


T5_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("holders", [(0,), (0, 1)], ids=["one model", "all models"])
def test_copies_of_shared_embeddings_are_left_out(holders: tuple[int, ...], tmp_path: Path) -> None:
    architecture = ARCHITECTURES["t5"]
    family = models.save_family(architecture, tmp_path)
    for number in holders:
        state = models.read_state(family.experts[number])
        copies = {name: state["shared.weight"].clone() for name in T5_COPIES}
        models.save_state(family.experts[number], {**state, **copies})
    merge(models.recipe("linear", *family.experts), tmp_path / "out")
    assert models.read_state(tmp_path / "out").keys() == models.read_state(family.base).keys()
    assert torch.isfinite(models.outputs(architecture, models.loaded(architecture, tmp_path / "out"))).all()


def test_copy_that_differs_from_its_original_is_merged_with_the_others_originals(tmp_path: Path) -> None:
    names = ("shared.weight", "encoder.embed_tokens.weight")
    states = [dict(zip(names, torch.randn(2, 5, 3), strict=True)), {"shared.weight": torch.randn(5, 3)}]
    inputs = [models.save_state(tmp_path / str(number), state) for number, state in enumerate(states)]
    merge(models.recipe("linear", *inputs), tmp_path / "out")
    expected = models.average(states[0], dict.fromkeys(names, states[1]["shared.weight"]))
    models.assert_same(models.read_state(tmp_path / "out"), expected)


def test_roberta_stored_with_its_decoder_twice_loads(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["roberta"]
    family = models.save_family(architecture, tmp_path)
    for expert in family.experts:
        state = models.read_state(expert)
        embedding = state["roberta.embeddings.word_embeddings.weight"]
        copies = {"lm_head.decoder.weight": embedding, "lm_head.decoder.bias": state["lm_head.bias"]}
        models.save_state(expert, {**state, **{name: tensor.clone() for name, tensor in copies.items()}})
    merge(models.recipe("linear", *family.experts), tmp_path / "out")
    assert "lm_head.decoder.weight" not in models.read_state(tmp_path / "out")
    models.loaded(architecture, tmp_path / "out")
