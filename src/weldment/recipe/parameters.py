"""From the settings of a recipe to the keyword arguments of a kernel, for one output tensor.

A parameter is looked for at each level, the most specific first: source of a slice, slice, model,
recipe. The first level that says something about the tensor decides:

* a scalar is the value;
* a gradient [v_0, ..., v_n-1] is interpolated linearly at the tensor's position, 0 for the first
  layer of the model or slice and 1 for the last. Tensors outside layers (embeddings, final norm,
  head) have no position and take v_0;
* of a list of {filter, value} the first entry counts whose filter is part of the tensor's name, or
  that has none; where no entry fits, the next level is asked.

A parameter that no level sets has its default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from weldment.errors import RecipeError
from weldment.methods import Method, Parameter
from weldment.recipe.recipe import Recipe, Settings

_SNAP = 1e-9
"""Positions this near to a value of a gradient are there: layer 3 of 8 is 2.9999999999999996 / 7 * 7."""


class Levelled(Protocol):
    """One model's share in a tensor."""

    @property
    def levels(self) -> Sequence[Settings]:
        """The settings that apply to the model, most specific first."""
        ...


class Wanted(Protocol):
    """An output tensor."""

    @property
    def name(self) -> str:
        """What filters are looked for in."""
        ...

    @property
    def parts(self) -> Sequence[Levelled]:
        """The models in merge order."""
        ...

    @property
    def levels(self) -> Sequence[Settings]:
        """The settings that apply to all models, most specific first."""
        ...

    @property
    def position(self) -> float | None:
        """0 for the first layer of the model or slice, 1 for the last, None outside layers."""
        ...


def resolve(recipe: Recipe, method: Method, request: Wanted) -> dict[str, Any]:
    """The arguments of the method's kernel for one tensor; per-model parameters are tuples.

    Raises:
        RecipeError: a required parameter has no value for this tensor, or values do not go together.
    """
    name, position = request.name, request.position
    arguments: dict[str, Any] = {}
    for parameter in method.parameters:
        if parameter.per_model:
            values = [value_of(parameter, part.levels, name, position) for part in request.parts]
            is_missing = any(value is None for value in values)
            arguments[parameter.argument] = tuple(values)
        else:
            value = value_of(parameter, request.levels, name, position)
            is_missing = value is None
            arguments[parameter.argument] = value
        if parameter.required and is_missing:
            raise RecipeError(
                f"{method.name} needs `{parameter.name}`, and no entry fits this tensor",
                where=f"{recipe.origin}: {name}",
                fix="End the list of filters with an entry that has a value only",
            )
    _check(recipe, method, name, arguments)
    return arguments


def _check(recipe: Recipe, method: Method, tensor: str, arguments: Mapping[str, Any]) -> None:
    if method.check is None:
        return
    try:
        method.check(**arguments)
    except ValueError as error:
        raise RecipeError(str(error), where=f"{recipe.origin}: {tensor}") from error


def value_of(parameter: Parameter, levels: Sequence[Settings], tensor: str, position: float | None) -> Any:
    """The value for one tensor from the first level that has one, or the default."""
    for settings in levels:
        setting = settings.get(parameter.name)
        if setting is None:
            continue
        if parameter.by_pattern:
            return setting
        if is_conditional(setting):
            setting = _first_fitting(setting, tensor)
            if setting is None:
                continue
        return interpolated(setting, position) if isinstance(setting, list) else setting
    return parameter.default


def is_conditional(setting: Any) -> bool:
    """Whether a setting is a list of {filter, value}."""
    return isinstance(setting, list) and isinstance(setting[0], Mapping)


def _first_fitting(entries: Sequence[Mapping[str, Any]], tensor: str) -> Any:
    for entry in entries:
        if entry["filter"] is None or entry["filter"] in tensor:
            return entry["value"]
    return None


def interpolated(values: Sequence[float], position: float | None) -> float:
    """A gradient at a position from 0 to 1; None is 0."""
    if position is None:
        return values[0]
    place = position * (len(values) - 1)
    nearest = round(place)
    if abs(place - nearest) < _SNAP:
        return values[nearest]
    low, high = values[int(place)], values[int(place) + 1]
    value = low + (place - int(place)) * (high - low)
    # Rounding must not leave the range that the recipe was checked for.
    return min(max(value, min(low, high)), max(low, high))
