"""Recipes in other tools' formats, told apart by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weldment.recipe.words import Place


@dataclass(frozen=True)
class Dialect:
    """A format that has one of `keys` at its top level and is not read."""

    name: str
    keys: frozenset[str]
    advice: str


FOREIGN = (
    Dialect(
        "a mixture-of-experts configuration",
        frozenset({"gate_mode", "experts", "experts_per_token"}),
        "Merging into one dense model takes `models` and `merge_method`",
    ),
    Dialect(
        "a multi-module configuration",
        frozenset({"modules"}),
        "Use `models` with filters on tensor names to treat parts of the model differently",
    ),
)


def refuse_foreign(document: Mapping[str, Any], place: Place) -> None:
    """Nothing for a recipe of the native dialect.

    Raises:
        RecipeError: the document is of another dialect, which the error names.
    """
    for dialect in FOREIGN:
        found = sorted(dialect.keys & document.keys())
        if found:
            keys = " and ".join(f"`{key}`" for key in found)
            raise place.problem(f"{keys}: this is {dialect.name}, which is not supported", dialect.advice)
