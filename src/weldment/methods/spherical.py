"""Means on a sphere: `slerp`, `nuslerp`, `multislerp`, `karcher`.

Each of them is sum_i c_i x_i, and the c_i depend on the lengths of the x_i and the angles between
them alone: on the Gram matrix G_ij = <x_i, x_j>. One pass over the tensor sums G, a function of G
gives the coefficients, the kernel is a weighted sum.

G is summed in float64. A product of two float32 numbers is exact there, so G is good to about
1e-16 of |x_i| |x_j|. An angle between nearly equal vectors is not, but near zero the coefficients
depend on its square only, and so keep the accuracy of G. The sum in float32 that would be quicker
differs from device to device in the last bits, and so would the merged model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from weldment.methods.average import weighted_sum
from weldment.methods.block import CHUNK, Block, Total, Unit
from weldment.methods.method import Method, Parameter

if TYPE_CHECKING:
    from torch import Tensor

COLINEAR = 0.9995
"""`slerp` interpolates linearly where |cos| of the angle is above this."""

INDISTINCT = 1.0 - 1e-12
"""Above this |cos| no angle can be told from 0 or pi: every method interpolates linearly."""

CANCELLED = 1e-7
"""A mean of unit vectors up to this length is rounding noise (its square is known to about 1e-16)."""

_SETTLED_BITS = 40


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """Inner products <x_i, x_j> over the last dimension, in float64.

    Args:
        vectors: T tensors of one shape (..., n).

    Returns:
        (..., T, T), symmetric.
    """
    wide = [vector.double() for vector in vectors]
    product = torch.dot if wide[0].dim() == 1 else _row_products
    half = {(i, j): product(wide[i], wide[j]) for i in range(len(wide)) for j in range(i + 1)}
    rows = [torch.stack([half[max(i, j), min(i, j)] for j in range(len(wide))], -1) for i in range(len(wide))]
    return torch.stack(rows, -2)


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _column_gram(vectors: Sequence[Tensor]) -> Tensor:
    """`gram` of the columns of matrices (m, n): (n, T, T). A slab of rows at a time, to bound memory."""
    rows, columns = vectors[0].shape
    step = max(1, CHUNK // max(1, columns))
    total = torch.zeros(columns, len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    for start in range(0, rows, step):
        total += gram([vector[start : start + step].T for vector in vectors])
    return total


def lengths(products: Tensor) -> Tensor:
    """|x_i|, (..., T), from a Gram matrix (..., T, T)."""
    return products.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()


def cosines(products: Tensor, undefined: float) -> Tensor:
    """cos of the angle between x_i and x_j, (..., T, T); `undefined` where one of them is zero."""
    length = lengths(products)
    scale = length.unsqueeze(-1) * length.unsqueeze(-2)
    known = scale > 0.0
    ratio = (products / torch.where(known, scale, 1.0)).clamp(-1.0, 1.0)
    return torch.where(known, ratio, undefined)


def settled(values: Tensor) -> list[float]:
    """The values rounded to 40 bits: what differs between devices in the last bits of a sum goes."""
    return [_settled(value) for value in values.tolist()]


def _settled(value: float) -> float:
    if not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, _SETTLED_BITS)), exponent - _SETTLED_BITS)


def slerp_coefficients(products: Tensor, *, t: float, colinear: float) -> Tensor:
    """sin((1 - t) a) / sin a and sin(t a) / sin a, a the angle; 1 - t and t where |cos a| > `colinear`.

    The direction of a zero vector is anybody's: it counts as colinear.

    Args:
        products: (..., 2, 2), a Gram matrix.

    Returns:
        (..., 2).
    """
    cosine = cosines(products, undefined=1.0)[..., 0, 1]
    linear = cosine.abs() > colinear
    angle = torch.where(linear, math.pi / 2, cosine.acos())
    first = torch.where(linear, 1.0 - t, ((1.0 - t) * angle).sin() / angle.sin())
    second = torch.where(linear, t, (t * angle).sin() / angle.sin())
    return torch.stack([first, second], -1)


def multislerp_coefficients(products: Tensor, *, weight: Sequence[float], eps: float) -> Tensor:
    """The coefficients of |m|^-1 m sum_i w_i |x_i|, where m = sum_i w_i x_i / |x_i|.

    If the unit vectors cancel, |m| <= `eps` or `CANCELLED`, the mean has no direction; the
    weighted sum sum_i w_i x_i is taken then.
    """
    shares = torch.tensor(weight, dtype=torch.float64)
    length = lengths(products)
    direction = torch.where(length > 0.0, shares / torch.where(length > 0.0, length, 1.0), 0.0)
    size = (direction @ products @ direction).clamp(min=0.0).sqrt()
    return direction * (shares @ length / size) if size > max(eps, CANCELLED) else shares


def karcher_coefficients(products: Tensor, *, max_iter: int, tol: float) -> Tensor:
    """The coefficients of the Karcher mean of the unit vectors x_i / |x_i|, times the mean of the |x_i|.

    Gradient descent from the mean of the unit vectors: the mean of the tangents that lead to the
    points is followed until it is shorter than `tol`. Zero vectors count for the length only.
    If the unit vectors cancel, the first of them is the start.
    """
    length = lengths(products)
    present = (length > 0.0).double()
    inner = cosines(products, undefined=0.0)
    share = present / present.sum().clamp(min=1.0)
    mean = _unit(share, inner)
    if mean is None:
        mean = torch.zeros_like(present)
        mean[present.argmax()] = 1.0
    for _ in range(max_iter):
        step = _tangent(mean, inner, share)
        size = (step @ inner @ step).clamp(min=0.0).sqrt()
        if size < tol:
            break
        mean = mean * size.cos() + step * (size.sin() / size)
    return mean * length.mean() / torch.where(length > 0.0, length, 1.0)


def _unit(coefficients: Tensor, inner: Tensor) -> Tensor | None:
    size = float((coefficients @ inner @ coefficients).clamp(min=0.0).sqrt())
    return coefficients / size if size > CANCELLED else None


def _tangent(mean: Tensor, inner: Tensor, share: Tensor) -> Tensor:
    """Coefficients of the mean of the logarithms of the points at `mean`, a point of length 1."""
    cosine = (inner @ mean).clamp(-1.0, 1.0)
    angle = cosine.acos()
    straight = cosine.abs() > INDISTINCT
    stretch = torch.where(straight, 1.0, angle / torch.where(straight, 1.0, angle.sin())) * share
    return stretch - (stretch * cosine).sum() * mean


def _points(block: Block) -> list[Tensor]:
    """What lies on the sphere: the task vectors if there is a base, else the models."""
    return block.models if block.base is None else block.task_vectors()


def point_products(block: Block, **_: object) -> Tensor:
    """(T, T): the Gram matrix of the block."""
    return flat_products(block, _points(block))


def flat_products(block: Block, vectors: Sequence[Tensor]) -> Tensor:
    """(T, T): the Gram matrix of vectors shaped like the block's models, flattened."""
    # Fresh memory costs three times what the conversion does.
    return gram([block.scratch(torch.float64).copy_(vector).view(-1) for vector in vectors])


