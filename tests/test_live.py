"""`add_weighted_adapter` on real models with PEFT, next to PEFT's own."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from models import ARCHITECTURES, token_inputs
from weldment import MergeError, NonFiniteError, UserError, add_weighted_adapter
from weldment.adapters.peft import live
from weldment.recipe.peft_call import TYPES

Model = Any
"""PEFT's classes pass attributes through, which type checkers cannot follow."""

WEIGHTS = [2.0, -0.5, 1.0]
NAMES = ["x", "y", "z"]
NEEDED = {
    name: {"density": 1.0 if row.trim == "random" else 0.4} if row.uses("density") else {}
    for name, row in TYPES.items()
}
pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater", "ignore:fan_in_fan_out is set")


class Pixels(nn.Module):
    """Convolutions with a kernel and without, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 3)
        self.narrow = nn.Conv2d(6, 5, 1)
        self.line = nn.Conv1d(5, 4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.narrow(self.wide(x)).flatten(2)).mean(2))


def llama() -> nn.Module:
    return ARCHITECTURES["llama"].build()


def gpt2() -> nn.Module:
    return ARCHITECTURES["gpt2"].build()


BASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "down_proj"]),
    "embedding": (llama, ["embed_tokens", "v_proj"]),
    "gpt2": (gpt2, ["c_attn", "wte"]),
    "convolutions": (Pixels, ["wide", "narrow", "head"]),
}


def lora(targets: Any, rank: int = 4, alpha: int = 8, **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=targets, r=rank, lora_alpha=alpha, **settings)


def adapted(build: Callable[[], nn.Module], *configs: LoraConfig, dtype: torch.dtype = torch.float64) -> Model:
    """A model with adapters x, y, z of these configurations and random values."""
    torch.manual_seed(0)
    model = get_peft_model(build().eval().to(dtype), configs[0], adapter_name="x", autocast_adapter_dtype=False)
    for name, config in zip(NAMES[1:], configs[1:], strict=False):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def factors(model: Model, adapter: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(B, A, scale) of an adapter in each module, as the layers hold them."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in module.lora_A:
            parts: Any = (module.lora_B[adapter].weight, module.lora_A[adapter].weight)
        elif adapter in module.lora_embedding_A:
            parts = (module.lora_embedding_B[adapter], module.lora_embedding_A[adapter])
        else:
            continue
        found[name] = (parts[0].detach().flatten(1), parts[1].detach().flatten(1), module.scaling[adapter])
    return found


def delta(model: Model, adapter: str, module: str) -> Tensor:
    """The change of a module, 0 if there is none."""
    found = factors(model, adapter)
    b, a, scale = found.get(module) or (torch.zeros(1, 1), torch.zeros(1, 1), 0.0)
    return scale * b @ a if module in found else torch.zeros(())


def state(model: Model) -> dict[str, Any]:
    """Everything about a model that a failed call must not change."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "adapters": list(model.peft_config),
        "active": list(model.base_model.active_adapters),
        "ranks": {name: dict(module.r) for name, module in model.named_modules() if isinstance(module, LoraLayer)},
    }


def assert_same_state(model: Model, before: dict[str, Any]) -> None:
    after = state(model)
    values, old = after.pop("values"), before["values"]
    assert values.keys() == old.keys()
    assert all(torch.equal(values[name], old[name]) for name in old)
    assert after == {key: value for key, value in before.items() if key != "values"}


