"""What spectral merges cost: memory and time, by the shape of the matrices alone.

A Gram matrix of side s, its eigenvectors and the room that finding them takes are 4 s^2 numbers; its time
grows with s^3. All matrices of a tensor are merged one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weldment.methods.spectral.bases import SMALL
from weldment.methods.spectral.matrices import Form

Side = Callable[[int, int, int, Mapping[str, Any]], int]
"""From experts, rows, columns and parameters to the side of the largest Gram matrix."""

_EIGENVECTORS = 0.15
"""Nanoseconds for each s^3 to find the eigenvectors of a Gram matrix, on one core."""

_PRODUCT = 0.02
"""Nanoseconds for each operation of a product of matrices."""


def own_side(models: int, rows: int, columns: int, parameters: Mapping[str, Any]) -> int:
    """Of each expert's matrix by itself."""
    return min(rows, columns)


def stacked_side(models: int, rows: int, columns: int, parameters: Mapping[str, Any]) -> int:
    """Of the matrices stacked one above the other (`direction: vertical`), side by side, or as is found (`auto`)."""
    sides = {"vertical": min(columns, models * rows), "horizontal": min(rows, models * columns)}
    return sides.get(parameters.get("direction", "vertical"), max(sides.values()))


def beside_side(models: int, rows: int, columns: int, parameters: Mapping[str, Any]) -> int:
    """Of the matrices side by side."""
    return min(rows, models * columns)


def _held(side: int, models: int, size: int, results: int = 4) -> int:
    """Numbers that are held while stacked matrices of a size are decomposed through a Gram matrix of a side."""
    held = max(4 * side * side, 5 * side * side // 2 + (models + results) * size)
    return held if side > SMALL else 2 * held + 2 * models * size


@dataclass(frozen=True)
class SpectralCost:
    """Memory and time of a method.

    Attributes:
        side: of its largest Gram matrix.
        each, besides: how many such matrices it decomposes for each model, and besides.
        stacked: whether it decomposes all models' matrices together.
        results: matrices of the tensor's size that it makes of what it decomposed.
    """

    side: Side
    each: int = 0
    besides: int = 1
    stacked: bool = True
    results: int = 4

    def numbers(self, models: int, parameters: Mapping[str, Any]) -> int:
        """Numbers that the kernel holds at most besides the experts', the base's and the merged elements."""
        form: Form | None = parameters["form"]
        if form is None or parameters["ignored"]:
            return 0
        _, rows, columns = form
        s = self.side(models, rows, columns, parameters)
        return _held(s, models if self.stacked else 1, rows * columns, self.results)

    def nanoseconds(self, models: int, parameters: Mapping[str, Any]) -> float:
        """How long the matrices of a tensor take on one core, about."""
        form: Form | None = parameters["form"]
        if form is None or parameters["ignored"]:
            return 0.0
        count, rows, columns = form
        s = self.side(models, rows, columns, parameters)
        decompositions = self.each * models + self.besides
        return count * (decompositions * _EIGENVECTORS * s**3 + _PRODUCT * 6 * models * rows * columns * s)


def boosting_numbers(form: Form) -> int:
    """Numbers that raising the singular values of a merged tensor takes, the tensor included."""
    count, rows, columns = form
    return _held(min(rows, columns), 1, rows * columns) + count * rows * columns
