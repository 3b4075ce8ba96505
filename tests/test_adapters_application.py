"""`base+adapter` as a model, against what PEFT makes of the same base and adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from adapter_folders import assert_close, tensors
from folders import tree
from paths import SHARED
from peft_folders import (
    bert,
    gpt2,
    gpt_oss,
    llama,
    make,
    merged_by_weldment,
    mixtral,
    qwen,
    resnet,
)
from test_lanes import Careless, LateLane
from weldment import NonFiniteError, Plan, merge, plan
from weldment.engine import memory, run
from weldment.engine.pools import can_fork
from weldment.engine.workspace import KEPT_BYTES

Build = Callable[[], PreTrainedModel]
LINEAR = ["q_proj", "v_proj", "down_proj"]


def biased() -> PreTrainedModel:
    return llama(attention_bias=True, mlp_bias=True)


KINDS: dict[str, tuple[Build, dict[str, Any]]] = {
    "lora": (llama, {"target_modules": LINEAR}),
    "all-linear": (llama, {"target_modules": "all-linear", "r": 5}),
    "rslora": (llama, {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        llama,
        {"target_modules": LINEAR, "rank_pattern": {"layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"down_.*": 7}},
    ),
    "layers": (llama, {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "lora_bias": (biased, {"target_modules": LINEAR, "lora_bias": True}),
    "bias all": (biased, {"target_modules": LINEAR, "bias": "all"}),
    "bias lora_only": (biased, {"target_modules": LINEAR, "bias": "lora_only"}),
    "dora": (llama, {"target_modules": LINEAR, "use_dora": True}),
    "dora rslora": (llama, {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora embedding": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": (llama, {"target_modules": ["lm_head"]}),
    "saved embedding": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "dora conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "modules_to_save": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "saved pooler": (bert, {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]}),
    "convolutions": (resnet, {"target_modules": ["convolution"]}),
    "dora convolutions": (resnet, {"target_modules": ["convolution"], "use_dora": True}),
    "experts apart": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "router": (mixtral, {"target_modules": [], "target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"]}),
    "names of before": (mixtral, {"target_modules": ["w1", "w2", "w3", "gate"]}),
    "one parameter": (qwen, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "experts together": (
        gpt_oss,
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "use_rslora": True},
    ),
    "square experts": (gpt_oss, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "biases of experts": (
        gpt_oss,
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.gate_up_proj_bias"]},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_a_kind_of_adapter_is_applied_as_by_peft(tmp_path: Path, kind: str, method: str) -> None:
    build, lora = KINDS[kind]
    pair = make(tmp_path, build, **lora)
    found = merged_by_weldment(pair.reference, tmp_path / "out", method)
    assert_close(found, pair.merged)


def ids() -> torch.Tensor:
    return torch.arange(32).view(2, 16)


TIED: dict[str, tuple[Build, dict[str, Any]]] = {
    "embedding": (gpt2, {"target_modules": ["wte"], "fan_in_fan_out": True}),
    "embedding of llama": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}),
    "head": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}),
    "saved embedding": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved head": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "both": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "lm_head"]}),
    "none": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj"]}),
    "kept tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_model_is_the_function_it_was_with_the_adapter(tmp_path: Path, kind: str) -> None:
    """An adapter of the embeddings leaves the head, and one of the head the embeddings."""
    build, lora = TIED[kind]
    pair = make(tmp_path, build, **lora)
    merged_by_weldment(pair.reference, tmp_path / "out")
    with torch.no_grad():
        expected = pair.adapted(ids()).logits
        again: Any = type(pair.adapted.get_base_model())
        found = again.from_pretrained(tmp_path / "out").eval()(ids()).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_adapters_on_one_model_add_up(tmp_path: Path) -> None:
    """In any number, also where only some of them change a tensor."""
    first = make(tmp_path, llama, seed=1, target_modules=LINEAR)
    second = make(tmp_path, llama, seed=2, target_modules=["v_proj", "up_proj"], r=5, use_rslora=True)
    base = tensors(first.base)
    expected = {name: first.merged[name].double() + second.merged[name] - value for name, value in base.items()}
    found = merged_by_weldment(f"{first.reference}+{second.adapter}", tmp_path / "out")
    assert_close(found, expected)


def test_task_arithmetic_of_adapters_is_the_weighted_sum_of_their_deltas(tmp_path: Path) -> None:
    pairs = [
        make(tmp_path, llama, seed=1, target_modules=LINEAR),
        make(tmp_path, llama, seed=2, r=4, target_modules="all-linear"),
    ]
    base = tensors(pairs[0].base)
    models = [{"model": pair.reference, "parameters": {"weight": 0.7}} for pair in pairs]
    recipe = {"models": models, "merge_method": "task_arithmetic", "base_model": str(pairs[0].base)}
    merge(recipe, tmp_path / "out")
    expected = {
        name: value.double() + sum(0.7 * (pair.merged[name].double() - value) for pair in pairs)
        for name, value in base.items()
    }
    assert_close(tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("kind", ["lora", "dora", "dora conv1d", "experts together"])
def test_a_bfloat16_base_is_rounded_once(tmp_path: Path, kind: str) -> None:
    """No bfloat16 number is nearer to the result of exact arithmetic on the stored values."""
    build, lora = KINDS[kind]
    pair = make(tmp_path, build, dtype=torch.bfloat16, **lora)
    found = merged_by_weldment(pair.reference, tmp_path / "out")
    exact = merged_by_weldment(pair.reference, tmp_path / "exact", dtype="float64", accumulate="float64")
    for name, value in exact.items():
        assert found[name].dtype == torch.bfloat16
        least = (value.bfloat16().double() - value).abs()
        assert ((found[name].double() - value).abs() <= least + 1e-6 * value.abs()).all(), name
    assert_close(exact, pair.merged, 2e-2)


@pytest.mark.parametrize("kind", ["lora", "dora", "dora embedding", "dora conv1d", "lora_bias", "experts together"])
def test_float64_is_exact(tmp_path: Path, kind: str) -> None:
    """Against PEFT in float64."""
    build, lora = KINDS[kind]
    pair = make(tmp_path, build, dtype=torch.float64, **lora)
    found = merged_by_weldment(pair.reference, tmp_path / "out", accumulate="float64")
    assert_close(found, pair.merged, 1e-14)


def wide() -> PreTrainedModel:
    return llama(vocab_size=1200, hidden_size=192, intermediate_size=712, attention_bias=True)


@pytest.mark.parametrize("kind", ["lora", "dora", "dora embedding"])
def test_threads_processes_and_blocks_do_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lora = {**KINDS[kind][1], "target_modules": ["embed_tokens", "down_proj", "q_proj"]}
    pair = make(tmp_path, wide, r=7, **lora)
    recipe = {"models": [{"model": pair.reference}], "merge_method": "ties", "base_model": str(pair.base)}
    recipe["parameters"] = {"density": 0.4}
    merge(recipe, tmp_path / "one", threads=1)
    merge(recipe, tmp_path / "three", threads=3)
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    for block in (1 << 15, 1 << 19):
        monkeypatch.setattr(memory, "_block_sizes", lambda device, block=block: [block])
        merge(recipe, tmp_path / f"blocks-{block}", threads=2)
        assert tree(tmp_path / f"blocks-{block}") == tree(tmp_path / "one")
    if can_fork():
        monkeypatch.setattr(memory, "FORK_ELEMENTS", 0)
        merge(recipe, tmp_path / "processes", threads=2)
        assert tree(tmp_path / "processes") == tree(tmp_path / "one")


def test_an_adapter_on_a_model_without_the_task_s_head(tmp_path: Path) -> None:
    """Trained on `bert.encoder...`, applied to a base that stores `encoder...`; the classifier is added."""
    pair = make(
        tmp_path, bert, target_modules=["query", "dense"], task_type="SEQ_CLS", exclude_modules=["pooler.dense"]
    )
    stored = tensors(pair.base)
    bare = {name.removeprefix("bert."): value for name, value in stored.items() if name.startswith("bert.")}
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    save_file(bare, encoder / "model.safetensors")
    found = merged_by_weldment(f"{encoder}+{pair.adapter}", tmp_path / "out")
    assert_close(found, {name.removeprefix("bert."): value for name, value in pair.merged.items()})


def test_heads_of_adapters_are_kept_per_expert(tmp_path: Path) -> None:
    pairs = [make(tmp_path, bert, seed=seed, target_modules=["query"], task_type="SEQ_CLS") for seed in (1, 2)]
    recipe = {"models": [{"model": pair.reference} for pair in pairs], "merge_method": "linear"}
    merge({**recipe, "heads": ["classifier.*"]}, tmp_path / "out")
    for pair, file in zip(pairs, ("adapter-1", "adapter-2"), strict=True):
        head = load_file(tmp_path / "out" / "heads" / f"{file}.safetensors")
        assert_close(head, {name: pair.merged[name] for name in ("classifier.weight", "classifier.bias")}, 0.0)


def test_a_tensor_that_is_only_copied_is_changed_too(tmp_path: Path) -> None:
    """`take` copies bytes from a model; an adapted one has none to copy."""
    pair = make(tmp_path, llama, target_modules=LINEAR)
    recipe = {
        "models": [{"model": str(pair.base)}],
        "merge_method": "linear",
        "take": {"*q_proj.weight": pair.reference},
    }
    merge({**recipe, "models": [{"model": str(pair.base)}, {"model": pair.reference}]}, tmp_path / "out")
    base, found = tensors(pair.base), tensors(tmp_path / "out")
    for name, value in found.items():
        whole = pair.merged[name] if "q_proj" in name else (pair.merged[name] + base[name]) / 2
        assert_close({name: value}, {name: whole})


def test_the_plan_counts_what_adapters_read_and_knows_their_files(tmp_path: Path) -> None:
    pair = make(tmp_path, llama, target_modules=["q_proj"])
    recipe = {"models": [{"model": pair.reference}], "merge_method": "linear"}
    planned = plan(recipe)
    assert isinstance(planned, Plan)
    (model,) = planned.models.values()
    base = sum(entry.nbytes for entry in model.tensors.values())
    assert planned.read_bytes == base + 2 * 4 * (2 * 8 + 8 * 2)
    assert [file.name for file in model.weight_files] == ["model.safetensors", "adapter_model.safetensors"]
    other = plan({**recipe, "models": [{"model": str(pair.base)}]})
    assert isinstance(other, Plan)
    assert planned.hash != other.hash
    assert memory.job_bytes(planned.jobs[0], 1 << 18, "float32") < KEPT_BYTES
    changed = next(job for job in planned.jobs if job.name.endswith("0.self_attn.q_proj.weight"))
    assert memory.job_bytes(changed, 1 << 18, "float32") > KEPT_BYTES


def test_numbers_that_are_not_finite_in_an_adapter_are_found(tmp_path: Path) -> None:
    pair = make(tmp_path, llama, target_modules=["q_proj"])
    file = pair.adapter / "adapter_model.safetensors"
    changed = load_file(file)
    next(iter(changed.values()))[0, 0] = float("inf")
    save_file(changed, file)
    with pytest.raises(NonFiniteError, match=rf"They are in the weights of {pair.reference}".replace("+", r"\+")):
        merged_by_weldment(pair.reference, tmp_path / "out")


@pytest.mark.parametrize("waits", [True, False])
def test_on_a_device_whose_copies_go_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """A stand-in that punishes buffers that are used too early (see test_lanes)."""
    pair = make(tmp_path, wide, **{**KINDS["dora"][1], "r": 5})
    expected = merged_by_weldment(pair.reference, tmp_path / "expected")
    lane = LateLane if waits else Careless
    monkeypatch.setattr(run, "lane_for", lambda device: lane())
    if waits:
        found = merged_by_weldment(pair.reference, tmp_path / "out", threads=2)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    else:
        with pytest.raises(NonFiniteError):
            merged_by_weldment(pair.reference, tmp_path / "out")


needs_experts = pytest.mark.skipif(not (SHARED / "experts").is_dir(), reason="the experts (../shared) are not here")


@needs_experts
@pytest.mark.parametrize("task", ["sst2", "trec", "agnews", "emotion"])
def test_real_adapters_fit_the_encoder_they_were_trained_on(tmp_path: Path, task: str) -> None:
    """Every layer finds its place: the adapters say `bert.encoder`, the encoder's files `encoder`."""
    folder = SHARED / "experts" / "lora" / task
    adapter = load_file(folder / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.") for name in adapter}
    layers = sorted(name.removesuffix(".lora_A.weight") for name in names if ".lora_A." in name)
    shapes = {
        f"{layer.removeprefix('bert.')}.weight": (
            adapter[f"base_model.model.{layer}.lora_B.weight"].shape[0],
            adapter[f"base_model.model.{layer}.lora_A.weight"].shape[1],
        )
        for layer in layers
    }
    generator = torch.Generator().manual_seed(0)
    encoder = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    (tmp_path / "base").mkdir()
    save_file(encoder, tmp_path / "base" / "model.safetensors")
    found = merged_by_weldment(f"{tmp_path / 'base'}+{folder}", tmp_path / "out")
    assert len(layers) == 36
    expected = {
        f"{layer.removeprefix('bert.')}.weight": encoder[f"{layer.removeprefix('bert.')}.weight"].double()
        + 2
        * adapter[f"base_model.model.{layer}.lora_B.weight"].double()
        @ adapter[f"base_model.model.{layer}.lora_A.weight"].double()
        for layer in layers
    }
    saved = {name: adapter[f"base_model.model.{name}"] for name in names if ".lora_" not in name}
    assert set(saved) == {"classifier.weight", "classifier.bias"}
    assert_close(found, {**expected, **saved})
