"""Networks from tensors in memory: the same answers as transformers gives, whatever was loaded before."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedModel

from classifiers import KINDS, save_classifier
from models import ARCHITECTURES, read_state, save_family, save_state
from weldment.errors import TaskError
from weldment.evaluation.networks import config_of, head_of, outputs_of
from weldment.evaluation.sharing import Networks
from weldment.evaluation.states import Head, ModelState, load_state, merged_state

SHARING = [kind for kind in KINDS if kind != "mixtral"]
Saved = Callable[[str, int, int], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a classifier of a kind with some labels and from a seed; each is made once."""
    root = tmp_path_factory.mktemp("classifiers")

    def save(kind: str, labels: int, seed: int) -> Path:
        folder = root / f"{kind}-{labels}-{seed}"
        if not folder.exists():
            save_classifier(folder, kind, labels=labels, seed=seed)
        return folder

    return save


def answers(network: PreTrainedModel) -> Tensor:
    """Logits of two texts, the second one padded."""
    ids = torch.tensor([[2, 7, 30, 9, 11, 3], [2, 50, 6, 3, 0, 0]])
    with torch.inference_mode():
        return network(input_ids=ids, attention_mask=(ids != 0).long()).logits.clone()


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def stored(folder: Path) -> Tensor:
    return answers(loaded(folder))


def with_body_of(expert: PreTrainedModel, body: PreTrainedModel) -> Tensor:
    """The answers with the head of one expert and all else from another."""
    before = deepcopy(expert.base_model.state_dict())
    expert.base_model.load_state_dict(body.base_model.state_dict())
    found = answers(expert)
    expert.base_model.load_state_dict(before)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_networks_answer_as_transformers_does(kind: str, saved: Saved) -> None:
    """Of the first model, of another head around its backbone, and of the next model."""
    folders = [saved(kind, 2, 1), saved(kind, 3, 2)]
    first, second = states = [load_state(folder) for folder in folders]
    heads = [head_of(state) for state in states]
    one, other = map(loaded, folders)
    networks = Networks()
    networks.use(first)
    torch.testing.assert_close(answers(networks.classifier(heads[0])), answers(one), rtol=0, atol=0)
    torch.testing.assert_close(answers(networks.classifier(heads[1])), with_body_of(other, one), rtol=0, atol=0)
    networks.use(second)
    torch.testing.assert_close(answers(networks.classifier(heads[1])), answers(other), rtol=0, atol=0)
    torch.testing.assert_close(answers(networks.classifier(heads[0])), with_body_of(one, other), rtol=0, atol=0)


@pytest.mark.parametrize("kind", SHARING)
def test_heads_share_one_backbone_and_models_replace_each_other_in_it(kind: str, saved: Saved) -> None:
    first, second = (load_state(saved(kind, labels, seed)) for labels, seed in ((2, 1), (3, 2)))
    networks = Networks()
    networks.use(first)
    one, other = (networks.classifier(head_of(state)) for state in (first, second))
    assert one.base_model is other.base_model
    networks.use(second)
    assert networks.classifier(head_of(second)) is other


def test_models_stay_as_they_are_when_others_replace_them(saved: Saved) -> None:
    """transformers may take the very tensors it is given."""
    state = load_state(saved("bert", 2, 1))
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    networks = Networks()
    networks.use(state)
    networks.classifier(head_of(state))
    other = load_state(saved("bert", 2, 2))
    networks.use(other)
    networks.classifier(head_of(other))
    assert all(torch.equal(tensor, state.tensors[name]) for name, tensor in before.items())


@pytest.mark.parametrize("prefixed", [True, False])
def test_models_whose_names_lack_the_prefix_are_found_all_the_same(prefixed: bool, saved: Saved) -> None:
    """As first model and as the next one; base models are stored so."""
    folder = saved("bert", 2, 1)
    expert = load_state(folder)
    bare = {name.removeprefix("bert."): t for name, t in expert.tensors.items() if name.startswith("bert.")}
    base = replace(expert, name="base", tensors=bare)
    head = head_of(expert)
    order = (expert, base) if prefixed else (base, expert)
    networks = Networks()
    for state in order:
        networks.use(state)
        torch.testing.assert_close(answers(networks.classifier(head)), stored(folder), rtol=0, atol=0)
    assert not head_of(base).tensors


def test_a_model_that_calculates_otherwise_is_loaded_anew(saved: Saved) -> None:
    """The shapes are the same, so the tensors alone do not tell."""
    folder = saved("bert", 2, 1)
    state = load_state(folder)
    networks = Networks()
    networks.use(state)
    networks.classifier(head_of(state))
    odd = replace(state, config={**state.config, "hidden_act": "relu", "num_attention_heads": 2})
    networks.use(odd)
    found = answers(networks.classifier(head_of(odd)))
    again = Networks()
    again.use(odd)
    torch.testing.assert_close(found, answers(again.classifier(head_of(odd))), rtol=0, atol=0)
    assert not torch.equal(found, stored(folder))


def test_float32_weights_are_not_rounded_where_the_configuration_says_bfloat16(saved: Saved) -> None:
    state = load_state(saved("bert", 2, 1))
    networks = Networks()
    networks.use(replace(state, config={**state.config, "dtype": "bfloat16"}))
    found = answers(networks.classifier(head_of(state)))
    torch.testing.assert_close(found, stored(saved("bert", 2, 1)), rtol=0, atol=0)