def test_the_arguments_are_those_of_peft_s_method() -> None:
    def arguments(function: Any) -> list[tuple[str, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    assert arguments(add_weighted_adapter) == arguments(LoraModel.add_weighted_adapter)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_peft_s(name: str, base: str) -> None:
    """In float64, where PEFT's own rounding is that of its weights, which are float32."""
    build, targets = BASES[base]
    ours = adapted(build, lora(targets), lora(targets, alpha=4), lora(targets, alpha=2))
    theirs = copy.deepcopy(ours)
    settings = NEEDED[name]
    theirs.add_weighted_adapter(NAMES, WEIGHTS, "merged", name, **settings)
    add_weighted_adapter(ours, NAMES, WEIGHTS, "merged", name, **settings)
    mine, reference = factors(ours, "merged"), factors(theirs, "merged")
    assert mine.keys() == reference.keys() == factors(ours, "x").keys()
    for module, (b, a, scale) in reference.items():
        assert mine[module][2] == scale == 1.0
        if TYPES[name].space == "factors":
            torch.testing.assert_close(mine[module][0], b, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(mine[module][1], a, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mine[module][0] @ mine[module][1], b @ a, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("name", ["ties", "ties_svd"])
def test_both_ways_to_elect_signs_are_peft_s(name: str, method: str) -> None:
    ours = adapted(llama, *[lora(["q_proj"]) for _ in NAMES])
    theirs = copy.deepcopy(ours)
    settings = {"density": 0.6, "majority_sign_method": method, "svd_rank": 3 if name == "ties_svd" else None}
    theirs.add_weighted_adapter(NAMES, [1.0, 1.0, 1.0], "merged", name, **settings)
    add_weighted_adapter(ours, NAMES, [1.0, 1.0, 1.0], "merged", name, **settings)
    for module, (b, a, _) in factors(theirs, "merged").items():
        torch.testing.assert_close(delta(ours, "merged", module), b @ a, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["svd", "ties_svd", "cat"])
def test_different_ranks_are_peft_s_where_it_takes_them(name: str) -> None:
    """By default the svd types have the largest rank of the configurations, rank patterns included."""
    ours = adapted(
        llama,
        lora(["q_proj", "v_proj"], 2),
        lora(["q_proj", "up_proj"], 3, rank_pattern={"layers.0.self_attn.q_proj": 5}),
    )
    theirs = copy.deepcopy(ours)
    settings = NEEDED[name]
    theirs.add_weighted_adapter(["x", "y"], [1.0, -2.0], "merged", name, **settings)
    add_weighted_adapter(ours, ["x", "y"], [1.0, -2.0], "merged", name, **settings)
    reference = factors(theirs, "merged")
    assert factors(ours, "merged").keys() == reference.keys()
    for module, (b, a, _) in reference.items():
        torch.testing.assert_close(delta(ours, "merged", module), b @ a, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name, row in TYPES.items() if row.space == "factors"])
def test_different_ranks_work_where_peft_refuses(name: str) -> None:
    """The smaller factors are filled up with zeros: `linear` is then what it is on factors filled up by hand."""
    ours = adapted(llama, lora(["q_proj"], 2, 4), lora(["q_proj", "v_proj"], 4, 2))
    theirs = copy.deepcopy(ours)
    with pytest.raises(ValueError, match="same r value"):
        theirs.add_weighted_adapter(["x", "y"], [1.0, -0.5], "merged", name, **NEEDED[name])
    add_weighted_adapter(ours, ["x", "y"], [1.0, -0.5], "merged", name, **NEEDED[name])
    merged, x, y = (factors(ours, adapter) for adapter in ("merged", "x", "y"))
    assert merged.keys() == y.keys()
    assert {b.shape[1] for b, _, _ in merged.values()} == {4}
    module = next(iter(x))
    if name == "linear":
        b = 2**0.5 * nn.functional.pad(x[module][0], (0, 2)) + 0.5 * y[module][0]
        a = 2**0.5 * nn.functional.pad(x[module][1], (0, 0, 0, 2)) - 0.5 * y[module][1]
        torch.testing.assert_close(merged[module][0], b)
        torch.testing.assert_close(merged[module][1], a)
    with torch.no_grad():
        ours.set_adapter("merged")
        assert ours(**token_inputs()).logits.isfinite().all()


@pytest.mark.parametrize("base", ["llama", "embedding", "gpt2"])
@pytest.mark.parametrize("name", ["cat", "svd"])
def test_the_forward_pass_is_that_of_the_summed_changes(name: str, base: str) -> None:
    """The logits of the merged adapter are those of a base whose weights have the changes added."""
    build, targets = BASES[base]
    targets = targets[:1]  # GPT-2's embeddings are tied to its last layer
    model = adapted(build, *[lora(targets, rank) for rank in (2, 3, 4)])
    add_weighted_adapter(model, NAMES, WEIGHTS, "merged", name, svd_rank=9 if name == "svd" else None)
    model.set_adapter("merged")
    with torch.no_grad():
        found = model(**token_inputs()).logits
        for module_name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                change = sum(w * delta(model, n, module_name) for n, w in zip(NAMES, WEIGHTS, strict=True))
                weight: Any = module.get_base_layer().weight
                turned = base == "gpt2" or "embed_tokens" in module_name
                weight += change.T if turned else change  # type: ignore[union-attr]
        with model.disable_adapter():
            expected = model(**token_inputs()).logits
    torch.testing.assert_close(found, expected)


def test_convolutions_of_all_kinds_work_in_the_forward_pass() -> None:
    """The svd types of PEFT fail on the layers of one dimension."""
    targets = ["wide", "narrow", "line", "head"]
    model = adapted(Pixels, *[lora(targets, rank) for rank in (2, 3, 4)])
    pixels = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for name in ("cat", "svd", "ties"):
        add_weighted_adapter(model, NAMES, WEIGHTS, name, name, svd_rank=9, density=0.5)
        model.set_adapter(name)
        with torch.no_grad():
            before = model(pixels)
            merged = copy.deepcopy(model).merge_and_unload()
            torch.testing.assert_close(merged(pixels), before)
    for module in factors(model, "cat"):
        expected = sum(w * delta(model, n, module) for n, w in zip(NAMES, WEIGHTS, strict=True))
        torch.testing.assert_close(delta(model, "cat", module), expected)


def test_rslora_and_patterns_are_merged_as_they_act() -> None:
    """PEFT's own method gives its result the scale sqrt(r) where the first adapter is rsLoRA."""
    model = adapted(
        llama,
        lora(["q_proj", "v_proj"], 4, 8, use_rslora=True, alpha_pattern={"v_proj": 3}),
        lora(["q_proj", "v_proj"], 2, 8, rank_pattern={"v_proj": 3}),
    )
    theirs = copy.deepcopy(model)
    theirs.add_weighted_adapter(["x", "y"], [1.0, 0.5], "merged", "cat")
    add_weighted_adapter(model, ["x", "y"], [1.0, 0.5], "merged", "cat")
    for module, (_, _, scale) in factors(model, "merged").items():
        assert scale == 1.0
        expected = delta(model, "x", module) + 0.5 * delta(model, "y", module)
        torch.testing.assert_close(delta(model, "merged", module), expected)
        assert (delta(theirs, "merged", module) - expected).norm() > expected.norm()


def test_a_merged_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    """Modules of different ranks and layers that only one adapter changes come back as they were."""
    model = adapted(
        llama,
        lora(["q_proj"], 2, layers_to_transform=[0]),
        lora(["q_proj", "v_proj"], 3, layers_to_transform=[1]),
        lora(r"model\.layers\.1\.mlp\.(up|down)_proj", 4),
    )
    add_weighted_adapter(model, NAMES, WEIGHTS, "merged", "cat")
    merged = factors(model, "merged")
    assert merged.keys() == {name for adapter in NAMES for name in factors(model, adapter)}
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(llama().double(), str(tmp_path / "merged"))
    found = factors(loaded, "default")
    assert found.keys() == merged.keys()
    for module, (b, a, scale) in merged.items():
        assert torch.equal(found[module][0], b)
        assert torch.equal(found[module][1], a)
        assert found[module][2] == scale == 1.0
    assert sorted({b.shape[1] for b, _, _ in merged.values()}) == [2, 3, 4]


def test_names_that_end_alike_are_told_apart() -> None:
    """`a.q` ends like `inner.a.q`, which only one adapter changes and which keeps another rank."""

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 6)})
            if inner is not None:
                self.inner = inner

    model = adapted(lambda: Twice(Twice()), lora(r"a\.q", 2), lora(r"inner\.a\.q", 3), lora("inner.a.k|a.q", 2))
    add_weighted_adapter(model, ["x", "z"], [1.0, 1.0], "some", "cat")
    assert factors(model, "some").keys() == {"base_model.model.a.q", "base_model.model.inner.a.k"}
    add_weighted_adapter(model, NAMES, WEIGHTS, "all", "cat")
    ranks = {name.removeprefix("base_model.model."): b.shape[1] for name, (b, _, _) in factors(model, "all").items()}
    assert ranks == {"a.q": 4, "inner.a.q": 3, "inner.a.k": 2}


