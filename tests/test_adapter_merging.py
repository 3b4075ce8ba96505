"""Merging adapters to an adapter: goldens, identities, PEFT as the judge, and how a merge ends."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, PreTrainedModel

import weldment
from adapter_folders import tensors
from folders import tree, weld, write_recipe
from lora_folders import (
    MODULES,
    PREFIX,
    adapters_recipe,
    config_of,
    deltas,
    distance,
    tensors_of,
    write_lora,
)
from paths import GOLDEN, SHARED, needs_golden
from peft_folders import bert, gpt2, llama, make, mixtral, resnet
from test_adapters_application import KINDS
from test_contract import TYPICAL
from weldment import METHODS, NonFiniteError, OutputError, PlanError, merge_tensors, verify
from weldment.adapters.opening import open_adapter_folder
from weldment.engine.progress import Amount
from weldment.report.manifest import read_manifest

SAME = [GOLDEN / "adapters" / f"same_r4_{n}" for n in range(3)]
MIXED = [GOLDEN / "adapters" / f"mixed_r{n}" for n in (2, 4, 8)]
Q = MODULES[0]


class Said:
    """Remembers what a merge says."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.total = self.done = 0

    def begin(self, total: Amount, done: Amount) -> None:
        self.total, self.done = total.nbytes, done.nbytes

    def advance(self, tensor: str, amount: Amount) -> None:
        self.done += amount.nbytes

    def message(self, text: str) -> None:
        self.messages.append(text)


def merged(out: Path, method: str, *folders: Path, **keys: Any) -> dict[str, Tensor]:
    """The changes of a merge of adapters."""
    weldment.merge(adapters_recipe(method, *folders, **keys), out, overwrite=True, threads=2)
    return deltas(out)


def summed(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(folder).items():
            found[name] = found.get(name, torch.zeros_like(delta)) + weight * delta
    return found


# What PEFT made.


@needs_golden
@pytest.mark.parametrize("case", ["cat", "cat_mixed", "cat_negative"])
def test_peft_s_concatenations(case: str, tmp_path: Path) -> None:
    """B A of the reference, and its rank."""
    folder = GOLDEN / "peft" / case
    call = json.loads(json.dumps(_yaml(folder / "recipe.yml")).replace("MODELS", str(GOLDEN)))
    found = merged(
        tmp_path / "out", "task_arithmetic", *map(Path, call["adapters"]), weight=call["weights"], space="cat"
    )
    assert distance(found, deltas(folder)) <= 1e-6
    assert config_of(tmp_path / "out")["r"] == config_of(folder)["r"]


@needs_golden
@pytest.mark.parametrize("case", sorted(p.name for p in (GOLDEN / "peft").glob("*")) if GOLDEN.is_dir() else [])
def test_calls_of_peft(case: str, tmp_path: Path) -> None:
    """Each of PEFT's combination types, through a recipe and a folder; A and B where PEFT merges these."""
    folder = GOLDEN / "peft" / case
    call = json.loads(json.dumps(_yaml(folder / "recipe.yml")).replace("MODELS", str(GOLDEN)))
    weldment.merge(call, tmp_path / "out")
    verify(tmp_path / "out")
    assert distance(deltas(tmp_path / "out"), deltas(folder)) <= 1e-4
    if "svd" not in case and "cat" not in case:
        ours, theirs = tensors_of(tmp_path / "out"), tensors_of(folder)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)


@needs_golden
def test_the_native_factors_are_peft_s_linear(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"weight": [2.0, 1.0, 0.5], "space": "factors"}
    found = merged(tmp_path / "out", "task_arithmetic", *SAME, **keys)
    assert distance(found, deltas(GOLDEN / "peft" / "linear")) <= 1e-5


def _yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


# Every method.


