"""Which output tensors there are and which input tensor of which model each one needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from weldment.checkpoint.model import TensorEntry
from weldment.errors import PlanError
from weldment.plan.layers import depths, is_embedding, layer_of, position, sliced_stack
from weldment.recipe import slice_experts
from weldment.recipe.recipe import ModelInput, Recipe, Settings, Slice, SliceSource

Aligned = Mapping[str, Mapping[str, TensorEntry]]
"""By model reference: its tensors under the names of the reference model."""


@dataclass(frozen=True)
class Part:
    """One model's share in an output tensor; `levels` are its parameters, most specific first."""

    model: str
    tensor: str
    levels: tuple[Settings, ...]


@dataclass(frozen=True)
class Request:
    """One output tensor.

    Attributes:
        parts: in the order of the recipe.
        base: name of the base's tensor, None where the method uses no base.
        levels: parameters that are not per model, most specific first.
        position: where on the way through the layers of the model (or slice) it lies, 0 to 1; None outside layers.
    """

    name: str
    parts: tuple[Part, ...]
    base: str | None
    levels: tuple[Settings, ...]
    position: float | None


def whole_models(recipe: Recipe, experts: Sequence[ModelInput], tensors: Aligned, with_base: bool) -> list[Request]:
    """One request for each tensor name that any expert or the base has."""
    references = [*([recipe.base_model] if with_base and recipe.base_model else []), *(m.model for m in experts)]
    names = dict.fromkeys(name for reference in references for name in tensors[reference])
    stacks = depths(names)
    return [
        Request(
            name,
            tuple(Part(m.model, name, (m.parameters, recipe.parameters)) for m in experts),
            name if with_base else None,
            (recipe.parameters,),
            position(name, stacks),
        )
        for name in names
    ]


@dataclass(frozen=True)
class SliceLayers:
    """The sliced stack, and for each output layer its slice and the place in it."""

    stack: str
    layers: tuple[tuple[Slice, int], ...]

    @property
    def first_sources(self) -> list[int]:
        """For each output layer the layer of its first source."""
        return [piece.sources[0].layer_range[0] + place for piece, place in self.layers]


def slice_layers(recipe: Recipe, tensors: Aligned, config: Mapping[str, object]) -> SliceLayers:
    """Check the slices against the models' layers and number the output's.

    Raises:
        PlanError: a range goes beyond the layers of its model.
    """
    first = recipe.slices[0].sources[0].model
    stack = sliced_stack(depths(tensors[first]), config, f"{recipe.origin}: slices")
    for piece in recipe.slices:
        for source in piece.sources:
            count = depths(tensors[source.model]).get(stack, 0)
            if source.layer_range[1] > count:
                raise PlanError(
                    f"layer_range {list(source.layer_range)} goes beyond the {count} layers of {source.model}",
                    where=f"{recipe.origin}: {source.where}.layer_range",
                    fix=f"Ranges are [first, last + 1); the last possible end is {count}",
                )
    return SliceLayers(
        stack,
        tuple(
            (piece, place)
            for piece in recipe.slices
            for place in range(piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0])
        ),
    )


def sliced_models(recipe: Recipe, sliced: SliceLayers, tensors: Aligned, base: str | None) -> list[Request]:
    """Requests for a model assembled of slices; `base` is the base that takes part in the arithmetic, if any."""
    per_model = {model.model: model.parameters for model in recipe.models}
    requests: list[Request] = []
    outer = [name for name in tensors[recipe.slices[0].sources[0].model] if not _in_stack(name, sliced.stack)]
    before = [name for name in outer if is_embedding(name) or layer_of(name)]
    after = [name for name in outer if name not in set(before)]
    first, last = recipe.slices[0], recipe.slices[-1]
    requests += [_outer(recipe, first, name, per_model, base) for name in before]
    for index, (piece, place) in enumerate(sliced.layers):
        requests += _layer(recipe, piece, place, index, sliced.stack, tensors, per_model, base)
    requests += [_outer(recipe, last, name, per_model, base) for name in after]
    return requests


def _in_stack(name: str, stack: str) -> bool:
    layer = layer_of(name)
    return layer is not None and layer.stack == stack


def _levels(
    source: SliceSource, piece: Slice, per_model: Mapping[str, Settings], recipe: Recipe
) -> tuple[Settings, ...]:
    return source.parameters, piece.parameters, per_model.get(source.model, {}), recipe.parameters


def _outer(
    recipe: Recipe,
    piece: Slice,
    name: str,
    per_model: Mapping[str, Settings],
    base: str | None,
) -> Request:
    parts = tuple(
        Part(source.model, name, _levels(source, piece, per_model, recipe)) for source in slice_experts(recipe, piece)
    )
    return Request(name, parts, name if base else None, (piece.parameters, recipe.parameters), None)


def _layer(
    recipe: Recipe,
    piece: Slice,
    place: int,
    index: int,
    stack: str,
    tensors: Aligned,
    per_model: Mapping[str, Settings],
    base: str | None,
) -> Iterator[Request]:
    """Requests for the tensors of one output layer."""
    length = piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
    at = {source.model: source.layer_range[0] + place for source in piece.sources}
    base_layer = _base_layer(recipe, piece, base, at)
    prefix = f"{stack}.{at[piece.sources[0].model]}."
    for name in tensors[piece.sources[0].model]:
        if not name.startswith(prefix):
            continue
        rest = name[len(prefix) :]
        parts = tuple(
            Part(source.model, f"{stack}.{source.layer_range[0] + place}.{rest}", _levels(source, piece, per_model, recipe))
            for source in slice_experts(recipe, piece)
        )
        yield Request(
            f"{stack}.{index}.{rest}",
            parts,
            None if base_layer is None else f"{stack}.{base_layer}.{rest}",
            (piece.parameters, recipe.parameters),
            place / max(1, length - 1),
        )


def _base_layer(recipe: Recipe, piece: Slice, base: str | None, at: Mapping[str, int]) -> int | None:
    if base is None:
        return None
    if base in at:
        return at[base]
    if len(set(at.values())) == 1:
        return next(iter(at.values()))
    raise PlanError(
        f"the sources of this slice are different layers, and which layer of the base {base} belongs to them is not said",
        where=f"{recipe.origin}: {piece.where}",
        fix="List the base among the sources with its layer_range",
    )
