"""Tasks: texts with the answers that are expected of a model, in splits to train, to choose and to report on.

A task is a folder with a `task.json` and a file for each split, or one file of examples, or a
dataset on the Hugging Face Hub.

    task.json           {"name": "sst2", "labels": ["negative", "positive"], "metric": "accuracy"}
    validation.jsonl    {"text": "...", "label": 1}
    test.jsonl          {"text": "...", "text_pair": "...", "label": "negative"}

Labels are positions in the list of `labels`, or names in it; where `labels` is null they are
numbers to be predicted (regression).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import TaskError
from weldment.evaluation.records import Record, number, read_records

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "validation", "test")

USUAL = {"text": "text", "text_pair": "text_pair", "label": "label"}
"""The fields of examples. Only the text of a pair may be absent, unless a task says that it is elsewhere."""


@dataclass(frozen=True)
class Split:
    """Examples of one split.

    Attributes:
        texts: one for each example.
        pairs: the second text of each, or None.
        labels: positions in the task's labels, or the numbers of a regression; shape (n,).
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int | None) -> Split:
        """The first examples."""
        pairs = None if self.pairs is None else self.pairs[:count]
        return replace(self, texts=self.texts[:count], pairs=pairs, labels=self.labels[:count])


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        labels: the names of the classes in order; None for a regression.
        metric: a name in `METRICS`.
        files: the splits that there are, by name. A task of one file has one split, "all".
        columns: the fields of the examples, by what they are: "text", "text_pair", "label".
        max_length: tokens after which texts are cut; None for as many as the model takes.
    """

    name: str
    labels: tuple[str, ...] | None
    metric: str
    files: Mapping[str, Path | HubSplit]
    columns: Mapping[str, str]
    max_length: int | None = None

    def split(self, name: str) -> Split:
        """The examples of a split, read from its file.

        Raises:
            TaskError: there is no such split, or it is empty or not as it must be.
        """
        source = self.files.get(name) or self.files.get("all")
        if source is None:
            there = ", ".join(self.files) or "none"
            raise TaskError(f"has no split {name!r}", where=self.name, fix=f"The splits that are there: {there}")
        records = read_records(source) if isinstance(source, Path) else source.records()
        if not records:
            raise TaskError("has no examples", where=str(source), fix="Give a file with at least one example")
        return self._split(records)

    def _split(self, records: Sequence[Record]) -> Split:
        import numpy as np

        text, pair, label = (self.columns[key] for key in ("text", "text_pair", "label"))
        texts = tuple(_text(record, text) for record in records)
        has_pairs = pair != USUAL["text_pair"] or any(pair in record.values for record in records)
        pairs = tuple(_text(record, pair) for record in records) if has_pairs else None
        labels = [self._label(record, label) for record in records]
        return Split(texts, pairs, np.array(labels, dtype=np.float64 if self.labels is None else np.int64))

    def _label(self, record: Record, field: str) -> float:
        value = field_of(record, field)
        if isinstance(value, str) and value not in (self.labels or ()):
            value = number(value)
        if self.labels is None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise TaskError(f"`{field}` is {value!r}, not a number", where=record.place)
            return float(value)
        if isinstance(value, str) and value in self.labels:
            return self.labels.index(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or not 0 <= value < len(self.labels):
            fix = (
                f"Labels are names among {', '.join(self.labels)}, or their positions from 0 to {len(self.labels) - 1}"
            )
            raise TaskError(f"the label {value!r} is not in the task's list", where=record.place, fix=fix)
        return int(value)


class TaskWarning(UserWarning):
    """What users should know about a task before they believe its scores."""


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset on the Hub."""

    dataset: str
    config: str | None
    split: str

    def records(self) -> list[Record]:
        """Its examples; downloads them where they are not in the cache."""
        from weldment.evaluation.hub_datasets import hub_records

        return hub_records(self)

    def __str__(self) -> str:
        return f"{self.dataset}{f':{self.config}' if self.config else ''} ({self.split})"


@dataclass(frozen=True)
class LanguageTask:
    """A task for models that write text.

    Attributes:
        kind: "perplexity" of the text in a file, or a task of lm-evaluation-harness ("lm").
        source: the file, or the harness's name of the task or a YAML file that describes one.
    """

    name: str
    kind: str
    source: str


AnyTask = Task | LanguageTask


def load_task(given: str | Path) -> AnyTask:
    """The task that a folder, a file (`.jsonl`, `.csv`, `.parquet`) or a dataset's id on the Hub is.

    `perplexity:FILE` and `lm:NAME` are tasks for language models.

    Raises:
        TaskError: there is no such task, or its description is wrong.
    """
    kind, colon, source = str(given).partition(":")
    if colon and kind in ("perplexity", "lm"):
        return _language_task(kind, source)
    path = Path(given).expanduser()
    from weldment.evaluation.descriptions import task_in_file, task_in_folder

    if path.is_dir():
        return task_in_folder(path)
    if path.is_file():
        return task_in_file(path)
    from weldment.evaluation.hub_datasets import hub_task, is_dataset_id

    if is_dataset_id(str(given)):
        return hub_task(str(given))
    raise TaskError(
        "there is no such task", where=str(given), fix="Give a task folder, a file of examples, or org/name"
    )


def load_tasks(given: Iterable[str | Path | AnyTask]) -> list[AnyTask]:
    """Tasks, those loaded that are not yet.

    Raises:
        TaskError: one is not there, or its description is wrong.
    """
    return [task if isinstance(task, (Task, LanguageTask)) else load_task(task) for task in given]


def _language_task(kind: str, source: str) -> LanguageTask:
    if not source:
        wanted = "FILE" if kind == "perplexity" else "NAME"
        raise TaskError(f"`{kind}:` names nothing", where="--task", fix=f"Write {kind}:{wanted}")
    is_path = kind == "perplexity" or Path(source).suffix in (".yaml", ".yml")
    if is_path and not Path(source).expanduser().is_file():
        fix = "Give a file of plain text (UTF-8)" if kind == "perplexity" else "Give a name, or a file that there is"
        raise TaskError("there is no such file", where=source, fix=fix)
    return LanguageTask(Path(source).stem if is_path else source, kind, source)


def field_of(record: Record, field: str) -> Any:
    """A field of an example.

    Raises:
        TaskError: it has none of that name.
    """
    if field not in record.values:
        there = ", ".join(map(str, record.values))
        raise TaskError(f"the example has no field {field!r}", where=record.place, fix=f"Its fields are: {there}")
    return record.values[field]


def _text(record: Record, field: str) -> str:
    value = field_of(record, field)
    if not isinstance(value, str):
        raise TaskError(f"`{field}` is {value!r}, not text", where=record.place)
    return value
