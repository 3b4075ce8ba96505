"""The files of a model that are not weights: which ones an output gets.

Generation config, pooling modules, licence, custom code: all come from the model that also gives
the configuration and the tensors' names, so that they fit each other. The files of the tokenizer,
with its chat template, come from the model that gives the rows of the embeddings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from weldment.checkpoint.model import Checkpoint

TOKENIZER = (
    "tokenizer*",
    "vocab.*",
    "vocab*.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece*.model",
    "spm.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.*",
)
"""Names of the files that a tokenizer consists of."""

MORE_TEMPLATES = "additional_chat_templates"
"""The folder of chat templates by other names than the usual one."""


def copy_side_files(folder: Path, side: Checkpoint, tokenizer: Checkpoint) -> None:
    """Copy the side files of one model, with the tokenizer of another (or the same) one."""
    chosen = dict.fromkeys(side.side_files, side)
    if tokenizer is not side:
        chosen = {name: model for name, model in chosen.items() if not is_tokenizer_file(name)}
        chosen |= {name: tokenizer for name in tokenizer.side_files if is_tokenizer_file(name)}
    for name, model in chosen.items():
        if (path := model.side_path(name)) is not None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def side_file(model: Checkpoint, name: str) -> Path | None:
    """Where a side file of a model lies; it is downloaded if need be. None if the model has none of that name."""
    if name not in model.side_files:
        return None
    if (path := model.side_path(name)) is not None:
        return path
    if model.repo is None or model.revision is None:
        return None
    # Only models on the Hub need its library.
    from weldment.checkpoint.hub import fetch

    return fetch(model.repo, name, model.revision)


def read_side_file(model: Checkpoint, name: str) -> bytes | None:
    """The content of a side file; None if the model has none of that name."""
    path = side_file(model, name)
    return None if path is None else path.read_bytes()


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file belongs to the tokenizer."""
    path = PurePosixPath(name)
    if path.parts[0] in (MORE_TEMPLATES, "chat_templates"):
        return True
    return len(path.parts) == 1 and any(fnmatchcase(name, pattern) for pattern in TOKENIZER)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as the Hub's tools do: two spaces, UTF-8, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
