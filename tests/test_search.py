"""Searches: real tiny classifiers, tasks whose answer is known, and studies that go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from optuna.storages import RDBStorage
from transformers import BertConfig, BertForSequenceClassification

import weldment
from classifiers import WORDS, save_tokenizer, write_task
from folders import weld
from models import BERT
from weldment.errors import MergeError, OutputError, PlanError, RecipeError, TaskError, UserError
from weldment.evaluation.comparison.rows import Comparison
from weldment.evaluation.evaluate import Evaluator, evaluate
from weldment.evaluation.search import trials
from weldment.evaluation.search.samplers import sampler_of
from weldment.evaluation.search.search import Messages, SearchResult, Trial, _content, search
from weldment.evaluation.search.space import load_space
from weldment.evaluation.search.study import open_study, shown_storage
from weldment.evaluation.tasks import load_task

LAMBDA = "parameters.lambda"
EMPTY = Comparison(tasks=(), metrics={}, examples={}, rows=())


def save_inclined(folder: Path, network: BertForSequenceClassification, push: float) -> None:
    """A classifier that tends to the class 1 as much as `push` says, and to 0 if it is negative."""
    classifier, pooler = network.classifier.weight, network.bert.pooler.dense.bias
    with torch.no_grad():
        pooler.copy_(push * torch.sign(classifier[1] - classifier[0]))
    network.save_pretrained(folder)
    save_tokenizer(folder)


def save_task(folder: Path, **shares: float) -> None:
    """A task of texts of two words; `shares` says of how many of a split the label is 1."""
    for split, share in shares.items():
        rows = [
            {"text": f"{first} {second}", "label": int(place % 10 < 10 * share)}
            for place, (first, second) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
        ]
        write_task(folder, rows, ["no", "yes"], split)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that says no, experts that say yes, and tasks that want to hear yes, or not."""
    folder = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    network = BertForSequenceClassification(BertConfig(**{**BERT, "num_hidden_layers": 1}))
    with torch.no_grad():
        network.bert.pooler.dense.weight.normal_(std=0.2)
        for parameter in network.bert.encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
        network.classifier.weight.normal_(std=1.0)
    for name, push in (("base", -1.0), ("yes", 1.0), ("mixed", 0.8)):
        save_inclined(folder / name, network, push)
    save_task(folder / "tasks" / "yes", validation=1, test=1)
    save_task(folder / "tasks" / "mixed", validation=0.8, test=0.8)
    save_task(folder / "tasks" / "fickle", validation=1, test=0)
    save_task(folder / "tasks" / "unvalidated", test=1)
    save_task(folder / "tasks" / "untested", validation=1)
    return folder


