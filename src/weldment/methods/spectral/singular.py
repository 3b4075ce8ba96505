"""Merges of singular values and vectors: `tsv_m`, `iso_c`, `iso_cts`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weldment.methods.average import sum_into
from weldment.methods.method import Method, Parameter
from weldment.methods.spectral.bases import RANK, SMALL, right_basis, triples, with_values
from weldment.methods.spectral.costs import SpectralCost, own_side
from weldment.methods.spectral.matrices import SELECTION, Scale, spectral
from weldment.methods.task_vectors import LAMBDA, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor


def tsv_m(taus: list[Tensor], scale: Scale) -> Tensor:
    """theta_0 + lambda * polar(U) S polar(V)' of the foremost singular triples of all experts.

    U, S and V hold the first max(1, floor(min(m, n) / T)) singular triples of every w_i tau_i, side by side.
    polar(X) = X (X'X)^(-1/2), the orthonormal matrix nearest to X, on the range of X: experts that are equal
    count once. Triples that come of the rounding of the models are left out. Other tensors:
    theta_0 + lambda * mean_i w_i tau_i.

    Source: Gargiulo et al. 2025, Task Singular Vectors (TSV-Merge).
    """
    each = max(1, min(taus[0].shape) // len(taus))
    found = [_foremost(exactly(tau), each, scale.rounding) for tau in taus]
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    if not s.numel():
        return torch.zeros_like(taus[0])
    (p, q), (x, y) = polar(u), polar(v)
    return p @ ((q.T * s) @ y) @ x.T


def exactly(matrix: Tensor) -> Tensor:
    """The matrix in float64 where its singular vectors are calculated in it anyway.

    Vectors of different experts may be almost dependent: what rounding leaves in them grows in `polar`.
    """
    return matrix.double() if min(matrix.shape) <= SMALL else matrix


_DEPENDENT = 1e-5
"""Singular values of vectors of length one below this share of the largest mean that the vectors are dependent."""


def polar(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """P (m, r) and Q (k, r) of X = P D Q', (m, k) of rank r: the polar factor of X, on its range, is P Q'."""
    found = right_basis([[vectors]], _DEPENDENT)
    return found.images[0].div_(found.values), found.vectors


def iso_c(taus: list[Tensor], scale: Scale) -> Tensor:
    """theta_0 + lambda * s U V', where U S V' = sum_i w_i tau_i and s is the mean of the singular values.

    Values that come of the rounding of the models count neither in the mean nor in U V', so the merge of low-rank
    changes stays one. Other tensors: theta_0 + lambda * mean_i w_i tau_i.

    Source: Marczak et al. 2025, No Task Left Behind (Iso-C).
    """
    return isotropic(sum_into(taus[0], taus), scale.rounding)


def isotropic(total: Tensor, least: float = 0.0) -> Tensor:
    """The matrix with all of its singular values above `least` replaced by their mean, without the others."""
    if not bool(total.any()):
        return total
    return with_values(total, lambda values: values.mean(), least)


def subspace_sizes(rank: int, models: int, common: float) -> tuple[int, int]:
    """Vectors of the common subspace and of each expert's own: k_c = r - T k_t, k_t = round((r - floor(c r)) / T)."""
    own = min(round((rank - int(common * rank)) / models), rank // models)
    return rank - models * own, own


def iso_cts(taus: list[Tensor], scale: Scale, *, common_space_fraction: float) -> Tensor:
    """theta_0 + lambda * s polar(U) polar(V)', of the foremost triples that experts have in common and alone.

    Common: the first k_c singular triples of sum_i w_i tau_i. Alone: the first k_t of what of w_i tau_i lies
    outside the common left subspace, (I - U_c U_c') w_i tau_i. k_t = round((r - floor(common_space_fraction * r)) / T),
    at most floor(r / T), r = min(m, n), and k_c = r - T k_t. s is the mean of all their singular values. Triples that
    come of rounding are left out. Other tensors: theta_0 + lambda * mean_i w_i tau_i.

    Source: Marczak et al. 2025, No Task Left Behind (Iso-CTS).
    """
    common, own = subspace_sizes(min(taus[0].shape), len(taus), common_space_fraction)
    taus = [exactly(tau) for tau in taus]
    total = sum_into(torch.empty_like(taus[0]), taus)
    least = max(scale.rounding, _rounding(taus))
    found = [_foremost(total, common, least)]
    shared = found[0][0]
    for tau in taus if own else ():
        found.append(_foremost(tau.sub_(shared @ (shared.T @ tau)), own, least))
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    if not s.numel():
        return torch.zeros_like(total)
    (p, q), (x, y) = polar(u), polar(v)
    return p @ ((q.T @ y) * s.mean()) @ x.T


def _rounding(taus: list[Tensor]) -> float:
    """What is left, at most, of a singular value of zero when directions are projected out of a matrix."""
    share = RANK if taus[0].dtype == torch.float64 else 10.0 * RANK
    return share * max(float(torch.linalg.vector_norm(tau)) for tau in taus)


def _foremost(matrix: Tensor, count: int, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triples, those with values above `least`."""
    if not bool(matrix.any()):
        return matrix[:, :0], matrix.new_empty(0), matrix.T[:, :0]
    u, s, v = triples(matrix, count=count)
    count = int((s > least).sum())
    return u[:, :count], s[:count], v[:, :count]


ISO_PAPER = "Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, 2025"
ISO_URL = "https://arxiv.org/abs/2502.04959"

SINGULAR: tuple[Method, ...] = (
    spectral(
        "tsv_m",
        "makes the foremost singular vectors of all experts orthogonal to each other",
        tsv_m,
        (WEIGHT, *SELECTION, LAMBDA),
        "Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025",
        "https://arxiv.org/abs/2412.00081",
        SpectralCost(own_side, each=1, besides=2, stacked=False),
    ),
    spectral(
        "iso_c",
        "gives the sum of the changes one singular value in all directions",
        iso_c,
        (WEIGHT, *SELECTION, LAMBDA),
        ISO_PAPER,
        ISO_URL,
        SpectralCost(own_side, stacked=False, results=1),
    ),
    spectral(
        "iso_cts",
        "Iso-C, the least common directions replaced by some that experts have alone",
        iso_cts,
        (
            WEIGHT,
            Parameter(
                "common_space_fraction",
                "share of the directions that are common",
                default=0.8,
                minimum=0.0,
                maximum=1.0,
            ),
            *SELECTION,
            LAMBDA,
        ),
        ISO_PAPER,
        ISO_URL,
        SpectralCost(own_side, each=1, besides=3, stacked=False),
    ),
)
