"""Decom-Renorm-Merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weldment.methods.average import sum_into
from weldment.methods.block import Block, OrderStatistic, Statistic, Total, required
from weldment.methods.consensus import onto_base
from weldment.methods.method import Method, Parameter
from weldment.methods.spectral.bases import joint
from weldment.methods.spectral.costs import SpectralCost, stacked_side
from weldment.methods.spectral.matrices import SELECTION, Form, Scale, arranged, by_matrix, clear_rounding, unit
from weldment.methods.task_vectors import LAMBDA
from weldment.methods.trimming import keep_above, kth_smallest

if TYPE_CHECKING:
    from torch import Tensor

CUT = 1e-2
"""Singular values of the stack below this share of the largest are dropped."""

_RANK_CUT = 0.1
"""`direction: auto` counts the singular values above this share of the largest."""

_TIE = 1e-5
"""Orthogonalities this close are equal; the weighted ones of both directions are, if no singular value is dropped."""

DIRECTIONS = ("horizontal", "vertical", "auto")


def trim_normalised(parts: Sequence[Tensor], lengths: Sequence[Tensor], drop: float) -> None:
    """Zero, in place, a share `drop` of the elements of all parts: the smallest relative to their column's length.

    Columns of zeros, those of an expert without a change, do not count.
    """
    count = sum(part.shape[0] * int((length > 0.0).sum()) for part, length in zip(parts, lengths, strict=True))
    rank = dropped_rank(count, drop)
    if rank is None:
        return
    rank += sum(part.numel() for part in parts) - count  # columns of zeros have the smallest shares
    lengths = [torch.where(length > 0.0, length, 1.0) for length in lengths]
    share = torch.empty_like(parts[0])

    def shares(number: int, step: int) -> Tensor:
        part = parts[number][::step]
        return torch.div(part, lengths[number], out=share[: len(part)]).abs_()

    threshold = kth_smallest(shares, (len(parts), *parts[0].shape), rank)
    for number, part in enumerate(parts):
        part.mul_(keep_above(shares(number, 1), threshold).sign_())


def dropped_rank(count: int, drop: float) -> int | None:
    """The rank, from 0, of the smallest number that stays when a share `drop` of `count` numbers is zeroed.

    As the authors count: one less is zeroed than round(n * (1 - drop)) leaves over. None if none is.
    """
    dropped = count - round(count * (1.0 - drop))
    return dropped - 1 if dropped > 0 else None


def resolved(
    parts: Sequence[Tensor], coefficient: Sequence[float], majority: float | None, *, disjoint: bool
) -> Tensor:
    """The mean of c_i x_i over all parts, or (`disjoint`) over those that are not zero.

    Args:
        parts: x_i; overwritten.
        majority: elements whose sign is not that of sum_i x_i do not count; a sum of zero has this sign.
            None: all count.
    """
    if majority is not None:
        elected = sum_into(torch.empty_like(parts[0]), list(parts)).sign_()
        elected.add_(elected.abs().neg_().add_(1.0).mul_(majority))
        for part in parts:
            part.mul_(elected).relu_().mul_(elected)
    for part, c in zip(parts, coefficient, strict=True):
        part.mul_(c)
    total = sum_into(torch.empty_like(parts[0]), list(parts))
    if not disjoint:
        return total.div_(len(parts))
    return total.div_(sum_into(torch.empty_like(total), [part.sign_().abs_() for part in parts]).clamp_(min=1.0))


def sign_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of the signs of sum_i x_i over all elements."""
    return sum_into(torch.empty_like(parts[0]), list(parts)).sign_().sum(dtype=torch.float64)


def merge_vertical(
    taus: list[Tensor], coefficient: Sequence[float], *, drop: float, signs: bool, disjoint: bool
) -> Tensor:
    """The merged change of matrices stacked one above the other: see `drm`."""
    if drop == 0.0:
        return resolved(taus, coefficient, None, disjoint=disjoint)
    if not any(bool(tau.any()) for tau in taus):
        return torch.zeros_like(taus[0])
    found = joint(taus, CUT)
    parts = found.parts
    lengths = clear_rounding(found, taus)
    trim_normalised(parts, lengths, drop)
    majority = float(sign_sum(parts).sign()) if signs else None
    return found.times_rows(resolved(parts, coefficient, majority, disjoint=disjoint))


