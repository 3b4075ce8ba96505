"""Tasks from folders and files: what is read, and what is refused with which sentence."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifiers import write_task
from paths import SHARED
from weldment.errors import TaskError
from weldment.evaluation import hub_datasets
from weldment.evaluation.hub_datasets import columns_in, hub_records, hub_task, is_dataset_id
from weldment.evaluation.tasks import HubSplit, LanguageTask, Split, Task, TaskWarning, load_task

ROWS = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}, {"text": 'fine, "very"\nso', "label": 1}]
NAMES = ("negative", "positive")

needs_tasks = pytest.mark.skipif(not (SHARED / "tasks").is_dir(), reason="the tasks (../shared/tasks) are not here")
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the extra `data` (datasets) is not installed"
)


def loaded(place: str | Path) -> Task:
    task = load_task(place)
    assert isinstance(task, Task)
    return task


def split(place: str | Path, name: str = "test") -> Split:
    return loaded(place).split(name)


def folder(root: Path, content: Any = None, **files: str) -> Path:
    """A task folder with a `task.json` and files of splits."""
    described = {"labels": NAMES} if content is None else content
    text = described if isinstance(described, str) else json.dumps(described)
    (root / "task.json").write_text(text, encoding="utf-8")
    for name, lines in files.items():
        (root / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return root


def refusal(place: str | Path, name: str = "test") -> str:
    with pytest.raises(TaskError) as caught:
        split(place, name)
    return str(caught.value)


def test_a_folder_gives_its_splits(tmp_path: Path) -> None:
    write_task(tmp_path / "films", ROWS, NAMES, metric="f1", max_length=32, sizes=[0, 0, 3])
    task = loaded(tmp_path / "films")
    assert (task.name, task.labels, task.metric, task.max_length) == ("films", NAMES, "f1", 32)
    assert list(task.files) == ["test"]
    found = task.split("test")
    assert found.texts == tuple(row["text"] for row in ROWS)
    assert found.pairs is None
    assert found.labels.tolist() == [1, 0, 1]
    assert (len(found.first(2)), len(found.first(None))) == (2, 3)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_spreadsheet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Excel writes a mark before UTF-8."""
    write_csv(path, rows, "utf-8-sig")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: list[tuple[str, Callable[[Path, list[dict[str, Any]]], None]]] = [
    (".jsonl", write_jsonl),
    (".jsonl.gz", write_gzip),
    (".csv", write_csv),
    (".csv", write_spreadsheet),
    (".parquet", write_parquet),
]


