"""Executes a plan into the files of an output folder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.checkpoint.journal import Journal
from weldment.checkpoint.layout import Slot
from weldment.checkpoint.model import WeightFile
from weldment.checkpoint.output_files import OutputFiles
from weldment.engine.blocks import BLOCK
from weldment.engine.checksum import Checksum, Outcome
from weldment.engine.copying import Copy
from weldment.engine.memory import weight_of
from weldment.engine.outputs import FileOutput
from weldment.engine.progress import Amount, Progress
from weldment.engine.run import Machine, run_works
from weldment.engine.work import Work
from weldment.engine.works import Inputs, work_of
from weldment.errors import NonFiniteError
from weldment.methods import METHODS
from weldment.planning.plan import Plan, TensorJob

_CHECK_STEP = 1 << 22
_SHOWN = 5


@dataclass(frozen=True)
class Execution:
    """How to execute.

    Attributes:
        folder: where the output's files are made.
        label: tells the plan's records in the journal from those of other stages.
        find: the path of an input file.
        allow_nonfinite: report NaN and infinity in the output instead of failing.
    """

    folder: Path
    label: str
    journal: Journal
    finished: Mapping[str, str]
    find: Callable[[WeightFile], Path]
    machine: Machine
    progress: Progress
    block: int = BLOCK
    allow_nonfinite: bool = False


def execute(plan: Plan, run: Execution) -> dict[str, str]:
    """Write all tensors of a plan.

    Returns:
        the checksum of every tensor, by `file|name`.

    Raises:
        NonFiniteError: the output has NaN or infinity; all its tensors that do are named.
    """
    slots = {(_file(slot), slot.name): slot for slot in plan.layout.slots}
    with ExitStack() as stack:
        files = OutputFiles(run.folder, plan.layout)
        stack.callback(files.close)
        inputs = Inputs(stack, run.find)
        outputs = [FileOutput(files, slots[job.file, job.name]) for job in plan.jobs]
        works = [
            work_of(job, inputs, output, run.block, weight_of(job, plan.recipe.accumulate))
            for job, output in zip(plan.jobs, outputs, strict=True)
        ]
        names = {id(work): _label(job) for work, job in zip(works, plan.jobs, strict=True)}
        checksums = _still_true(plan, run, files)
        share = {id(work): _amount(job) for work, job in zip(works, plan.jobs, strict=True)}
        nonfinite: dict[str, int] = {}

        def finished(work: Work | Copy, outcome: Outcome) -> None:
            label = names[id(work)]
            checksums[label] = outcome.checksum.digest()
            if outcome.nonfinite:  # not recorded: another run must judge it again
                nonfinite[label] = outcome.nonfinite
            else:
                run.journal.record(run.label + label, checksums[label])

        def report(work: Work | Copy, count: int) -> None:
            whole, part = share[id(work)], count / max(1, math.prod(work.shape))
            run.progress.advance(work.name, Amount(int(whole.nbytes * part), whole.work * part))

        kept = set(checksums)
        run.progress.begin(_sum(plan.jobs), _sum(job for job in plan.jobs if _label(job) in kept))
        run_works(
            works, run.machine, finished=finished, report=report, pending=lambda work: names[id(work)] not in kept
        )
        if nonfinite:
            _judge(nonfinite, {_label(job): job for job in plan.jobs}, inputs, run)
    return checksums


def _judge(nonfinite: Mapping[str, int], jobs: Mapping[str, TensorJob], inputs: Inputs, run: Execution) -> None:
    """Report or refuse tensors with NaN or infinity, and say which inputs have them."""
    count = len(nonfinite)
    shown = [f"{jobs[label].name} ({nonfinite[label]})" for label in sorted(nonfinite)[:_SHOWN]]
    more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
    tensors = f"{count} tensor{'s' if count > 1 else ''}"
    cause = f"NaN or infinity in {tensors} of the result (elements): {', '.join(shown)}{more}"
    if run.allow_nonfinite:
        run.progress.message(cause)
        return
    guilty = dict.fromkeys(
        model for label in sorted(nonfinite)[:_SHOWN] for model in _not_finite(jobs[label], inputs, run.machine)
    )
    if guilty:
        fix = f"They are in the weights of {', '.join(guilty)}; leave that model out"
    else:
        fix = "The inputs are finite: look for too large weights, or a dtype too narrow (float16 ends at 65504)"
    raise NonFiniteError(cause, fix=f"{fix}, or allow it (--allow-nonfinite)")


def _not_finite(job: TensorJob, inputs: Inputs, machine: Machine) -> list[str]:
    """The models whose tensor has NaN or infinity."""
    workspace = machine.workspace()
    found: list[str] = []
    for model, entry in job.inputs:
        source = inputs.source(entry)
        for start in range(0, entry.numel, BLOCK):
            values = source.raw(start, (min(BLOCK, entry.numel - start),), workspace)
            if values.is_floating_point() and not torch.isfinite(values).all():
                found.append(model)
                break
    return found


def _label(job: TensorJob) -> str:
    return f"{job.file}|{job.name}"


def _file(slot: Slot) -> str:
    return slot.file if "/" in slot.file else ""


def _amount(job: TensorJob) -> Amount:
    """A nanosecond of arithmetic takes about as long as a byte that is read and merged."""
    cost = METHODS[job.method].cost if job.action == "merge" else None
    extra = 0.0 if cost is None else cost.nanoseconds(len(job.sources), job.parameters)
    return Amount(job.read_bytes, job.read_bytes + extra)


def _sum(jobs: Iterable[TensorJob]) -> Amount:
    amounts = [_amount(job) for job in jobs]
    return Amount(sum(amount.nbytes for amount in amounts), sum(amount.work for amount in amounts))


def _still_true(plan: Plan, run: Execution, files: OutputFiles) -> dict[str, str]:
    """The tensors that an earlier run finished and whose bytes are still what it wrote."""
    kept: dict[str, str] = {}
    for slot in plan.layout.slots:
        label = f"{_file(slot)}|{slot.name}"
        recorded = run.finished.get(run.label + label)
        if recorded is not None and stored_checksum(files.descriptor(slot.file), slot) == recorded:
            kept[label] = recorded
    return kept


def stored_checksum(descriptor: int, slot: Slot) -> str:
    """The checksum of a tensor as it is on disk."""
    checksum = Checksum(slot.numel, slot.dtype)
    size = ITEM_BYTES[slot.dtype]
    buffer = torch.empty(_CHECK_STEP * size, dtype=torch.uint8)
    view = buffer.numpy().data
    for start in range(0, slot.numel, _CHECK_STEP):
        count = min(_CHECK_STEP, slot.numel - start) * size
        position = 0
        while position < count:
            got = os.preadv(descriptor, [view[position:count]], slot.offset + start * size + position)
            if got == 0:
                return ""
            position += got
        checksum.add_bytes(start * size, buffer[:count].numpy())
    return checksum.digest()
