"""Rows of several models in one output: never mixed by position, wherever they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import models
import weldment
from tokenizers_made import FOX, ROWS, save, tokenizer
from weldment import MergeError, PlanError
from weldment.recipe import load_recipes
from weldment.vocabulary.templates import TEMPLATES, rendered

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
ROW_NAMES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, the base with one more token, and a model with as many rows that mean other tokens."""
    root = tmp_path_factory.mktemp("mixing")
    made = {
        "base": tokenizer("bpe", text=FOX),
        "chat": tokenizer("bpe", text=FOX, added=["<|turn|>"]),
        "other": tokenizer("bpe", text=ROWS, added=["<|word|>"]),
    }
    found: dict[str, Path] = {}
    for seed, (name, own) in enumerate(made.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(own), bos_token_id=0, eos_token_id=1, pad_token_id=2, **SMALL)
        found[name] = save(root / name, LlamaForCausalLM(config), own)
    return found


def linear(*inputs: Path | str, **keys: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 1.0}} for model in inputs]
    return {"merge_method": "linear", "models": listed, **keys}


def halves(first: Path, last: Path, **keys: Any) -> dict[str, Any]:
    """The first layer of one model and the last of another, whose head follows it."""
    pieces = [{"sources": [{"model": str(model), "layer_range": [n, n + 1]}]} for n, model in enumerate((first, last))]
    return {"merge_method": "passthrough", "slices": pieces, **keys}


def test_a_head_of_another_vocabulary_than_the_embeddings_is_refused(trio: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match=r"different vocabularies: .* lie at other rows"):
        weldment.plan(halves(trio["chat"], trio["other"]))


def test_embeddings_and_a_head_taken_from_different_vocabularies_are_refused(trio: dict[str, Path]) -> None:
    taken = {ROW_NAMES[0]: str(trio["chat"]), ROW_NAMES[1]: str(trio["other"])}
    with pytest.raises(PlanError, match="different vocabularies"):
        weldment.plan(linear(trio["chat"], trio["other"], take=taken))


def test_stacked_layers_of_different_vocabularies_are_aligned(trio: dict[str, Path], tmp_path: Path) -> None:
    weldment.merge(halves(trio["base"], trio["other"], tokenizer={"source": "union"}), tmp_path / "out")
    rows = weldment_tokens(tmp_path / "out")
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    for name in ("base", "other"):
        own, stored = weldment_tokens(trio[name]), load_file(trio[name] / "model.safetensors")["lm_head.weight"]
        wanted = own if name == "other" else own.keys() - weldment_tokens(trio["other"])
        assert all(torch.equal(head[rows[token]], stored[own[token]]) for token in wanted)


