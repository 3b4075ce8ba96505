"""Tensors that are copied bit by bit, after a check that all models agree where that is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from weldment.checkpoint.dtypes import TORCH
from weldment.engine.blocks import Grid
from weldment.engine.checksum import Checksum, Outcome
from weldment.engine.scheduler import Stages
from weldment.engine.sources import Source
from weldment.engine.work import Write, count_nonfinite
from weldment.engine.workspace import Workspace
from weldment.errors import PlanError


@dataclass(frozen=True)
class Copy:
    """A tensor to copy from the first source; any other source must hold the same bytes."""

    name: str
    shape: tuple[int, ...]
    sources: Sequence[Source]
    dtype: str
    write: Write

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def copy_stages(copy: Copy, finished: Callable[[Outcome], None], report: Callable[[int], None]) -> Stages[Workspace]:
    """One pass over the tensor; `finished` gets the outcome."""
    checksum = Checksum(copy.numel, copy.dtype)
    spans = Grid(copy.shape, "element").spans()
    nonfinite = yield [partial(_copy_span, copy, span, checksum, report) for span in spans]
    finished(Outcome(checksum, sum(nonfinite)))


def _copy_span(
    copy: Copy, span: tuple[int, int], checksum: Checksum, report: Callable[[int], None], workspace: Workspace
) -> int:
    nonfinite = 0
    for cut in Grid(copy.shape, "element").blocks(span):
        out = workspace.staging("out", cut.numel * TORCH[copy.dtype].itemsize).view(TORCH[copy.dtype])
        out.copy_(copy.sources[0].raw(cut.start, cut.numel, workspace))
        for other in copy.sources[1:]:
            values = other.raw(cut.start, cut.numel, workspace)
            if not torch.equal(out.view(torch.uint8), values.contiguous().view(torch.uint8)):
                raise PlanError(
                    "the models hold different values of a tensor that cannot be merged",
                    where=copy.name,
                    fix=f'Take it from one model: `take: {{"{copy.name}": MODEL}}`, or leave it out with `drop`',
                )
        if out.dtype.is_floating_point:
            nonfinite += count_nonfinite(out.float(), out)
        checksum.add(cut.start, out)
        copy.write(cut.start, out)
        report(cut.numel)
    return nonfinite
