"""What is done to a merged tensor after its method and before it is rounded, whatever the method.

Both parts work on the merged change, merged - theta_0: `subspace_boost` on the singular values of its
matrices, then `layer_scale` on its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weldment.methods.spectral.bases import RANK, rounding_of, scale_, triples
from weldment.methods.spectral.matrices import Form

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Finish:
    """What is done to one merged tensor.

    Attributes:
        scale: factor of the change.
        boost: share of the sum of singular values at which smaller ones are raised; None leaves them.
        form: the matrices that are boosted; None where the tensor holds none.
    """

    scale: float = 1.0
    boost: float | None = None
    form: Form | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the tensor must be there as a whole."""
        return self.boost is not None and self.form is not None


def finished(merged: Tensor, base: Tensor, finish: Finish) -> Tensor:
    """theta_0 + scale * boosted(merged - theta_0), in place of `merged`.

    A scale of 1 without a boost leaves `merged` as it is, bit by bit; a scale of 0 gives the base.

    Args:
        merged: a block in the accumulation dtype, contiguous; with a boost the whole tensor.
        base: the same elements of the base; not changed.

    Source: `scale`: Wang et al. 2024, LiNeS. `boost`: Skorobogat et al. 2025, Subspace-Boosted Model Merging.
    """
    if finish.scale == 0.0:
        return merged.copy_(base)
    if finish.boost is None or finish.form is None:
        return merged if finish.scale == 1.0 else merged.sub_(base).mul_(finish.scale).add_(base)
    matrices = merged.view(finish.form)
    floors = [rounding_of(matrix) for matrix in matrices]
    merged.sub_(base)
    for change, floor in zip(matrices, floors, strict=True):
        boost_(change, finish.boost, floor)
    return (merged if finish.scale == 1.0 else merged.mul_(finish.scale)).add_(base)


def boost_(change: Tensor, share: float, floor: float = 0.0) -> Tensor:
    """U max(S, S_k) V', in place of a matrix U S V': k is the first for which S_1 + ... + S_k >= share * sum(S).

    Singular values that are rounding errors do not count and stay as they are: those up to 1e-6 times the
    largest and those up to `floor`. A change of zero, or one that is not finite, is left alone.

    Args:
        change: (m, n).
        share: 0 makes all singular values equal to the largest; below 1.
    """
    largest = float(change.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return change
    power = scale_([change])
    u, s, v = triples(change, RANK)
    count = int((s > floor / power).sum())
    if count:
        sums = s[:count].double().cumsum(0)
        first = int((sums < share * sums[-1]).sum())
        lift = (s[first] - s[first:count]).clamp_(min=0.0)
        change.addmm_(u[:, first:count] * lift, v[:, first:count].T)
    return change.mul_(power)
