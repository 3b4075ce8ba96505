"""Bundles are built as their recipes say: shared + exclusive is the expert, for PEFT too, and bad input is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

from folders import tree, weld, write_recipe
from models import ARCHITECTURES, BERT, perturbed
from weldment import TwinModel
from weldment.errors import PlanError, UserError
from weldment.twin.build import build
from weldment.twin.bundle import read_bundle

FULL: dict[str, Any] = {
    "exclusive": {"density": 1.0},
    "exclude": [],
    "router": {"kind": "uniform"},
}
BIASED = ("gpt2", "qwen2")
"""Models with biases, which PEFT cannot hold beside LoRA layers of embeddings."""

INPUTS = {"input_ids": torch.arange(3, 19).reshape(2, 8)}


def save_architecture(folder: Path, name: str) -> list[PreTrainedModel]:
    """A base and two experts of one architecture."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    base.save_pretrained(folder / "base")
    experts = []
    for seed, expert in enumerate(("chat", "code"), 1):
        model = architecture.build()
        model.load_state_dict(perturbed(base.state_dict(), seed))
        model.tie_weights()
        model.save_pretrained(folder / expert)
        experts.append(model.eval())
    return experts


def recipe_of(folder: Path, twin: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {
        "base_model": str(folder / "base"),
        "models": [str(folder / name) for name in names or ("chat", "code")],
        "twin": dict(twin),
    }


def with_expert(out: Path, name: str) -> PreTrainedModel:
    """The shared model with an expert's adapter, as PEFT loads them."""
    kind = json.loads((out / "config.json").read_text())["architectures"][0]
    shared = getattr(transformers, kind).from_pretrained(out)
    return PeftModel.from_pretrained(shared, str(out / "experts" / name)).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "t5"])
def test_at_full_rank_peft_loads_the_expert(tmp_path: Path, name: str) -> None:
    """Linear layers, Conv1D, tied and untied embeddings, norms."""
    experts = save_architecture(tmp_path, name)
    twin = {**FULL, "exclude": ["*.bias"]} if name in BIASED else FULL
    out = tmp_path / "out"
    build(recipe_of(tmp_path, twin), out)
    inputs = ARCHITECTURES[name].inputs()
    for expert, folder in zip(experts, ("chat", "code"), strict=True):
        if name in BIASED:
            shared = load_file(out / "model.safetensors")
            biases = {key: value for key, value in shared.items() if key.endswith(".bias")}
            expert.load_state_dict(biases, strict=False)
        with torch.no_grad():
            torch.testing.assert_close(
                with_expert(out, folder)(**inputs).logits, expert(**inputs).logits, atol=2e-4, rtol=1e-4
            )


def save_classifiers(folder: Path) -> None:
    """A bare encoder and two classifiers of 2 and 3 classes on it."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**BERT))
    base.save_pretrained(folder / "base")
    for seed, (name, classes) in enumerate({"chat": 2, "code": 3}.items(), 1):
        expert = BertForSequenceClassification(BertConfig(**{**BERT, "num_labels": classes}))
        expert.bert.load_state_dict(perturbed(base.state_dict(), seed))
        expert.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifiers")
    save_classifiers(folder)
    return folder


def compressed(out: Path, name: str) -> dict[str, torch.Tensor]:
    """What an expert's adapter and changes add to the shared model, by tensor."""
    place = out / "experts" / name
    found: dict[str, torch.Tensor] = {}
    factors = load_file(place / "adapter_model.safetensors") if (place / "adapter_model.safetensors").is_file() else {}
    for key, a in factors.items():
        module = key.removeprefix("base_model.model.")
        if ".lora_A." in module:
            name_ = module.replace(".lora_A.weight", ".weight")
            found[name_] = factors[key.replace("lora_A", "lora_B")] @ a
        elif module.endswith("lora_embedding_A"):
            name_ = module.replace(".lora_embedding_A", ".weight")
            found[name_] = (factors[key.replace("embedding_A", "embedding_B")] @ a).T
    changes = place / "changes.safetensors"
    return found | (load_file(changes) if changes.is_file() else {})


def test_shared_and_exclusive_give_the_expert_back(classifiers: Path, tmp_path: Path) -> None:
    bundle = build(recipe_of(classifiers, FULL), tmp_path / "out")
    shared = load_file(tmp_path / "out" / "model.safetensors")
    for part in bundle.experts:
        expert = load_file(classifiers / part.name / "model.safetensors")
        added = compressed(bundle.folder, part.name)
        for name, value in shared.items():
            whole = value + added.get(name, torch.zeros(()))
            torch.testing.assert_close(whole, expert[f"bert.{name}"], atol=1e-5, rtol=1e-5)
        assert part.kept == pytest.approx(1.0)


