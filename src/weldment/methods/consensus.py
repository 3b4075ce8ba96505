"""How task vectors become one: a sum, or the mean of those that agree with an elected sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weldment.methods.average import sum_into, weighted_sum
from weldment.methods.block import Block

if TYPE_CHECKING:
    from torch import Tensor


def vote(block: Block, elect: str) -> Tensor:
    """The sum over the models (`mass`), or of their signs (`count`), whose sign is elected."""
    total = block.scratch()
    if elect == "mass":
        return sum_into(total, block.models)
    sign = block.scratch()
    torch.sign(block.models[0], out=total)
    for part in block.models[1:]:
        total.add_(torch.sign(part, out=sign))
    return total


def elected_signs(total: Tensor, zero_sign: float = 1.0) -> Tensor:
    """The sign bits of a vote, in place of it; `flip_` applies them. Exactly zero elects `zero_sign`, +1 or -1."""
    if zero_sign < 0.0:
        total.sign_().mul_(2.0).sub_(1.0)
    # A sum that is exactly zero is +0 (a -0 comes of votes that are all zero, which no sign changes).
    words = _words(total)
    return words.bitwise_and_(torch.iinfo(words.dtype).min)


def flip_(x: Tensor, signs: Tensor) -> Tensor:
    """x where the elected sign is +, -x where it is -, in place."""
    _words(x).bitwise_xor_(signs)
    return x


def _words(x: Tensor) -> Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def disjoint_mean(block: Block, weight: Sequence[float], signs: Tensor, normalize: bool) -> Tensor:
    """Sum of the w_i tau_i that have the elected sign, divided by the sum of their w_i if `normalize`.

    The models of the block are the w_i tau_i and are overwritten. Elements on which no model agrees are 0.
    """
    parts, total = block.together(), block.scratch()
    flip_(parts, signs).relu_()
    sum_into(total, block.models)
    if normalize:
        parts.sign_()
        if any(w != 1.0 for w in weight):
            parts.mul_(torch.tensor(weight, dtype=parts.dtype, device=parts.device).view(-1, *[1] * total.dim()))
        share = sum_into(block.scratch(), block.models)
        total.div_(_nonzero_(share, block.scratch(), all_positive=min(weight) >= 0.0))
    return flip_(total, signs)


def _nonzero_(share: Tensor, work: Tensor, *, all_positive: bool) -> Tensor:
    """Replace zeros by one (with non-negative weights: by the smallest normal number, which is quicker)."""
    if all_positive:
        return share.clamp_(min=torch.finfo(share.dtype).tiny)
    torch.sign(share, out=work)
    return share.add_(work.abs_().neg_().add_(1.0))


def onto_base(block: Block, merged: Tensor, scale: float = 1.0) -> Tensor:
    """theta_0 + scale * merged, in place of `merged`."""
    assert block.base is not None
    return (merged if scale == 1.0 else merged.mul_(scale)).add_(block.base)


def combined(
    block: Block,
    trimmed: list[Tensor],
    *,
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    elect: str = "none",
    zero_sign: float = 1.0,
) -> Tensor:
    """theta_0 + lambda * (sum or disjoint mean of the w_i tau_i); overwrites `trimmed`, the models of the block."""
    if elect == "none":
        scale = lambda_ / sum(weight) if normalize else lambda_
        merged = weighted_sum(trimmed, weight)
    else:
        scale = lambda_
        for tau, w in zip(trimmed, weight, strict=True):
            if w != 1.0:
                tau.mul_(w)
        signs = elected_signs(vote(block, elect), zero_sign)
        merged = disjoint_mean(block, weight, signs, normalize)
    return onto_base(block, merged, scale)


def check_sum(*, weight: Sequence[float], normalize: bool, **_: object) -> None:
    """Weights that sum to zero cannot be normalised."""
    if normalize and abs(sum(weight)) < 1e-12:
        raise ValueError(f"the weights {list(weight)} sum to zero and cannot be normalised; set normalize: false")
