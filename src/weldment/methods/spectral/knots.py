"""KnOTS: TIES on the experts' parts of their joint singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weldment.methods.method import Method, Parameter
from weldment.methods.spectral.bases import joint
from weldment.methods.spectral.costs import SpectralCost, beside_side
from weldment.methods.spectral.drm import resolved
from weldment.methods.spectral.matrices import SELECTION, Scale, clear_rounding, spectral
from weldment.methods.task_vectors import LAMBDA, WEIGHT
from weldment.methods.trimming import keep_above, kept_count, kth_smallest

if TYPE_CHECKING:
    from torch import Tensor


def knots_ties(taus: list[Tensor], scale: Scale, *, density: Sequence[float], cutoff: float) -> Tensor:
    """theta_0 + lambda * U S ties(V_1', ..., V_T'), where [w_1 tau_1, ..., w_T tau_T] = U S [V_1', ..., V_T'].

    Singular values of at most `cutoff` times the largest are left out. ties: of every V_i' the
    floor(density * size) entries of largest magnitude stay (at least one); of these, the ones with the sign of
    their sum over i (of zero: +) are averaged over the experts that have them. Other tensors:
    theta_0 + lambda * mean_i w_i tau_i.

    Source: Stoica et al. 2025, Model Merging with SVD to Tie the KnOTS.
    """
    if not any(bool(tau.any()) for tau in taus):
        return torch.zeros_like(taus[0])
    turned = [tau.T for tau in taus]
    found = joint(turned, cutoff)
    clear_rounding(found, turned)
    parts = [part.div_(found.values) for part in found.parts]
    for part, share in zip(parts, density, strict=True):
        _keep_largest(part, share)
    merged = resolved(parts, [1.0] * len(parts), 1.0, disjoint=True)
    return found.times_rows(merged.mul_(found.values)).T


def _keep_largest(part: Tensor, density: float) -> None:
    """Zero, in place, all but a share of the elements, the largest."""
    dropped = part.numel() - kept_count(density, part.numel())
    if dropped > 0:
        keep_above(part, kth_smallest(lambda _, step: part[::step].abs(), (1, *part.shape), dropped))


KNOTS: tuple[Method, ...] = (
    spectral(
        "knots_ties",
        "TIES on the experts' parts of their joint singular vectors",
        knots_ties,
        (
            WEIGHT,
            Parameter(
                "density",
                "share of the entries of an expert's part to keep, the largest",
                default=1.0,
                per_model=True,
                minimum=0.0,
                maximum=1.0,
                open_minimum=True,
            ),
            Parameter(
                "cutoff",
                "singular values up to this share of the largest are left out",
                default=1e-5,
                minimum=0.0,
                maximum=1.0,
                open_maximum=True,
            ),
            *SELECTION,
            LAMBDA,
        ),
        "Stoica et al., Model Merging with SVD to Tie the KnOTS, ICLR 2025",
        "https://arxiv.org/abs/2410.19735",
        SpectralCost(beside_side),
    ),
)
