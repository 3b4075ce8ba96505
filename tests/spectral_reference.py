"""The spectral methods, naively: see `reference`.

Every decomposition is a full singular value decomposition in float64. Parameters are what kernels get: patterns have
become `form`, (matrices, rows, columns) or None, and `ignored`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Models = Sequence[Array]
Floats = Sequence[float]
Form = tuple[int, int, int]

ROUNDING = 1e-6
DEPENDENT = 1e-5
CUT = 1e-2


def svd(matrix: Array, cut: float = ROUNDING) -> tuple[Array, Array, Array]:
    """U, S, V' without the singular values up to `cut` times the largest."""
    u, s, rows = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.sum(s > cut * s.max(initial=0.0)))
    return u[:, :rank], s[:rank], rows[:rank]


def polar(vectors: Array) -> Array:
    """P Q' of X = P D Q', on the range of X."""
    p, _, q = svd(vectors, DEPENDENT)
    return p @ q


def _merged(
    models: Models, base: Array | None, form: Form | None, lambda_: float, taus: Models, merge: Callable[..., Array]
) -> Array:
    """theta_0 + lambda * merge(taus), matrix by matrix, or the taus' mean."""
    assert base is not None
    if form is None:
        return base + lambda_ * np.mean(taus, axis=0)
    stacks = [tau.reshape(form) for tau in taus]
    found = [merge([stack[number] for stack in stacks]) for number in range(form[0])]
    return base + lambda_ * np.array(found).reshape(base.shape)


def _method(merge: Callable[..., Array]) -> Callable[..., Array]:
    def reference(
        models: Models,
        base: Array | None,
        *,
        weight: Floats,
        form: Form | None,
        ignored: bool,
        lambda_: float = 1.0,
        **parameters: Any,
    ) -> Array:
        assert base is not None
        if ignored:
            return base
        taus = [w * (model - base) for w, model in zip(weight, models, strict=True)]
        return _merged(models, base, form, lambda_, taus, partial(merge, **parameters))

    reference.__name__ = merge.__name__
    return reference