def test_the_clamp_is_peft_s() -> None:
    """Singular vectors that hold every value with both signs, so that PEFT's bound does not depend on theirs."""
    model = adapted(lambda: nn.Sequential(nn.Linear(12, 10)), lora(["0"], 3), lora(["0"], 3))
    with torch.no_grad():
        for name in ("x", "y"):
            layer: Any = model.base_model.model[0]
            b, a = layer.lora_B[name].weight, layer.lora_A[name].weight
            b[5:], a[:, 6:] = -b[:5], -a[:, :6]
    theirs = copy.deepcopy(model)
    values = 3 * (10 + 12)
    clamp = 56 / (values - 1)  # a quantile that is one of the values
    theirs.add_weighted_adapter(["x", "y"], [1.0, 0.5], "merged", "svd", svd_clamp=clamp)
    add_weighted_adapter(model, ["x", "y"], [1.0, 0.5], "merged", "svd", svd_clamp=clamp)
    add_weighted_adapter(model, ["x", "y"], [1.0, 0.5], "free", "svd")
    (module,) = factors(model, "merged")
    torch.testing.assert_close(delta(model, "merged", module), delta(theirs, "merged", module), atol=1e-6, rtol=1e-6)
    assert (delta(model, "merged", module) - delta(model, "free", module)).norm() > 0.01


