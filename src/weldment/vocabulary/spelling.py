"""One text in two spellings: byte-level tokens (`Ġthe`, `Ã©`) and SentencePiece's (`▁the`, `é`, `<0xC3>`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from weldment.vocabulary.tokenizer import Spelling, Tokenizer

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache
def _characters() -> tuple[str, ...]:
    """The character that stands for each byte in byte-level tokens: itself if it is printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


@lru_cache
def _bytes() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_characters())}


def respelled(tokenizer: Tokenizer, target: Spelling) -> Mapping[str, int]:
    """The tokens of a tokenizer with their rows, spelled as another tokenizer does; added tokens stay as they are.

    Only byte-level and SentencePiece spellings can stand for each other. A token that has no such spelling keeps
    its own.
    """
    if {tokenizer.spelling, target} != {"bytes", "pieces"}:
        return tokenizer.tokens
    change = _as_pieces if target == "pieces" else _as_bytes
    found: dict[str, int] = {}
    # SentencePiece has a token for each byte besides those for letters: `<0x41>` is "A" only where nothing else is.
    for token, row in sorted(tokenizer.tokens.items(), key=lambda item: _BYTE.fullmatch(item[0]) is not None):
        found.setdefault(token if token in tokenizer.added else change(token), row)
    return found


def _as_pieces(token: str) -> str:
    """A byte-level token in SentencePiece's spelling."""
    known = _bytes()
    if any(character not in known for character in token):
        return token
    raw = bytes(known[character] for character in token)
    try:
        return raw.decode("utf-8").replace(" ", _SPACE)
    except UnicodeDecodeError:
        return f"<0x{raw[0]:02X}>" if len(raw) == 1 else token


def _as_bytes(token: str) -> str:
    """SentencePiece's token in byte-level spelling."""
    byte = _BYTE.fullmatch(token)
    raw = bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode("utf-8", "replace")
    characters = _characters()
    return "".join(characters[value] for value in raw)
