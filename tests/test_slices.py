"""Models assembled of slices of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models import ARCHITECTURES, State
from weldment import PlanError, merge, plan


def source(model: Path, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    written: dict[str, Any] = {"model": str(model), "layer_range": [start, stop]}
    return {**written, "parameters": parameters} if parameters else written


def slices(method: str, *pieces: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": [{"sources": piece} for piece in pieces], **keys}


def layer(state: State, number: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def stacked(outer: State, chosen: list[tuple[State, int]]) -> State:
    """A state dict of these layers with the tensors of `outer` that are outside layers."""
    state = {name: tensor for name, tensor in outer.items() if ".layers." not in name}
    for place, (origin, number) in enumerate(chosen):
        state |= {f"model.layers.{place}.{rest}": tensor for rest, tensor in layer(origin, number).items()}
    return state


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return models.save_decoder(tmp_path / "a", layers=4), models.save_decoder(tmp_path / "b", layers=4, seed=1)


def test_passthrough_stacks_layers_bit_by_bit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    merge(slices("passthrough", [source(first, 0, 3)], [source(second, 1, 4)]), tmp_path / "out")
    one, other = map(models.read_state, pair)
    expected = stacked(one, [(one, 0), (one, 1), (one, 2), (other, 1), (other, 2), (other, 3)])
    expected["model.norm.weight"] = other["model.norm.weight"]
    models.assert_same(models.read_state(tmp_path / "out"), expected, exact=True)
    assert models.read_config(tmp_path / "out")["num_hidden_layers"] == 6


def test_layers_may_repeat(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, _ = pair
    result = merge(slices("passthrough", [source(first, 0, 2)], [source(first, 1, 2)]), tmp_path / "out")
    one = models.read_state(first)
    expected = stacked(one, [(one, 0), (one, 1), (one, 1)])
    models.assert_same(models.read_state(tmp_path / "out"), expected, exact=True)
    fates = {entry.tensor: (entry.fate, entry.detail) for entry in result.plan.ledger}
    assert len(fates) == len(result.plan.ledger) == len(one)
    assert fates["model.layers.3.mlp.up_proj.weight"] == ("dropped", "no slice uses it")
    assert fates["model.layers.1.mlp.up_proj.weight"] == ("copied", "")


def test_several_sources_are_merged_layer_by_layer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    merge(slices("linear", [source(first, 0, 2), source(second, 2, 4)]), tmp_path / "out")
    one, other = map(models.read_state, pair)
    models.assert_same(
        models.read_state(tmp_path / "out"),
        models.average(stacked(one, [(one, 0), (one, 1)]), stacked(other, [(other, 2), (other, 3)])),
    )


def test_two_layers_of_one_model_are_merged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, _ = pair
    merge(slices("linear", [source(first, 0, 1), source(first, 3, 4)]), tmp_path / "out")
    one = models.read_state(first)
    expected = models.average(stacked(one, [(one, 0)]), stacked(one, [(one, 3)]))
    models.assert_same(models.read_state(tmp_path / "out"), expected)


@pytest.mark.parametrize("is_listed", [True, False])
def test_base_gives_the_same_layers_listed_or_not(is_listed: bool, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = models.save_decoder(tmp_path / "base", layers=4, seed=2)
    piece = [source(model, 1, 3, weight=0.5) for model in pair] + ([source(base, 1, 3)] if is_listed else [])
    merge(slices("task_arithmetic", piece, base_model=str(base)), tmp_path / "out")
    one, other = map(models.read_state, pair)
    expected = models.average(stacked(one, [(one, 1), (one, 2)]), stacked(other, [(other, 1), (other, 2)]))
    found = models.read_state(tmp_path / "out")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_base_that_is_listed_gives_the_layers_it_is_listed_with(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, base = pair
    merge(
        slices("task_arithmetic", [source(first, 0, 1, weight=0.0), source(base, 3, 4)], base_model=str(base)),
        tmp_path / "out",
    )
    own = models.read_state(base)
    models.assert_same(models.read_state(tmp_path / "out"), stacked(own, [(own, 3)]))


def test_sources_of_different_layers_need_a_listed_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    base = models.save_decoder(tmp_path / "base", layers=4, seed=2)
    piece = [source(first, 0, 2), source(second, 2, 4)]
    with pytest.raises(PlanError, match=r"slices\[0\]: the sources are different layers.*List the base"):
        plan(slices("ties", piece, base_model=str(base)))
    with pytest.raises(PlanError, match=r"the sources are different layers"):
        plan(slices("ties", [source(first, 0, 2), source(first, 2, 4)], base_model=str(base)))


def test_ranges_beyond_the_models_are_all_reported(pair: tuple[Path, Path]) -> None:
    first, second = pair
    with pytest.raises(PlanError) as error:
        plan(slices("passthrough", [source(first, 0, 5)], [source(second, 2, 9)]))
    message = str(error.value)
    assert f"slices[0].sources[0].layer_range: layer_range [0, 5] goes beyond the 4 layers of {first}" in message
    assert "slices[1].sources[0].layer_range: layer_range [2, 9]" in message
    assert "the last possible end is 4" in message


def test_gradients_run_over_each_slice(pair: tuple[Path, Path]) -> None:
    first, second = pair
    piece = [source(first, 0, 3), source(second, 0, 3, weight=[0.0, 1.0])]
    last = [source(first, 3, 4), source(second, 3, 4, weight=[0.2, 1.0])]
    planned = plan(slices("linear", piece, last))
    weights = {job.name: job.parameters["weight"][1] for job in planned.jobs}
    assert [weights[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(4)] == [0.0, 0.5, 1.0, 0.2]
    assert weights["model.embed_tokens.weight"] == 0.0
    assert weights["model.norm.weight"] == 0.2


def test_tensors_outside_layers_follow_the_first_and_the_last_slice(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    models.save_decoder(first, layers=4, tied=False)
    models.save_decoder(second, layers=4, tied=False, seed=1)
    merge(slices("passthrough", [source(first, 0, 1)], [source(second, 3, 4)]), tmp_path / "out")
    found, one, other = map(models.read_state, (tmp_path / "out", *pair))
    assert torch.equal(found["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(found["model.norm.weight"], other["model.norm.weight"])


def test_untied_last_slice_after_a_tied_first_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    models.save_decoder(second, layers=4, tied=False, seed=1)
    merge(slices("passthrough", [source(first, 0, 2)], [source(second, 2, 4)]), tmp_path / "out")
    assert torch.equal(
        models.read_state(tmp_path / "out")["lm_head.weight"], models.read_state(second)["lm_head.weight"]
    )
    assert models.read_config(tmp_path / "out")["tie_word_embeddings"] is False


def test_tensor_that_only_a_later_source_has_is_a_problem(pair: tuple[Path, Path]) -> None:
    first, second = pair
    extra = "model.layers.0.mlp.up_proj.bias"
    models.save_state(second, {**models.read_state(second), extra: torch.ones(8)}, models.read_config(second))
    with pytest.raises(PlanError, match=rf"'{extra}': missing from .*/a"):
        plan(slices("linear", [source(first, 0, 2), source(second, 0, 2)]))


def test_take_of_a_layer_is_ambiguous_and_refused(pair: tuple[Path, Path]) -> None:
    first, second = pair
    recipe = slices("passthrough", [source(first, 0, 2)], [source(second, 0, 2)])
    with pytest.raises(PlanError, match="slices number layers anew"):
        plan({**recipe, "take": {"model.layers.1.mlp.up_proj.weight": str(first)}})


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "mixtral", "gpt2", "gpt_neox", "bert", "vit", "mamba", "llava", "clip"]
)
def test_stacks_load_and_run(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    first, second = models.save_family(architecture, tmp_path).experts
    pieces = [source(first, 0, 2)], [source(second, 1, 2)], [source(first, 1, 2)]
    merge(slices("passthrough", *pieces), tmp_path / "out")
    merged = models.loaded(architecture, tmp_path / "out")
    assert torch.isfinite(models.outputs(architecture, merged)).all()
    merge(slices("passthrough", [source(first, 0, 2)]), tmp_path / "same")
    models.assert_same(models.read_state(tmp_path / "same"), models.read_state(first), exact=True)
    assert models.read_config(tmp_path / "same") == models.read_config(first)


def test_layer_types_follow_their_layers(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["qwen2"]
    config = architecture.make_config()
    config.layer_types = ["full_attention", "sliding_attention"]
    config.use_sliding_window, config.sliding_window = True, 4
    architecture.build(config).save_pretrained(tmp_path / "a")
    model = tmp_path / "a"
    merge(slices("passthrough", [source(model, 0, 2)], [source(model, 1, 2)]), tmp_path / "out")
    types = models.read_config(tmp_path / "out")["layer_types"]
    assert types == ["full_attention", "sliding_attention", "sliding_attention"]
    models.loaded(architecture, tmp_path / "out")


def test_encoder_decoder_models_are_not_sliced(tmp_path: Path) -> None:
    family = models.save_family(ARCHITECTURES["t5"], tmp_path)
    with pytest.raises(PlanError, match=r"slices need one stack of layers.*encoder\.block \(2 layers\)"):
        plan(slices("passthrough", [source(family.base, 0, 1)]))


def test_model_that_slices_of_a_deeper_base_make_has_its_own_depth(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = models.save_decoder(tmp_path / "base", layers=6, seed=2)
    piece = [source(pair[0], 0, 3), source(pair[1], 0, 3)]
    planned = plan(slices("ties", piece, base_model=str(base)))
    assert planned.config["num_hidden_layers"] == 3
