"""Base and extracted adapter give the fine-tune back, as near as the rank allows, in PEFT and by dense algebra."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import weldment
from folders import tree, weld
from models import (
    ARCHITECTURES,
    State,
    decoder_config,
    decoder_state,
    loaded,
    outputs,
    perturbed,
    read_config,
    read_state,
    save_state,
)
from weldment.adapters.extract.extraction import rank_pattern, target_modules
from weldment.adapters.extract.pairing import kind_of
from weldment.adapters.loading import delta
from weldment.adapters.opening import find_adapter
from weldment.engine.progress import Amount

LAYERS = ("q_proj", "up_proj")


def low_rank(shape: torch.Size, rank: int, seed: int) -> Tensor:
    """A matrix of this rank, or the weights of a convolution that are one, seen as (outputs, rest)."""
    generator = torch.Generator().manual_seed(seed)
    rest = int(torch.tensor(shape[1:]).prod())
    b, a = (torch.randn(size, generator=generator) for size in ((shape[0], rank), (rank, rest)))
    return (0.1 * b @ a).view(shape)


def changed(state: Mapping[str, Tensor], names: tuple[str, ...] = LAYERS, rank: int = 2) -> State:
    """The state with changes of low rank in the weights of the modules of these names."""
    return {
        name: tensor + low_rank(tensor.shape, rank, seed)
        if name.endswith(".weight") and name.split(".")[-2] in names
        else tensor.clone()
        for seed, (name, tensor) in enumerate(state.items())
    }


def save(folder: Path, state: State, **config: Any) -> Path:
    return save_state(folder, state, decoder_config(**config))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a fine-tune that differs by changes of rank 2."""
    base = decoder_state(width=8)
    return save(tmp_path / "finetuned", changed(base)), save(tmp_path / "base", base)


def read(out: Path) -> tuple[dict[str, Any], State]:
    return json.loads((out / "adapter_config.json").read_text()), read_state(out)


def products(out: Path) -> State:
    """scale * B A of every layer, by its module, as this tool reads adapters."""
    adapter = find_adapter(str(out))
    assert adapter is not None
    return {name: delta(layer) for name, layer in adapter.layers.items()}


