"""The least that two passes over four models take: the bare arithmetic of `model_stock`, without writing anything.

    python benchmarks/two_passes.py MODEL MODEL MODEL BASE

Model Stock needs the angles between whole task vectors before it can merge an element. Each of two processes takes
every second block of the files. The first pass reads the four models (from the page cache), converts, subtracts and
sums the inner products in float64; the second reads, converts, subtracts, averages, scales, adds and rounds. There is
no plan, no check, no checksum, no output, and the import of torch is not counted; the operations and the blocks are
those of weldment. Prints the seconds of both passes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

BLOCK, CHUNK = 1 << 18, 1 << 16


class Buffers:
    """What a worker uses again for every block of T models and their base."""

    def __init__(self, models: int) -> None:
        self.raw = torch.empty(models + 1, BLOCK, dtype=torch.bfloat16)
        self.room = [row.view(torch.uint8).numpy().data for row in self.raw]
        self.stack = torch.empty(models, BLOCK)
        self.base = torch.empty(BLOCK)
        self.wide = torch.empty(models, CHUNK, dtype=torch.float64)
        self.rounded = torch.empty(BLOCK, dtype=torch.bfloat16)


def load(descriptors: list[int], start: int, buffers: Buffers) -> None:
    """Read a block of every model and take the task vectors."""
    for descriptor, room in zip(descriptors, buffers.room, strict=True):
        os.preadv(descriptor, [room], start)
    buffers.stack.copy_(buffers.raw[:-1])
    buffers.base.copy_(buffers.raw[-1])
    buffers.stack.sub_(buffers.base)


def products(buffers: Buffers) -> list[Tensor]:
    """Inner products of all pairs of task vectors."""
    found: list[Tensor] = []
    for start in range(0, BLOCK, CHUNK):
        buffers.wide.copy_(buffers.stack[:, start : start + CHUNK])
        rows = list(buffers.wide)
        found += [torch.dot(rows[i], rows[j]) for i in range(len(rows)) for j in range(i + 1)]
    return found


def merge(buffers: Buffers) -> None:
    """A scaled mean of the task vectors on the base, rounded."""
    first, *others = buffers.stack
    for other in others:
        first.add_(other)
    buffers.rounded.copy_(first.mul_(0.2).add_(buffers.base))


def passes(groups: list[list[Path]], part: int, parts: int) -> None:
    """Both passes over a share of the blocks."""
    torch.set_num_threads(1)
    buffers = Buffers(len(groups[0]) - 1)
    for paths in groups:
        descriptors = [os.open(path, os.O_RDONLY) for path in paths]
        places = range(0, paths[0].stat().st_size - 2 * BLOCK, 2 * BLOCK)
        for do in (products, merge):
            for place in places[part::parts]:
                load(descriptors, place, buffers)
                do(buffers)
        for descriptor in descriptors:
            os.close(descriptor)


def main() -> None:
    groups = [
        list(paths) for paths in zip(*(sorted(Path(name).glob("*.safetensors")) for name in sys.argv[1:]), strict=True)
    ]
    parts = 2
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=passes, args=(groups, part, parts)) for part in range(parts)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"{time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
