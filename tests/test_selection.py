"""Selections: goldens, the float64 reference, and what each method promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernel_driver import SHAPES, golden, random_models, reference, run_kernel, worst
from weldment.methods.selection import (
    SELECTION,
    fusion_ranks,
    fusion_threshold,
    ram_gains,
    row_divergence,
    sce_ranks,
    sce_weights,
    stock_share,
)
from weldment.methods.spherical import gram

METHODS = {method.name: method for method in SELECTION}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("sce", {}),
    ("sce", {"select_topk": 0.3, "lambda": 0.7}),
    ("ram", {"epsilon": 0.3}),
    ("ramplus_tl", {"epsilon": 0.3, "r": 0.5, "alpha": 3.0}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("arcee_fusion", {}),
    ("pcb", {}),
    ("pcb", {"density": 0.5, "weight": [1.0, 0.5, 1.2], "lambda": 0.8}),
    ("pcb", {"density": 1.0}),
    ("consensus_ta", {}),
    ("consensus_ta", {"k": 1, "lambda_t": [0.2, 0.5, 1.0], "lambda": 0.4}),
    ("magmax", {"lambda": 0.5}),
]
EXPERTS = ("e0", "e1", "e2")
GOLDENS: list[tuple[str, dict[str, Any]]] = [
    ("sce", {"select_topk": 0.4}),
    ("ram", {"epsilon": 0.004}),
    ("ramplus_tl", {"epsilon": 0.004, "r": 0.1, "alpha": 0.2}),
    ("model_stock", {}),
    ("arcee_fusion", {}),
]


def inputs(name: str, shape: tuple[int, ...], **options: float) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Three experts and a base, or the base and one expert as the models."""
    if METHODS[name].base_is_model:
        return random_models(shape, 1, **options), None
    base, *models = random_models(shape, 3, **options)
    return models, base


def merged(name: str, deltas: list[list[float]], **parameters: Any) -> list[float]:
    """Merge models that are task vectors on a base of zeros."""
    models = [torch.tensor(delta) for delta in deltas]
    return run_kernel(METHODS[name], models, torch.zeros_like(models[0]), **parameters).tolist()


@pytest.mark.parametrize(("name", "parameters"), GOLDENS, ids=[name for name, _ in GOLDENS])
def test_goldens(name: str, parameters: dict[str, Any]):
    experts = EXPERTS[:2] if METHODS[name].base_is_model else EXPERTS
    expected, base, *models = golden(f"mergekit/{name}", "base", *experts)
    for tensor, wanted in expected.items():
        origin = None if METHODS[name].base_is_model else base[tensor]
        found = run_kernel(METHODS[name], [model[tensor] for model in models], origin, **parameters)
        assert worst(found, wanted) < 1e-5, tensor


def test_golden_of_model_stock_by_row_where_models_do_not_oppose():
    """mergekit lets t go below 0 where the mean cosine is negative; we keep the base there."""
    expected, base, *models = golden("mergekit/model_stock_rows", "base", *EXPERTS)
    opposed = 0
    for tensor, wanted in expected.items():
        experts = [model[tensor] for model in models]
        found = run_kernel(METHODS["model_stock"], experts, base[tensor], filter_wise=True)
        rows = [x.reshape(1, -1) if x.dim() == 1 else x for x in (found, wanted, base[tensor], *experts)]
        shares = stock_share(gram([model - rows[2] for model in rows[3:]]))
        agree = shares > 0.0
        assert worst(rows[0][agree], rows[1][agree]) < 1e-5, tensor
        assert torch.equal(rows[0][~agree], rows[2][~agree]), tensor
        opposed += int((~agree).sum())
    assert opposed > 0


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_matches_the_reference(name: str, parameters: dict[str, Any], scale: float):
    if name == "arcee_fusion" and scale < 1.0:
        pytest.skip("the naive divergence of rows that differ by 1e-30 is rounding noise")
    settings = {key: value * scale if key == "epsilon" else value for key, value in parameters.items()}
    for shape in SHAPES:
        models, base = inputs(name, shape, scale=scale)
        found = run_kernel(METHODS[name], models, base, **settings)
        assert found.shape == shape
        assert worst(found, reference(METHODS[name], models, base, **settings)) < 3e-6, shape


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_stays_finite_at_any_magnitude(name: str, parameters: dict[str, Any]):
    for scale in (1e37, 1e-37, 1e-44):
        models, base = inputs(name, (6, 7), scale=scale)
        assert run_kernel(METHODS[name], models, base, **parameters).isfinite().all()


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_float64_is_exact_to_eleven_digits(name: str, parameters: dict[str, Any]):
    models, base = inputs(name, (40, 33))
    found = run_kernel(METHODS[name], models, base, dtype=torch.float64, **parameters)
    assert worst(found, reference(METHODS[name], models, base, **parameters)) < 1e-11


