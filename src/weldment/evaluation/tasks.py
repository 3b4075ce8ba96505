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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import TaskError
from weldment.evaluation.metrics import check_metric
from weldment.evaluation.records import SUFFIXES, Record, number, read_records

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "validation", "test")

SHAPE = 'It says at least {"labels": ["negative", "positive"], "metric": "accuracy"}; `labels` is null for regression'


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
        has_pairs = pair in records[0].values
        pairs = tuple(_text(record, pair) for record in records) if has_pairs else None
        labels = [self._label(record, label) for record in records]
        return Split(texts, pairs, np.array(labels, dtype=np.float64 if self.labels is None else np.int64))

    def _label(self, record: Record, field: str) -> float:
        value = _field(record, field)
        if isinstance(value, str) and value not in (self.labels or ()):
            value = number(value)
        if self.labels is None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise TaskError(f"`{field}` is {value!r}, not a number", where=record.place)
            return float(value)
        if isinstance(value, str) and value in self.labels:
            return self.labels.index(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.labels):
            fix = (
                f"Labels are names among {', '.join(self.labels)}, or their positions from 0 to {len(self.labels) - 1}"
            )
            raise TaskError(f"the label {value!r} is not in the task's list", where=record.place, fix=fix)
        return value


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
        source: the file, or the harness's name of the task.
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
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    from weldment.evaluation.hub_datasets import hub_task, is_dataset_id

    if is_dataset_id(str(given)):
        return hub_task(str(given))
    raise TaskError(
        "there is no such task", where=str(given), fix="Give a task folder, a file of examples, or org/name"
    )


def _language_task(kind: str, source: str) -> LanguageTask:
    if not source:
        wanted = "FILE" if kind == "perplexity" else "NAME"
        raise TaskError(f"`{kind}:` names nothing", where="--task", fix=f"Write {kind}:{wanted}")
    if kind == "perplexity" and not Path(source).expanduser().is_file():
        raise TaskError("there is no such file", where=source, fix="Give a file of plain text (UTF-8)")
    return LanguageTask(Path(source).stem if kind == "perplexity" else source, kind, source)


def _from_folder(folder: Path) -> Task:
    place = folder / "task.json"
    content = read_description(place)
    labels, metric = content["labels"], content.get("metric")
    files: dict[str, Path | HubSplit] = {}
    if "dataset" in content:
        names = {split: str(content.get("splits", {}).get(split, split)) for split in SPLITS}
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


KEYS = ("name", "labels", "metric", "sizes", "columns", "max_length", "dataset", "config", "splits")


def read_description(place: Path) -> dict[str, Any]:
    """The content of a `task.json`, its labels as a tuple of names or None."""
    import json

    from weldment.recipe.words import suggestion

    if not place.is_file():
        raise TaskError("the folder has no task.json", where=str(place.parent), fix=SHAPE)
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaskError(f"is not JSON: {error}", where=str(place), fix=SHAPE) from error
    if not isinstance(content, dict) or "labels" not in content:
        raise TaskError("does not say what the labels are", where=str(place), fix=SHAPE)
    for key in content:
        if key not in KEYS:
            raise TaskError(f"unknown key {key!r}", where=str(place), fix=suggestion(key, KEYS))
    labels = content["labels"]
    if labels is not None:
        if not isinstance(labels, list) or len(labels) < 2 or len(set(map(str, labels))) < len(labels):
            raise TaskError("`labels` is not a list of at least two different names", where=str(place), fix=SHAPE)
        content["labels"] = tuple(map(str, labels))
    length = content.get("max_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise TaskError(f"`max_length` is {length!r}", where=str(place), fix="Give a number of tokens")
    return content


def _columns(given: Any, where: str) -> dict[str, str]:
    usual = {"text": "text", "text_pair": "text_pair", "label": "label"}
    if not isinstance(given, dict) or not set(given) <= set(usual):
        fix = 'Write {"text": "sentence1", "text_pair": "sentence2", "label": "label"}'
        raise TaskError("`columns` says which fields are text, text_pair and label", where=where, fix=fix)
    return usual | {key: str(value) for key, value in given.items()}


def _from_file(path: Path) -> Task:
    """A task of one file: what its labels are is read from it."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise TaskError(
            "is of a kind that holds no examples", where=str(path), fix=f"Give one of {', '.join(SUFFIXES)}"
        )
    values = [_field(record, "label") for record in read_records(path)]
    if ".csv" in path.suffixes:
        values = [number(value) for value in values]
    labels = labels_in(values)
    return Task(path.name.removesuffix(suffix), labels, default_metric(labels), {"all": path}, _columns({}, str(path)))


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


def _field(record: Record, field: str) -> Any:
    if field not in record.values:
        there = ", ".join(map(str, record.values))
        raise TaskError(f"the example has no field {field!r}", where=record.place, fix=f"Its fields are: {there}")
    return record.values[field]


def _text(record: Record, field: str) -> str:
    value = _field(record, field)
    if not isinstance(value, str):
        raise TaskError(f"`{field}` is {value!r}, not text", where=record.place)
    return value