def test_lora_biases_are_summed_by_the_types_that_keep_everything() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))

    model = adapted(build, lora(["0", "1"], lora_bias=True), lora(["0"], alpha=2), lora(["1"], lora_bias=True))
    x = torch.randn(4, 6, dtype=torch.float64)
    for name in ("cat", "svd"):
        add_weighted_adapter(model, NAMES, WEIGHTS, name, name, svd_rank=5)
        biases = {n: m.lora_B[name].bias for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        first, second = (model.base_model.model[n] for n in (0, 1))
        torch.testing.assert_close(biases["base_model.model.0"], 2 * 2 * first.lora_B["x"].bias)
        expected = 2 * 2 * second.lora_B["x"].bias + 2 * second.lora_B["z"].bias
        torch.testing.assert_close(biases["base_model.model.1"], expected)
        model.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), model(x))
    before = state(model)
    with pytest.raises(UserError, match=r"ties has no meaning for the biases of lora_bias\. Use linear, cat or svd"):
        add_weighted_adapter(model, NAMES, WEIGHTS, "merged", "ties", density=0.5)
    assert_same_state(model, before)
    add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "plain", "cat")
    assert not model.base_model.model[1].lora_B["plain"].bias.eq(0).all()


def test_a_bias_where_no_adapter_has_one_is_zero() -> None:
    model = adapted(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), lora(["0"], lora_bias=True), lora(["1"]))
    add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged", "cat")
    assert not model.base_model.model[1].lora_B["merged"].bias.any()


def test_one_adapter_alone_is_only_scaled_as_in_peft() -> None:
    ours = adapted(llama, lora(["q_proj"]))
    theirs = copy.deepcopy(ours)
    theirs.add_weighted_adapter(["x"], [-0.5], "merged", "ties")
    add_weighted_adapter(ours, ["x"], [-0.5], "merged", "ties")
    for module, (b, a, _) in factors(theirs, "merged").items():
        torch.testing.assert_close(factors(ours, "merged")[module][:2], (b, a), atol=1e-6, rtol=1e-6)


