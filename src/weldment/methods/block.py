"""What a method sees: the same block of every model, and what is known about the tensor.

The engine cuts tensors into blocks, fills a `Block` for each and calls the method's kernel. A
kernel is mathematics only: it reads no file, keeps no state and knows no threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["element", "row", "matrix"]
Scope = Literal["tensor", "model"]

CHUNK = 1 << 16
"""Elements that a sum over a tensor takes together; blocks are multiples of it, so sums do not
depend on the size of the blocks."""


@dataclass
class Block:
    """The same elements of every model, as scratch copies that the kernel may overwrite.

    Attributes:
        models: one tensor per model, in the accumulation dtype (float32 or float64).
            Unit "element": 1-D, a run of the flattened tensor. Unit "row": (rows, columns),
            whole rows of the tensor viewed as (shape[0], rest); a tensor of fewer than two
            dimensions is one row. Unit "matrix": the whole tensor in its own shape.
        base: the base model's elements, or None if the recipe has no base. Never overwritten.
        shape: shape of the whole tensor.
        start: index, in the flattened tensor, of the block's first element.
        statistics: results of the method's passes so far, by name.
        keys: one random key per model (see `masks`); equal for all blocks of a tensor.
        pool: gives scratch tensors.
        stack: (T, ...), the memory of `models`, for operations on all of them at once: each
            call of torch takes as long as thousands of additions.
    """

    models: list[Tensor]
    base: Tensor | None
    shape: tuple[int, ...]
    start: int = 0
    statistics: Mapping[str, Any] = field(default_factory=dict)
    keys: Sequence[int] = ()
    pool: Callable[[int, tuple[int, ...], torch.dtype], Tensor] | None = None
    stack: Tensor | None = None
    _taken: int = 0

    def scratch(self, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor like the models' blocks, reused from block to block; of their dtype by default."""
        like = self.models[0]
        dtype = dtype or like.dtype
        self._taken += 1
        if self.pool is None:
            return torch.empty_like(like, dtype=dtype)
        return self.pool(self._taken - 1, tuple(like.shape), dtype)

    def task_vectors(self) -> list[Tensor]:
        """tau_i = theta_i - theta_0, in place of the models' elements."""
        assert self.base is not None
        self.together().sub_(self.base)
        return self.models

    def together(self) -> Tensor:
        """The models' elements as one tensor, (T, ...); they share their memory."""
        if self.stack is None:
            self.stack = torch.stack(self.models)
            self.models = list(self.stack)
        return self.stack


def required(base: Tensor | None) -> Tensor:
    """The base, which methods that need one always get."""
    assert base is not None
    return base


@dataclass(frozen=True)
class Total:
    """A sum over the tensor, in float64, taken chunk by chunk in a fixed order.

    `of(block, **parameters)` gives the block's partial sum (float64, any shape that is the same
    for every block); the engine calls it with blocks of at most `CHUNK` elements. `finish` turns
    the total into what kernels want to see in `block.statistics[name]`.
    """

    name: str
    of: Callable[..., Tensor]
    finish: Callable[..., Any] | None = None
    scope: Scope = "tensor"


@dataclass(frozen=True)
class OrderStatistic:
    """Exact order statistics of non-negative numbers, one series per model or a single one.

    `of(block, **parameters)` gives the block's numbers, a list of tensors like the models'
    blocks. `ranks(numel, statistics=..., **parameters)` gives for each series the wanted ranks, 0 for the
    smallest number; a rank of None yields None. `block.statistics[name][series][i]` is the
    i-th wanted number of a series, a float.
    """

    name: str
    of: Callable[..., list[Tensor]]
    ranks: Callable[..., Sequence[Sequence[int | None]]]
    scope: Scope = "tensor"


Statistic = Total | OrderStatistic