def test_arithmetic_in_bfloat16(saved: Saved) -> None:
    state = load_state(saved("bert", 2, 1))
    networks = Networks(dtype=torch.bfloat16)
    networks.use(state)
    network = networks.classifier(head_of(state))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(answers(network).float(), stored(saved("bert", 2, 1)), rtol=0.1, atol=0.1)


def test_the_language_model_that_a_state_is(tmp_path: Path) -> None:
    folder = save_family(ARCHITECTURES["llama"], tmp_path).base
    networks = Networks()
    networks.use(load_state(folder))
    assert networks.writer() is networks.writer()
    ids = torch.tensor([[4, 5, 6]])
    expected = ARCHITECTURES["llama"].build().from_pretrained(folder).eval()
    with torch.inference_mode():
        torch.testing.assert_close(networks.writer()(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_outputs_are_counted_in_the_tensors_and_not_in_the_configuration(saved: Saved) -> None:
    for kind in ("bert", "gpt2"):
        state = load_state(saved(kind, 3, 2))
        assert outputs_of(head_of(state), {**state.config, "id2label": {"0": "a"}}, "m") == 3, kind
    assert outputs_of(Head({}, {}), state.config, "m") is None


def refused(state: ModelState, head: Head | None = None) -> str:
    networks = Networks()
    networks.use(state)
    with pytest.raises(TaskError) as caught:
        networks.classifier(head or head_of(state))
    return str(caught.value)


def test_a_network_with_missing_tensors_is_refused(saved: Saved) -> None:
    state = load_state(saved("bert", 2, 1))
    kept = {name: tensor for name, tensor in state.tensors.items() if "layer.1.attention.self" not in name}
    assert refused(replace(state, tensors=kept)).startswith(
        f"{state.name}: lacks tensors that BertForSequenceClassification needs: "
        "bert.encoder.layer.1.attention.self.key.bias, bert.encoder.layer.1.attention.self.key.weight, "
        "bert.encoder.layer.1.attention.self.query.bias ..."
    )


def test_a_head_of_another_size_is_refused(saved: Saved, tmp_path: Path) -> None:
    save_classifier(tmp_path, hidden_size=16, seed=3)
    state, other = load_state(saved("bert", 2, 1)), load_state(tmp_path)
    assert refused(state, head_of(other)) == (
        f"{state.name}: the head's classifier.weight is [2, 16], and BertForSequenceClassification needs [2, 32]. "
        "Give the head of a model of the same architecture and size"
    )


def test_a_configuration_that_does_not_fit_the_tensors_is_refused(saved: Saved) -> None:
    state = load_state(saved("bert", 2, 1))
    message = refused(replace(state, config={**state.config, "vocab_size": 50}))
    assert message.startswith(f"{state.name}: its tensors do not fit BertForSequenceClassification: ")
    message = refused(replace(state, config={**state.config, "num_attention_heads": 5}), head_of(state))
    assert message.startswith(
        f"{state.name}: its config.json does not make a BertForSequenceClassification: The hidden"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "m: has no config.json. Models are evaluated with transformers, without code of their own"),
        ({"model_type": "brand_new"}, "m: transformers does not know models of the type 'brand_new'."),
        ({"model_type": ["bert"]}, "m: transformers does not know models of the type ['bert']."),
        ({"model_type": "bert", "hidden_size": "wide"}, "m: its config.json does not fit the type 'bert': "),
    ],
)
def test_configurations_that_transformers_cannot_use(content: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        config_of(content, "m")
    assert str(caught.value).startswith(message)


def test_models_that_do_not_classify_or_do_not_write(tmp_path: Path) -> None:
    vision = ModelState("v", {}, {"model_type": "clip"})
    with pytest.raises(
        TaskError, match=r"v: transformers has no classifier for models of the type 'clip'. Evaluate it"
    ):
        head_of(vision)
    networks = Networks()
    networks.use(vision)
    with pytest.raises(TaskError, match=r"v: models of the type 'clip' do not write text. Evaluate it on task folders"):
        networks.writer()


def test_a_checkpoint_that_was_saved_by_hand_is_read_as_one_of_transformers(saved: Saved, tmp_path: Path) -> None:
    """Half precision stays what it is in the state, and becomes float32 in the network."""
    folder = saved("distilbert", 2, 1)
    halves = {name: tensor.half() for name, tensor in read_state(folder).items()}
    save_state(tmp_path / "half", halves, json.loads((folder / "config.json").read_text()))
    state = load_state(tmp_path / "half")
    networks = Networks()
    networks.use(state)
    network = networks.classifier(head_of(state))
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float16}
    torch.testing.assert_close(answers(network), stored(tmp_path / "half"), rtol=0, atol=0)


def test_heads_that_have_a_part_of_the_backbone_do_not_take_each_others(tmp_path: Path) -> None:
    """Poolers that are kept for each expert are part of what its head is."""
    torch.manual_seed(0)
    config = ARCHITECTURES["bert"].make_config()
    experts = {name: BertForSequenceClassification(config).eval() for name in ("a", "b")}
    for name, expert in experts.items():
        expert.load_state_dict(
            {k: v for k, v in experts["a"].state_dict().items() if k.startswith("bert.e")}, strict=False
        )
        expert.save_pretrained(tmp_path / name)
    recipe = {"merge_method": "linear", "models": [str(tmp_path / name) for name in experts]}
    state = merged_state({**recipe, "heads": ["*pooler*", "classifier*"]}, "merged")
    networks = Networks()
    networks.use(state)
    for name in ("a", "b", "a"):
        torch.testing.assert_close(answers(networks.classifier(state.heads[name])), answers(experts[name]))
