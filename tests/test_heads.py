"""Heads: which one a task gets, which of its outputs is which label, and those that do not belong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from classifiers import WORDS, save_classifier, save_tokenizer
from weldment import merge
from weldment.errors import CheckpointError, TaskError
from weldment.evaluation.heads import answers, choose_head, label_order, load_head
from weldment.evaluation.states import Head, ModelState, load_state
from weldment.evaluation.tasks import Task


def task(name: str = "films", labels: tuple[str, ...] | None = ("bad", "good")) -> Task:
    return Task(name, labels, "accuracy" if labels else "pearson", {}, {})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts with two and three labels and a regression, from one base without a head, and their mean with heads."""
    root = tmp_path_factory.mktemp("heads")
    for seed, (name, labels) in enumerate({"films": 2, "topics": 3, "alike": 1}.items()):
        save_classifier(root / name, labels=labels, seed=seed)
    model = save_classifier(root / "whole", seed=9)
    model.base_model.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    experts = [str(root / name) for name in ("films", "topics", "alike")]
    merge({"merge_method": "linear", "models": experts, "heads": ["classifier*"]}, root / "mean")
    return root


@pytest.fixture(scope="module")
def mean(root: Path) -> ModelState:
    return load_state(root / "mean")


def refusal(state: ModelState, wanted: Task, given: dict[str, Head] | None = None) -> str:
    with pytest.raises(TaskError) as caught:
        choose_head(state, wanted, given or {})
    return str(caught.value)


def test_a_merge_has_a_head_for_each_task_by_its_name(root: Path, mean: ModelState) -> None:
    for name, labels in {"films": ("a", "b"), "topics": ("a", "b", "c"), "alike": None}.items():
        head = choose_head(mean, task(name, labels), {})
        own = load_state(root / name).tensors["classifier.weight"]
        assert torch.equal(head.tensors["classifier.weight"], own)
        assert len(head.config["id2label"]) == (len(labels) if labels else 1)


def test_a_head_that_is_given_comes_before_the_models_own(root: Path, mean: ModelState) -> None:
    given = load_head(root / "whole")
    for state in (mean, load_state(root / "films")):
        assert choose_head(state, task(), {"films": given}).tensors is given.tensors
        assert choose_head(state, task(), {"topics": given}).tensors is not given.tensors


def test_heads_in_files(root: Path) -> None:
    with_config = load_head(root / "mean" / "heads" / "topics.safetensors")
    assert len(with_config.config["id2label"]) == 3
    assert with_config.folder == root / "mean"
    assert load_head(root / "topics" / "model.safetensors").tensors.keys() == with_config.tensors.keys()


def test_a_head_in_a_file_without_a_configuration_has_the_labels_that_it_has_outputs(
    root: Path, tmp_path: Path
) -> None:
    """Names of adapters are those of the model."""
    tensors = {f"base_model.model.{name}": tensor for name, tensor in load_head(root / "topics").tensors.items()}
    save_file(tensors, tmp_path / "mine.safetensors")
    head = load_head(tmp_path / "mine.safetensors")
    assert (dict(head.config), head.folder) == ({}, None)
    base = load_state(root / "base")
    assert len(choose_head(base, task("topics", ("a", "b", "c")), {"topics": head}).config["id2label"]) == 3
    assert refusal(base, task("films"), {"films": head}).startswith(
        "base: its head has 3 outputs, and the task 'films'"
    )


def test_the_outputs_are_counted_even_where_the_configuration_is_silent(root: Path) -> None:
    """Configurations of two labels do not name them, and an adapter's model has its base's configuration."""
    state = load_state(root / "topics")
    silent = {key: value for key, value in state.config.items() if key not in ("id2label", "label2id")}
    head = choose_head(replace(state, config=silent), task("t", ("a", "b", "c")), {})
    assert head.config["id2label"] == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_a_model_without_a_head_or_without_one_for_the_task(root: Path, mean: ModelState) -> None:
    assert refusal(load_state(root / "base"), task()) == (
        "base: has no head for the task 'films'. Give one: --head films=FOLDER or FILE"
    )
    assert refusal(mean, task("cola")) == (
        "mean: has no head for the task 'cola'; it has heads for alike, films, topics. "
        "Give one: --head cola=FOLDER or FILE"
    )


def test_heads_with_another_number_of_outputs(root: Path, mean: ModelState) -> None:
    assert refusal(load_state(root / "topics"), task()) == (
        "topics: its head has 3 outputs, and the task 'films' has 2 labels. "
        "Give the head that was trained on it: --head films=FOLDER or FILE"
    )
    assert refusal(mean, task("alike")).startswith("mean: its head has 1 output, and the task 'alike' has 2 labels.")
    assert refusal(mean, task("films", None)).startswith(
        "mean: its head has 2 outputs, and the task 'films' is a regression, which takes 1."
    )


def test_heads_of_another_kind_of_model(root: Path, mean: ModelState, tmp_path: Path) -> None:
    save_classifier(tmp_path / "distil", "distilbert")
    assert refusal(mean, task(), {"films": load_head(tmp_path / "distil")}) == (
        "mean: the head for 'films' is that of a model of the type 'distilbert', and this is one of 'bert'. "
        "Give the head of a model that was fine-tuned from the same base"
    )


def test_heads_that_were_trained_with_another_tokenizer(root: Path, mean: ModelState, tmp_path: Path) -> None:
    """Files that are only written otherwise, or have more tokens, are no other tokenizer."""
    given = {"films": load_head(root / "whole")}
    for name, words in {"more": (*WORDS, "new"), "turned": WORDS[::-1]}.items():
        save_tokenizer(tmp_path / name, words)
    text = (root / "whole" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "compact").mkdir()
    (tmp_path / "compact" / "tokenizer.json").write_text(json.dumps(json.loads(text)), encoding="utf-8")
    (tmp_path / "none").mkdir()
    for fine in ("more", "compact", "none"):
        choose_head(replace(mean, folder=tmp_path / fine), task(), given)
    assert refusal(replace(mean, folder=tmp_path / "turned"), task(), given) == (
        "mean: the head for 'films' comes from a model that has another tokenizer than this one: "
        "92 tokens have other numbers: 'w0' is 4 and 95, 'w1' is 5 and 94, 'w2' is 6 and 93. "
        "Give a head that was trained with this model's tokenizer"
    )


def test_places_without_a_head(root: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"base: has no head. Give a model with a classifier, or a file of heads/"):
        load_head(root / "base")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_head(tmp_path / "nowhere")
    (tmp_path / "short.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"short.safetensors: cannot be read: "):
        load_head(tmp_path / "short.safetensors")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"0": "Good", "1": "BAD", "2": "so so"}, [2, 0, 1]),
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, [0, 1, 2]),
        ({"0": "good", "1": "bad", "2": "awful"}, [0, 1, 2]),
        ({}, [0, 1, 2]),
    ],
)
def test_outputs_are_matched_by_name_where_all_names_are_known(named: dict[str, str], expected: list[int]) -> None:
    assert label_order(("bad", "so so", "good"), {"id2label": named}).tolist() == expected


def test_answers_are_positions_of_labels_or_numbers() -> None:
    logits = np.array([[0.5, -1.0], [0.1, 0.4]], dtype=np.float32)
    turned = {"id2label": {"0": "good", "1": "bad"}}
    assert answers(logits, task(), turned).tolist() == [1, 0]
    assert answers(logits, task(), {}).tolist() == [0, 1]
    numbers = answers(logits[:, :1], task("t", None), {})
    assert (numbers.dtype, numbers.tolist()) == (np.float64, pytest.approx([0.5, 0.1]))
