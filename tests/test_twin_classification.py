"""Heads of experts in one model: the given task's, the routed one, and what pipelines make of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, pipeline

import weldment
from classifiers import save_classifier, texts
from twin_bundles import Expert, make_bundle, random_expert
from weldment.errors import CheckpointError, UserError
from weldment.twin.router import Router, RouterConfig

LABELS = {"mood": ("bad", "good"), "topic": ("sport", "art", "war"), "stars": ("LABEL_0",)}
ROWS = ["mood", "topic", "stars", "topic", "mood"]
TEXTS = texts(5, longest=6)


@dataclass
class Classifiers:
    wholes: dict[str, PreTrainedModel]
    shared: PreTrainedModel
    experts: dict[str, Expert]
    folder: Path
    twin: Any
    tokenizer: PreTrainedTokenizerBase

    def inputs(self) -> Any:
        return self.tokenizer(TEXTS, padding=True, return_tensors="pt")

    def expected(self, row: int, name: str) -> Tensor:
        """The logits of one expert's whole model for one text."""
        inputs = {key: value[row : row + 1] for key, value in self.inputs().items() if key != "token_type_ids"}
        with torch.no_grad():
            return self.wholes[name](**inputs).logits[0]


def made(kind: str, folder: Path) -> Classifiers:
    wholes = {n: save_classifier(folder / n, kind, labels=v, seed=s) for s, (n, v) in enumerate(LABELS.items())}
    shared = copy.deepcopy(wholes["mood"].base_model)
    experts: dict[str, Expert] = {}
    for seed, (name, whole) in enumerate(wholes.items()):
        experts[name] = expert = random_expert(shared, seed, skip=("pooler",), scale=0.2)
        expert.head = {key: t for key, t in whole.state_dict().items() if not key.startswith(whole.base_model_prefix)}
        expert.head_config = whole.config.to_dict() | {"architectures": [type(whole).__name__]}
        whole.base_model.load_state_dict(expert.whole(shared))
    bundle = make_bundle(folder / "bundle", shared, experts)
    twin = weldment.TwinModel.from_pretrained(bundle)
    return Classifiers(wholes, shared, experts, bundle, twin, AutoTokenizer.from_pretrained(bundle))


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert", "gpt2", "llama", "modernbert"])
def classifiers(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Classifiers:
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Classifiers:
    return made("bert", tmp_path_factory.mktemp("bert"))


def called(classifiers: Classifiers, **keys: Any) -> Any:
    inputs = {key: value for key, value in classifiers.inputs().items() if key != "token_type_ids"}
    with torch.no_grad():
        return classifiers.twin(**inputs, **keys)


def test_a_task_of_each_row_gives_the_logits_of_its_expert_and_nothing_elsewhere(classifiers: Classifiers) -> None:
    logits = called(classifiers, experts=ROWS, task=ROWS).logits
    assert logits.shape == (5, 6)
    for row, name in enumerate(ROWS):
        outputs = classifiers.twin.twin.outputs[classifiers.twin.expert_names.index(name)]
        expected = torch.full((6,), float("-inf"))
        expected[outputs.start : outputs.end] = classifiers.expected(row, name)
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_one_task_gives_its_logits_alone(classifiers: Classifiers) -> None:
    logits = called(classifiers, experts="topic", task="topic").logits
    expected = torch.stack([classifiers.expected(row, "topic") for row in range(5)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_without_a_task_the_head_is_that_of_the_largest_weight(bert: Classifiers) -> None:
    with torch.no_grad():
        torch.testing.assert_close(called(bert, experts=ROWS).logits, called(bert, experts=ROWS, task=ROWS).logits)


def test_a_pipeline_names_the_labels_of_the_routed_expert(bert: Classifiers) -> None:
    pipe: Any = pipeline("text-classification", model=bert.twin, tokenizer=bert.tokenizer)
    with bert.twin.weights(experts=["topic"]):
        found = pipe(TEXTS[0])
    probabilities = bert.expected(0, "topic").softmax(0)
    assert found[0]["label"] == f"topic/{LABELS['topic'][int(probabilities.argmax())]}"
    assert found[0]["score"] == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_answers_have_labels_scores_and_weights(bert: Classifiers) -> None:
    answers = bert.twin.classify(bert.inputs(), experts=ROWS)
    assert [answer.expert for answer in answers] == ROWS
    assert answers[1].labels == LABELS["topic"]
    assert sum(answers[1].scores) == pytest.approx(1.0)
    assert answers[2].scores == pytest.approx(bert.expected(2, "stars").tolist(), abs=1e-4)
    assert answers[0].weights == (1.0, 0.0, 0.0)
    assert answers[1].label == LABELS["topic"][int(bert.expected(1, "topic").argmax())]


def test_a_loss_needs_labels_of_single_choices(bert: Classifiers) -> None:
    with pytest.raises(UserError, match="a loss needs heads that all choose one label"):
        called(bert, experts=ROWS, labels=torch.zeros(5, dtype=torch.long))


def test_labels_count_within_the_head(tmp_path: Path, bert: Classifiers) -> None:
    experts = {name: bert.experts[name] for name in ("mood", "topic")}
    twin: Any = weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "out", bert.shared, experts))
    inputs = {"input_ids": bert.inputs()["input_ids"], "attention_mask": bert.inputs()["attention_mask"]}
    labels = torch.tensor([1, 2, 0, 1, 0])
    found = twin(**inputs, experts="topic", task="topic", labels=labels).loss
    expected = torch.stack([bert.expected(row, "topic") for row in range(5)])
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(expected, labels), rtol=1e-4, atol=1e-4)


