"""WUDI-Merging in closed form: `swudi` and `aswudi`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from weldment.methods.average import sum_into
from weldment.methods.method import Method, Parameter
from weldment.methods.spectral.bases import joint
from weldment.methods.spectral.costs import SpectralCost, stacked_side
from weldment.methods.spectral.matrices import SELECTION, Scale, spectral
from weldment.methods.task_vectors import LAMBDA, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor


def swudi(taus: list[Tensor], scale: Scale, *, t: float, keep: float) -> Tensor:
    """theta_0 + lambda * ((sum_i tau_i)(I - V f V') + D V (f / l) V'), tau_i meaning w_i tau_i.

    C = sum_i tau_i'tau_i / |tau_i|^2 = V l V', D = sum_i tau_i tau_i'tau_i / |tau_i|^2, and f = 1 - exp(-t l) on the
    ceil(keep * n) largest of the n eigenvalues, 0 on the others: gradient descent for a time t on
    the interference sum_i |(tau - tau_i) tau_i'|^2 / |tau_i|^2, from sum_i tau_i. Experts without a
    change count nowhere. Other tensors: theta_0 + lambda * mean_i w_i tau_i.

    Source: WUDI-Merging (Cheng et al. 2025) in closed form, SWUDI.
    """
    return _descended(taus, lambda squares: _first(-torch.expm1(-t * squares), _ceil(keep * taus[0].shape[1])))


def aswudi(taus: list[Tensor], scale: Scale) -> Tensor:
    """`swudi` with f = 1 on the first K eigenvalues, K = (sum_j sqrt(l_j))^2 / sum_j l_j, and 0 on the others.

    K, rounded up, is the effective number of directions: no time and no share have to be chosen.

    Source: WUDI-Merging (Cheng et al. 2025) in closed form, ASWUDI.
    """
    return _descended(taus, lambda squares: _first(torch.ones_like(squares), effective_count(squares)))


def effective_count(squares: Tensor) -> int:
    """ceil((sum_j sqrt(l_j))^2 / sum_j l_j)."""
    wide = squares.double()
    return _ceil(float(wide.sqrt().sum().square() / wide.sum()))


def _ceil(number: float) -> int:
    """Rounded up; 13.000000000000002 is 13."""
    return math.ceil(number - 1e-9 * abs(number))


def _first(factors: Tensor, count: int) -> Tensor:
    factors[count:] = 0.0
    return factors


def _descended(taus: list[Tensor], factors: Callable[[Tensor], Tensor]) -> Tensor:
    taus = [tau for tau in taus if bool(tau.any())] or taus[:1]
    sizes = [float(torch.linalg.vector_norm(tau, dtype=torch.float64)) for tau in taus]
    total = sum_into(torch.empty_like(taus[0]), taus)
    if not max(sizes):
        return total
    for tau, size in zip(taus, sizes, strict=True):
        tau.div_(size)
    found = joint(taus)
    f = factors(found.values.square())
    count = int((f > 0.0).sum())
    f, v, values = f[:count], found.rows[:count].T, found.values[:count]
    change = -(total @ v).mul_(f)
    for tau, part, size in zip(taus, found.parts, sizes, strict=True):
        change.add_((tau @ (tau.T @ part[:, :count])).mul_(size * f / values.square()))
    return total.add_(change @ v.T)


WUDI_PAPER = "Cheng et al., Whoever Started the Interference Should End It, 2025; its closed form"
WUDI_URL = "https://arxiv.org/abs/2503.08099"

WUDI: tuple[Method, ...] = (
    spectral(
        "swudi",
        "removes what experts do to each other's inputs, by the closed form of a descent",
        swudi,
        (
            WEIGHT,
            Parameter("t", "time of the descent", default=300.0, minimum=0.0),
            Parameter(
                "keep",
                "share of the directions that take part",
                default=0.65,
                minimum=0.0,
                maximum=1.0,
                open_minimum=True,
            ),
            *SELECTION,
            LAMBDA,
        ),
        WUDI_PAPER,
        WUDI_URL,
        SpectralCost(stacked_side),
    ),
    spectral(
        "aswudi",
        "SWUDI to its end, on as many directions as the experts' changes have",
        aswudi,
        (WEIGHT, *SELECTION, LAMBDA),
        WUDI_PAPER,
        WUDI_URL,
        SpectralCost(stacked_side),
    ),
)