@pytest.mark.parametrize(("suffix", "write"), WRITERS)
@pytest.mark.parametrize("place", ["file", "folder"])
def test_all_formats_hold_the_same(
    suffix: str, write: Callable[[Path, list[dict[str, Any]]], None], place: str, tmp_path: Path
) -> None:
    path = tmp_path / f"test{suffix}"
    write(path, ROWS)
    found = split(path if place == "file" else folder(tmp_path))
    assert found.texts == tuple(row["text"] for row in ROWS)
    assert found.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "expected", "metric"),
    [
        ([2, 0], ("0", "1", "2"), "accuracy"),
        ([0, 0], ("0", "1"), "accuracy"),
        (["spam", "ham"], ("ham", "spam"), "accuracy"),
        (["1", "b"], ("1", "b"), "accuracy"),
        (["1.50", "b"], ("1.50", "b"), "accuracy"),
        ([1.5, 2], None, "pearson"),
        ([-1, 2], None, "pearson"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_tells_its_labels(
    labels: list[Any], expected: tuple[str, ...] | None, metric: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"mine{suffix}"
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)]
    (write_csv if suffix == ".csv" else write_jsonl)(path, rows)
    task = loaded(path)
    assert (task.name, task.labels, task.metric) == ("mine", expected, metric)
    values = task.split("validation").labels.tolist()
    assert values == (
        labels if expected is None else [int(v) if expected[0] == "0" else expected.index(v) for v in labels]
    )


def test_labels_are_positions_or_names(tmp_path: Path) -> None:
    given = [1, "positive", "negative", "1", 0.0, True]
    write_task(tmp_path, [{"text": "t", "label": label} for label in given], NAMES)
    assert split(tmp_path).labels.tolist() == [1, 1, 0, 1, 0, 1]


def test_names_that_are_numbers_are_names(tmp_path: Path) -> None:
    """Stars from 1 to 3: "1" is the first, and the number 1 is the position of the second."""
    write_task(tmp_path, [{"text": "t", "label": label} for label in ("1", 1)], ["1", "2", "3"])
    assert split(tmp_path).labels.tolist() == [0, 1]


def test_regressions_have_numbers(tmp_path: Path) -> None:
    write_task(tmp_path, [{"text": "t", "label": label} for label in (0.5, 4, "3.25")], None)
    found = split(tmp_path)
    assert loaded(tmp_path).metric == "pearson"
    assert found.labels.tolist() == [0.5, 4.0, 3.25]
    assert found.labels.dtype == np.float64


def test_pairs_under_names_of_their_own(tmp_path: Path) -> None:
    columns = {"text": "question", "text_pair": "answer", "label": "fits"}
    rows = [{"question": "q1", "answer": "a1", "fits": 0}, {"question": "q2", "answer": "a2", "fits": 1}]
    write_task(tmp_path, rows, NAMES, columns=columns)
    found = split(tmp_path)
    assert (found.texts, found.pairs) == (("q1", "q2"), ("a1", "a2"))
    assert found.first(1).pairs == ("a1",)


@needs_tasks
def test_the_shared_tasks_have_the_sizes_that_they_say() -> None:
    for path in sorted((SHARED / "tasks").glob("*/task.json")):
        task = loaded(path.parent)
        sizes = json.loads(path.read_text())["sizes"]
        assert [len(task.split(name)) for name in ("validation", "test")] == sizes[1:]


def test_tasks_for_language_models(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("It was a dark and stormy night.")
    assert load_task(f"perplexity:{tmp_path}/novel.txt") == LanguageTask("novel", "perplexity", f"{tmp_path}/novel.txt")
    assert load_task("lm:arc_easy") == LanguageTask("arc_easy", "lm", "arc_easy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "{}/task.json: is not JSON: Expecting property name"),
        ("[1]", "{}/task.json: does not say what the `labels` are. It says at least "),
        ({"name": "x"}, "{}/task.json: does not say what the `labels` are. It says at least "),
        ({"labels": NAMES, "metrik": "f1"}, "{}/task.json: unknown key 'metrik'. Did you mean `metric`?"),
        ({"labels": ["a"]}, "{}/task.json: `labels` is not a list of at least two different names."),
        ({"labels": ["a", "a"]}, "{}/task.json: `labels` is not a list of at least two different names."),
        ({"labels": [1, 0]}, "{}/task.json: `labels` are numbers other than their positions, 0 to 1. Number them"),
        ({"labels": "ab"}, "{}/task.json: `labels` is not a list of at least two different names."),
        ({"labels": NAMES, "name": 3}, '{}/task.json: `name` is 3, not a word. Write it like "name": "..."'),
        (
            {"labels": NAMES, "metric": "f2"},
            "{}/task.json: there is no metric 'f2'. Known: accuracy, balanced_accuracy, f1, f1",
        ),
        ({"labels": NAMES, "metric": "pearson"}, "{}/task.json: the metric 'pearson' is for regressions"),
        ({"labels": None, "metric": "f1"}, "{}/task.json: the metric 'f1' is for classes, and the task has no labels."),
        ({"labels": NAMES, "max_length": 0}, "{}/task.json: `max_length` is 0. Give a number of tokens"),
        ({"labels": NAMES, "columns": {"txt": "a"}}, "{}/task.json: `columns` says which fields are text, text_pair"),
        (
            {"labels": NAMES, "columns": {"label": "l"}},
            "{}/test.jsonl: line 1: the example has no field 'l'. Its fields",
        ),
        ({"labels": NAMES, "columns": {"text_pair": "p"}}, "{}/test.jsonl: line 1: the example has no field 'p'."),
        (
            {"labels": NAMES, "dataset": "a/b", "splits": {"dev": "x"}},
            "{}/task.json: `splits` says what the dataset calls train, validation and test. Write ",
        ),
    ],
)
def test_descriptions_that_are_wrong(content: Any, message: str, tmp_path: Path) -> None:
    folder(tmp_path, content, test='{"text": "a", "label": 0}')
    assert refusal(tmp_path).startswith(message.replace("{}", str(tmp_path), 1))


def test_places_without_a_task(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no where").startswith(f"{tmp_path}/no where: there is no such task. Give a task folder,")
    (tmp_path / "bare").mkdir()
    assert refusal(tmp_path / "bare").startswith(f"{tmp_path}/bare: the folder has no task.json. It says at least ")
    folder(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path}: has no examples: no file of a split. "
        "Add test.jsonl, or another of .jsonl, .jsonl.gz, .csv, .csv.gz, .parquet"
    )
    (tmp_path / "a.txt").write_text("text")
    assert refusal(tmp_path / "a.txt").startswith(f"{tmp_path}/a.txt: is of a kind that holds no examples. Give one of")
    assert refusal("lm:") == "--task: `lm:` names nothing. Write lm:NAME"
    assert refusal("perplexity:") == "--task: `perplexity:` names nothing. Write perplexity:FILE"
    assert refusal("perplexity:nowhere.txt").startswith("nowhere.txt: there is no such file. Give a file of plain text")


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    folder(tmp_path, validation='{"text": "a", "label": 0}', train="\n")
    assert refusal(tmp_path).endswith(": has no split 'test'. The splits that are there: train, validation")
    assert (
        refusal(tmp_path, "train") == f"{tmp_path}/train.jsonl: has no examples. Give a file with at least one example"
    )
    (tmp_path / "validation.csv").write_text("text,label\na,0\n")
    assert refusal(tmp_path).startswith(
        f"{tmp_path}: has two files of its validation split: validation.jsonl and valid"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON: Expecting property name"),
        ("[" * 100_000, "is not JSON: "),
        ("[1]", 'is not a JSON object. Write {"text": ..., "label": ...}'),
        ('{"label": 0}', "the example has no field 'text'. Its fields are: label"),
        ('{"text": "a"}', "the example has no field 'label'. Its fields are: text"),
        ('{"text": 5, "label": 0}', "`text` is 5, not text"),
        (
            '{"text": "a", "label": 2}',
            "the label 2 is not in the task's list. Labels are names among negative, positive, or",
        ),
        ('{"text": "a", "label": -1}', "the label -1 is not in the task's list."),
        ('{"text": "a", "label": 0.5}', "the label 0.5 is not in the task's list."),
        ('{"text": "a", "label": null}', "the label None is not in the task's list."),
        ('{"text": "a", "label": "Positive"}', "the label 'Positive' is not in the task's list."),
        ('{"text": "a", "text_pair": "b", "label": 0}', "the example has no field 'text_pair'."),
    ],
)
def test_examples_that_are_wrong(line: str, message: str, tmp_path: Path) -> None:
    """Each is named with its line; a pair that only some examples have is missing in the others."""
    folder(tmp_path, test='{"text": "fine", "label": 1}\n' + line)
    number = 1 if "text_pair" in line else 2
    assert refusal(tmp_path).startswith(f"{tmp_path}/test.jsonl: line {number}: {message}")


