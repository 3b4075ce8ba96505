"""How models relate to a base and to each other, from the numbers of their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weldment.doctor.groups import GROUPS, Group
from weldment.doctor.measuring import Numbers
from weldment.planning.layers import depths, layer_of

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class Geometry:
    """Sums over some tensors, each over those that all models in question have.

    Attributes:
        weights: <theta_i, theta_j>, over tensors that both have: (n, n).
        weights_of: |theta_i|^2 over the tensors that i and j both have: (n, n), for row i.
        changes: <theta_i - theta_b, theta_j - theta_b>, over tensors that b, i and j have: (n, n).
        changes_of: |theta_i - theta_b|^2 over the same tensors, for row i.
        bases: |theta_b|^2 over tensors that b and i have: (n,).
        signs, both: see `Numbers`, for changes from b; NaN where they were not counted from b.
        numel: elements that b and i have: (n,).
    """

    weights: ndarray
    weights_of: ndarray
    changes: ndarray
    changes_of: ndarray
    bases: ndarray
    signs: ndarray
    both: ndarray
    numel: ndarray

    def weight_cosine(self, one: int, other: int) -> float:
        """cos(theta_i, theta_j)."""
        return _ratio(self.weights[one, other], math.sqrt(self.weights_of[one, other] * self.weights_of[other, one]))

    def relative(self, model: int) -> float:
        """|theta_i - theta_b| / |theta_b|."""
        return math.sqrt(_ratio(max(0.0, self.changes[model, model]), self.bases[model]))

    def change_cosine(self, one: int, other: int) -> float:
        """cos(theta_i - theta_b, theta_j - theta_b)."""
        return _ratio(self.changes[one, other], math.sqrt(self.changes_of[one, other] * self.changes_of[other, one]))

    def sign_agreement(self, one: int, other: int) -> float:
        """The share of elements that both change, which both change in the same direction."""
        return 0.5 + 0.5 * _ratio(self.signs[one, other], self.both[one, other])

    def changed(self, model: int) -> float:
        """The share of elements that differ from the base's."""
        return _ratio(self.both[model, model], self.numel[model])


def _ratio(part: float, whole: float) -> float:
    """NaN where there is nothing to compare."""
    return float(part / whole) if whole > 0.0 else math.nan


def geometry(numbers: Iterable[Numbers], count: int, base: int) -> Geometry:
    """The sums over tensors, changes counted from model `base`."""
    zeros = (np.zeros((count, count)) for _ in range(6))
    weights, weights_of, changes, changes_of, signs, both = zeros
    bases, numel = np.zeros(count), np.zeros(count)
    for tensor in numbers:
        at = np.ix_(tensor.members, tensor.members)
        gram = tensor.weights()
        weights[at] += gram
        weights_of[at] += np.diag(gram)[:, None]
        if base not in tensor.members:
            continue
        delta = tensor.changes(base)
        changes[at] += delta
        changes_of[at] += np.diag(delta)[:, None]
        members = list(tensor.members)
        bases[members] += gram[members.index(base), members.index(base)]
        numel[members] += tensor.joint.numel
        if members[0] == base:
            others = np.ix_(members[1:], members[1:])
            signs[others] += tensor.signs
            both[others] += tensor.both
    return Geometry(weights, weights_of, changes, changes_of, bases, signs, both, numel)