def _coefficients(function: Callable[..., Tensor], **settings: object) -> tuple[Total, ...]:
    finish = partial(_settled_coefficients, function=partial(function, **settings))
    return (Total("coefficients", point_products, finish=finish),)


def _settled_coefficients(products: Tensor, function: Callable[[Tensor], Tensor]) -> list[float]:
    return settled(function(products))


def _flat(block: Block) -> Tensor:
    pairs = zip(_points(block), block.statistics["coefficients"], strict=True)
    used = [(point, coefficient) for point, coefficient in pairs if coefficient != 0.0]
    merged = weighted_sum(*zip(*used, strict=True)) if used else block.models[0].zero_()
    return merged if block.base is None else merged.add_(block.base)


def slerp(block: Block, *, t: float) -> Tensor:
    """The point at the fraction t of the arc from the base to the other model.

    (sin((1 - t) a) x_0 + sin(t a) x_1) / sin a, a the angle between them as flat vectors. t = 0
    gives the base and t = 1 the other model, bit by bit. Where |cos a| > 0.9995, or one of them is
    zero, it is (1 - t) x_0 + t x_1. Lengths are not normalised.

    Source: Shoemake 1985, Animating rotation with quaternion curves.
    """
    return _flat(block)


def slerp_statistics(*, t: float) -> tuple[Total, ...]:
    """The two coefficients."""
    return _coefficients(slerp_coefficients, t=t, colinear=COLINEAR)


