"""Tokenizers that have only their older files (vocab.txt, merges.txt, SentencePiece): converted by transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.side_files import side_file
from weldment.errors import CheckpointError
from weldment.vocabulary.tokenizer import Tokenizer

_OF_CLASS = (
    "model_max_length",
    "model_input_names",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)
"""Settings that a tokenizer's class has, where its files do not say them."""

_FIX = "Save it as tokenizer.json: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"


def convert(model: Checkpoint, names: Sequence[str], where: str) -> Tokenizer:
    """The tokenizer of a model that has no `tokenizer.json`.

    Args:
        names: its tokenizer's files.
        where: what asks for it, for messages.

    Raises:
        CheckpointError: transformers is not here, or cannot convert it.
    """
    place = f"{where}: {model.reference}"
    listing = ", ".join(names)
    try:
        import transformers
    except ImportError as error:
        cause = f"has a slow tokenizer only ({listing}), and transformers, which can convert it, is not installed"
        raise CheckpointError(cause, where=place, fix=f"pip install 'weldment[eval]'. {_FIX}") from error
    folder = _folder(model, names)
    try:
        made = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        raw = made.backend_tokenizer.to_str().encode()
    except Exception as error:
        cause = f"has a slow tokenizer only ({listing}), which transformers cannot convert: {_first_line(error)}"
        raise CheckpointError(cause, where=place, fix=_FIX) from error
    roles = {name: str(value) for name, value in made.special_tokens_map.items() if isinstance(value, str)}
    settings = {**roles, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {name: value for name in _OF_CLASS if (value := getattr(made, name, None)) is not None}
    return Tokenizer(model.reference, raw, {**settings, **_templates(made.chat_template)}, roles)


def _templates(found: str | Mapping[str, str] | None) -> Mapping[str, Any]:
    """Chat templates as settings write them: one, or a list of several by name."""
    if not found:
        return {}
    several = found.items() if isinstance(found, Mapping) else ()
    return {"chat_template": [{"name": name, "template": text} for name, text in several] or found}


def _folder(model: Checkpoint, names: Sequence[str]) -> Path:
    """Where the files lie; those on the Hub are downloaded."""
    paths = [path for name in (*names, "config.json") if (path := side_file(model, name)) is not None]
    return paths[0].parent


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