@needs_golden
@pytest.mark.parametrize("space", ["delta", "core"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_merges_adapters(method: str, space: str, tmp_path: Path) -> None:
    """In delta: the method on the changes, with a base of zero; in core: an adapter of the same kind."""
    row = METHODS[method]
    count = row.models[1] or 3
    folders = SAME[:count]
    parameters = {key: value for key, value in TYPICAL[method].items() if not isinstance(value, list)}
    lists = {key: value for key, value in TYPICAL[method].items() if isinstance(value, list)}
    written = {key.rstrip("_"): value for key, value in parameters.items()}
    recipe = adapters_recipe(method, *folders, space=space, rank="full", accumulate="float64", parameters=written)
    for index, item in enumerate(recipe["models"]):
        item["parameters"] = {key: value[index] for key, value in lists.items()}
    weldment.merge(recipe, tmp_path / "out")
    verify(tmp_path / "out")
    found = deltas(tmp_path / "out")
    assert found.keys() == deltas(SAME[0]).keys()
    if space == "core":
        assert max(map(torch.linalg.matrix_rank, found.values())) <= 12
        return
    changes = [{f"{name}.weight": delta for name, delta in deltas(folder).items()} for folder in folders]
    needs_base = row.base == "required" and not row.base_is_model
    base = {name: torch.zeros_like(delta) for name, delta in changes[0].items()} if needs_base else None
    wanted = merge_tensors(method, changes, base, accumulate="float64", **TYPICAL[method])
    assert distance({f"{name}.weight": delta for name, delta in found.items()}, wanted) <= 1e-5


IDENTITIES: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"gamma": 0.0},
    "breadcrumbs_ties": {"gamma": 0.0},
    "consensus_ta": {"lambda_t": 0.0, "k": 1},
    "ram": {"epsilon": 0.0},
    "ramplus_tl": {"epsilon": 0.0},
    "drm": {"singular_matrices_drop_rate": 0.0},
}
ALONE = sorted(
    set(METHODS) - {name for name, row in METHODS.items() if row.models[0] > 1} - {"pcb", "iso_c", "iso_cts"}
)
"""Without those that change what a single expert has: its small values, or its singular values."""
FACTORWISE = sorted(set(ALONE) - {"consensus_ta", "ramplus_tl"})
"""Without those that select or scale elements of A and of B apart."""
SPACES_OF = [(m, s) for s in ("delta", "core") for m in ALONE] + [(method, "factors") for method in FACTORWISE]


@needs_golden
@pytest.mark.parametrize(("method", "space"), SPACES_OF)
def test_an_adapter_alone_is_the_identity(method: str, space: str, tmp_path: Path) -> None:
    folder = GOLDEN / "adapters" / "rslora_r4"
    found = merged(tmp_path / "out", method, folder, space=space, parameters=IDENTITIES.get(method, {}))
    assert distance(found, deltas(folder)) <= 1e-6
    assert config_of(tmp_path / "out")["r"] == 4


@needs_golden
@pytest.mark.parametrize("weights", [[1.0, 0.5, 0.25], [1.0, -0.5, 2.0]], ids=str)
@pytest.mark.parametrize("space", ["delta", "core", "cat"])
def test_sums_are_exact_in_every_space_for_mixed_adapters(space: str, weights: list[float], tmp_path: Path) -> None:
    """Ranks 2, 4 and 8, other alphas, other modules; nothing is cut."""
    rank = {} if space == "cat" else {"rank": "full"}
    found = merged(tmp_path / "out", "task_arithmetic", *MIXED, weight=weights, space=space, **rank)
    assert distance(found, summed(MIXED, weights)) <= 1e-6
    assert max(map(float, read_losses(tmp_path / "out"))) <= 1e-6


@needs_golden
def test_core_and_delta_are_cut_to_the_same(tmp_path: Path) -> None:
    weights = [1.0, -0.5, 0.25]
    delta, core = (
        merged(tmp_path / space, "task_arithmetic", *SAME, weight=weights, space=space) for space in ("delta", "core")
    )
    assert distance(core, delta) <= 1e-6


def read_losses(out: Path) -> list[float]:
    return [module["lost"] for module in read_manifest(out)["modules"].values()]


# Ranks.


