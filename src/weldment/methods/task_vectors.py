"""Task vectors: tau_i = theta_i - theta_0, trimmed, elected, combined, added to the base.

One pipeline, *trim -> elect -> combine*. The methods differ in its parts:

    method             trim                                  elect     combine
    task_arithmetic    none                                  none      sum
    ties               largest magnitudes                    signs     disjoint mean
    dare_linear        at random, rescaled                   none      sum
    dare_ties          at random, rescaled                   signs     disjoint mean
    della_linear       at random by rank in row, rescaled    none      sum
    della              at random by rank in row, rescaled    signs     disjoint mean
    breadcrumbs        smallest and largest magnitudes       none      sum
    breadcrumbs_ties   smallest and largest magnitudes       signs     disjoint mean
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from weldment.methods.block import Block, OrderStatistic, Statistic, Total
from weldment.methods.consensus import check_sum, combined, vote
from weldment.methods.masks import LEVELS, keep_mask, levels_of, quantised
from weldment.methods.method import Method, Parameter
from weldment.methods.trimming import della_levels, drop_above, keep_above, kept_count

if TYPE_CHECKING:
    from torch import Tensor


def task_arithmetic(block: Block, *, weight: Sequence[float], normalize: bool, lambda_: float) -> Tensor:
    """theta_0 + lambda * sum_i w_i tau_i, the sum divided by sum_i w_i if `normalize`.

    Negative weights negate a task (unlearning); A - B + C is an analogy.

    Source: Ilharco et al. 2023, Editing Models with Task Arithmetic. `linear` averages the models
    themselves instead.
    """
    return combined(block, block.task_vectors(), weight=weight, normalize=normalize, lambda_=lambda_)


def magnitudes(block: Block, **_: object) -> list[Tensor]:
    """|tau_i| for every model."""
    block.task_vectors()
    return list(block.together().abs_())


def ties_ranks(numel: int, *, density: Sequence[float], trim: str, **_: object) -> list[list[int | None]]:
    """The rank of the smallest magnitude that is kept, for every model."""
    # The official code, which trims globally, keeps the element at its threshold as well.
    more = 1 if trim == "global" else 0
    return [[None if d >= 1.0 or numel == 0 else max(0, numel - kept_count(d, numel) - more)] for d in density]


def _ties_trimmed(block: Block) -> list[Tensor]:
    thresholds = block.statistics["thresholds"]
    return [keep_above(tau, found[0]) for tau, found in zip(block.task_vectors(), thresholds, strict=True)]


def sign_balance(block: Block, *, weight: Sequence[float], elect: str, **_: object) -> Tensor:
    """Number of elements that elect + less the number that elect -; zeros abstain."""
    for tau, w in zip(_ties_trimmed(block), weight, strict=True):
        tau.mul_(w)
    return vote(block, elect).sign_().sum(dtype=torch.float64)


def ties_statistics(*, trim: str, sign_ties: str, **_: object) -> tuple[Statistic, ...]:
    """Thresholds over the tensor or the model; with `sign_ties: majority` the model's balance of signs."""
    scope = "model" if trim == "global" else "tensor"
    passes: tuple[Statistic, ...] = (OrderStatistic("thresholds", magnitudes, ties_ranks, scope=scope),)
    if sign_ties == "majority":
        passes += (Total("balance", sign_balance, finish=float, scope="model"),)
    return passes


def ties(
    block: Block,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lambda_: float,
    trim: str,
    elect: str,
    sign_ties: str,
) -> Tensor:
    """Trim, elect signs, disjoint mean.

    Each tau_i keeps the floor(density_i * n) elements of largest magnitude (and all others that
    are equal to the smallest of them), n counted over the tensor or, with `trim: global`, over
    the model (then one more element is kept, as the authors' code does). The sign of an element
    is that of sum_i w_i tau_i (`elect: mass`) or of sum_i sign(w_i tau_i) (`count`); zero elects +
    or, with `sign_ties: majority`, the sign that most elements of the model have. The merged tau is
    the sum of the w_i tau_i of that sign,
    divided by the sum of their w_i if `normalize`.

    Source: Yadav et al. 2023, TIES-Merging; the authors' code is `trim: global`,
    `sign_ties: majority`.
    """
    zero_sign = 1.0
    if sign_ties == "majority" and block.statistics["balance"] < 0.0:
        zero_sign = -1.0
    return combined(
        block,
        _ties_trimmed(block),
        weight=weight,
        normalize=normalize,
        lambda_=lambda_,
        elect=elect,
        zero_sign=zero_sign,
    )


