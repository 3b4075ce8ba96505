"""Merges of real networks whose vocabularies differ."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import weldment
from folders import tree, weld, write_recipe
from tokenizers_made import ROWS, permuted, save, tokenizer
from weldment import PlanError
from weldment.evaluation.states import merged_state
from weldment.merging import merge_in_memory

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = "the cat sat on the table while the model merges rows"


def llama(rows: int, tied: bool = False) -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=rows, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=2, **SMALL
    )
    return transformers.LlamaForCausalLM(config).eval()


def bert(rows: int) -> PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=rows, pad_token_id=2, **SMALL)).eval()


def modern_bert(rows: int) -> PreTrainedModel:
    """Its head's bias stands outside of what is called a head."""
    ids = {"bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 1, "sep_token_id": 1, "pad_token_id": 2}
    config = transformers.ModernBertConfig(vocab_size=rows, **ids, **SMALL)
    return transformers.ModernBertForMaskedLM(config).eval()


def gpt2(rows: int) -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=rows, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def t5(rows: int) -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=rows, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=2,
        pad_token_id=2, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


NETWORKS: dict[str, tuple[str, Callable[[int], PreTrainedModel]]] = {
    "llama": ("bpe", llama),
    "llama tied": ("bpe", lambda rows: llama(rows, tied=True)),
    "bert": ("wordpiece", bert),
    "modern bert": ("bpe", modern_bert),
    "gpt2": ("bpe", gpt2),
    "t5": ("unigram", t5),
}


def with_rows_moved(network: PreTrainedModel, order: list[int]) -> PreTrainedModel:
    """The same network for a vocabulary whose row n is at order[n]."""
    twin = copy.deepcopy(network)
    back = torch.tensor(order).argsort()
    with torch.no_grad():
        for name, tensor in twin.state_dict().items():
            if tensor.shape[:1] == (len(order),) and "position" not in name:
                tensor.copy_(network.state_dict()[name][back])
    return twin


def logits(folder: Path, kind: type[PreTrainedModel], text: str = TEXT) -> Tensor:
    """Of a stored model, with its own tokenizer, its columns in the order of the tokens' texts."""
    made = AutoTokenizer.from_pretrained(folder)
    inputs = made(text, return_tensors="pt", return_token_type_ids=False)
    network = kind.from_pretrained(folder).eval()
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        out = network(**inputs).logits[0]
    return out[:, [row for _, row in sorted(made.get_vocab().items())]]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("source", ["union", "second"])
def test_one_model_in_two_orders_of_its_rows_stays_that_model(tmp_path: Path, name: str, source: str) -> None:
    kind, build = NETWORKS[name]
    torch.manual_seed(3)
    made = tokenizer(kind)
    network = build(len(made))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    other, order = permuted(made)
    first = save(tmp_path / "first", network, made)
    second = save(tmp_path / "second", with_rows_moved(network, order), other)
    wanted = logits(first, type(network))
    assert torch.allclose(logits(second, type(network)), wanted, atol=1e-5), "the test's own permutation is wrong"
    recipe = {"merge_method": "linear", "models": [str(first), str(second)]}
    with pytest.raises(PlanError, match="different vocabularies"):
        weldment.plan(recipe)
    chosen = str(second) if source == "second" else source
    out = weldment.merge({**recipe, "tokenizer": {"source": chosen}}, tmp_path / "out").path
    assert torch.allclose(logits(out, type(network)), wanted, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    written = AutoTokenizer.from_pretrained(out)
    if source == "second":
        assert json.loads((out / "tokenizer.json").read_text()) == json.loads((second / "tokenizer.json").read_text())
    assert written.get_vocab() == (other if source == "second" else made).get_vocab()
    assert config["vocab_size"] == len(made)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two Llamas of different vocabularies, the first untied and with padding rows, the second tied."""
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(5)
    one, two = tokenizer(added=["<|im_start|>"]), tokenizer(text=ROWS, added=["<|x|>", "<|im_start|>"])
    return save(root / "one", llama(len(one) + 5), one), save(root / "two", llama(len(two), tied=True), two)


def union(pair: tuple[Path, Path], method: str = "linear", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [str(model) for model in pair], "tokenizer": {"source": "union"}, **more}


def embeddings(folder: Path, name: str = "model.embed_tokens.weight") -> Tensor:
    return load_file(folder / "model.safetensors")[name]


def test_union_keeps_the_rows_of_the_first_and_has_those_of_all(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = weldment.merge(union(pair), tmp_path / "out").path
    first, second, merged = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (*pair, out))
    assert merged.keys() == first.keys() | second.keys()
    assert first.items() <= merged.items()
    one, two, rows = embeddings(pair[0]), embeddings(pair[1]), embeddings(out)
    assert len(rows) == max(len(one), len(merged))
    for token, row in merged.items():
        mine = one[first[token]] if token in first else two[second[token]]
        other = two[second[token]] if token in second else one[first[token]]
        assert torch.allclose(rows[row], (mine + other) / 2, atol=1e-6), token
    network = transformers.LlamaForCausalLM.from_pretrained(out)
    text = AutoTokenizer.from_pretrained(out)("the <|x|> sat", return_tensors="pt")
    assert torch.isfinite(network(**text).logits).all()


def test_a_tied_model_lends_the_rows_of_its_head(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = weldment.merge(union(pair), tmp_path / "out").path
    second, merged = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (pair[1], out))
    head = embeddings(out, "lm_head.weight")
    assert torch.allclose(head[merged["<|x|>"]], embeddings(pair[1])[second["<|x|>"]], atol=1e-6)


def test_rows_without_a_token_are_kept(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    recipe = {**union(pair), "tokenizer": {"source": str(pair[0])}}
    rows, one = embeddings(weldment.merge(recipe, tmp_path / "out").path), embeddings(pair[0])
    assert rows.shape == one.shape
    assert torch.allclose(rows[-5:], one[-5:], atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "slerp", "iso_c"])
def test_every_kind_of_method_merges_aligned_rows(tmp_path: Path, pair: tuple[Path, Path], method: str) -> None:
    """The same bytes by one worker on small blocks as by two on large ones, and in memory."""
    parameters = (
        {"t": 0.3} if method == "slerp" else {"density": 0.5} if method in ("ties", "dare_ties", "della") else {}
    )
    recipe = union(pair, method, base_model=str(pair[0]), parameters=parameters, seed=7)
    one = weldment.merge(recipe, tmp_path / "one", threads=1).path
    two = weldment.merge(recipe, tmp_path / "two", threads=2).path
    assert tree(one) == tree(two)
    stored = load_file(one / "model.safetensors")
    assert {n: t.tolist() for n, t in merge_in_memory(recipe).tensors.items()} == {
        n: t.tolist() for n, t in stored.items()
    }


def test_stages_hand_their_vocabulary_on(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    first = {**union(pair), "name": "half"}
    last = {"merge_method": "linear", "models": ["half", str(pair[1])], "tokenizer": {"source": "union"}}
    out = weldment.merge([first, last], tmp_path / "out").path
    once = weldment.merge(union(pair), tmp_path / "once").path
    merged = AutoTokenizer.from_pretrained(out).get_vocab()
    assert merged == AutoTokenizer.from_pretrained(once).get_vocab()
    second = AutoTokenizer.from_pretrained(pair[1]).get_vocab()
    half, two, rows = embeddings(once), embeddings(pair[1]), embeddings(out)
    for token in ("<|x|>", "<s>", "the"):
        if token in second:
            assert torch.allclose(rows[merged[token]], (half[merged[token]] + two[second[token]]) / 2, atol=1e-6)


def test_plan_changes_with_the_vocabulary(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    plans = [
        weldment.plan({**union(pair), "tokenizer": asked}).hash
        for asked in (
            {"source": "union"},
            {"source": str(pair[0])},
            {"source": str(pair[1])},
            {"source": "union", "pad_to_multiple_of": 64},
            {"source": "union", "tokens": {"<|x|>": {"source": {"kind": "zero"}, "force": True}}},
        )
    ]
    assert len(set(plans)) == len(plans)


def test_a_model_that_only_lends_rows_is_accounted_for(pair: tuple[Path, Path]) -> None:
    """`linear` does not merge its base; with a union the base's rows count all the same."""
    recipe = {**union(pair), "models": [str(pair[1])], "base_model": str(pair[0])}
    planned = weldment.plan(recipe)
    fates = {entry.tensor: (entry.fate, entry.detail) for entry in planned.ledger if entry.model == str(pair[0])}
    assert fates["model.embed_tokens.weight"] == ("merged", "lends rows of tokens that others lack")
    assert fates["model.norm.weight"][0] == "dropped"


def test_plan_lists_what_happens_to_the_tokens(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    shown = weld("plan", write_recipe(tmp_path / "r.yml", union(pair)))
    assert f"the vocabulary is that of {pair[0]} and" in shown.out
    assert f"{pair[1]}: " in shown.out
    assert "come from" in shown.out


def test_a_merge_in_memory_has_the_merged_tokenizer(pair: tuple[Path, Path]) -> None:
    state = merged_state(union(pair), "united")
    assert state.folder is not None
    assert "<|x|>" in AutoTokenizer.from_pretrained(state.folder).get_vocab()


def test_merged_embeddings_that_are_taken_from_one_model_are_aligned_too(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    recipe = {**union(pair), "take": {"*embed_tokens.weight": str(pair[1]), "lm_head.weight": str(pair[0])}}
    out = weldment.merge(recipe, tmp_path / "out").path
    second, merged = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (pair[1], out))
    rows, two = embeddings(out), embeddings(pair[1])
    for token, row in second.items():
        assert torch.equal(rows[merged[token]], two[row])


def test_an_adapter_that_brings_embeddings_and_a_tokenizer_is_aligned(tmp_path: Path) -> None:
    """Its saved rows, two of them new, meet those of a model whose rows lie in another order."""
    import peft

    torch.manual_seed(11)
    made = tokenizer()
    base = save(tmp_path / "base", llama(len(made)), made)
    grown = tokenizer(added=["<|new|>", "<|more|>"])
    network = transformers.LlamaForCausalLM.from_pretrained(base)
    network.resize_token_embeddings(len(grown), mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = peft.get_peft_model(network, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    grown.save_pretrained(tmp_path / "adapter")
    other, order = permuted(made)
    second = save(tmp_path / "second", with_rows_moved(llama(len(made)), order), other)
    models = [f"{base}+{tmp_path / 'adapter'}", str(second)]
    recipe = {"merge_method": "linear", "models": models, "tokenizer": {"source": "union"}}
    out = weldment.merge(recipe, tmp_path / "out").path
    merged, rows = AutoTokenizer.from_pretrained(out).get_vocab(), embeddings(out)
    assert merged == grown.get_vocab()
    saved = adapted.merge_and_unload().get_input_embeddings().weight.detach()
    theirs, vocabulary = embeddings(second), other.get_vocab()
    for token, row in merged.items():
        lent = theirs[vocabulary[token]] if token in vocabulary else saved[row]
        assert torch.allclose(rows[row], (saved[row] + lent) / 2, atol=1e-5), token


GUIDE = Path(__file__).parents[1] / "docs" / "guide-vocabulary.md"


def test_the_guide_says_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error, its notes and its recipes, on models that differ as the page says."""
    monkeypatch.chdir(tmp_path)
    plain, talk = tokenizer(), tokenizer(added=["<|user|>", "<|bot|>"])
    for folder, made in {"base": plain, "chat": plain, "code": tokenizer(text=ROWS), "talk": talk}.items():
        torch.manual_seed(len(folder))
        save(Path("models") / folder, llama(len(made)), made)
    page = GUIDE.read_text(encoding="utf-8")
    write_recipe(Path("recipe.yml"), {"merge_method": "linear", "models": ["models/base", "models/talk"]})
    printed = weld("plan", "recipe.yml").err
    error, fix, *_ = page.partition("```text\n")[2].splitlines()
    start = printed.partition(": different")[2].partition(": '<|user|>")[0]
    assert start in error
    assert fix.partition("would give")[0] in printed
    notes = [line for line in page.splitlines() if line.startswith("note  ")]
    recipes = [block.partition("```")[0] for block in page.split("```yaml\n")[1:]]
    assert (len(notes), len(recipes)) == (2, 2)
    for number, recipe in enumerate(recipes):
        out = Path(f"out{number}")
        if number == 1:
            ending = tokenizer(added=["<|end|>"])
            save(Path("models/chat"), llama(len(ending)), ending)
        done = weld("merge", write_recipe(Path("recipe.yml"), recipe), out)
        assert done.code == 0, done.err
        shape = re.compile(r"\d+ tokens|\d+ rows|\d+")
        if number == 0:
            assert all(shape.sub("N", note.removeprefix("note  ")) in shape.sub("N", done.err) for note in notes)
    assert len(AutoTokenizer.from_pretrained("out1")("<|user|><|spare|>", add_special_tokens=False)["input_ids"]) == 2
    assert embeddings(Path("out1")).shape[0] % 64 == 0
