"""The eleven combination types on single layers: PEFT's own outputs, and references written naively."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from paths import GOLDEN, needs_golden
from weldment.adapters.loading import factors
from weldment.adapters.opening import open_adapter_folder
from weldment.adapters.peft.combination import TYPES, check, combine_layer
from weldment.errors import RecipeError
from weldment.methods.masks import keep_mask, levels_of, quantised, tensor_key
from weldment.recipe.peft_call import build_call
from weldment.recipe.recipe import Combination
from weldment.recipe.words import Place

Array = NDArray[np.float64]
Layers = Sequence[tuple[Tensor, Tensor, float] | None]

FACTOR_TYPES = [name for name, row in TYPES.items() if row.space == "factors"]
CASES = sorted(path.name for path in (GOLDEN / "peft").iterdir()) if GOLDEN.is_dir() else []


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_what_peft_gave(case: str) -> None:
    """A and B of the types that combine them, the products of the others."""
    folder = GOLDEN / "peft" / case
    document = yaml.safe_load((folder / "recipe.yml").read_text().replace("MODELS", str(GOLDEN)))
    recipe, _ = build_call(document, Place("recipe.yml"))
    assert recipe is not None
    combination = recipe.combination
    assert combination is not None
    adapters = [open_adapter_folder(GOLDEN / "adapters" / item.model.rpartition("/")[2], "") for item in recipe.models]
    theirs = load_file(folder / "adapter_model.safetensors")
    modules = {module for adapter in adapters for module in adapter.layers}
    assert len(theirs) == 2 * len(modules)
    for module in modules:
        layers = [
            (*factors(layer), layer.scale) if (layer := adapter.layers.get(module)) else None for adapter in adapters
        ]
        weights = [item.parameters["weight"] for item in recipe.models]
        b, a = combine_layer(combination, layers, weights, seed=0, name=module)
        their_b, their_a = (theirs[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "BA")
        if combination.type in FACTOR_TYPES:
            assert relative(b, their_b) <= 1e-5
            assert relative(a, their_a) <= 1e-5
        allowed = 1e-5
        if TYPES[combination.type].truncates:
            whole = combine_layer(replace(combination, svd_rank=10**6), layers, weights, seed=0, name=module)
            allowed = max(allowed, float32_error(whole[0] @ whole[1], b.shape[1]))
        assert relative(b @ a, their_b @ their_a) <= allowed


def float32_error(dense: Tensor, rank: int) -> float:
    """How far rounding to float32, PEFT's, moves the best approximation of a rank.

    It turns the last vector that is kept towards the first that is not by the rounding error over the
    difference of their singular values. That is more than 1e-5 in one module of `magnitude_prune_svd` only.
    """
    s = torch.linalg.svdvals(dense)
    return 2.0**-23 * float(s[0] / (s[rank - 1] - s[rank]))


def some_layers(
    ranks: Sequence[int] = (4, 4, 4), shape: tuple[int, int] = (12, 20), seed: int = 0
) -> list[tuple[Tensor, Tensor, float]]:
    chance = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    return [
        (
            torch.randn(outputs, rank, generator=chance, dtype=torch.float64),
            torch.randn(rank, inputs, generator=chance, dtype=torch.float64),
            scale,
        )
        for rank, scale in zip(ranks, (2.0, 0.5, 1.5, 1.0), strict=False)
    ]


def combination(name: str, **settings: object) -> Combination:
    """With the settings that the type uses."""
    defaults = {"density": 0.3} if TYPES[name].trim != "none" else {}
    return Combination(name, **{**defaults, **settings})  # type: ignore[arg-type]


def naive_kept(x: Array, name: str, density: float | None, key: tuple[int, str, str]) -> Array:
    """What a type keeps of a matrix."""
    if "magnitude" in name or name.startswith("ties"):
        assert density is not None
        kept = np.zeros(x.size)
        order = np.argsort(-np.abs(x).ravel(), kind="stable")[: int(density * x.size)]
        kept[order] = x.ravel()[order]
        return kept.reshape(x.shape)
    if "dare" in name:
        assert density is not None
        mask = keep_mask(tensor_key(*key), 0, levels_of(density), torch.empty(x.shape, dtype=torch.float64))
        return x * mask.numpy() / quantised(density)
    return x


def naive_merged(parts: list[Array], factors: list[float], name: str, method: str) -> Array:
    """Sums, or element by element the mean of what agrees with the majority."""
    out = np.zeros_like(parts[0])
    for index in np.ndindex(out.shape):
        values = [part[index] for part in parts]
        if "ties" not in name:
            out[index] = sum(f * v for f, v in zip(factors, values, strict=True))
            continue
        vote = sum(values) if method == "total" else sum(np.sign(values))
        agreeing = [f * v for f, v in zip(factors, values, strict=True) if (v > 0 if vote >= 0 else v < 0)]
        out[index] = sum(agreeing) / max(1, len(agreeing))
    return out


def naive(what: Combination, layers: Layers, weights: Sequence[float], seed: int, module: str) -> tuple[Array, Array]:
    """(B, A), of the svd types (U S, V^T) of a dense SVD."""
    shares = [
        (str(n), layer[0].numpy(), layer[1].numpy(), weight, layer[2])
        for n, (layer, weight) in enumerate(zip(layers, weights, strict=True))
        if layer is not None
    ]
    rank = max(b.shape[1] for _, b, *_ in shares)
    if what.type in FACTOR_TYPES:
        bs, a_s, roots, signed = [], [], [], []
        for n, b, a, weight, scale in shares:
            wide = naive_kept(b, what.type, what.density, (seed, n, f"{module}.lora_B"))
            tall = naive_kept(a, what.type, what.density, (seed, n, f"{module}.lora_A"))
            bs.append(np.hstack([wide, np.zeros((len(b), rank - b.shape[1]))]))
            a_s.append(np.vstack([tall, np.zeros((rank - len(a), a.shape[1]))]))
            roots.append(math.sqrt(abs(weight * scale)))
            signed.append(roots[-1] if weight * scale >= 0 else -roots[-1])
        method = what.majority_sign_method
        return naive_merged(bs, roots, what.type, method), naive_merged(a_s, signed, what.type, method)
    deltas = [
        naive_kept(scale * b @ a, what.type, what.density, (seed, n, f"{module}.delta")) for n, b, a, _, scale in shares
    ]
    dense = naive_merged(deltas, [share[3] for share in shares], what.type, what.majority_sign_method)
    if what.type == "cat":
        return dense, np.eye(dense.shape[1])
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    rank = what.svd_rank or rank
    return u[:, :rank] * s[:rank], v[:rank]


SITUATIONS = {
    "plain": (some_layers(), [2.0, 1.0, 0.5]),
    "negative": (some_layers(seed=1), [1.0, -0.5, -2.0]),
    "ranks": (some_layers((2, 5, 3), seed=2), [1.0, -0.7, 0.4]),
    "missing": ([None, *some_layers((3, 6), seed=3), None], [3.0, 1.0, 0.5, 1.0]),
    "zero weight": (some_layers(seed=4), [1.0, 0.0, 0.5]),
    "one left": ([None, *some_layers((3,), seed=5)], [1.0, 0.5]),
}


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_its_formula(name: str, situation: str, method: str) -> None:
    layers, weights = SITUATIONS[situation]
    what = combination(name, majority_sign_method=method)
    b, a = combine_layer(what, layers, weights, seed=7, name="m")
    their_b, their_a = naive(what, layers, weights, 7, "m")
    if name in FACTOR_TYPES:
        np.testing.assert_allclose(b.numpy(), their_b, atol=1e-12)
        np.testing.assert_allclose(a.numpy(), their_a, atol=1e-12)
    np.testing.assert_allclose((b @ a).numpy(), their_b @ their_a, atol=1e-9)


@pytest.mark.parametrize("name", TYPES)
def test_the_inputs_stay_as_they_are(name: str) -> None:
    layers = some_layers((3, 4))
    copies = [(b.clone(), a.clone()) for b, a, _ in layers]
    combine_layer(combination(name), layers, [1.0, 0.5], seed=0, name="m")
    for (b, a, _), (old_b, old_a) in zip(layers, copies, strict=True):
        assert torch.equal(b, old_b)
        assert torch.equal(a, old_a)


@pytest.mark.parametrize("name", TYPES)
def test_one_adapter_alone_is_only_scaled(name: str) -> None:
    """With any weight, and without a density; also where it is one of several in a module, but then by the type."""
    (layer,) = some_layers((4,))
    for weight in (1.0, -0.5):
        b, a = combine_layer(Combination(name, svd_rank=1), [layer], [weight], seed=0, name="m")
        assert relative(b @ a, weight * layer[2] * layer[0] @ layer[1]) < 1e-14


def test_cat_stacks_with_the_weights_on_a() -> None:
    layers = some_layers((2, 3))
    b, a = combine_layer(Combination("cat"), layers, [2.0, -1.0], seed=0, name="m")
    assert torch.equal(b, torch.cat([layers[0][0], layers[1][0]], dim=1))
    assert torch.equal(a, torch.cat([layers[0][1] * 4.0, layers[1][1] * -0.5]))


@pytest.mark.parametrize(("rank", "expected"), [(None, 5), (3, 3), (8, 8), (100, 9)])
def test_the_rank_of_svd_is_the_largest_or_as_asked_but_not_more_than_there_is(rank: int | None, expected: int) -> None:
    layers = some_layers((4, 5), (40, 30))
    b, a = combine_layer(Combination("svd", svd_rank=rank), layers, [1.0, 1.0], seed=0, name="m")
    assert (b.shape, a.shape) == ((40, expected), (expected, 30))
    if expected == 9:
        assert relative(b @ a, sum(s * x @ y for x, y, s in layers)) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, row in TYPES.items() if row.truncates])
def test_a_change_of_nothing_has_rank_one(name: str) -> None:
    """Factors of rank 0 are not an adapter."""
    b, a, scale = some_layers((4,))[0]
    layers = [(torch.zeros_like(b), a, scale), (torch.zeros_like(b), a, scale)]
    b, a = combine_layer(combination(name), layers, [1.0, 1.0], seed=0, name="m")
    assert (b.shape, a.shape) == ((12, 1), (1, 20))
    assert not b.any()
    assert not a.any()


def test_svd_makes_nothing_dense() -> None:
    """A matrix of these sizes would have 10^12 elements."""
    layers = some_layers((2, 2), (10**6, 10**6))
    b, a = combine_layer(Combination("svd", svd_rank=2), layers, [1.0, 0.5], seed=0, name="m")
    probe = torch.randn(10**6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = sum(w * s * (x @ (y @ probe)) for (x, y, s), w in zip(layers, (1.0, 0.5), strict=True))
    assert isinstance(full, Tensor)
    assert float((b @ (a @ probe)).norm()) <= 1.001 * float(full.norm())
    assert (b.shape, a.shape) == ((10**6, 2), (2, 10**6))


@pytest.mark.parametrize("count", [0, 1, 7, 60])
def test_magnitude_prune_keeps_exactly_so_many_even_of_equal_ones(count: int) -> None:
    """Of elements that are equal the first ones; int(density n) of them may be none."""
    layer = (torch.ones(10, 6, dtype=torch.float64), torch.ones(6, 10, dtype=torch.float64), 1.0)
    what = Combination("magnitude_prune", density=(count + 0.5) / 60 if count < 60 else 1.0)
    b, a = combine_layer(what, [layer, layer], [1.0, 0.0], seed=0, name="m")
    for factor in (b, a):
        assert factor.flatten().tolist() == [1.0] * count + [0.0] * (60 - count)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_types_repeat_by_seed_module_and_place(name: str) -> None:
    layers = some_layers()
    what = combination(name, density=0.5)

    def merged(seed: int, module: str) -> Tensor:
        b, a = combine_layer(what, layers, [1.0, 1.0, 1.0], seed=seed, name=module)
        return b @ a

    assert torch.equal(merged(0, "m"), merged(0, "m"))
    assert not torch.equal(merged(0, "m"), merged(1, "m"))
    assert not torch.equal(merged(0, "m"), merged(0, "n"))
    same = combine_layer(what, [layers[0]] * 2, [1.0, -1.0], seed=0, name="m")
    assert (same[0] @ same[1]).abs().max() > 0.1  # the masks of the two differ, so they do not cancel


def test_dare_keeps_half_and_is_right_on_average() -> None:
    """At density 0.5: the share of elements kept within 4 standard deviations, the mean within 5 of its own."""
    layers = some_layers((4, 4), (30, 40))
    what = Combination("dare_linear", density=0.5)
    draws = [combine_layer(what, layers, [1.0, 0.0], seed=seed, name="m") for seed in range(400)]
    b, root = layers[0][0], math.sqrt(layers[0][2])
    kept = torch.stack([draw[0] != 0 for draw in draws]).double().mean()
    assert abs(float(kept) - 0.5) < 4 * 0.5 / math.sqrt(400 * b.numel())
    mean = torch.stack([draw[0] for draw in draws]).mean(0)
    # An element is 0 or twice itself, so its standard deviation is its magnitude.
    assert ((mean - root * b).abs() <= 5 * root * b.abs() / math.sqrt(400)).all()
    survivors = draws[0][0][draws[0][0] != 0]
    assert torch.isclose(survivors[:, None], 2 * root * b.flatten()).any(dim=1).all()


def test_dare_on_dense_changes_is_right_on_average() -> None:
    layers = some_layers((4, 3), (8, 10))
    what = Combination("dare_linear_svd", density=0.5, svd_rank=8)
    deltas = [scale * b @ a for b, a, scale in layers]
    draws = [combine_layer(what, layers, [1.0, -0.5], seed=seed, name="m") for seed in range(400)]
    mean = torch.stack([b @ a for b, a in draws]).mean(0)
    spread = (deltas[0].square() + 0.25 * deltas[1].square()).sqrt() / math.sqrt(400)
    assert ((mean - (deltas[0] - 0.5 * deltas[1])).abs() <= 5 * spread + 1e-9).all()


@pytest.mark.parametrize("name", ["svd", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("clamp", [0.7, 0.95, 1.0])
def test_the_clamp_bounds_both_factors_by_the_quantile_of_their_values(name: str, clamp: float) -> None:
    """Compared with numpy's SVD, whose vectors may have other signs: the bound does not depend on them."""
    layers, weights = SITUATIONS["ranks"]
    what = combination(name, svd_clamp=clamp)
    b, a = combine_layer(what, layers, weights, seed=0, name="m")
    u, v = naive(what, layers, weights, 0, "m")
    values = np.concatenate([u.ravel(), v.ravel(), -u.ravel(), -v.ravel()])
    bound = np.quantile(values, clamp)
    np.testing.assert_allclose((b @ a).numpy(), np.clip(u, -bound, bound) @ np.clip(v, -bound, bound), atol=1e-9)
    assert max(float(b.abs().max()), float(a.abs().max())) == pytest.approx(bound)
    assert (clamp == 1.0) == (relative(b @ a, torch.from_numpy(u @ v)) < 1e-9)


