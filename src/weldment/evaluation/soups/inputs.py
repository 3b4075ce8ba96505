"""What soups are made of, checked before anything is scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weldment.errors import TaskError
from weldment.evaluation.states import short_name
from weldment.evaluation.tasks import AnyTask, LanguageTask, Task, load_tasks
from weldment.merging import open_models, recognised
from weldment.recipe import load_recipes

if TYPE_CHECKING:
    from weldment.checkpoint.model import Checkpoint

ONE_START = "Give models that were fine-tuned from one start on the same task, with heads of the same shape"


def checked_models(references: Sequence[str]) -> list[str]:
    """The models of a soup.

    Raises:
        TaskError: there are fewer than two, one is there twice, or their tensors or labels do not go together.
        CheckpointError: one cannot be opened.
    """
    if len(references) < 2:
        raise TaskError(f"a soup takes at least two models, not {len(references)}", fix="Give MODEL MODEL...")
    _refuse_doubles(references)
    recipes, adapters = recognised(load_recipes({"merge_method": "linear", "models": list(references)}))
    if adapters:
        raise TaskError("is an adapter without its base", where=references[0], fix="Give models as BASE+ADAPTER")
    opened = open_models(recipes)
    first, *others = references
    for other in others:
        _refuse_shapes(opened[first], opened[other])
        _refuse_order(opened[first], opened[other])
    return list(references)


def _refuse_doubles(references: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for reference in references:
        parts = [Path(part).expanduser() for part in reference.split("+")]
        place = "+".join(str(part.resolve()) if part.exists() else str(part) for part in parts)
        if place in seen:
            again = reference if reference == seen[place] else f"{seen[place]} and {reference}"
            raise TaskError("the same model is there twice", where=again, fix="Give each model once")
        seen[place] = reference


def _refuse_shapes(first: Checkpoint, other: Checkpoint) -> None:
    differing = [
        name
        for name, entry in first.tensors.items()
        if name in other.tensors and other.tensors[name].shape != entry.shape
    ]
    if differing:
        name, more = differing[0], f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        have, wanted = list(other.tensors[name].shape), list(first.tensors[name].shape)
        cause = f"tensors of another shape than in {first.reference}: {name!r}{more}, {have} and {wanted}"
        raise TaskError(cause, where=other.reference, fix=ONE_START)


def _refuse_order(first: Checkpoint, other: Checkpoint) -> None:
    ours, theirs = _labels(first.config), _labels(other.config)
    if ours != theirs and sorted(ours) == sorted(theirs):
        cause = f"labels in another order than in {first.reference}: {', '.join(theirs)} and {', '.join(ours)}"
        fix = "Bring the rows of its head, and `id2label`, into the same order: heads are averaged too"
        raise TaskError(cause, where=other.reference, fix=fix)


def _labels(config: Mapping[str, object]) -> list[str]:
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return []
    return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]


def checked_tasks(tasks: Iterable[str | Path | AnyTask]) -> list[Task]:
    """The tasks of a soup, whose validation and test splits can be read.

    Raises:
        TaskError: one has no validation split, or examples are not as they must be.
    """
    loaded = load_tasks(tasks)
    for task in loaded:
        if isinstance(task, LanguageTask) or "validation" not in task.files:
            fix = "Soups are chosen by one: add validation.jsonl to the task's folder"
            raise TaskError("has no validation split", where=task.name, fix=fix)
        for split in {"validation", "test"} & set(task.files):
            task.split(split)
    return [task for task in loaded if isinstance(task, Task)]


def names_of(references: Sequence[str]) -> dict[str, str]:
    """What each model is called: the last part of its path, or all of it where others end so too."""
    short = {reference: "+".join(map(short_name, reference.split("+"))) for reference in references}
    count = Counter(short.values())
    return {reference: name if count[name] == 1 else reference for reference, name in short.items()}
