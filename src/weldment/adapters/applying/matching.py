"""Which tensors of a model an adapter's names mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weldment.adapters.adapter import Adapter, Layer
from weldment.checkpoint.model import TensorEntry
from weldment.planning.names import Rename, align

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_FUSED = (("gate_up_proj", ("gate_proj", "up_proj")), ("gate_up_proj", ("w1", "w3")))
_FUSED += (("down_proj", ("down_proj",)), ("down_proj", ("w2",)))
"""Parameters that hold all experts in memory, and what each expert's rows of them are called in files."""

_ALIASES = ((".block_sparse_moe.", ".mlp."), (".in_proj_weight", ".weight"))
"""Parts of names in files, and what the same is called in memory (the second: by PEFT)."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is what a name means, or a part of it.

    Attributes:
        name: of the tensor.
        expert: the one of a stack that it holds; None if it is the whole.
        row: where its rows begin in the matrix of that expert.
    """

    name: str
    expert: int | None = None
    row: int = 0


@dataclass(frozen=True)
class View:
    """What a name means: a shape, and the stored tensors that make it up."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Match:
    """An adapter's names in a model.

    Attributes:
        views: what its names mean, by name.
        missing: its names that mean nothing, and what they would be called in the model.
    """

    views: Mapping[str, View]
    missing: Mapping[str, str]


def match(adapter: Adapter, tensors: Mapping[str, TensorEntry]) -> Match:
    """Find what an adapter changes among the tensors of a model, directly or under another prefix."""
    views = dict(_views(tensors))
    names, renames = align(_wanted(adapter), {name: view.shape for name, view in views.items()})
    found = {name: views[new] for name, new in names.items() if new in views}
    return Match(found, {name: _renamed(name, renames) for name in names if name not in found})


def _wanted(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Every name that the adapter says something of, with the shape that it expects."""
    wanted: dict[str, tuple[int, ...]] = {name: entry.shape for name, entry in adapter.saved.items()}
    for layer in adapter.layers.values():
        wanted[layer.tensor] = expected(layer)
        if layer.bias is not None:
            wanted[layer.bias_tensor] = layer.bias.shape
    return wanted


def expected(layer: Layer) -> tuple[int, ...]:
    """The shape of the weight that a layer is for, as its configuration says."""
    outputs, inputs = layer.b.shape[0], layer.a.shape[1:]
    if layer.experts > 1:
        return (layer.experts, outputs, *inputs)
    return (*inputs, outputs) if layer.transposed else (outputs, *inputs)


def _renamed(name: str, renames: tuple[Rename, ...]) -> str:
    """The name without the prefix that the model does not have."""
    for rename in renames:
        if rename.old and name.startswith(rename.old):
            return rename.new + name.removeprefix(rename.old)
    return name


def _views(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, View]]:
    """Every name by which something of the model can be called; stored names come last, and win."""
    stored = {name: View(entry.shape, (Piece(name),)) for name, entry in tensors.items()}
    for name, view in (*_stacks(tensors), *stored.items()):
        for old, new in _ALIASES:
            if old in name:
                yield name.replace(old, new), view
        yield name, view
    yield from stored.items()


def _stacks(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, View]]:
    """The stacks of experts of which the files hold each expert by itself."""
    stacks: dict[str, dict[str, dict[int, TensorEntry]]] = {}
    for name, entry in tensors.items():
        if (found := _EXPERT.fullmatch(name)) is not None and len(entry.shape) == 2:
            parts = stacks.setdefault(found["stack"], {})
            parts.setdefault(found["part"], {})[int(found["expert"])] = entry
    for stack, parts in stacks.items():
        for fused, names in _FUSED:
            if all(name in parts for name in names) and (view := _stack([parts[name] for name in names])) is not None:
                yield f"{stack}.{fused}", view


def _stack(parts: list[dict[int, TensorEntry]]) -> View | None:
    """The parts of all experts, one below the other; None if they do not fit together."""
    count = len(parts[0])
    shapes = {entry.shape for part in parts for entry in part.values()}
    if len(shapes) != 1 or any(sorted(part) != list(range(count)) for part in parts):
        return None
    ((rows, columns),) = shapes
    pieces = [
        Piece(part[expert].name, expert, place * rows) for place, part in enumerate(parts) for expert in range(count)
    ]
    return View((count, len(parts) * rows, columns), tuple(pieces))
