"""Which tensors spectral methods decompose, and how a tensor is seen as matrices.

Tensors of two dimensions or more are decomposed, but for token embeddings and output heads, which are
averaged like vectors: their rows belong to tokens, and one of their sides is very long. Patterns of the
recipe replace this choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from weldment.methods.average import weighted_sum
from weldment.methods.block import Block, Unit, required
from weldment.methods.consensus import onto_base
from weldment.methods.method import Cost, Method, Parameter
from weldment.methods.spectral.bases import RANK, Joint, rounding_of, scale_

if TYPE_CHECKING:
    from torch import Tensor

Form = tuple[int, int, int]
"""Matrices that a tensor holds, their rows and their columns."""

LINEAR = Parameter(
    "linear_parameter_regex_pattern",
    "regular expressions, matched from the start of names, of the tensors to decompose;"
    " by default all of two dimensions or more but embeddings and output heads",
    kind="patterns",
)
NOT_LINEAR = Parameter(
    "linear_parameter_ignore_regex_pattern",
    "regular expressions of tensors not to decompose",
    kind="patterns",
)
IGNORED = Parameter(
    "ignore_module_regex_pattern",
    "regular expressions of tensors that keep the base's values",
    kind="patterns",
)
SPLIT = Parameter(
    "split",
    "regular expressions of fused tensors and into how many equal parts their rows are split before they are"
    " decomposed, such as {'.*in_proj.*': 3}",
    kind="counts",
)
SELECTION = (LINEAR, NOT_LINEAR, IGNORED, SPLIT)

FUSED_EXPERTS = re.compile(r"(^|\.)experts\.")
"""Tensors of three dimensions that hold a matrix for each expert of a mixture."""


def arranged(
    parameters: Mapping[str, Any], name: str, shape: tuple[int, ...], *, is_embedding: bool = False
) -> dict[str, Any]:
    """The kernel's arguments for one tensor: patterns become `form` and `ignored`.

    `form` is (matrices, rows, columns), or None for a tensor that is not decomposed.

    Raises:
        ValueError: the rows of a tensor cannot be split as asked.
    """
    rest = {key: value for key, value in parameters.items() if key not in {p.argument for p in SELECTION}}
    linear, not_linear = parameters[LINEAR.argument], parameters[NOT_LINEAR.argument]
    chosen = not is_embedding if linear is None else matched(linear, name)
    chosen = chosen and len(shape) > 1 and math.prod(shape) > 0 and not matched(not_linear, name)
    splits = (n for pattern, n in (parameters[SPLIT.argument] or {}).items() if re.match(pattern, name))
    form = form_of(name, shape, next(splits, 1)) if chosen else None
    return {**rest, "form": form, "ignored": matched(parameters[IGNORED.argument], name)}


def form_of(name: str, shape: tuple[int, ...], parts: int = 1) -> tuple[int, int, int]:
    """How many matrices a tensor holds, and their rows and columns: (out, rest), or a matrix for each fused expert.

    Raises:
        ValueError: the rows cannot be split into so many parts.
    """
    count, rows, *rest = shape if len(shape) == 3 and FUSED_EXPERTS.search(name) else (1, *shape)
    if rows % parts:
        raise ValueError(f"`split`: {rows} rows cannot be split into {parts} equal parts")
    return count * parts, rows // parts, math.prod(rest)


def matched(patterns: Sequence[str] | None, name: str) -> bool:
    """Whether one of the regular expressions matches the start of a name."""
    return any(re.match(pattern, name) for pattern in patterns or ())


def unit(*, form: Form | None, ignored: bool, **_: object) -> Unit:
    """A tensor that is not decomposed is cut as small as the engine likes."""
    return "element" if form is None or ignored else "matrix"


@dataclass(frozen=True)
class Scale:
    """What the elements of changes mean.

    Attributes:
        power: what they are to be multiplied by.
        rounding: singular values of their sum up to this come of the rounding of the models' elements.
    """

    power: float
    rounding: float


def averaged(merge: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel from the mathematics of matrices; other tensors become theta_0 + lambda * mean_i w_i tau_i.

    Args:
        merge: of the experts' changes w_i tau_i, (m, n) each, their elements about one or less, their scale, and the
            parameters; the merged change.
    """

    def kernel(
        block: Block, *, weight: Sequence[float], lambda_: float, form: Form | None, ignored: bool, **parameters: Any
    ) -> Tensor:
        if ignored:
            return block.scratch().copy_(required(block.base))
        if form is None:
            taus = block.task_vectors()
            return onto_base(block, weighted_sum(taus, weight), lambda_ / len(taus))
        taus = [tau.mul_(w) if w != 1.0 else tau for tau, w in zip(block.task_vectors(), weight, strict=True)]
        return by_matrix(block, taus, partial(merge, **parameters), form, lambda_)

    kernel.__doc__ = merge.__doc__
    return kernel


def by_matrix(
    block: Block, taus: Sequence[Tensor], merge: Callable[[list[Tensor], Scale], Tensor], form: Form, lambda_: float
) -> Tensor:
    """theta_0 + lambda * power * merge(taus / power, scale), matrix by matrix; overwrites the taus.

    A matrix that is not finite in all models has no singular vectors: its merge is NaN.
    """
    stacks = [tau.reshape(form) for tau in taus]
    origins = required(block.base).reshape(form)
    found = [_scaled_merge([stack[number] for stack in stacks], origin, merge) for number, origin in enumerate(origins)]
    merged = found[0] if len(found) == 1 else torch.stack(found)
    return onto_base(block, merged.reshape(required(block.base).shape), lambda_)


def _scaled_merge(matrices: list[Tensor], origin: Tensor, merge: Callable[[list[Tensor], Scale], Tensor]) -> Tensor:
    power = scale_(matrices)
    if not all(math.isfinite(float(matrix.sum())) for matrix in matrices):
        return torch.full_like(origin, math.nan)
    return merge(matrices, Scale(power, len(matrices) ** 0.5 * rounding_of(origin) / power)).mul_(power)


def clear_rounding(found: Joint, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Zero, in place, what only rounding put into the parts U_i S of a stack of matrices.

    What an expert has no part in must not count as an entry of it, least of all in a mean over those that have one:
    rows that are zero in its matrix, and directions in which it is a rounding error of the largest singular value.

    Returns:
        the lengths of the parts' columns.
    """
    lengths: list[Tensor] = []
    for part, length, matrix in zip(found.parts, found.lengths, matrices, strict=True):
        rows = matrix.any(dim=1)
        directions = length > RANK * found.values[0]
        if not bool(rows.all()):
            part.mul_(rows[:, None])
        if not bool(directions.all()):
            part.mul_(directions)
        lengths.append(length * directions)
    return lengths


def spectral(
    name: str,
    summary: str,
    merge: Callable[..., Tensor],
    parameters: tuple[Parameter, ...],
    paper: str,
    url: str,
    cost: Cost,
) -> Method:
    """A row whose kernel is `averaged(merge)`."""
    return Method(
        name=name,
        family="spectral",
        summary=summary,
        kernel=averaged(merge),
        parameters=parameters,
        unit=unit,
        arrange=arranged,
        float64=True,
        cost=cost,
        paper=paper,
        url=url,
    )
