"""Tensors that are not merged: `drop`, `take`, `heads`, constants and buffers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import models
from models import ARCHITECTURES, State
from weldment import PlanError, merge, plan
from weldment.planning.plan import Plan

BERT = ARCHITECTURES["bert"]


def fates(planned: Plan, model: Path) -> dict[str, tuple[str, str]]:
    return {entry.tensor: (entry.fate, entry.detail) for entry in planned.ledger if entry.model == str(model)}


def save_pair(tmp_path: Path, first: State, second: State) -> tuple[Path, Path]:
    return models.save_state(tmp_path / "a", first), models.save_state(tmp_path / "b", second)


def linear(*values: float) -> State:
    return {"linear.weight": torch.tensor([values]), "linear.bias": torch.tensor(values)}


def test_heads_of_classifiers_are_kept_per_expert_beside_a_backbone_without_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BertModel(BERT.make_config()).save_pretrained(tmp_path / "base")
    classifiers = {}
    for name, labels in (("topic", 3), ("mood", 5)):
        config = BERT.make_config()
        config.num_labels = labels
        classifiers[name] = transformers.BertForSequenceClassification(config).eval()
        classifiers[name].save_pretrained(tmp_path / name)
    base, experts = tmp_path / "base", [tmp_path / name for name in classifiers]
    parameters = {"weight": 0.5}
    recipe = models.recipe("task_arithmetic", *experts, base=base, heads=["classifier.*"], parameters=parameters)
    result = merge(recipe, tmp_path / "out")

    assert models.read_state(tmp_path / "out").keys() == models.read_state(base).keys()
    backbone, info = transformers.BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    (note,) = result.plan.notes
    assert (
        note == f"tensor names of {experts[0]} and {experts[1]} were matched to {base} by prefix: bert. -> (no prefix)"
    )
    for name, classifier in classifiers.items():
        head = models.load_file(tmp_path / "out" / "heads" / f"{name}.safetensors")
        own = {key: value for key, value in classifier.state_dict().items() if key.startswith("classifier.")}
        models.assert_same(head, own, exact=True)
        written = json.loads((tmp_path / "out" / "heads" / f"{name}.json").read_text())
        assert written == models.read_config(tmp_path / name)
        assert fates(result.plan, tmp_path / name)["classifier.bias"] == ("head", f"in heads/{name}.safetensors")
        assert fates(result.plan, tmp_path / name)["bert.pooler.dense.bias"] == ("merged", "as pooler.dense.bias")
        whole = transformers.BertForSequenceClassification(classifier.config).eval()
        state = {**{f"bert.{key}": value for key, value in backbone.state_dict().items()}, **head}
        whole.load_state_dict(state)
        with torch.no_grad():
            assert whole(**models.token_inputs()).logits.shape == (2, classifier.config.num_labels)


def test_heads_are_not_converted(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, linear(1.0, 2.0), linear(3.0, 4.0))
    merge(models.recipe("linear", first, second, heads=["linear.bias"], dtype="bfloat16"), tmp_path / "out")
    assert models.load_file(tmp_path / "out" / "heads" / "a.safetensors")["linear.bias"].dtype == torch.float32
    assert models.read_state(tmp_path / "out").keys() == {"linear.weight"}


def test_head_of_the_base_is_dropped_for_a_stated_reason(tmp_path: Path) -> None:
    base = models.save_state(tmp_path / "base", linear(0.0, 0.0))
    first, second = save_pair(tmp_path, linear(1.0, 2.0), linear(3.0, 4.0))
    planned = plan(models.recipe("ties", first, second, base=base, heads=["linear.bias"]))
    assert fates(planned, base)["linear.bias"] == ("dropped", "a head of the base")
    assert set(planned.heads) == {"a", "b"}


def test_experts_of_one_name_keep_their_heads_apart(tmp_path: Path) -> None:
    experts = [models.save_state(tmp_path / folder / "Final", linear(1.0, 2.0)) for folder in "ab"]
    experts.append(models.save_state(tmp_path / "c" / "final", linear(5.0, 6.0)))
    merge(models.recipe("linear", *experts, heads=["linear.bias"]), tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out" / "heads").iterdir())
    assert written == ["Final-2.safetensors", "Final.safetensors", "final-3.safetensors"]


def test_heads_pattern_that_fits_nothing(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, linear(1.0), linear(2.0))
    with pytest.raises(PlanError, match=r"heads: the pattern 'clasifier\.\*' fits no tensor"):
        plan(models.recipe("linear", first, second, heads=["clasifier.*"]))


def test_dropped_tensors_are_left_out_everywhere(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, linear(1.0, 2.0), {"linear.weight": torch.ones(1, 2)})
    recipe = models.recipe("linear", first, second, drop=["*.bias"])
    merge(recipe, tmp_path / "out")
    assert models.read_state(tmp_path / "out").keys() == {"linear.weight"}
    assert fates(plan(recipe), first)["linear.bias"] == ("dropped", "the recipe drops *.bias")


def test_drop_pattern_that_fits_nothing(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, linear(1.0), linear(2.0))
    with pytest.raises(PlanError, match=r"drop: the pattern 'x' fits no tensor"):
        plan(models.recipe("linear", first, second, drop=["x"]))


def test_everything_dropped(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, linear(1.0), linear(2.0))
    with pytest.raises(PlanError, match="no tensor is left to merge"):
        plan(models.recipe("linear", first, second, drop=["*"]))


def test_taken_tensors_come_from_one_model_bit_by_bit(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, linear(0.1, 0.2), linear(0.3, 0.4))
    recipe = models.recipe("linear", first, second, take={"linear.bias": str(second)})
    result = merge(recipe, tmp_path / "out")
    found = models.read_state(tmp_path / "out")
    assert torch.equal(found["linear.bias"], torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(found["linear.weight"], torch.tensor([[0.2, 0.3]]))
    assert fates(result.plan, first)["linear.bias"] == ("dropped", f"taken from {second}")
    assert fates(result.plan, second)["linear.bias"] == ("copied", "")


def test_taken_tensors_get_the_dtype_of_the_output(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, linear(0.1), linear(0.3))
    merge(models.recipe("linear", first, second, take={"linear.bias": str(second)}, dtype="float16"), tmp_path / "out")
    assert models.read_state(tmp_path / "out")["linear.bias"].dtype == torch.float16


def test_tensors_can_be_taken_from_a_base_that_is_not_merged(tmp_path: Path) -> None:
    base = models.save_state(tmp_path / "base", linear(7.0))
    first, second = save_pair(tmp_path, linear(1.0), linear(3.0))
    result = merge(models.recipe("linear", first, second, base=base, take={"*.bias": str(base)}), tmp_path / "out")
    assert models.read_state(tmp_path / "out")["linear.bias"].tolist() == [7.0]
    assert fates(result.plan, base)["linear.bias"] == ("copied", "")
    assert fates(result.plan, base)["linear.weight"] == ("dropped", "the model gives only its configuration and files")


@pytest.mark.parametrize(
    ("pattern", "source", "message"),
    [
        (
            "linear.bias",
            "elsewhere",
            r"take\.linear\.bias: elsewhere is not among the models of this merge\. Take .*/b",
        ),
        ("linear.baes", "b", r"take: the pattern 'linear\.baes' fits no tensor"),
        ("only_a.*", "b", r"take\.only_a\.\*: .*b has no tensor 'only_a\.weight', which .*a has\. Take it from"),
    ],
)
def test_take_that_cannot_be_done(pattern: str, source: str, message: str, tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, {**linear(1.0), "only_a.weight": torch.ones(1)}, linear(2.0))
    model = str(second) if source == "b" else source
    drop = [] if pattern.startswith("only") else ["only_a.*"]
    with pytest.raises(PlanError, match=message):
        plan(models.recipe("linear", first, second, take={pattern: model}, drop=drop))


def test_dropped_tensors_are_not_taken(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, linear(1.0), linear(2.0))
    recipe = models.recipe("linear", first, second, drop=["linear.bias"], take={"linear.*": str(first)})
    merge(recipe, tmp_path / "out")
    assert models.read_state(tmp_path / "out").keys() == {"linear.weight"}


def batch_norm(mean: float, steps: int) -> State:
    names = {"bn.weight": torch.ones(2), "bn.running_mean": torch.full((2,), mean)}
    return {**names, "bn.num_batches_tracked": torch.tensor(steps), "other.num_batches_tracked": torch.tensor(steps)}


def test_float_buffers_are_merged_and_integer_buffers_that_agree_are_copied(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, batch_norm(1.0, 7), batch_norm(2.0, 7))
    result = merge(models.recipe("linear", first, second), tmp_path / "out")
    found = models.read_state(tmp_path / "out")
    assert found["bn.running_mean"].tolist() == [1.5, 1.5]
    assert found["bn.num_batches_tracked"].item() == 7
    assert found["bn.num_batches_tracked"].dtype == torch.int64
    assert fates(result.plan, second)["bn.num_batches_tracked"][0] == "copied"


def test_integer_buffers_that_disagree_are_named_with_a_way_out(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, batch_norm(1.0, 7), batch_norm(2.0, 8))
    recipe = models.recipe("linear", first, second)
    with pytest.raises(
        PlanError, match=r"2 tensors \('bn\.num_batches_tracked', 'other\.num_batches_tracked'\)"
    ) as error:
        plan(recipe)
    advice = str(error.value).partition("`take: ")[2].partition("`")[0]
    merge({**recipe, "take": json.loads(advice)}, tmp_path / "out")
    assert models.read_state(tmp_path / "out")["bn.num_batches_tracked"].item() == 7


def test_tensor_that_is_float_here_and_integer_there(tmp_path: Path) -> None:
    first, second = save_pair(tmp_path, {"x.w": torch.ones(2)}, {"x.w": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(PlanError, match=r"'x\.w': floating point in some models and integer in others.*`take: "):
        plan(models.recipe("linear", first, second))


CONSTANTS = {
    "h.0.attn.bias": torch.ones(1, 1, 2, 2),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "position_ids": torch.arange(4),
}


@pytest.mark.parametrize("holders", [(True, True), (True, False), (False, True)])
def test_constants_stay_as_the_first_model_has_them(holders: tuple[bool, bool], tmp_path: Path) -> None:
    states = [{**linear(1.0), **(CONSTANTS if holds else {})} for holds in holders]
    first, second = save_pair(tmp_path, *states)
    planned = merge(models.recipe("linear", first, second), tmp_path / "out").plan
    found = models.read_state(tmp_path / "out")
    assert found.keys() == states[0].keys()
    if holders[1]:
        assert fates(planned, second)["position_ids"] == ("dropped", "a constant that the model's code computes")


def test_constants_may_differ_in_dtype_and_size(tmp_path: Path) -> None:
    frequencies = {"rotary_emb.inv_freq": torch.rand(4)}
    first, second = save_pair(
        tmp_path,
        {**linear(1.0), **frequencies, "position_ids": torch.arange(4)},
        {**linear(3.0), "rotary_emb.inv_freq": torch.rand(4).bfloat16(), "position_ids": torch.arange(8)},
    )
    base = models.save_state(tmp_path / "base", {**linear(0.0), **frequencies, "position_ids": torch.arange(6)})
    merge(models.recipe("task_arithmetic", first, second, base=base), tmp_path / "out")
    found = models.read_state(tmp_path / "out")
    assert found["position_ids"].tolist() == list(range(6))
    assert torch.equal(found["rotary_emb.inv_freq"], frequencies["rotary_emb.inv_freq"])
