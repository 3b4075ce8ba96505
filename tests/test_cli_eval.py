"""`weld eval`: its tables, its JSON and its errors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from classifiers import save_classifier, texts, write_task
from folders import weld
from weldment import merge
from weldment.cli.scoring import scoring
from weldment.evaluation.tasks import TaskWarning


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    for seed, (name, labels) in enumerate({"films": 2, "topics": 3}.items()):
        save_classifier(root / name, labels=labels, seed=seed)
        examples = [{"text": text, "label": n % labels} for n, text in enumerate(texts(20))]
        write_task(root / "tasks" / name, examples, [f"l{n}" for n in range(labels)])
    experts = [str(root / name) for name in ("films", "topics")]
    merge({"merge_method": "linear", "models": experts, "heads": ["classifier*"]}, root / "mean")
    return root


def test_a_table_with_a_line_for_each_task_and_the_mean(root: Path) -> None:
    done = weld("eval", root / "mean", "--task", root / "tasks" / "films", "--task", root / "tasks" / "topics")
    assert (done.code, done.err) == (0, "")
    head, films, topics, mean = (line.split() for line in done.out.splitlines())
    assert head == ["task", "metric", "score", "95", "%", "interval", "examples"]
    assert (films[:2], topics[:2], mean[0]) == (["films", "accuracy"], ["topics", "accuracy"], "average")
    assert [line[-1] for line in (films, topics, mean)] == ["20", "20", "40"]
    assert float(mean[1]) == pytest.approx((float(films[2]) + float(topics[2])) / 2, abs=1e-3)
    assert float(films[3]) < float(films[2]) < float(films[5])


def test_one_task_needs_no_mean(root: Path) -> None:
    done = weld("eval", root / "films", "--task", root / "tasks" / "films", "--limit", 5, "--quiet")
    assert len(done.out.splitlines()) == 2
    assert done.out.split()[-1] == "5"


def test_json(root: Path) -> None:
    done = weld("eval", root / "films", "--task", root / "tasks" / "films", "--json", "--batch-size", 3)
    record = json.loads(done.out)
    (score,) = record.pop("scores")
    assert record == {"model": str(root / "films"), "split": "test"}
    assert list(score) == ["task", "metric", "value", "low", "high", "examples"]
    assert (score["task"], score["metric"], score["examples"]) == ("films", "accuracy", 20)
    assert score["low"] < score["value"] < score["high"]


def test_heads_from_elsewhere(root: Path) -> None:
    films, task = root / "tasks" / "films", ("--task", root / "tasks" / "films")
    own = weld("eval", root / "films", *task, "--json").out
    place = root / "mean" / "heads" / "films.safetensors"
    assert weld("eval", root / "films", "--task", films, "--head", f"films={place}", "--json").out == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{}/films", "--task", "{}/tasks/none"],
            "error: {}/tasks/none: there is no such task\n  fix: Give a task folder",
        ),
        (
            ["{}/none", "--task", "{}/tasks/films"],
            "error: there is no file or folder '{}/none'\n  fix: Name an existing",
        ),
        (
            ["{}/topics", "--task", "{}/tasks/films"],
            "error: topics: its head has 3 outputs, and the task 'films' has 2 labels\n  fix: Give the head that was",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--head", "films"],
            "error: --head: 'films' is not TASK=PLACE\n  fix: Write it like --head sst2=models/sst2",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--head", "films=a", "--head", "films=b"],
            "error: --head: two heads for the task 'films'\n  fix: Give one",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--head", "films=nowhere"],
            "error: nowhere",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--head", "topics={}/topics"],
            "error: --head: there is no task 'topics'\n  fix: The tasks are films",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--task", "{}/tasks/films"],
            "error: two tasks are called 'films'\n  fix: Give each a `name` of its own in task.json",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--limit", "0"],
            "error: limit (--limit) is 0\n  fix: Give at least 1",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--split", "dev"],
            "error: there is no split 'dev'\n  fix: The splits",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--split", "train"],
            "error: films: has no split 'train'\n  fix: The splits that are there: test",
        ),
        (
            ["{}/films", "--task", "{}/tasks/films", "--dtype", "int8"],
            "error: dtype is 'int8'\n  fix: Use float32, bflo",
        ),
        (["{}/films", "--task", "{}/tasks/films", "--device", "tpu"], "error: "),
    ],
)
def test_mistakes(arguments: list[str], message: str, root: Path) -> None:
    done = weld("eval", *(argument.replace("{}", str(root)) for argument in arguments))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(message.replace("{}", str(root))), done.err


def test_a_task_must_be_given(root: Path) -> None:
    done = weld("eval", root / "films")
    assert done.code == 2
    assert "--task" in done.err


def test_warnings_about_tasks_are_notes_and_others_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with scoring(True):
            warnings.warn("validation is test", TaskWarning, stacklevel=1)
            warnings.warn("another", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: validation is test\n"
    assert [str(warning.message) for warning in caught] == ["another"]
