"""From the name of an adapter to what is known of it before its weights are read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from weldment.adapters.adapter import WEIGHTS, Adapter, read_layers
from weldment.adapters.config import ADAPTER_CONFIG, parse_config
from weldment.checkpoint.local import Folder, folder_source, is_weights, tensor_entries, weight_file
from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.opening import HUB_ID, exists, local_first, open_checkpoint, placed
from weldment.errors import CheckpointError, HubError


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
    """The adapter that a reference names, or None if it names something else (a model, or nothing that can be found).

    Args:
        reference: a folder, or `org/name` or `org/name@revision` on the Hugging Face Hub.

    Raises:
        CheckpointError: it is an adapter that is damaged or cannot be merged.
    """
    path = _adapter_path(reference)
    if exists(path):
        return open_adapter_folder(path, reference) if is_adapter_folder(path) else None
    try:
        return _on_the_hub(reference)
    except HubError:
        return None


def open_adapter(reference: str) -> Adapter:
    """The adapter that a reference names.

    Raises:
        CheckpointError: there is none, or it is damaged or cannot be merged.
        HubError: the Hub does not give access to it.
    """
    path = _adapter_path(reference)
    if (path / ADAPTER_CONFIG).is_file():
        return open_adapter_folder(path, reference)
    fix = "After the + of base+adapter, name a PEFT folder or org/name on the Hub"
    if exists(path):
        raise CheckpointError(f"is not an adapter: it has no {ADAPTER_CONFIG}", where=reference, fix=fix)
    with local_first(path):
        found = _on_the_hub(reference)
    if found is None:
        raise CheckpointError(f"there is no adapter {reference!r}", fix=fix)
    return found


def open_model(reference: str, *, where: str | None = None, stages: Collection[str | None] = ()) -> Checkpoint:
    """A model, with adapters applied to it where the reference is `base+adapter`.

    Args:
        reference: what `open_checkpoint` takes, or a base and one or more adapters joined by `+`. A `+` that
            belongs to the name of an existing file or folder joins nothing.
        where: the place in the recipe that names the model, for messages.
        stages: names of intermediate merges, to which adapters cannot be applied.

    Raises:
        CheckpointError: there is no such model or adapter, or they do not fit together.
        HubError: the Hub does not give access to one of them.
    """
    base, *adapters = split_reference(reference)
    if not adapters:
        return open_checkpoint(reference, where=where)
    try:
        if not all((base, *adapters)):
            fix = "Write base+adapter, or base+adapter+adapter"
            raise CheckpointError(f"{reference!r} lacks the base or an adapter", fix=fix)
        if base in stages:
            fix = f"Write the result of {base} to a folder in a merge of its own, and name that"
            raise CheckpointError(f"{base} is an intermediate merge, to which no adapter can be applied", fix=fix)
        # Most recipes name no adapters.
        from weldment.adapters.applying.application import apply

        return apply(open_checkpoint(base), [open_adapter(adapter) for adapter in adapters], reference)
    except CheckpointError as error:
        raise placed(error, where) from error


def split_reference(reference: str) -> list[str]:
    """The base and the adapters of a reference; the longest part that exists on this machine is one name."""
    pieces = reference.split("+")
    parts: list[str] = []
    while pieces:
        lengths = (n for n in range(len(pieces), 1, -1) if exists(Path("+".join(pieces[:n])).expanduser()))
        length = next(lengths, 1)
        parts.append("+".join(pieces[:length]))
        pieces = pieces[length:]
    return parts


def _adapter_path(reference: str) -> Path:
    """The folder that a reference would be; its file of weights stands for it."""
    path = Path(reference).expanduser()
    return path.parent if path.name in WEIGHTS else path


def _on_the_hub(reference: str) -> Adapter | None:
    match = HUB_ID.fullmatch(reference)
    if match is None or is_weights(reference) or "+" in reference:
        return None
    # Only adapters on the Hub need its library, which takes longer to import than to open a folder.
    from weldment.checkpoint.hub_adapters import fetch_adapter

    found = fetch_adapter(match["repo"], match["revision"], WEIGHTS)
    if found is None:
        return None
    folder, commit = found
    return open_adapter_folder(folder, reference, repo=match["repo"], revision=commit)
