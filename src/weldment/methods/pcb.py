"""PCB-Merging: parameters compete within their task and between tasks.

Scores are made in float64, so that changes of 1e-30 or 1e30 neither vanish nor overflow; what the
order statistics see are square roots of scores, which lie in the range of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weldment.methods.average import sum_into
from weldment.methods.block import Block, OrderStatistic, Scope, Statistic
from weldment.methods.consensus import onto_base
from weldment.methods.method import Method, Parameter
from weldment.methods.task_vectors import LAMBDA, WEIGHT, magnitudes

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 5e-324


def pcb_bounds(numel: int, *, weight: Sequence[float], **_: object) -> list[list[int | None]]:
    """For each model the ranks to which the 0.01 % smallest and largest magnitudes are clamped."""
    low, high = int(numel * 0.0001), int(numel * 0.9999 - 1)
    return [[low, max(low, high)] for _ in weight]


def _competition(block: Block) -> tuple[list[Tensor], list[Tensor]]:
    """The clamped tau_i, in float64, and the roots sign(s_i) sqrt |s_i| of their scores, in the models' dtype.

    Whoever asks for the score gets the square of this rounded root, so that all agree on which
    scores lie below a threshold.
    """
    taus = [tau.double() for tau in block.task_vectors()]
    total = sum_into(torch.empty_like(taus[0]), taus)
    roots: list[Tensor] = []
    for tau, (low, high) in zip(taus, block.statistics["bounds"], strict=True):
        inter = (tau * total).tanh_()
        size = tau.abs().clamp_(low, high)
        tau.sign_().mul_(size)
        intra = size.sub_(low).div_(high - low).square_() if high > low else size.zero_()
        # exp(T (intra - 1)) instead of exp(T intra): the range of the scores is normalised anyway.
        score = intra.sub_(1.0).mul_(len(taus)).exp_().mul_(inter)
        roots.append(block.scratch().copy_(inter.sign_().mul_(score.abs_().sqrt_())))
    return taus, roots


def score_parts(block: Block, **_: object) -> list[Tensor]:
    """2T series: for each model the positive and the negative parts of the roots of its scores."""
    roots = _competition(block)[1]
    return [block.scratch().copy_(root).mul_(sign).clamp_(min=0.0) for root in roots for sign in (1.0, -1.0)]


def score_ranks(numel: int, *, weight: Sequence[float], density: float, **_: object) -> list[list[int | None]]:
    """The lowest score that is kept and the highest; in the negative parts the order is reversed."""
    lowest = min(numel - 1, int(numel * (1.0 - density)))
    return [[lowest, numel - 1], [numel - 1 - lowest, 0]] * len(weight)


def _score(positive: float, negative: float) -> float:
    return positive * positive - negative * negative


def pcb_statistics(*, trim: str, **_: object) -> tuple[Statistic, ...]:
    """Bounds of the magnitudes, then of the scores, over the tensor or the model."""
    scope: Scope = "model" if trim == "global" else "tensor"
    return (
        OrderStatistic("bounds", magnitudes, pcb_bounds, scope=scope),
        OrderStatistic("scores", score_parts, score_ranks, scope=scope),
    )


def pcb(block: Block, *, weight: Sequence[float], lambda_: float, **_: object) -> Tensor:
    """theta_0 + lambda * sum_i w_i tau_i s_i / sum_i s_i, s_i the rescaled scores of parameter competition.

    The score of an element in model i is exp(T b_i^2) tanh(tau_i sum_j tau_j): how large it is in
    its own task, b_i = |tau_i| scaled to [0, 1], and how well it goes with the others. The 0.01 %
    smallest and largest |tau_i| are clamped first. Scores below the top `density` fraction of the
    model drop to 0, the others are scaled to (0, 1]. A single highest score
    stays if it is positive. `trim: tensor` ranks and scales within each tensor, `global` over the whole model, as
    the authors' code does.

    Source: Du et al. 2024, Parameter Competition Balancing for Model Merging.
    """
    taus, roots = _competition(block)
    parts = block.statistics["scores"]
    share = torch.zeros_like(taus[0])
    for tau, root, w, positive, negative in zip(taus, roots, weight, parts[::2], parts[1::2], strict=True):
        low, high = (_score(*pair) for pair in zip(positive, negative, strict=True))
        wide = root.double()
        score = wide * wide.abs()
        if high > low:
            score.clamp_(low, high).sub_(low).div_(high - low)
        else:
            score = score.ge(max(high, _TINY)).double()
        share.add_(score)
        tau.mul_(score.mul_(w))
    merged = sum_into(torch.empty_like(share), taus).div_(share.clamp_(min=1e-12))
    return onto_base(block, block.scratch().copy_(merged), lambda_)


PCB = Method(
    name="pcb",
    float64=True,
    family="selection",
    summary="weighs every element by how it competes within its task and between tasks",
    kernel=pcb,
    statistics=pcb_statistics,
    parameters=(
        WEIGHT,
        Parameter(
            "density",
            "fraction of the scores of each model that is kept",
            default=0.1,
            minimum=0.0,
            maximum=1.0,
            open_minimum=True,
        ),
        LAMBDA,
        Parameter(
            "trim",
            "rank the scores within each tensor or over the whole model",
            kind="choice",
            default="tensor",
            choices=("tensor", "global"),
        ),
    ),
    paper="Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024",
    url="https://arxiv.org/abs/2410.02396",
)
