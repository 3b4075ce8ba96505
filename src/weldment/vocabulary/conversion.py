"""Tokenizers that have only their older files (vocab.txt, merges.txt, SentencePiece): converted by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.side_files import side_file
from weldment.errors import CheckpointError
from weldment.vocabulary.tokenizer import Tokenizer

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
    settings = {**roles, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": made.model_max_length}
    template = made.chat_template if isinstance(made.chat_template, str) else None
    return Tokenizer(model.reference, raw, settings | ({"chat_template": template} if template else {}), roles)


def _folder(model: Checkpoint, names: Sequence[str]) -> Path:
    """Where the files lie; those on the Hub are downloaded."""
    paths = [path for name in (*names, "config.json") if (path := side_file(model, name)) is not None]
    return paths[0].parent


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