def _rescaling(rescale: str, norms: Any, model: int) -> float | None:
    """The factor for the survivors of one model; None if each has its own."""
    if rescale == "false":
        return 1.0
    if rescale == "true":
        return None
    before, after = norms[model]
    return before / after if after > 0.0 else 1.0


def _drop_at_random(block: Block, deltas: Sequence[Tensor], density: Sequence[float]) -> None:
    mask = block.scratch()
    for tau, d, key in zip(deltas, density, block.keys, strict=True):
        if d < 1.0:
            tau.mul_(keep_mask(key, block.start, levels_of(d), mask))


def _dare_trimmed(block: Block, density: Sequence[float], rescale: str) -> list[Tensor]:
    trimmed = block.task_vectors()
    _drop_at_random(block, trimmed, density)
    norms = block.statistics.get("norms")
    for index, (tau, d) in enumerate(zip(trimmed, density, strict=True)):
        if d < 1.0 and (factor := _rescaling(rescale, norms, index) or 1.0 / quantised(d)) != 1.0:
            tau.mul_(factor)
    return trimmed


def dare_norms(block: Block, *, density: Sequence[float], **_: object) -> Tensor:
    """(models, 2): sums of |tau_i| before and after the random drop."""
    deltas = magnitudes(block)
    before = [tau.sum(dtype=torch.float64) for tau in deltas]
    _drop_at_random(block, deltas, density)
    after = [tau.sum(dtype=torch.float64) for tau in deltas]
    return torch.stack([torch.stack(before), torch.stack(after)], dim=1)


def dare_statistics(*, rescale: str, **_: object) -> tuple[Statistic, ...]:
    """The norms, if they are what the survivors are rescaled by."""
    return (Total("norms", dare_norms, finish=torch.Tensor.tolist),) if rescale == "norm" else ()


def dare_linear(
    block: Block,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: str,
) -> Tensor:
    """theta_0 + lambda * sum_i w_i m_i tau_i / p_i, where m_i keeps each element with p_i = density_i.

    The expectation is task arithmetic exactly (p is rounded to 1/65536 and the rounded value is
    divided by). `rescale: norm` scales by the realised L1 norm instead; `false` not at all.

    Source: Yu et al. 2024, Language Models are Super Mario.
    """
    trimmed = _dare_trimmed(block, density, rescale)
    return combined(block, trimmed, weight=weight, normalize=normalize, lambda_=lambda_)


def dare_ties(
    block: Block,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: str,
    elect: str,
) -> Tensor:
    """As `dare_linear`, but the survivors elect signs and take the disjoint mean of `ties`.

    Source: Yu et al. 2024, Language Models are Super Mario.
    """
    trimmed = _dare_trimmed(block, density, rescale)
    return combined(block, trimmed, weight=weight, normalize=normalize, lambda_=lambda_, elect=elect)


def _della_trimmed(block: Block, density: Sequence[float], epsilon: Sequence[float], rescale: str) -> list[Tensor]:
    trimmed = block.task_vectors()
    keep, mask, keys = block.scratch(), block.scratch(), block.scratch(torch.float64)
    for tau, d, e, key in zip(trimmed, density, epsilon, block.keys, strict=True):
        if e == 0.0 and d >= 1.0:
            continue
        della_levels(tau, d, e, keep, keys)
        tau.mul_(keep_mask(key, block.start, keep, mask))
        if rescale == "true":
            tau.div_(keep.mul_(1.0 / LEVELS))
    return trimmed


def check_della(*, density: Sequence[float], epsilon: Sequence[float], **_: object) -> None:
    """Keep probabilities must lie in (0, 1]."""
    for d, e in zip(density, epsilon, strict=True):
        if d - e <= 0.0 or d + e > 1.0 + 1e-9:
            limit = f"must be below {d:g}" if d <= 0.5 else f"can be at most {1.0 - d:g}"
            raise ValueError(
                f"density {d:g} with epsilon {e:g} gives keep probabilities from {d - e:g} to {d + e:g}, "
                f"outside (0, 1]; epsilon {limit}"
            )


