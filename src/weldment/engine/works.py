"""From the jobs of a plan to what the engine runs: the inputs opened, the outputs given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import TensorEntry, WeightFile
from weldment.engine.adapted import adapted
from weldment.engine.aligned import aligned
from weldment.engine.copying import Copy
from weldment.engine.outputs import Output
from weldment.engine.sources import FileSource, MemorySource, Source
from weldment.engine.work import Work
from weldment.errors import CheckpointError
from weldment.methods import METHODS
from weldment.planning.plan import TensorJob

if TYPE_CHECKING:
    from torch import Tensor


class Inputs:
    """Open input files.

    Args:
        stack: closes them.
        find: the path of an input file.
        made: tensors that are in memory and in no file, by their file's name and their own.
    """

    def __init__(
        self, stack: ExitStack, find: Callable[[WeightFile], Path], made: Mapping[tuple[str, str], Tensor] | None = None
    ) -> None:
        self._stack = stack
        self._find = find
        self._made = made or {}
        self._open: dict[Path, int] = {}

    def source(self, entry: TensorEntry) -> Source:
        """A tensor, with what adapters change of it, and with its rows from where they come from."""
        if entry.rows is not None:
            return aligned(entry, self.source)
        if (made := self._made.get((entry.file.name, entry.name))) is not None:
            return MemorySource(made.view(-1))
        stored = self.file(entry)
        return adapted(stored, entry, self.file) if entry.changes else stored

    def file(self, entry: TensorEntry) -> FileSource:
        """A tensor as it is stored."""
        path = self._find(entry.file)
        if path not in self._open:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
            self._stack.callback(os.close, descriptor)
            self._open[path] = descriptor
        return FileSource(self._open[path], path, entry.name, entry.dtype, entry.offset)


def work_of(job: TensorJob, inputs: Inputs, output: Output, block: int, weight: int) -> Work | Copy:
    """What the engine does for one tensor of a plan.

    Args:
        block: elements of a block.
        weight: bytes that it holds in memory, where that is much.
    """
    sources = [inputs.source(entry) for entry in job.sources]
    same = all(entry.dtype == job.dtype and not entry.is_adapted for entry in job.sources)
    if job.action != "merge" and (same or not is_float(job.dtype)):
        return Copy(job.name, job.shape, sources, job.dtype, output)
    copied = job.action != "merge"
    return Work(
        name=job.name,
        shape=job.shape,
        method=METHODS["passthrough" if copied else job.method],
        parameters={"scale": (1.0,)} if copied else job.parameters,
        sources=sources,
        base=inputs.source(job.base) if job.base else None,
        dtype=job.dtype,
        output=output,
        keys=job.keys,
        block=block,
        finish=job.finish,
        weight=weight,
    )