def test_peft_loads_a_bert_expert(classifiers: Path, tmp_path: Path) -> None:
    """Without LoRA layers of embeddings, PEFT has the biases of linear layers too."""
    twin = {**FULL, "exclude": ["*embeddings.*.weight", "*embeddings.weight"]}
    build(recipe_of(classifiers, twin), tmp_path / "out")
    shared = load_file(tmp_path / "out" / "model.safetensors")
    expert = BertForSequenceClassification.from_pretrained(classifiers / "chat").bert.eval()
    expert.load_state_dict(
        {n: t for n, t in shared.items() if "embeddings" in n and n.endswith("weight")}, strict=False
    )
    with torch.no_grad():
        wanted = expert(**INPUTS).last_hidden_state
        found = with_expert(tmp_path / "out", "chat")(**INPUTS).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_what_peft_lacks_is_said(classifiers: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", recipe_of(classifiers, FULL))
    assert "PEFT cannot hold the differences of" in weld("twin", "build", recipe, tmp_path / "out").err


def test_the_shared_model_is_task_arithmetic_with_03(classifiers: Path, tmp_path: Path) -> None:
    build(recipe_of(classifiers, {"router": {"kind": "uniform"}}), tmp_path / "out")
    shared = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(classifiers / "base" / "model.safetensors")
    experts = [load_file(classifiers / name / "model.safetensors") for name in ("chat", "code")]
    for name, value in base.items():
        wanted = value + 0.3 * sum(expert[f"bert.{name}"] - value for expert in experts)
        torch.testing.assert_close(shared[name], wanted, atol=1e-6, rtol=1e-5)


def test_heads_stand_beside_their_experts(classifiers: Path, tmp_path: Path) -> None:
    bundle = build(recipe_of(classifiers, FULL), tmp_path / "out")
    assert bundle.shared["class"] == "BertModel"
    for part, count in zip(bundle.experts, (2, 3), strict=True):
        assert part.head is not None
        assert part.head_config is not None
        assert part.labels is not None
        assert len(part.labels) == count
        assert set(load_file(part.head)) == {"classifier.weight", "classifier.bias"}
        assert json.loads(part.head_config.read_text())["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize("shared", ["no base", "base", "model"])
def test_classifiers_on_a_shared_classifier_keep_their_heads(classifiers: Path, tmp_path: Path, shared: str) -> None:
    """The shared model's configuration names the class of the experts, whose heads it has none of."""
    models = [str(classifiers / name) for name in ("chat", "code")]
    recipe: dict[str, Any] = {"models": models, "twin": FULL}
    if shared == "no base":
        recipe["merge_method"] = "linear"
    else:
        base = BertForSequenceClassification(BertConfig(**BERT))
        base.bert.load_state_dict(BertModel.from_pretrained(classifiers / "base").state_dict())
        base.save_pretrained(tmp_path / "base")
        recipe |= {"base_model": str(tmp_path / "base")} if shared == "base" else {}
        recipe["twin"] = FULL if shared == "base" else {**FULL, "shared": {"model": str(tmp_path / "base")}}
    bundle = build(recipe, tmp_path / "out")
    twin: Any = TwinModel.from_pretrained(bundle.folder)
    assert [len(outputs.labels) for outputs in twin.twin.outputs] == [2, 3]
    for name in bundle.names:
        expert = BertForSequenceClassification.from_pretrained(classifiers / name).eval()
        with torch.no_grad():
            found = twin(**INPUTS, experts=name, task=name).logits
            torch.testing.assert_close(found, expert(**INPUTS).logits, atol=1e-4, rtol=1e-4)
    bare: Any = TwinModel.from_pretrained(bundle.folder, task_class="BertModel")
    assert type(bare) is BertModel


def test_layers_are_the_best_approximation_of_their_rank(classifiers: Path, tmp_path: Path) -> None:
    twin = {"exclusive": {"rank": 3}, "router": {"kind": "uniform"}}
    bundle = build(recipe_of(classifiers, twin), tmp_path / "out")
    name = "encoder.layer.0.intermediate.dense.weight"
    delta = (
        load_file(classifiers / "chat" / "model.safetensors")[f"bert.{name}"]
        - load_file(tmp_path / "out" / "model.safetensors")[name]
    )
    u, s, v = torch.linalg.svd(delta)
    best = u[:, :3] * s[:3] @ v[:3]
    torch.testing.assert_close(compressed(bundle.folder, "chat")[name], best, atol=1e-5, rtol=1e-4)
    config = json.loads((tmp_path / "out" / "experts" / "chat" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3


def test_biases_are_shared_unless_the_recipe_says_otherwise(classifiers: Path, tmp_path: Path) -> None:
    build(recipe_of(classifiers, {"router": {"kind": "uniform"}}), tmp_path / "out")
    assert not any(name.endswith(".bias") for name in compressed(tmp_path / "out", "chat"))


@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_dense_kinds_keep_a_share_of_the_elements(classifiers: Path, tmp_path: Path, kind: str) -> None:
    twin = {"exclusive": {"kind": kind, "density": 0.25}, "router": {"kind": "uniform"}}
    bundle = build(recipe_of(classifiers, twin), tmp_path / "out")
    name = "encoder.layer.0.intermediate.dense.weight"
    delta = (
        load_file(classifiers / "chat" / "model.safetensors")[f"bert.{name}"]
        - load_file(tmp_path / "out" / "model.safetensors")[name]
    )
    kept = compressed(bundle.folder, "chat")[name]
    assert (kept != 0).float().mean() == pytest.approx(0.25, abs=0.05)
    scale = 4.0 if kind == "random" else 1.0
    torch.testing.assert_close(kept[kept != 0], scale * delta[kept != 0], atol=1e-6, rtol=1e-4)
    assert bundle.experts[0].adapter is None


def test_a_model_that_is_there_is_shared_as_it_is(classifiers: Path, tmp_path: Path) -> None:
    twin = {**FULL, "shared": {"model": str(classifiers / "base")}}
    bundle = build({**recipe_of(classifiers, twin), "base_model": None}, tmp_path / "out")
    shared, base = (load_file(p / "model.safetensors") for p in (tmp_path / "out", classifiers / "base"))
    assert all(torch.equal(shared[name], value) for name, value in base.items())
    assert bundle.shared["method"] == "existing model"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_card_says_how_peft_loads_an_expert(classifiers: Path, tmp_path: Path, name: str) -> None:
    if name == "llama":
        save_architecture(tmp_path, name)
    folder = tmp_path if name == "llama" else classifiers
    build(recipe_of(folder, {"exclusive": {"rank": 2}, "router": {"kind": "uniform"}}), tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("```python\n")[2].split("```")[0]
    found: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "out")).replace("NAME", "chat"), found)
    with torch.no_grad():
        loaded, wanted = found["model"].eval()(**INPUTS)[0], with_expert(tmp_path / "out", "chat")(**INPUTS)[0]
    torch.testing.assert_close(loaded, wanted)


def test_adapters_are_compressed_by_their_factors(tmp_path: Path) -> None:
    """The differences of a weighted sum of adapters have at most the sum of their ranks, and come out exactly."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES["llama"]
    architecture.build().save_pretrained(tmp_path / "base")
    for rank, name in enumerate(("chat", "code"), 2):
        base = architecture.build()
        base.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"), strict=False)
        config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(str(tmp_path / name))  # type: ignore[arg-type]
    out = tmp_path / "out"
    bundle = build({**recipe_of(tmp_path, FULL), "twin": {**FULL, "exclusive": {"rank": 8}}}, out)
    base = architecture.build()
    base.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"), strict=False)
    expert = PeftModel.from_pretrained(base, str(tmp_path / "chat")).eval()
    with torch.no_grad():
        wanted = expert(**INPUTS).logits
        torch.testing.assert_close(with_expert(out, "chat")(**INPUTS).logits, wanted, atol=1e-4, rtol=1e-4)
    config = json.loads((out / "experts" / "chat" / "adapter_config.json").read_text())
    assert config["r"] == 5
    assert bundle.experts[0].kept == pytest.approx(1.0)


def test_the_same_recipe_gives_the_same_bytes(classifiers: Path, tmp_path: Path) -> None:
    recipe = recipe_of(classifiers, {"exclusive": {"rank": 2}, "router": {"kind": "uniform"}})
    for threads in (1, 2):
        build(recipe, tmp_path / str(threads), threads=threads)
    one, two = tree(tmp_path / "1"), tree(tmp_path / "2")
    differing = [name for name in one if one[name] != two[name] and not name.endswith(("config.json", "twin.json"))]
    assert differing == []


def test_missing_and_altered_files_are_named(classifiers: Path, tmp_path: Path) -> None:
    build(recipe_of(classifiers, FULL), tmp_path / "out")
    path = tmp_path / "out" / "experts" / "chat" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (tmp_path / "out" / "experts" / "code" / "head.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"chat/adapter_model.safetensors was altered.*code/head.safetensors is missing"
    ):
        read_bundle(tmp_path / "out")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"exclusive": {"rank": 0}}, r"twin.exclusive.rank: `rank` must be at least 1"),
    "rank beyond": ({"exclusive": {"rank": 999}}, "rank 999 is beyond every matrix"),
    "half a rank": ({"exclusive": {"rank": 1.5}}, "not a whole number of singular values"),
    "density": ({"exclusive": {"density": 1.5}}, r"`density` must be in \(0, 1\]"),
    "both": ({"exclusive": {"rank": 1, "density": 0.5}}, "both `rank` and `density`"),
    "energy alone": ({"exclusive": {"energy": 0.5}}, "goes with `rank: auto`"),
    "key": ({"exclusiv": {}}, r"twin.exclusiv: there is no key.*Did you mean `exclusive`"),
    "pattern": ({"exclude": ["nothing"]}, "'nothing' fits no tensor"),
    "unknown data": ({"router": {"kind": "mlp", "data": {"nobody": "."}}}, "there is no expert `nobody`"),
    "unknown expert": ({"router": {"kind": "fixed", "expert": "nobody"}}, "there is no expert `nobody`"),
    "no data": ({"router": {"kind": "mlp"}}, "learns from examples, and there are none"),
    "method": ({"shared": {"merge_method": "tises"}}, r"twin.shared.merge_method: there is no method"),
    "parameter": ({"shared": {"parameters": {"lambda": "x"}}}, r"twin.shared.parameters.lambda"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(classifiers: Path, tmp_path: Path, case: str) -> None:
    twin, message = BAD[case]
    with pytest.raises(UserError, match=message):
        build(recipe_of(classifiers, {"router": {"kind": "uniform"}, **twin}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_experts_without_a_common_base_are_refused(classifiers: Path, tmp_path: Path) -> None:
    other = BertModel(BertConfig(**{**BERT, "hidden_size": 16}))
    other.save_pretrained(tmp_path / "other")
    recipe = recipe_of(classifiers, FULL)
    recipe["models"][1] = str(tmp_path / "other")
    with pytest.raises(PlanError, match=r"different size|different shapes|different vocabularies"):
        build(recipe, tmp_path / "out")


def test_names_are_unique(classifiers: Path, tmp_path: Path) -> None:
    models = [{"model": str(classifiers / name), "name": "one"} for name in ("chat", "code")]
    with pytest.raises(UserError, match="two experts are named `one`"):
        build({**recipe_of(classifiers, FULL), "models": models}, tmp_path / "out")
    models = [{"model": str(classifiers / "chat"), "name": "one"}, str(classifiers / "code")]
    bundle = build({**recipe_of(classifiers, FULL), "models": models}, tmp_path / "out")
    assert bundle.names == ("one", "code")
    models = [{"model": {"path": str(classifiers / "chat")}, "name": "one"}, str(classifiers / "code")]
    bundle = build({**recipe_of(classifiers, FULL), "models": models}, tmp_path / "spelled")
    assert bundle.names == ("one", "code")


def test_the_command_builds_and_refuses_to_overwrite(classifiers: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", recipe_of(classifiers, {"router": {"kind": "uniform"}}))
    assert weld("twin", "build", recipe, tmp_path / "out").code == 0
    before = tree(tmp_path / "out")
    found = weld("twin", "build", recipe, tmp_path / "out")
    assert found.code == 2
    assert "not empty" in found.err
    assert tree(tmp_path / "out") == before
    assert weld("verify", tmp_path / "out").code == 0


def test_nan_leaves_nothing(classifiers: Path, tmp_path: Path) -> None:
    for name in ("base", "chat", "code"):
        tensors = load_file(classifiers / name / "model.safetensors")
        if name == "chat":
            tensors["bert.encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_bytes((classifiers / name / "config.json").read_bytes())
    found = weld("twin", "build", write_recipe(tmp_path / "r.yml", recipe_of(tmp_path, FULL)), tmp_path / "out")
    assert found.code == 1
    assert not (tmp_path / "out").exists()


def test_an_export_for_vllm_has_one_rank_and_the_same_products(tmp_path: Path) -> None:
    save_architecture(tmp_path, "llama")
    twin = {"exclusive": {"rank": [2, 5]}, "exclude": ["*norm*", "*embed*", "lm_head*"], "router": {"kind": "uniform"}}
    build(recipe_of(tmp_path, twin), tmp_path / "out")
    found = weld("twin", "export", tmp_path / "out", tmp_path / "vllm", "--export", "vllm")
    assert found.code == 0, found.err
    assert "--max-lora-rank 8 --lora-modules chat=chat code=code" in found.out
    config = json.loads((tmp_path / "vllm" / "chat" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (5, {})
    tensors = load_file(tmp_path / "vllm" / "chat" / "adapter_model.safetensors")
    assert {tensor.shape[0 if ".lora_A." in name else 1] for name, tensor in tensors.items()} == {5}
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "vllm" / "model")
    served = PeftModel.from_pretrained(model, str(tmp_path / "vllm" / "chat")).eval()
    with torch.no_grad():
        torch.testing.assert_close(served(**INPUTS).logits, with_expert(tmp_path / "out", "chat")(**INPUTS).logits)


def test_an_export_names_what_vllm_cannot_hold(classifiers: Path, tmp_path: Path) -> None:
    build(recipe_of(classifiers, FULL), tmp_path / "out")
    found = weld("twin", "export", tmp_path / "out", tmp_path / "vllm")
    assert found.code == 2
    for words in ("embeddings or an output head", "norms, biases", "a task head"):
        assert words in found.err
    assert not (tmp_path / "vllm").exists()


@pytest.mark.parametrize("name", ["model", "Shared"])
def test_an_export_has_no_expert_with_the_name_of_the_shared_model(tmp_path: Path, name: str) -> None:
    save_architecture(tmp_path, "llama")
    twin = {"exclusive": {"rank": 2}, "exclude": ["*norm*", "*embed*", "lm_head*"], "router": {"kind": "uniform"}}
    models = [{"model": str(tmp_path / "chat"), "name": name}, str(tmp_path / "code")]
    build({**recipe_of(tmp_path, twin), "models": models}, tmp_path / "out")
    found = weld("twin", "export", tmp_path / "out", tmp_path / "vllm")
    assert found.code == 2
    assert f"experts/{name}: vLLM cannot serve {name}: the shared model has that name there" in found.err
    assert not (tmp_path / "vllm").exists()


def test_the_recipe_of_the_guide_says_what_the_defaults_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guide-twin.md").read_text(encoding="utf-8")
    written = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    save_classifiers(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    bundle = build(written, "out")
    assert bundle.names == ("chat", "coder")
    build({**written, "twin": {}}, "short")
    names = [name for name in tree(tmp_path / "out") if name.endswith(".safetensors")]
    assert all(tree(tmp_path / "out")[name] == tree(tmp_path / "short")[name] for name in names)


@pytest.mark.parametrize("settings", [{"rank": "auto", "energy": 0.9}, {"rank": [1, 4]}, {"rank": "auto"}])
def test_amounts_may_be_energies_and_gradients(classifiers: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    bundle = build(recipe_of(classifiers, {"exclusive": settings, "router": {"kind": "uniform"}}), tmp_path / "out")
    factors = load_file(tmp_path / "out" / "experts" / "chat" / "adapter_model.safetensors")
    ranks = [factors[f"base_model.model.encoder.layer.{layer}.output.dense.lora_A.weight"].shape[0] for layer in (0, 1)]
    if settings["rank"] == [1, 4]:
        assert ranks == [1, 4]
    else:
        assert bundle.experts[0].kept == pytest.approx(settings.get("energy", 0.99), abs=0.05)


def test_a_killed_build_leaves_out_as_it_was(
    classifiers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a run left beside OUT is cleared by the next one, which starts anew."""
    recipe = recipe_of(classifiers, {"router": {"kind": "uniform"}})
    build(recipe, tmp_path / "out")
    before = tree(tmp_path / "out")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("weldment.twin.build.compress", stopped)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == before
    (tmp_path / "out.partial" / "stages").mkdir(parents=True)
    (tmp_path / "out.partial" / "stages" / "rest").write_text("of a killed run")
    build({**recipe, "twin": {**recipe["twin"], "exclusive": {"rank": 1}}}, tmp_path / "out", overwrite=True)
    assert read_bundle(tmp_path / "out").exclusive["rank"] == 1
    assert not (tmp_path / "out.partial").exists()


def test_too_little_memory_says_what_is_needed(classifiers: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The least it needs is"):
        build(recipe_of(classifiers, FULL), tmp_path / "out", max_memory=10**6)
    assert not (tmp_path / "out").exists()
