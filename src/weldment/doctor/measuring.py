"""Numbers of tensors as several models have them, from one pass over what is read of them.

Of a tensor with values theta_0 .. theta_k in its models, the Gram matrix of theta_0 and of the
differences D_i = theta_i - theta_0 is summed up. All norms, distances and cosines of weights and of changes,
from whichever model these are counted, follow from it, and none suffers from the subtraction of two large numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.checkpoint.model import TensorEntry, WeightFile
from weldment.doctor.groups import Group, group_of
from weldment.doctor.sampling import Run, blocks
from weldment.engine.blocks import BLOCK, SPAN_BLOCKS
from weldment.engine.pools import can_fork, process_pool, thread_pool
from weldment.engine.progress import Amount, Progress
from weldment.engine.scheduler import Scheduler, Stages
from weldment.engine.sources import Source, read_all
from weldment.engine.works import Inputs
from weldment.engine.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path

    from numpy import ndarray
    from torch import Tensor

_MANY = 1 << 29
"""Bytes from which on processes are worth their start; threads wait for Python's lock."""


@dataclass(frozen=True)
class Joint:
    """One tensor, as several models have it.

    Attributes:
        entries: by the number of the model, that which the others are compared with first.
        numel: elements that are compared, from the beginning: fewer than some have where rows were added.
    """

    name: str
    entries: Mapping[int, TensorEntry]
    numel: int

    @property
    def group(self) -> Group:
        return group_of(self.name)

    def read_bytes(self, count: int) -> int:
        """Bytes of so many elements in all models."""
        return sum(count * ITEM_BYTES[entry.dtype] for entry in self.entries.values())

    @property
    def is_matrix(self) -> bool:
        return len(next(iter(self.entries.values())).shape) >= 2


@dataclass(frozen=True)
class Numbers:
    """What one tensor is in its models, scaled up from what was read to the whole tensor.

    Attributes:
        members: the models, by their numbers, k + 1 of them.
        read: elements that were read in each of them.
        gram: of theta_0, D_1 .. D_k: (k + 1, k + 1).
        signs: of each pair of D_1 .. D_k: on how many elements their signs agree, minus on how many they differ.
        both: on how many elements neither of the two is zero; on the diagonal, how many elements differ from theta_0.
        peaks: the largest absolute value in each model.
        nonfinite: NaN and infinities in what was read of each model; they count as zero elsewhere.
    """

    joint: Joint
    members: tuple[int, ...]
    read: int
    gram: ndarray
    signs: ndarray
    both: ndarray
    peaks: ndarray
    nonfinite: ndarray

    def weights(self) -> ndarray:
        """<theta_i, theta_j> of its members: (k + 1, k + 1)."""
        places = np.eye(len(self.members))
        places[:, 0] = 1.0
        return places @ self.gram @ places.T

    def changes(self, base: int) -> ndarray:
        """<theta_i - theta_base, theta_j - theta_base> of its members: (k + 1, k + 1)."""
        places = np.eye(len(self.members))
        places[0, 0] = 0.0
        places = places - places[self.members.index(base)]
        return places @ self.gram @ places.T


@dataclass(frozen=True)
class _Part:
    """Sums over a part of the tensor with the number `place`; see `Numbers`."""

    gram: ndarray
    signs: ndarray
    both: ndarray
    peaks: ndarray
    nonfinite: ndarray
    read: int
    place: int

    def __add__(self, other: _Part) -> _Part:
        return _Part(
            self.gram + other.gram,
            self.signs + other.signs,
            self.both + other.both,
            np.maximum(self.peaks, other.peaks),
            self.nonfinite + other.nonfinite,
            self.read + other.read,
            self.place,
        )


@dataclass(frozen=True)
class _Worker:
    sources: Sequence[Sequence[Source]]
    workspace: Workspace