def test_layers_that_do_not_fit_are_refused() -> None:
    layers = some_layers((2, 2))
    with pytest.raises(ValueError, match="1 weights for 2 adapters"):
        combine_layer(Combination("cat"), layers, [1.0], seed=0, name="m")
    with pytest.raises(ValueError, match="no adapter changes this module"):
        combine_layer(Combination("cat"), [None, None], [1.0, 1.0], seed=0, name="m")
    with pytest.raises(ValueError, match="12 x 20 and 10 x 20"):
        combine_layer(Combination("linear"), [layers[0], *some_layers((2,), (10, 20))], [1.0, 1.0], seed=0, name="m")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (Combination("tis", density=0.5), "combination_type: there is no combination type 'tis'. Did you mean `ties`?"),
        (Combination("ties"), "density: ties needs `density`"),
        (Combination("dare_linear_svd"), "density: dare_linear_svd needs `density`"),
        (Combination("ties", density=0.0), "density: `density` must be in (0, 1], not 0"),
        (Combination("linear", density=1.5), "density: `density` must be in (0, 1], not 1.5"),
        (Combination("ties", density=math.nan), "density: `density` must be a number, not nan"),
        (Combination("svd", svd_rank=0), "svd_rank: `svd_rank` must be at least 1, not 0"),
        (Combination("svd", svd_clamp=1.1), "svd_clamp: `svd_clamp` must be in (0.5, 1], not 1.1"),
        (Combination("svd", svd_clamp=0.5), "svd_clamp: `svd_clamp` must be in (0.5, 1], not 0.5"),
        (Combination("ties", 0.5, majority_sign_method="sum"), "must be one of total, frequency, not 'sum'"),
    ],
)
def test_combinations_without_a_meaning_are_refused(what: Combination, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(what, 2)
    assert words in str(caught.value)


def test_a_check_finds_everything_at_once() -> None:
    with pytest.raises(RecipeError, match="3 problems") as caught:
        check(Combination("lin", density=2.0, svd_rank=-1), 2)
    assert "Did you mean `linear`?" in str(caught.value)


@pytest.mark.parametrize("name", TYPES)
def test_combinations_with_a_meaning_pass(name: str) -> None:
    check(combination(name), 3)
    check(Combination(name), 1)
