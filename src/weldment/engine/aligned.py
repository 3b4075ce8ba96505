"""Tensors put together of rows of several, row by row while they are read: embeddings aligned by token.

Runs of rows that follow each other in one tensor are read at once. Every element is what its row says, wherever a
block begins, and means are taken element by element, so blocks leave no trace.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from weldment.checkpoint.dtypes import torch_dtype
from weldment.checkpoint.model import MEAN, ZERO, RowMap, TensorEntry
from weldment.engine.sources import FileSource, Source
from weldment.engine.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 4
"""Runs of a block that the system is asked for ahead: many short ones cost more calls than they save."""


class Run(NamedTuple):
    """Elements [first, first + length) of a block, that are those of a model from `start` on (or ZERO, or MEAN)."""

    first: int
    length: int
    model: int
    start: int


@dataclass(frozen=True, eq=False)
class AlignedSource:
    """A tensor whose rows come from several tensors.

    Attributes:
        sources: by the number of their model.
        width: elements of a row.
        place: where each row comes from.
        dtype: of the tensor, for `raw`.
    """

    sources: Mapping[int, Source]
    width: int
    place: RowMap
    dtype: str

    def read(self, start: int, out: Tensor, workspace: Workspace) -> None:
        """Read row by row, in runs, and convert."""
        flat = out.view(-1)
        if self._is_plain and all(run.model >= 0 for run in self._runs(start, flat.numel())):
            name = workspace.turn("rows")
            workspace.upload(name, self._gathered(start, tuple(flat.shape), workspace, name), flat)
            return
        for run in self._runs(start, flat.numel()):
            part = flat[run.first : run.first + run.length]
            if run.model == ZERO:
                part.zero_()
            elif run.model == MEAN:
                self._mean(run, part, workspace)
            else:
                self.sources[run.model].read(run.start, part, workspace)

    def raw(self, start: int, shape: tuple[int, ...], workspace: Workspace, name: Any = "read") -> Tensor:
        """The elements in the tensor's own dtype: its bytes where no mean and no other dtype asks for arithmetic."""
        count = math.prod(shape)
        if self._is_plain and all(run.model != MEAN for run in self._runs(start, count)):
            return self._gathered(start, shape, workspace, (name, "rows"))
        numbers = workspace.numbers("aligned", (count,))
        self.read(start, numbers, workspace)
        room = workspace.landing((name, "aligned"), shape, torch_dtype(self.dtype)).numbers
        workspace.download(numbers, room.view(-1))
        return room

    def ask_for(self, start: int, stop: int) -> None:
        """Let the system read ahead what lies together."""
        runs = [run for run in self._runs(start, stop - start) if run.model >= 0]
        for run in runs if len(runs) <= _FEW else ():
            self.sources[run.model].ask_for(run.start, run.start + run.length)

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the bytes of all rows can be read as they are."""
        return all(isinstance(source, FileSource) and source.dtype == self.dtype for source in self.sources.values())

    def _gathered(self, start: int, shape: tuple[int, ...], workspace: Workspace, name: Any) -> Tensor:
        data, numbers = workspace.landing(name, shape, torch_dtype(self.dtype))
        size = numbers.element_size()
        for run in self._runs(start, numbers.numel()):
            room = data[run.first * size : (run.first + run.length) * size]
            source = self.sources.get(run.model)
            if isinstance(source, FileSource):
                source.fill(run.start, room)
            else:
                room[:] = bytes(len(room))
        return numbers

    def _mean(self, run: Run, out: Tensor, workspace: Workspace) -> None:
        row, skipped = divmod(run.start, self.width)
        places = self.place.means[row]
        term = workspace.numbers("mean", (run.length,))
        out.zero_()
        for model, other in places:
            self.sources[model].read(other * self.width + skipped, term, workspace)
            out.add_(term)
        out.div_(len(places))

    def _runs(self, start: int, length: int) -> Iterator[Run]:
        """The elements [start, start + count) of the tensor in runs that follow each other in one source.

        A run of a mean is a part of one row, and starts where it does in the tensor itself.
        """
        width, stop = self.width, start + length
        top, end = start // width, -(-stop // width)
        models, rows = self._models[top:end], self._rows[top:end]
        is_next = (models[1:] == models[:-1]) & (rows[1:] == rows[:-1] + 1) & (models[1:] >= 0)
        firsts = np.concatenate(([0], np.flatnonzero(~is_next) + 1, [end - top])).tolist()
        for one, other in itertools.pairwise(firsts):
            begin, finish = max(start, (top + one) * width), min(stop, (top + other) * width)
            model = int(models[one])
            skipped = begin - (top + one) * width
            place = begin if model < 0 else int(rows[one]) * width + skipped
            yield Run(begin - start, finish - begin, model, place)

    @cached_property
    def _models(self) -> np.ndarray:
        return np.frombuffer(self.place.models, dtype=np.int16)

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.frombuffer(self.place.rows, dtype=np.int32)


def aligned(entry: TensorEntry, find: Callable[[TensorEntry], Source]) -> AlignedSource:
    """A tensor whose rows come from several; `find` opens the tensors that they come from."""
    assert entry.rows is not None
    width = entry.numel // max(1, len(entry.rows.place.rows))
    sources = {number: find(other) for number, (_, other) in entry.rows.sources.items()}
    return AlignedSource(sources, width, entry.rows.place, entry.dtype)
