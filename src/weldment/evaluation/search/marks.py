"""Marks: what a recipe says instead of a value that a search may choose.

{search: [0.1, 0.9]}                   a number between these, both included
{search: [0.01, 10.0], log: true}      the same on a logarithmic scale
{search: [0.0, 1.0], step: 0.1}        one of 0.0, 0.1, ..., 1.0
{search: [4, 64]}                      a whole number, as both ends are
{choices: [ties, dare_ties]}           one of these, of any kind
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from weldment.methods import Parameter
from weldment.recipe.settings import coerced
from weldment.recipe.words import Place, shown, suggestion

Label = str | int | float | bool | None
"""What a study can store."""

KINDS = {"search": ("search", "log", "step"), "choices": ("choices",)}
"""The keys that make a mapping a mark, and those that may stand in it."""

_NUMBER = Parameter("search", "")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones if `is_whole`.

    Attributes:
        step: between the numbers, the first of which is `low`; None for all numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    is_whole: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """What the recipe must be valid with."""
        return self.low, self.highest

    @property
    def highest(self) -> float:
        """The last number that steps from `low` reach."""
        return self.high if self.step is None else self._number(self._last)

    def points(self) -> tuple[float, ...] | None:
        """All numbers, or None if they cannot be counted."""
        is_counted = self.is_whole or self.step is not None
        return tuple(map(self._number, range(self._last + 1))) if is_counted else None

    def value(self, label: Any) -> Any:
        """The value that a study's number stands for: the nearest one that there is."""
        if self.step is None and not self.is_whole:
            return float(label)
        return self._number(round((_exact(label) - _exact(self.low)) / self._step))

    @property
    def _step(self) -> Decimal:
        return _exact(self.step or 1)

    @property
    def _last(self) -> int:
        return int((_exact(self.high) - _exact(self.low)) / self._step)

    def _number(self, place: int) -> Any:
        """The number after so many steps, without the errors of adding them up."""
        exact = _exact(self.low) + place * self._step
        return int(exact) if self.is_whole else float(exact)

    def __str__(self) -> str:
        kind = "whole numbers from " if self.is_whole else ""
        step = "" if self.step is None else f", step {self.step:g}"
        return f"{kind}{self.low:g} to {self.high:g}{', log scale' if self.log else ''}{step}"


@dataclass(frozen=True)
class Choices:
    """One of several values of any kind."""

    values: tuple[Any, ...]

    @property
    def labels(self) -> tuple[Label, ...]:
        """The values as a study can store them: lists and mappings as JSON text."""
        return tuple(map(_label, self.values))

    @property
    def ends(self) -> tuple[Any, ...]:
        """What the recipe must be valid with."""
        return self.values

    def points(self) -> tuple[Label, ...]:
        """All labels."""
        return self.labels

    def value(self, label: Any) -> Any:
        """The value that a label stands for."""
        return self.values[self.labels.index(label)]

    def __str__(self) -> str:
        return f"one of {', '.join('null' if label is None else str(label) for label in self.labels)}"


Mark = Range | Choices


def read_mark(written: Mapping[str, Any], place: Place) -> Mark:
    """A mark as a recipe has it.

    Raises:
        RecipeError: it is not as it must be.
    """
    kind = "search" if "search" in written else "choices"
    for key in written:
        if key not in KINDS[kind]:
            others = [word for word in KINDS[kind] if word not in written]
            fix = suggestion(key, others) if others else "Remove it"
            raise place.at(key).problem(f"there is no key `{key}` beside `{kind}`", fix)
    return _range(written, place) if kind == "search" else _choices(written["choices"], place.at("choices"))


def _choices(values: object, place: Place) -> Choices:
    if not isinstance(values, list):
        raise place.problem(f"{shown(values)} is not a list", "Write it as {choices: [a, b]}")
    if len(values) < 2:
        cause = f"the only choice is {shown(values[0])}" if values else "the list of choices is empty"
        raise place.problem(cause, "Give at least two" if not values else "Give another, or write the value alone")
    written = [json.dumps(value) for value in values]
    for index, value in enumerate(values):
        if written[index] in written[:index]:
            raise place.at(index).problem(f"the choice {shown(value)} is given twice", "Remove one of them")
    return Choices(tuple(values))


def _label(value: Any) -> Label:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def _range(written: Mapping[str, Any], place: Place) -> Range:
    low, high = _ends(written["search"], place.at("search"))
    log = written.get("log", False)
    step: Any = coerced(_NUMBER, written.get("step"))
    if not isinstance(log, bool):
        raise place.at("log").problem(f"{shown(log)} is not true or false")
    if log and low <= 0:
        raise place.at("search").problem(f"{low:g} is not on a logarithmic scale", "Begin above 0, or remove `log`")
    if log and step is not None:
        raise place.at("step").problem("`log` and `step` exclude each other", "Remove one of them")
    if step is not None:
        _check_step(step, high - low, place.at("step"))
    is_whole = all(isinstance(number, int) for number in (low, high, step) if number is not None)
    return Range(low, high, log, step, is_whole) if is_whole else Range(float(low), float(high), log, step)


def _check_step(step: Any, width: float, place: Place) -> None:
    if not (_is_number(step) and step > 0):
        raise place.problem(f"{shown(step)} is not a number above 0")
    if step > width and not math.isclose(step, width):
        raise place.problem(f"the step {step:g} is larger than the range, which is {width:g} wide", "Make it smaller")


def _ends(written: object, place: Place) -> tuple[float, float]:
    numbers = [coerced(_NUMBER, end) for end in written] if isinstance(written, list) else []
    if len(numbers) != 2 or not all(map(_is_number, numbers)):
        fix = "Write it as {search: [0.1, 0.9]}; single values to choose from are {choices: [...]}"
        raise place.problem(f"{shown(written)} is not two numbers [low, high]", fix)
    low: Any = numbers[0]
    high: Any = numbers[1]
    if low == high:
        raise place.problem(f"both ends are {low:g}: there is nothing to search", "Write the value alone")
    if low > high:
        raise place.problem(f"the ends are out of order: {low:g} is above {high:g}", f"Write [{high:g}, {low:g}]")
    return low, high


def _exact(number: float) -> Decimal:
    return Decimal(str(number))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