def _stack_rank(taus: Sequence[Tensor]) -> int:
    return joint(taus, _RANK_CUT).values.numel()


def orthogonality(taus: Sequence[Tensor], power: float | None = None) -> float:
    """sum_ij (1 - |<U_i, U_j> - [i = j]|) over the parts of U, or of power * U S, of the vertical stack."""
    found = joint(taus, CUT)
    parts = [part / found.values for part in found.parts] if power is None else found.parts
    flat = torch.stack([part.reshape(-1) for part in parts]).double()
    products = (flat @ flat.T).mul_((power or 1.0) ** 2) - torch.eye(len(parts), dtype=flat.dtype, device=flat.device)
    return float((1.0 - products.abs()).sum())


def is_horizontal(taus: Sequence[Tensor], power: float, direction: str, criterion: str) -> bool:
    """Whether changes are stacked side by side; `auto` takes the stack of smaller rank, or the more orthogonal.

    The changes are power * taus; only weighted orthogonality depends on it.
    """
    if direction != "auto":
        return direction == "horizontal"
    turned = [tau.T for tau in taus]
    if criterion == "rank":
        return _stack_rank(turned) < _stack_rank(taus)
    weight = power if criterion == "weighted_orthogonality" else None
    across, down = orthogonality(turned, weight), orthogonality(taus, weight)
    return across - down > _TIE * (abs(across) + abs(down))


def drm(
    block: Block,
    *,
    coefficient: Sequence[float],
    singular_matrices_drop_rate: float,
    direction: str,
    auto_criterion: str,
    enable_disjoint_mean: bool,
    enable_sign_resolution: bool,
    non_linear_module_entries_drop_rate: float,
    svd_dtype: str,
    lambda_: float,
    form: Form | None,
    ignored: bool,
) -> Tensor:
    """theta_0 + lambda * merge(U_1 S_1, ..., U_T S_T) V'.

    Vertical: D = [tau_1; ...; tau_T] = U S V', without singular values below 1 % of the largest.
    Horizontal: D = [tau_1, ..., tau_T], the same of the transposed matrices. U is split into U_i, each
    column of U_i is divided by its length, which goes into S_i. The `singular_matrices_drop_rate`
    smallest entries of all U_i together become zero. Of the U_i S_i, entries whose sign is not
    that of their sum over i do not count (a sum of zero has the sign of most other sums); the rest, times
    `coefficient`, are averaged over the models that have them (`enable_disjoint_mean`) or over all, and
    multiplied by V'. A drop rate of 0 means the mean of the tau_i themselves, without elected signs.

    Other tensors: the `non_linear_module_entries_drop_rate` smallest changes of each expert, over all
    these tensors of the model, become zero; signs and means as above. Ignored tensors are the base's.

    Source: Chaichana et al. 2025, Decom-Renorm-Merge.
    """
    if ignored:
        return block.scratch().copy_(required(block.base))
    if form is None:
        taus = _trimmed(block, non_linear_module_entries_drop_rate, svd_dtype)
        majority = block.statistics["majority"] if enable_sign_resolution else None
        return onto_base(block, resolved(taus, coefficient, majority, disjoint=enable_disjoint_mean), lambda_)

    def merge(taus: list[Tensor], scale: Scale) -> Tensor:
        turned = is_horizontal(taus, scale.power, direction, auto_criterion)
        merged = merge_vertical(
            [tau.T for tau in taus] if turned else taus,
            coefficient,
            drop=singular_matrices_drop_rate,
            signs=enable_sign_resolution,
            disjoint=enable_disjoint_mean,
        )
        return merged.T if turned else merged

    return by_matrix(block, _rounded(block, svd_dtype), merge, form, lambda_)