@needs_golden
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_the_cut_is_the_best_one_and_its_loss_is_reported(method: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"parameters": {"density": 0.5}} if method == "ties" else {}
    whole = merged(tmp_path / "full", method, *SAME, rank="full", **keys)
    said = Said()
    recipe = adapters_recipe(method, *SAME, rank=3, **keys)
    result = weldment.merge(recipe, tmp_path / "out", progress=said)
    found = deltas(tmp_path / "out")
    lost = read_manifest(tmp_path / "out")["modules"]
    for name, delta in whole.items():
        s = torch.linalg.svdvals(delta)
        best = float(s[3:].norm() / s.norm())
        assert float((found[name] - delta).norm() / delta.norm()) == pytest.approx(best, abs=1e-5)
        assert lost[name]["lost"] == pytest.approx(best, abs=1e-5)
        assert result.lost[name] == pytest.approx(best, abs=1e-5)
        assert lost[name]["rank"] == 3
    overall = sum(float((found[n] - d).square().sum()) for n, d in whole.items())
    share = (overall / sum(float(d.square().sum()) for d in whole.values())) ** 0.5
    worst = max(result.lost, key=lambda name: result.lost[name])
    assert said.messages[-1].startswith("rank 3; the cut to the rank lost ")
    assert f"lost {share:.2%} of the change" in said.messages[-1]
    assert said.messages[-1].endswith(f"at most {result.lost[worst]:.2%}, in {worst}")
    assert said.done == said.total


@needs_golden
def test_auto_keeps_the_energy_with_the_least_rank(tmp_path: Path) -> None:
    whole = merged(tmp_path / "full", "linear", *SAME, rank="full")
    found = merged(tmp_path / "out", "linear", *SAME, rank="auto")
    ranks = {name: module["rank"] for name, module in read_manifest(tmp_path / "out")["modules"].items()}
    for name, delta in whole.items():
        energies = torch.linalg.svdvals(delta).square().cumsum(0)
        assert ranks[name] == int((energies < 0.99 * energies[-1]).sum()) + 1
        assert float((found[name] - delta).square().sum() / delta.square().sum()) <= 0.01 + 1e-6
    assert len(set(ranks.values())) > 1
    assert set(config_of(tmp_path / "out")["rank_pattern"].values()) == set(ranks.values()) - {
        config_of(tmp_path / "out")["r"]
    }


def test_a_change_of_zero_has_rank_one(tmp_path: Path) -> None:
    fresh = write_lora(tmp_path / "a")
    stored = load_file(fresh / "adapter_model.safetensors")
    zeroed = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in stored.items()}
    save_file(zeroed, fresh / "adapter_model.safetensors", {"format": "pt"})
    found = merged(tmp_path / "out", "linear", fresh, rank="auto")
    assert all(not delta.any() for delta in found.values())
    assert config_of(tmp_path / "out")["r"] == 1


def test_equal_adapters_need_no_more_rank_than_one_of_them(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a")
    found = merged(tmp_path / "out", "linear", a, a, a, rank="full")
    assert distance(found, deltas(a)) <= 1e-6
    assert config_of(tmp_path / "out")["r"] == 2


# Parts of adapters.


def test_gradients_filters_drop_and_take(tmp_path: Path) -> None:
    a, b = write_lora(tmp_path / "a", seed=1), write_lora(tmp_path / "b", seed=2, rank=3)
    recipe = adapters_recipe(
        "task_arithmetic", a, b, drop=["model.layers.2.*"], take={"*layers.1*v_proj": str(b)}, rank="full"
    )
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "v_proj", "value": -1.0}, {"value": [0.0, 1.0]}]}
    weldment.merge(recipe, tmp_path / "out")
    found, one, two = deltas(tmp_path / "out"), deltas(a), deltas(b)
    assert sorted(found) == MODULES[:4]
    wanted = {
        MODULES[0]: two[MODULES[0]],
        MODULES[1]: two[MODULES[1]] - one[MODULES[1]],
        MODULES[2]: two[MODULES[2]] + one[MODULES[2]],
        MODULES[3]: two[MODULES[3]],
    }
    assert distance(found, wanted) <= 1e-6