@_method
def tsv_m(taus: Models) -> Array:
    each = max(1, min(taus[0].shape) // len(taus))
    found = [svd(tau) for tau in taus if tau.any()]
    if not found:
        return np.zeros_like(taus[0])
    u = np.concatenate([u[:, :each] for u, _, _ in found], axis=1)
    s = np.concatenate([s[:each] for _, s, _ in found])
    v = np.concatenate([rows[:each].T for _, _, rows in found], axis=1)
    return polar(u) @ np.diag(s) @ polar(v).T


@_method
def iso_c(taus: Models) -> Array:
    u, s, rows = svd(np.sum(taus, axis=0))
    return s.mean() * u @ rows if s.size else np.zeros_like(taus[0])


def _foremost(matrix: Array, count: int, size: float) -> tuple[Array, Array, Array]:
    u, s, rows = svd(matrix)
    count = min(count, int(np.sum(s > ROUNDING * size)))
    return u[:, :count], s[:count], rows[:count].T


@_method
def iso_cts(taus: Models, *, common_space_fraction: float) -> Array:
    r, total = min(taus[0].shape), np.sum(taus, axis=0)
    own = min(round((r - int(common_space_fraction * r)) / len(taus)), r // len(taus))
    size = max(float(np.linalg.norm(tau)) for tau in taus)
    common = _foremost(total, r - len(taus) * own, size)
    outside = np.eye(len(total)) - common[0] @ common[0].T
    u, s, v = zip(common, *(_foremost(outside @ tau, own, size) for tau in taus), strict=True)
    values = np.concatenate(s)
    if not values.size:
        return np.zeros_like(total)
    return values.mean() * polar(np.concatenate(u, axis=1)) @ polar(np.concatenate(v, axis=1)).T


def _ties(parts: Models, density: Floats) -> Array:
    """The largest entries of every part, their signs elected by mass (+ for zero), their disjoint mean."""
    trimmed = []
    for part, share in zip(parts, density, strict=True):
        threshold = np.sort(np.abs(part), axis=None)[part.size - max(1, int(share * part.size))]
        trimmed.append(np.where(np.abs(part) >= threshold, part, 0.0))
    signs = np.where(np.sum(trimmed, axis=0) < 0.0, -1.0, 1.0)
    agree = [np.where(np.sign(part) == signs, part, 0.0) for part in trimmed]
    return np.sum(agree, axis=0) / np.maximum(np.count_nonzero(agree, axis=0), 1)


def clear_rounding(part: Array, tau: Array, values: Array) -> Array:
    """Of U_i: zero where the matrix has a row of zeros, and where it has no part in a direction but for rounding."""
    lengths, rows = np.linalg.norm(part, axis=0) * values, np.any(tau, axis=1, keepdims=True)
    return np.where(rows & (lengths > ROUNDING * values.max(initial=0.0)), part, 0.0)


@_method
def knots_ties(taus: Models, *, density: Floats, cutoff: float) -> Array:
    u, s, rows = svd(np.concatenate(taus, axis=1), cutoff)
    if not s.size:
        return np.zeros_like(taus[0])
    split = zip(np.split(rows.T, len(taus)), taus, strict=True)
    merged = _ties([clear_rounding(part, tau.T, s) for part, tau in split], density)
    return u @ np.diag(s) @ merged.T


def _descended(taus: Models, factors: Callable[[Array], Array]) -> Array:
    total = np.sum(taus, axis=0)
    taus = [tau for tau in taus if tau.any()]
    if not taus:
        return total
    sizes = [float(np.linalg.norm(tau)) for tau in taus]
    _, roots, rows = svd(np.concatenate([tau / size for tau, size in zip(taus, sizes, strict=True)]))
    f, v = factors(roots**2), rows.T
    pull = np.sum([tau @ (tau.T @ tau) / size**2 for tau, size in zip(taus, sizes, strict=True)], axis=0)
    return total - total @ v @ np.diag(f) @ v.T + pull @ v @ np.diag(f / roots**2) @ v.T


def _first(factors: Array, count: float) -> Array:
    return np.where(np.arange(len(factors)) < math.ceil(count * (1.0 - 1e-9)), factors, 0.0)


@_method
def swudi(taus: Models, *, t: float, keep: float) -> Array:
    return _descended(taus, lambda squares: _first(1.0 - np.exp(-t * squares), keep * taus[0].shape[1]))


@_method
def aswudi(taus: Models) -> Array:
    def factors(squares: Array) -> Array:
        return _first(np.ones_like(squares), float(np.sum(np.sqrt(squares)) ** 2 / np.sum(squares)))

    return _descended(taus, factors)


@dataclass(frozen=True)
class Stack:
    """A vertical stack D = U S V' in parts: columns of U_i of length one, the lengths times S, V'."""

    shares: Array  # (models, m, k)
    sizes: Array  # (models, 1, k)
    rows: Array  # (k, n)

    def threshold(self, drop: float) -> float:
        """The smallest magnitude that stays when a share `drop` is dropped; columns of zeros do not count."""
        counted = np.sort(np.concatenate([np.abs(part[:, part.any(axis=0)]).ravel() for part in self.shares]))
        dropped = counted.size - round(counted.size * (1.0 - drop))
        return float(counted[dropped - 1]) if dropped else 0.0


def stack(taus: Models, cut: float = CUT) -> Stack:
    u, s, rows = svd(np.concatenate(taus), cut)
    split = zip(np.split(u, len(taus)), taus, strict=True)
    parts = np.array([clear_rounding(part, tau, s) for part, tau in split])
    lengths = np.linalg.norm(parts, axis=1, keepdims=True)
    shares = np.divide(parts, lengths, out=np.zeros_like(parts), where=lengths > 0.0)
    return Stack(shares, lengths * s, rows)


def resolved(parts: Array, coefficient: Floats, *, signs: bool, disjoint: bool) -> Array:
    """The mean of c_i x_i, of those with the elected sign, over those that are not zero or over all."""
    if signs:
        elected = np.sign(parts.sum(axis=0))
        elected = np.where(elected == 0.0, np.sign(elected.sum()), elected)
        parts = np.where(np.sign(parts) == elected, parts, 0.0)
    weighted = np.array(coefficient).reshape(-1, *[1] * (parts.ndim - 1)) * parts
    count = np.maximum(np.count_nonzero(weighted, axis=0), 1) if disjoint else len(parts)
    return weighted.sum(axis=0) / count


def drm_matrix(
    taus: Models,
    coefficient: Floats,
    drop: float,
    *,
    signs: bool = True,
    disjoint: bool = True,
    horizontal: bool = False,
    decide: Callable[[Array, float], NDArray[np.bool_]] = lambda magnitudes, threshold: magnitudes >= threshold,
) -> Array:
    """One matrix; `decide` says of magnitudes which are kept at a threshold."""
    if horizontal:
        turned = [tau.T for tau in taus]
        return drm_matrix(turned, coefficient, drop, signs=signs, disjoint=disjoint, decide=decide).T
    if drop == 0.0:
        return resolved(np.array(taus), coefficient, signs=False, disjoint=disjoint)
    found = stack(taus)
    if not found.rows.size:
        return np.zeros_like(taus[0])
    kept = np.where(decide(np.abs(found.shares), found.threshold(drop)), found.shares * found.sizes, 0.0)
    return resolved(kept, coefficient, signs=signs, disjoint=disjoint) @ found.rows


def orthogonality(taus: Models, *, weighted: bool) -> float:
    """sum_ij (1 - |<U_i, U_j> - [i = j]|), the parts flattened, of U or of U S."""
    u, s, _ = svd(np.concatenate(taus), CUT)
    parts = np.split(u * s if weighted else u, len(taus))
    return sum(1.0 - abs(float(np.sum(x * y)) - (i == j)) for i, x in enumerate(parts) for j, y in enumerate(parts))


def is_horizontal(taus: Models, direction: str, criterion: str) -> bool:
    turned = [tau.T for tau in taus]
    if direction != "auto":
        return direction == "horizontal"
    if criterion == "rank":
        return len(svd(np.concatenate(turned), 0.1)[1]) < len(svd(np.concatenate(taus), 0.1)[1])
    weighted = criterion == "weighted_orthogonality"
    across, down = orthogonality(turned, weighted=weighted), orthogonality(taus, weighted=weighted)
    return across - down > 1e-5 * (abs(across) + abs(down))


def narrowed(tau: Array, dtype: str) -> Array:
    """Rounded to a dtype of torch."""
    return torch.from_numpy(tau).to(getattr(torch, dtype)).double().numpy() if dtype != "float32" else tau


def _trimmed(tau: Array, drop: float) -> Array:
    ordered = np.sort(np.abs(tau), axis=None)
    dropped = tau.size - round(tau.size * (1.0 - drop))
    return np.where(np.abs(tau) >= ordered[dropped - 1], tau, 0.0) if dropped else tau


def drm(
    models: Models,
    base: Array | None,
    *,
    coefficient: Floats,
    singular_matrices_drop_rate: float,
    direction: str,
    auto_criterion: str,
    enable_disjoint_mean: bool,
    enable_sign_resolution: bool,
    non_linear_module_entries_drop_rate: float,
    svd_dtype: str,
    form: Form | None,
    ignored: bool,
    lambda_: float = 1.0,
) -> Array:
    assert base is not None
    taus = [narrowed(model - base, svd_dtype) for model in models]
    chosen: dict[str, Any] = {"signs": enable_sign_resolution, "disjoint": enable_disjoint_mean}
    if ignored:
        return base
    if form is None:
        parts = np.array([_trimmed(tau, non_linear_module_entries_drop_rate) for tau in taus])
        return base + lambda_ * resolved(parts, coefficient, **chosen)

    def merge(matrices: Models) -> Array:
        turned = is_horizontal(matrices, direction, auto_criterion)
        return drm_matrix(matrices, coefficient, singular_matrices_drop_rate, horizontal=turned, **chosen)

    return _merged(models, base, form, lambda_, taus, merge)


SPECTRAL_REFERENCE: dict[str, Callable[..., Array]] = {
    function.__name__: function for function in (drm, tsv_m, iso_c, iso_cts, knots_ties, swudi, aswudi)
}