@pytest.mark.parametrize("blocks", [2, 7, 33])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_bytes_do_not_depend_on_the_blocks(name: str, parameters: dict[str, Any], blocks: int):
    models, base = inputs(name, (40, 33))
    whole = run_kernel(METHODS[name], models, base, **parameters)
    assert torch.equal(whole, run_kernel(METHODS[name], models, base, blocks=blocks, **parameters))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sce", {}),
        ("sce", {"select_topk": 0.1}),
        ("ram", {"epsilon": 0.0}),
        ("model_stock", {}),
        ("model_stock", {"filter_wise": True}),
        ("pcb", {"density": 1.0}),
        ("magmax", {}),
    ],
)
def test_equal_experts_are_kept(name: str, parameters: dict[str, Any]):
    base, expert = random_models((9, 7), 1)
    found = run_kernel(METHODS[name], [expert] * 3, base, **parameters)
    if name == "pcb":  # its lowest score counts as dropped, its largest magnitude is clamped
        assert int(((found - expert).abs() > 1e-6).sum()) == 2
    else:
        assert worst(found, expert) < 1e-6


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_unchanged_experts_give_the_base(name: str, parameters: dict[str, Any]):
    (base,) = random_models((9, 7), 0)
    models = [base] * (2 if METHODS[name].base_is_model else 3)
    found = run_kernel(METHODS[name], models, None if METHODS[name].base_is_model else base, **parameters)
    assert torch.equal(found, base)


@pytest.mark.parametrize("name", METHODS)
def test_empty_tensors_stay_empty(name: str):
    assert run_kernel(METHODS[name], [torch.zeros(0, 4)] * 2, torch.zeros(0, 4)).shape == (0, 4)


def test_sce_selects_where_models_differ_most():
    deltas = [[1.0, 4.0, 1.0, 0.0], [1.0, -1.0, 1.5, 0.0]]
    # Two elements differ; half of them is one: the second, whose majority sign is +.
    assert merged("sce", deltas, select_topk=0.5) == [0.0, 4.0, 0.0, 0.0]


def test_sce_weighs_models_by_their_energy():
    found = merged("sce", [[3.0, 0.0], [1.0, 0.0]])
    assert found == pytest.approx([(9 * 3 + 1 * 1) / 10, 0.0])


def test_sce_weights_have_no_floor():
    """With mergekit's floor of 1e-6 changes of 1e-6 would be averaged with equal weights."""
    tiny = merged("sce", [[3e-6, 0.0], [1e-6, 0.0]])
    assert tiny[0] == pytest.approx(2.8e-6, rel=1e-5)


def test_sce_erases_minority_signs_by_plain_sums():
    """The sign is that of the sum of the task vectors, without the weights that follow."""
    assert merged("sce", [[10.0, 3.0], [0.0, -2.0], [0.0, -2.0]])[1] == pytest.approx(-2.0)


def test_sce_weights_of_nothing_are_equal():
    assert sce_weights(torch.zeros(3, dtype=torch.float64)) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("varying", "rank"), [(10.0, 9), (4.0, 9), (0.0, None)])
def test_sce_keeps_at_least_one_of_the_elements_that_vary(varying: float, rank: int | None):
    assert sce_ranks(10, select_topk=0.15, statistics={"varying": varying}) == [[rank]]


def test_ram_averages_shared_changes_and_keeps_lone_ones():
    deltas = [[2.0, 6.0, 0.05, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.05, 0.0, 0.0]]
    assert merged("ram", deltas, epsilon=0.1) == [3.0, 6.0, 0.0, 0.0]


def test_ramplus_amplifies_lone_changes_of_models_that_overlap():
    deltas = [[2.0, 6.0, 8.0], [4.0, 0.0, 0.0]]
    # Model 0 shares one element and has two alone: 1 + 0.5 * min(1 / 2, 2) = 1.25.
    assert merged("ramplus_tl", deltas, epsilon=0.1, r=0.5, alpha=2.0) == [3.0, 7.5, 10.0]
    assert merged("ramplus_tl", deltas, epsilon=0.1, r=0.5, alpha=0.2) == pytest.approx([3.0, 6.6, 8.8])


def test_ramplus_with_r_zero_is_ram():
    models, base = inputs("ram", (40, 33))
    plain = run_kernel(METHODS["ram"], models, base, epsilon=0.5)
    assert torch.equal(run_kernel(METHODS["ramplus_tl"], models, base, epsilon=0.5, r=0.0), plain)


