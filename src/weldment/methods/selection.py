"""Selections: `sce`, `ram`, `ramplus_tl`, `model_stock`, `arcee_fusion`, `consensus_ta`, `magmax`, and `pcb`.

They decide from the task vectors themselves which changes to keep, and how strongly. Decisions
that square or exponentiate are made in float64, so that changes of 1e-30 or 1e30 neither vanish
nor overflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from weldment.methods.average import sum_into, weighted_sum
from weldment.methods.block import Block, OrderStatistic, Statistic, Total, Unit
from weldment.methods.consensus import disjoint_mean, elected_signs, onto_base, vote
from weldment.methods.method import Method, Parameter
from weldment.methods.pcb import PCB
from weldment.methods.spherical import cosines, flat_products, gram, settled
from weldment.methods.task_vectors import LAMBDA
from weldment.methods.trimming import keep_above

if TYPE_CHECKING:
    from torch import Tensor


_FEW = 5
"""Up to so many models, their differences take fewer operations than their distances from the mean."""

_ROUND = -1 << 24
"""Clears the lowest bits of a float64, read as an integer; 29 significant bits stay."""


def spread(block: Block, **_: object) -> list[Tensor]:
    """One series: the variance of the task vectors over the models, but for a constant factor, in float64.

    Few models: sum_{i<j} (tau_i - tau_j)^2; many: sum_i (tau_i - mean)^2. Rounded, so that
    variances that are equal but for the order of the models stay equal.
    """
    taus = block.task_vectors()
    total, wide = block.scratch(torch.float64).zero_(), block.scratch(torch.float64)
    if len(taus) <= _FEW:
        difference = block.scratch()
        for one, other in combinations(taus, 2):
            wide.copy_(torch.sub(one, other, out=difference))
            total.addcmul_(wide, wide)
    else:
        mean = block.scratch(torch.float64).zero_()
        for tau in taus:
            mean.add_(wide.copy_(tau))
        mean.div_(len(taus))
        for tau in taus:
            wide.copy_(tau).sub_(mean)
            total.addcmul_(wide, wide)
    total.view(torch.int64).bitwise_and_(_ROUND)
    return [total]


def varying_count(block: Block, **_: object) -> Tensor:
    """Number of elements in which the models differ."""
    first, *others = block.models
    differing = block.scratch().zero_()
    for other in others:
        differing.add_(other.sub_(first).abs_())
    return torch.count_nonzero(differing).double()


def sce_ranks(
    numel: int, *, select_topk: float, statistics: Mapping[str, Any] | None = None, **_: object
) -> list[list[int | None]]:
    """The rank of the smallest spread that is selected; None if the task vectors are all equal."""
    varying = numel if statistics is None else int(statistics["varying"])
    return [[numel - max(1, int(select_topk * varying)) if varying else None]]


def _selected(block: Block) -> list[Tensor]:
    """The task vectors where the spread reaches the threshold, zero elsewhere."""
    threshold = block.statistics["threshold"][0][0] if "threshold" in block.statistics else None
    if threshold is None or threshold <= 0.0:
        return block.task_vectors()
    keep = block.scratch().copy_(keep_above(spread(block)[0], threshold).sign_())
    return [tau.mul_(keep) for tau in block.models]


def energies(block: Block, **_: object) -> Tensor:
    """(T,): the sum of squares of each selected task vector."""
    wide = [tau.reshape(-1).double() for tau in _selected(block)]
    return torch.stack([torch.dot(tau, tau) for tau in wide])


def sce_weights(energy: Tensor) -> list[float]:
    """The energies relative to the largest; equal weights if all are zero."""
    largest = energy.max()
    return settled(energy / largest if largest > 0.0 else torch.ones_like(energy))


def sce_statistics(*, select_topk: float, **_: object) -> tuple[Statistic, ...]:
    """Without a selection the weights alone."""
    weights = Total("weights", energies, finish=sce_weights)
    if select_topk >= 1.0:
        return (weights,)
    return (Total("varying", varying_count, finish=float), OrderStatistic("threshold", spread, sce_ranks), weights)


def sce(block: Block, *, lambda_: float, **_: object) -> Tensor:
    """Select, calculate, erase: theta_0 + lambda * sum_i w_i tau_i / sum_i w_i over those that agree.

    Select: of the n elements in which the models differ, the floor(select_topk * n) (at least
    one) where their task vectors vary most; the others are zero in all of them. Calculate: w_i is
    the sum of squares of what is left of tau_i. Erase: elements whose sign is not that of
    sum_i tau_i. Weights have no floor, so that the scale of the changes does not matter.

    Source: Wan et al. 2024, FuseChat.
    """
    weight = block.statistics["weights"]
    taus = _selected(block)
    signs = elected_signs(vote(block, "mass"))
    for tau, w in zip(taus, weight, strict=True):
        tau.mul_(w)
    return onto_base(block, disjoint_mean(block, weight, signs, normalize=True), lambda_)


def _changed(block: Block, epsilon: float) -> list[Tensor]:
    """The task vectors without elements of |tau| <= epsilon, in place."""
    return [torch.hardshrink(tau, epsilon, out=tau) for tau in block.task_vectors()]


def _change_count(block: Block, changed: Sequence[Tensor]) -> Tensor:
    """How many models change an element."""
    count, mask = block.scratch().zero_(), block.scratch()
    for tau in changed:
        count.add_(torch.sign(tau, out=mask).abs_())
    return count


def ram(block: Block, *, epsilon: float) -> Tensor:
    """theta_0 + the mean, element by element, of the tau_i that change it, |tau_i| > epsilon.

    What one model alone changes is kept in full; what several change is averaged over those.

    Source: Yuan et al. 2026, Behavior Knowledge Merge in Reinforced Agentic Models.
    """
    changed = _changed(block, epsilon)
    count = _change_count(block, changed)
    return onto_base(block, weighted_sum(changed, [1.0] * len(changed)).div_(count.clamp_(min=1.0)))


def overlaps(block: Block, *, epsilon: float, **_: object) -> Tensor:
    """(T, 2): how many elements each model changes together with others, and alone."""
    masks = [tau.sign_().abs_() for tau in _changed(block, epsilon)]
    shared = sum_into(block.scratch(), masks).sub_(1.0).clamp_(0.0, 1.0)
    totals = torch.stack([mask.sum(dtype=torch.float64) for mask in masks])
    common = torch.stack([mask.mul_(shared).sum(dtype=torch.float64) for mask in masks])
    return torch.stack([common, totals - common], dim=-1)


def ram_gains(counts: Tensor, *, r: float, alpha: float) -> list[float]:
    """r * min(shared / alone, alpha) for each model."""
    return [r * min(shared / alone, alpha) if alone else 0.0 for shared, alone in counts.tolist()]


def ramplus_statistics(*, r: float, alpha: float, **_: object) -> tuple[Total, ...]:
    """By how much the changes that a model makes alone are amplified."""
    return (Total("gains", overlaps, finish=partial(ram_gains, r=r, alpha=alpha)),)


def ramplus_tl(block: Block, *, epsilon: float, **_: object) -> Tensor:
    """`ram`, but changes that model i makes alone are multiplied by 1 + r * min(rho_i, alpha).

    rho_i is the number of elements that model i changes together with others, divided by the
    number it changes alone, counted within the tensor (hence "tensor-local").

    Source: Yuan et al. 2026, Behavior Knowledge Merge in Reinforced Agentic Models (RAM+).
    """
    changed = _changed(block, epsilon)
    count = _change_count(block, changed)
    gained, work = block.scratch().zero_(), block.scratch()
    for tau, gain in zip(changed, block.statistics["gains"], strict=True):
        if gain != 0.0:
            gained.add_(torch.mul(tau, gain, out=work))
    # 2 - count is 1 where one model changes the element and <= 0 where several do.
    gained.mul_(torch.neg(count, out=work).add_(2.0).clamp_(0.0, 1.0))
    mean = weighted_sum(changed, [1.0] * len(changed)).div_(count.clamp_(min=1.0))
    return onto_base(block, mean.add_(gained))


def task_products(block: Block, **_: object) -> Tensor:
    """(T, T): the Gram matrix of the task vectors."""
    return flat_products(block, block.task_vectors())


def stock_share(products: Tensor) -> Tensor:
    """t = T c / (1 + (T - 1) c), c the mean cosine over pairs, but at least 0.

    Args:
        products: (..., T, T), Gram matrices.
    """
    models = products.shape[-1]
    cosine = cosines(products, undefined=0.0)
    off_diagonal = cosine.sum((-2, -1)) - cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
    mean = (off_diagonal / (models * (models - 1))).clamp(0.0, 1.0)
    return models * mean / (1.0 + (models - 1) * mean)


def _settled_share(products: Tensor) -> float:
    return settled(stock_share(products).reshape(1))[0]


def model_stock(block: Block, *, filter_wise: bool) -> Tensor:
    """theta_0 + t * mean_i tau_i, with t = T c / (1 + (T - 1) c).

    c is the mean cosine between pairs of task vectors, of the whole tensor or, with `filter_wise`,
    of each row. Agreeing models (c = 1) give their mean, unrelated ones (c = 0) the base. t is in
    [0, 1]: opposing models (c < 0, down to -1 / (T - 1) where t has its pole) give the base. A
    zero task vector has cosine 0 with all.

    Source: Jang et al. 2024, Model Stock.
    """
    taus = block.task_vectors()
    if filter_wise:
        share: Tensor | float = stock_share(gram(taus)).unsqueeze(-1).to(taus[0].dtype)
    else:
        share = block.statistics["share"]
    mean = weighted_sum(taus, [1.0] * len(taus)).mul_(1.0 / len(taus))
    return onto_base(block, mean.mul_(share))


def model_stock_unit(*, filter_wise: bool) -> Unit:
    """Rows if each has its own t."""
    return "row" if filter_wise else "element"


def model_stock_statistics(*, filter_wise: bool) -> tuple[Total, ...]:
    """t of the tensor."""
    return () if filter_wise else (Total("share", task_products, finish=_settled_share),)


def row_divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(other) || softmax(base)) of each row, in nats: (rows, 1).

    With q = softmax(other) and z = other - base less its mean under q, the divergence is
    log sum q exp(-z). For small z that is a small number, and it is computed as such, not as the
    difference of two large ones.

    Args:
        base: (rows, n), float64.
        other: (rows, n), float64.
    """
    share = other.softmax(-1)
    shift = other - base
    mean = (share * shift).sum(-1, keepdim=True)
    shift -= mean
    near = (share * torch.expm1(-shift)).sum(-1, keepdim=True).log1p()
    far = mean + base.logsumexp(-1, keepdim=True) - other.logsumexp(-1, keepdim=True)
    return torch.where(shift.abs().amax(-1, keepdim=True) < 1.0, near, far).clamp(min=0.0)