def test_biases_are_merged_as_vectors_with_their_scales(tmp_path: Path) -> None:
    """ties elects signs in them too; modules without one get zeros."""
    folders = []
    for seed, alpha in ((1, 4.0), (2, 1.0)):
        bias = torch.tensor([1.0, -1.0, 2.0, 0.5, 0.0, 3.0] * 2) * (-1) ** seed + seed
        more = {f"{Q}.lora_B.bias": bias}
        folders.append(write_lora(tmp_path / f"{seed}", seed=seed, alpha=alpha, lora_bias=True, more=more))
    plain = write_lora(tmp_path / "plain", seed=3)
    vectors = [tensors_of(f)[f"{Q}.lora_B.bias"] * s for f, s in zip(folders, (2.0, 0.5), strict=True)]
    for method, keys in (("task_arithmetic", {"weight": [1.0, -0.5, 1.0]}), ("ties", {})):
        merged(tmp_path / "out", method, *folders, plain, **keys)
        found = tensors_of(tmp_path / "out")
        wanted = merge_tensors(method, [*vectors, torch.zeros(12)], torch.zeros(12), **keys)
        assert torch.allclose(found[f"{Q}.lora_B.bias"], wanted, atol=1e-6)
        assert not found[f"{MODULES[1]}.lora_B.bias"].any()
        assert config_of(tmp_path / "out")["lora_bias"] is True


def test_saved_tensors_and_heads_are_written(tmp_path: Path) -> None:
    folders = [
        write_lora(
            tmp_path / name,
            seed=seed,
            more={"classifier.weight": torch.full((4, 8), float(seed)), "pooler.weight": torch.full((2, 2), seed / 1)},
            modules_to_save=["classifier", "pooler"],
        )
        for seed, name in ((1, "one"), (4, "four"))
    ]
    merged(tmp_path / "out", "task_arithmetic", *folders, heads=["classifier.*"], weight=[3.0, 1.0])
    verify(tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")["pooler.weight"], torch.full((2, 2), 2.5))
    heads = tensors(tmp_path / "out" / "heads")
    assert {path.name for path in (tmp_path / "out" / "heads").iterdir()} == {"one.safetensors", "four.safetensors"}
    assert torch.equal(load_file(tmp_path / "out/heads/four.safetensors")["classifier.weight"], torch.full((4, 8), 4.0))
    assert set(heads) == {"classifier.weight"}
    assert config_of(tmp_path / "out")["modules_to_save"] == ["pooler"]
    record = read_manifest(tmp_path / "out")
    assert record["ledger"][str(folders[0])]["head"] == {f"{PREFIX}classifier.weight": ""}
    (tmp_path / "out/heads/four.safetensors").write_bytes(b"")
    with pytest.raises(weldment.VerificationError, match=r"heads/four\.safetensors"):
        verify(tmp_path / "out")


def test_every_input_tensor_is_accounted_for(tmp_path: Path) -> None:
    a, b = write_lora(tmp_path / "a"), write_lora(tmp_path / "b", seed=1)
    merged(tmp_path / "out", "linear", a, b, drop=["*.v_proj"])
    ledger = read_manifest(tmp_path / "out")["ledger"]
    for folder in (a, b):
        named = [name for fates in ledger[str(folder)].values() for name in fates]
        assert sorted(named) == sorted(load_file(folder / "adapter_model.safetensors"))


# PEFT is the judge.


def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    images = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
    texts = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    with torch.no_grad():
        return model.eval()(**(images if "ResNet" in type(core).__name__ else texts)).logits.double()


def loaded(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter on its base; fails if PEFT misses a tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(base.eval(), folder)


RUNS_NOT = {"one parameter": "grouped matrix products of this torch need larger sizes"}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - RUNS_NOT.keys()))
def test_each_kind_alone_is_the_same_function_for_peft(kind: str, method: str, tmp_path: Path) -> None:
    build, lora = KINDS[kind]
    pair = make(tmp_path, build, **lora)
    weldment.merge(adapters_recipe(method, pair.adapter), tmp_path / "out")
    verify(tmp_path / "out")
    torch.manual_seed(0)
    found, wanted = logits(loaded(build(), tmp_path / "out")), logits(pair.adapted)
    assert float((found - wanted).norm() / wanted.norm()) <= 3e-6


