"""The adapters of one merge: their layers and saved tensors under common names, without what is not merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from weldment.adapters.adapter import Adapter, Layer
from weldment.checkpoint.model import TensorEntry
from weldment.errors import PlanError
from weldment.methods import METHODS, Method
from weldment.planning.names import align
from weldment.planning.requests import Part, Request
from weldment.planning.roles import matches
from weldment.recipe import experts_of
from weldment.recipe.recipe import ModelInput, Recipe

Piece = TypeVar("Piece", Layer, TensorEntry)
Parts = dict[str, dict[str, Piece]]
"""By adapter: its layers or saved tensors by their common names."""


@dataclass(frozen=True)
class AdapterInputs:
    """What a merge of adapters starts from.

    Attributes:
        adapters: every adapter that the recipe names, opened.
        experts: the merged adapters, in order.
        base: the adapter that is the base of the arithmetic, None where that is no change at all.
        layers: of every adapter, by module, under the names of the first adapter.
        saved: tensors that every adapter stores whole, likewise.
        taken: modules and saved tensors that come from one adapter unmerged.
        heads: saved tensors that are kept, by expert.
        dropped: reasons, by adapter and the name of the tensor in its file.
    """

    recipe: Recipe
    method: Method
    adapters: Mapping[str, Adapter]
    experts: tuple[ModelInput, ...]
    base: str | None
    layers: Parts[Layer]
    saved: Parts[TensorEntry]
    taken: dict[str, str] = field(default_factory=dict)
    heads: dict[str, list[TensorEntry]] = field(default_factory=dict)
    dropped: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[PlanError] = field(default_factory=list)

    @property
    def participants(self) -> list[str]:
        """The experts and the base, if an adapter is one, each once."""
        return list(self.layers)

    def problem(self, cause: str, fix: str, key: str = "") -> None:
        """Remember what stands in the way."""
        where = f"{self.recipe.origin}: {key}" if key else self.recipe.origin
        self.problems.append(PlanError(cause, where=where, fix=fix))

    def holders(self, name: str) -> dict[str, Layer]:
        """The layers of one module, by adapter."""
        return {ref: layers[name] for ref, layers in self.layers.items() if name in layers}

    def tensor(self, name: str) -> str:
        """The tensor that the layers of a module change."""
        return _tensor(name, next(iter(self.holders(name).values())))

    def request(self, tensor: str, where: float | None) -> Request:
        """What filters and gradients are resolved for; `where` is the tensor's position in its stack of layers."""
        recipe = self.recipe
        parts = tuple(Part(e.model, tensor, (e.parameters, recipe.parameters)) for e in self.experts)
        return Request(tensor, parts, None, (recipe.parameters,), where)

    def modules(self) -> list[str]:
        """Every module that an adapter changes, in order."""
        return list(dict.fromkeys(name for layers in self.layers.values() for name in layers))


def gather_adapters(recipe: Recipe, adapters: Mapping[str, Adapter]) -> AdapterInputs:
    """Bring the adapters under common names and take out what the recipe says is not merged."""
    method = METHODS[recipe.method]
    experts = experts_of(recipe)
    takes_part = method.base != "unused" and not method.base_is_model and recipe.base_model in adapters
    base = recipe.base_model if takes_part else None
    order: list[str] = list(dict.fromkeys([*(expert.model for expert in experts), *([base] if base else [])]))
    notes: list[str] = []
    layers = _common({ref: adapters[ref].layers for ref in order}, lambda layer: layer.sizes, notes)
    saved = _common({ref: adapters[ref].saved for ref in order}, lambda entry: entry.shape, notes)
    inputs = AdapterInputs(recipe, method, adapters, experts, base, layers, saved, notes=notes)
    _drop(inputs)
    _take(inputs)
    _keep_heads(inputs)
    return inputs


