"""Recipes compared with experts and baselines: who takes part, what is scored with which head, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from folders import weld
from lora_folders import write_lora
from models import BERT, perturbed
from weldment import merge
from weldment.errors import PlanError, TaskError, UserError
from weldment.evaluation.comparison.compare import compare
from weldment.evaluation.comparison.lineup import ARITHMETIC, AVERAGED, line_up
from weldment.evaluation.comparison.rows import AVERAGE, Comparison, Row, mean_row, score_row
from weldment.evaluation.evaluate import Evaluator, evaluate
from weldment.evaluation.heads import load_head
from weldment.evaluation.scores import Score
from weldment.evaluation.states import load_state, merged_state
from weldment.evaluation.tasks import load_task

WORDS = [f"w{number}" for number in range(88)]
EXAMPLES = 24
LABELS = {"alpha": 2, "beta": 3}
Write = Callable[..., str]


def tokenizer(folder: Path, words: list[str]) -> None:
    listed = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    vocabulary = {token: row for row, token in enumerate(listed)}
    BertTokenizerFast(vocab=vocabulary, model_max_length=32).save_pretrained(folder)


@dataclass(frozen=True)
class World:
    """A base without a head and an expert for each task, in folders; the tasks are what the experts mostly say."""

    root: Path

    @property
    def tasks(self) -> list[Path]:
        return [self.root / "tasks" / name for name in LABELS]

    @property
    def experts(self) -> list[str]:
        return [str(self.root / name) for name in LABELS]

    @property
    def base(self) -> str:
        return str(self.root / "base")

    def recipe(self, method: str = "task_arithmetic", **keys: Any) -> dict[str, Any]:
        based = {} if method == "linear" else {"base_model": self.base}
        return {"merge_method": method, "models": self.experts, "heads": ["classifier*"], **based, **keys}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    start = BertForSequenceClassification(BertConfig(**BERT, num_labels=2))
    start.bert.save_pretrained(root / "base")
    tokenizer(root / "base", WORDS)
    backbone = {name: tensor.detach() for name, tensor in start.bert.state_dict().items()}
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        expert = BertForSequenceClassification(BertConfig(**BERT, num_labels=labels))
        expert.bert.load_state_dict(perturbed(backbone, seed, scale=0.2))
        torch.nn.init.normal_(expert.classifier.weight, std=2.0)
        expert.save_pretrained(root / name)
        tokenizer(root / name, WORDS)
        write_task(root, name, labels, seed)
    return World(root)


def write_task(root: Path, name: str, labels: int, seed: int) -> None:
    """Random texts; the labels are the expert's answers, but every fourth is another."""
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(WORDS, 6)) for _ in range(EXAMPLES)]
    folder = root / "tasks" / name
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"labels": [f"l{n}" for n in range(labels)], "metric": "accuracy"}))
    network = BertForSequenceClassification.from_pretrained(root / name).eval()
    tokens = BertTokenizerFast.from_pretrained(root / name)(texts, return_tensors="pt")
    with torch.no_grad():
        said = network(**tokens).logits.argmax(dim=1).tolist()
    answers = [(label + (place % 4 == 0)) % labels for place, label in enumerate(said)]
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, answers, strict=True)]
    (folder / "test.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def compared(world: World) -> Comparison:
    return compare([world.recipe("ties", parameters={"density": 0.5})], world.tasks)


def values(row: Row) -> dict[str, float]:
    return {task: score.value for task, score in row.scores.items()}


def test_the_experts_come_first_then_the_base_and_the_baselines_then_the_merges(compared: Comparison) -> None:
    rows = [(row.name, row.kind) for row in compared.rows]
    assert rows == [
        *[("alpha", "expert"), ("beta", "expert"), ("base", "base")],
        *[(AVERAGED, "baseline"), (ARITHMETIC, "baseline"), ("ties", "merge")],
    ]
    assert compared.experts == {"alpha": "alpha", "beta": "beta"}


def test_each_expert_has_the_known_score_on_its_own_task(compared: Comparison) -> None:
    for name in LABELS:
        assert compared.row(name).scores[name].value == pytest.approx(0.75)
        assert compared.relative(compared.row(name))[name].value == pytest.approx(100)


def test_experts_and_base_are_scored_on_a_task_with_the_head_of_its_expert(world: World, compared: Comparison) -> None:
    head = {"beta": world.experts[1]}
    for name, model in {"alpha": world.experts[0], "base": world.base}.items():
        alone = evaluate(model, world.tasks[1:], heads=head)
        assert compared.row(name).scores["beta"].value == pytest.approx(alone["beta"].value)


@pytest.mark.parametrize(
    ("row", "method", "parameters"),
    [
        (AVERAGED, "linear", {}),
        (ARITHMETIC, "task_arithmetic", {"lambda": 0.3}),
        ("ties", "ties", {"density": 0.5}),
    ],
)
def test_merges_score_as_those_that_are_written(
    world: World, compared: Comparison, tmp_path: Path, row: str, method: str, parameters: dict[str, float]
) -> None:
    written = merge(world.recipe(method, parameters=parameters), tmp_path / "out").path
    expected = {task: score.value for task, score in evaluate(written, world.tasks).items()}
    assert values(compared.row(row)) == pytest.approx(expected)
    assert compared.row(row).nbytes == sum(
        tensor.nbytes for file in written.rglob("*.safetensors") for tensor in load_file(file).values()
    )


def test_an_equal_merge_is_scored_once_and_said_to_be_equal(world: World) -> None:
    asked: list[str] = []
    recipes = [world.recipe("linear"), world.recipe("task_arithmetic", parameters={"lambda": 0.9})]
    found = compare(recipes, world.tasks, report=lambda what, count, total: asked.append(what))
    assert values(found.row("linear")) == values(found.row(AVERAGED))
    assert f"linear is the same model as {AVERAGED}, scored once" in found.notes
    assert not any(what.startswith("linear on") for what in asked)
    assert any(what.startswith("task_arithmetic on") for what in asked)


def test_recipes_without_heads_are_scored_with_those_of_the_experts(world: World) -> None:
    recipe = world.recipe(parameters={"lambda": 0.3}, heads=[], drop=["classifier*"])
    found = compare([recipe], world.tasks)
    assert values(found.row("task_arithmetic")) == values(found.row(ARITHMETIC))


def test_random_masks_are_drawn_for_each_seed(world: World) -> None:
    recipe = world.recipe("dare_linear", parameters={"density": 0.3, "weight": 1.5}, seed=7)
    found = compare([recipe, world.recipe("ties")], world.tasks[1:], seeds=2)
    row = found.row("dare_linear")
    states = [merged_state({**recipe, "seed": seed}, "m") for seed in (7, 8)]
    assert any(not torch.equal(tensor, states[1].tensors[name]) for name, tensor in states[0].tensors.items())
    alone = [Row("", "merge", evaluate(state, world.tasks[1:])) for state in states]
    assert [{task: score.value for task, score in run.items()} for run in row.runs] == [values(one) for one in alone]
    assert values(row)["beta"] == pytest.approx(np.mean([values(one)["beta"] for one in alone]))
    percents = [100 * values(one)["beta"] / 0.75 for one in alone]
    assert found.spread(row)["beta"] == pytest.approx(np.std(percents, ddof=1))
    assert found.row("ties").runs == ()
    assert found.spread(found.row("ties")) == {}


def test_one_draw_of_random_masks_is_said_to_be_one(world: World) -> None:
    found = compare([world.recipe("dare_linear", parameters={"density": 0.5})], world.tasks[:1])
    assert any("dare_linear: one draw of random masks" in note for note in found.notes)


def test_a_task_without_an_expert_has_no_percents_and_a_note(world: World, tmp_path: Path) -> None:
    other = tmp_path / "gamma"
    other.mkdir()
    (other / "task.json").write_text((world.tasks[1] / "task.json").read_text())
    (other / "test.jsonl").write_text((world.tasks[1] / "test.jsonl").read_text())
    found = compare([world.recipe()], [*world.tasks, other], heads={"gamma": world.experts[1]})
    row = found.row("task_arithmetic")
    assert "gamma" not in found.relative(row)
    assert row.scores["gamma"].value == row.scores["beta"].value
    assert any(note.startswith("gamma: no expert among the models") for note in found.notes)
    asked: list[str] = []
    with pytest.raises(TaskError, match=r"no head for the task 'gamma', and no model is its expert\. Give --head"):
        compare([world.recipe()], [*world.tasks, other], report=lambda what, count, total: asked.append(what))
    assert asked == []


def test_an_expert_can_be_named_and_be_one_that_is_not_merged(world: World) -> None:
    recipe = world.recipe(models=world.experts[:1])
    found = compare([recipe], world.tasks, experts={"beta": world.experts[1]})
    assert found.experts == {"alpha": "alpha", "beta": "beta"}
    assert found.row("beta").kind == "expert"
    swapped = compare([world.recipe()], world.tasks[:1], experts={"alpha": "alpha"})
    assert swapped.experts == {"alpha": "alpha"}


def test_a_model_without_a_head_for_a_task_is_refused_or_left_out_there(world: World) -> None:
    evaluator, state = Evaluator([load_task(task) for task in world.tasks]), load_state(world.base)
    heads = {"alpha": load_head(world.experts[0])}
    told: list[str] = []
    row = score_row(evaluator, state, heads=heads, left_out=lambda task, error: told.append(f"{task}: {error.cause}"))
    assert list(row.scores) == ["alpha"]
    assert len(told) == 1
    assert told[0].startswith("beta: has no head")
    with pytest.raises(TaskError, match="has no head for the task 'beta'"):
        score_row(evaluator, state, heads=heads)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(content: object, name: str = "recipe.yml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return written


def test_recipes_in_files_are_named_after_them_or_by_their_paths(world: World, write: Write) -> None:
    files = [write(world.recipe(), name) for name in ("one/same.yml", "two/same.yml", "three.yml", "alpha.yml")]
    lineup = line_up(files, list(LABELS), base=None, experts={})
    assert list(lineup.entries) == [files[0], files[1], "three", files[3]]
    assert lineup.experts == dict(zip(LABELS, world.experts, strict=True))
    assert lineup.base == world.base


def test_models_are_the_same_however_their_paths_are_written(world: World) -> None:
    longer = [f"{expert}/../{Path(expert).name}" for expert in world.experts]
    based = [world.base, *longer]
    recipes = [world.recipe(), world.recipe(models=based, base_model=f"{world.base}/")]
    lineup = line_up(recipes, list(LABELS), base=None, experts={})
    assert list(lineup.experts.values()) == world.experts
    assert list(lineup.entries) == ["task_arithmetic (1)", "task_arithmetic (2)"]


def test_the_first_model_of_an_interpolation_is_an_expert_and_no_base(world: World) -> None:
    recipe = world.recipe("slerp", base_model=world.experts[0], parameters={"t": 0.5})
    lineup = line_up([recipe], list(LABELS), base=world.base, experts={})
    assert list(lineup.experts.values()) == world.experts
    with pytest.raises(PlanError, match="names no base model"):
        line_up([recipe], list(LABELS), base=None, experts={})


def test_the_experts_of_a_recipe_of_adapters_are_the_base_with_each(world: World, tmp_path: Path) -> None:
    modules = {"encoder.layer.0.attention.self.query": (32, 32)}
    adapters = [str(write_lora(tmp_path / name, modules=modules, seed=seed)) for seed, name in enumerate(LABELS)]
    recipe = {"merge_method": "linear", "base_model": world.base, "models": adapters}
    lineup = line_up([recipe], list(LABELS), base=None, experts={})
    assert lineup.experts == {name: f"{world.base}+{path}" for name, path in zip(LABELS, adapters, strict=True)}
    assert lineup.tasks == {name: name for name in LABELS}


def scored(task: str, value: float, noise: float = 0.0, **keys: Any) -> Score:
    """A score whose resamples spread by `noise`, those of all scores in the same way."""
    steps = np.random.default_rng(0).standard_normal(400)
    return Score(task, "accuracy", value, 10, value + noise * steps, **keys)


def table(*rows: Row, tasks: tuple[str, ...] = ("a", "b")) -> Comparison:
    names = {"a": "ea", "b": "eb"}
    experts = {task: names[task] for task in tasks if any(row.name == names[task] for row in rows)}
    return Comparison(tasks, dict.fromkeys(tasks, "accuracy"), dict.fromkeys(tasks, 10), rows, experts)


EXPERTS = (
    Row("ea", "expert", {"a": scored("a", 0.8), "b": scored("b", 0.1)}),
    Row("eb", "expert", {"a": scored("a", 0.2), "b": scored("b", 0.5)}),
)


def test_percents_are_of_each_tasks_expert_and_averaged() -> None:
    merged = Row("m", "merge", {"a": scored("a", 0.6), "b": scored("b", 0.5)})
    found = table(*EXPERTS, merged).relative(merged)
    assert {column: score.value for column, score in found.items()} == pytest.approx(
        {"a": 75.0, "b": 100.0, AVERAGE: 87.5}
    )
    assert table(*EXPERTS, merged).absolute(merged)[AVERAGE].value == pytest.approx(0.55)


def test_an_expert_with_a_score_of_zero_gives_no_percents() -> None:
    nothing = Row("eb", "expert", {"a": scored("a", 0.2), "b": scored("b", 0.0)})
    merged = Row("m", "merge", {"a": scored("a", 0.6), "b": scored("b", 0.5)})
    found = table(EXPERTS[0], nothing, merged).relative(merged)
    assert {column: score.value for column, score in found.items()} == pytest.approx({"a": 75.0, AVERAGE: 75.0})


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_an_expert_that_is_worse_than_chance_gives_no_percents(value: float) -> None:
    """Of a negative coefficient, twice as bad would be 200 %."""
    bad = Row("eb", "expert", {"a": scored("a", 0.2), "b": scored("b", value)})
    merged = Row("m", "merge", {"a": scored("a", 0.6), "b": scored("b", -0.2)})
    found = table(EXPERTS[0], bad, merged).relative(merged)
    assert {column: score.value for column, score in found.items()} == pytest.approx({"a": 75.0, AVERAGE: 75.0})


def test_an_expert_that_was_not_scored_on_its_task_gives_no_percents() -> None:
    left_out = Row("eb", "expert", {"a": scored("a", 0.2)})
    merged = Row("m", "merge", {"a": scored("a", 0.6), "b": scored("b", 0.5)})
    found = table(EXPERTS[0], left_out, merged).relative(merged)
    assert {column: score.value for column, score in found.items()} == pytest.approx({"a": 75.0, AVERAGE: 75.0})


def test_only_merges_are_marked_and_those_within_noise_of_the_best_are_near() -> None:
    rng = np.random.default_rng(1)
    noisy = Score("a", "accuracy", 0.69, 10, 0.69 + 0.1 * rng.standard_normal(400))
    best, worse = Row("best", "baseline", {"a": scored("a", 0.7)}), Row("worse", "merge", {"a": scored("a", 0.6)})
    rows = (EXPERTS[0], best, worse, Row("noisy", "merge", {"a": noisy}), replace(best, name="twin", kind="merge"))
    marks = table(*rows, tasks=("a",)).marks(relative=True)
    expected = {"best": "best", "twin": "best", "noisy": "near"}
    assert marks == {(name, column): mark for name, mark in expected.items() for column in ("a", AVERAGE)}


def test_of_perplexities_the_lowest_is_best_and_there_is_no_average() -> None:
    rows = [
        Row(name, "merge", {"a": scored("a", value, higher_is_better=False)}) for name, value in (("x", 9), ("y", 8))
    ]
    found = table(*rows, tasks=("a",))
    assert found.best(relative=False) == {"a": "y"}
    assert AVERAGE not in found.absolute(rows[0])


def test_the_mean_over_seeds_keeps_resamples_paired() -> None:
    rows = [
        Row("m", "merge", {"a": scored("a", value, noise=0.1, details={"bits": value})}, seconds=value)
        for value in (0.4, 0.6)
    ]
    merged = mean_row(rows)
    assert merged.scores["a"].details == {"bits": pytest.approx(0.5)}
    assert merged.scores["a"].value == pytest.approx(0.5)
    assert merged.scores["a"].samples == pytest.approx(scored("a", 0.5, noise=0.1).samples)
    assert merged.seconds == pytest.approx(0.5)
    assert len(merged.runs) == 2


def test_all_recipes_are_planned_before_anything_is_scored(world: World) -> None:
    asked: list[str] = []
    recipes = [world.recipe(), world.recipe("ties", heads=["head*"]), world.recipe("ties", heads=["tail*"])]
    with pytest.raises(UserError, match=r"2 problems:\n.*'head\*' fits no tensor(.|\n)*'tail\*' fits no tensor"):
        compare(recipes, world.tasks, report=lambda what, count, total: asked.append(what))
    assert asked == []


def test_models_of_different_tokenizers_are_refused(world: World, tmp_path: Path) -> None:
    other = tmp_path / "beta"
    other.mkdir()
    (other / "config.json").write_text((Path(world.experts[1]) / "config.json").read_text())
    save_file(load_file(Path(world.experts[1]) / "model.safetensors"), other / "model.safetensors")
    tokenizer(other, WORDS[::-1])
    dropping = {"take": {"*word_embeddings*": world.base}}
    recipe = world.recipe(models=[world.experts[0], str(other)], **dropping)
    with pytest.raises(TaskError, match="beta: has another tokenizer than base: 88 tokens have other numbers: 'w"):
        compare([recipe], world.tasks)


def two_bases(world: World) -> dict[str, Any]:
    return {"recipes": [world.recipe(), world.recipe("ties", base_model=world.experts[1], models=world.experts[:1])]}


def same_names(world: World) -> dict[str, Any]:
    twin = world.root / "twins" / "alpha"
    twin.parent.mkdir(exist_ok=True)
    if not twin.exists():
        twin.mkdir()
        for file in Path(world.experts[0]).iterdir():
            (twin / file.name).write_bytes(file.read_bytes())
    return {"recipes": [world.recipe(models=[*world.experts, str(twin)])]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda world: {"recipes": []}, "there is no recipe to compare. Give a recipe"),
        (lambda world: {"tasks": []}, "there is no task. Give --task DIR"),
        (lambda world: {"recipes": ["nowhere.yml"]}, "nowhere.yml: there is no such file"),
        (lambda world: {"recipes": [world.recipe("linear")]}, "names no base model.*--base MODEL"),
        (two_bases, "different base models: .*base and .*beta. Say which one"),
        (lambda world: {"experts": {"delta": "x"}}, "--expert: there is no task 'delta'.*The tasks are alpha, beta"),
        (same_names, "two models are called like the task 'alpha': .*alpha and .*twins/alpha.*--expert alpha="),
        (lambda world: {"seeds": 0}, "--seeds: seeds must be at least 1, not 0"),
        (lambda world: {"base": "/nowhere/at/all"}, "/nowhere/at/all"),
        (lambda world: {"heads": {"delta": world.experts[0]}}, "--head: there is no task 'delta'"),
    ],
)
def test_bad_input_is_named(world: World, change: Callable[[World], dict[str, Any]], message: str) -> None:
    given = {"recipes": [world.recipe()], "tasks": world.tasks, **change(world)}
    with pytest.raises(UserError, match=f"(?s){message}"):
        compare(given.pop("recipes"), given.pop("tasks"), **given)


