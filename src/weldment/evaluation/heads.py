"""Which head a model is evaluated with on a task, and which of its outputs stands for which label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weldment.errors import TaskError
from weldment.evaluation.networks import head_of, outputs_of, with_head, with_outputs
from weldment.evaluation.states import Head, ModelState, load_state, stored_head
from weldment.evaluation.tasks import Task
from weldment.evaluation.tokenizers import refuse_different

if TYPE_CHECKING:
    from numpy import ndarray

Heads = Mapping[str, Head]
"""By the name of the task."""


def choose_head(state: ModelState, task: Task, given: Heads) -> Head:
    """The head for a task: the one that is given for it, the model's of the task's name, else the model's own.

    Returns:
        the head, with the configuration of the model with that head.

    Raises:
        TaskError: there is none, it gives another number of outputs than the task has labels, or it comes from
            a model of another kind or with another tokenizer.
    """
    head = given.get(task.name) or state.heads.get(task.name)
    if head is None and not state.heads:
        head = head_of(state)
    if head is None or not head.tensors:
        there = f"; it has heads for {', '.join(state.heads)}" if state.heads else ""
        fix = f"Give one: --head {task.name}=FOLDER or FILE"
        raise TaskError(f"has no head for the task {task.name!r}{there}", where=state.name, fix=fix)
    _refuse_other_kind(head, state, task)
    _refuse_other_tokens(head, state, task)
    return _with_labels(head, state, task)


def load_head(given: str | Path) -> Head:
    """A head that is stored: in a file of its own, or in the folder of a model that has one.

    Raises:
        TaskError: there is none.
    """
    path = Path(given).expanduser()
    is_file = path.is_file() and path.suffix == ".safetensors"
    if is_file and not (path.parent / "config.json").is_file():
        return stored_head(path)
    head = head_of(_of_file(path) if is_file else load_state(given))
    if not head.tensors:
        raise TaskError("has no head", where=str(given), fix="Give a model with a classifier, or a file of heads/")
    return head


def load_heads(given: Mapping[str, str | Path] | None) -> dict[str, Head]:
    """Heads that are stored, by the names of their tasks.

    Raises:
        TaskError: one is not there.
    """
    return {task: load_head(place) for task, place in (given or {}).items()}


def _of_file(path: Path) -> ModelState:
    """A file of a model in its folder."""
    stored = stored_head(path)
    return ModelState(str(path), stored.tensors, stored.config, path.parent)


def _refuse_other_kind(head: Head, state: ModelState, task: Task) -> None:
    own, other = state.config.get("model_type"), head.config.get("model_type")
    if other is not None and own is not None and own != other:
        cause = f"the head for {task.name!r} is that of a model of the type {other!r}, and this is one of {own!r}"
        raise TaskError(cause, where=state.name, fix="Give the head of a model that was fine-tuned from the same base")


def _refuse_other_tokens(head: Head, state: ModelState, task: Task) -> None:
    from weldment.evaluation.predicting import tokenizer_digest

    if head.folder is None or state.folder is None or head.folder == state.folder:
        return
    digests = tokenizer_digest(head.folder), tokenizer_digest(state.folder)
    difference = _difference(head.folder, state.folder, *digests) if digests[0] != digests[1] else None
    if difference is not None:
        cause = f"the head for {task.name!r} comes from a model that {difference}"
        raise TaskError(cause, where=state.name, fix="Give a head that was trained with this model's tokenizer")


@lru_cache(maxsize=256)
def _difference(own: Path, other: Path, *digests: str) -> str | None:
    """How the tokenizers in two folders, which hold what the digests say, differ in more than how they are written."""
    try:
        refuse_different({"this one": other, "the head's": own})
    except TaskError as error:
        return error.cause
    return None


def _with_labels(head: Head, state: ModelState, task: Task) -> Head:
    """The head with the configuration of the whole model, with as many labels as the head has outputs.

    Raises:
        TaskError: the task has another number of labels.
    """
    config = with_head(state.config, head.config)
    wanted = 1 if task.labels is None else len(task.labels)
    have = outputs_of(head, config, state.name) or wanted
    if have != wanted:
        what = "is a regression, which takes 1" if task.labels is None else f"has {wanted} labels"
        fix = f"Give the head that was trained on it: --head {task.name}=FOLDER or FILE"
        cause = f"its head has {have} output{'s' if have > 1 else ''}, and the task {task.name!r} {what}"
        raise TaskError(cause, where=state.name, fix=fix)
    is_named = len(config.get("id2label") or ()) == have
    return replace(head, config=config if is_named else with_outputs(config, have))


def answers(logits: ndarray, task: Task, config: Mapping[str, Any]) -> ndarray:
    """Predictions (n,) from logits (n, C): positions in the task's labels, or the numbers of a regression."""
    if task.labels is None:
        return logits[:, 0].astype(np.float64)
    return label_order(task.labels, config)[logits.argmax(axis=1)]


def label_order(labels: tuple[str, ...], config: Mapping[str, Any]) -> ndarray:
    """For each output of a head, the position of its label; by name where all names are known, else in order."""
    named = {int(place): str(name).casefold() for place, name in (config.get("id2label") or {}).items()}
    positions = {label.casefold(): place for place, label in enumerate(labels)}
    if sorted(named.values()) == sorted(positions) and sorted(named) == list(range(len(labels))):
        return np.array([positions[named[place]] for place in range(len(labels))])
    return np.arange(len(labels))
