"""How much memory a merge needs, and how to fit it into a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.engine.blocks import BLOCK, Grid
from weldment.engine.pools import can_fork
from weldment.engine.run import Machine, default_threads
from weldment.engine.sources import PIECE
from weldment.engine.workspace import KEPT_BYTES
from weldment.errors import UserError
from weldment.methods import METHODS
from weldment.methods.block import CHUNK
from weldment.methods.spectral.costs import boosting_numbers
from weldment.planning.plan import Plan, TensorJob

PROCESS_BYTES = 280_000_000
"""What Python, torch and the plan take before the first block (measured; see benchmarks/README.md)."""

DEVICE_BLOCK = 1 << 22
"""Elements of a block on a device other than the processor: enough to hide the start of its operations."""

WORKER_BYTES = 40_000_000
"""What a worker process takes besides its blocks: pages of the first process that it changed."""

FORK_ELEMENTS = 1 << 26
"""Merges of as many elements are worth starting processes for."""

FEW = 8
"""Models whose blocks of the largest size a worker may hold by default."""

STACKS = 3
"""Stacks of the experts' largest matrix that a worker may hold by default."""

SCRATCH = 8
"""Blocks of scratch a kernel takes, temporary results included."""


def block_elements(job: TensorJob, block: int) -> int:
    """Elements of the largest block of a job."""
    numel = math.prod(job.shape)
    if job.action != "merge":
        return min(block, numel)
    if is_whole(job):
        return numel
    grid = Grid(job.shape, METHODS[job.method].unit_for(job.parameters), block)
    if grid.unit == "element":
        return min(block, numel)
    return min(max(block, grid.columns), numel)


def is_whole(job: TensorJob) -> bool:
    """Whether a job merges its tensor in one block, whatever the size of blocks."""
    if job.action != "merge":
        return False
    boosted = job.finish is not None and job.finish.is_whole
    return boosted or METHODS[job.method].unit_for(job.parameters) == "matrix"


def job_bytes(job: TensorJob, block: int, accumulate: str) -> int:
    """Memory of one worker while it works on a job."""
    elements = block_elements(job, block)
    width = 8 if accumulate == "float64" else 4
    item = sum(ITEM_BYTES[entry.dtype] for entry in job.sources) + ITEM_BYTES[job.dtype]
    raw = min(elements, PIECE) * item
    factors = KEPT_BYTES if any(entry.is_adapted for _, entry in job.inputs) else 0
    models = len(job.sources) + (job.base is not None)
    method = METHODS[job.method] if job.action == "merge" else None
    if method is not None and method.cost is not None and is_whole(job):
        numbers = (models + 1) * elements + method.cost.numbers(len(job.sources), job.parameters)
        return max(numbers, _boosting(job, models)) * width + raw + factors
    doubles = 2 * (models + SCRATCH) * 8 if method is not None and method.float64 else 0
    kernel = elements * ((models + SCRATCH) * width + doubles)
    return max(kernel, _boosting(job, models) * width) + raw + factors


def _boosting(job: TensorJob, models: int) -> int:
    """Numbers that are held while a tensor's singular values are raised."""
    if job.finish is None or job.finish.form is None or job.finish.boost is None:
        return 0
    return models * math.prod(job.shape) + boosting_numbers(job.finish.form)


def stacked_bytes(job: TensorJob, accumulate: str) -> int:
    """What the experts' elements of a job that merges its tensor in one block take, in the accumulation dtype."""
    return len(job.sources) * math.prod(job.shape) * (8 if accumulate == "float64" else 4)


def weight_of(job: TensorJob, accumulate: str) -> int:
    """What a worker holds for a job that merges its tensor in one block; 0 for others."""
    return job_bytes(job, 0, accumulate) if is_whole(job) else 0


@dataclass(frozen=True)
class _Weights:
    """What the jobs of a plan, and of its stages, hold in memory.

    Attributes:
        blocks: the most that one that works block by block does.
        whole: the most that one does that needs a whole tensor.
        stacked: the largest stack of the experts' elements of such a tensor.
    """

    blocks: int
    whole: int
    stacked: int

    @classmethod
    def of(cls, plan: Plan, block: int) -> _Weights:
        jobs = [(job, p.recipe.accumulate) for p in (*plan.stages, plan) for job in p.jobs]
        return cls(
            max((job_bytes(job, block, kind) for job, kind in jobs if not is_whole(job)), default=0),
            max((weight_of(job, kind) for job, kind in jobs), default=0),
            max((stacked_bytes(job, kind) for job, kind in jobs if is_whole(job)), default=0),
        )

    def budget(self, threads: int) -> int:
        """What jobs that need whole tensors may hold together: three stacks a worker, and room for the largest."""
        return max(self.whole, STACKS * threads * self.stacked - PROCESS_BYTES)

    def working(self, threads: int) -> int:
        """The most that all workers hold."""
        held = min(threads * self.whole, self.budget(threads))
        return max(threads * self.blocks, held + (threads - 1) * self.blocks if held else 0)


def peak_bytes(plan: Plan, threads: int, block: int = BLOCK) -> int:
    """Forecast of the peak resident memory of a merge."""
    return _fixed_bytes(plan, threads) + _Weights.of(plan, block).working(threads)


def _fixed_bytes(plan: Plan, threads: int) -> int:
    records = 6000 * sum(len(p.jobs) + len(p.ledger) for p in (*plan.stages, plan))
    return PROCESS_BYTES + (threads - 1) * WORKER_BYTES + records


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
        block = _default_block(plan, _block_sizes(chosen))
        return _machine(plan, chosen, wanted, _Weights.of(plan, block).budget(wanted)), block
    sizes = [(block, _Weights.of(plan, block)) for block in _block_sizes(chosen)]
    for count in range(wanted, 0, -1):
        room = max_memory - _fixed_bytes(plan, count)
        for block, weights in sizes:
            budget = room - (count - 1) * weights.blocks
            if weights.whole <= budget and count * weights.blocks <= room:
                return _machine(plan, chosen, count, budget), block
    least = _fixed_bytes(plan, 1) + _Weights.of(plan, CHUNK).working(1)
    raise UserError(
        f"this merge cannot work in {max_memory / 1e6:.1f} MB of memory",
        where="--max-memory",
        fix=f"The least it needs is {math.ceil(least / 1e6)} MB",
    )


def _machine(plan: Plan, device: str, threads: int, budget: int) -> Machine:
    """Large merges on several processors get processes, which take a moment to start."""
    elements = sum(math.prod(job.shape) for part in (*plan.stages, plan) for job in part.jobs)
    return Machine(
        device, threads, processes=device == "cpu" and elements >= FORK_ELEMENTS and can_fork(), budget=budget
    )


def _refuse_float64(plan: Plan) -> None:
    for job in (job for part in (*plan.stages, plan) for job in part.jobs if job.action == "merge"):
        if METHODS[job.method].needs_float64(job.parameters) or (job.finish is not None and job.finish.is_whole):
            raise UserError(f"{job.method} needs float64, which mps devices lack", fix="Use --device cpu")


def _default_block(plan: Plan, sizes: list[int]) -> int:
    """Merges of many models work on smaller blocks, so that they hold no more than those of a few."""
    models = max((len(job.inputs) for part in (*plan.stages, plan) for job in part.jobs), default=1)
    return next((block for block in sizes if models * block <= FEW * sizes[0]), sizes[-1])


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
