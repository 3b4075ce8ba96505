"""A model with adapters applied to it: the base's tensors with what the adapters change, known from headers alone.

Nothing is calculated here. Each changed tensor carries its changes, which the engine adds when it
reads the tensor. Every tensor of every adapter is used exactly once, or the adapter is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weldment.adapters.adapter import Adapter
from weldment.adapters.applying.changes import Change, changes
from weldment.adapters.applying.heads import with_tied_head
from weldment.adapters.applying.matching import Match, match
from weldment.adapters.applying.replacements import is_new, replacements
from weldment.checkpoint.compare import same_bytes
from weldment.checkpoint.model import Checkpoint, LowRank, TensorEntry, WeightFile
from weldment.checkpoint.side_files import is_tokenizer_file
from weldment.errors import CheckpointError
from weldment.planning.config import with_rows
from weldment.planning.roles import input_embedding

_SHOWN = 3
_APART = "Merge them as models of their own, base+one and base+other"

Tensors = Mapping[str, TensorEntry]


def apply(base: Checkpoint, adapters: Sequence[Adapter], reference: str) -> Checkpoint:
    """A base with adapters on it.

    Args:
        base: opened; its weights may still be on the Hub.
        adapters: applied together; what they add to one tensor adds up.
        reference: how the user named the whole.

    Returns:
        The base's checkpoint, whose changed tensors have `changes` or lie in the adapters' files.

    Raises:
        CheckpointError: an adapter does not fit the base, or two adapters exclude each other.
    """
    tensors = with_tied_head(base, adapters)
    owners: dict[str, str] = {}
    for adapter in adapters:
        found = match(adapter, tensors)
        _refuse_missing(base, adapter, found)
        tensors = _changed(_replaced(tensors, base, adapter, found, owners), base, adapter, found, owners)
    elsewhere = _tokenizer_files(adapters)
    return replace(
        base,
        reference=reference,
        tensors=tensors,
        weight_files=(*base.weight_files, *_used_files(tensors, adapters)),
        config=_config(base, tensors),
        side_files=tuple(sorted({*base.side_files, *elsewhere})),
        elsewhere=elsewhere,
        notes=(*base.notes, *_notes(base, adapters)),
    )


def _refuse_missing(base: Checkpoint, adapter: Adapter, found: Match) -> None:
    """CheckpointError if something of the adapter has no place in the model and is not a module of its own."""
    missing = [name for name in found.missing if not is_new(adapter, name)]
    biases = [layer.bias_tensor for layer in adapter.layers.values() if layer.bias is not None]
    if missing and set(missing) <= set(biases):
        cause = f"lora_bias adds to {missing[0]}, and {base.reference} has no such bias"
        fix = "It belongs to a base whose layers have biases"
        raise CheckpointError(cause, where=adapter.reference, fix=fix)
    if missing:
        count = len(adapter.layers) + len(biases) + len(adapter.saved)
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        cause = f"{len(missing)} of the {count} tensors that the adapter changes are not in {base.reference}: {shown}"
        named = adapter.config.base_model_name_or_path
        fix = f"It was made for {named}: check that this is the base" if named else "Check that this is its base"
        raise CheckpointError(cause, where=adapter.reference, fix=fix)


def _replaced(
    tensors: Tensors, base: Checkpoint, adapter: Adapter, found: Match, owners: dict[str, str]
) -> dict[str, TensorEntry]:
    """The tensors with those that the adapter stores whole."""
    result = dict(tensors)
    for name, entry in replacements(adapter, found, base).items():
        if name in owners and same_bytes(tensors[name], replace(entry, name=name)) is not True:
            cause = f"the adapter stores this tensor whole, and {owners[name]} changes it too"
            raise CheckpointError(cause, where=f"{adapter.reference}: {name}", fix=_APART)
        owners[name] = adapter.reference
        result[name] = replace(entry, name=name)
    return result


def _changed(
    tensors: Tensors, base: Checkpoint, adapter: Adapter, found: Match, owners: dict[str, str]
) -> dict[str, TensorEntry]:
    """The tensors with what the adapter adds to them."""
    result = dict(tensors)
    for name, change in changes(adapter, found, base.config.get("model_type")):
        together = (*result[name].changes, change)
        if len(together) > 1 and any(_sets_lengths(each) for each in together):
            cause = f"a DoRA adapter sets the lengths of its vectors, and {owners[name]} changes them too"
            raise CheckpointError(cause, where=f"{adapter.reference}: {name}", fix=_APART)
        owners[name] = adapter.reference
        result[name] = replace(result[name], changes=together)
    return result


def _sets_lengths(change: Change) -> bool:
    return isinstance(change, LowRank) and change.magnitude is not None


def _used_files(tensors: Tensors, adapters: Sequence[Adapter]) -> tuple[WeightFile, ...]:
    """The adapters' files that something is read from, each once."""
    used = {entry.file for entry in tensors.values()}
    for entry in tensors.values():
        for change in entry.changes:
            used |= {change.a.file, change.b.file} if isinstance(change, LowRank) else {change.values.file}
    return tuple(dict.fromkeys(file for adapter in adapters for file in adapter.files if file in used))


def _config(base: Checkpoint, tensors: Tensors) -> Mapping[str, Any]:
    """The base's, with the number of rows of the embeddings."""
    name = input_embedding(base.tensors)
    if name is None or tensors[name].shape == base.tensors[name].shape:
        return base.config
    return with_rows(base.config, base.tensors[name].shape[0], tensors[name].shape[0])


def _tokenizer_files(adapters: Sequence[Adapter]) -> dict[str, Path]:
    """The tokenizer that the adapters brought: that of the last one that has any."""
    for adapter in reversed(adapters):
        if "tokenizer.json" in adapter.side_files and adapter.folder is not None:
            folder = Path(adapter.folder)
            return {name: folder / name for name in adapter.side_files if is_tokenizer_file(name)}
    return {}


def _notes(base: Checkpoint, adapters: Sequence[Adapter]) -> list[str]:
    """Adapters that name another base than the one they are applied to: paths differ, and so may names."""
    return [
        f"{adapter.reference} was made for {named} and is applied to {base.reference}"
        for adapter in adapters
        if (named := adapter.config.base_model_name_or_path) and _last(named) != _last(base.repo or base.reference)
    ]


def _last(reference: str) -> str:
    return reference.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