def test_random_types_repeat_by_their_seed() -> None:
    model = adapted(llama, lora(["q_proj"]), lora(["q_proj"]))
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], name, "dare_linear", density=0.5, seed=seed)
    first, again, other = (factors(model, name) for name in ("first", "again", "other"))
    for module, (b, _, _) in first.items():
        assert torch.equal(again[module][0], b)
        assert not torch.equal(other[module][0], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_values_have_the_dtype_of_the_adapters(dtype: torch.dtype) -> None:
    """And are those of float64, rounded once."""
    model = adapted(llama, lora(["q_proj"]), lora(["q_proj"]), dtype=dtype)
    wide = copy.deepcopy(model).double()
    for which in (model, wide):
        add_weighted_adapter(which, ["x", "y"], [1.0, 0.3], "merged", "linear")
    exact = factors(wide, "merged")
    for module, (b, a, _) in factors(model, "merged").items():
        assert b.dtype == a.dtype == dtype
        assert torch.equal(b, exact[module][0].to(dtype))
        assert torch.equal(a, exact[module][1].to(dtype))


def test_a_lora_model_is_as_good_as_a_peft_model() -> None:
    outer = adapted(llama, lora(["q_proj"]), lora(["q_proj"]))
    inner = copy.deepcopy(outer).base_model
    assert isinstance(inner, LoraModel)
    add_weighted_adapter(outer, ["x", "y"], [1.0, 0.5], "merged")
    add_weighted_adapter(inner, ["x", "y"], [1.0, 0.5], "merged")
    mine = {name.removeprefix("base_model."): part for name, part in factors(outer, "merged").items()}
    for module, (b, a, _) in factors(inner, "merged").items():
        assert torch.equal(b, mine[module][0])
        assert torch.equal(a, mine[module][1])


def test_the_rest_of_the_model_stays_as_it_is() -> None:
    """Adapters, the active one among them, what is trained, and the base."""
    model = adapted(llama, lora(["q_proj"]), lora(["v_proj"]))
    before = state(model)
    add_weighted_adapter(model, ["x", "y"], [1.0, 0.5], "merged")
    assert not any("merged" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert model.peft_config["merged"].lora_alpha == model.peft_config["merged"].r
    model.delete_adapter("merged")
    assert_same_state(model, before)


def test_initialisations_that_change_the_base_are_not_repeated() -> None:
    """PEFT's own method copies `init_lora_weights` and so changes the base once more."""
    model = adapted(llama, lora(["q_proj"], init_lora_weights="pissa"), lora(["q_proj"]), dtype=torch.float32)
    weight: Any = next(m for m in model.modules() if isinstance(m, LoraLayer)).get_base_layer().weight
    before = weight.detach().clone()
    add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged", "cat")
    assert torch.equal(weight, before)
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "peft", "cat")
    assert not torch.equal(weight, before)


@pytest.fixture(scope="module")
def shared_model() -> Iterator[Model]:
    """A model for calls that fail: it must be the same after each."""
    model = adapted(llama, lora(["q_proj"]), lora(["q_proj"]))
    before = state(model)
    yield model
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"adapter_name": "x"}, "adapter_name: there is an adapter 'x' already. Choose another, or remove it"),
        ({"adapter_name": "a.b"}, "adapter_name: 'a.b' is not a name for an adapter"),
        ({"adapter_name": ""}, "'' is not a name for an adapter"),
        ({"adapter_name": "keys"}, "adapter_name: torch has another use for the name 'keys'"),
        ({"adapters": ["x", "yy"]}, "adapters: there is no adapter 'yy'"),
        ({"adapters": "xy"}, "adapters: 'xy' is not a list of names"),
        ({"adapters": []}, "adapters: the list is empty"),
        ({"weights": [1.0]}, "weights: there are 1 weights for 2 adapters"),
        ({"weights": [1.0, float("inf")]}, "weights[1]: `weight` must be a number, not inf"),
        ({"weights": 1.0}, "weights: 1.0 is not a list of numbers"),
        ({"combination_type": "linaer"}, "there is no combination type 'linaer'. Did you mean `linear`?"),
        ({"combination_type": "ties"}, "density: ties needs `density`"),
        ({"density": 0.0}, "density: `density` must be in (0, 1], not 0"),
        ({"svd_rank": 0}, "svd_rank: `svd_rank` must be at least 1, not 0"),
        ({"svd_clamp": 3}, "svd_clamp: `svd_clamp` must be in (0.5, 1], not 3"),
        ({"majority_sign_method": "mass"}, "must be one of total, frequency, not 'mass'"),
        ({"seed": -1}, "seed: -1 is not a seed"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(
    shared_model: Model, changed: dict[str, Any], words: str
) -> None:
    arguments = {"adapters": ["x", "y"], "weights": [1.0, 1.0], "adapter_name": "merged", **changed}
    with pytest.raises(UserError) as caught:
        add_weighted_adapter(shared_model, **arguments)
    assert words in str(caught.value)
    assert "add_weighted_adapter: " in str(caught.value)


def test_weights_may_be_numbers_of_numpy_and_torch() -> None:
    model = adapted(llama, lora(["q_proj"]), lora(["q_proj"]))
    weights: dict[str, Any] = {
        "plain": [0.5, -1.0],
        "numpy": np.array([0.5, -1.0], np.float32),
        "torch": torch.tensor([0.5, -1.0]),
    }
    for name, listed in weights.items():
        add_weighted_adapter(model, ["x", "y"], listed, name, "cat")
    for module, (_, a, _) in factors(model, "plain").items():
        assert torch.equal(factors(model, "numpy")[module][1], a)
        assert torch.equal(factors(model, "torch")[module][1], a)


class Stack(nn.Module):
    """A weight that is no module's: one matrix for each of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.Parameter(torch.randn(2, 4, 4))


REFUSED: dict[str, tuple[Callable[[], nn.Module], LoraConfig, str]] = {
    "DoRA": (llama, lora(["q_proj"], use_dora=True), "uses DoRA"),
    "saved modules": (llama, lora(["q_proj"], modules_to_save=["lm_head"]), "uses saved modules (modules_to_save)"),
    "base bias": (gpt2, lora(["c_attn"], bias="all"), "uses trained biases of the base (bias: all)"),
    "target parameters": (
        lambda: nn.ModuleDict({"block": Stack()}),
        lora(["first"], target_parameters=["experts"]),
        "uses target_parameters",
    ),
    "trained tokens": (llama, lora(["q_proj"], trainable_token_indices=[1, 2]), "uses trainable tokens"),
    "grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)),
        lora(["0"]),
        "the convolution has groups",
    ),
    "attention of torch": (
        lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}),
        lora(["attn"]),
        "adapts nn.MultiheadAttention",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_adapters_that_are_more_than_factors_are_refused_by_name(kind: str) -> None:
    build, config, words = REFUSED[kind]
    model = adapted(build, config, dtype=torch.float32)
    before = state(model)
    with pytest.raises(UserError) as caught:
        add_weighted_adapter(model, ["x", "x"], [1.0, 0.5], "merged", "cat")
    assert words in str(caught.value)
    assert "adapter 'x'" in str(caught.value)
    assert_same_state(model, before)


def test_variants_of_layers_are_refused_by_name() -> None:
    """Whatever a configuration says: what a layer does decides."""
    model = adapted(llama, lora(["q_proj"]), lora(["q_proj"]))
    layer: Any = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.lora_variant["y"] = type("Strange", (), {})()
    with pytest.raises(UserError, match=r"adapter 'y', model\.layers\.0\.self_attn\.q_proj: .* variant Strange"):
        add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged")


def test_biases_beside_an_embedding_are_refused() -> None:
    model = adapted(llama, lora(["q_proj"], lora_bias=True), lora(["embed_tokens"]))
    before = state(model)
    with pytest.raises(UserError, match="lora_bias and another an embedding"):
        add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged", "cat")
    assert_same_state(model, before)


def test_values_that_are_not_finite_are_refused_before_and_after() -> None:
    model = adapted(llama, lora(["q_proj"]), lora(["q_proj"]), dtype=torch.float16)
    before = state(model)
    with pytest.raises(NonFiniteError, match=r"do not fit into torch\.float16"):
        add_weighted_adapter(model, ["x", "y"], [1e6, 1.0], "merged", "cat")
    assert_same_state(model, before)
    layer: Any = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.lora_A["y"].weight.data[0, 0] = float("nan")
    with pytest.raises(
        UserError, match=r"adapter 'y', model\.layers\.0\.self_attn\.q_proj: the weights are not finite"
    ):
        add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged")


def test_weights_that_are_not_in_memory_are_refused() -> None:
    model = adapted(llama, lora(["q_proj"]))
    layer: Any = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.lora_B["x"].to("meta")
    with pytest.raises(UserError, match="the weights are not in memory"):
        add_weighted_adapter(model, ["x"], [1.0], "merged")


def test_the_base_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it may be quantised: its weights need not be numbers that can be added to."""
    model = adapted(llama, lora(["q_proj"]), lora(["q_proj"]))

    def unreadable(*_: object) -> Tensor:
        raise AssertionError("a change was made dense")

    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        base: Any = layer.get_base_layer()
        packed = torch.zeros(base.weight.shape, dtype=torch.uint8)
        base.weight = nn.Parameter(packed, requires_grad=False)
        monkeypatch.setattr(type(layer), "get_delta_weight", unreadable)
    for name in TYPES:
        add_weighted_adapter(model, ["x", "y"], [1.0, 0.5], name, name, density=0.5)
        assert {b.dtype for b, _, _ in factors(model, name).values()} == {torch.float64}


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_after_an_error_nothing_is_half_added(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    model = adapted(llama, lora(["q_proj"]), lora(["v_proj"]))
    before = state(model)
    original, calls = live.write, []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        original(*arguments)

    monkeypatch.setattr(live, "write", failing)
    with pytest.raises(type(error)):
        add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged")
    assert len(calls) == 3
    assert_same_state(model, before)
    monkeypatch.undo()
    add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged")


def test_an_adapter_that_peft_would_put_elsewhere_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama, lora(["q_proj"]), lora(["v_proj"]))
    before = state(model)
    monkeypatch.setattr(live, "_targets", lambda modules, wanted: ["v_proj"])
    with pytest.raises(MergeError, match=r"model\.layers\.\d\.self_attn\.q_proj.*: PEFT added the adapter to other"):
        add_weighted_adapter(model, ["x", "y"], [1.0, 1.0], "merged")
    assert_same_state(model, before)


def test_models_without_lora_are_refused_by_name() -> None:
    base = llama()
    with pytest.raises(UserError, match="LlamaForCausalLM is not a model with LoRA adapters"):
        add_weighted_adapter(base, ["x"], [1.0], "merged")  # type: ignore[arg-type]
    other: Any = get_peft_model(base, IA3Config(target_modules=["v_proj"], feedforward_modules=[]), adapter_name="x")
    with pytest.raises(UserError, match="IA3Model is not a model with LoRA adapters"):
        add_weighted_adapter(other, ["x"], [1.0], "merged")


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'weldment\[peft\]'"):
        add_weighted_adapter(nn.Linear(1, 1), ["x"], [1.0], "merged")  # type: ignore[arg-type]


def test_no_warnings_are_given() -> None:
    model = adapted(llama, lora(["q_proj"], 2), lora(["q_proj", "v_proj"], 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_weighted_adapter(model, ["x", "y"], [1.0, -1.0], "merged", "cat")
