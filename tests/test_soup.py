"""Soups of tiny classifiers: against a plain greedy loop with transformers alone, and against what is written."""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import weldment
from folders import tree, weld
from models import BERT, perturbed, read_state, save_state
from weldment.errors import OutputError, TaskError, UserError
from weldment.evaluation.evaluate import evaluate
from weldment.evaluation.soups import soup as soups
from weldment.evaluation.soups.running_mean import RunningMean
from weldment.evaluation.soups.soup import SoupResult, checked_plan, recipe_of, soup
from weldment.evaluation.states import load_state

WORDS = [f"w{number}" for number in range(90)]
NOISE = (0.012, 0.008, 0.02, 0.05, 0.01)
"""Of the models; the fourth has forgotten much of the task."""


@dataclass(frozen=True)
class World:
    """Models around one that knows a task."""

    task: Path
    models: tuple[Path, ...]


def tokenizer() -> PreTrainedTokenizerFast:
    known = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


def margins(network: BertForSequenceClassification, texts: list[str]) -> np.ndarray:
    """Logit of the second class less that of the first; the texts have equally many words."""
    with torch.no_grad():
        logits = network(torch.tensor(tokenizer()(texts)["input_ids"])).logits
    return (logits[:, 1] - logits[:, 0]).numpy()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("soup")
    torch.manual_seed(3)
    network = BertForSequenceClassification(BertConfig(**BERT, num_labels=2)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(5.0 if name.endswith("weight") and "LayerNorm" not in name else 1.0)
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, size=6)) for _ in range(120)]
    found = margins(network, texts)
    with torch.no_grad():
        network.classifier.bias[1] -= float(np.median(found))
    labels = (found > np.median(found)).astype(int)
    write_task(folder / "words", texts, labels)
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    experts = []
    for seed, scale in enumerate(NOISE):
        network.load_state_dict(perturbed(start, seed, scale=scale))
        network.save_pretrained(folder / f"run-{seed}")
        tokenizer().save_pretrained(folder / f"run-{seed}")
        experts.append(folder / f"run-{seed}")
    return World(folder / "words", tuple(experts))


