"""What a task is, from the `task.json` of its folder, or from its examples where there is only a file of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weldment.errors import TaskError
from weldment.evaluation.metrics import check_metric
from weldment.evaluation.records import SUFFIXES, is_csv, number, read_records
from weldment.evaluation.tasks import SPLITS, USUAL, HubSplit, Task, field_of
from weldment.recipe.words import suggestion

SHAPE = 'It says at least {"labels": ["negative", "positive"], "metric": "accuracy"}; `labels` is null for regression'

WORDS = ("name", "dataset", "config")
KEYS = (*WORDS, "labels", "metric", "sizes", "columns", "max_length", "splits")


def task_in_folder(folder: Path) -> Task:
    """The task that a folder with a `task.json` describes.

    Raises:
        TaskError: the description is wrong, or there are no examples.
    """
    place = folder / "task.json"
    content = read_description(place)
    labels, metric = content["labels"], content.get("metric")
    files: dict[str, Path | HubSplit] = {}
    if "dataset" in content:
        names = _split_names(content.get("splits", {}), str(place))
        files |= {split: HubSplit(content["dataset"], content.get("config"), name) for split, name in names.items()}
    for split in SPLITS:
        found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
        if len(found) > 1:
            raise TaskError(
                f"has two files of its {split} split: {found[0].name} and {found[1].name}", where=str(folder)
            )
        files |= {split: found[0]} if found else {}
    if not files:
        fix = f"Add test.jsonl, or another of {', '.join(SUFFIXES)}"
        raise TaskError("has no examples: no file of a split", where=str(folder), fix=fix)
    metric = check_metric(metric or default_metric(labels), labels, str(place))
    columns = _columns(content.get("columns", {}), str(place))
    name = str(content.get("name") or folder.resolve().name)
    return Task(name, labels, metric, files, columns, content.get("max_length"))


def read_description(place: Path) -> dict[str, Any]:
    """The content of a `task.json`, its labels as a tuple of names or None."""
    if not place.is_file():
        raise TaskError("the folder has no task.json", where=str(place.parent), fix=SHAPE)
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaskError(f"is not JSON: {error}", where=str(place), fix=SHAPE) from error
    if not isinstance(content, dict) or "labels" not in content:
        raise TaskError("does not say what the `labels` are", where=str(place), fix=SHAPE)
    for key, value in content.items():
        if key not in KEYS:
            raise TaskError(f"unknown key {key!r}", where=str(place), fix=suggestion(key, KEYS))
        if key in WORDS and not (isinstance(value, str) and value) and value is not None:
            raise TaskError(f"`{key}` is {value!r}, not a word", where=str(place), fix=f'Write it like "{key}": "..."')
    labels = content["labels"]
    if labels is not None:
        if not isinstance(labels, list) or len(labels) < 2 or len(set(map(str, labels))) < len(labels):
            raise TaskError("`labels` is not a list of at least two different names", where=str(place), fix=SHAPE)
        if any(isinstance(label, (int, float)) for label in labels) and labels != list(range(len(labels))):
            cause = f"`labels` are numbers other than their positions, 0 to {len(labels) - 1}"
            fix = "Number them from 0 here and in the examples, or write them as text in both"
            raise TaskError(cause, where=str(place), fix=fix)
        content["labels"] = tuple(map(str, labels))
    length = content.get("max_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise TaskError(f"`max_length` is {length!r}", where=str(place), fix="Give a number of tokens")
    return content


def _split_names(given: Any, where: str) -> dict[str, str]:
    if not isinstance(given, dict) or not set(given) <= set(SPLITS):
        fix = 'Write {"validation": "dev"}, for splits that the dataset calls otherwise'
        raise TaskError("`splits` says what the dataset calls train, validation and test", where=where, fix=fix)
    return {split: str(given.get(split, split)) for split in SPLITS}


def _columns(given: Any, where: str) -> dict[str, str]:
    if not isinstance(given, dict) or not set(given) <= set(USUAL):
        fix = 'Write {"text": "sentence1", "text_pair": "sentence2", "label": "label"}'
        raise TaskError("`columns` says which fields are text, text_pair and label", where=where, fix=fix)
    return USUAL | {key: str(value) for key, value in given.items()}


def task_in_file(path: Path) -> Task:
    """A task of one file: what its labels are is read from it."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise TaskError(
            "is of a kind that holds no examples", where=str(path), fix=f"Give one of {', '.join(SUFFIXES)}"
        )
    values = [field_of(record, USUAL["label"]) for record in read_records(path)]
    if is_csv(path):
        numbers = [number(value) for value in values]
        values = values if any(isinstance(value, str) for value in numbers) else numbers
    labels = labels_in(values)
    return Task(path.name.removesuffix(suffix), labels, default_metric(labels), {"all": path}, USUAL)


def labels_in(values: Sequence[Any]) -> tuple[str, ...] | None:
    """The classes that labels name: sorted names, or numbers from 0 on; None if they are measurements."""
    if any(isinstance(value, str) for value in values):
        return tuple(sorted({str(value) for value in values}))
    if all(isinstance(value, int) and value >= 0 for value in values):
        return tuple(map(str, range(max(2, 1 + max(map(int, values), default=1)))))
    return None


def default_metric(labels: Sequence[str] | None) -> str:
    """The metric of a task that names none."""
    return "pearson" if labels is None else "accuracy"
