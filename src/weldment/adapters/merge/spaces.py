"""Where adapters are merged: on their changes, in a common subspace, on their factors, or side by side.

A change is given as (B, A, s): B (outputs, r), A (r, inputs), and s B A is added to a weight. All
functions calculate in float64 but for the methods' kernels, which use the dtype of the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weldment.adapters.lowrank import Factors, decomposed, factorised, stacked
from weldment.errors import NonFiniteError
from weldment.memory import merge_tensors
from weldment.methods import METHODS

if TYPE_CHECKING:
    from torch import Tensor

Change = tuple["Tensor", "Tensor", float]
"""(B, A, s)."""

_SAME = 1e-9
"""Directions below this share of the largest repeat others, but for rounding."""

_ROWS = 1 << 22
"""Elements of a dense change that are calculated together."""


@dataclass(frozen=True)
class Kernel:
    """A method with its parameters, applied to tensors in memory.

    Attributes:
        parameters: the kernel's keyword arguments.
        accumulate: "float32" or "float64".
        name: of the tensor, which decides random masks together with the seed.
        threads: workers.
    """

    method: str
    parameters: Mapping[str, Any]
    accumulate: str = "float32"
    seed: int = 0
    name: str = "tensor"
    threads: int = 1

    @property
    def needs_base(self) -> bool:
        row = METHODS[self.method]
        return row.base == "required" and not row.base_is_model

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return getattr(torch, self.accumulate)

    def __call__(self, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        """The merged tensor; without a base, zero stands for one where the method needs it."""
        if base is None and self.needs_base:
            base = zeros(tensors[0].shape, self.dtype)
        merged = merge_tensors(
            self.method,
            [{self.name: tensor} for tensor in tensors],
            None if base is None else {self.name: base},
            dtype=self.dtype,
            accumulate=self.accumulate,
            seed=self.seed,
            threads=self.threads,
            **self.parameters,
        )
        return merged[self.name]


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory while they are only read."""
    return torch.from_numpy(np.zeros(tuple(shape), np.float64 if dtype == torch.float64 else np.float32))


def side_by_side(terms: Sequence[tuple[Change, float]]) -> tuple[Tensor, Tensor]:
    """Factors (B, A) of sum_i c_i s_i B_i A_i: B the B_i side by side, A the c_i s_i A_i one above the other.

    Exact for any coefficients; the rank is the sum of the ranks.
    """
    return stacked([b for (b, _, _), _ in terms], [a * (s * c) for (_, a, s), c in terms])


def weighted_sum(terms: Sequence[tuple[Change, float]], *, rank: int | None = None) -> Factors:
    """sum_i c_i s_i B_i A_i, decomposed without ever being multiplied out; at most `rank` singular values of it."""
    return factorised(*side_by_side(terms), rank=rank)