def test_ram_gains_of_models_without_lone_changes():
    counts = torch.tensor([[5.0, 0.0], [0.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    assert ram_gains(counts, r=0.1, alpha=0.5) == pytest.approx([0.0, 0.0, 0.05])


def test_model_stock_of_unrelated_experts_is_the_base():
    assert merged("model_stock", [[1.0, 0.0], [0.0, 2.0]]) == [0.0, 0.0]


def test_model_stock_of_opposed_experts_is_the_base():
    third = [[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]]
    assert merged("model_stock", third) == pytest.approx([0.0, 0.0], abs=1e-6)
    assert merged("model_stock", [[1.0, 2.0], [-1.0, -2.0]]) == [0.0, 0.0]


def test_model_stock_is_in_proportion_to_agreement():
    """Two experts at 60 degrees: t = 2 c / (1 + c) = 2 / 3."""
    found = merged("model_stock", [[1.0, 0.0], [0.5, 3**0.5 / 2]])
    assert found == pytest.approx([0.75 * 2 / 3, 3**0.5 / 4 * 2 / 3])


def test_model_stock_by_rows_treats_each_row_alone():
    models, base = inputs("model_stock", (5, 6), noise=0.1)
    whole = run_kernel(METHODS["model_stock"], models, base, filter_wise=True)
    assert base is not None
    for row in range(5):
        alone = run_kernel(METHODS["model_stock"], [model[row] for model in models], base[row])
        assert worst(whole[row], alone) < 1e-6


def test_arcee_fusion_takes_whole_elements_of_one_model_or_the_other():
    base, other = random_models((40, 33), 1)
    found = run_kernel(METHODS["arcee_fusion"], [base, other])
    taken = found == other
    assert bool((taken | (found == base)).all())
    assert 0.02 < float(taken.float().mean()) < 0.3


def test_arcee_fusion_takes_all_where_rows_have_one_element():
    """The softmax of one number is 1: no element is more important than another."""
    base, other = random_models((8, 1), 1)
    assert torch.equal(run_kernel(METHODS["arcee_fusion"], [base, other]), other)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.5, 3.0, 50.0, 1e4])
def test_row_divergence_is_accurate_for_small_and_large_changes(size: float):
    draw = np.random.default_rng(3)
    base = draw.standard_normal((4, 64)).astype(np.longdouble)
    other = base + np.longdouble(size) * draw.standard_normal((4, 64)).astype(np.longdouble)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        shifted = x - x.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    p, q = log_softmax(base), log_softmax(other)
    expected = (np.exp(q) * (q - p)).sum(axis=1, keepdims=True).astype(np.float64)
    found = row_divergence(*(torch.from_numpy(x.astype(np.float64)) for x in (base, other)))
    assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=0.0)


def test_fusion_quartiles_and_threshold():
    assert [fusion_ranks(n) for n in (1, 4, 9, 10)] == [[[0, 0, 0]], [[0, 1, 2]], [[2, 4, 6]], [[2, 4, 6]]]
    assert fusion_threshold(1.0, 2.0**0.25, 3.0**0.25) ** 4 == pytest.approx(5.0)
    assert fusion_threshold(0.3, 0.3, 0.3) == 0.3


def test_pcb_agrees_with_the_formula_on_a_whole_model():
    """`trim: global` over a model equals the tensor variant on the concatenated model."""
    first, second = (random_models((30,), 2, scale=scale) for scale in (1.0, 5.0))
    joined = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    found = run_kernel(METHODS["pcb"], joined[1:], joined[0], trim="global", density=0.4)
    apart = run_kernel(METHODS["pcb"], first[1:], first[0], density=0.4)
    assert worst(found, reference(METHODS["pcb"], joined[1:], joined[0], density=0.4)) < 1e-6
    assert not torch.allclose(found[:30], apart)


def test_pcb_drops_what_goes_against_the_others():
    """Model 1 opposes a larger change of model 0 in the second element; its score is the lowest it has."""
    deltas = [[1.0, 0.5, 0.25, 2.0, 2.0], [1.0, -0.1, 0.25, 2.0, 2.0]]
    assert merged("pcb", deltas, density=1.0)[1] == pytest.approx(0.5)


def test_consensus_needs_enough_votes():
    deltas = [[1.0, 1.0, 0.1], [1.0, 0.0, -0.1]]
    # Second element: model 0 alone selects it. Third: the sum is 0, both are as far as the base.
    assert merged("consensus_ta", deltas, lambda_t=1.0, k=2) == [2.0, 0.0, 0.0]
    assert merged("consensus_ta", deltas, lambda_t=1.0, k=1) == [2.0, 1.0, 0.0]
    assert merged("consensus_ta", deltas, lambda_t=1.0, k=0, **{"lambda": 0.5}) == [1.0, 0.5, 0.0]


def test_consensus_refuses_more_votes_than_models():
    with pytest.raises(ValueError, match="k = 3 with 2 models keeps nothing"):
        merged("consensus_ta", [[1.0], [1.0]], k=3)


def test_magmax_takes_the_largest_magnitude():
    deltas = [[1.0, -2.0, 0.0, -3.0, -5.0], [-2.0, 1.0, 0.0, 3.0, -1.0]]
    assert merged("magmax", deltas) == [-2.0, -2.0, 0.0, 3.0, -5.0]
    assert merged("magmax", deltas[:1]) == deltas[0]
