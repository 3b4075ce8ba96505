"""Which models a recipe merges, in which order, and whether the method can merge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from weldment.errors import RecipeError
from weldment.methods import METHODS, Method
from weldment.recipe.recipe import ModelInput, Recipe, Slice, SliceSource
from weldment.recipe.words import Place

Input = TypeVar("Input", ModelInput, SliceSource)

IMPLIED = "base_model"
"""Where a base is written that is merged but not listed among the models."""


def experts_of(recipe: Recipe) -> tuple[ModelInput, ...]:
    """The merged models in merge order.

    The base is not among them, unless the method counts it as the first of the models (slerp) or
    does not use it (linear). With slices: every model that a slice names, once, in order of
    appearance.
    """
    method = METHODS[recipe.method]
    if not recipe.slices:
        found = _experts(recipe.models, recipe.base_model, method)
        if method.base_is_model and recipe.base_model and not any(m.model == recipe.base_model for m in found):
            return (ModelInput(recipe.base_model, where=IMPLIED), *found)
        return found
    own = {model.model: model for model in recipe.models}
    names = dict.fromkeys(source.model for piece in recipe.slices for source in slice_experts(recipe, piece))
    return tuple(own.get(name, ModelInput(name)) for name in names)


def slice_experts(recipe: Recipe, piece: Slice) -> tuple[SliceSource, ...]:
    """The merged sources of one slice in merge order; of the base as `experts_of` says."""
    return _experts(piece.sources, recipe.base_model, METHODS[recipe.method])


def _experts(inputs: Sequence[Input], base: str | None, method: Method) -> tuple[Input, ...]:
    if base is None or method.base == "unused":
        return tuple(inputs)
    if method.base_is_model:
        return tuple(sorted(inputs, key=lambda item: item.model != base))
    return tuple(item for item in inputs if item.model != base)


def misfits(recipe: Recipe, place: Place) -> tuple[list[RecipeError], list[str]]:
    """What is wrong with the number of models and with the base, and notes on what has no effect."""
    method = METHODS[recipe.method]
    if missing := missing_base(recipe, place):
        return missing, []
    if not recipe.slices:
        return _count(experts_of(recipe), recipe.models, method, place, "models"), _idle(recipe, method, recipe.models)
    problems: list[RecipeError] = []
    notes: list[str] = []
    for piece in recipe.slices:
        path = f"{piece.where}.sources"
        problems += _count(slice_experts(recipe, piece), piece.sources, method, place, path)
        problems += _repeated_base(recipe, piece, method, place)
        notes += _idle(recipe, method, piece.sources)
    return problems, notes


def missing_base(recipe: Recipe, place: Place) -> list[RecipeError]:
    """An error for what needs a base, the method or keys of the recipe, if there is none."""
    method = METHODS[recipe.method]
    if recipe.base_model is not None:
        return []
    if method.base == "required":
        return [place.problem(f"{method.name} needs a base model", _base_advice(method))]
    keys = [key for key in ("layer_scale", "subspace_boost") if getattr(recipe, key) is not None]
    cause = "changes what the merge adds to a base model, and there is no `base_model`"
    return [place.at(key).problem(f"`{key}` {cause}", _base_advice(method)) for key in keys]


def _base_advice(method: Method) -> str:
    if method.base_is_model:
        return "Add `base_model:` with the one of the two models to start from"
    return "Add `base_model:` with the model that the others were fine-tuned from"


def _count(
    experts: Sequence[Input], listed: Sequence[Input], method: Method, place: Place, path: str
) -> list[RecipeError]:
    low, high = method.models
    if low <= len(experts) <= (len(experts) if high is None else high):
        return []
    amount = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
    noun = "model" if high == 1 or (high is None and low == 1) else "models"
    remark = ", the base among them," if method.base_is_model else ""
    left = len(listed) - len(experts)
    besides = " besides the base" if left > 0 else ""
    cause = f"{method.name} merges {amount} {noun}{remark} and here {_are(len(experts))}{besides}"
    return [place.at(path).problem(cause, _count_advice(experts, low))]


def _count_advice(experts: Sequence[Input], low: int) -> str:
    if len(experts) < low:
        return "Name another model"
    if any(expert.where == IMPLIED for expert in experts):
        return "`base_model` must be one of the two models"
    return "Remove models, or use a method that merges any number, such as multislerp or linear"


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _repeated_base(recipe: Recipe, piece: Slice, method: Method, place: Place) -> list[RecipeError]:
    times = sum(source.model == recipe.base_model for source in piece.sources)
    if times < 2 or not (method.takes_base or (recipe.is_finished and not method.base_is_model)):
        return []
    cause = f"the base is listed {times} times, and which of its layers is the base is not said"
    return [place.at(f"{piece.where}.sources").problem(cause, "List the base once")]


def _idle(recipe: Recipe, method: Method, listed: Sequence[Input]) -> list[str]:
    if method.base == "unused" or method.base_is_model:
        return []
    return [
        f"the parameters of {item.model} have no effect: it is the base"
        for item in listed
        if item.model == recipe.base_model and item.parameters
    ]
