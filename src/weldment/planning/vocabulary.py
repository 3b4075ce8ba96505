"""Whether the rows of merged embeddings mean the same tokens in all models.

Rows are merged by position. Where a token lies at different rows, that mixes tokens, and the
merge is refused. Where a row has another name (a reserved token that a chat model renamed) or only
one model gives it one, the row is still one and the same; that is only said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weldment.checkpoint.model import Checkpoint
from weldment.errors import PlanError
from weldment.planning.inputs import Inputs
from weldment.planning.roles import head_name, input_embedding

_TOKENIZER = "tokenizer.json"
_EXAMPLES = 3
Vocabulary = Mapping[str, int]
"""Token -> row."""


@dataclass(frozen=True)
class VocabularyFindings:
    """What comparing the tokenizers brought up."""

    problems: tuple[PlanError, ...] = ()
    notes: tuple[str, ...] = ()


def compare_vocabularies(inputs: Inputs) -> VocabularyFindings:
    """Compare the tokenizer of every participant with the first one's, as far as they have a `tokenizer.json`."""
    raw = {model: content for model in inputs.participants if (content := _tokenizer(inputs.models[model]))}
    if len(set(raw.values())) < 2:
        return VocabularyFindings()
    first, *others = raw
    rows = {model: vocabulary(content) for model, content in raw.items()}
    problems = (_moved(inputs, model, first, rows[model], rows[first]) for model in others)
    notes = (_renamed(model, first, rows[model], rows[first]) for model in others)
    return VocabularyFindings(tuple(filter(None, problems)), tuple(filter(None, notes)))


def _tokenizer(model: Checkpoint) -> bytes | None:
    """The content of `tokenizer.json`; it is downloaded if need be, for it decides whether the weights are wanted."""
    if _TOKENIZER not in model.side_files:
        return None
    if (path := model.side_path(_TOKENIZER)) is not None:
        return path.read_bytes()
    if model.repo is not None and model.revision is not None:
        from weldment.checkpoint.hub import fetch

        return fetch(model.repo, _TOKENIZER, model.revision).read_bytes()
    return None


def vocabulary(raw: bytes) -> Vocabulary:
    """The tokens of a `tokenizer.json` with their rows; empty if the file does not tell."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return {token: row for token, row in _tokens(content) if isinstance(token, str) and isinstance(row, int)}


def _tokens(content: Any) -> Iterator[tuple[Any, Any]]:
    """Tokens and rows: of the model, then those that were added to it."""
    if not isinstance(content, dict):
        return
    model = content.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, dict):
        yield from listed.items()
    elif isinstance(listed, list):
        # Unigram models list [token, score] in the order of the rows.
        yield from ((pair[0], row) for row, pair in enumerate(listed) if isinstance(pair, list) and pair)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")


def _moved(inputs: Inputs, model: str, first: str, own: Vocabulary, other: Vocabulary) -> PlanError | None:
    moved = [token for token, row in own.items() if other.get(token, row) != row]
    if not moved:
        return None
    listing = ", ".join(f"{token!r} (row {own[token]} and {other[token]})" for token in moved[:_EXAMPLES])
    tensors = inputs.tensors[first]
    names = [name for name in (input_embedding(tensors), head_name(tensors)) if name]
    return PlanError(
        f"different vocabularies: {len(moved)} tokens lie at other rows in {model} than in {first}: {listing}",
        where=inputs.recipe.origin,
        fix="Merging rows by position would mix different tokens, and this version does not align vocabularies; "
        f"take what has a row for each token from one model: `take: {json.dumps(dict.fromkeys(names, first))}`",
    )


def _renamed(model: str, first: str, own: Vocabulary, other: Vocabulary) -> str | None:
    there = {row: token for token, row in other.items()}
    renamed = [token for token, row in own.items() if there.get(row, token) != token and token not in other]
    if not renamed:
        return None
    listing = ", ".join(f"{there[own[token]]!r} is {token!r} in {model}" for token in renamed[:_EXAMPLES])
    return f"{len(renamed)} rows of the embeddings have another token in {model} than in {first}: {listing}"
