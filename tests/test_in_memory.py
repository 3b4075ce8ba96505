"""Merges in memory: what the files of the same merge hold, byte for byte, and nothing on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapter_folders import CONFIG, adapter, base, tokenizer
from models import average, read_state, save_decoder, save_state
from weldment import merge
from weldment.errors import CheckpointError, NonFiniteError, PlanError, UserError
from weldment.evaluation.states import load_state, merged_state
from weldment.merging import merge_in_memory

Q = "model.layers.0.q"


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.fixture
def bases(tmp_path: Path) -> list[str]:
    """Models with heads of other sizes each, and a count among their tensors."""
    folders = []
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        state = {
            "encoder.layers.0.weight": torch.randn(40, 30, generator=draw),
            "encoder.layers.1.weight": torch.randn(40, 30, generator=draw),
            "encoder.norm.weight": torch.randn(30, generator=draw),
            "encoder.count": torch.tensor(7),
            "classifier.weight": torch.randn(2 + number, 30, generator=draw),
        }
        config = {"model_type": "made_up", "id2label": {str(n): f"l{n}" for n in range(2 + number)}}
        folders.append(str(save_state(tmp_path / f"m{number}", state, config)))
    return folders


def recipes(models: list[str]) -> dict[str, Any]:
    heads = {"heads": ["classifier*"]}
    based = {"models": models[1:], "base_model": models[0], **heads}
    return {
        "copy": {"merge_method": "passthrough", "models": models[:1]},
        "heads": {"merge_method": "linear", "models": models, **heads},
        "bf16": {"merge_method": "linear", "models": models, "dtype": "bfloat16", **heads},
        "trimmed": {"merge_method": "ties", "parameters": {"density": 0.3}, **based},
        "random": {"merge_method": "dare_ties", "parameters": {"density": 0.5}, "seed": 5, **based},
        "spectral": {"merge_method": "iso_c", **based},
        "stages": [
            {"name": "first", "merge_method": "linear", "models": models[:2], **heads},
            {
                "merge_method": "slerp",
                "models": ["first", models[2]],
                "base_model": "first",
                "parameters": {"t": 0.3},
                **heads,
            },
        ],
    }


@pytest.mark.parametrize("kind", ["copy", "heads", "bf16", "trimmed", "random", "spectral", "stages"])
def test_tensors_and_heads_are_those_of_the_files(kind: str, bases: list[str], tmp_path: Path) -> None:
    recipe = recipes(bases)[kind]
    before = set(tmp_path.rglob("*"))
    merged = merge_in_memory(recipe)
    assert set(tmp_path.rglob("*")) == before
    out = merge(recipe, tmp_path / "out").path
    same(merged.tensors, read_state(out))
    files = {path.stem: load_file(path) for path in (out / "heads").glob("*.safetensors")}
    assert merged.heads.keys() == files.keys()
    assert bool(files) == (kind != "copy")
    for name, tensors in files.items():
        same(merged.heads[name], tensors)


def test_overrides_seeds_and_threads(bases: list[str], tmp_path: Path) -> None:
    recipe = recipes(bases)["random"]
    out = merge(recipe, tmp_path / "out", overrides=["parameters.density=0.2"], seed=9).path
    for threads in (1, 3):
        found = merge_in_memory(recipe, overrides=["parameters.density=0.2"], seed=9, threads=threads)
        same(found.tensors, read_state(out))
    assert any(not torch.equal(tensor, found.tensors[name]) for name, tensor in merge_in_memory(recipe).tensors.items())


def test_a_model_with_an_adapter(tmp_path: Path) -> None:
    reference = f"{base(tmp_path / 'base')}+{adapter(tmp_path / 'adapter')}"
    out = merge({"merge_method": "passthrough", "models": [reference]}, tmp_path / "out").path
    state = load_state(reference)
    same(state.tensors, read_state(out))
    assert state.name == "base+adapter"
    assert state.config["model_type"] == CONFIG["model_type"]


@pytest.mark.parametrize("output", ["adapter", "model"])
def test_adapters_merged_to_an_adapter_or_a_model(output: str, tmp_path: Path) -> None:
    root = base(tmp_path / "base")
    tokenizer(root, "a", "b")
    adapters = [str(adapter(tmp_path / f"a{seed}", seed=seed)) for seed in (1, 2)]
    recipe = {"merge_method": "linear", "models": adapters, "base_model": str(root), "output": output}
    state = merged_state(recipe, "both")
    out = merge(recipe, tmp_path / "out").path
    if output == "adapter":
        out = merge({"merge_method": "passthrough", "models": [f"{root}+{out}"]}, tmp_path / "applied").path
    same(state.tensors, read_state(out))
    assert state.folder == root
    assert state.name == "both"


def test_a_recipe_as_a_state_has_heads_with_the_configurations_of_their_experts(bases: list[str]) -> None:
    state = merged_state(recipes(bases)["heads"], "mean")
    assert {name: len(head.config["id2label"]) for name, head in state.heads.items()} == {"m0": 2, "m1": 3, "m2": 4}
    assert state.nbytes == sum(t.numel() * t.element_size() for t in state.tensors.values())


def test_a_stored_merge_is_the_state_that_its_recipe_makes(bases: list[str], tmp_path: Path) -> None:
    out = merge(recipes(bases)["heads"], tmp_path / "mean").path
    stored, made = load_state(out), merged_state(recipes(bases)["heads"], "mean")
    assert stored.name == made.name
    same(stored.tensors, made.tensors)
    for name, head in made.heads.items():
        same(stored.heads[name].tensors, head.tensors)
        assert stored.heads[name].config == head.config


def test_the_mean_is_right(tmp_path: Path) -> None:
    folders = [save_decoder(tmp_path / f"d{seed}", seed=seed) for seed in range(2)]
    found = merge_in_memory({"merge_method": "linear", "models": list(map(str, folders))}).tensors
    for name, tensor in average(*map(read_state, folders)).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_results_that_are_not_finite_are_refused(bases: list[str]) -> None:
    recipe = {**recipes(bases)["heads"], "parameters": {"weight": 3e38, "normalize": False}}
    with pytest.raises(NonFiniteError, match="NaN or infinity in 3 tensors of the result, encoder"):
        merge_in_memory(recipe)


def test_recipes_and_models_that_are_wrong(bases: list[str], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"classifier\.weight"):
        merge_in_memory({"merge_method": "linear", "models": bases})
    with pytest.raises(CheckpointError, match="nowhere"):
        load_state(tmp_path / "nowhere")
    with pytest.raises(UserError, match="seed"):
        merge_in_memory(recipes(bases)["copy"], seed=-1)
    adapters = [str(adapter(tmp_path / f"a{seed}", seed=seed)) for seed in (1, 2)]
    message = "merges adapters to an adapter, not to a model. Add `output: model`, or name the adapters with their base"
    with pytest.raises(UserError, match=message):
        merge_in_memory({"merge_method": "linear", "models": adapters, "base_model": str(base(tmp_path / "base"))})


def test_heads_that_are_damaged(bases: list[str], tmp_path: Path) -> None:
    out = merge(recipes(bases)["heads"], tmp_path / "mean").path
    (out / "heads" / "m0.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"heads/m0.safetensors: cannot be read: Expecting property name"):
        load_state(out)
    (out / "heads" / "m0.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"heads/m0.safetensors: cannot be read: "):
        load_state(out)