def _common(
    found: Mapping[str, Mapping[str, Piece]], shape: Callable[[Piece], tuple[int, ...]], notes: list[str]
) -> Parts[Piece]:
    """The parts of all adapters, their names matched to those of the adapters before them."""
    known: dict[str, tuple[int, ...]] = {}
    common: Parts[Piece] = {}
    for reference, parts in found.items():
        names, renames = align({name: shape(part) for name, part in parts.items()}, known)
        common[reference] = {names[name]: part for name, part in parts.items()}
        known |= {name: shape(part) for name, part in common[reference].items() if name not in known}
        notes += [f"names of {reference} were matched to the other adapters' by prefix: {change}" for change in renames]
    return common


def _fitting(inputs: AdapterInputs, pattern: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(adapter, name) of the layers and of the saved tensors that a pattern fits."""
    layers = [
        (reference, name)
        for reference, own in inputs.layers.items()
        for name in own
        if matches((pattern,), name, _tensor(name, own[name]))
    ]
    saved = [(reference, name) for reference, own in inputs.saved.items() for name in own if matches((pattern,), name)]
    return layers, saved


def _tensor(name: str, layer: Layer) -> str:
    return name if layer.parameter else f"{name}.weight"


def _drop(inputs: AdapterInputs) -> None:
    for pattern in inputs.recipe.drop:
        layers, saved = _fitting(inputs, pattern)
        if not layers and not saved:
            _unmatched(inputs, pattern, "drop")
        _leave_out(inputs, layers, saved, f"the recipe drops {pattern}")


def _leave_out(inputs: AdapterInputs, layers: list[tuple[str, str]], saved: list[tuple[str, str]], reason: str) -> None:
    entries = [
        (reference, entry) for reference, name in layers for entry in parts_of(inputs.layers[reference].pop(name))
    ]
    entries += [(reference, inputs.saved[reference].pop(name)) for reference, name in saved]
    inputs.dropped.update({(reference, entry.name): reason for reference, entry in entries})


def parts_of(layer: Layer) -> Iterator[TensorEntry]:
    """The tensors of a layer."""
    yield from (entry for entry in (layer.a, layer.b, layer.magnitude, layer.bias) if entry is not None)


def _take(inputs: AdapterInputs) -> None:
    experts = [expert.model for expert in inputs.experts]
    for pattern, source in inputs.recipe.take.items():
        layers, saved = _fitting(inputs, pattern)
        key = f"take.{pattern}"
        own = {name for reference, name in (*layers, *saved) if reference == source}
        lost = [(reference, name) for reference, name in (*layers, *saved) if name not in own]
        if source not in experts:
            inputs.problem(f"{source} is not among the merged adapters", f"Take from one of: {', '.join(experts)}", key)
        elif not layers and not saved:
            _unmatched(inputs, pattern, key)
        elif lost:
            cause = f"{source} has no {lost[0][1]!r}, which {lost[0][0]} has"
            inputs.problem(cause, "Take it from an adapter that has it, or use `drop`", key)
        else:
            others = [[pair for pair in pairs if pair[0] != source] for pairs in (layers, saved)]
            _leave_out(inputs, others[0], others[1], f"taken from {source}")
            inputs.taken.update(dict.fromkeys(own, source))


def _keep_heads(inputs: AdapterInputs) -> None:
    experts = {expert.model for expert in inputs.experts}
    for pattern in inputs.recipe.heads:
        _, found = _fitting(inputs, pattern)
        if not any(reference in experts for reference, _ in found):
            fix = "Only tensors that adapters store whole (modules_to_save) can be kept as heads; check the spelling"
            inputs.problem(f"the pattern {pattern!r} fits no saved tensor", fix, "heads")
        for reference, name in found:
            if reference in experts:
                inputs.heads.setdefault(reference, []).append(inputs.saved[reference].pop(name))
        _leave_out(inputs, [], [pair for pair in found if pair[0] not in experts], "a head of the base")


def _unmatched(inputs: AdapterInputs, pattern: str, key: str) -> None:
    inputs.problem(f"the pattern {pattern!r} fits no module and no tensor", "Check its spelling", key)
