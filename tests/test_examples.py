"""The example recipes are run as they are written, on tiny models of the names that they use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import weldment
from folders import llama_shapes, write_model
from models import perturbed
from weldment.recipe import load_recipes
from weldment.twin.build import build

EXAMPLES = Path(__file__).parents[1] / "examples" / "recipes"
RECIPES = sorted(path for path in EXAMPLES.glob("*.yml") if path.stem != "twin")
FULL = [path for path in RECIPES if path.stem != "adapters"]
LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
HEADS = ["heads=['classifier*']"]
SHALLOW = ["slices[0].sources[0].layer_range=[0, 2]", "slices[1].sources[0].layer_range=[1, 3]"]
"""The stack of layers for models as small as these."""
INPUTS = {"input_ids": torch.arange(3, 19).reshape(2, 8)}


def llama(classes: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))


def bert(classes: int) -> PreTrainedModel:
    """A classifier, or a bare encoder for no classes."""
    config = BertConfig(**SIZES, num_labels=classes or 2)
    return BertForSequenceClassification(config) if classes else BertModel(config)


def save_models(folder: Path, build: Callable[[int], PreTrainedModel]) -> None:
    """A base and two experts near it, with heads for 2 and 5 classes if they are classifiers."""
    torch.manual_seed(0)
    base = build(0)
    base.save_pretrained(folder / "base")
    for seed, (name, classes) in enumerate({"chat": 2, "code": 5}.items()):
        expert = build(classes)
        backbone = getattr(expert, expert.base_model_prefix)
        start = getattr(base, base.base_model_prefix, base)
        backbone.load_state_dict(perturbed(start.state_dict(), seed))
        expert.save_pretrained(folder / name)


def save_adapters(folder: Path) -> None:
    """Two adapters of different ranks and modules, as PEFT saves them."""
    for rank, (name, modules) in enumerate({"chat": ["q_proj"], "code": ["q_proj", "down_proj"]}.items(), 2):
        torch.manual_seed(0)
        adapted = get_peft_model(llama(0), LoraConfig(r=rank, target_modules=modules, init_lora_weights=False))
        adapted.save_pretrained(str(folder / name))


@pytest.fixture(scope="module", params=[llama, bert], ids=["llama", "bert"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind of model, and a working folder with models of it under the recipes' names."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    save_models(folder / "models", request.param)
    return request.param.__name__, folder


def test_there_is_a_recipe_for_every_family_of_methods() -> None:
    families = {weldment.METHODS[load_recipes(path)[0].method].family for path in RECIPES}
    assert families == {method.family for method in weldment.METHODS.values()}


@pytest.mark.parametrize("recipe", FULL, ids=lambda path: path.stem)
def test_recipes_make_whole_models(
    recipe: Path, kind: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers loads what they make, which is none of the models it is made of; classifiers keep their heads."""
    name, folder = kind
    monkeypatch.chdir(folder)
    overrides = (HEADS if name == "bert" else []) + (SHALLOW if recipe.stem == "slices" else [])
    result = weldment.merge(recipe, tmp_path / "out", overrides=overrides)
    assert weldment.verify(result.path).tensors == len(result.checksums)
    assert not [note for note in result.plan.notes if "no effect" in note]
    loader = LlamaForCausalLM if name == "llama" else BertModel
    model, found = loader.from_pretrained(result.path, output_loading_info=True)
    assert not found["missing_keys"]
    assert model.config.num_hidden_layers == (4 if recipe.stem == "slices" else LAYERS)
    with torch.no_grad():
        assert torch.isfinite(model(**INPUTS)[0]).all()
    last = next(value for key, value in model.state_dict().items() if key.endswith(LAST))
    assert not any(torch.equal(last, tensor) for tensor in stored(folder / "models", LAST))
    if name == "bert":
        rows = {path.stem: load_file(path)["classifier.weight"].shape[0] for path in result.path.glob("heads/*.saf*")}
        assert rows == {"chat": 2, "code": 5}


LAST = (f"layers.{LAYERS - 1}.mlp.up_proj.weight", f"layer.{LAYERS - 1}.output.dense.weight")


def stored(folder: Path, names: tuple[str, ...]) -> list[torch.Tensor]:
    """The tensor of each model in a folder whose name ends so."""
    states = [load_file(path) for path in folder.glob("*/model.safetensors")]
    return [next(tensor for key, tensor in state.items() if key.endswith(names)) for state in states]


def test_the_stack_of_layers_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On models of 32 layers: the 48 are those that the recipe's comment says."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("chat", "code")):
        write_model(tmp_path / "models" / name, seed, layers=32)
    merged = load_file(weldment.merge(EXAMPLES / "slices.yml", "out").path / "model.safetensors")
    chat, code = (load_file(tmp_path / "models" / name / "model.safetensors") for name in ("chat", "code"))
    assert set(merged) == set(llama_shapes(48))
    part = "mlp.up_proj.weight"
    for layer, (source, place) in {0: (chat, 0), 23: (chat, 23), 24: (code, 8), 47: (code, 31)}.items():
        assert torch.equal(merged[f"model.layers.{layer}.{part}"], source[f"model.layers.{place}.{part}"])
    assert torch.equal(merged["model.embed_tokens.weight"], chat["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], code["model.norm.weight"])


def test_a_recipe_of_adapters_makes_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapters(tmp_path / "adapters")
    result = weldment.merge(EXAMPLES / "adapters.yml", "out")
    torch.manual_seed(0)
    base = llama(0).eval()
    with torch.no_grad():
        before = base(**INPUTS).logits
        after = PeftModel.from_pretrained(base, result.path)(**INPUTS).logits
    assert not torch.allclose(before, after)


def test_the_recipe_of_a_bundle_makes_one(
    kind: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = kind
    monkeypatch.chdir(folder)
    bundle = build(EXAMPLES / "twin.yml", tmp_path / "out")
    assert bundle.names == ("chat", "code")
    assert all(part.adapter is not None for part in bundle.experts)
    assert [part.head is not None for part in bundle.experts] == [name == "bert"] * 2