def measure(joints: Sequence[Joint], runs: Sequence[Sequence[Run]], threads: int, progress: Progress) -> list[Numbers]:
    """The numbers of each tensor.

    Args:
        joints: whose files lie on this machine.
        runs: what is read of each.
        threads: workers.
        progress: told of what is read.

    Raises:
        CheckpointError: a file is shorter than its header says.
    """
    before = torch.get_num_threads()
    found: dict[int, Numbers] = {}
    total = sum(joint.read_bytes(_length(spans)) for joint, spans in zip(joints, runs, strict=True))
    progress.begin(Amount.of(total), Amount.of(0))

    def done(part: _Part) -> None:
        joint = joints[part.place]
        progress.advance(joint.name, Amount.of(joint.read_bytes(part.read)))

    try:
        with ExitStack() as stack:
            inputs = Inputs(stack, path_of)
            sources = [[inputs.source(entry) for entry in joint.entries.values()] for joint in joints]
            start = process_pool if threads > 1 and total > _MANY and can_fork() else thread_pool
            pool = stack.enter_context(start(threads, partial(_worker, sources)))
            jobs = (_measured(joint, place, runs[place], found) for place, joint in enumerate(joints))
            Scheduler(pool, done).run(jobs)
    finally:
        torch.set_num_threads(before)
    return [found[place] for place in sorted(found)]


def _length(runs: Sequence[Run]) -> int:
    return sum(stop - start for start, stop in runs)


def path_of(file: WeightFile) -> Path:
    """Where a file lies that is on this machine."""
    assert file.path is not None
    return file.path


def _worker(sources: Sequence[Sequence[Source]]) -> _Worker:
    torch.set_num_threads(1)
    return _Worker(sources, Workspace(torch.device("cpu"), torch.float32))


def _measured(joint: Joint, place: int, runs: Sequence[Run], into: dict[int, Numbers]) -> Stages:
    """Reads one tensor in parts and adds them up in their order."""
    pieces = list(blocks(runs, BLOCK))
    groups = [pieces[start : start + SPAN_BLOCKS] for start in range(0, len(pieces), SPAN_BLOCKS)]
    parts: list[_Part] = yield [partial(_part, place, group) for group in groups]
    if parts:
        into[place] = _numbers(joint, _sum(parts))


def _sum(parts: Sequence[_Part]) -> _Part:
    first, *others = parts
    for other in others:
        first = first + other
    return first


def _numbers(joint: Joint, part: _Part) -> Numbers:
    scale = joint.numel / part.read
    return Numbers(
        joint,
        tuple(joint.entries),
        part.read,
        part.gram * scale,
        part.signs * scale,
        part.both * scale,
        part.peaks,
        part.nonfinite,
    )


def _part(place: int, pieces: Sequence[Sequence[Run]], worker: _Worker) -> _Part:
    sources = worker.sources[place]
    return _sum([_block(place, _read(sources, piece, worker.workspace)) for piece in pieces])


def _read(sources: Sequence[Source], runs: Sequence[Run], workspace: Workspace) -> Tensor:
    """(k + 1, n): the elements of the runs, one after the other."""
    values = workspace.numbers("values", (len(sources), _length(runs)))
    place = 0
    for start, stop in runs:
        read_all(sources, start, values[:, place : place + stop - start], workspace)
        place += stop - start
    return values


def _block(place: int, values: Tensor) -> _Part:
    """The sums of one block of values, which are overwritten."""
    peaks = torch.linalg.vector_norm(values, torch.inf, dim=1)
    nonfinite = np.zeros(len(values), dtype=np.int64)
    if not torch.isfinite(peaks).all():
        nonfinite = torch.isfinite(values).logical_not_().sum(dim=1).numpy()
        values.nan_to_num_(0.0, 0.0, 0.0)
        peaks = torch.linalg.vector_norm(values, torch.inf, dim=1)
    differences = values[1:].sub_(values[0])
    gram = _products(values)
    signs = differences.sign_()
    agreement = _products(signs)
    both = _products(signs.abs_())
    return _Part(gram, agreement, both, peaks.double().numpy(), nonfinite, values.shape[1], place)


def _products(rows: Tensor) -> ndarray:
    return torch.mm(rows, rows.T).double().numpy()