SUMS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "lora": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "biases": (lambda: llama(attention_bias=True), {"target_modules": ["q_proj"], "lora_bias": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "convolutions": (resnet, {"target_modules": ["convolution"]}),
    "experts": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "saved": (bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("space", ["delta", "core", "cat"])
@pytest.mark.parametrize("kind", SUMS)
def test_sums_of_two_adapters_are_those_of_the_merged_weights(kind: str, space: str, tmp_path: Path) -> None:
    """base + 0.75 (PEFT's merge of one - base) + 0.25 (of the other - base), weight by weight."""
    build, lora = SUMS[kind]
    one, two = make(tmp_path, build, seed=1, **lora), make(tmp_path, build, seed=2, **{**lora, "r": 3})
    rank = {} if space == "cat" else {"rank": "full"}
    recipe = adapters_recipe("linear", one.adapter, two.adapter, weight=[0.75, 0.25], space=space, **rank)
    weldment.merge(recipe, tmp_path / "out")
    torch.manual_seed(0)
    loaded(build(), tmp_path / "out").merge_and_unload().save_pretrained(tmp_path / "found")
    found = load_file(tmp_path / "found" / "model.safetensors")
    assert found.keys() == one.merged.keys()
    for name, tensor in found.items():
        wanted = 0.75 * one.merged[name].double() + 0.25 * two.merged[name].double()
        assert float((tensor - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max().clamp(min=1.0)), name


@needs_golden
@pytest.mark.parametrize("space", ["delta", "core", "cat"])
def test_peft_puts_merged_adapters_of_other_ranks_on_the_base(space: str, tmp_path: Path) -> None:
    rank = {} if space == "cat" else {"rank": "full"}
    found = merged(tmp_path / "out", "task_arithmetic", *MIXED, weight=[1.0, -0.5, 2.0], space=space, **rank)
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", dtype=torch.float32)
    before = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    after = loaded(base, tmp_path / "out").merge_and_unload().state_dict()
    for name, tensor in before.items():
        change = found.get(name.removesuffix(".weight"))
        wanted = tensor.double() if change is None else tensor.double() + change
        assert float((after[name] - wanted).abs().max()) <= 1e-6 * max(1.0, float(wanted.abs().max())), name


def test_experts_of_a_stack_are_merged_apart(tmp_path: Path) -> None:
    """ties on each expert's matrix, in the shapes that PEFT reads back."""
    lora = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    pairs = [make(tmp_path, mixtral, seed=seed, **lora) for seed in (1, 2)]
    recipe = adapters_recipe("ties", *(p.adapter for p in pairs), parameters={"density": 0.5}, rank="full")
    weldment.merge({**recipe, "accumulate": "float64"}, tmp_path / "out")
    torch.manual_seed(0)
    base = {name: tensor.double() for name, tensor in mixtral().state_dict().items()}
    torch.manual_seed(0)
    found = loaded(mixtral(), tmp_path / "out").merge_and_unload().state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    one, two = (_expert_changes(p.adapter) for p in pairs)
    for expert in range(3):
        wanted = merge_tensors(
            "ties", [one[expert], two[expert]], torch.zeros_like(one[expert]), density=0.5, accumulate="float64"
        )
        assert torch.allclose(found[name][expert].double() - base[name][expert], wanted, atol=1e-6)
    again = open_adapter_folder(tmp_path / "out", "out")
    assert [layer.experts for layer in again.layers.values()] == [3]


def _expert_changes(folder: Path) -> list[Tensor]:
    stored = {name.rpartition("lora_")[2]: tensor.double() for name, tensor in tensors_of(folder).items()}
    a, b = stored["A.weight"], stored["B.weight"]
    config = config_of(folder)
    scale, rank = config["lora_alpha"] / config["r"], config["r"]
    return [scale * b[:, e :: a.shape[0] // rank] @ a[e * rank : (e + 1) * rank] for e in range(a.shape[0] // rank)]


# Real adapters.

REAL = [SHARED / "experts" / "lora" / name for name in ("agnews", "emotion", "sst2", "trec")]
needs_experts = pytest.mark.skipif(not REAL[0].is_dir(), reason="the real adapters (../shared/experts) are not here")


@needs_experts
@pytest.mark.parametrize("keys", [{"space": "core"}, {"space": "cat"}, {"rank": 8}], ids=str)
def test_the_real_adapters_with_their_heads(keys: dict[str, Any], tmp_path: Path) -> None:
    found = merged(tmp_path / "out", "linear", *REAL, heads=["classifier.*"], **keys)
    verify(tmp_path / "out")
    wanted = summed(REAL, [0.25] * 4)
    lost = read_manifest(tmp_path / "out")["modules"]
    for name, delta in wanted.items():
        error = float((found[name] - delta).norm() / delta.norm())
        assert error == pytest.approx(lost[name]["lost"], abs=1e-5)
    heads = {path.stem: load_file(path) for path in (tmp_path / "out" / "heads").iterdir()}
    assert sorted(heads) == ["agnews", "emotion", "sst2", "trec"]
    assert heads["trec"]["classifier.weight"].shape == (6, 384)
    config = config_of(tmp_path / "out")
    assert config["exclude_modules"] == ["pooler.dense", "bert.pooler.dense"]
    assert sorted(config["target_modules"]) == ["dense", "key", "query", "value"]
    model = BertForSequenceClassification(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536))
    assert config["task_type"] is None, "PEFT would look for the classifier"
    peft = loaded(model, tmp_path / "out")
    layer = peft.get_submodule(f"base_model.model.{next(iter(wanted))}")
    assert isinstance(layer, torch.nn.Module)
    change = layer.get_delta_weight("default")  # type: ignore[operator]
    assert distance({"x": change.double()}, {"x": found[next(iter(wanted))]}) <= 1e-5


@needs_experts
def test_the_real_adapters_without_heads_say_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"`heads: \[\"classifier\.\*\"\]`"):
        weldment.merge(adapters_recipe("linear", *REAL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Into the base.


def test_output_model_merges_into_the_base(tmp_path: Path) -> None:
    one, two = (make(tmp_path, llama, seed=s, target_modules=["q_proj", "down_proj"]) for s in (1, 2))
    base = load_file(one.base / "model.safetensors")
    recipe = adapters_recipe(
        "task_arithmetic", one.adapter, two.adapter, base_model=str(one.base), output="model", weight=[0.5, -0.25]
    )
    weldment.merge(recipe, tmp_path / "out")
    verify(tmp_path / "out")
    found = tensors(tmp_path / "out")
    for name, tensor in base.items():
        wanted = tensor + 0.5 * (one.merged[name] - tensor) - 0.25 * (two.merged[name] - tensor)
        assert torch.allclose(found[name], wanted, atol=1e-6), name
    assert (tmp_path / "out" / "config.json").is_file()


# How a merge ends.


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_lora(tmp_path / "a", seed=1), write_lora(tmp_path / "b", seed=2)


@pytest.mark.parametrize(
    "keys",
    [{"merge_method": "dare_ties", "parameters": {"density": 0.5}}, {"space": "core"}, {"rank": "auto"}],
    ids=str,
)
def test_the_same_bytes_for_any_number_of_threads(pair: tuple[Path, Path], tmp_path: Path, keys: Any) -> None:
    recipe = {**adapters_recipe("linear", *pair), **keys}
    trees = []
    for threads in (1, 2, 5):
        weldment.merge(recipe, tmp_path / "out", threads=threads, overwrite=True)
        trees.append(tree(tmp_path / "out"))
    assert trees[0] == trees[1] == trees[2]


def test_dtypes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    half = write_lora(tmp_path / "half", dtype=torch.bfloat16)

    def dtypes(*folders: Path, **keys: Any) -> set[torch.dtype]:
        merged(tmp_path / "out", "linear", *folders, **keys)
        return {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()}

    assert dtypes(half, pair[0]) == {torch.bfloat16}
    assert dtypes(pair[0], half) == {torch.float32}
    assert dtypes(*pair, dtype="float16") == {torch.float16}
    merged(tmp_path / "out", "linear", half)
    assert tree(tmp_path / "out").keys() >= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    found, given = tensors_of(tmp_path / "out"), tensors_of(half)
    assert torch.equal(found[f"{Q}.lora_B.weight"], given[f"{Q}.lora_B.weight"]), (
        "one adapter alone is not recalculated"
    )


def test_an_output_is_not_replaced_unasked_nor_over_an_input(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = adapters_recipe("linear", *pair)
    with pytest.raises(OutputError, match="the output is also an input"):
        weldment.merge(recipe, pair[0], overwrite=True)
    weldment.merge(recipe, tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        weldment.merge(recipe, tmp_path / "out")
    weldment.merge({**recipe, "rank": 1}, tmp_path / "out", overwrite=True)
    assert config_of(tmp_path / "out")["r"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_nan_in_an_input_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    stored = load_file(pair[1] / "adapter_model.safetensors")
    stored[f"{PREFIX}{Q}.lora_A.weight"][0, 0] = float("nan")
    save_file(stored, pair[1] / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"b/adapter_model\.safetensors: tensor '{PREFIX}{Q}\.lora_A\.weight'"):
        weldment.merge(adapters_recipe("linear", *pair), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_too_large_for_its_dtype_is_an_error_unless_allowed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = adapters_recipe("task_arithmetic", *pair, dtype="float16", parameters={"weight": 1e12})
    with pytest.raises(NonFiniteError, match="NaN or infinity in 6 tensors"):
        weldment.merge(recipe, tmp_path / "out")
    said = Said()
    weldment.merge(recipe, tmp_path / "out", allow_nonfinite=True, progress=said)
    assert any("NaN or infinity" in text for text in said.messages)


@pytest.mark.parametrize("heads", [False, True])
def test_ctrl_c_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: bool
) -> None:
    class Interrupting(Said):
        def advance(self, tensor: str, amount: Amount) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weldment.merge(adapters_recipe("linear", *pair), tmp_path / "out", progress=Interrupting())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weldment.adapters.writing.write_manifest", interrupted)
    write_recipe(tmp_path / "r.yml", adapters_recipe("linear", *pair, **({"heads": ["c.*"]} if heads else {})))
    if heads:
        for folder in pair:
            write_lora(folder, more={"c.weight": torch.ones(2, 2)}, modules_to_save=["c"])
    result = weld("merge", tmp_path / "r.yml", tmp_path / "out")
    assert result.code == 130
    assert "interrupted: nothing was written" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "r.yml"]


def test_the_card_and_the_manifest_say_how_it_was_made(pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = adapters_recipe("dare_ties", *pair, parameters={"density": 0.5}, seed=3, name="mine")
    result = weldment.merge(recipe, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\nbase_model_relation: adapter\nlibrary_name: peft\n")
    assert "# mine" in card
    assert "- `a`\n- `b`" in card
    assert str(tmp_path) not in card
    record = read_manifest(tmp_path / "out")
    assert (record["seed"], record["plan"], record["recipe"]) == (3, result.plan.hash, [recipe])
    assert record["tensors"] == dict(result.checksums)
    assert [file["name"] for file in record["inputs"][str(pair[0])]["files"]] == ["adapter_model.safetensors"]


def test_the_command(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "r.yml", adapters_recipe("ties", Path("a"), Path("b"), rank=1))
    dry = weld("merge", "r.yml", "out", "--dry-run")
    assert (dry.code, (tmp_path / "out").exists()) == (0, False)
    assert dry.out.startswith("ties: 2 adapters to an adapter")
    done = weld("merge", "r.yml", "out")
    assert done.code == 0
    assert "rank 1; the cut to the rank lost " in done.err
    assert done.out.startswith("done: out, ")
    assert weld("verify", "out").code == 0
    record = json.loads(weld("merge", "r.yml", "out", "--overwrite", "--json", "-q").out)
    assert record["lost"].keys() == set(MODULES)
    assert weld("merge", "r.yml", "out", "-q").code == 2
    assert weld("merge", "r.yml", "other", "--max-memory", "1MB").code == 2
    assert weld("merge", "r.yml", "other", "--set", "space=cat").code == 2
