"""The documented rules for rows of tokens: every row of merged embeddings against one computed by hand."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import weldment
from folders import weld, write_recipe
from tokenizers_made import FOX, ROWS, save, tokenizer
from weldment import PlanError

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = {"base": FOX, "one": ROWS, "two": FOX + " " + ROWS}
SHARED = {"base": [], "one": ["<|both|>", "<|one|>"], "two": ["<|two|>", "<|both|>"]}
EMBEDDING = "model.embed_tokens.weight"


def make(root: Path, kind: str) -> dict[str, Path]:
    """Three Llamas: a base, and two models with one added token of their own each and one in common."""
    found: dict[str, Path] = {}
    for seed, (name, text) in enumerate(TEXTS.items()):
        made = tokenizer(kind, text=text, added=SHARED[name])
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(made), bos_token_id=0, eos_token_id=1, pad_token_id=2, **SMALL)
        found[name] = save(root / name, LlamaForCausalLM(config), made)
    return found


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models for tests that no kind of tokenizer decides."""
    return make(tmp_path_factory.mktemp("words"), "wordpiece")


def by_token(folder: Path) -> dict[str, Tensor]:
    rows = load_file(folder / "model.safetensors")[EMBEDDING]
    return {token: rows[row] for token, row in AutoTokenizer.from_pretrained(folder).get_vocab().items()}


def recipe(models: dict[str, Path], method: str = "linear", base: bool = False, **asked: Any) -> dict[str, Any]:
    made = {"merge_method": method, "models": [str(models["one"]), str(models["two"])], "dtype": "float32"}
    made |= {"base_model": str(models["base"])} if base else {}
    return made | {"tokenizer": {"source": "union", **asked}}


def assert_rows(out: Path, wanted: dict[str, Tensor]) -> None:
    found = by_token(out)
    assert found.keys() == wanted.keys()
    for token, row in wanted.items():
        assert torch.allclose(found[token], row, atol=1e-6), token


def test_a_token_of_one_model_alone_has_its_row(tmp_path: Path, models: dict[str, Path]) -> None:
    out = weldment.merge(recipe(models), tmp_path / "out").path
    one, two = by_token(models["one"]), by_token(models["two"])
    assert_rows(out, {t: (one.get(t, two.get(t)) + two.get(t, one.get(t))) / 2 for t in one.keys() | two.keys()})


def test_a_token_that_a_model_lacks_has_the_row_of_the_base(tmp_path: Path, models: dict[str, Path]) -> None:
    """Task arithmetic: base + (one - base) + (two - base); the base lacks a token: the holder's row, or the mean."""
    out = weldment.merge(recipe(models, "task_arithmetic", base=True), tmp_path / "out").path
    base, one, two = (by_token(models[name]) for name in ("base", "one", "two"))
    wanted: dict[str, Tensor] = {}
    for token in base.keys() | one.keys() | two.keys():
        holders = [rows[token] for rows in (one, two) if token in rows]
        lent = base[token] if token in base else torch.stack(holders).mean(0)
        wanted[token] = one.get(token, lent) + two.get(token, lent) - lent
    assert_rows(out, wanted)


@pytest.mark.parametrize("source", ["base", "one", "two"])
def test_the_vocabulary_is_that_of_the_model_named(tmp_path: Path, words: dict[str, Path], source: str) -> None:
    asked = source if source == "base" else str(words[source])
    out = weldment.merge(recipe(words, base=True, source=asked), tmp_path / "out").path
    found, own = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (out, words[source]))
    assert found == own


