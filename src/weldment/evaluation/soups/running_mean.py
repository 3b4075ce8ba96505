"""The mean of models that are added one at a time: each costs one pass over its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from weldment.checkpoint.dtypes import torch_dtype
from weldment.evaluation.states import ModelState, tokenizer_folder

if TYPE_CHECKING:
    from torch import Tensor

    from weldment.evaluation.states import Tensors, tokenizer_folder
    from weldment.planning.plan import Plan, TensorJob


class RunningMean:
    """Sums of models that were added, from which the mean with one more follows without the others.

    The arithmetic is that of `linear`: sums in float32 and in order, scaled once, rounded once. So the
    mean is, bit for bit, what a merge of the same models in the same order writes.

    Args:
        planned: a `linear` merge of all models that may be added, the first of them before the others.
        first: the model to begin with.
        tensors: its own.
    """

    def __init__(self, planned: Plan, first: str, tensors: Tensors) -> None:
        self._planned = planned
        self._jobs = {job.name: job for job in planned.jobs}
        self._members = [first]
        self._sums = {job.name: _beginning(job, tensors[_name_in(job, first)]) for job in planned.jobs}

    @property
    def members(self) -> Sequence[str]:
        """The models that were added."""
        return tuple(self._members)

    def add(self, model: str, tensors: Tensors) -> None:
        """Add a model."""
        for name, job in self._jobs.items():
            if job.action == "merge":
                self._sums[name].add_(tensors[_name_in(job, model)])
        self._members.append(model)

    def with_(self, model: str, tensors: Tensors) -> ModelState:
        """The mean with one more model; its tensors are made when they are asked for, and not kept."""
        count = len(self._members) + 1
        mean = _MeanWith(self._jobs, self._sums, count, model, tensors)
        return ModelState(f"mean of {count}", mean, self._planned.config, tokenizer_folder(self._planned))


class _MeanWith(Mapping[str, "Tensor"]):
    def __init__(self, jobs: Mapping[str, TensorJob], sums: Tensors, count: int, model: str, tensors: Tensors) -> None:
        self._jobs = jobs
        self._sums = sums
        self._count = count
        self._model = model
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        job = self._jobs[name]
        if job.action != "merge":
            return self._sums[name]
        mean = torch.add(self._sums[name], self._tensors[_name_in(job, self._model)]).mul_(1.0 / self._count)
        return mean.to(torch_dtype(job.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)


def _beginning(job: TensorJob, tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True) if job.action == "merge" else tensor.clone()


def _name_in(job: TensorJob, model: str) -> str:
    """What a model calls a tensor."""
    return next(entry.name for reference, entry in job.inputs if reference == model)
