"""Executes a plan into tensors in memory, for those who use the merged model at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weldment.checkpoint.dtypes import torch_dtype
from weldment.checkpoint.model import WeightFile
from weldment.engine.checksum import Outcome
from weldment.engine.copying import Copy
from weldment.engine.memory import weight_of
from weldment.engine.outputs import MemoryOutput
from weldment.engine.run import Machine, run_works
from weldment.engine.work import Work
from weldment.engine.works import Inputs, work_of
from weldment.errors import CheckpointError, NonFiniteError
from weldment.planning.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

Named = dict[tuple[str, str], "Tensor"]
"""Tensors by their file ("" for the model itself) and their name."""


def execute_in_memory(plan: Plan, machine: Machine, block: int) -> Named:
    """The merged tensors of a plan whose inputs are on this machine.

    Raises:
        NonFiniteError: the result has NaN or infinity.
    """
    made: Named = {}
    for stage in plan.stages:
        files = {slot.name: slot.file for slot in stage.layout.slots}
        for (_, name), tensor in _executed(stage, machine, block, made).items():
            made[f"{stage.recipe.name}/{files[name]}", name] = tensor
    return _executed(plan, machine, block, made)


def _executed(plan: Plan, machine: Machine, block: int, made: Mapping[tuple[str, str], Tensor]) -> Named:
    tensors: Named = {(job.file, job.name): torch.empty(job.shape, dtype=torch_dtype(job.dtype)) for job in plan.jobs}
    nonfinite: list[str] = []

    def finished(work: Work | Copy, outcome: Outcome) -> None:
        if outcome.nonfinite:
            nonfinite.append(work.name)

    with ExitStack() as stack:
        inputs = Inputs(stack, _path, made)
        works = [
            work_of(
                job, inputs, MemoryOutput(tensors[job.file, job.name]), block, weight_of(job, plan.recipe.accumulate)
            )
            for job in plan.jobs
        ]
        # Processes would write into memory of their own.
        run_works(works, replace(machine, accumulate=plan.recipe.accumulate, processes=False), finished=finished)
    if nonfinite:
        raise NonFiniteError(f"NaN or infinity in {len(nonfinite)} tensors of the result, {nonfinite[0]} among them")
    return tensors


def _path(file: WeightFile) -> Path:
    if file.path is None:
        raise CheckpointError("is not on this machine", where=file.name)
    return file.path
