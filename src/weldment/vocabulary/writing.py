"""Writes a merged model's tokenizer, and the ids of its special tokens into the configurations."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.side_files import MORE_TEMPLATES, is_tokenizer_file, read_side_file, write_json
from weldment.vocabulary.output import Output
from weldment.vocabulary.tokenizer import SETTINGS, SPECIAL, TEMPLATE, TOKENIZER, Vocabulary, parsed, vocabulary

GENERATION = "generation_config.json"
_OF_PROCESSOR = "chat_template.json"
"""Where processors of images and text have kept their chat template."""

_READ_BY_FAST_ONES = (TOKENIZER, SETTINGS, SPECIAL, TEMPLATE, _OF_PROCESSOR)
"""What a tokenizer is loaded from that has a `tokenizer.json`; vocab.txt, merges.txt and the like repeat it."""


def write_tokenizer(folder: Path, output: Output) -> None:
    """Bring the tokenizer's files in a folder, copied from the model that it is made from, to what `output` is."""
    path = folder / TOKENIZER
    if not path.is_file() or path.read_bytes() != output.json():
        for other in folder.iterdir():
            if other.is_file() and is_tokenizer_file(other.name) and other.name not in _READ_BY_FAST_ONES:
                other.unlink()
        path.write_bytes(output.json())
    settings = folder / SETTINGS
    if not settings.is_file() or parsed(settings.read_bytes()) != output.settings:
        write_json(settings, output.settings)
    if output.has_new_template:
        _replace_templates(folder, str(output.template))


def _replace_templates(folder: Path, template: str) -> None:
    """Bring the files of chat templates to the one that is in the settings, where every transformers finds it."""
    if (folder / TEMPLATE).is_file():
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    if (folder / _OF_PROCESSOR).is_file():
        write_json(folder / _OF_PROCESSOR, {"chat_template": template})
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)


def known_tokens(model: Checkpoint) -> Vocabulary:
    """The tokens of a model with their rows; none if it has no `tokenizer.json` that tells."""
    return vocabulary(read_side_file(model, TOKENIZER) or b"")


def written_tokens(tokenizer: Checkpoint, output: Output | None) -> Vocabulary:
    """The tokens of a merge with their rows: of its vocabulary, or else of the model whose tokenizer it copies."""
    return known_tokens(tokenizer) if output is None else output.tokens


def with_token_ids(
    config: Mapping[str, Any], other: Mapping[str, Any], old: Vocabulary, new: Vocabulary
) -> dict[str, Any]:
    """A configuration with the ids of special tokens (`*_token_id`) that another one has.

    An id that the other does not state goes with its token, and is left out where that is gone.

    Args:
        old: the tokens that the ids of `config` stand for; none if they are not known, and ids stay.
        new: the tokens that the ids of `other` stand for, likewise.
    """
    nested = other.get("text_config")
    text = nested if isinstance(nested, Mapping) else {}
    stated = {**text, **other}
    moved = {row: new.get(token) for token, row in old.items()} if new else {}
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "text_config" and isinstance(value, Mapping):
            found[key] = with_token_ids(value, {**other, **text}, old, new)
        elif not key.endswith("_token_id"):
            found[key] = value
        elif key in stated:
            found[key] = stated[key]
        elif (kept := _moved(value, moved)) is not None or value is None:
            found[key] = kept
    return found


def _moved(value: Any, rows: Mapping[int, int | None]) -> Any:
    """Ids of tokens after these were moved; None if nothing is left."""
    if isinstance(value, list):
        return [row for row in (_moved(item, rows) for item in value) if row is not None] or None
    return rows.get(value, value) if isinstance(value, int) else value


def generation_config(side: Checkpoint, tokenizer: Checkpoint, new: Vocabulary) -> Mapping[str, Any]:
    """The output's `generation_config.json`: of one model, with the ids of the one that gives the tokenizer.

    Args:
        side: the model that the file is from; if it has none, the output has none.
        new: the tokens of the output.
    """
    own = parsed(read_side_file(side, GENERATION) or b"")
    if not own or tokenizer is side:
        return own
    wanted = {**tokenizer.config, **parsed(read_side_file(tokenizer, GENERATION) or b"")}
    return with_token_ids(own, wanted, known_tokens(side), new)


def write_generation_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Bring the `generation_config.json` in a folder, if there is one, to this content."""
    path = folder / GENERATION
    if content and parsed(path.read_bytes()) != content:
        write_json(path, content)