def test_legacy_tokenizer_source(tmp_path: Path, words: dict[str, Path]) -> None:
    legacy = recipe(words)
    del legacy["tokenizer"]
    out = weldment.merge({**legacy, "tokenizer_source": "union"}, tmp_path / "legacy").path
    same = weldment.merge(recipe(words), tmp_path / "now").path
    assert (out / "tokenizer.json").read_bytes() == (same / "tokenizer.json").read_bytes()
    assert (out / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


@pytest.mark.parametrize("wanted", ["model", "token", "token_id", "zero"])
@pytest.mark.parametrize("force", [False, True])
def test_tokens_of_the_recipe(tmp_path: Path, words: dict[str, Path], wanted: str, force: bool) -> None:
    """A model without the token gets the row that the recipe names; forced, every model does."""
    one, two = by_token(words["one"]), by_token(words["two"])
    named = {"kind": "model_token", "model": str(words["two"])}
    row = AutoTokenizer.from_pretrained(words["two"]).get_vocab()["<s>"]
    source, given = {
        "model": (str(words["one"]), one["<|one|>"]),
        "token": ({**named, "token": "<s>"}, two["<s>"]),
        "token_id": ({**named, "token_id": row}, two["<s>"]),
        "zero": ({"kind": "zero"}, torch.zeros(8)),
    }[wanted]
    tokens = {"<|one|>": {"source": source, "force": force}}
    out = weldment.merge(recipe(words, tokens=tokens), tmp_path / "out").path
    own = given if force else one["<|one|>"]
    assert torch.allclose(by_token(out)["<|one|>"], (own + given) / 2, atol=1e-6)


def test_a_token_that_no_model_has_is_added(tmp_path: Path, words: dict[str, Path]) -> None:
    source = {"kind": "model_token", "model": str(words["one"]), "token": "<s>"}
    out = weldment.merge(recipe(words, tokens={"<|new|>": {"source": source}}), tmp_path / "out").path
    assert torch.allclose(by_token(out)["<|new|>"], by_token(words["one"])["<s>"], atol=1e-6)
    assert AutoTokenizer.from_pretrained(out).tokenize("the<|new|>cat").count("<|new|>") == 1


def test_rows_are_padded_to_a_multiple(tmp_path: Path, words: dict[str, Path]) -> None:
    out = weldment.merge(recipe(words, pad_to_multiple_of=64), tmp_path / "out").path
    rows = load_file(out / "model.safetensors")[EMBEDDING]
    assert len(rows) % 64 == 0
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(rows)
    assert not rows[len(AutoTokenizer.from_pretrained(out)) :].any()


def refused(tmp_path: Path, content: dict[str, Any]) -> str:
    """What `weld merge` says, in one line; nothing is written."""
    out = tmp_path / "out"
    result = weld("merge", write_recipe(tmp_path / "r.yml", content), out)
    assert result.code == 2, result.out + result.err
    assert not out.exists()
    return " ".join(result.err.split())


def without_tokenizer(root: Path, models: dict[str, Path], *names: str) -> dict[str, Path]:
    """The models, those of these names without tokenizers."""
    found = dict(models)
    for name in names:
        found[name] = root / name
        found[name].mkdir()
        for file in ("config.json", "model.safetensors"):
            (found[name] / file).write_bytes((models[name] / file).read_bytes())
    return found


def test_models_without_tokenizers_are_named_together(tmp_path: Path, words: dict[str, Path]) -> None:
    said = refused(tmp_path, recipe(without_tokenizer(tmp_path, words, "one", "two")))
    assert said.count("has no tokenizer") == 2


@pytest.mark.parametrize(
    ("asked", "words_said"),
    [
        ({"tokens": {"<|gone|>": {"source": "ONE"}}}, ["<|gone|>", "No model has this token"]),
        ({"tokens": {"<s>": {"force": True}}}, ["<s>"]),
        ({"tokens": {"<s>": {"source": "models/none"}}}, ["models/none", "Name one of"]),
        (
            {"tokens": {"<s>": {"source": {"kind": "model_token", "model": "ONE", "token_id": 99999}}}},
            ["has no row 99999"],
        ),
        ({"pad_to_multiple_of": 0}, ["pad_to_multiple_of"]),
        ({"source": "models/none"}, ["models/none is not among the models", "tokenizer.source"]),
        ({"source": "base"}, ["no `base_model`"]),
    ],
)
def test_wishes_that_cannot_be_met(
    tmp_path: Path, words: dict[str, Path], asked: dict[str, Any], words_said: list[str]
) -> None:
    asked = json.loads(json.dumps(asked).replace("ONE", str(words["one"])))
    said = refused(tmp_path, recipe(words, **asked))
    for word in words_said:
        assert word in said


def test_a_template_that_does_not_parse(tmp_path: Path, words: dict[str, Path]) -> None:
    said = refused(tmp_path, {**recipe(words), "chat_template": "{% for message in messages %}{{ message }"})
    assert "chat_template" in said


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ids_beyond_the_rows_are_found_before_the_merge(tmp_path: Path, words: dict[str, Path], name: str) -> None:
    """An id one beyond the last row, as of a padding token that was never given a row."""
    one = shutil.copytree(words["one"], tmp_path / "one")
    content = json.loads((one / name).read_text())
    (one / name).write_text(json.dumps({**content, "pad_token_id": 4321}))
    with pytest.raises(PlanError, match=rf"{name} says pad_token_id 4321, and .* rows. Correct it in {one};"):
        weldment.plan(recipe({**words, "one": one}))


@pytest.fixture
def slow(tmp_path: Path, words: dict[str, Path]) -> dict[str, Path]:
    """The models, the first with a vocab.txt as older BERTs have it and no tokenizer.json."""
    found = without_tokenizer(tmp_path, words, "one")
    vocab = AutoTokenizer.from_pretrained(words["one"]).get_vocab()
    (found["one"] / "vocab.txt").write_text("\n".join(sorted(vocab, key=lambda token: vocab[token])) + "\n")
    roles = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    settings = {"tokenizer_class": "BertTokenizer", "mask_token": "<unk>", **roles}
    (found["one"] / "tokenizer_config.json").write_text(json.dumps(settings))
    return found


def test_a_slow_tokenizer_is_converted(tmp_path: Path, slow: dict[str, Path], words: dict[str, Path]) -> None:
    out = weldment.merge(recipe(slow), tmp_path / "out").path
    same = weldment.merge(recipe(words), tmp_path / "fast").path
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(same).get_vocab()
    assert torch.equal(*(load_file(folder / "model.safetensors")[EMBEDDING] for folder in (out, same)))


def test_a_slow_tokenizer_needs_transformers(
    tmp_path: Path, slow: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    said = refused(tmp_path, recipe(slow))
    assert "has a slow tokenizer only" in said
    assert "weldment[eval]" in said


def test_a_slow_tokenizer_keeps_what_its_class_says(tmp_path: Path, slow: dict[str, Path]) -> None:
    """A BERT tells pairs of texts apart by type ids; templates of several names are all kept."""
    settings = json.loads((slow["one"] / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": "{{ tools }}"}]
    settings |= {"chat_template": templates, "padding_side": "left"}
    (slow["one"] / "tokenizer_config.json").write_text(json.dumps(settings))
    own = AutoTokenizer.from_pretrained(slow["one"])
    asked = recipe(slow, source=str(slow["one"]))
    made = AutoTokenizer.from_pretrained(weldment.merge(asked, tmp_path / "out").path)
    assert made.model_input_names == own.model_input_names
    assert made.padding_side == "left"
    assert made.chat_template == own.chat_template
    assert made("the cat", "the mat") == own("the cat", "the mat")


@pytest.mark.parametrize(
    "content",
    ['{"model"', "[]", '{"model": {"vocab": {}}}', '{"added_tokens": [{"content": "a", "id": 0}]}',
     '{"model": {"type": "Unigram", "vocab": [["a", 0.0], ["b"]]}}',
     '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b"}]}',
     '{"model": {"vocab": {"a": 0, "b": -1}}}', '{"model": {"vocab": {"a": 0, "b": 99999999999}}}'],
)  # fmt: skip
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, words: dict[str, Path], content: str) -> None:
    """None of its tokens would be known, and its rows would silently be those of the others."""
    damaged = without_tokenizer(tmp_path, words, "one")
    (damaged["one"] / "tokenizer.json").write_text(content)
    said = refused(tmp_path, recipe(damaged))
    assert f"{damaged['one']}" in said
    assert "its tokenizer.json" in said
