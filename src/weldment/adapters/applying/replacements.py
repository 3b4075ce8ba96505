"""The tensors that an adapter stores whole: saved modules, trained biases, resized embeddings."""

from __future__ import annotations

from weldment.adapters.adapter import Adapter
from weldment.adapters.applying.matching import Match
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.errors import CheckpointError
from weldment.planning.roles import input_embedding, is_head

_TOKENIZER = "tokenizer.json"


def replacements(adapter: Adapter, found: Match, base: Checkpoint) -> dict[str, TensorEntry]:
    """What takes the place of a model's tensors, or is added to them, by its name in the model.

    Raises:
        CheckpointError: shapes that do not fit, or a vocabulary of another size whose tokens are not known.
    """
    result: dict[str, TensorEntry] = {}
    for name, entry in adapter.saved.items():
        target = _target(name, found, adapter.reference)
        if target in result:
            cause = f"{result[target].name!r} and {entry.name!r} of the adapter both stand for this tensor"
            raise CheckpointError(cause, where=f"{adapter.reference}: {target}", fix="Save the adapter again")
        if name in found.views:
            _check_shape(adapter, name, entry, found.views[name].shape, base)
        result[target] = entry
    return result


def is_new(adapter: Adapter, name: str) -> bool:
    """Whether a tensor that the base lacks may be added to it: it is stored whole, and a head or of a saved module."""
    return name in adapter.saved and (is_head(name) or _of_saved_module(adapter, name))


def _of_saved_module(adapter: Adapter, name: str) -> bool:
    return any(f".{module}." in f".{name}" for module in adapter.config.modules_to_save)


def _target(name: str, found: Match, where: str) -> str:
    if name in found.missing:
        return found.missing[name]
    pieces = found.views[name].pieces
    if len(pieces) != 1:
        cause = f"the adapter stores it whole, and the base as {len(pieces)} tensors"
        raise CheckpointError(cause, where=f"{where}: {name}", fix="Save the base as the adapter knows it")
    return pieces[0].name


def _check_shape(adapter: Adapter, name: str, entry: TensorEntry, shape: tuple[int, ...], base: Checkpoint) -> None:
    """CheckpointError unless the shapes are the same; heads and embeddings may have other numbers of rows."""
    if entry.shape == shape:
        return
    place = f"{adapter.reference}: {name}"
    is_vocabulary = name == input_embedding([name]) or is_head(name)
    if entry.shape[1:] != shape[1:] or not (is_vocabulary or _of_saved_module(adapter, name)):
        cause = f"the adapter stores it whole as {list(entry.shape)}, and {base.reference} has {list(shape)}"
        raise CheckpointError(cause, where=place, fix="The adapter belongs to another base")
    if is_vocabulary and _TOKENIZER not in adapter.side_files:
        cause = (
            f"it has {entry.shape[0]} rows and in {base.reference} {shape[0]}, and nothing tells which tokens they are"
        )
        fix = "Save the adapter's tokenizer beside it (tokenizer.json): rows are never merged by position"
        raise CheckpointError(cause, where=place, fix=fix)
