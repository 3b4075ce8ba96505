"""Whether the rows of embeddings mean the same tokens in all models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weldment.checkpoint.model import Checkpoint
from weldment.errors import PlanError
from weldment.planning.inputs import Inputs

_TOKENIZER = "tokenizer.json"
Vocabulary = Mapping[str, int]


def vocabulary_problems(inputs: Inputs, merged: bool) -> list[PlanError]:
    """One problem for each model whose tokens lie at other rows than the reference's.

    Args:
        inputs: the models of the merge.
        merged: whether token embeddings are merged at all (not taken from one model).
    """
    if not merged:
        return []
    files = {model: path for model in inputs.participants if (path := _tokenizer_file(inputs.models[model]))}
    if len(files) < 2:
        return []
    first = inputs.reference if inputs.reference in files else next(iter(files))
    raw = {model: path.read_bytes() for model, path in files.items()}
    return [
        problem
        for model in files
        if model != first and raw[model] != raw[first]
        if (problem := _difference(inputs, model, first, vocabulary(raw[model]), vocabulary(raw[first]))) is not None
    ]


def _tokenizer_file(model: Checkpoint) -> Path | None:
    if _TOKENIZER not in model.side_files:
        return None
    if model.root is not None:
        return model.root / _TOKENIZER
    if model.repo is None or model.revision is None:
        return None
    from weldment.checkpoint.hub import fetch

    return fetch(model.repo, _TOKENIZER, model.revision)


def vocabulary(raw: bytes) -> Vocabulary:
    """Token -> row, from the content of a `tokenizer.json`; empty if it cannot be told."""
    try:
        content = json.loads(raw)
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    listed: Any = (content.get("model") or {}).get("vocab")
    rows: dict[str, int] = {}
    if isinstance(listed, dict):
        rows.update(listed)
    elif isinstance(listed, list):  # Unigram: [token, score] pairs in the order of their rows
        rows.update({pair[0]: row for row, pair in enumerate(listed)})
    rows.update({token["content"]: token["id"] for token in content.get("added_tokens") or ()})
    return rows


def _difference(inputs: Inputs, model: str, first: str, own: Vocabulary, other: Vocabulary) -> PlanError | None:
    if not own or not other:
        return None
    moved = [token for token in own if own[token] != other.get(token)]
    gone = [token for token in other if token not in own]
    if not moved and not gone:
        return None
    examples = "; ".join(_place(token, own.get(token), other.get(token), model, first) for token in [*moved, *gone][:3])
    return PlanError(
        f"different vocabularies: {len(moved) + len(gone)} tokens of {model} and {first} differ: {examples}",
        where=f"{inputs.recipe.origin}: {'tokenizer' if inputs.recipe.tokenizer else 'models'}",
        fix="Rows would be mixed that mean different tokens, and aligning them is not supported in this version; "
        'take the embeddings (and the head) from one model: `take: {"*embed_tokens*": MODEL}`',
    )


def _place(token: str, own: int | None, other: int | None, model: str, first: str) -> str:
    if own is None or other is None:
        return f"{token!r} is only in {model if other is None else first}"
    return f"{token!r} is row {own} in {model} and {other} in {first}"
