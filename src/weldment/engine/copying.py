"""Tensors that are copied bit by bit, after a check that all models agree where that is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from weldment.engine.blocks import Grid
from weldment.engine.checksum import Checksum, Outcome
from weldment.engine.outputs import Output
from weldment.engine.scheduler import Stages
from weldment.engine.sources import Source
from weldment.engine.work import Part, emit, outcome
from weldment.engine.workspace import Workspace
from weldment.errors import PlanError


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


def copy_stages(copy: Copy, finished: Callable[[Outcome], None], report: Callable[[int], None]) -> Stages[Workspace]:
    """One pass over the tensor; `finished` gets the outcome."""
    checksum = Checksum(copy.numel, copy.dtype)
    spans = Grid(copy.shape, "element").spans()
    parts = yield [partial(_copy_span, copy, span, checksum, report) for span in spans]
    finished(outcome(checksum, parts))


def _copy_span(
    copy: Copy, span: tuple[int, int], checksum: Checksum, report: Callable[[int], None], workspace: Workspace
) -> Part:
    nonfinite = 0
    output = copy.output.span(span[0], workspace)
    for cut in Grid(copy.shape, "element").blocks(span):
        first = copy.sources[0].raw(cut.start, cut.view, workspace, "first")
        for other in copy.sources[1:]:
            values = other.raw(cut.start, cut.view, workspace)
            if not torch.equal(first.contiguous().view(torch.uint8), values.contiguous().view(torch.uint8)):
                raise PlanError(
                    "the models hold different values of a tensor that cannot be merged",
                    where=copy.name,
                    fix=f'Take it from one model: `take: {{"{copy.name}": MODEL}}`, or leave it out with `drop`',
                )
        nonfinite += emit(first, cut.start, output, checksum)
        report(cut.numel)
    return nonfinite, output.close()
