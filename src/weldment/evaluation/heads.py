"""Which head a model is evaluated with on a task, and which of its outputs stands for which label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weldment.errors import TaskError
from weldment.evaluation.networks import head_of
from weldment.evaluation.states import Head, ModelState, load_state, stored_head
from weldment.evaluation.tasks import Task

if TYPE_CHECKING:
    from numpy import ndarray

Heads = Mapping[str, Head]
"""By the name of the task."""


def choose_head(state: ModelState, task: Task, given: Heads) -> Head:
    """The head for a task: the one that is given for it, the model's of the task's name, else the model's own.

    Raises:
        TaskError: there is none, or it gives another number of outputs than the task has labels.
    """
    head = given.get(task.name) or state.heads.get(task.name)
    if head is None and not state.heads:
        head = head_of(state)
    if head is None or not head.tensors:
        there = f"; it has heads for {', '.join(state.heads)}" if state.heads else ""
        fix = f"Give one: --head {task.name}=FOLDER or FILE"
        raise TaskError(f"has no head for the task {task.name!r}{there}", where=state.name, fix=fix)
    return _with_labels(head, state, task)


def load_head(given: str | Path) -> Head:
    """A head that is stored: in a file of its own, or in the folder of a model that has one.

    Raises:
        TaskError: there is none.
    """
    path = Path(given).expanduser()
    if path.is_file() and path.suffix == ".safetensors" and not (path.parent / "config.json").is_file():
        return stored_head(path)
    head = head_of(load_state(given))
    if not head.tensors:
        raise TaskError("has no head", where=str(given), fix="Give a model with a classifier, or a file of heads/")
    return head


def _with_labels(head: Head, state: ModelState, task: Task) -> Head:
    """The head with a configuration of as many outputs as the task needs."""
    config = dict(head.config or state.config)
    wanted = 1 if task.labels is None else len(task.labels)
    if not head.config:
        names = {str(n): f"LABEL_{n}" for n in range(wanted)}
        return replace(head, config=config | {"id2label": names, "num_labels": wanted})
    have = _outputs(config)
    if have != wanted:
        what = "a regression, which takes 1" if task.labels is None else f"{wanted} labels"
        fix = f"Give the head that was trained on it: --head {task.name}=FOLDER or FILE"
        raise TaskError(f"its head has {have} outputs, and the task {task.name!r} {what}", where=state.name, fix=fix)
    return head


def _outputs(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    return len(names) if names is not None else int(config.get("num_labels") or 2)


def answers(logits: ndarray, task: Task, config: Mapping[str, Any]) -> ndarray:
    """Predictions (n,) from logits (n, C): positions in the task's labels, or the numbers of a regression."""
    if task.labels is None:
        return logits[:, 0].astype(np.float64)
    return label_order(task.labels, config)[logits.argmax(axis=1)]


def label_order(labels: tuple[str, ...], config: Mapping[str, Any]) -> ndarray:
    """For each output of a head, the position of its label; by name where all names are known, else in order."""
    named = {int(place): str(name).casefold() for place, name in (config.get("id2label") or {}).items()}
    positions = {label.casefold(): place for place, label in enumerate(labels)}
    if sorted(named.values()) == sorted(positions):
        return np.array([positions[named[place]] for place in range(len(labels))])
    return np.arange(len(labels))
