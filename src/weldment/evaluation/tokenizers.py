"""Whether models take texts apart in the same way: merges of models that do not, cannot be compared with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from weldment.errors import TaskError
from weldment.planning.vocabulary import Vocabulary, vocabulary

_SHOWN = 3


def refuse_different(folders: Mapping[str, Path | None]) -> None:
    """Compare the tokenizers of all models with the first one's, as far as they lie in files that tell their tokens.

    Args:
        folders: of the models, by their names.

    Raises:
        TaskError: the same token has another row, or texts are normalised differently.
    """
    known = {name: content for name, folder in folders.items() if folder and (content := _content(folder))}
    if not known:
        return
    first, *others = known
    for name in others:
        difference = _difference(known[name], known[first])
        if difference is not None:
            fix = "Compare models that were fine-tuned from one base, each with the base's tokenizer beside it"
            raise TaskError(f"has another tokenizer than {first}: {difference}", where=name, fix=fix)


def _content(folder: Path) -> tuple[Vocabulary, object] | None:
    """Rows by token, and how texts are normalised where that is said."""
    whole, words = folder / "tokenizer.json", folder / "vocab.txt"
    if whole.is_file():
        raw = whole.read_bytes()
        rows = vocabulary(raw)
        return (rows, json.loads(raw).get("normalizer")) if rows else None
    if words.is_file():
        lines = words.read_text(encoding="utf-8").splitlines()
        return {token: row for row, token in enumerate(lines)}, None
    return None


def _difference(own: tuple[Vocabulary, object], other: tuple[Vocabulary, object]) -> str | None:
    moved = [token for token, row in own[0].items() if other[0].get(token, row) != row]
    if moved:
        listing = ", ".join(f"{token!r} is {own[0][token]} and {other[0][token]}" for token in moved[:_SHOWN])
        return f"{len(moved)} tokens have other numbers: {listing}"
    if own[1] != other[1] and own[1] is not None and other[1] is not None:
        return "it normalises texts differently"
    return None
