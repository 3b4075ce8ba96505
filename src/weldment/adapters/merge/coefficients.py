"""Merges that are weighted sums: their deltas are never multiplied out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SUMS = frozenset({"task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"})
_ELECTIONS = frozenset({"ties", "dare_ties", "della", "breadcrumbs_ties"})


def coefficients(method: str, parameters: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The c_i of a merge that is theta_0 + sum_i c_i tau_i, or sum_i c_i theta_i; None for every other merge.

    Methods that drop elements are sums where their parameters keep all of them, and those that elect signs
    where there is but one model besides.

    Args:
        method: a name in `METHODS`.
        parameters: its kernel's keyword arguments.
    """
    if method == "passthrough":
        return tuple(parameters["scale"])
    weights: tuple[float, ...] = tuple(parameters.get("weight", ()))
    if method == "linear":
        return _shares(weights, 1.0, normalize=parameters["normalize"])
    is_alone = len(weights) == 1 and weights[0] != 0.0
    if method not in _SUMS and not (method in _ELECTIONS and is_alone):
        return None
    if not _keeps_all(parameters):
        return None
    return _shares(weights, parameters["lambda_"], normalize=parameters["normalize"])


def _keeps_all(parameters: Mapping[str, Any]) -> bool:
    dropped: Sequence[float] = (*parameters.get("epsilon", ()), *parameters.get("gamma", ()))
    kept: Sequence[float] = parameters.get("density", ())
    return all(density == 1.0 for density in kept) and not any(dropped)


def _shares(weights: tuple[float, ...], scale: float, *, normalize: bool) -> tuple[float, ...] | None:
    total = sum(weights) if normalize else 1.0
    return None if total == 0.0 else tuple(scale * weight / total for weight in weights)


def uses_base(method: str) -> bool:
    """Whether the coefficients are those of differences from the base."""
    return method not in ("linear", "passthrough")