@pytest.mark.parametrize("label", ["true", '"high"', "NaN", "null"])
def test_labels_of_regressions_are_numbers(label: str, tmp_path: Path) -> None:
    folder(tmp_path, {"labels": None}, test=f'{{"text": "a", "label": {label}}}')
    assert refusal(tmp_path).startswith(f"{tmp_path}/test.jsonl: line 1: `label` is ")
    assert refusal(tmp_path).endswith(", not a number")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "test.jsonl",
            '{"text": "é", "label": 0}'.encode("latin-1"),
            "is not UTF-8: invalid continuation byte. Convert",
        ),
        (
            "test.jsonl.gz",
            gzip.compress(b'{"text": "a", "label": 0}' * 9, mtime=0)[:-12],
            "cannot be read: Compressed file ended",
        ),
        ("test.jsonl.gz", b"plain", "cannot be read: Not a gzipped file"),
        (
            "test.jsonl.gz",
            gzip.compress(b"x" * 99, mtime=0)[:10] + b"\xff" * 30,
            "cannot be read: Error -3 while decompressing",
        ),
        ("test.csv", b"text,label\na,0\nb\n", "line 3: has not as many cells as the first line (2). Put cells with"),
        (
            "test.csv",
            b"text,label\na, and b,0\n",
            "line 2: has not as many cells as the first line (2). Put cells with",
        ),
        ("test.csv", b'text,label\n"a" b,0\n', "line 2: is not CSV: ',' expected after '\"'. Double the quotes inside"),
        ("test.csv", b"text,label\na,7\n", "line 2: the label 7 is not in the task's list."),
        ("test.csv", b"", "has no examples."),
        ("test.parquet", b"PAR1 but no more", "is not a Parquet file that can be read: "),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (folder(tmp_path) / name).write_bytes(content)
    found = refusal(tmp_path)
    assert found.startswith(f"{tmp_path}/{name}: {message}"), found


