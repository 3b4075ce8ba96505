"""`weldment.json`: how an output was made, and how to tell that it still is what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from weldment.checkpoint.staging import MANIFEST
from weldment.errors import UserError
from weldment.planning.plan import Plan
from weldment.version import __version__

FORMAT = 1


def manifest(plan: Plan, checksums: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Any]:
    """The manifest's content; the same for every run of the same plan with the same versions.

    Args:
        checksums: of every tensor, by `file|name`.
        files: SHA-256 of every other file of the output, and of the weight files' headers.
    """
    return {
        "format": FORMAT,
        "versions": {"weldment": __version__, "torch": torch.__version__, "numpy": numpy.__version__},
        "plan": plan.hash,
        "recipe": recipes(plan),
        "seed": plan.recipe.seed,
        "inputs": inputs(plan),
        "notes": list(plan.notes),
        "tensors": dict(sorted(checksums.items())),
        "files": dict(sorted(files.items())),
        "ledger": ledger(plan),
    }


def recipes(plan: Plan) -> list[Mapping[str, Any]]:
    """The recipe's documents, intermediate merges first."""
    return [document for stage in plan.stages for document in recipes(stage)] + [plan.recipe.source]


def ledger(plan: Plan) -> dict[str, dict[str, dict[str, str]]]:
    """By model and fate: the tensors, each with the detail that the ledger gives, mostly none."""
    account: dict[str, dict[str, dict[str, str]]] = {}
    for entry in plan.ledger:
        account.setdefault(entry.model, {}).setdefault(entry.fate, {})[entry.tensor] = entry.detail
    for stage in plan.stages:
        account.update({f"{stage.recipe.name}/{model}": fates for model, fates in ledger(stage).items()})
    return account


def inputs(plan: Plan) -> dict[str, Any]:
    """By model: revision and files, with size, and SHA-256 where it was known for free."""
    found: dict[str, Any] = {}
    for stage in plan.stages:
        found.update(inputs(stage))
    stages = {stage.recipe.name for stage in plan.stages}
    for reference, model in plan.models.items():
        if reference in stages:
            continue
        files = [
            {"name": file.name, "size": file.size, **({"sha256": file.sha256} if file.sha256 else {})}
            for file in model.weight_files
        ]
        found[reference] = {**({"revision": model.revision} if model.revision else {}), "files": files}
    return found


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `weldment.json`."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        UserError: there is none, or it is not one.
    """
    path = out / MANIFEST
    fix = "Give a folder that `weld merge` wrote"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {MANIFEST} here", where=str(out), fix=fix) from error
    except (OSError, ValueError) as error:
        raise UserError(f"the manifest cannot be read: {error}", where=str(path), fix=fix) from error
    parts = [content.get(key) for key in ("tensors", "files")] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) and all(isinstance(text, str) for text in part.values()) for part in parts):
        raise UserError("this is not the manifest of a merge", where=str(path), fix=fix)
    return content


def file_digest(path: Path, limit: int | None = None) -> str:
    """SHA-256 of a file, or of its first `limit` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size if limit is None else limit
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