def dense(change: Change, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
    """s B A, (outputs, inputs), or its transpose; multiplied in float64, some rows at a time."""
    b, a, s = change
    left, right = (a.T, b.T) if transposed else (b, a)
    out = torch.empty(left.shape[0], right.shape[1], dtype=dtype)
    step = max(1, _ROWS // max(1, out.shape[1]))
    for start in range(0, out.shape[0], step):
        out[start : start + step] = (left[start : start + step] @ right).mul_(s)
    return out


def in_delta(
    changes: Sequence[Change | None],
    base: Change | None,
    kernel: Kernel,
    *,
    transposed: bool = False,
    rank: int | None = None,
    energy: float | None = None,
) -> Factors:
    """The method on the changes themselves: dense matrices of the shape of the weight.

    Args:
        changes: None for no change.
        base: None for no change.
        transposed: the weight is stored as (inputs, outputs): what a method calls rows are its rows.
        rank, energy: what is wanted of the result, see `decomposed`.

    Raises:
        NonFiniteError: the method gave NaN or infinity.
    """
    shape = _sizes(changes, base)
    stored = shape[::-1] if transposed else shape

    def whole(change: Change | None) -> Tensor:
        return zeros(stored, kernel.dtype) if change is None else dense(change, kernel.dtype, transposed=transposed)

    merged = _finite(kernel([whole(change) for change in changes], None if base is None else whole(base)), kernel)
    return decomposed(merged.T if transposed else merged, rank=rank, energy=energy)


def _finite(merged: Tensor, kernel: Kernel) -> Tensor:
    if not torch.isfinite(merged).all():
        cause = f"{kernel.method} gave NaN or infinity, which has no decomposition"
        raise NonFiniteError(cause, where=kernel.name, fix="Look for too large weights")
    return merged


def in_core(
    changes: Sequence[Change | None], base: Change | None, kernel: Kernel, *, rank: int | None = None
) -> Factors:
    """The method on coordinates in the subspace that all changes share: M_i = U^T (s_i B_i A_i) V.

    The columns of U (outputs, p) and V (inputs, q) are orthonormal and span those of all B_i and the
    rows of all A_i, so that U M_i V^T is the change again. The result is U M V^T. U and V are never
    made: only their products with the few singular vectors that are wanted.

    The small matrices are always merged in float64.

    Args:
        rank: the largest number of singular values that is wanted; all by default.

    Raises:
        NonFiniteError: the method gave NaN or infinity.
    """
    given = [change for change in (*changes, base) if change is not None]
    u, v = Span.of([b for b, _, _ in given]), Span.of([a.T for _, a, _ in given])
    exact = replace(kernel, accumulate="float64")
    numbers = iter(range(len(given)))

    def small(change: Change | None) -> Tensor:
        if change is None:
            return zeros((u.size, v.size), torch.float64)
        number = next(numbers)
        return u.coordinates[number] @ v.coordinates[number].T * change[2]

    merged = exact([small(change) for change in changes], None if base is None else small(base))
    inner = decomposed(_finite(merged, kernel), rank=rank)
    return Factors(u.vectors(inner.u), inner.s, v.vectors(inner.v.T).T, inner.energy)


@dataclass(frozen=True)
class Span:
    """What the columns of some matrices span.

    Attributes:
        columns: (n, k), all columns, each divided by its length so that small ones are not taken for errors.
        weights: (k, size); `columns @ weights` are orthonormal.
        coordinates: of the columns of each matrix, (size, r_i).
    """

    columns: Tensor
    weights: Tensor
    coordinates: tuple[Tensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Span:
        """From the singular values of the triangular factor of all columns, which is small.

        Args:
            parts: (n, r_i), float64.
        """
        whole = torch.cat(list(parts), dim=1)
        lengths = torch.linalg.vector_norm(whole, dim=0)
        columns = whole / torch.where(lengths > 0.0, lengths, 1.0)
        _, s, v = torch.linalg.svd(torch.linalg.qr(columns, mode="r").R, full_matrices=False)
        kept = s > _SAME * s[0]
        s, v = s[kept], v[kept]
        found = (s[:, None] * v * lengths).split([part.shape[1] for part in parts], dim=1)
        return cls(columns, v.T / s, found)

    @property
    def size(self) -> int:
        """Its dimension."""
        return self.weights.shape[1]

    def vectors(self, coordinates: Tensor) -> Tensor:
        """(n, r) from coordinates (size, r)."""
        return self.columns @ (self.weights @ coordinates)


def in_factors(
    changes: Sequence[Change | None],
    base: Change | None,
    kernel: Kernel,
    coefficients: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, A): the method on the B_i and on the A_i apart, which have one rank.

    The square root of every factor goes to either side, its sign to A: sqrt|s_i| B_i and
    sign(s_i) sqrt|s_i| A_i are merged with weights sqrt|w_i| and sign(w_i) sqrt|w_i|, and so is lambda.

    Args:
        coefficients: one per change, and the base's last if there is one, where the merge is their weighted sum.
    """
    given = [*changes, *([base] if base is not None else [])]
    pattern = next(change for change in given if change is not None)
    lefts = [zeros(pattern[0].shape, torch.float64) if c is None else c[0] * _root(c[2])[0] for c in given]
    rights = [zeros(pattern[1].shape, torch.float64) if c is None else c[1] * _root(c[2])[1] for c in given]
    if coefficients is not None:
        roots = [_root(c) for c in coefficients]
        b = sum((x * root for x, (root, _) in zip(lefts, roots, strict=True)), torch.zeros_like(lefts[0]))
        a = sum((x * root for x, (_, root) in zip(rights, roots, strict=True)), torch.zeros_like(rights[0]))
        return b, a
    count = len(changes)
    merged: list[Tensor] = []
    for side, (parts, name) in enumerate(((lefts, "lora_B"), (rights, "lora_A"))):
        halved = replace(kernel, parameters=_halves(kernel, side), name=f"{kernel.name}.{name}")
        merged.append(halved(parts[:count], parts[count] if base is not None else None).double())
    return merged[0], merged[1]


def _root(factor: float) -> tuple[float, float]:
    """Two numbers of one magnitude whose product is the factor; the sign is the second's."""
    root = abs(factor) ** 0.5
    return root, -root if factor < 0.0 else root


def _halves(kernel: Kernel, side: int) -> dict[str, Any]:
    """The parameters for B (side 0) or A (side 1), with the roots of weights and lambda."""
    parameters = dict(kernel.parameters)
    if "weight" in parameters:
        weights: Sequence[float] = parameters["weight"]
        if parameters.get("normalize") and METHODS[kernel.method].parameter("elect") is None:
            total, parameters["normalize"] = sum(weights), False
            weights = [weight / total for weight in weights]
        parameters["weight"] = tuple(_root(weight)[side] for weight in weights)
    if "lambda_" in parameters:
        parameters["lambda_"] = _root(parameters["lambda_"])[side]
    return parameters


def _sizes(changes: Sequence[Change | None], base: Change | None) -> tuple[int, int]:
    b, a, _ = next(change for change in (*changes, base) if change is not None)
    return b.shape[0], a.shape[1]
