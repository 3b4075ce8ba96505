"""The combination types of PEFT's `add_weighted_adapter`, on the layers of adapters that change one module.

Everything is calculated in the dtype and on the device of the factors. Where PEFT refuses, this
goes on: ranks may differ for every type, and weights may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from weldment.adapters.lowrank import Factors, decomposed, factorised, stacked
from weldment.methods.masks import keep_mask, levels_of, quantised, tensor_key
from weldment.recipe.peft_call import TYPES, CombinationType, check

if TYPE_CHECKING:
    from torch import Tensor

    from weldment.recipe.recipe import Combination

__all__ = ["TYPES", "check", "combine_layer"]


def combine_layer(
    combination: Combination,
    layers: Sequence[tuple[Tensor, Tensor, float] | None],
    weights: Sequence[float],
    *,
    seed: int,
    name: str,
) -> tuple[Tensor, Tensor]:
    """(B, A) of the merged layer, whose change is B A: scale 1.

    With scales s_i, weights w_i and the part T(x) that the type keeps of x (all, the largest
    int(density n) of n elements, or each with probability density, divided by it):

    - linear, ties, magnitude_prune, dare_linear, dare_ties: B = M(T(B_i), sqrt|w_i s_i|) and
      A = M(T(A_i), sign(w_i s_i) sqrt|w_i s_i|), which has cross terms B_i A_j that no adapter has;
    - cat: B = [B_1 B_2 ...], A = [w_1 s_1 A_1; w_2 s_2 A_2; ...];
    - svd: the best approximation of sum_i w_i s_i B_i A_i, from the small side, nothing dense;
    - *_svd: that of M(T(s_i B_i A_i), w_i), a dense matrix.

    M(x_i, c_i) is sum_i c_i x_i, or, for the ties types, that sum over the x_i that have the sign of
    sum_i x_i (of sum_i sign(x_i) by `frequency`; 0 elects +), divided by their number. The weights do
    not vote, and a weight of 0 counts.

    Factors of smaller rank are filled up with zeros after trimming: they have no say in the rows
    and columns that they lack. One adapter alone is only scaled, as by `linear`, whatever the type.

    Args:
        layers: (B (outputs, r_i), A (r_i, inputs), s_i) of each adapter in float64, None where it lacks the module.
        weights: one for each adapter.
        seed: of random types.
        name: of the module; with the seed and the adapter's place in the list it decides the random masks.

    Returns:
        B (outputs, r) and A (r, inputs). r is the largest rank of these layers (factors), their sum (cat), or
        for the svd types `svd_rank`, by default the largest; less where the change has a smaller rank, but
        at least 1.

    Raises:
        ValueError: no adapter has the module, the weights are not as many as the layers, or the sizes differ.
    """
    _check_layers(layers, weights)
    row = TYPES["linear" if len(layers) == 1 else combination.type]
    shares = [
        _Share(b, a, weight, scale, seed, str(index), name)
        for index, (layer, weight) in enumerate(zip(layers, weights, strict=True))
        if layer is not None
        for b, a, scale in [layer]
    ]
    if row.space == "factors":
        return _factors(shares, row, combination)
    rank = combination.svd_rank or max(share.rank for share in shares)
    if row.space == "delta":
        merged = decomposed(_delta(shares, row, combination), rank=rank)
    else:
        b, a = stacked([share.b for share in shares], [share.a * (share.weight * share.scale) for share in shares])
        if not row.truncates:
            return b, a
        merged = factorised(b, a, rank=rank)
    return _truncated(merged, rank, combination.svd_clamp)


@dataclass(frozen=True)
class _Share:
    """What one adapter brings, and what its random numbers depend on."""

    b: Tensor
    a: Tensor
    weight: float
    scale: float
    seed: int
    adapter: str
    name: str

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def key(self, part: str) -> int:
        return tensor_key(self.seed, self.adapter, f"{self.name}.{part}")


def _check_layers(layers: Sequence[tuple[Tensor, Tensor, float] | None], weights: Sequence[float]) -> None:
    if len(layers) != len(weights):
        raise ValueError(f"there are {len(weights)} weights for {len(layers)} adapters")
    sizes = {(layer[0].shape[0], layer[1].shape[1]): None for layer in layers if layer is not None}
    if len(sizes) != 1:
        listing = " and ".join(f"{outputs} x {inputs}" for outputs, inputs in sizes)
        raise ValueError(f"the changes are {listing}" if sizes else "no adapter changes this module")


def _factors(shares: Sequence[_Share], row: CombinationType, combination: Combination) -> tuple[Tensor, Tensor]:
    rank = max(share.rank for share in shares)
    b, a = [], []
    for share in shares:
        missing = rank - share.rank
        b.append(torch.nn.functional.pad(_kept(share.b, row, combination, share.key("lora_B")), (0, missing)))
        a.append(torch.nn.functional.pad(_kept(share.a, row, combination, share.key("lora_A")), (0, 0, 0, missing)))
    products = [share.weight * share.scale for share in shares]
    roots = [math.sqrt(abs(product)) for product in products]
    signed = [math.copysign(root, product) for root, product in zip(roots, products, strict=True)]
    return _merged(b, roots, row, combination), _merged(a, signed, row, combination)


def _delta(shares: Sequence[_Share], row: CombinationType, combination: Combination) -> Tensor:
    # One after the other: a sum needs only one of them at a time.
    kept = (_kept((share.b @ share.a).mul_(share.scale), row, combination, share.key("delta")) for share in shares)
    return _merged(kept, [share.weight for share in shares], row, combination)


def _kept(x: Tensor, row: CombinationType, combination: Combination, key: int) -> Tensor:
    """The part of a tensor that the type keeps."""
    density = combination.density
    if row.trim == "none" or density is None or density >= 1.0:
        return x
    if row.trim == "magnitude":
        return _largest(x, int(density * x.numel()))
    mask = keep_mask(key, 0, levels_of(density), torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return mask.mul_(x).div_(quantised(density))


def _largest(x: Tensor, count: int) -> Tensor:
    """Exactly `count` elements of the largest magnitude, of equal ones the first; the others 0."""
    if count == 0:
        return torch.zeros_like(x)
    magnitude = x.abs().flatten()
    threshold = magnitude.kthvalue(magnitude.numel() - count + 1).values
    kept, equal = magnitude > threshold, magnitude == threshold
    room = count - int(kept.sum())
    kept |= equal if int(equal.sum()) == room else equal & (equal.cumsum(0) <= room)
    return x * kept.view(x.shape)


def _merged(
    tensors: Iterable[Tensor], factors: Sequence[float], row: CombinationType, combination: Combination
) -> Tensor:
    """The sum of the tensors times their factors, or the mean of those that have the elected sign."""
    if not row.elects:
        parts = zip(tensors, factors, strict=True)
        first, factor = next(parts)
        total = first * factor
        for tensor, factor in parts:
            total.add_(tensor, alpha=factor)
        return total
    tensors = list(tensors)
    by_count = combination.majority_sign_method == "frequency"
    vote = torch.zeros_like(tensors[0])
    for tensor in tensors:
        vote.add_(tensor.sign() if by_count else tensor)
    sign = (vote >= 0.0).to(vote.dtype).mul_(2.0).sub_(1.0)
    total, count = torch.zeros_like(vote), torch.zeros_like(vote)
    for tensor, factor in zip(tensors, factors, strict=True):
        agrees = tensor.sign() == sign
        total.add_(tensor * agrees, alpha=factor)
        count.add_(agrees)
    return total.div_(count.clamp_(min=1.0))


def _truncated(merged: Factors, rank: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """(B, A) of the best approximation of a rank; with a clamp B = U S and A = V^T have no larger elements.

    The bound is the quantile of the elements of both factors, taken with both signs: which sign a
    singular vector has is arbitrary.
    """
    cut = merged.cut(rank)
    if cut.rank == 0:
        return cut.u.new_zeros(cut.u.shape[0], 1), cut.v.new_zeros(1, cut.v.shape[1])
    if clamp is None:
        return cut.balanced()
    b, a = cut.u * cut.s, cut.v
    values = torch.cat([b.flatten(), a.flatten()]).cpu().numpy()
    bound = float(np.quantile(np.concatenate([values, -values]), clamp))
    return b.clamp(-bound, bound), a.clamp(-bound, bound)
