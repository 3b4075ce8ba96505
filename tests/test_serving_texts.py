"""Text as it is written: pieces add up, characters stay whole, stop strings never show."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weldment.serving.texts import StopSearch, Transcript


def from_bytes(tokens: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


def from_words(tokens: Sequence[int]) -> str:
    """A tokenizer that puts spaces between words."""
    return " ".join(f"w{token}" for token in tokens)


@given(st.text(max_size=20), st.text(max_size=8))
def test_pieces_add_up_to_the_text_after_the_prompt(text: str, prompt: str) -> None:
    transcript = Transcript(from_bytes, prompt.encode()[:0])
    pieces = [transcript.push(byte) for byte in text.encode()]
    assert "".join(pieces) + transcript.rest() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 9), max_size=12))
def test_the_first_word_is_separated_from_the_prompt(prompt: list[int], tokens: list[int]) -> None:
    transcript = Transcript(from_words, prompt)
    text = "".join(transcript.push(token) for token in tokens) + transcript.rest()
    assert from_words(prompt) + text == from_words(prompt + tokens)


def test_a_character_that_never_ends_comes_last() -> None:
    transcript = Transcript(from_bytes, [])
    assert [transcript.push(byte) for byte in "é".encode()[:1]] == [""]
    assert transcript.rest() == "\N{REPLACEMENT CHARACTER}"
    assert transcript.rest() == ""


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=4))
def test_what_passes_is_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    search = StopSearch(stops)
    passed = "".join(map(search.push, pieces)) + search.rest()
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert search.found == bool(places)
    if not places:
        assert passed == whole
    else:
        # A longer stop string may have begun earlier than the one that was complete first.
        assert whole.startswith(passed)
        assert not any(stop in passed for stop in stops)
        assert any(whole[len(passed) :].startswith(stop) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["one", " tw", "o"], ["one", "", ""]),
        (["one", " tw", "elve"], ["one", "", " twelve"]),
        ([" two three"], [""]),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(pieces: list[str], expected: list[str]) -> None:
    search = StopSearch([" two"])
    assert [search.push(piece) for piece in pieces] == expected
    assert search.push("more") == ("" if search.found else "more")
