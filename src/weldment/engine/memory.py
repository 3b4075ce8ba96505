"""How much memory a merge needs, and how to fit it into a limit."""

from __future__ import annotations

import math

import torch

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.engine.blocks import BLOCK, Grid
from weldment.engine.pools import can_fork
from weldment.engine.run import Machine, default_threads
from weldment.engine.workspace import KEPT_BYTES
from weldment.errors import UserError
from weldment.methods import METHODS
from weldment.methods.block import CHUNK
from weldment.planning.plan import Plan, TensorJob

PROCESS_BYTES = 280_000_000
"""What Python, torch and the plan take before the first block (measured; see benchmarks/README.md)."""

DEVICE_BLOCK = 1 << 22
"""Elements of a block on a device other than the processor: enough to hide the start of its operations."""

WORKER_BYTES = 40_000_000
"""What a worker process takes besides its blocks: pages of the first process that it changed."""

FORK_ELEMENTS = 1 << 26
"""Merges of as many elements are worth starting processes for."""

SCRATCH = 8
"""Blocks of scratch a kernel takes, temporary results included."""


def block_elements(job: TensorJob, block: int) -> int:
    """Elements of the largest block of a job."""
    numel = math.prod(job.shape)
    if job.action != "merge":
        return min(block, numel)
    grid = Grid(job.shape, METHODS[job.method].unit_for(job.parameters), block)
    if grid.unit == "element":
        return min(block, numel)
    if grid.unit == "matrix":
        return numel
    return min(max(block, grid.columns), numel)


def job_bytes(job: TensorJob, block: int, accumulate: str) -> int:
    """Memory of one thread that works on a job."""
    elements = block_elements(job, block)
    width = 8 if accumulate == "float64" else 4
    buffers = len(job.sources) + (job.base is not None) + SCRATCH
    raw = sum(ITEM_BYTES[entry.dtype] for entry in job.sources) + ITEM_BYTES[job.dtype]
    doubles = 2 * buffers * 8 if job.method and METHODS[job.method].float64 else 0
    factors = KEPT_BYTES if any(entry.changes for _, entry in job.inputs) else 0
    return elements * (buffers * width + doubles + raw) + factors


def peak_bytes(plan: Plan, threads: int, block: int = BLOCK) -> int:
    """Forecast of the peak resident memory of a merge."""
    plans = (*plan.stages, plan)
    working = max((job_bytes(job, block, p.recipe.accumulate) for p in plans for job in p.jobs), default=0)
    records = 6000 * sum(len(p.jobs) + len(p.ledger) for p in plans)
    return PROCESS_BYTES + threads * working + (threads - 1) * WORKER_BYTES + records


def fit(plan: Plan, device: str, threads: int | None, max_memory: int | None) -> tuple[Machine, int]:
    """The machine and block size to run a plan with.

    A limit on memory first makes the blocks smaller, then the threads fewer.

    Raises:
        UserError: an impossible device, number of threads or limit; says the least that works.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads must be at least 1, not {threads}")
    chosen = pick_device(device)
    if chosen.startswith("mps"):
        _refuse_float64(plan)
    wanted = threads or default_threads()
    if max_memory is None:
        return _machine(plan, chosen, wanted), _block_sizes(chosen)[0]
    for count in range(wanted, 0, -1):
        for block in _block_sizes(chosen):
            if peak_bytes(plan, count, block) <= max_memory:
                return _machine(plan, chosen, count), block
    least = peak_bytes(plan, 1, CHUNK)
    raise UserError(
        f"this merge cannot work in {max_memory / 1e6:.1f} MB of memory",
        where="--max-memory",
        fix=f"The least it needs is {math.ceil(least / 1e6)} MB",
    )


def _machine(plan: Plan, device: str, threads: int) -> Machine:
    """Large merges on several processors get processes, which take a moment to start."""
    elements = sum(math.prod(job.shape) for part in (*plan.stages, plan) for job in part.jobs)
    return Machine(device, threads, processes=device == "cpu" and elements >= FORK_ELEMENTS and can_fork())


def _refuse_float64(plan: Plan) -> None:
    for job in (job for part in (*plan.stages, plan) for job in part.jobs if job.action == "merge"):
        if METHODS[job.method].needs_float64(job.parameters):
            raise UserError(f"{job.method} needs float64, which mps devices lack", fix="Use --device cpu")


def _block_sizes(device: str) -> list[int]:
    sizes = [BLOCK if device == "cpu" else DEVICE_BLOCK]
    while sizes[-1] > CHUNK:
        sizes.append(sizes[-1] // 2)
    return sizes


def pick_device(device: str) -> str:
    """The device to use: `auto` prefers CUDA, then the CPU.

    Raises:
        UserError: the device is unknown or not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    kind = device.partition(":")[0]
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind not in there:
        raise UserError(f"unknown device {device!r}", where="--device", fix="Use cpu, cuda, mps or auto")
    if not there[kind]():
        raise UserError(f"there is no {kind} device on this machine", where="--device", fix="Use --device cpu")
    return device
