"""Writes a merged model's tokenizer, and the ids of its special tokens into the configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.side_files import is_tokenizer_file, read_side_file, write_json
from weldment.vocabulary.output import Output
from weldment.vocabulary.tokenizer import SETTINGS, SPECIAL, TEMPLATE, TOKENIZER, parsed

GENERATION = "generation_config.json"
_READ_BY_FAST_ONES = (TOKENIZER, SETTINGS, SPECIAL, TEMPLATE)
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
    if output.chat_template != output.start.template:
        # Every version of transformers finds the template in the settings.
        (folder / TEMPLATE).unlink(missing_ok=True)


def with_token_ids(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the ids of special tokens (`*_token_id`) that another one has."""
    ids = {key: value for key, value in other.items() if key.endswith("_token_id") and key in config}
    nested = {
        key: with_token_ids(value, other.get(key) or other)
        for key, value in config.items()
        if key == "text_config" and isinstance(value, Mapping)
    }
    return {**config, **ids, **nested}


def write_generation_config(folder: Path, tokenizer: Checkpoint) -> None:
    """Give the `generation_config.json` in a folder, if there is one, the ids of the model that gives the tokenizer."""
    path = folder / GENERATION
    if not path.is_file():
        return
    own = parsed(path.read_bytes())
    wanted = {**tokenizer.config, **parsed(read_side_file(tokenizer, GENERATION) or b"")}
    if (changed := with_token_ids(own, wanted)) != own:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