def importance(block: Block, **_: object) -> list[Tensor]:
    """One series: the fourth root of |theta_1 - theta_0| * KL of the row (which scales as a cube)."""
    base, other = (model.to(torch.float64, copy=True) for model in block.models)
    divergence = row_divergence(base, other).sqrt_().sqrt_()
    return [block.scratch().copy_(other.sub_(base).abs_().sqrt_().sqrt_().mul_(divergence))]


def fusion_ranks(numel: int, **_: object) -> list[list[int | None]]:
    """Quartiles, each the number at or below its place."""
    return [[(numel - 1) * quarter // 4 for quarter in (1, 2, 3)]]


def fusion_threshold(low: float, median: float, high: float) -> float:
    """Median plus 1.5 interquartile ranges; arguments and result are fourth roots."""
    if high == low:
        return median
    return (median**4 + 1.5 * (high**4 - low**4)) ** 0.25


def arcee_fusion(block: Block) -> Tensor:
    """The base, but the other model's elements where they matter.

    The importance of an element is |theta_1 - theta_0| times KL(softmax(theta_1) ||
    softmax(theta_0)) of its row. Elements whose importance reaches the median plus 1.5 times the
    interquartile range, over the tensor, are taken from the other model. If that threshold is zero
    all of them are. A tensor of one dimension is one row.

    Source: Arcee AI 2025, MergeKit v0.1.
    """
    threshold = fusion_threshold(*block.statistics["quartiles"][0])
    base, other = block.models
    if threshold <= 0.0:
        return other
    taken = keep_above(importance(block)[0], threshold).sign_()
    other.mul_(taken)
    return base.mul_(taken.neg_().add_(1.0)).add_(other)


def consensus_ta(block: Block, *, lambda_t: Sequence[float], k: int, lambda_: float) -> Tensor:
    """theta_0 + lambda * tau where at least k models select the element, tau = sum_i tau_i; the base elsewhere.

    Model i selects the elements with |tau_i| >= lambda_t_i * |tau - tau_i|: those that the merge
    would bring nearer to its own model than the base is. k = 2 removes what nobody needs
    (catastrophic weights) and what one model alone needs (selfish weights), k = 1 the former only,
    k = 0 is task arithmetic.

    Source: Wang et al. 2024, Localizing Task Information for Improved Model Merging (TALL-masks).
    """
    taus = block.task_vectors()
    total, votes, rest = sum_into(block.scratch(), taus), block.scratch().zero_(), block.scratch()
    for tau, threshold in zip(taus, lambda_t, strict=True):
        torch.sub(total, tau, out=rest).abs_().mul_(threshold)
        votes.add_(tau.abs_().sub_(rest).sign_().add_(1.0).clamp_(max=1.0))
    return onto_base(block, total.mul_(votes.sub_(k - 1.0).clamp_(0.0, 1.0)), lambda_)


def check_consensus(*, lambda_t: Sequence[float], k: int, **_: object) -> None:
    """More votes than models cannot be had."""
    if k > len(lambda_t):
        raise ValueError(f"k = {k} with {len(lambda_t)} models keeps nothing; k can be at most {len(lambda_t)}")


def magmax(block: Block, *, lambda_: float) -> Tensor:
    """theta_0 + lambda * the tau_i of largest magnitude, element by element.

    Of two that are equal and opposite, the positive one.

    Source: Marczak et al. 2024, MagMax.
    """
    taus = block.task_vectors()
    largest, smallest = block.scratch().copy_(taus[0]), taus[0]
    for tau in taus[1:]:
        torch.maximum(largest, tau, out=largest)
        torch.minimum(smallest, tau, out=smallest)
    sign, side = block.scratch(), block.scratch()
    # +1 where the largest has the larger magnitude or both are equal, else -1.
    torch.add(largest, smallest, out=sign).sign_().mul_(2.0).add_(1.0).sign_()
    largest.mul_(torch.clamp(sign, min=0.0, out=side))
    smallest.mul_(torch.clamp(sign, max=0.0, out=side))
    return onto_base(block, largest.sub_(smallest), lambda_)


EPSILON = Parameter("epsilon", "an element of at most this magnitude is unchanged", default=1e-5, minimum=0.0)
RAM_PAPER = "Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models, 2026"
RAM_URL = "https://arxiv.org/abs/2601.13572"

SELECTION = (
    Method(
        name="sce",
        float64=True,
        family="selection",
        summary="keeps the changes that vary most, weighs models by their energy, erases minority signs",
        kernel=sce,
        statistics=sce_statistics,
        parameters=(
            Parameter(
                "select_topk",
                "fraction of the elements that vary to keep",
                default=1.0,
                minimum=0.0,
                maximum=1.0,
                open_minimum=True,
            ),
            LAMBDA,
        ),
        models=(2, None),
        paper="Wan et al., FuseChat: Knowledge Fusion of Chat Models, 2024",
        url="https://arxiv.org/abs/2408.07990",
    ),
    Method(
        name="ram",
        family="selection",
        summary="averages changes that models share, keeps in full those of one model alone",
        kernel=ram,
        parameters=(EPSILON,),
        paper=RAM_PAPER,
        url=RAM_URL,
    ),
    Method(
        name="ramplus_tl",
        float64=True,
        family="selection",
        summary="RAM that amplifies the changes of one model alone where models overlap",
        kernel=ramplus_tl,
        statistics=ramplus_statistics,
        parameters=(
            EPSILON,
            Parameter("r", "strength of the amplification", default=0.1, minimum=0.0),
            Parameter("alpha", "largest ratio of shared to lone changes that counts", default=0.2, minimum=0.0),
        ),
        paper=RAM_PAPER,
        url=RAM_URL,
    ),
    Method(
        name="model_stock",
        float64=True,
        family="selection",
        summary="between the base and the mean, the nearer to the mean the more the models agree",
        kernel=model_stock,
        unit=model_stock_unit,
        statistics=model_stock_statistics,
        parameters=(Parameter("filter_wise", "interpolate each row by itself", kind="bool", default=False),),
        models=(2, None),
        paper="Jang et al., Model Stock: All we need is just a few fine-tuned models, ECCV 2024",
        url="https://arxiv.org/abs/2403.19522",
    ),
    Method(
        name="arcee_fusion",
        float64=True,
        family="selection",
        summary="takes the elements of a second model that stand out by importance",
        kernel=arcee_fusion,
        unit="row",
        statistics=(OrderStatistic("quartiles", importance, fusion_ranks),),
        models=(2, 2),
        base_is_model=True,
        paper="Arcee AI, MergeKit v0.1: Arcee Fusion, 2025",
        url="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    ),
    PCB,
    Method(
        name="consensus_ta",
        family="selection",
        summary="sum of the task vectors, where enough models want it",
        kernel=consensus_ta,
        parameters=(
            Parameter(
                "lambda_t", "how much nearer than the base a merge must be", default=0.4, per_model=True, minimum=0.0
            ),
            Parameter("k", "models that must select an element", kind="int", default=2, minimum=0),
            LAMBDA,
        ),
        check=check_consensus,
        paper="Wang et al., Localizing Task Information for Improved Model Merging, ICML 2024",
        url="https://arxiv.org/abs/2405.07813",
    ),
    Method(
        name="magmax",
        family="selection",
        summary="the change of largest magnitude, element by element",
        kernel=magmax,
        parameters=(LAMBDA,),
        paper="Marczak et al., MagMax: Leveraging Model Merging for Seamless Continual Learning, ECCV 2024",
        url="https://arxiv.org/abs/2407.06322",
    ),
)