def della_linear(
    block: Block,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: str,
) -> Tensor:
    """theta_0 + lambda * sum_i w_i m_i tau_i / p_i, where large elements of a row are kept more often.

    The element of rank r (ascending magnitude, 0 .. n - 1) in its row of n is kept with
    p = density - epsilon + 2 epsilon r / (n - 1) and divided by its own p: the expectation is task
    arithmetic exactly. `epsilon` is half of the paper's `window_size`.

    Source: Deep et al. 2024, DELLA-Merging.
    """
    trimmed = _della_trimmed(block, density, epsilon, rescale)
    return combined(block, trimmed, weight=weight, normalize=normalize, lambda_=lambda_)


def della(
    block: Block,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool,
    lambda_: float,
    rescale: str,
    elect: str,
) -> Tensor:
    """As `della_linear`, but the survivors elect signs and take the disjoint mean of `ties`.

    Source: Deep et al. 2024, DELLA-Merging.
    """
    trimmed = _della_trimmed(block, density, epsilon, rescale)
    return combined(block, trimmed, weight=weight, normalize=normalize, lambda_=lambda_, elect=elect)


def breadcrumbs_ranks(
    numel: int, *, density: Sequence[float], gamma: Sequence[float], **_: object
) -> list[list[int | None]]:
    """For every model the rank of the smallest magnitude kept and of the smallest one dropped from the top."""
    found: list[list[int | None]] = []
    for d, g in zip(density, gamma, strict=True):
        if numel == 0:
            found.append([None, None])
            continue
        kept = kept_count(d, numel)
        top = min(int(g * numel), numel - kept)
        low = numel - top - kept
        found.append([low if low > 0 else None, numel - top if top > 0 else None])
    return found


def _breadcrumbs_trimmed(block: Block) -> list[Tensor]:
    trimmed = block.task_vectors()
    work = block.scratch()
    for tau, (low, high) in zip(trimmed, block.statistics["thresholds"], strict=True):
        drop_above(tau, high, work)
        keep_above(tau, low)
    return trimmed


def breadcrumbs(
    block: Block,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """theta_0 + lambda * sum_i w_i tau_i, each tau_i without its largest and smallest elements.

    The floor(gamma * n) largest magnitudes are dropped, then the smallest until
    floor(density * n) are left. If gamma leaves fewer than density, fewer of the largest are
    dropped. When gamma * n is below 1 nothing is dropped from the top.

    Source: Davari and Belilovsky 2024, Model Breadcrumbs (gamma is the paper's beta).
    """
    trimmed = _breadcrumbs_trimmed(block)
    return combined(block, trimmed, weight=weight, normalize=normalize, lambda_=lambda_)


def breadcrumbs_ties(
    block: Block,
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool,
    lambda_: float,
    elect: str,
) -> Tensor:
    """As `breadcrumbs`, but the trimmed task vectors elect signs and take the disjoint mean of `ties`.

    Source: Davari and Belilovsky 2024, Model Breadcrumbs; Yadav et al. 2023, TIES-Merging.
    """
    trimmed = _breadcrumbs_trimmed(block)
    return combined(block, trimmed, weight=weight, normalize=normalize, lambda_=lambda_, elect=elect)


WEIGHT = Parameter("weight", "factor for the task vector of each model", default=1.0, per_model=True)
LAMBDA = Parameter("lambda", "factor for the merged task vector", default=1.0)
ELECT = Parameter(
    "elect", "vote on signs by weighted mass or by count", kind="choice", default="mass", choices=("mass", "count")
)
RESCALE = Parameter(
    "rescale",
    "divide survivors by their keep probability, by the realised L1 norm (norm), or not at all",
    kind="choice",
    default="true",
    choices=("true", "false", "norm"),
)
DELLA_RESCALE = Parameter(
    "rescale",
    "divide survivors by their keep probability, or not at all",
    kind="choice",
    default="true",
    choices=("true", "false"),
)


def _density(meaning: str) -> Parameter:
    return Parameter("density", meaning, default=1.0, per_model=True, minimum=0.0, maximum=1.0, open_minimum=True)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "divide by the sum of the weights that take part", kind="bool", default=default)