def _rounded(block: Block, svd_dtype: str) -> list[Tensor]:
    """The task vectors, rounded to a narrower dtype."""
    taus = block.task_vectors()
    if svd_dtype != "float32":
        for tau in taus:
            tau.copy_(tau.to(getattr(torch, svd_dtype)))
    return taus


def magnitudes(block: Block, *, svd_dtype: str, **_: object) -> list[Tensor]:
    """One series a model: |tau|."""
    return [tau.abs_() for tau in _rounded(block, svd_dtype)]


def trim_ranks(
    numel: int, *, non_linear_module_entries_drop_rate: float, coefficient: Sequence[float], **_: object
) -> list[list[int | None]]:
    """The rank of the smallest magnitude that stays, for each model."""
    return [[dropped_rank(numel, non_linear_module_entries_drop_rate)]] * len(coefficient)


def _trimmed(block: Block, drop: float, svd_dtype: str) -> list[Tensor]:
    taus = _rounded(block, svd_dtype)
    if drop > 0.0:
        for tau, (threshold,) in zip(taus, block.statistics["trim"], strict=True):
            keep_above(tau, threshold)
    return taus


def majority_sum(block: Block, *, non_linear_module_entries_drop_rate: float, svd_dtype: str, **_: object) -> Tensor:
    """The sum of the signs that the elements of a tensor elect."""
    return sign_sum(_trimmed(block, non_linear_module_entries_drop_rate, svd_dtype))


def _sign(total: Tensor) -> float:
    return float(total.sign())


def drm_statistics(
    *,
    form: Form | None,
    ignored: bool,
    enable_sign_resolution: bool,
    non_linear_module_entries_drop_rate: float,
    **_: object,
) -> tuple[Statistic, ...]:
    """Thresholds of the whole model and the majority of each tensor, for tensors that are not decomposed."""
    if form is not None or ignored:
        return ()
    trim = OrderStatistic("trim", magnitudes, trim_ranks, scope="model")
    majority = Total("majority", majority_sum, finish=_sign)
    return (
        *([trim] if non_linear_module_entries_drop_rate > 0.0 else []),
        *([majority] if enable_sign_resolution else []),
    )


_RATE = {"minimum": 0.0, "maximum": 1.0, "open_maximum": True}

DRM = Method(
    name="drm",
    float64=True,
    family="spectral",
    summary="stacks the changes, trims and merges their parts of the joint singular vectors",
    kernel=drm,
    unit=unit,
    statistics=drm_statistics,
    arrange=arranged,
    cost=SpectralCost(stacked_side),
    parameters=(
        Parameter("coefficient", "factor of a model in the mean", default=1.0, per_model=True, aliases={"weight": 1.0}),
        Parameter(
            "singular_matrices_drop_rate", "share of the entries of the singular vectors to zero", default=0.8, **_RATE
        ),
        Parameter(
            "direction",
            "stack changes one above the other (vertical), side by side (horizontal), or as `auto_criterion` finds",
            "choice",
            default="horizontal",
            choices=DIRECTIONS,
        ),
        Parameter(
            "auto_criterion",
            "for `direction: auto`: the stack of smaller rank, or the one whose parts are more orthogonal",
            "choice",
            default="rank",
            choices=("rank", "orthogonality", "weighted_orthogonality"),
        ),
        Parameter("enable_disjoint_mean", "average over the models that have an entry", "bool", default=True),
        Parameter("enable_sign_resolution", "leave out entries against the elected sign", "bool", default=True),
        Parameter(
            "non_linear_module_entries_drop_rate",
            "share of each model's changes to zero in tensors that are not decomposed",
            default=0.0,
            **_RATE,
        ),
        Parameter(
            "svd_dtype",
            "changes are rounded to this dtype first; the arithmetic is float32 or wider",
            "choice",
            default="float32",
            choices=("float32", "bfloat16", "float16"),
        ),
        *SELECTION,
        LAMBDA,
    ),
    paper="Chaichana et al., Decom-Renorm-Merge: Model Merging on the Right Space Improves Multitasking, 2025",
    url="https://arxiv.org/abs/2505.23117",
)
