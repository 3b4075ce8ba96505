"""The weights of the rows that are being calculated, and which rows use which expert: state that all layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from weldment.errors import UserError

_DENSE = 0.5
"""The share of weights that are not zero from which on one product over all experts is faster than groups of rows."""


@dataclass(frozen=True)
class Group:
    """The rows that use one expert.

    Attributes:
        rows: their places, (n,); None for all rows.
        weights: (n, 1, 1); None if all are 1.
    """

    expert: int
    rows: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True)
class Blend:
    """The weights of a batch.

    Attributes:
        weights: (rows, experts).
        length: tokens of each row, by which rows are told apart where a module sees all tokens in one long list.
        groups: rows by expert; None where most weights are not zero, and all experts are calculated at once.
    """

    weights: Tensor
    length: int
    groups: tuple[Group, ...] | None = None

    @property
    def rows(self) -> int:
        return self.weights.shape[0]


def blend_of(weights: Tensor, length: int) -> Blend:
    """Rows by expert, if that saves work. Weights that are exactly zero cost nothing.

    Args:
        weights: (rows, experts).
        length: tokens of each row.
    """
    if torch.compiler.is_compiling():  # the groups' sizes would be part of the compiled code
        return Blend(weights, length)
    table = weights.tolist()
    used = sum(weight != 0.0 for row in table for weight in row)
    if used > _DENSE * weights.numel() and weights.shape[1] > 1:
        return Blend(weights, length)
    columns = (_group(table, expert, weights.device) for expert in range(weights.shape[1]))
    return Blend(weights, length, tuple(group for group in columns if group is not None))


def _group(table: list[list[float]], expert: int, device: torch.device) -> Group | None:
    rows = [place for place, row in enumerate(table) if row[expert] != 0.0]
    if not rows:
        return None
    values = [table[place][expert] for place in rows]
    places = None if len(rows) == len(table) else torch.tensor(rows, device=device)
    weights = None if all(value == 1.0 for value in values) else torch.tensor(values, device=device)[:, None, None]
    return Group(expert, places, weights)


class Mix:
    """What the layers of one model add just now: nothing, or a blend of experts.

    One thread at a time: the state belongs to the model, not to the call.
    """

    def __init__(self) -> None:
        self.blend: Blend | None = None
        self.alone = False
        self.watch: Callable[[str, Tensor], None] | None = None

    def current(self) -> Blend | None:
        """The blend, None for the shared model alone.

        Raises:
            UserError: a part of the model was called by itself, and nobody said with which experts.
        """
        if self.blend is None and not self.alone:
            cause = "a part of a Twin model was called by itself, without weights of its experts"
            raise UserError(cause, fix="Call the model, or call the part inside `with model.weights(...)`")
        return self.blend

    @contextmanager
    def using(self, blend: Blend | None) -> Iterator[None]:
        """Inside, layers calculate this blend; None stands for the shared model alone."""
        before = self.blend, self.alone
        self.blend, self.alone = blend, blend is None
        try:
            yield
        finally:
            self.blend, self.alone = before

    @contextmanager
    def watched_by(self, watch: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, `watch` is told the name and the input of every module that experts change."""
        self.watch = watch
        try:
            yield
        finally:
            self.watch = None
