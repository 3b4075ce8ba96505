"""Tensors that are copied bit by bit, after a check that all models agree where that is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from weldment.engine.blocks import Grid
from weldment.engine.checksum import Checksum, Outcome
from weldment.engine.outputs import Output
from weldment.engine.scheduler import Stages
from weldment.engine.sources import Source
from weldment.engine.work import Part, Worker, commit, joined
from weldment.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Copy:
    """A tensor to copy from the first source; any other source must hold the same bytes."""

    name: str
    shape: tuple[int, ...]
    sources: Sequence[Source]
    dtype: str
    output: Output

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def inputs(self) -> Sequence[Source]:
        """The models it is in."""
        return self.sources


def copy_stages(place: int, copy: Copy, finished: Callable[[Outcome], None]) -> Stages:
    """One pass over the tensor; `finished` gets the outcome."""
    parts = yield [partial(_copy_span, place, span) for span in Grid(copy.shape, "element").spans()]
    finished(joined(Checksum(copy.numel, copy.dtype), parts))


def _copy_span(place: int, span: tuple[int, int], worker: Worker) -> Part:
    copy: Copy = worker.works[place]
    nonfinite = 0
    checksum = Checksum(copy.numel, copy.dtype).part(*span)
    with closing(copy.output.span(span[0], worker)) as output:
        for cut in Grid(copy.shape, "element").blocks(span):
            worker.look_ahead(place, cut)
            first = copy.sources[0].raw(cut.start, cut.view, worker, "first")
            for other in copy.sources[1:]:
                _check_same(copy, first, other.raw(cut.start, cut.view, worker))
            room = output.room(cut.numel)
            room.copy_(first)
            nonfinite += commit(room, cut.start, output, checksum)
    return Part(place, span[1] - span[0], nonfinite, checksum)


def _check_same(copy: Copy, first: Tensor, other: Tensor) -> None:
    if not torch.equal(first.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
        raise PlanError(
            "the models hold different values of a tensor that cannot be merged",
            where=copy.name,
            fix=f'Take it from one model: `take: {{"{copy.name}": MODEL}}`, or leave it out with `drop`',
        )
