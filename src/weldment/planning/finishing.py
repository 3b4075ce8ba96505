"""What is done to each merged tensor after its method, as the recipe asks for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping

from weldment.methods.finish import Finish
from weldment.methods.spectral.matrices import Form, form_of
from weldment.planning.layers import is_embedding, position
from weldment.planning.roles import holds_tokens, is_head
from weldment.recipe.parameters import interpolated
from weldment.recipe.recipe import LayerScale, Recipe


def finish_of(recipe: Recipe, name: str, shape: tuple[int, ...], stacks: Mapping[str, int]) -> Finish | None:
    """What is done to one tensor of the output; None if the recipe asks for nothing.

    Args:
        stacks: the output's stacks of layers, with their numbers of layers.
    """
    if not recipe.is_finished:
        return None
    scale = 1.0 if recipe.layer_scale is None else layer_factor(recipe.layer_scale, name, stacks)
    form = None if recipe.subspace_boost is None else boosted_form(name, shape)
    return Finish(scale, None if form is None else recipe.subspace_boost, form)


def layer_factor(scale: LayerScale, name: str, stacks: Mapping[str, int]) -> float:
    """The factor of a tensor's layer; tensors before the layers have the first layer's, those after them the last's."""
    place = position(name, stacks)
    if place is None:
        place = 0.0 if is_embedding(name) and not is_head(name) else 1.0
    return interpolated((scale.first, scale.last), place)


def boosted_form(name: str, shape: tuple[int, ...]) -> Form | None:
    """The matrices of a tensor that are boosted: of two dimensions or more, neither token embeddings nor a head."""
    if len(shape) < 2 or math.prod(shape) == 0 or holds_tokens(name, shape):
        return None
    return form_of(name, shape)
