"""What an adapter's layers add to the tensors of a model, after a check that they fit together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weldment.adapters.adapter import Adapter, Layer
from weldment.adapters.applying.matching import Match, View
from weldment.checkpoint.model import Added, LowRank
from weldment.errors import CheckpointError

Change = LowRank | Added

_INPUTS_FIRST = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""Types of models whose stacks of experts are stored as (experts, inputs, outputs); PEFT always knew them as such."""


def changes(adapter: Adapter, found: Match, model_type: object) -> Iterator[tuple[str, Change]]:
    """Every change that an adapter makes, with the tensor that it is made to.

    Args:
        found: what the adapter's names mean in the model.
        model_type: of the model.

    Raises:
        CheckpointError: shapes do not fit or do not tell how they fit, or two layers change one tensor.
    """
    stacks = _stacks_transposed(adapter, found.views, model_type)
    seen: dict[tuple[str, type[Change]], str] = {}
    for layer in adapter.layers.values():
        for target, change in (*_products(adapter, layer, found.views, stacks), *_biases(adapter, layer, found.views)):
            if (other := seen.setdefault((target, type(change)), layer.module)) != layer.module:
                cause = f"the layers {other} and {layer.module} of the adapter both change this tensor"
                raise CheckpointError(cause, where=f"{adapter.reference}: {target}", fix="Save the adapter again")
            yield target, change


def _products(
    adapter: Adapter, layer: Layer, views: Mapping[str, View], stacks: bool | None
) -> Iterator[tuple[str, LowRank]]:
    view = views[layer.tensor]
    where = f"{adapter.reference}: {layer.tensor}"
    transposed = _transposed(layer, view.shape, stacks, where)
    for piece in view.pieces:
        yield (
            piece.name,
            LowRank(
                layer.a,
                layer.b,
                layer.scale,
                transposed,
                layer.experts,
                layer.magnitude,
                piece.expert,
                piece.row,
            ),
        )


def _biases(adapter: Adapter, layer: Layer, views: Mapping[str, View]) -> Iterator[tuple[str, Added]]:
    if layer.bias is None:
        return
    view = views[layer.bias_tensor]
    if view.shape != layer.bias.shape:
        cause = f"the adapter's bias is {list(layer.bias.shape)}, the base's {list(view.shape)}"
        where = f"{adapter.reference}: {layer.bias_tensor}"
        raise CheckpointError(cause, where=where, fix="The adapter belongs to a base of another size")
    yield view.pieces[0].name, Added(layer.bias, layer.scale)


def _stacks_transposed(adapter: Adapter, views: Mapping[str, View], model_type: object) -> bool | None:
    """Whether stacks of experts are (experts, inputs, outputs): as those show whose two sizes differ; None if none."""
    stacks = [layer for layer in adapter.layers.values() if layer.experts > 1]
    fits = [_orientations(layer, views[layer.tensor].shape) for layer in stacks]
    found = {next(iter(each)) for each in fits if len(each) == 1}
    if len(found) == 1:
        return found.pop()
    return True if model_type in _INPUTS_FIRST else None


def _orientations(layer: Layer, shape: tuple[int, ...]) -> set[bool]:
    """The values of `transposed` with which a layer has the shape of a tensor."""
    outputs, inputs = layer.b.shape[0], layer.a.shape[1:]
    if layer.experts > 1:
        if shape[:1] != (layer.experts,):
            return set()
        shape = shape[1:]
    straight = {False} if shape == (outputs, *inputs) else set()
    turned = {True} if shape == (*inputs, outputs) and len(shape) == 2 else set()
    return straight | turned


def _transposed(layer: Layer, shape: tuple[int, ...], stacks: bool | None, where: str) -> bool:
    fits = _orientations(layer, shape)
    if not fits:
        cause = f"the adapter's B {list(layer.b.shape)} and A {list(layer.a.shape)} do not fit the base's {list(shape)}"
        experts = f" of {layer.experts} experts" if layer.experts > 1 else ""
        fix = "The adapter belongs to a base of another size"
        raise CheckpointError(f"{cause}{experts}", where=where, fix=fix)
    if layer.experts > 1:
        return _stack_transposed(fits, stacks, where)
    if layer.transposed in fits:
        return layer.transposed
    sizes = f"outputs {layer.b.shape[0]}, inputs {layer.a.shape[1]}"
    raise CheckpointError(
        f"the adapter ({sizes}) has fan_in_fan_out {str(layer.transposed).lower()}, "
        f"and the base stores the weight as {list(shape)}",
        where=where,
        fix=f"Set fan_in_fan_out to {str(not layer.transposed).lower()} in adapter_config.json if that is what it is",
    )


def _stack_transposed(fits: set[bool], stacks: bool | None, where: str) -> bool:
    if len(fits) == 1:
        return next(iter(fits))
    if stacks is None:
        cause = "the experts' matrices are square, and nothing tells which of their sides is the inputs'"
        raise CheckpointError(cause, where=where, fix="Merge the adapter into its base with PEFT's merge_and_unload")
    return stacks