def _fraction(weight: Sequence[float]) -> float:
    return weight[1] / (weight[0] + weight[1])


def nuslerp(block: Block, *, weight: Sequence[float], nuslerp_flatten: bool, nuslerp_row_wise: bool) -> Tensor:
    """`slerp` of two models or, with a base, of their task vectors; t = w_1 / (w_0 + w_1).

    `nuslerp_flatten` treats the tensor as one vector. Otherwise the slices are vectors of their
    own: with `nuslerp_row_wise` the columns x[:, j] (so it is in mergekit, in spite of the name),
    without it the rows x[i]. A tensor of one dimension is one vector either way. Linear only where
    the angle cannot be told from 0 or pi, or a vector is zero.

    Source: mergekit.
    """
    if nuslerp_flatten:
        return _flat(block)
    points, t = _points(block), _fraction(weight)
    if nuslerp_row_wise:
        views = [_as_matrix(point) for point in points]
        pairs = slerp_coefficients(_column_gram(views), t=t, colinear=INDISTINCT).T
    else:
        views = points
        pairs = slerp_coefficients(gram(views), t=t, colinear=INDISTINCT).T.unsqueeze(-1)
    for view, coefficient in zip(views, pairs, strict=True):
        view.mul_(coefficient.to(view.dtype))
    merged = points[0].add_(points[1])
    return merged if block.base is None else merged.add_(block.base)


def _as_matrix(point: Tensor) -> Tensor:
    """(shape[0], rest); a tensor of fewer than two dimensions is one column."""
    return point.view(point.shape[0], -1) if point.dim() > 1 else point.view(-1, 1)


def nuslerp_unit(*, nuslerp_flatten: bool, nuslerp_row_wise: bool, **_: object) -> Unit:
    """Elements for one flat vector, the matrix for its columns, rows for rows."""
    if nuslerp_flatten:
        return "element"
    return "matrix" if nuslerp_row_wise else "row"


def nuslerp_statistics(*, weight: Sequence[float], nuslerp_flatten: bool, **_: object) -> tuple[Total, ...]:
    """The two coefficients of the flat vectors."""
    if not nuslerp_flatten:
        return ()
    return _coefficients(slerp_coefficients, t=_fraction(weight), colinear=INDISTINCT)


def check_nuslerp(*, weight: Sequence[float], **_: object) -> None:
    """The weights must have a ratio."""
    if abs(sum(weight)) < 1e-12:
        raise ValueError(f"the weights {list(weight)} sum to zero, so t = w_1 / (w_0 + w_1) is undefined")


def multislerp(block: Block, **_: object) -> Tensor:
    """Direction of the weighted mean of the unit vectors, length of the weighted mean of the lengths.

    m = sum_i w_i x_i / |x_i|; out = m / |m| * sum_i w_i |x_i|, where x_i are the models or, with a
    base, the task vectors. (Projecting the points to the tangent space at m and back, as the
    method is often told, adds nothing: the projections sum to zero.) Weights are divided by their
    sum if `normalize_weights`; otherwise they scale the length. For weighted means that follow the
    arcs see `karcher`.

    Source: mergekit.
    """
    return _flat(block)


