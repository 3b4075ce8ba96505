"""The exclusive parts of a Twin model cut to fewer singular values, in memory: what a smaller bundle would answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from weldment.adapters.lowrank import factorised
from weldment.errors import UserError
from weldment.twin.layers import ExclusiveMatrix, Pair


@dataclass(frozen=True)
class Level:
    """How many singular values are kept of each matrix: a rank, or a share of its shorter side, rounded up."""

    rank: int | None = None
    share: float | None = None

    def count(self, rows: int, columns: int) -> int:
        """Of a matrix (rows, columns)."""
        least = min(rows, columns)
        if self.rank is not None:
            return min(self.rank, least)
        assert self.share is not None
        return max(1, math.ceil(self.share * least - 1e-9))

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.rank is not None else f"{100 * (self.share or 0.0):g} %"


def levels(given: str) -> tuple[Level, ...]:
    """Ranks and percents from a list with commas, such as `0.5%,2%,10%,32`.

    Raises:
        UserError: one is neither.
    """
    return tuple(dict.fromkeys(_level(part.strip()) for part in given.split(",")))


def _level(word: str) -> Level:
    number, percent = word.removesuffix("%"), word.endswith("%")
    try:
        level = Level(share=float(number) / 100) if percent else Level(rank=int(number))
    except ValueError:
        level = Level(rank=0)
    if not (level.rank or 0) >= 1 and not 0.0 < (level.share or 0.0) <= 1.0:
        cause = f"{word!r} is no rank of at least 1 and no percent above 0 up to 100"
        raise UserError(cause, where="--sweep", fix="Write it like --sweep 0.5%,2%,10%,100% or --sweep 4,16,64")
    return level


class Cutter:
    """The factors of a Twin model, decomposed once, and put back cut to one level after the other.

    Args:
        network: a Twin model.
        wanted: the levels that will be asked for; what none of them keeps is not calculated.
    """

    def __init__(self, network: nn.Module, wanted: Sequence[Level]) -> None:
        found = [module for module in network.modules() if isinstance(module, ExclusiveMatrix) and module.spans]
        self._parts = [(layer, {e: _decomposed(layer, e, wanted) for e in layer.spans}) for layer in found]

    @property
    def nbytes(self) -> int:
        """Of the factors in the network at the moment."""
        return sum(_bytes(layer.a) + _bytes(layer.b) for layer, _ in self._parts)

    def cuts(self, level: Level) -> bool:
        """Whether the bundle keeps more singular values of any matrix."""
        return any(
            end - start > level.count(layer.outputs, _inputs(layer))
            for layer, parts in self._parts
            for start, end in (layer.spans[expert] for expert in parts)
        )

    @contextmanager
    def cut(self, level: Level) -> Iterator[None]:
        """Inside, the network has factors of this level."""
        before = [(layer, layer.spans, layer.a, layer.b, layer.owners) for layer, _ in self._parts]
        try:
            for layer, parts in self._parts:
                _put(layer, parts, level)
            yield
        finally:
            for layer, spans, a, b, owners in before:
                layer.spans, layer.a, layer.b, layer.owners = spans, a, b, owners


def _inputs(layer: ExclusiveMatrix) -> int:
    return layer.a.shape[0 if layer.embedding else 1]


def _decomposed(layer: ExclusiveMatrix, expert: int, wanted: Sequence[Level]) -> Pair:
    """A (r, inputs) and B (outputs, r) with the singular values in falling order, not more than any level wants."""
    start, end = layer.spans[expert]
    a, b = (layer.a.T if layer.embedding else layer.a)[start:end], layer.b[start:end].T
    most = max(level.count(layer.outputs, _inputs(layer)) for level in wanted)
    b_, a_ = factorised(b.float(), a.float(), rank=min(most, end - start)).balanced()
    return a_.to(a.dtype), b_.to(b.dtype)


def _put(layer: ExclusiveMatrix, parts: Mapping[int, Pair], level: Level) -> None:
    count = level.count(layer.outputs, _inputs(layer))
    layer.keep_factors({expert: (a[:count], b[:, :count]) for expert, (a, b) in parts.items()}, _inputs(layer))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
