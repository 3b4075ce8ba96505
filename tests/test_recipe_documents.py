from __future__ import annotations

import math
import re
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weldment.errors import RecipeError
from weldment.recipe.documents import MAX_BYTES, MAX_NODES, parse_documents, plain, read_text
from weldment.recipe.words import Place

PLACE = Place("recipe")
DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_documents(text, "r.yml")
    return str(caught.value)


def test_reads_several_documents_and_leaves_out_empty_ones() -> None:
    assert parse_documents("a: 1\n---\n---\nb: [x, 2.5, true, null]\n---\n", "r.yml") == [
        {"a": 1},
        {"b": ["x", 2.5, True, None]},
    ]


def test_keys_are_text_whatever_yaml_takes_them_for() -> None:
    assert parse_documents("on: 1\n2: 2\nnull: 3\n2024-01-01: 4", "r.yml") == [
        {"on": 1, "2": 2, "null": 3, "2024-01-01": 4}
    ]


def test_dates_stay_text() -> None:
    assert parse_documents("model: 2024-01-01", "r.yml") == [{"model": "2024-01-01"}]


def test_aliases_become_separate_copies() -> None:
    """A change to one of them, as an override makes it, must not reach the other."""
    (document,) = parse_documents("a: &x {weight: 1}\nb: *x", "r.yml")
    document["a"]["weight"] = 2
    assert document["b"] == {"weight": 1}


def test_merge_keys_add_what_is_not_given() -> None:
    text = "base: &x {weight: 1, density: 0.5}\nother: &y {weight: 7, gamma: 3}\nboth: {<<: [*x, *y], density: 0.9}"
    assert parse_documents(text, "r.yml")[0]["both"] == {"weight": 1, "density": 0.9, "gamma": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "r.yml, line 3, column 1: not valid YAML: the key 'a' is given twice, first on line 1"),
        ("a: {b: 1, b: 2}", "the key 'b' is given twice"),
        ("a: &x {b: 1}\nc: {<<: *x, <<: *x}", "given twice"),
        ("a: [1,\nb: 2", "line 2, column 5: not valid YAML: while parsing a flow sequence: expected"),
        ("a: b: c", "line 1, column 5"),
        ("a: 'open", "unexpected end of stream"),
        ("a: \x07", "unacceptable character"),
        ("a: !!python/name:os.system x", "the tag 'tag:yaml.org,2002:python/name:os.system' has no meaning"),
        ("a: !!python/object/apply:os.system [x]", "has no meaning"),
        ("a: !!binary aGk=", "has no meaning"),
        ("a: !!set {x}", "has no meaning"),
        ("a: !mine x", "the tag '!mine' has no meaning"),
        ("a: !!int x", "'x' is not a valid int"),
        ("a: !!bool maybe", "'maybe' is not a valid bool"),
        ("a: !!float ''", "'' is not a valid float"),
        ("? [a]\n: 1", "a key must be text"),
        ("a: &x [*x]", "an alias stands inside the value that it repeats"),
        ("<<: 1", "`<<` takes a mapping"),
        ("a: *nowhere", "undefined alias"),
        ("a: 0x" + "f" * 17, "more than 64 bits"),
        ("a: " + "9" * 30, "more than 64 bits"),
        ("%YAML 3.0\n---\na: 1", "found incompatible YAML document"),
    ],
)
def test_refuses_with_the_place(text: str, words: str) -> None:
    assert words in refusal(text)


def bomb() -> str:
    """Nine levels of ten aliases: 10^9 values in 400 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(), f"more than {MAX_NODES} values"),
        ("[" * 500_000, "nested more than 50 deep"),
        ("{a: " * 200_000, "nested more than 50 deep"),
        ("- " * 400_000, "nested more than 50 deep"),
        ("[" + "0," * (MAX_NODES + 1) + "]", f"more than {MAX_NODES} values"),
        ("a\n---\n" * 100_000, "more than 1000 documents"),
    ],
    ids=["aliases", "lists", "mappings", "items", "values", "documents"],
)
def test_bombs_are_refused_quickly(text: str, words: str) -> None:
    start = time.process_time()
    assert words in refusal(text)
    assert time.process_time() - start < 10


def test_merge_bomb_is_refused() -> None:
    lines = ["a0: &a0 {k: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))]
    assert f"more than {MAX_NODES} values" in refusal("\n".join(lines))


def test_read_text_names_the_file_and_the_cause(tmp_path: Path) -> None:
    binary, large = tmp_path / "model.safetensors", tmp_path / "large.yml"
    binary.write_bytes(b"a: \xff\xfe")
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    for path, words in [
        (tmp_path / "none.yml", "there is no such file"),
        (tmp_path, "this is a folder"),
        (binary, "not UTF-8 text (byte 3)"),
        (large, "larger than 1000000 bytes"),
        (Path("a\0b"), "cannot be read"),
    ]:
        with pytest.raises(RecipeError, match=re.escape(words)):
            read_text(path)


def test_read_text_skips_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert parse_documents(read_text(tmp_path / "r.yml"), "r.yml") == [{"a": 1}]


def test_plain_takes_what_python_callers_have() -> None:
    given_ = {"w": (np.float32(0.5), np.int64(3), Fraction(1, 4)), "model": Path("a/b"), "on": True}
    copied = plain(given_, PLACE)
    assert copied == {"w": [0.5, 3, 0.25], "model": "a/b", "on": True}
    assert [type(item) for item in copied["w"]] == [float, int, float]


def test_plain_refuses_with_the_path() -> None:
    endless: list[object] = []
    endless.append(endless)
    for value, words in [
        ({"a": [1, {2: 3}]}, "recipe: a[1]: the key 2 is not text"),
        ({"a": {1, 2}}, "recipe: a: a value of type set has no meaning"),
        ({"a": b"x"}, "a value of type bytes"),
        ({"a": 2**64}, "recipe: a: a number that is too large"),
        ({"a": Fraction(10**400)}, "a number that is too large"),
        (endless, "nested more than 50 deep"),
        ([0] * (MAX_NODES + 1), f"more than {MAX_NODES} values"),
    ]:
        with pytest.raises(RecipeError) as caught:
            plain(value, PLACE)
        assert words in str(caught.value)


@given(DATA)
def test_plain_copies_plain_data_unchanged(data: object) -> None:
    assert plain(data, PLACE) == data


@given(st.text() | st.text(alphabet="a1:-[]{}&*!|>?<'\"#%,. \n", max_size=60))
def test_any_text_is_data_or_a_recipe_error(text: str) -> None:
    with suppress(RecipeError):
        assert all(repr(plain(document, PLACE)) == repr(document) for document in parse_documents(text, "r.yml"))


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan"])
def test_infinities_are_read_and_left_to_later_checks(text: str) -> None:
    (value,) = parse_documents(text, "r.yml")
    assert not math.isfinite(value)
