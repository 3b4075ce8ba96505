"""Datasets on the Hugging Face Hub as tasks, where the usual names of their columns say which is which.

Datasets with other columns are described by a `task.json` with `dataset`, `config`, `splits` and `columns`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from weldment.errors import TaskError
from weldment.evaluation.descriptions import default_metric, labels_in
from weldment.evaluation.records import Record
from weldment.evaluation.tasks import HubSplit, Task, TaskWarning

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
TEXTS = ("text", "sentence", "sentence1", "question1", "question", "premise", "content", "review", "tweet")
LABELS = ("label", "labels", "score")
NAMES = {
    "train": ("train",),
    "validation": ("validation", "dev", "valid", "validation_matched"),
    "test": ("test", "test_matched"),
}
"""What datasets call the splits."""

_DESCRIBE = (
    'Describe it in a task.json: {"dataset": "org/name", "columns": {"text": ..., "label": ...}, "labels": [...]}'
)


def is_dataset_id(text: str) -> bool:
    """Whether it has the form of an id, `org/name` or `org/name:config`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", text) is not None


def hub_task(reference: str) -> Task:
    """The task that a dataset is.

    Labels of a test split are sometimes secret (-1); then, and where there is no such split, the
    validation split stands in for it, with a `TaskWarning`.

    Args:
        reference: `org/name` or `org/name:config`.

    Raises:
        TaskError: there is no such dataset, or its columns have other names.
    """
    dataset, _, config = reference.partition(":")
    there = _split_names(dataset, config or None)
    splits = {
        split: HubSplit(dataset, config or None, next(name for name in names if name in there))
        for split, names in NAMES.items()
        if not there.isdisjoint(names)
    }
    if not splits:
        raise TaskError(f"has no split to test on, but {', '.join(sorted(there))}", where=reference, fix=_DESCRIBE)
    shown = splits.get("test") or splits.get("validation") or splits["train"]
    data = _load(shown)
    columns = columns_in(data.column_names, reference)
    if shown is splits.get("test") and "validation" in splits and _is_secret(data[columns["label"]]):
        data = _load(splits["validation"])
        splits["test"] = _standing_in(splits["validation"], "its test split has no labels")
    elif "test" not in splits and "validation" in splits:
        splits["test"] = _standing_in(splits["validation"], "it has no test split")
    labels = _labels(data, columns["label"])
    return Task(reference.partition("/")[2].replace(":", "-"), labels, default_metric(labels), splits, columns)


def hub_records(split: HubSplit) -> list[Record]:
    """The examples of a split.

    Raises:
        TaskError: there is no such dataset or split.
    """
    return [Record(row, f"{split}: row {place}") for place, row in enumerate(_load(split), 1)]


def columns_in(names: Sequence[str], where: str) -> dict[str, str]:
    """Which columns are the text, the second text of a pair and the label, by their usual names.

    Raises:
        TaskError: the text or the label has another name.
    """
    label = next((name for name in LABELS if name in names), None)
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    text = next((name for name in TEXTS if name in names), None)
    if label is None or text is None:
        what = "label" if label is None else "text"
        cause = f"which column is the {what} cannot be told from the names: {', '.join(names)}"
        raise TaskError(cause, where=where, fix=_DESCRIBE)
    if pair is not None:
        return {"text": pair[0], "text_pair": pair[1], "label": label}
    return {"text": text, "text_pair": "text_pair", "label": label}


def _standing_in(split: HubSplit, reason: str) -> HubSplit:
    cause = f"{split.dataset}: {reason}, so its split {split.split!r} is both validation and test"
    warnings.warn(f"{cause}; what was chosen on the one is not tested by the other", TaskWarning, stacklevel=3)
    return split


def _is_secret(labels: Sequence[Any]) -> bool:
    return all(label is None or label == -1 for label in labels)


def _labels(data: Any, column: str) -> tuple[str, ...] | None:
    names = getattr(data.features[column], "names", None)
    return tuple(names) if names else labels_in(list(data[column]))


def _split_names(dataset: str, config: str | None) -> set[str]:
    with _Loading(dataset) as datasets:
        return set(datasets.get_dataset_split_names(dataset, config))


def _load(split: HubSplit) -> Any:
    """As a `datasets.Dataset`."""
    with _Loading(str(split)) as datasets:
        return datasets.load_dataset(split.dataset, split.config, split=split.split)


class _Loading:
    """What goes wrong with datasets, as errors that say what to do."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> Any:
        try:
            return import_module("datasets")
        except ImportError as error:
            cause = "there is no such file or folder, and reading datasets of the Hub takes packages that are missing"
            raise TaskError(cause, where=self._where, fix="Install them: pip install 'weldment[data]'") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Unknown ids and splits, configurations that must be named, no connection, code that would have to be run.
        if isinstance(error, (OSError, ValueError, RuntimeError)):
            first = (str(error).splitlines() or [type(error).__name__])[0]
            cause = f"cannot be loaded from the Hub: {first.rstrip('.')}"
            raise TaskError(cause, where=self._where, fix=_advice(error)) from error


def _advice(error: BaseException) -> str:
    if "onfig name" in str(error) or "BuilderConfig" in str(error):
        return "Name the configuration: org/name:config"
    return "Check the id, the connection and, for private datasets, HF_TOKEN; local tasks are folders with a task.json"
