"""Every method, naively: whole tensors, numpy, float64, straight from the formula.

`REFERENCE[name](models, base, **parameters)` takes the models as arrays of one shape. Where a
method counts its base among the models (`base_is_model`), `models` is `[base, other]` and `base`
is None. Per-model parameters are sequences. Random methods take the masks they drew: `keep`, one
array of 0 and 1 for each model. Statistics are taken over the arrays given: for those of a whole
model (`trim: global`) pass the concatenated, flattened model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from spectral_reference import SPECTRAL_REFERENCE

Array = NDArray[np.float64]
Models = Sequence[Array]
Floats = Sequence[float]

COLINEAR = 0.9995
CANCELLED = 1e-7
INDISTINCT = 1.0 - 1e-12


def _wide(models: Models) -> list[Array]:
    return [np.asarray(model, dtype=np.float64) for model in models]


def _taus(models: Models, base: Array | None) -> list[Array]:
    assert base is not None
    return [model - np.asarray(base, dtype=np.float64) for model in _wide(models)]


def _sum(parts: Models, weight: Floats) -> Array:
    return np.sum([w * part for w, part in zip(weight, parts, strict=True)], axis=0)


def _dot(x: Array, y: Array) -> float:
    return float(np.sum(x * y))


def _rows(x: Array) -> Array:
    return x.reshape(1, -1) if x.ndim < 2 else x.reshape(x.shape[0], -1)


# Averages


def linear(models: Models, base: Array | None = None, *, weight: Floats, normalize: bool = True) -> Array:
    return _sum(_wide(models), weight) / (sum(weight) if normalize else 1.0)


def passthrough(models: Models, base: Array | None = None, *, scale: Floats = (1.0,)) -> Array:
    return scale[0] * _wide(models)[0]


def nearswap(models: Models, base: Array | None = None, *, t: float) -> Array:
    origin, other = _wide(models)
    distance = np.abs(other - origin)
    share = np.where(distance > t, t / np.where(distance > 0.0, distance, 1.0), 1.0)
    return (1.0 - share) * origin + share * other


# Spheres


def _slerp(x: Array, y: Array, t: float, colinear: float) -> Array:
    lengths = math.sqrt(_dot(x, x)) * math.sqrt(_dot(y, y))
    cosine = _dot(x, y) / lengths if lengths > 0.0 else 1.0
    if abs(cosine) > colinear:
        return (1.0 - t) * x + t * y
    angle = math.acos(cosine)
    return (math.sin((1.0 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def slerp(models: Models, base: Array | None = None, *, t: float) -> Array:
    first, second = _wide(models)
    return _slerp(first, second, t, COLINEAR)


def nuslerp(
    models: Models,
    base: Array | None = None,
    *,
    weight: Floats,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:
    first, second = _wide(models) if base is None else _taus(models, base)
    origin = 0.0 if base is None else np.asarray(base, dtype=np.float64)
    t = weight[1] / (weight[0] + weight[1])
    if nuslerp_flatten:
        return origin + _slerp(first, second, t, INDISTINCT)
    x, y = _rows(first), _rows(second)
    if nuslerp_row_wise and first.ndim > 1:
        x, y = x.T, y.T
    merged = np.array([_slerp(p, q, t, INDISTINCT) for p, q in zip(x, y, strict=True)]).reshape(x.shape)
    if nuslerp_row_wise and first.ndim > 1:
        merged = merged.T
    return origin + merged.reshape(first.shape)


def _units(points: Models) -> tuple[list[Array], list[float]]:
    lengths = [math.sqrt(_dot(point, point)) for point in points]
    return [p / n if n > 0.0 else p for p, n in zip(points, lengths, strict=True)], lengths


def multislerp(
    models: Models,
    base: Array | None = None,
    *,
    weight: Floats,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    points = _wide(models) if base is None else _taus(models, base)
    origin = 0.0 if base is None else np.asarray(base, dtype=np.float64)
    shares = np.array(weight) / (sum(weight) if normalize_weights else 1.0)
    units, lengths = _units(points)
    mean = _sum(units, list(shares))
    size = math.sqrt(_dot(mean, mean))
    if size <= max(eps, CANCELLED):
        return origin + _sum(points, list(shares))
    return origin + mean / size * float(shares @ np.array(lengths))


def karcher(models: Models, base: Array | None = None, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    points = _wide(models)
    units, lengths = _units(points)
    units = [unit for unit, length in zip(units, lengths, strict=True) if length > 0.0]
    if not units:
        return np.zeros_like(points[0])
    mean = np.mean(units, axis=0)
    size = math.sqrt(_dot(mean, mean))
    mean = mean / size if size > CANCELLED else units[0]
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for unit in units:
            cosine = min(1.0, max(-1.0, _dot(unit, mean)))
            angle = math.acos(cosine)
            stretch = angle / math.sin(angle) if 1e-12 < angle < math.pi - 1e-6 else 1.0
            step = step + stretch * (unit - cosine * mean) / len(units)
        length = math.sqrt(_dot(step, step))
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
    return mean * float(np.mean(lengths))


# Task vectors


def task_arithmetic(
    models: Models, base: Array | None, *, weight: Floats, normalize: bool = False, lambda_: float = 1.0
) -> Array:
    return _combined(_taus(models, base), base, weight, normalize, lambda_)


def _combined(parts: Models, base: Array | None, weight: Floats, normalize: bool, lambda_: float) -> Array:
    assert base is not None
    return base + lambda_ * _sum(parts, weight) / (sum(weight) if normalize else 1.0)


def _consensus(
    parts: Models,
    base: Array | None,
    weight: Floats,
    normalize: bool,
    lambda_: float,
    elect: str = "mass",
    sign_ties: str = "positive",
) -> Array:
    assert base is not None
    weighted = np.array([w * part for w, part in zip(weight, parts, strict=True)])
    votes = weighted if elect == "mass" else np.sign(weighted)
    signs = np.sign(votes.sum(axis=0))
    majority = -1.0 if sign_ties == "majority" and signs.sum() < 0.0 else 1.0
    signs = np.where(signs == 0.0, majority, signs)
    agree = (np.sign(weighted) == signs).astype(np.float64)
    merged = (weighted * agree).sum(axis=0)
    if normalize:
        share = _sum(list(agree), weight)
        merged = np.where(share != 0.0, merged / np.where(share != 0.0, share, 1.0), merged)
    return base + lambda_ * merged


def _top(values: Array, count: int) -> Array:
    """1 where a value is at least the `count`-th largest, else 0."""
    threshold = np.sort(values, axis=None)[values.size - count]
    return (values >= threshold).astype(np.float64)


def _trim_top(tau: Array, density: float) -> Array:
    if density >= 1.0 or tau.size == 0:
        return tau
    return tau * _top(np.abs(tau), max(1, int(density * tau.size)))


def ties(
    models: Models,
    base: Array | None,
    *,
    weight: Floats,
    density: Floats,
    normalize: bool = True,
    lambda_: float = 1.0,
    trim: str = "tensor",
    elect: str = "mass",
    sign_ties: str = "positive",
) -> Array:
    assert trim in ("tensor", "global")
    trimmed = [_trim_top(tau, d) for tau, d in zip(_taus(models, base), density, strict=True)]
    return _consensus(trimmed, base, weight, normalize, lambda_, elect, sign_ties)


def _rescaled(tau: Array, kept: Array, keep_probability: Array | float, rescale: str) -> Array:
    if rescale == "false":
        return kept
    if rescale == "norm":
        after = float(np.abs(kept).sum())
        return kept * (float(np.abs(tau).sum()) / after) if after > 0.0 else kept
    return kept / keep_probability


def _dare(models: Models, base: Array | None, density: Floats, keep: Models, rescale: str) -> list[Array]:
    taus = _taus(models, base)
    return [_rescaled(tau, tau * k, d, rescale) for tau, d, k in zip(taus, density, keep, strict=True)]


def dare_linear(
    models: Models,
    base: Array | None,
    *,
    weight: Floats,
    density: Floats,
    keep: Models,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: str = "true",
) -> Array:
    return _combined(_dare(models, base, density, keep, rescale), base, weight, normalize, lambda_)


def dare_ties(
    models: Models,
    base: Array | None,
    *,
    weight: Floats,
    density: Floats,
    keep: Models,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: str = "true",
    elect: str = "mass",
) -> Array:
    return _consensus(_dare(models, base, density, keep, rescale), base, weight, normalize, lambda_, elect)


def della_probabilities(tau: Array, density: float, epsilon: float) -> Array:
    """Keep probability of every element, by its rank of magnitude in its row, in steps of 1/65536."""
    rows = _rows(tau)
    if rows.shape[1] < 2:
        return np.full(tau.shape, np.round(density * 65536) / 65536)
    ranks = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1)
    keep = density - epsilon + 2.0 * epsilon * ranks / (rows.shape[1] - 1)
    return (np.round(keep * 65536) / 65536).reshape(tau.shape)


def _della(
    models: Models, base: Array | None, density: Floats, epsilon: Floats, keep: Models, rescale: str
) -> list[Array]:
    return [
        _rescaled(tau, tau * k, della_probabilities(tau, d, e), rescale)
        for tau, d, e, k in zip(_taus(models, base), density, epsilon, keep, strict=True)
    ]


def della_linear(
    models: Models,
    base: Array | None,
    *,
    weight: Floats,
    density: Floats,
    epsilon: Floats,
    keep: Models,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: str = "true",
) -> Array:
    parts = _della(models, base, density, epsilon, keep, rescale)
    return _combined(parts, base, weight, normalize, lambda_)


def della(
    models: Models,
    base: Array | None,
    *,
    weight: Floats,
    density: Floats,
    epsilon: Floats,
    keep: Models,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: str = "true",
    elect: str = "mass",
) -> Array:
    parts = _della(models, base, density, epsilon, keep, rescale)
    return _consensus(parts, base, weight, normalize, lambda_, elect)


def _crumbs(tau: Array, density: float, gamma: float) -> Array:
    """Drop the floor(gamma * n) largest, keep the floor(density * n) largest of the rest; equal ones go together."""
    count = max(1, int(density * tau.size))
    top = min(int(gamma * tau.size), tau.size - count)
    ascending = np.sort(np.abs(tau), axis=None)
    low = ascending[tau.size - top - count]
    high = ascending[tau.size - top] if top > 0 else np.inf
    return tau * ((np.abs(tau) >= low) & (np.abs(tau) < high))


def breadcrumbs(
    models: Models,
    base: Array | None,
    *,
    weight: Floats,
    density: Floats,
    gamma: Floats,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Array:
    parts = [_crumbs(tau, d, g) for tau, d, g in zip(_taus(models, base), density, gamma, strict=True)]
    return _combined(parts, base, weight, normalize, lambda_)


def breadcrumbs_ties(
    models: Models,
    base: Array | None,
    *,
    weight: Floats,
    density: Floats,
    gamma: Floats,
    normalize: bool = False,
    lambda_: float = 1.0,
    elect: str = "mass",
) -> Array:
    parts = [_crumbs(tau, d, g) for tau, d, g in zip(_taus(models, base), density, gamma, strict=True)]
    return _consensus(parts, base, weight, normalize, lambda_, elect)


# Selection


def sce(models: Models, base: Array | None, *, select_topk: float = 1.0, lambda_: float = 1.0) -> Array:
    assert base is not None
    taus = np.array(_taus(models, base))
    spread = np.sqrt(np.mean((taus - taus.mean(axis=0)) ** 2, axis=0))
    varying = np.count_nonzero(spread)
    if select_topk < 1.0 and varying:
        taus = taus * _top(spread, max(1, int(select_topk * varying)))
    energy = np.array([_dot(tau, tau) for tau in taus])
    weight = energy / energy.sum() if energy.sum() > 0.0 else np.ones(len(taus))
    signs = np.where(taus.sum(axis=0) < 0.0, -1.0, 1.0)
    agree = (np.sign(taus) == signs).astype(np.float64)
    share = np.tensordot(weight, agree, axes=1)
    total = np.tensordot(weight, taus * agree, axes=1)
    return base + lambda_ * np.where(share > 0.0, total / np.where(share > 0.0, share, 1.0), 0.0)


def ram(models: Models, base: Array | None, *, epsilon: float = 1e-5) -> Array:
    return ramplus_tl(models, base, epsilon=epsilon, r=0.0, alpha=0.0)


def ramplus_tl(
    models: Models, base: Array | None, *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Array:
    assert base is not None
    taus = np.array(_taus(models, base))
    changed = np.abs(taus) > epsilon
    count = changed.sum(axis=0)
    merged = np.zeros_like(taus[0])
    for tau, mask in zip(taus, changed, strict=True):
        shared, unique = np.sum(mask & (count > 1)), np.sum(mask & (count == 1))
        ratio = shared / unique if unique else alpha
        merged += np.where(mask & (count == 1), (1.0 + r * min(ratio, alpha)) * tau, 0.0)
        merged += np.where(mask & (count > 1), tau / np.maximum(count, 1), 0.0)
    return base + merged


def _cosine(x: Array, y: Array) -> float:
    lengths = math.sqrt(_dot(x, x)) * math.sqrt(_dot(y, y))
    return _dot(x, y) / lengths if lengths > 0.0 else 0.0


def _stock_share(taus: Models) -> float:
    cosine = max(0.0, float(np.mean([_cosine(x, y) for x, y in combinations(taus, 2)])))
    return len(taus) * cosine / (1.0 + (len(taus) - 1) * cosine)


def model_stock(models: Models, base: Array | None, *, filter_wise: bool = False) -> Array:
    assert base is not None
    taus = _taus(models, base)
    if not filter_wise:
        return base + _stock_share(taus) * np.mean(taus, axis=0)
    rows = [_rows(tau) for tau in taus]
    shares = np.array([_stock_share([tau[i] for tau in rows]) for i in range(len(rows[0]))])
    return base + (shares[:, None] * np.mean(rows, axis=0)).reshape(taus[0].shape)


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def arcee_fusion(models: Models, base: Array | None = None) -> Array:
    origin, other = _wide(models)
    p, q = _log_softmax(_rows(origin)), _log_softmax(_rows(other))
    divergence = np.maximum((np.exp(q) * (q - p)).sum(axis=1, keepdims=True), 0.0)
    importance = np.abs(_rows(other) - _rows(origin)) * divergence
    low, median, high = np.quantile(importance, [0.25, 0.5, 0.75], method="lower")
    important = (importance >= median + 1.5 * (high - low)).reshape(origin.shape)
    return np.where(important, other, origin)


def _unit_range(x: Array, low: float, high: float) -> Array:
    if high > low:
        return (np.clip(x, low, high) - low) / (high - low)
    return ((x >= high) & (x > 0.0)).astype(np.float64)


def pcb(
    models: Models,
    base: Array | None,
    *,
    weight: Floats,
    density: float = 0.1,
    lambda_: float = 1.0,
    trim: str = "tensor",
) -> Array:
    assert base is not None
    assert trim in ("tensor", "global")
    taus = np.array(_taus(models, base))
    total, n = taus.sum(axis=0), taus[0].size
    merged, share = np.zeros_like(total), np.zeros_like(total)
    for tau, w in zip(taus, weight, strict=True):
        ordered = np.sort(np.abs(tau), axis=None)
        low, high = ordered[int(n * 0.0001)], ordered[max(0, int(n * 0.9999 - 1))]
        high = max(low, high)
        clamped = np.clip(np.abs(tau), low, high)
        intra = ((clamped - low) / (high - low) if high > low else np.zeros_like(tau)) ** 2
        score = np.exp(len(taus) * (intra - 1.0)) * np.tanh(tau * total)
        ordered = np.sort(score, axis=None)
        scale = _unit_range(score, float(ordered[min(n - 1, int(n * (1.0 - density)))]), float(ordered[-1]))
        merged += w * np.sign(tau) * clamped * scale
        share += scale
    return base + lambda_ * merged / np.maximum(share, 1e-12)


def consensus_ta(models: Models, base: Array | None, *, lambda_t: Floats, k: int = 2, lambda_: float = 1.0) -> Array:
    assert base is not None
    taus = _taus(models, base)
    total = np.sum(taus, axis=0)
    votes = np.sum([np.abs(tau) >= t * np.abs(total - tau) for tau, t in zip(taus, lambda_t, strict=True)], axis=0)
    return base + lambda_ * np.where(votes >= k, total, 0.0)


def magmax(models: Models, base: Array | None, *, lambda_: float = 1.0) -> Array:
    assert base is not None
    largest, smallest = np.max(_taus(models, base), axis=0), np.min(_taus(models, base), axis=0)
    return base + lambda_ * np.where(largest >= -smallest, largest, smallest)


REFERENCE: dict[str, Callable[..., Array]] = SPECTRAL_REFERENCE | {
    function.__name__: function
    for function in (
        linear, passthrough, nearswap,
        slerp, nuslerp, multislerp, karcher,
        task_arithmetic, ties, dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties,
        sce, ram, ramplus_tl, model_stock, arcee_fusion, pcb, consensus_ta, magmax,
    )
}  # fmt: skip
