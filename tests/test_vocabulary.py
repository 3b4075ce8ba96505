"""Tokens that lie at the same or at different rows of the embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import folders
import models
from weldment import PlanError, plan
from weldment.planning.vocabulary import vocabulary


def tokenizer(*tokens: str, added: dict[str, int] | None = None) -> str:
    vocab = {token: row for row, token in enumerate(tokens)}
    listed = [{"content": token, "id": row} for token, row in (added or {}).items()]
    return json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": listed})


def save(path: Path, text: str, seed: int = 0) -> Path:
    files = {"tokenizer.json": text}
    return models.save_state(path, models.decoder_state(seed=seed), models.decoder_config(), **files)


def test_equal_vocabularies_are_no_matter(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", tokenizer("x", "y")), save(tmp_path / "b", tokenizer("x", "y") + " ", 1)
    assert plan(models.recipe("linear", first, second)).notes == ()


def test_tokens_at_other_rows_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", tokenizer("x", "y", "z")), save(tmp_path / "b", tokenizer("y", "x", "z"), 1)
    recipe = models.recipe("linear", first, second)
    with pytest.raises(PlanError, match=r"different vocabularies: 2 tokens lie at other rows") as error:
        plan(recipe)
    assert "'y' (row 0 and 1)" in str(error.value)
    advice = json.loads(str(error.value).partition("`take: ")[2].partition("`")[0])
    planned = plan({**recipe, "take": advice})
    assert planned.tokenizer.reference == str(first)
    aligned = plan({**recipe, "tokenizer": {"source": "union"}})
    assert any(note.endswith(f"{second}: 1 tokens stay at their rows, 2 move") for note in aligned.notes)


def test_tokens_of_one_model_alone_are_refused_with_what_union_and_base_would_do(tmp_path: Path) -> None:
    first = save(tmp_path / "a", tokenizer("x", added={"<reserved_0>": 1}))
    second = save(tmp_path / "b", tokenizer("x", added={"<|im_start|>": 1, "<|more|>": 2}), 1)
    with pytest.raises(PlanError, match=r"2 tokens are in .*b alone: '<\|im_start\|>' \(row 1\)") as error:
        plan(models.recipe("linear", first, second))
    assert f"1 tokens are in {first} alone: '<reserved_0>' (row 1)" in str(error.value)
    assert f"`tokenizer: {{source: {first}}}` those of {first} and leave 2 tokens out" in str(error.value)


def test_vocabularies_of_other_sizes_are_explained_by_their_tokens(tmp_path: Path) -> None:
    first = folders.write_model(tmp_path / "a", vocabulary=16)
    second = folders.write_model(tmp_path / "b", 1, vocabulary=20)
    for model, tokens in ((first, "xy"), (second, "xyz")):
        (model / "tokenizer.json").write_text(tokenizer(*tokens))
    recipe = {"merge_method": "linear", "models": [str(first), str(second)]}
    with pytest.raises(PlanError, match=r"1 tokens are in .*b alone: 'z' \(row 2\)"):
        plan(recipe)
    for model in (first, second):
        (model / "tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"different vocabularies: tensor .*embed_tokens.*for which the models need"):
        plan(recipe)


def test_a_damaged_tokenizer_does_not_hide_that_others_differ(tmp_path: Path) -> None:
    texts = {"a": "{", "b": tokenizer("x", "y"), "c": tokenizer("y", "x")}
    inputs = [save(tmp_path / name, text, seed) for seed, (name, text) in enumerate(texts.items())]
    with pytest.raises(PlanError, match=r"different vocabularies: 2 tokens lie at other rows in .*c than in .*b"):
        plan(models.recipe("linear", *inputs))


def test_model_that_gives_only_files_is_not_compared(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tokenizer("y", "x"))
    inputs = [save(tmp_path / name, tokenizer("x", "y"), seed) for seed, name in enumerate("ab")]
    assert plan(models.recipe("linear", *inputs, base=base)).counts()["merged"] > 0


def test_stacks_of_layers_do_not_merge_embeddings(tmp_path: Path) -> None:
    inputs = [save(tmp_path / name, text) for name, text in (("a", tokenizer("x", "y")), ("b", tokenizer("y", "x")))]
    pieces = [{"sources": [{"model": str(model), "layer_range": [0, 1]}]} for model in inputs]
    assert plan({"merge_method": "passthrough", "slices": pieces}).notes == ()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model": {"vocab": {"a": 0, "b": 1}}}, {"a": 0, "b": 1}),
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, {"a": 0, "b": 1}),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<s>", "id": 7}]}, {"a": 0, "<s>": 7}),
        ({"model": None, "added_tokens": None}, {}),
        ({"model": {"vocab": {"a": "zero"}}, "added_tokens": [3, {"id": 1}]}, {}),
        ([], {}),
    ],
)
def test_rows_of_a_tokenizer(content: Any, expected: dict[str, int]) -> None:
    assert vocabulary(json.dumps(content).encode()) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "vocab", "added_tokens", "content", "id"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(content=JSON)
def test_any_json_is_read(content: Any) -> None:
    rows = vocabulary(json.dumps(content).encode())
    assert all(isinstance(token, str) for token in rows)


@given(raw=st.binary(max_size=40))
def test_any_bytes_are_read(raw: bytes) -> None:
    assert isinstance(vocabulary(raw), dict)