TRIM = (
    Parameter(
        "trim",
        "count the density over each tensor or over the whole model",
        kind="choice",
        default="tensor",
        choices=("tensor", "global"),
    ),
    Parameter(
        "sign_ties",
        "sign of elements whose votes sum to zero: + or the model's majority",
        kind="choice",
        default="positive",
        choices=("positive", "majority"),
    ),
)
EPSILON = Parameter(
    "epsilon",
    "half-width of the range of keep probabilities around the density",
    default=0.0,
    per_model=True,
    minimum=0.0,
    maximum=0.5,
    aliases={"window_size": 0.5},
)
GAMMA = Parameter(
    "gamma", "fraction of largest magnitudes dropped", default=0.01, per_model=True, minimum=0.0, maximum=1.0
)
KEEP, KEEP_RANDOM = "fraction of elements kept", "probability to keep an element"
MAGNITUDES = OrderStatistic("thresholds", magnitudes, breadcrumbs_ranks)
TIES_PAPER = ("Yadav et al., TIES-Merging, NeurIPS 2023", "https://arxiv.org/abs/2306.01708")
DARE_PAPER = ("Yu et al., Language Models are Super Mario, ICML 2024", "https://arxiv.org/abs/2311.03099")
DELLA_PAPER = ("Deep et al., DELLA-Merging, 2024", "https://arxiv.org/abs/2406.11617")
BREADCRUMBS_PAPER = ("Davari and Belilovsky, Model Breadcrumbs, ECCV 2024", "https://arxiv.org/abs/2312.06795")


def _row(name: str, summary: str, kernel: Any, parameters: Sequence[Parameter], paper: tuple[str, str], **more: Any):
    return Method(name, "task vectors", summary, kernel, tuple(parameters), paper=paper[0], url=paper[1], **more)


TASK_VECTORS: tuple[Method, ...] = (
    _row(
        "task_arithmetic",
        "base plus the weighted sum of the task vectors",
        task_arithmetic,
        (WEIGHT, _normalize(False), LAMBDA),
        ("Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023", "https://arxiv.org/abs/2212.04089"),
        check=check_sum,
    ),
    _row(
        "ties",
        "keeps the largest changes, elects a sign for each, averages those that agree",
        ties,
        (WEIGHT, _density(KEEP), _normalize(True), LAMBDA, TRIM[0], ELECT, TRIM[1]),
        TIES_PAPER,
        statistics=ties_statistics,
    ),
    _row(
        "dare_linear",
        "drops changes at random and rescales the rest",
        dare_linear,
        (WEIGHT, _density(KEEP_RANDOM), _normalize(False), LAMBDA, RESCALE),
        DARE_PAPER,
        statistics=dare_statistics,
        random=True,
        check=check_sum,
    ),
    _row(
        "dare_ties",
        "DARE, then the sign election of TIES",
        dare_ties,
        (WEIGHT, _density(KEEP_RANDOM), _normalize(False), LAMBDA, RESCALE, ELECT),
        DARE_PAPER,
        statistics=dare_statistics,
        random=True,
    ),
    _row(
        "della_linear",
        "drops changes at random, small ones more often, and rescales the rest",
        della_linear,
        (WEIGHT, _density(KEEP_RANDOM), EPSILON, _normalize(False), LAMBDA, DELLA_RESCALE),
        DELLA_PAPER,
        unit="row",
        random=True,
        check=lambda **p: (check_sum(**p), check_della(**p))[0],
    ),
    _row(
        "della",
        "DELLA's random drop by rank, then the sign election of TIES",
        della,
        (WEIGHT, _density(KEEP_RANDOM), EPSILON, _normalize(False), LAMBDA, DELLA_RESCALE, ELECT),
        DELLA_PAPER,
        unit="row",
        random=True,
        check=check_della,
    ),
    _row(
        "breadcrumbs",
        "drops the smallest and the largest changes",
        breadcrumbs,
        (WEIGHT, _density(KEEP), GAMMA, _normalize(False), LAMBDA),
        BREADCRUMBS_PAPER,
        statistics=(MAGNITUDES,),
        check=check_sum,
    ),
    _row(
        "breadcrumbs_ties",
        "Breadcrumbs, then the sign election of TIES",
        breadcrumbs_ties,
        (WEIGHT, _density(KEEP), GAMMA, _normalize(False), LAMBDA, ELECT),
        BREADCRUMBS_PAPER,
        statistics=(MAGNITUDES,),
    ),
)
