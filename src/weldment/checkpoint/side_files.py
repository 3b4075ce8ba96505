"""The files of a model that are not weights: which ones an output gets, and how they are changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weldment.checkpoint.layout import INDEX, Layout
from weldment.checkpoint.model import Checkpoint


def write_side_files(folder: Path, model: Checkpoint, config: Mapping[str, Any], layout: Layout) -> None:
    """Copy every side file of the reference model, then write the config and the index.

    Tokenizer, generation config, chat template, pooling modules, licence, custom code: all come
    from the one model that also gives the tensors' names, so that they fit each other.
    """
    if model.root is not None:
        for name in model.side_files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model.root / name, target)
    if config:
        write_json(folder / "config.json", config)
    index = layout.index()
    if index is not None:
        write_json(folder / INDEX, index)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as the Hub's tools do: two spaces, UTF-8, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