def on_base(architecture: str, base: Path, out: Path) -> Any:
    """PEFT's model of a base and an adapter; fails if PEFT has anything to complain of."""
    model = loaded(ARCHITECTURES[architecture], base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = PeftModel.from_pretrained(model, out)
    assert not [str(warning.message) for warning in said if "adapter key" in str(warning.message)]
    return found


PARTS = {
    "llama": ("q_proj", "k_proj", "down_proj"),
    "mixtral": ("q_proj", "w1", "w2", "w3"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "bert": ("query", "dense"),
    "t5": ("q", "wi", "wo"),
    "clip": ("q_proj", "fc1", "patch_embedding", "text_projection"),
    "mamba": ("in_proj", "x_proj"),
}


@pytest.mark.parametrize("name", PARTS)
def test_peft_gives_a_fine_tune_of_low_rank_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    model.save_pretrained(tmp_path / "base")
    state = changed(read_state(tmp_path / "base"), PARTS[name])
    finetuned = save_state(tmp_path / "finetuned", state, read_config(tmp_path / "base"))
    result = weldment.extract(finetuned, tmp_path / "out", base=tmp_path / "base", rank=2)
    assert {layer.rank for layer in result.layers} == {2}
    assert {layer.module.rpartition(".")[2] for layer in result.layers} == set(PARTS[name])
    found = on_base(name, tmp_path / "base", tmp_path / "out").merge_and_unload().state_dict()
    expected = loaded(ARCHITECTURES[name], finetuned).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0.0, atol=2e-7 * float(tensor.abs().max() + 1), msg=key)


SAVED = {
    "llama": ["embed_tokens", "*norm", "lm_head"],
    "qwen2": ["embed_tokens", "*norm"],
    "gpt2": ["wte", "wpe", "ln_*"],
    "t5": ["shared", "*layer_norm", "relative_attention_bias"],
}


@pytest.mark.parametrize("name", SAVED)
def test_with_everything_else_saved_any_fine_tune_comes_back(name: str, tmp_path: Path) -> None:
    """Full rank, and token embeddings that are tied to the head in all but the first."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    architecture.build().save_pretrained(tmp_path / "base")
    state = read_state(tmp_path / "base")
    biases = {key: tensor for key, tensor in state.items() if key.endswith(".bias")}
    new = perturbed(state, 1) | biases
    finetuned = save_state(tmp_path / "finetuned", new, read_config(tmp_path / "base"))
    options: dict[str, Any] = {"rank": 99, "modules_to_save": SAVED[name]}
    result = weldment.extract(finetuned, tmp_path / "out", base=tmp_path / "base", **options)
    assert not any("left out" in note for note in result.notes)
    peft = on_base(name, tmp_path / "base", tmp_path / "out")
    expected = outputs(architecture, loaded(architecture, finetuned))
    torch.testing.assert_close(outputs(architecture, peft), expected, rtol=1e-5, atol=1e-5)


def test_base_and_adapter_are_the_fine_tune_in_a_merge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    weldment.extract(pair[0], tmp_path / "adapter", base=pair[1], rank=2)
    merge = {"merge_method": "linear", "models": [f"{pair[1]}+{tmp_path / 'adapter'}"]}
    weldment.merge(merge, tmp_path / "out")
    expected = read_state(pair[0])
    for name, found in read_state(tmp_path / "out").items():
        torch.testing.assert_close(found, expected[name], rtol=0.0, atol=1e-6, msg=name)


def test_layers_are_the_best_of_their_rank(tmp_path: Path) -> None:
    """A and B against numpy's singular value decomposition of the difference."""
    base = decoder_state(width=8)
    new = perturbed(base, 1)
    result = weldment.extract(save(tmp_path / "new", new), tmp_path / "out", base=save(tmp_path / "old", base), rank=3)
    found = products(tmp_path / "out")
    assert set(found) == {layer.module for layer in result.layers}
    for layer in result.layers:
        difference = new[f"{layer.module}.weight"].double() - base[f"{layer.module}.weight"].double()
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        torch.testing.assert_close(found[layer.module], (u[:, :3] * s[:3]) @ v[:3], rtol=0.0, atol=1e-7)
        energy = float(s[:3].square().sum() / s.square().sum())
        assert (layer.rank, layer.shape) == (3, tuple(difference.shape))
        assert layer.energy == pytest.approx(energy, rel=1e-9)
        assert layer.error == pytest.approx((1.0 - energy) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_auto_is_the_least_rank_that_keeps_the_energy(energy: float, tmp_path: Path) -> None:
    base = decoder_state(width=8)
    new = perturbed(base, 1)
    models = {"finetuned": save(tmp_path / "new", new), "base": save(tmp_path / "old", base)}
    result = weldment.extract(**models, out=tmp_path / "out", energy=energy)
    for layer in result.layers:
        difference = new[f"{layer.module}.weight"].double() - base[f"{layer.module}.weight"].double()
        kept = torch.linalg.svdvals(difference).square().cumsum(0)
        assert layer.rank == int((kept / kept[-1] < energy - 1e-12).sum()) + 1
        assert layer.energy >= energy - 1e-12
    config, tensors = read(tmp_path / "out")
    adapter = find_adapter(str(tmp_path / "out"))
    assert adapter is not None
    for layer in result.layers:
        assert adapter.config.stated_rank(layer.module) == layer.rank
        assert adapter.layers[layer.module].scale == 1.0
        assert tensors[f"base_model.model.{layer.module}.lora_A.weight"].shape[0] == layer.rank
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["r"] == config["lora_alpha"]


def test_a_rank_that_is_more_than_there_is_is_reduced_and_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = weldment.extract(pair[0], tmp_path / "out", base=pair[1], rank=5)
    assert {layer.rank for layer in result.layers} < {2, 3, 4, 5}
    assert max(layer.error for layer in result.layers) < 1e-6
    assert any("rank 5 is more than the differences of 4 layers have" in note for note in result.notes)


def test_what_did_not_change_is_not_in_the_adapter(tmp_path: Path) -> None:
    base = decoder_state(width=8)
    new = changed(base) | {"model.layers.1.mlp.up_proj.weight": base["model.layers.1.mlp.up_proj.weight"]}
    result = weldment.extract(save(tmp_path / "new", new), tmp_path / "out", base=save(tmp_path / "old", base), rank=2)
    assert len(result.layers) == 3
    assert result.unchanged == len(base) - 3
    config, tensors = read(tmp_path / "out")
    assert len(tensors) == 6
    assert config["target_modules"] == sorted(layer.module for layer in result.layers)


def test_what_is_left_out_is_said_with_its_size(tmp_path: Path) -> None:
    base = decoder_state(width=8, tied=False)
    new = changed(base) | {
        "model.norm.weight": 1.5 * base["model.norm.weight"],
        "lm_head.weight": base["lm_head.weight"] + 1,
    }
    models = {"finetuned": save(tmp_path / "new", new), "base": save(tmp_path / "old", base)}
    result = weldment.extract(**models, out=tmp_path / "out", rank=2)
    changes = {name: float((new[name] - base[name]).double().square().sum()) for name in base}
    share = 100.0 * changes["lm_head.weight"] / sum(changes.values())
    notes = [note for note in result.notes if "left out though changed" in note]
    assert len(notes) == 2
    assert any(f"1 output head, {share:.2g} % of the squared change" in note for note in notes)
    assert any("1 norm" in note and "model.norm.weight, by 50 % of its norm" in note for note in notes)


def test_modules_are_saved_whole_in_the_names_of_peft(tmp_path: Path) -> None:
    """PEFT replaces every module whose name ends as a saved one's, and wants all of their tensors."""
    base = decoder_state(width=8)
    generator = torch.Generator().manual_seed(3)
    shapes = {"classifier.weight": (2, 8), "classifier.bias": (2,), "pre_classifier.weight": (8, 8)}
    heads = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    finetuned = save(tmp_path / "new", changed(base) | heads)
    old = save(tmp_path / "old", base)
    with pytest.raises(weldment.PlanError, match="only the fine-tune has 3 tensors") as error:
        weldment.extract(finetuned, tmp_path / "out", base=old)
    assert "--save" in str(error.value)
    result = weldment.extract(finetuned, tmp_path / "out", base=old, rank=2, modules_to_save=["classifier"])
    assert result.saved == ("classifier", "pre_classifier")
    config, tensors = read(tmp_path / "out")
    assert config["modules_to_save"] == ["classifier", "pre_classifier"]
    for name, tensor in heads.items():
        assert torch.equal(tensors[f"base_model.model.{name}"], tensor)
    weldment.extract(finetuned, tmp_path / "bare", base=old, rank=2, exclude=["*classifier"])
    assert not any("classifier" in name for name in read(tmp_path / "bare")[1])


def test_names_are_the_fine_tune_s_where_a_prefix_differs(tmp_path: Path) -> None:
    base = decoder_state(width=8)
    bare = {name.removeprefix("model."): tensor for name, tensor in base.items()}
    finetuned, old = save(tmp_path / "new", changed(base)), save(tmp_path / "old", bare)
    result = weldment.extract(finetuned, tmp_path / "out", base=old, rank=2)
    assert all(layer.module.startswith("model.layers.") for layer in result.layers)
    assert max(layer.error for layer in result.layers) < 1e-6
    assert any("matched by prefix" in note for note in result.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_16_bit_models_have_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    base = {name: tensor.to(dtype) for name, tensor in decoder_state(width=8).items()}
    new = {name: tensor.to(dtype) for name, tensor in changed(base, rank=8).items()}
    models = {"finetuned": save(tmp_path / "new", new), "base": save(tmp_path / "old", base)}
    weldment.extract(**models, out=tmp_path / "own", rank=8)
    weldment.extract(**models, out=tmp_path / "wide", rank=8, dtype="float32")
    assert {tensor.dtype for tensor in read(tmp_path / "own")[1].values()} == {dtype}
    assert {tensor.dtype for tensor in read(tmp_path / "wide")[1].values()} == {torch.float32}
    for module, found in products(tmp_path / "wide").items():
        expected = new[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
        own = products(tmp_path / "own")[module]
        assert 0.0 < float((own - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps


def test_a_base_of_more_precision_is_rounded_as_the_fine_tune_was(tmp_path: Path) -> None:
    """Otherwise the rounding of every tensor would be taken for training."""
    base = decoder_state(width=8)
    rounded = {name: tensor.bfloat16() for name, tensor in base.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    new = rounded | {name: rounded[name] * 2}
    finetuned, old = save(tmp_path / "new", new), save(tmp_path / "old", base)
    result = weldment.extract(finetuned, tmp_path / "out", base=old, energy=1.0, dtype="float32")
    assert [layer.module for layer in result.layers] == [name.removesuffix(".weight")]
    assert result.unchanged == len(base) - 1
    (found,) = products(tmp_path / "out").values()
    torch.testing.assert_close(found, rounded[name].double(), rtol=0.0, atol=1e-6)
    assert any("the base is F32 and the fine-tune BF16; it was rounded" in note for note in result.notes)


def test_matrices_that_are_stored_the_other_way_round_can_be_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    weldment.extract(pair[0], tmp_path / "out", base=pair[1], rank=2, fan_in_fan_out=True)
    config, tensors = read(tmp_path / "out")
    assert config["fan_in_fan_out"] is True
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (2, 16)
    before, after = read_state(pair[1]), read_state(pair[0])
    for module, found in products(tmp_path / "out").items():
        expected = (after[f"{module}.weight"] - before[f"{module}.weight"]).double().T
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)


def test_only_what_is_included_becomes_a_layer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = weldment.extract(pair[0], tmp_path / "out", base=pair[1], include=["*.q_proj"], exclude=["*.0.*"])
    assert [layer.module for layer in result.layers] == ["model.layers.1.self_attn.q_proj"]
    assert sum("linear tensor" in note for note in result.notes) == 1


def test_every_tensor_of_both_models_is_accounted_for_once(tmp_path: Path) -> None:
    base = decoder_state(width=8, tied=False) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    base |= {"old_head.weight": torch.ones(2, 8)}
    new = {name: tensor for name, tensor in changed(base).items() if name != "old_head.weight"}
    new |= {"lm_head.weight": base["lm_head.weight"] + 1, "model.norm.weight": base["model.norm.weight"] + 1}
    finetuned, old = save(tmp_path / "new", new), save(tmp_path / "old", base)
    weldment.extract(finetuned, tmp_path / "out", base=old, rank=2, modules_to_save=["norm"])
    ledger = json.loads((tmp_path / "out" / "weldment.json").read_text())["ledger"]
    for side, state in (("finetuned", new), ("base", base)):
        listed = [name for names in ledger[side].values() for name in names]
        assert sorted(listed) == sorted(state)
    assert ledger["base"]["dropped"]["old_head.weight"] == "the fine-tune has no such tensor"
    assert set(ledger["finetuned"]["saved"]) == {"model.norm.weight"}
    assert set(ledger["finetuned"]["left out"]) == {"lm_head.weight"}
    assert ledger["finetuned"]["extracted"]["model.layers.0.mlp.up_proj.weight"] == "rank 2"
    assert "model.embed_tokens.weight" in ledger["finetuned"]["unchanged"]


def test_the_number_of_threads_leaves_no_trace_and_the_output_verifies(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    for threads in (1, 3):
        weldment.extract(pair[0], tmp_path / f"out-{threads}", base=pair[1], threads=threads)
    assert torch.get_num_threads() == before
    assert tree(tmp_path / "out-1") == tree(tmp_path / "out-3")
    assert weldment.verify(tmp_path / "out-1").tensors == 8


def test_progress_adds_up_to_all_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    class Count:
        def begin(self, total: Amount, done: Amount) -> None:
            seen["total"] = total.nbytes

        def advance(self, tensor: str, amount: Amount) -> None:
            seen["done"] = seen.get("done", 0) + amount.nbytes

        def message(self, text: str) -> None:
            pass

    weldment.extract(pair[0], tmp_path / "out", base=pair[1], progress=Count())
    assert seen["done"] == seen["total"] == 2 * sum(t.nbytes for t in read_state(pair[0]).values())


def failing(state: State) -> dict[str, tuple[State, dict[str, Any], str]]:
    """By case: the fine-tune, options, and what the error says."""
    q = "model.layers.0.self_attn.q_proj.weight"
    embedding = "model.embed_tokens.weight"
    new = changed(state)
    norm = {"model.norm.weight": state["model.norm.weight"] + 1}
    other = {f"other.{number}.weight": torch.ones(3, 3) for number in range(9)}
    return {
        "same values": (state, {}, "hold the same values"),
        "left out": (state | norm, {}, "differ only in tensors that are"),
        "rank": (new, {"rank": 0}, "rank .* is 0"),
        "rank text": (new, {"rank": "full"}, "rank .* is 'full'"),
        "energy": (new, {"energy": 1.5}, "energy .* is 1.5"),
        "dtype": (new, {"dtype": "int8"}, "dtype .* is 'int8'"),
        "threads": (new, {"threads": 0}, "threads .* is 0"),
        "pattern": (new, {"modules_to_save": ["clasifier"]}, "--save: 'clasifier' fits no tensor"),
        "shape": (new | {embedding: torch.ones(13, 8)}, {}, r"\[13, 8\], in the base \[12, 8\].*vocabulary"),
        "integer": (new | {q: torch.ones(8, 8, dtype=torch.int32)}, {}, "I32 cannot be extracted"),
        "architecture": (other, {}, "different architecture or size"),
        "nan": (new | {q: torch.full((8, 8), float("nan"))}, {}, "holds NaN or infinity"),
        "overflow": (new | {q: torch.full((8, 8), 3e12)}, {"dtype": "float16"}, "not finite as torch.float16"),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(failing(decoder_state(width=8))))
def test_what_cannot_be_extracted_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    base = decoder_state(width=8)
    state, options, message = failing(base)[case]
    finetuned, old = save(tmp_path / "new", state), save(tmp_path / "old", base)
    with pytest.raises(weldment.WeldmentError, match=f"(?s){message}"):
        weldment.extract(finetuned, tmp_path / "out", base=old, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    base = decoder_state(width=8)
    new = changed(base) | {"model.embed_tokens.weight": torch.ones(13, 8), "head.weight": torch.ones(2, 8)}
    with pytest.raises(weldment.PlanError, match="2 problems") as error:
        weldment.extract(save(tmp_path / "new", new), tmp_path / "out", base=save(tmp_path / "old", base))
    assert "head.weight" in str(error.value)
    assert "embed_tokens" in str(error.value)


def test_models_that_are_adapters_or_the_same_or_missing_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    weldment.extract(pair[0], adapter, base=pair[1])
    for finetuned, base, message in (
        (adapter, pair[1], "FINETUNED: .* is an adapter"),
        (pair[0], adapter, "--base: .* is an adapter"),
        (f"{pair[1]}+{adapter}", pair[1], "FINETUNED: .* is an adapter"),
        (pair[1], pair[1], "are the same model"),
        (tmp_path / "no", tmp_path / "neither", "(?s)2 problems.*FINETUNED.*--base"),
    ):
        with pytest.raises(weldment.UserError, match=message):
            weldment.extract(finetuned, tmp_path / "out", base=base)
    with pytest.raises(weldment.OutputError, match="not empty"):
        weldment.extract(*pair[:1], adapter, base=pair[1])
    with pytest.raises(weldment.OutputError, match="also an input"):
        weldment.extract(pair[0], pair[1], base=pair[1], overwrite=True)
    weldment.extract(*pair[:1], adapter, base=pair[1], overwrite=True)


def test_the_command_shows_a_line_for_each_kind_of_layer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = weld("extract", pair[0], tmp_path / "out", "--base", pair[1], "--rank", 2, "--save", "norm")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["layers", "number", "rank", "energy", "kept", "worst", "error"]
    assert {line.split()[0]: line.split()[1:3] for line in lines[1:3]} == {
        "mlp.up_proj": ["2", "2"],
        "self_attn.q_proj": ["2", "2"],
    }
    assert lines[3:5] == ["stored whole: model.norm", f"unchanged: {len(decoder_state()) - 4} tensors"]
    assert lines[5].startswith(f"done: {tmp_path / 'out'}, ")
    assert weld("verify", tmp_path / "out").code == 0


def test_the_command_prints_json(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = weld("extract", pair[0], tmp_path / "out", "--base", pair[1], "--energy", 0.5, "--json", "--quiet")
    found = json.loads(result.out)
    assert result.err == ""
    assert len(found["layers"]) == 4
    assert found["layers"][0].keys() == {"module", "shape", "rank", "energy", "error"}
    assert found["bytes"] == sum(tensor.nbytes for tensor in read_state(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "many"], "'many' is not a rank"),
        (["--rank", "0"], "is 0"),
        (["--rank", "4", "--energy", "0.9"], "--energy has no effect"),
        (["--energy", "0"], "is 0.0"),
    ],
    ids=" ".join,
)
def test_the_command_refuses_options_without_meaning(
    options: list[str], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    result = weld("extract", pair[0], tmp_path / "out", "--base", pair[1], *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_the_card_names_no_path_of_this_machine(pair: tuple[Path, Path], tmp_path: Path) -> None:
    weldment.extract(pair[0], tmp_path / "out", base=pair[1], rank=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "# finetuned as an adapter of base" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({"a.0.q": 4, "a.1.q": 4}, {}),
        ({"a.0.q": 4, "a.1.q": 2, "a.0.k": 4}, {r"1\.q": 2}),
        ({"a.0.q": 4, "a.0.k": 2, "a.1.q": 4, "a.1.k": 2}, {"k": 2}),
        ({"q": 2, "a.q": 4}, {"^q": 2}),
        ({"x.a.q": 2, "a.q": 3, "q": 4}, {r"x\.a\.q": 2, r"^a\.q": 3}),
    ],
    ids=str,
)
def test_patterns_of_ranks_are_short_and_fit_no_other_module(ranks: dict[str, int], expected: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    found = rank_pattern(ranks, 4)
    assert found == expected
    for module, rank in ranks.items():
        assert found.get(get_pattern_key(found.keys(), module), 4) == rank


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["a.0.k", "a.1.k"], ["k"]),
        (["a.0.q", "a.1.q"], ["a.0.q", "a.1.q"]),
        (["a.0.q"], ["a.0.q"]),
        (["a.0.k", "a.1.k", "b.q"], ["a.0.k", "a.1.k", "b.q"]),
        (["c"], "c"),
    ],
    ids=str,
)
def test_targets_select_the_layers_and_nothing_else(targets: list[str], expected: list[str] | str) -> None:
    modules = frozenset(["a", "a.0", "a.0.q", "a.0.k", "a.1", "a.1.q", "a.1.k", "b", "b.q", "c", "b.c"])
    assert target_modules(targets, modules) == expected


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 4), "linear"),
        ("model.layers.0.mlp.up_proj.bias", (8,), "bias"),
        ("model.embed_tokens.weight", (8, 4), "embedding"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "embedding"),
        ("lm_head.weight", (8, 4), "head"),
        ("model.norm.weight", (4,), "norm"),
        ("vision.embeddings.patch_embedding.weight", (8, 3, 2, 2), "convolution"),
        ("stage.0.depthwise.weight", (8, 1, 3, 3), "parameter"),
        ("layers.0.mixer.A_log", (8, 4), "parameter"),
        ("layers.0.experts.gate_up_proj", (2, 8, 4), "parameter"),
    ],
)
def test_kinds_of_tensors(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert kind_of(name, shape) == kind