def test_a_recipe_given_twice_is_refused(world: World, write: Write) -> None:
    path = write(world.recipe())
    with pytest.raises(UserError, match="the recipe is given twice"):
        line_up([path, path], list(LABELS), base=None, experts={})


def test_the_command_prints_tables_and_saves_four_files(world: World, write: Write, tmp_path: Path) -> None:
    path, out = write(world.recipe(parameters={"lambda": 0.9}), "strong.yml"), tmp_path / "out"
    tasks = [word for task in world.tasks for word in ("--task", task)]
    done = weld("compare", path, *tasks, "--out", out)
    assert (done.code, sorted(file.name for file in out.iterdir())) == (
        0,
        [f"comparison.{ending}" for ending in ("csv", "html", "json", "md")],
    )
    assert "strong" in done.out
    assert "Percent of each task's expert" in done.out
    assert "strong: alpha 0." in done.err
    saved = json.loads((out / "comparison.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["alpha", "beta", "base", AVERAGED, ARITHMETIC, "strong"]
    again = weld("compare", path, *tasks, "--out", out, "--json", "--quiet")
    assert (again.code, again.err) == (0, "")
    assert [row["scores"] for row in json.loads(again.out)["rows"]] == [row["scores"] for row in saved["rows"]]


def test_the_command_replaces_no_file_of_others(world: World, write: Write, tmp_path: Path) -> None:
    path, out = write(world.recipe()), tmp_path / "out"
    out.mkdir()
    (out / "comparison.md").write_text("# My own\n")
    given = ("compare", path, "--task", world.tasks[0], "--out", out, "--quiet")
    done = weld(*given)
    assert done.code == 2
    assert "comparison.md: is in the way, and no file of an earlier comparison" in done.err
    assert "--overwrite" in done.err
    assert weld(*given, "--overwrite").code == 0
    assert "My own" not in (out / "comparison.md").read_text()
    inside = weld("compare", path, "--task", world.tasks[0], "--out", path)
    assert (inside.code, "is no folder" in inside.err) == (2, True)


def test_a_task_among_the_recipes_is_named(world: World, write: Write) -> None:
    done = weld("compare", write(world.recipe()), "--task", *world.tasks)
    assert (done.code, "beta: is a task, not a recipe" in done.err, "before each task" in done.err) == (2, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'RECIPE'"),
        (["recipe.yml"], "Missing option '--task'"),
        (["recipe.yml", "--task", "x", "--expert", "alpha"], "--expert: 'alpha' is not TASK=PLACE"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments: list[str], message: str) -> None:
    done = weld("compare", *arguments)
    assert done.code == 2
    assert message in done.err
