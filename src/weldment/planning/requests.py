"""Which output tensors there are and which input tensor of which model each one needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weldment.errors import PlanError
from weldment.planning.inputs import Aligned, Inputs
from weldment.planning.layers import LayerName, depths, is_embedding, layer_of, position, sliced_stack
from weldment.planning.roles import is_head
from weldment.recipe import slice_experts
from weldment.recipe.recipe import Recipe, Settings, Slice, SliceSource


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
        base: name of the base's tensor, None where no base is needed.
        levels: parameters that are not per model, most specific first.
        position: where on the way through the layers of the model (or slice) it lies, 0 to 1; None outside layers.
    """

    name: str
    parts: tuple[Part, ...]
    base: str | None
    levels: tuple[Settings, ...]
    position: float | None


def whole_models(inputs: Inputs, tensors: Aligned) -> list[Request]:
    """One request for each tensor name that any expert or the base has."""
    recipe, base = inputs.recipe, inputs.base
    names = dict.fromkeys(name for model in inputs.participants for name in tensors[model])
    stacks = depths(names)
    return [
        Request(
            name,
            tuple(Part(expert.model, name, (expert.parameters, recipe.parameters)) for expert in inputs.experts),
            None if base is None else name,
            (recipe.parameters,),
            position(name, stacks),
        )
        for name in names
    ]


@dataclass(frozen=True)
class OutputLayer:
    """A layer of a model that is assembled of slices: the one at `place` of `piece`."""

    piece: Slice
    place: int

    def layer_in(self, source: SliceSource) -> int:
        """The layer of a source that goes into it."""
        return source.layer_range[0] + self.place

    @property
    def first(self) -> tuple[str, int]:
        """The first source's model and layer."""
        source = self.piece.sources[0]
        return source.model, self.layer_in(source)

    @property
    def position(self) -> float:
        start, stop = self.piece.sources[0].layer_range
        return self.place / max(1, stop - start - 1)


@dataclass(frozen=True)
class Slicing:
    """A model assembled of slices.

    Attributes:
        tensors: what is left to merge, by participant.
        base: the base that takes part in the arithmetic, if any.
        stack: the stack of layers that is sliced.
        layers: of the output.
    """

    recipe: Recipe
    tensors: Aligned
    base: str | None
    stack: str
    layers: tuple[OutputLayer, ...]

    def requests(self) -> Iterator[Request]:
        """One request for each output tensor, in the order of the model.

        Tensors outside the sliced stack that come before it (embeddings) are merged as the first
        slice says, those that come after it (final norm, head) as the last slice says.
        """
        first, last = self.recipe.slices[0], self.recipe.slices[-1]
        yield from (self._outer(name, first) for name in self._outer_names(first) if _is_before(name))
        for index, layer in enumerate(self.layers):
            yield from self._layer(index, layer)
        yield from (self._outer(name, last) for name in self._outer_names(last) if not _is_before(name))

    def _models(self, piece: Slice) -> list[str]:
        """The models whose tensors a slice needs: its sources and the base."""
        return list(dict.fromkeys([*(source.model for source in piece.sources), *([self.base] if self.base else [])]))

    def _outer_names(self, piece: Slice) -> Iterable[str]:
        names = dict.fromkeys(name for model in self._models(piece) for name in self.tensors[model])
        return (name for name in names if not is_in_stack(name, self.stack))

    def _outer(self, name: str, piece: Slice) -> Request:
        parts = tuple(Part(source.model, name, self._levels(source, piece)) for source in self._experts(piece))
        return Request(name, parts, name if self.base else None, self._shared_levels(piece), None)

    def _layer(self, index: int, layer: OutputLayer) -> Iterator[Request]:
        """Requests for the tensors of one output layer."""
        piece, base_layer = layer.piece, self._base_layer(layer)
        places = [(source.model, layer.layer_in(source)) for source in piece.sources]
        if self.base is not None and base_layer is not None:
            places.append((self.base, base_layer))
        for rest in dict.fromkeys(rest for model, number in places for rest in self._rests(model, number)):
            parts = tuple(
                Part(source.model, self._name(layer.layer_in(source), rest), self._levels(source, piece))
                for source in self._experts(piece)
            )
            base = None if base_layer is None else self._name(base_layer, rest)
            yield Request(self._name(index, rest), parts, base, self._shared_levels(piece), layer.position)

    def _name(self, layer: int, rest: str) -> str:
        return LayerName(self.stack, layer, rest).name

    def _rests(self, model: str, layer: int) -> Iterator[str]:
        """The tensors of one layer, without the part of their names that says which."""
        prefix = self._name(layer, "")
        return (name[len(prefix) :] for name in self.tensors[model] if name.startswith(prefix))

    def _experts(self, piece: Slice) -> Sequence[SliceSource]:
        return slice_experts(self.recipe, piece)

    def _levels(self, source: SliceSource, piece: Slice) -> tuple[Settings, ...]:
        own = next((m.parameters for m in self.recipe.models if m.model == source.model), {})
        return source.parameters, piece.parameters, own, self.recipe.parameters

    def _shared_levels(self, piece: Slice) -> tuple[Settings, ...]:
        return piece.parameters, self.recipe.parameters

    def _base_layer(self, layer: OutputLayer) -> int | None:
        if self.base is None:
            return None
        listed = [layer.layer_in(source) for source in layer.piece.sources if source.model == self.base]
        return listed[0] if listed else layer.first[1]


