"""The example recipes that people start from, run as they are written, on local models of those names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weldment
from folders import llama_shapes, weld

GUIDE = {
    "linear": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""",
    "slerp": """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
# or, the equivalent models: syntax:
# models:
#   - model: psmathur/orca_mini_v3_13b
#   - model: garage-bAInd/Platypus2-13B
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    "task_arithmetic": """
base_model: TheBloke/Llama-2-13B-fp16
dtype: float16
merge_method: task_arithmetic
slices:
  - sources:
      - layer_range: [0, 40]
        model: TheBloke/Llama-2-13B-fp16
      - layer_range: [0, 40]
        model: psmathur/orca_mini_v3_13b
        parameters:
          weight: 1.0
      - layer_range: [0, 40]
        model: garage-bAInd/Platypus2-13B
        parameters:
          weight: 0.6
""",
    "ties": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare_ties": """
models:
  - model: TheBloke/Llama-2-13B-fp16
    # No parameters necessary for base model
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: 0.53
      weight: 0.4
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.53
      weight: 0.3
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  int8_mask: true
dtype: bfloat16
""",
    "passthrough": """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 24]
  - sources:
      - model: garage-bAInd/Platypus2-13B
        layer_range: [8, 32]
merge_method: passthrough
dtype: float16
""",
}
NAMES = [
    "psmathur/orca_mini_v3_13b",
    "WizardLM/WizardLM-13B-V1.2",
    "garage-bAInd/Platypus2-13B",
    "TheBloke/Llama-2-13B-fp16",
    "WizardLM/WizardMath-13B-V1.0",
]
LAYERS = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of the guide's names: 40 layers, but thin."""
    root = tmp_path_factory.mktemp("models")
    draw = torch.Generator().manual_seed(0)
    shapes = llama_shapes(LAYERS)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name in NAMES:
        folder = root / name
        folder.mkdir(parents=True)
        changed = {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in base.items()}
        save_file({key: value.half() for key, value in changed.items()}, folder / "model.safetensors")
        config = {"model_type": "llama", "num_hidden_layers": LAYERS, "torch_dtype": "float16"}
        (folder / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("name", GUIDE)
def test_recipe_runs_as_written(name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "config.yml").write_text(GUIDE[name])
    result = weld("merge", tmp_path / "config.yml", tmp_path / "out")
    assert result.code == 0, result.err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = 48 if name == "passthrough" else LAYERS
    assert config["num_hidden_layers"] == layers
    assert set(merged) == set(llama_shapes(layers))
    wanted = torch.bfloat16 if name == "dare_ties" else torch.float16
    assert {tensor.dtype for tensor in merged.values()} == {wanted}
    assert config["torch_dtype"] == str(wanted).removeprefix("torch.")
    assert weld("verify", tmp_path / "out").code == 0
    assert result.err.count("int8_mask") == GUIDE[name].count("int8_mask")


def test_values_of_the_passthrough(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 24 of the stack is layer 8 of the second model, bit by bit."""
    monkeypatch.chdir(models)
    (tmp_path / "config.yml").write_text(GUIDE["passthrough"])
    weldment.merge(tmp_path / "config.yml", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (load_file(models / name / "model.safetensors") for name in (NAMES[0], NAMES[2]))
    rest = "mlp.up_proj.weight"
    assert torch.equal(merged[f"model.layers.23.{rest}"], first[f"model.layers.23.{rest}"])
    assert torch.equal(merged[f"model.layers.24.{rest}"], second[f"model.layers.8.{rest}"])
    assert torch.equal(merged[f"model.layers.47.{rest}"], second[f"model.layers.31.{rest}"])


def test_gradients_of_the_slerp(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """t is 0 for the first layer's attention and 1 for its MLP, and the other way round at the end."""
    monkeypatch.chdir(models)
    (tmp_path / "config.yml").write_text(GUIDE["slerp"])
    weldment.merge(tmp_path / "config.yml", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base, other = (load_file(models / name / "model.safetensors") for name in (NAMES[0], NAMES[2]))
    attention, mlp = "self_attn.q_proj.weight", "mlp.up_proj.weight"
    for layer, source in ((0, base), (LAYERS - 1, other)):
        torch.testing.assert_close(
            merged[f"model.layers.{layer}.{attention}"], source[f"model.layers.{layer}.{attention}"]
        )
    for layer, source in ((0, other), (LAYERS - 1, base)):
        torch.testing.assert_close(merged[f"model.layers.{layer}.{mlp}"], source[f"model.layers.{layer}.{mlp}"])