@pytest.fixture(autouse=True)
def folder(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, where files of searches appear."""
    monkeypatch.chdir(tmp_path)
    for path in material.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with Optuna's tables, which take longer to make than a trial."""
    path = tmp_path_factory.mktemp("tables") / "empty.db"
    RDBStorage(f"sqlite:///{path}")
    return path


@pytest.fixture
def quick(folder: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches without the table at the end; tables are in the storage already."""
    shutil.copy(tables, folder / "demo.search.db")
    monkeypatch.setattr("weldment.evaluation.search.search.compare", lambda *given, **options: EMPTY)


def arithmetic(scale: Any, **keys: Any) -> dict[str, Any]:
    """The base and as much of an expert as `scale` says."""
    merge = {"merge_method": "task_arithmetic", "base_model": "base", "models": ["yes"], **keys}
    return {**merge, "parameters": {"lambda": scale}}


RANGE = arithmetic({"search": [0.0, 1.0]})
STEPS = arithmetic({"search": [0, 1], "step": 0.25})


@dataclass
class Watch:
    """What a search tells."""

    texts: list[str]
    trials: list[Trial]

    @property
    def messages(self) -> Messages:
        return Messages(self.texts.append, lambda trial, best, goal: self.trials.append(trial))


@pytest.fixture
def watch() -> Watch:
    return Watch([], [])


def values(trials: Sequence[Trial], name: str = LAMBDA) -> list[Any]:
    return [trial.values[name] for trial in trials]


def file_of(recipe: Mapping[str, Any], name: str = "demo.yml") -> Path:
    Path(name).write_text(yaml.safe_dump(dict(recipe)))
    return Path(name)


def test_selection_uses_validation_and_the_table_uses_test() -> None:
    found = search(STEPS, ["tasks/fickle"], trials=9, sampler="grid")
    assert sorted(values(found.trials)) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found.best.value == max(trial.value for trial in found.trials if trial.value is not None) == 1.0
    # The split that the table is of would have chosen the opposite.
    assert found.best.values[LAMBDA] > 0.5
    assert found.row.scores["fickle"].value == 0.0
    base = next(row for row in found.comparison.rows if row.kind == "base")
    assert base.scores["fickle"].value == 1.0
    assert found.comparison.split == "test"


def test_the_value_is_the_mean_of_percents_of_the_experts_on_validation() -> None:
    found = search({**STEPS, "models": ["yes", "mixed"]}, ["tasks/yes", "tasks/mixed"], trials=1, sampler="random")
    assert found.goal.is_normalised
    trial = found.trials[0]
    experts = {name: evaluate(name, [f"tasks/{name}"], split="validation")[name].value for name in ("yes", "mixed")}
    percents = [100 * trial.scores[name] / experts[name] for name in experts]
    assert trial.value == pytest.approx(sum(percents) / 2)
    assert {row.name for row in found.comparison.rows} >= {"yes", "mixed", "base", "plain average"}
    # Of the experts, what percents are taken of is enough.
    assert {name: set(found.comparison.row(name).scores) for name in experts} == {"yes": {"yes"}, "mixed": {"mixed"}}
    assert set(found.comparison.row("base").scores) == {"yes", "mixed"}


@pytest.mark.usefixtures("quick")
def test_a_task_without_an_expert_makes_the_value_the_mean_of_scores_and_says_so(watch: Watch) -> None:
    found = search(STEPS, ["tasks/yes", "tasks/mixed"], trials=1, messages=watch.messages)
    assert not found.goal.is_normalised
    assert found.best.value == pytest.approx(sum(found.best.scores.values()) / 2)
    assert any("mixed has no expert: the search maximises the mean of the scores" in text for text in watch.texts)
    named = search(STEPS, ["tasks/yes", "tasks/mixed"], trials=1, experts={"mixed": "mixed"})
    assert named.goal.is_normalised


def test_the_best_recipe_is_written_and_is_what_was_scored() -> None:
    found = search(file_of(STEPS), ["tasks/yes"], trials=5, sampler="grid", out="best.yml")
    assert Path("demo.search.db").is_file()
    text = Path("best.yml").read_text()
    assert text.startswith("# Found by weld search in demo.yml: the best of 5 trials")
    assert yaml.safe_load(text) == arithmetic(found.best.values[LAMBDA]) == found.documents[0]
    weldment.merge("best.yml", "out")
    assert evaluate("out", ["tasks/yes"], split="validation")["yes"].value == found.best.scores["yes"]
    assert evaluate("out", ["tasks/yes"])["yes"].value == found.row.scores["yes"].value


@pytest.mark.usefixtures("quick")
def test_a_search_goes_on_to_so_many_trials_in_all_and_chooses_as_if_there_were_no_break(watch: Watch) -> None:
    straight = search(RANGE, ["tasks/yes"], trials=12, seed=3)
    first = search(file_of(RANGE), ["tasks/yes"], trials=4, seed=3)
    second = search(Path("demo.yml"), ["tasks/yes"], trials=12, seed=3, messages=watch.messages)
    assert [trial.number for trial in watch.trials] == list(range(4, 12))
    assert "going on after 4 trials that are in demo.search.db" in watch.texts
    assert values(second.trials) == values(straight.trials)
    assert values(first.trials) == values(straight.trials)[:4]
    assert len(set(values(straight.trials))) == 12


@pytest.mark.usefixtures("quick")
def test_processes_with_one_storage_share_the_trials() -> None:
    """As with two processes: each has a study of its own, open at the same time."""
    file_of(RANGE)
    others: list[SearchResult] = []

    def told(trial: Trial, best: Trial | None, goal: object) -> None:
        if not others:
            others.append(search("demo.yml", ["tasks/yes"], trials=4, sampler="random"))

    found = search("demo.yml", ["tasks/yes"], trials=6, sampler="random", messages=Messages(trial=told))
    assert [trial.number for trial in found.trials] == list(range(6))
    assert len(set(values(found.trials))) == 6
    assert found.trials[:4] == others[0].trials


@pytest.mark.usefixtures("quick")
def test_a_point_that_was_tried_is_not_merged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[str] = []
    real = trials.merged_state

    def counted(recipe: Any, name: str) -> Any:
        merged.append(name)
        return real(recipe, name)

    monkeypatch.setattr(trials, "merged_state", counted)
    found = search(arithmetic({"choices": [0.0, 1.0]}), ["tasks/yes"], trials=6, sampler="random")
    assert len(found.trials) == 6
    assert len(merged) == len(set(values(found.trials))) == 2


@pytest.mark.usefixtures("quick")
def test_trials_that_are_worse_than_most_are_given_up_after_the_first_task(watch: Watch) -> None:
    tasks = ["tasks/yes", "tasks/mixed"]
    scale = {"search": [0, 1], "step": 0.1}
    found = search({**arithmetic(scale), "models": ["yes", "mixed"]}, tasks, trials=11, sampler="grid")
    pruned = [trial for trial in found.trials if trial.state == "pruned"]
    assert pruned
    assert all(trial.value is None and list(trial.scores) == ["yes"] for trial in pruned)
    whole = [trial for trial in found.trials if trial.state == "complete"]
    assert max(trial.scores["yes"] for trial in pruned) < max(trial.scores["yes"] for trial in whole)
    assert found.best in whole


@pytest.mark.usefixtures("quick")
def test_a_failed_merge_is_a_failed_trial(watch: Watch) -> None:
    scales = arithmetic({"choices": [1.0, 1e30]}, dtype="float16")
    found = search(scales, ["tasks/yes"], trials=2, sampler="grid", messages=watch.messages)
    failed = next(trial for trial in watch.trials if trial.values[LAMBDA] == 1e30)
    assert failed.state == "failed"
    assert "NaN or infinity" in failed.failure
    assert found.best.values[LAMBDA] == 1.0
    assert {trial.state for trial in found.trials} == {"complete", "failed"}


@pytest.mark.usefixtures("quick")
def test_a_merge_whose_answers_are_not_finite_is_a_failed_trial(watch: Watch) -> None:
    network = BertForSequenceClassification.from_pretrained("yes")
    for part in (network.bert.encoder.layer[0].attention.self.query, network.bert.encoder.layer[0].attention.self.key):
        part.weight.data.add_(torch.randn_like(part.weight))
    network.save_pretrained("far")
    save_tokenizer(Path("far"))
    scales = arithmetic({"choices": [1.0, 1e30]}, models=["far"])
    found = search(scales, ["tasks/yes"], trials=2, sampler="grid", messages=watch.messages)
    failed = next(trial for trial in watch.trials if trial.values[LAMBDA] == 1e30)
    assert failed.state == "failed"
    assert "answers NaN or infinity to" in failed.failure
    assert found.best.values[LAMBDA] == 1.0


def test_without_a_complete_trial_the_failure_is_told() -> None:
    scales = arithmetic({"choices": [1e29, 1e30]}, dtype="float16")
    with pytest.raises(MergeError, match=r"no trial was completed \(2 ended\).*parameters\.lambda = 1e.*NaN or inf"):
        search(scales, ["tasks/yes"], trials=2, sampler="grid")


@pytest.mark.usefixtures("quick")
def test_ctrl_c_ends_after_the_running_trial_and_says_how_to_go_on(watch: Watch) -> None:
    def report(what: str, count: int, total: int) -> None:
        if what == "trial 1 on yes" and not watch.texts:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    messages = replace(watch.messages, report=report)
    with pytest.raises(KeyboardInterrupt, match="2 of 5 trials are done; run the same command again to go on"):
        search(file_of(RANGE), ["tasks/yes"], trials=5, messages=messages)
    assert [trial.state for trial in watch.trials] == ["complete", "complete"]
    assert watch.texts == ["stopping after this trial; Ctrl-C again stops at once"]
    assert signal.getsignal(signal.SIGINT) is before
    assert len(search("demo.yml", ["tasks/yes"], trials=3).trials) == 3


@pytest.mark.usefixtures("quick")
def test_a_trial_that_a_mistake_or_a_second_ctrl_c_cut_short_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(recipe: Any, name: str) -> Any:
        raise PlanError("the models do not fit")

    def report(what: str, count: int, total: int) -> None:
        if what == "trial 1 on yes":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "merged_state", refused)
        with pytest.raises(PlanError, match="do not fit"):
            search(file_of(STEPS), ["tasks/yes"], trials=5, sampler="grid")
    with pytest.raises(KeyboardInterrupt):
        search("demo.yml", ["tasks/yes"], trials=5, sampler="grid", messages=Messages(report=report))
    found = search("demo.yml", ["tasks/yes"], trials=5, sampler="grid")
    assert [trial.number for trial in found.trials] == [2, 3, 4, 5, 6]
    assert sorted(values(found.trials)) == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.usefixtures("quick")
def test_no_trial_begins_after_the_timeout() -> None:
    with pytest.raises(MergeError, match=r"no trial was completed \(0 ended\).*more time"):
        search(RANGE, ["tasks/yes"], trials=5, timeout=1e-9)
    search(file_of(RANGE), ["tasks/yes"], trials=1)
    assert len(search("demo.yml", ["tasks/yes"], trials=5, timeout=1e-9).trials) == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sampler", ["cmaes", "tpe"])
def test_whole_numbers_methods_and_gradients_are_searched(sampler: str) -> None:
    recipe = {
        "merge_method": {"choices": ["task_arithmetic", "ties"]},
        "base_model": "base",
        "models": ["yes", "mixed"],
        "parameters": {"weight": [{"search": [0.1, 1.0]}, {"search": [0.1, 1.0]}], "lambda": {"search": [1, 3]}},
    }
    found = search(recipe, ["tasks/yes"], trials=12, sampler=sampler)
    assert {trial.values["merge_method"] for trial in found.trials} == {"task_arithmetic", "ties"}
    assert {type(scale) for scale in values(found.trials)} == {int}
    assert len(set(values(found.trials, "parameters.weight[1]"))) == 12
    assert found.documents[0]["parameters"]["weight"] == list(found.best.values.values())[1:3]


@pytest.mark.usefixtures("quick")
def test_a_study_of_something_else_is_refused_and_fresh_begins_anew() -> None:
    search(file_of(STEPS), ["tasks/yes"], trials=1)
    save_task(Path("tasks2/yes"), validation=0.5, test=1)
    for change, what in (
        ({"tasks": ["tasks2/yes"]}, "tasks"),
        ({"limit": 3}, "options"),
        ({"experts": {"yes": "mixed"}}, "experts"),
        ({"heads": {"yes": "mixed"}}, "heads"),
    ):
        refusal = rf"demo\.search\.db: its study 'demo' belongs to another search: different {what}\. .*--fresh"
        with pytest.raises(OutputError, match=refusal):
            search("demo.yml", **{"tasks": ["tasks/yes"], "trials": 1, **change})
    file_of(RANGE)
    with pytest.raises(OutputError, match="belongs to another search: different recipe"):
        search("demo.yml", ["tasks/yes"], trials=1)
    assert len(search("demo.yml", ["tasks/yes"], trials=2, fresh=True).trials) == 2


@pytest.mark.usefixtures("folder")
def test_texts_of_one_name_are_told_apart_by_what_they_say() -> None:
    Path("text.txt").write_text("some words")
    task = load_task("perplexity:text.txt")
    before = _content(task, Evaluator([task]))
    assert _content(task, Evaluator([task])) == before
    Path("text.txt").write_text("other words")
    assert _content(task, Evaluator([task])) != before


def test_a_study_that_another_program_made_is_left_alone() -> None:
    import optuna

    study = optuna.create_study(study_name="demo", storage="sqlite:///demo.search.db")
    study.set_user_attr("owner", "somebody")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(OutputError, match="its study 'demo' belongs to another program"):
        search(file_of(STEPS), ["tasks/yes"], trials=1)


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("nowhere/search.db", "nowhere/search.db: the storage cannot be used: unable to open database file"),
        ("demo.yml", "demo.yml: the storage cannot be used: file is not a database"),
        ("nosuch://host/name", "Addresses begin like postgresql://"),
        ("postgresql+psycopg://me:secret@host/name", r"postgresql\+psycopg://me:\*\*\*@host/name: the storage takes"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused(storage: str, reason: str) -> None:
    space = load_space(file_of(STEPS))
    with pytest.raises(OutputError, match=reason) as caught:
        open_study("demo", storage, sampler_of("tpe", space, 0), {}, fresh=False)
    assert "secret" not in str(caught.value)


def test_a_storage_that_fails_in_between_is_told(watch: Watch) -> None:
    def told(trial: Trial, best: Trial | None, goal: object) -> None:
        with sqlite3.connect("demo.search.db") as database:
            database.execute("DROP TABLE trials")

    with pytest.raises(OutputError, match=r"demo\.search\.db: the storage cannot be used: no such table: trials"):
        search(file_of(STEPS), ["tasks/yes"], trials=2, messages=Messages(trial=told))


def test_only_passwords_are_hidden() -> None:
    assert shown_storage("postgresql://host/name") == "postgresql://host/name"
    assert shown_storage("postgresql://me@host/name") == "postgresql://me@host/name"
    assert shown_storage("me:x@here.db") == "me:x@here.db"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials must be at least 1, not 0"),
        ({"timeout": 0}, "the timeout must be above 0 seconds"),
        ({"seed": -1}, "the seed must be from 0"),
        ({"sampler": "tpes"}, r"there is no sampler 'tpes'\. Did you mean `tpe`"),
        ({"sampler": "grid"}, r"a grid needs steps, and `parameters\.lambda` has none.*`step`"),
        ({"sampler": "cmaes"}, r"CMA-ES takes at least two ranges, and the recipe has 1\. Use --sampler tpe"),
        ({"split": "test"}, "chooses on validation and reports on test"),
        ({"out": "demo.yml"}, "the best recipe would replace the one with the marks"),
        ({"out": "nowhere/best.yml"}, "there is no such folder"),
        ({"out": "tasks"}, "this is a folder"),
        ({"out": "other.yml"}, "the file is there already, and no search wrote it"),
        ({"tasks": ["tasks/unvalidated"]}, "has no split 'validation'"),
        ({"tasks": ["tasks/untested"]}, "has no split 'test'"),
        ({"tasks": []}, "there is no task"),
    ],
    ids=str,
)
def test_a_mistake_is_found_before_any_trial(options: dict[str, Any], message: str) -> None:
    Path("other.yml").write_text("kept: true\n")
    with pytest.raises(UserError, match=message):
        search(file_of(RANGE), **{"tasks": ["tasks/yes"], "trials": 1, **options})
    assert Path("other.yml").read_text() == "kept: true\n"
    assert not Path("demo.search.db").exists()


def test_cmaes_with_choices_only_says_what_to_use() -> None:
    with pytest.raises(UserError, match=r"and the recipe has choices only\. Use --sampler tpe"):
        search(arithmetic({"choices": [0.1, 0.2]}), ["tasks/yes"], sampler="cmaes")


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(TaskError, match=r"pip install 'weldment\[search\]'"):
        search(RANGE, ["tasks/yes"], trials=1)


@pytest.mark.usefixtures("quick")
def test_examples_without_splits_are_noted(watch: Watch) -> None:
    Path("one.jsonl").write_text('{"text": "w1", "label": 1}\n{"text": "w2", "label": 0}\n')
    found = search(STEPS, ["one.jsonl"], trials=1, messages=watch.messages)
    note = "one is one file without splits: its scores in the table are on the examples that the recipe was chosen by"
    assert note in found.notes
    assert f"note: {note}" in watch.texts


def test_the_command_prints_a_line_for_each_trial_and_the_table() -> None:
    file_of(STEPS)
    result = weld("search", "demo.yml", "--task", "tasks/yes", "--trials", 2, "--sampler", "grid")
    assert result.code == 0, result.err
    lines = result.err.splitlines()
    assert lines[0].startswith("trial 0: parameters.lambda = ")
    assert lines[0].endswith("% of the experts, the best so far")
    assert lines[1].startswith("trial 1: ")
    assert "plain average" in result.out
    assert "written: demo.best.yml" in result.out
    assert weldment.plan("demo.best.yml").recipe.method == "task_arithmetic"
    again = weld("search", "demo.yml", "--task", "tasks/yes", "--trials", 2, "--sampler", "grid", "--json", "--quiet")
    assert again.err == ""
    document = json.loads(again.out)
    assert len(document["trials"]) == 2
    assert document["settings"]["storage"] == "demo.search.db"
    assert document["settings"]["seed"] == 0
    assert document["test"]["split"] == "test"
    assert document["best"]["value"] == max(trial["value"] for trial in document["trials"])


def test_the_command_ends_with_130_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trials.merged_state

    def pressed(recipe: Any, name: str) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(recipe, name)

    monkeypatch.setattr(trials, "merged_state", pressed)
    result = weld("search", file_of(STEPS), "--task", "tasks/yes", "--trials", 3)
    assert result.code == 130
    assert "interrupted: 1 of 3 trials are done; run the same command again to go on" in result.err
    assert "or with --trials 1 for the result so far" in result.err


def test_the_command_refuses_bad_marks_and_experts() -> None:
    result = weld("search", file_of(arithmetic({"search": [1, 0]})), "--task", "tasks/yes")
    assert result.code == 2
    assert "demo.yml: parameters.lambda.search: the ends are out of order" in result.err
    result = weld("search", file_of(STEPS), "--task", "tasks/yes", "--expert", "yes")
    assert result.code == 2
    assert "--expert: 'yes' is not TASK=PLACE" in result.err


def test_a_recipe_that_nothing_can_plan_is_refused_before_any_trial() -> None:
    with pytest.raises(RecipeError, match=r"demo\.yml: the recipe is not valid with merge_method = linea"):
        search(file_of({**STEPS, "merge_method": {"choices": ["task_arithmetic", "linea"]}}), ["tasks/yes"])
