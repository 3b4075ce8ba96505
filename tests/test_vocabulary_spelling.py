"""Tokens of one spelling in another."""

from __future__ import annotations

import json

from weldment.vocabulary.spelling import respelled
from weldment.vocabulary.tokenizer import Tokenizer


def pieces(*tokens: str) -> Tokenizer:
    """SentencePiece's spelling, as Llama 2 has it: bytes first, then text."""
    vocab = {token: row for row, token in enumerate(tokens)}
    content = {"model": {"type": "BPE", "vocab": vocab}, "decoder": {"type": "Metaspace"}}
    return Tokenizer("pieces", json.dumps(content).encode())


def test_a_letter_is_not_the_byte_that_spells_it_where_there_is_a_letter() -> None:
    made = pieces("<0x0A>", "<0x41>", "<0xC3>", "\u2581the", "A", "\u00e9")
    assert respelled(made, "bytes") == {
        "\u010a": 0,
        "A": 4,
        "\u00c3": 2,
        "\u0120the": 3,
        "\u00c3\u00a9": 5,
    }


def test_bytes_stand_for_letters_that_are_no_tokens() -> None:
    assert respelled(pieces("<0x41>", "B"), "bytes") == {"A": 0, "B": 1}


def test_equal_spellings_stay() -> None:
    assert respelled(pieces("<0x41>", "A"), "pieces") == {"<0x41>": 0, "A": 1}