def test_long_cells_are_read(tmp_path: Path) -> None:
    """The csv module refuses cells of more than 131072 characters unless it is told otherwise."""
    (folder(tmp_path) / "test.csv").write_text(f"text,label\n{'word ' * 40_000},1\n")
    assert len(split(tmp_path).texts[0]) == 200_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nyu-mll/glue", True),
        ("nyu-mll/glue:sst2", True),
        ("glue", False),
        ("../tasks", False),
        ("a/b/c", False),
        ("a/b.jsonl:", False),
        ("/a/b", False),
    ],
)
def test_ids_of_datasets(text: str, expected: bool) -> None:
    assert is_dataset_id(text) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["idx", "sentence", "label"], ("sentence", "text_pair", "label")),
        (["sentence2", "sentence1", "score"], ("sentence1", "sentence2", "score")),
        (["question", "sentence", "label"], ("question", "sentence", "label")),
        (["premise", "hypothesis", "label"], ("premise", "hypothesis", "label")),
        (["text", "labels"], ("text", "text_pair", "labels")),
    ],
)
def test_columns_by_their_usual_names(names: list[str], expected: tuple[str, str, str]) -> None:
    found = columns_in(names, "org/name")
    assert (found["text"], found["text_pair"], found["label"]) == expected


def test_columns_that_nobody_knows() -> None:
    with pytest.raises(
        TaskError, match="org/name: which column is the text cannot be told from the names: body, label"
    ):
        columns_in(["body", "label"], "org/name")
    with pytest.raises(
        TaskError, match="org/name: which column is the label cannot be told from the names: text, kind"
    ):
        columns_in(["text", "kind"], "org/name")


def test_without_the_extra_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(hub_datasets, "import_module", absent)
    assert refusal("org/nowhere") == (
        "org/nowhere: there is no such file or folder, and reading datasets of the Hub takes packages that are missing"
        ". Install them: pip install 'weldment[data]'"
    )


def dataset(root: Path, **splits: list[dict[str, Any]]) -> None:
    """A dataset as it lies in a repository on the Hub."""
    place = root / "org" / "pairs"
    place.mkdir(parents=True)
    for name, rows in splits.items():
        write_jsonl(place / f"{name}.jsonl", rows)


PAIRED = [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "c", "sentence2": "d", "label": 0}]


@needs_datasets
def test_a_dataset_whose_test_labels_are_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path, train=PAIRED, validation=PAIRED, test=[{**row, "label": -1} for row in PAIRED])
    monkeypatch.chdir(tmp_path)
    with pytest.warns(TaskWarning, match="its test split has no labels, so its split 'validation' is both validation"):
        task = hub_task("org/pairs")
    assert (task.name, task.labels) == ("pairs", ("0", "1"))
    found = task.split("test")
    assert (found.texts, found.pairs, found.labels.tolist()) == (("a", "c"), ("b", "d"), [1, 0])


@needs_datasets
def test_a_dataset_with_all_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path, train=PAIRED, test=PAIRED[:1])
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TaskWarning)
        task = hub_task("org/pairs")
    assert (list(task.files), len(task.split("test"))) == (["train", "test"], 1)


@needs_datasets
def test_datasets_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset(tmp_path, train=PAIRED)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TaskError, match=r"org/pairs: cannot be loaded from the Hub: .*Name the configuration: org/name:co"
    ):
        hub_task("org/pairs:nothing")
    with pytest.raises(TaskError, match=r"org/pairs \(exam\): cannot be loaded from the Hub: Unknown split"):
        hub_records(HubSplit("org/pairs", None, "exam"))