def test_poolers_of_single_experts_are_parts_of_their_heads(tmp_path: Path) -> None:
    found = made("bert", tmp_path)
    for name, whole in found.wholes.items():
        with torch.no_grad():
            whole.bert.pooler.dense.weight.add_(0.3 * torch.randn_like(whole.bert.pooler.dense.weight))
        own = {key: t for key, t in whole.state_dict().items() if ".pooler." in key}
        found.experts[name].head |= own
    found.twin = weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "poolers", found.shared, found.experts))
    logits = called(found, experts="topic", task="topic").logits
    expected = torch.stack([found.expected(row, "topic") for row in range(5)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_with_and_without_heads_are_refused_unless_none_are_wanted(tmp_path: Path, bert: Classifiers) -> None:
    bare = Expert(bert.experts["mood"].factors)
    folder = make_bundle(tmp_path / "out", bert.shared, {**bert.experts, "bare": bare})
    with pytest.raises(UserError, match="the expert 'bare' has no head, and 'mood' has one"):
        weldment.TwinModel.from_pretrained(folder)
    with pytest.raises(UserError, match=r"the expert 'bare' has no head, and 'mood' has one.*task_class='BertModel'"):
        weldment.TwinModel.from_pretrained(folder, task_class="BertForSequenceClassification")
    twin: Any = weldment.TwinModel.from_pretrained(folder, task_class="BertModel")
    assert type(twin).__name__ == "BertModel"
    with pytest.raises(UserError, match="`task` chooses a head, and this model has none"):
        twin(**bert.inputs(), task="mood")
    with pytest.raises(UserError, match="the model has no heads"):
        twin.classify(bert.inputs())


def test_a_head_of_another_size_is_refused(tmp_path: Path, bert: Classifiers) -> None:
    damaged = copy.deepcopy(bert.experts)
    damaged["topic"].head["classifier.weight"] = torch.zeros(3, 5)
    with pytest.raises(CheckpointError, match=r"the head's classifier.weight is \[3, 5\], and BertForSequ"):
        weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "out", bert.shared, damaged))


def test_the_routers_first_choice_is_the_head(tmp_path: Path, bert: Classifiers) -> None:
    router = Router(RouterConfig("fixed", tuple(LABELS), expert="stars"), {})
    twin: Any = weldment.TwinModel.from_pretrained(make_bundle(tmp_path / "out", bert.shared, bert.experts, router))
    answers = twin.classify(bert.inputs())
    assert {answer.expert for answer in answers} == {"stars"}
    assert twin.classify(bert.inputs(), task="mood")[0].labels == LABELS["mood"]