def write_task(folder: Path, texts: list[str], labels: np.ndarray) -> Path:
    folder.mkdir()
    description = {"name": "words", "labels": ["no", "yes"], "metric": "accuracy"}
    (folder / "task.json").write_text(json.dumps(description), encoding="utf-8")
    for name, part in {"validation": slice(0, 80), "test": slice(80, 120)}.items():
        rows = [{"text": text, "label": int(label)} for text, label in zip(texts[part], labels[part], strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def examples(task: Path, split: str) -> tuple[list[str], np.ndarray]:
    rows = [json.loads(line) for line in (task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], np.array([row["label"] for row in rows])


def plain_mean(folders: list[Path]) -> dict[str, torch.Tensor]:
    states = [read_state(folder) for folder in folders]
    return {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}


def plain_accuracy(folders: list[Path], task: Path, split: str) -> float:
    """Of the mean, without any of our code."""
    network = BertForSequenceClassification.from_pretrained(folders[0]).eval()
    network.load_state_dict(plain_mean(folders))
    texts, labels = examples(task, split)
    return float(((margins(network, texts) > 0) == labels).mean())


def plain_greedy(world: World) -> list[Path]:
    single = {model: plain_accuracy([model], world.task, "validation") for model in world.models}
    first, *others = sorted(world.models, key=lambda model: -single[model])
    kept, best = [first], single[first]
    for model in others:
        value = plain_accuracy([*kept, model], world.task, "validation")
        if value >= best:
            kept, best = [*kept, model], value
    return kept


@pytest.fixture(scope="module")
def greedy(world: World, tmp_path_factory: pytest.TempPathFactory) -> SoupResult:
    return soup(world.models, [world.task], tmp_path_factory.mktemp("greedy") / "out")


def value(scores: Any) -> float:
    return scores["words"].value


def test_a_greedy_soup_is_that_of_a_plain_loop(world: World, greedy: SoupResult) -> None:
    kept = plain_greedy(world)
    assert 2 <= len(kept) < len(world.models), "the test shows something only if models are kept and left out"
    assert list(greedy.soup.weights) == list(map(str, kept))
    assert value(greedy.soup.validation) == plain_accuracy(kept, world.task, "validation")
    assert value(greedy.soup.test) == plain_accuracy(kept, world.task, "test")
    assert value(greedy.uniform.test) == plain_accuracy(list(world.models), world.task, "test")
    for single in greedy.models:
        folders = list(map(Path, single.weights))
        assert value(single.validation) == plain_accuracy(folders, world.task, "validation")
        assert value(single.test) == plain_accuracy(folders, world.task, "test")


def test_single_models_stand_in_the_order_of_their_validation_scores(greedy: SoupResult) -> None:
    values = [single.value for single in greedy.models]
    assert values == sorted(values, reverse=True)
    assert next(iter(greedy.soup.weights)) in greedy.models[0].weights


def test_what_is_written_is_an_ordinary_merge(world: World, greedy: SoupResult, tmp_path: Path) -> None:
    weldment.merge(greedy.recipe, tmp_path / "again")
    assert read_state(tmp_path / "again").keys() == read_state(greedy.path).keys()
    assert tree(tmp_path / "again")["model.safetensors"] == tree(greedy.path)["model.safetensors"]
    weldment.verify(greedy.path)
    assert "linear" in (greedy.path / "README.md").read_text(encoding="utf-8")
    for name, tensor in plain_mean([Path(model) for model in greedy.soup.weights]).items():
        torch.testing.assert_close(read_state(greedy.path)[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_running_mean_is_bit_for_bit_what_a_merge_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    start = {"a.weight": torch.randn(7, 5), "b": torch.randn(11) * 1e-3, "steps": torch.tensor([3, 4])}
    folders = []
    for seed in range(5):
        state = {name: tensor.to(dtype if tensor.is_floating_point() else None) for name, tensor in start.items()}
        folders.append(str(save_state(tmp_path / str(seed), perturbed(state, seed), {"model_type": "bert"})))
    mean = RunningMean(checked_plan(folders), folders[0], load_state(folders[0]).tensors)
    for number, folder in enumerate(folders[1:], 2):
        tensors = load_state(folder).tensors
        found = dict(mean.with_(folder, tensors).tensors)
        mean.add(folder, tensors)
        written = read_state(weldment.merge(recipe_of(folders[:number]), tmp_path / f"mean-{number}").path)
        assert found.keys() == written.keys()
        assert all(found[name].dtype == written[name].dtype for name in found)
        assert all(torch.equal(found[name], written[name]) for name in found)
        exact = torch.stack([read_state(Path(f))["a.weight"].double() for f in folders[:number]]).mean(0)
        torch.testing.assert_close(found["a.weight"].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert mean.members == tuple(folders)


def test_a_candidate_that_is_left_out_leaves_no_trace(tmp_path: Path) -> None:
    folders = [str(save_state(tmp_path / str(n), {"a": torch.full((3,), float(n))})) for n in (1, 2, 5)]
    states = [load_state(folder).tensors for folder in folders]
    mean = RunningMean(checked_plan(folders), folders[0], states[0])
    assert mean.with_(folders[2], states[2]).tensors["a"].tolist() == [3.0] * 3
    assert mean.with_(folders[1], states[1]).tensors["a"].tolist() == [1.5] * 3
    assert states[0]["a"].tolist() == [1.0] * 3


def test_what_was_scored_is_what_was_written_in_bfloat16_too(world: World, tmp_path: Path) -> None:
    halves = []
    for model in world.models[:3]:
        halves.append(tmp_path / model.name)
        shutil.copytree(model, halves[-1])
        state = {name: tensor.bfloat16() for name, tensor in read_state(model).items()}
        save_state(halves[-1], state, {**json.loads((model / "config.json").read_text()), "dtype": "bfloat16"})
    found = soup(halves, [world.task], tmp_path / "out")
    assert {tensor.dtype for tensor in read_state(found.path).values()} == {torch.bfloat16}
    for split, scores in (("validation", found.soup.validation), ("test", found.soup.test)):
        again = evaluate(found.path, [world.task], split=split)
        assert value(scores) == value(again)


def test_test_examples_do_not_choose(world: World, greedy: SoupResult, tmp_path: Path) -> None:
    task = tmp_path / "words"
    shutil.copytree(world.task, task)
    texts, labels = examples(task, "test")
    rows = [json.dumps({"text": text, "label": 1 - int(label)}) for text, label in zip(texts, labels, strict=True)]
    (task / "test.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = soup(world.models, [task], tmp_path / "out")
    assert found.recipe == greedy.recipe
    assert [c.value for c in found.tried] == [c.value for c in greedy.tried]
    assert tree(found.path)["model.safetensors"] == tree(greedy.path)["model.safetensors"]
    assert value(found.soup.test) == pytest.approx(1 - value(greedy.soup.test))


def test_a_uniform_soup_takes_all(world: World, greedy: SoupResult, tmp_path: Path) -> None:
    chosen = world.models[2:4]
    found = soup(chosen, [world.task], tmp_path / "out", how="uniform")
    assert set(found.soup.weights) == set(map(str, chosen))
    assert not set(map(str, chosen)) & set(greedy.soup.weights), "a greedy soup would leave them out"
    assert value(found.soup.test) == value(found.uniform.test) == plain_accuracy(list(chosen), world.task, "test")


def test_learned_weights_begin_with_equal_ones_and_end_with_the_best(world: World, tmp_path: Path) -> None:
    pair = [world.models[1], world.models[3]]
    told: list[tuple[str, float, bool | None]] = []
    found = soup(pair, [world.task], tmp_path / "out", how="learned", trials=8, told=lambda *line: told.append(line))
    assert found.soup.name == f"learned soup of {len(found.soup.weights)}"
    assert set(found.tried[0].weights.values()) == {1.0}
    assert value(found.tried[0].validation) == plain_accuracy(pair, world.task, "validation")
    best = max(candidate.value for candidate in found.tried)
    assert found.soup.value == best > found.uniform.value
    assert [what for what, _, kept in told if kept is None] == ["run-1", "run-3"]
    assert sum(kept is not None for _, _, kept in told) == len(found.tried) == 8
    assert value(evaluate(found.path, [world.task], split="validation")) == best
    again = soup(pair, [world.task], tmp_path / "again", how="learned", trials=3)
    assert [one.weights for one in again.tried] == [one.weights for one in found.tried[:3]]


def test_in_memory_are_one_model_and_the_sum(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def tracked(reference: str | Path) -> Any:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        state = load_state(reference)
        # The network may keep the tensors of the first model as its own.
        if seen:
            alive.append(weakref.ref(state.tensors["bert.embeddings.word_embeddings.weight"]))
        seen.append(str(reference))
        return state

    seen: list[str] = []
    monkeypatch.setattr(soups, "load_state", tracked)
    soup(world.models[:3], [world.task], tmp_path / "out")
    assert len(seen) == 3 * 3 + 1
    assert most == 0, "an earlier model was still in memory when the next was read"


def test_several_tasks_count_equally(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.task, other)
    description = {"name": "other", "labels": ["no", "yes"], "metric": "matthews_corrcoef"}
    (other / "task.json").write_text(json.dumps(description), encoding="utf-8")
    found = soup(world.models[:2], [world.task, other], tmp_path / "out")
    scores = found.soup.validation
    assert found.soup.value == pytest.approx((scores["words"].value + scores["other"].value) / 2)
    assert scores["words"].value != pytest.approx(scores["other"].value)


def test_a_head_that_is_given_is_used(world: World, tmp_path: Path) -> None:
    found = soup(world.models[:2], [world.task], tmp_path / "out", heads={"words": world.models[3]})
    again = evaluate(world.models[0], [world.task], heads={"words": world.models[3]})
    single = next(single for single in found.models if str(world.models[0]) in single.weights)
    assert value(single.test) == value(again) != value(evaluate(world.models[0], [world.task]))


def test_the_command_prints_scores_and_the_recipe(world: World, greedy: SoupResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = weld("soup", *world.models, "--task", world.task, "--out", out, "--limit", 60)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["model", "validation", "test", "95", "%", "interval"]
    assert {line.split()[0] for line in lines[1:6]} == {model.name for model in world.models}
    assert lines[6].startswith("uniform soup of 5")
    assert lines[7].startswith("greedy soup of")
    assert lines[7].endswith("written")
    assert "merge_method: linear" in lines
    assert lines[-1].startswith(f"done: {out}")
    assert sum(line.endswith("  kept") or line.endswith("  not kept") for line in done.err.splitlines()) == 4
    again = weld("soup", *world.models, "--task", world.task, "--out", out)
    assert again.code == 2
    assert "not empty" in again.err
    other = weld("soup", *world.models[:2], "--task", world.task, "--out", out, "--overwrite", "--json", "--quiet")
    assert (other.code, other.err) == (0, "")
    record = json.loads(other.out)
    scores = {next(iter(single.weights)): single for single in greedy.models}
    for model in record["models"]:
        single = scores[next(iter(model["weights"]))]
        assert model["name"] == single.name
        assert model["test"] == [single.test["words"].record()]
    assert record["recipe"]["models"] == list(record["soup"]["weights"])
    assert value(evaluate(out, [world.task])) == record["soup"]["test"][0]["value"]


def test_tasks_without_a_test_split_leave_its_column_empty(world: World, tmp_path: Path) -> None:
    task = tmp_path / "words"
    shutil.copytree(world.task, task)
    (task / "test.jsonl").unlink()
    done = weld("soup", *world.models[:2], "--task", task, "--out", tmp_path / "out", "--uniform")
    assert done.code == 0, done.err
    assert all(line.split("–")[1:] for line in done.out.splitlines()[1:5])


def test_kinds_of_soups_exclude_each_other(world: World, tmp_path: Path) -> None:
    both = weld("soup", *world.models, "--task", world.task, "--out", tmp_path / "o", "--uniform", "--learned")
    assert both.code == 2
    assert "Give one of --greedy, --uniform and --learned" in both.err
    trials = weld("soup", *world.models, "--task", world.task, "--out", tmp_path / "o", "--trials", 3)
    assert trials.code == 2
    assert "--trials: only --learned has trials" in trials.err


def test_models_that_make_no_soup(world: World, tmp_path: Path) -> None:
    first, second = world.models[:2]
    out = tmp_path / "out"
    with pytest.raises(TaskError, match="a soup takes at least two models, not 1"):
        soup([first], [world.task], out)
    with pytest.raises(TaskError, match=r"run-0 and .*run-0/: the same model is there twice"):
        soup([first, second, f"{first}/"], [world.task], out)
    (tmp_path / "link").symlink_to(first)
    with pytest.raises(TaskError, match="the same model is there twice"):
        soup([first, tmp_path / "link"], [world.task], out)
    with pytest.raises(weldment.CheckpointError, match="nowhere"):
        soup([first, tmp_path / "nowhere"], [world.task], out)
    with pytest.raises(OutputError, match="the output is also an input"):
        soup([first, second], [world.task], first, overwrite=True)
    assert not out.exists()


def changed(model: Path, folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A copy of a model with other tensors and another configuration."""
    shutil.copytree(model, folder)
    old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return save_state(folder, {**read_state(model), **tensors}, {**old, **config})


def test_models_that_do_not_go_together(world: World, tmp_path: Path) -> None:
    first, second = world.models[:2]
    head = {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}
    other = changed(second, tmp_path / "three", head, id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(
        TaskError,
        match=r"three: tensors of another shape than in .*'classifier.bias' and 1 more, \[3\] and \[2\].*heads",
    ):
        soup([first, other], [world.task], tmp_path / "out")
    one = changed(first, tmp_path / "one", {}, id2label={"0": "no", "1": "yes"})
    two = changed(second, tmp_path / "two", {}, id2label={"0": "yes", "1": "no"})
    with pytest.raises(TaskError, match=r"two: labels in another order than in .*one: yes, no and no, yes"):
        soup([one, two], [world.task], tmp_path / "out")


def test_tasks_that_choose_no_soup(world: World, tmp_path: Path) -> None:
    pair = world.models[:2]
    with pytest.raises(TaskError, match=r"test: has no validation split. Soups are chosen by one"):
        soup(pair, [world.task / "test.jsonl"], tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("w1 w2", encoding="utf-8")
    with pytest.raises(TaskError, match="text: has no validation split"):
        soup(pair, [f"perplexity:{text}"], tmp_path / "out")
    task = tmp_path / "broken"
    shutil.copytree(world.task, task)
    (task / "test.jsonl").write_text('{"text": "w1", "label": 7}', encoding="utf-8")
    with pytest.raises(TaskError, match="the label 7 is not in the task's list"):
        soup(pair, [task], tmp_path / "out")
    with pytest.raises(TaskError, match="there is no task"):
        soup(pair, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_that_mean_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = world.models[:2]
    with pytest.raises(UserError, match=r"there is no soup 'tomato'. The soups are greedy, uniform, learned"):
        soup(pair, [world.task], tmp_path / "out", how="tomato")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="trials must be at least 1, not 0"):
        soup(pair, [world.task], tmp_path / "out", how="learned", trials=0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        TaskError, match=r"takes Optuna, which is missing. Install it: pip install 'weldment\[search\]'"
    ):
        soup(pair, [world.task], tmp_path / "out", how="learned")