def _shares(weight: Sequence[float], normalize: bool) -> tuple[float, ...]:
    return tuple(w / sum(weight) for w in weight) if normalize else tuple(weight)


def multislerp_statistics(*, weight: Sequence[float], normalize_weights: bool, eps: float) -> tuple[Total, ...]:
    """A coefficient for each model."""
    return _coefficients(multislerp_coefficients, weight=_shares(weight, normalize_weights), eps=eps)


def check_multislerp(*, weight: Sequence[float], normalize_weights: bool, **_: object) -> None:
    """Weights that sum to zero cannot be normalised."""
    if normalize_weights and abs(sum(weight)) < 1e-12:
        raise ValueError(f"the weights {list(weight)} sum to zero; set normalize_weights: false")


def karcher(block: Block, **_: object) -> Tensor:
    """The point of the sphere with the least sum of squared arcs to all models, equally weighted.

    The models are scaled to length 1; the result has the mean of their lengths. At most `max_iter`
    steps of gradient descent, until a step is shorter than `tol` (radians).

    Source: Karcher 1977, Riemannian center of mass.
    """
    return _flat(block)


def karcher_statistics(*, max_iter: int, tol: float) -> tuple[Total, ...]:
    """A coefficient for each model."""
    return _coefficients(karcher_coefficients, max_iter=max_iter, tol=tol)


SPHERICAL = (
    Method(
        name="slerp",
        float64=True,
        family="spherical",
        summary="point on the arc from the base to a second model",
        kernel=slerp,
        statistics=slerp_statistics,
        parameters=(Parameter("t", "place on the arc: 0 is the base, 1 the other model", required=True),),
        models=(2, 2),
        base="required",
        base_is_model=True,
        paper="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
        url="https://en.wikipedia.org/wiki/Slerp",
    ),
    Method(
        name="nuslerp",
        float64=True,
        family="spherical",
        summary="slerp with weights, of models or task vectors, as a whole or slice by slice",
        kernel=nuslerp,
        unit=nuslerp_unit,
        statistics=nuslerp_statistics,
        check=check_nuslerp,
        parameters=(
            Parameter("weight", "relative weight of each model", default=1.0, per_model=True),
            Parameter("nuslerp_flatten", "treat the tensor as one vector", kind="bool", default=True),
            Parameter(
                "nuslerp_row_wise",
                "without flatten: columns are the vectors instead of rows, as in mergekit",
                kind="bool",
                default=False,
            ),
        ),
        models=(2, 2),
        base="optional",
        paper="no paper; from mergekit",
        url="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    ),
    Method(
        name="multislerp",
        float64=True,
        family="spherical",
        summary="mean direction of any number of models or task vectors, with their mean length",
        kernel=multislerp,
        statistics=multislerp_statistics,
        check=check_multislerp,
        parameters=(
            Parameter("weight", "relative weight of each model", default=1.0, per_model=True),
            Parameter("normalize_weights", "divide the weights by their sum", kind="bool", default=True),
            Parameter("eps", "a mean of unit vectors up to this length has no direction", default=1e-8, minimum=0.0),
        ),
        models=(2, None),
        base="optional",
        paper="no paper; from mergekit",
        url="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    ),
    Method(
        name="karcher",
        float64=True,
        family="spherical",
        summary="mean of any number of models along the arcs between them",
        kernel=karcher,
        statistics=karcher_statistics,
        parameters=(
            Parameter("max_iter", "most steps of the descent", kind="int", default=10, minimum=1),
            Parameter("tol", "stop when a step is shorter than this", default=1e-5, minimum=0.0),
        ),
        models=(2, None),
        base="unused",
        paper="Karcher, Riemannian center of mass and mollifier smoothing, CPAM 1977",
        url="https://en.wikipedia.org/wiki/Karcher_mean",
    ),
)