def slicing(inputs: Inputs, tensors: Aligned) -> tuple[Slicing | None, list[PlanError]]:
    """The slices of a recipe, checked against the models' layers; None and the problems if they do not fit."""
    recipe = inputs.recipe
    first = recipe.slices[0].sources[0].model
    try:
        config: Mapping[str, Any] = inputs.models[first].config or inputs.models[inputs.reference].config
        stack = sliced_stack(depths(tensors[first]), config, f"{recipe.origin}: slices")
    except PlanError as error:
        return None, [error]
    sources = [source for piece in recipe.slices for source in piece.sources]
    problems = [problem for source in sources if (problem := _beyond(recipe, source, tensors, stack))]
    problems += [problem for piece in recipe.slices if (problem := _unclear_base(recipe, piece, inputs.base))]
    if problems:
        return None, problems
    layers = [
        OutputLayer(piece, place)
        for piece in recipe.slices
        for place in range(piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0])
    ]
    return Slicing(recipe, tensors, inputs.base, stack, tuple(layers)), []


def _beyond(recipe: Recipe, source: SliceSource, tensors: Aligned, stack: str) -> PlanError | None:
    count = depths(tensors[source.model]).get(stack, 0)
    if source.layer_range[1] <= count:
        return None
    return PlanError(
        f"layer_range {list(source.layer_range)} goes beyond the {count} layers of {source.model}",
        where=f"{recipe.origin}: {source.where}.layer_range",
        fix=f"Ranges are [first, last + 1); the last possible end is {count}",
    )


def _unclear_base(recipe: Recipe, piece: Slice, base: str | None) -> PlanError | None:
    """A base that is not listed stands for the same layers as the sources, which must then be the same."""
    starts = {source.layer_range[0] for source in piece.sources}
    if base is None or len(starts) == 1 or any(source.model == base for source in piece.sources):
        return None
    return PlanError(
        f"the sources are different layers, and which layers of the base {base} belong to them is not said",
        where=f"{recipe.origin}: {piece.where}",
        fix="List the base among the sources with its layer_range",
    )


def is_in_stack(name: str, stack: str) -> bool:
    """Whether a tensor belongs to a layer of this stack."""
    layer = layer_of(name)
    return layer is not None and layer.stack == stack


def _is_before(name: str) -> bool:
    return (is_embedding(name) and not is_head(name)) or layer_of(name) is not None