@dataclass(frozen=True)
class Comparison:
    """Models against a base, or against each other where there is none.

    Attributes:
        references: the models; the base first, if there is one.
        base: its number; None if no base is known.
        whole: over all tensors that are compared.
        groups: by part of the network.
        depth: relative change by layer, of each model but the base; of the largest stack of layers.
        matrices: over the matrices inside layers, for the question whether models share a base.
        unchanged: share of tensors that are the same as the base's in what was read.
        ranks: singular values that hold nine tenths of the squared norm of a change, as a share of all, by model: the
            median over some matrices; empty where that was not measured.
        as_bases: without a base, the mean cosine of the others' changes as seen from each model; of three and more.
    """

    references: tuple[str, ...]
    base: int | None
    whole: Geometry
    groups: Mapping[Group, Geometry]
    depth: Mapping[int, tuple[float, ...]]
    matrices: Geometry
    unchanged: Mapping[int, float]
    ranks: Mapping[int, float]
    as_bases: Mapping[int, float]

    @property
    def experts(self) -> list[int]:
        """The numbers of the models that are no base."""
        return [number for number in range(len(self.references)) if number != self.base]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every two experts."""
        return [(one, other) for place, one in enumerate(self.experts) for other in self.experts[place + 1 :]]

    def name(self, number: int) -> str:
        """A model's reference."""
        return self.references[number]

    def mean(self, of: Callable[[int, int], float]) -> float:
        """The mean of a number over all pairs of experts that have it."""
        found = [value for pair in self.pairs if not math.isnan(value := of(*pair))]
        return sum(found) / len(found) if found else math.nan

    def record(self) -> dict[str, Any]:
        """As JSON-able data; what cannot be calculated is null."""
        return {
            "base": None if self.base is None else self.name(self.base),
            "models": [self._of_model(number) for number in self.experts],
            "pairs": [self._of_pair(*pair) for pair in self.pairs],
        }

    def _of_model(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.name(number)}
        if self.base is None:
            return found
        return found | {
            "relative_change": known(self.whole.relative(number)),
            "weight_cosine_in_matrices": known(self.matrices.weight_cosine(self.base, number)),
            "relative_change_in_matrices": known(self.matrices.relative(number)),
            "changed_elements": known(self.whole.changed(number)),
            "unchanged_tensors": known(self.unchanged.get(number, math.nan)),
            "rank_share": known(self.ranks.get(number, math.nan)),
            "groups": {group: known(part.relative(number)) for group, part in self.groups.items()},
            "layers": [known(value) for value in self.depth.get(number, ())],
        }

    def _of_pair(self, one: int, other: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "models": [self.name(one), self.name(other)],
            "weight_cosine_in_matrices": known(self.matrices.weight_cosine(one, other)),
        }
        if self.base is None:
            return found
        return found | {
            "change_cosine": known(self.whole.change_cosine(one, other)),
            "sign_agreement": known(self.whole.sign_agreement(one, other)),
            "groups": {group: known(part.change_cosine(one, other)) for group, part in self.groups.items()},
        }


def known(value: float) -> float | None:
    """A number for JSON, four digits; None for NaN."""
    return None if math.isnan(value) else float(f"{value:.4g}")


def compare(
    references: Sequence[str], base: int | None, numbers: Sequence[Numbers], ranks: Mapping[int, float]
) -> Comparison:
    """The comparison of several models.

    Args:
        numbers: of all tensors, with the base first among the members of each, where it has the tensor.
        ranks: see `Comparison`.
    """
    count, pivot = len(references), base or 0
    joint = [tensor for tensor in numbers if len(tensor.members) > 1]
    parts: dict[Group, list[Numbers]] = {group: [t for t in joint if t.joint.group == group] for group in GROUPS}
    inner = [t for t in joint if t.joint.is_matrix and t.joint.group in ("attention", "mlp", "other")]
    return Comparison(
        tuple(references),
        base,
        geometry(joint, count, pivot),
        {group: geometry(tensors, count, pivot) for group, tensors in parts.items() if tensors},
        {} if base is None else _depth(joint, count, base),
        geometry(inner or joint, count, pivot),
        {} if base is None else _unchanged(joint, count, base),
        ranks,
        _as_bases(inner or joint, count) if base is None else {},
    )


def _as_bases(numbers: Sequence[Numbers], count: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for base in range(count) if count > 2 else ():
        seen = geometry(numbers, count, base)
        others = [number for number in range(count) if number != base]
        cosines = [seen.change_cosine(i, j) for place, i in enumerate(others) for j in others[place + 1 :]]
        if not any(map(math.isnan, cosines)):
            found[base] = sum(cosines) / len(cosines)
    return found


def _depth(numbers: Sequence[Numbers], count: int, base: int) -> dict[int, tuple[float, ...]]:
    stacks = depths(tensor.joint.name for tensor in numbers)
    if not stacks:
        return {}
    stack = max(stacks, key=lambda name: stacks[name])
    layers: list[list[Numbers]] = [[] for _ in range(stacks[stack])]
    for tensor in numbers:
        layer = layer_of(tensor.joint.name)
        if layer is not None and layer.stack == stack:
            layers[layer.index].append(tensor)
    found = [geometry(tensors, count, base) for tensors in layers]
    return {number: tuple(part.relative(number) for part in found) for number in range(count) if number != base}


def _unchanged(numbers: Sequence[Numbers], count: int, base: int) -> dict[int, float]:
    shared: dict[int, list[bool]] = {number: [] for number in range(count) if number != base}
    for tensor in numbers:
        if tensor.members[0] != base:
            continue
        for place, number in enumerate(tensor.members[1:]):
            shared[number].append(tensor.both[place, place] == 0.0)
    return {number: sum(same) / len(same) for number, same in shared.items() if same}
