"""From the name of an adapter to what is known of it before its weights are read."""

from __future__ import annotations

from pathlib import Path

from weldment.adapters.adapter import WEIGHTS, Adapter, read_layers
from weldment.adapters.config import ADAPTER_CONFIG, parse_config
from weldment.checkpoint.local import Folder, folder_source, tensor_entries, weight_file
from weldment.errors import CheckpointError


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder on this machine holds an adapter and no model of its own."""
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    return not any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def open_adapter_folder(path: Path, reference: str, *, repo: str | None = None, revision: str | None = None) -> Adapter:
    """An adapter in a folder on this machine.

    Args:
        path: the folder, which has an `adapter_config.json`.
        reference: how the user named it.
        repo: the Hub repo, if the folder is a snapshot of one.
        revision: the commit of that snapshot.

    Raises:
        CheckpointError: it is damaged, has no weights, or is of a kind that cannot be merged.
    """
    source = folder_source(path)
    config = parse_config(source.json(ADAPTER_CONFIG), source.place(ADAPTER_CONFIG))
    name = next((name for name in WEIGHTS if name in source.names), None)
    if name is None:
        cause = f"has no weights: none of {' and '.join(WEIGHTS)}"
        raise CheckpointError(cause, where=str(path), fix="Download or copy the file that is missing")
    file = weight_file(path / name, name)
    tensors = {entry.name: entry for entry in tensor_entries(file, path / name)}
    layers, saved = read_layers(config, tensors, str(path / name))
    return Adapter(
        reference=reference,
        config=config,
        layers=layers,
        saved=saved,
        files=(file,),
        folder=str(path),
        repo=repo,
        revision=revision,
        side_files=tuple(sorted(source.names - {ADAPTER_CONFIG, name})),
        raw_config=_raw(source),
    )


def _raw(source: Folder) -> dict[str, object]:
    content = source.json(ADAPTER_CONFIG)
    return content if isinstance(content, dict) else {}


def find_adapter(reference: str) -> Adapter | None:
    """The adapter that a reference names, or None if it names something else (a model, or nothing that exists).

    Raises:
        CheckpointError: it is an adapter that is damaged or cannot be merged.
    """
    path = Path(reference).expanduser()
    return open_adapter_folder(path, reference) if is_adapter_folder(path) else None