def weldment_tokens(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


@pytest.mark.parametrize("asked", [{}, {"tokenizer": {"source": "union"}}], ids=["as it is", "united"])
def test_a_stage_of_another_vocabulary_and_as_many_rows_is_refused(
    trio: dict[str, Path], asked: dict[str, Any]
) -> None:
    inputs = [trio["chat"], trio["base" if asked else "chat"]]
    with pytest.raises(PlanError, match=r"different vocabularies: .* lie at other rows in .*other than in s"):
        weldment.plan([{"name": "s", **linear(*inputs, **asked)}, linear("s", trio["other"])])


def test_tokenizer_without_source_is_a_union(trio: dict[str, Path]) -> None:
    (recipe,) = load_recipes(linear(trio["base"], trio["chat"], tokenizer={}))
    assert recipe.tokenizer == {"source": "union"}
    planned = weldment.plan(linear(trio["base"], trio["chat"], tokenizer={"pad_to_multiple_of": 64}))
    assert planned.layout.slots[0].shape[0] == 320


def test_a_wrong_wish_is_the_only_problem(trio: dict[str, Path]) -> None:
    """That the sizes differ follows from it, and is not said as well."""
    with pytest.raises(PlanError, match="chat template") as error:
        weldment.plan(linear(trio["base"], trio["chat"], tokenizer={}, chat_template="{% for"))
    assert "different vocabularies" not in str(error.value)


def test_kept_heads_have_the_rows_of_the_merged_tokenizer(trio: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    weldment.merge(linear(trio["base"], trio["chat"], tokenizer={}, heads=["lm_head.*"]), out)
    rows = weldment_tokens(out)
    kept = load_file(out / "heads" / "base.safetensors")["lm_head.weight"]
    stored = load_file(trio["base"] / "model.safetensors")["lm_head.weight"]
    assert all(torch.equal(kept[rows[token]], stored[row]) for token, row in weldment_tokens(trio["base"]).items())
    assert json.loads((out / "heads" / "base.json").read_text())["vocab_size"] == len(kept) == len(rows)


def test_a_kept_head_knows_where_its_special_tokens_lie(trio: dict[str, Path], tmp_path: Path) -> None:
    """Classifiers look for the last token before the padding."""
    chat = shutil.copytree(trio["chat"], tmp_path / "chat")
    own = weldment_tokens(chat)["<|turn|>"]
    (chat / "config.json").write_text(json.dumps({**models.read_config(chat), "pad_token_id": own}))
    out = tmp_path / "out"
    weldment.merge(linear(trio["other"], chat, tokenizer={}, heads=["lm_head.*"]), out)
    assert json.loads((out / "heads" / "chat.json").read_text())["pad_token_id"] == weldment_tokens(out)["<|turn|>"]


def test_a_copied_tokenizer_with_tokens_that_have_no_row_fails_and_the_advice_works(
    trio: dict[str, Path], tmp_path: Path
) -> None:
    short = shutil.copytree(trio["chat"], tmp_path / "short")
    state = load_file(short / "model.safetensors")
    count = len(state[ROW_NAMES[0]]) - 1
    cut = {name: tensor[:count].clone() if name in ROW_NAMES else tensor for name, tensor in state.items()}
    save_file(cut, short / "model.safetensors", {"format": "pt"})
    config = {**models.read_config(short), "vocab_size": count}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match=rf"1 tokens of the tokenizer have no row.*'<\|turn\|>' \(row {count}\)"):
        weldment.merge(linear(short, short), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    weldment.merge(linear(short, short, tokenizer={"source": str(short)}), tmp_path / "out")
    assert models.read_config(tmp_path / "out")["vocab_size"] == count + 1


def test_advice_for_encoders_takes_the_bias_of_the_head_too(tmp_path: Path) -> None:
    first, second = models.ARCHITECTURES["bert"].build(), models.ARCHITECTURES["bert"].build()
    for folder, network, order in (("a", first, "xyz"), ("b", second, "yxz")):
        network.save_pretrained(tmp_path / folder)
        vocab = {token: row for row, token in enumerate(order)}
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": vocab}}))
    recipe = linear(tmp_path / "a", tmp_path / "b")
    with pytest.raises(PlanError, match="different vocabularies") as error:
        weldment.plan(recipe)
    advice = json.loads(str(error.value).partition("`take: ")[2].partition("`")[0])
    assert "cls.predictions.bias" in advice
    weldment.plan({**recipe, "take": advice})


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_by_name_can_be_rendered(name: str) -> None:
    text = rendered(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    assert text.index("How are you?") < text.index("Fine.") < text.index("Good.")


def with_tensors(folder: Path, model: Path, **more: torch.Tensor) -> Path:
    """A copy of a model with other tensors besides its own, or instead of them."""
    shutil.copytree(model, folder)
    state = {**load_file(folder / "model.safetensors"), **{name.replace("__", "."): t for name, t in more.items()}}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["output__weight", "generator__bias", "model__embed_tokens_per_layer__weight"])
def test_rows_of_tokens_under_an_unknown_name_are_refused(trio: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A head that is not known by name would be merged row by row, though its rows mean other tokens."""
    rows = len(weldment_tokens(trio["chat"]))
    shape = (rows,) if name.endswith("bias") else (rows, 8)
    chat, other = (
        with_tensors(tmp_path / model, trio[model], **{name: torch.ones(shape)}) for model in ("chat", "other")
    )
    with pytest.raises(PlanError, match=name.replace("__", ".")) as error:
        weldment.plan(linear(chat, other, tokenizer={}))
    assert "not known by name" in str(error.value)
    dropped = linear(chat, other, tokenizer={}, drop=[name.replace("__", ".")])
    assert weldment.plan(dropped).output is not None


def test_a_head_of_another_length_than_the_embeddings_is_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    heads = [
        with_tensors(tmp_path / model, trio[model], lm_head__weight=torch.ones(288, 8)) for model in ("chat", "other")
    ]
    with pytest.raises(PlanError, match=r"lm_head.weight.*288"):
        weldment.plan(linear(*heads, tokenizer={}))


def test_what_one_model_alone_has_can_be_left_out_as_advised(trio: dict[str, Path], tmp_path: Path) -> None:
    rows = len(weldment_tokens(trio["other"]))
    other = with_tensors(tmp_path / "other", trio["other"], lm_head__bias=torch.ones(rows))
    with pytest.raises(PlanError, match=r"which has no tensor 'lm_head.bias'"):
        weldment.plan(linear(trio["chat"], other, tokenizer={}))
    assert weldment.plan(linear(trio["chat"], other, tokenizer={}, drop=["lm_head.bias"])).output is not None
