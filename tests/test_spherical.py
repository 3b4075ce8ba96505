"""Spherical means: goldens, the float64 reference, angles at the ends of their range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kernel_driver import SHAPES, golden, random_models, reference, run_kernel, worst
from weldment.methods.spherical import (
    SPHERICAL,
    cosines,
    gram,
    karcher_coefficients,
    lengths,
    settled,
    slerp_coefficients,
)

METHODS = {method.name: method for method in SPHERICAL}
COLUMNS: dict[str, Any] = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
ROWS: dict[str, Any] = {"nuslerp_flatten": False}
CASES: list[tuple[str, bool, dict[str, Any]]] = [
    ("slerp", False, {"t": 0.3}),
    ("nuslerp", False, {"weight": [0.3, 0.6]}),
    ("nuslerp", True, {"weight": [0.3, 0.6]}),
    ("nuslerp", False, ROWS),
    ("nuslerp", True, COLUMNS),
    ("multislerp", False, {"weight": [0.2, 0.5, 0.7]}),
    ("multislerp", True, {"weight": [0.2, 0.5, 0.7], "normalize_weights": False}),
    ("karcher", False, {}),
    ("karcher", False, {"max_iter": 40, "tol": 1e-9}),
]
GOLDENS: list[tuple[str, str, tuple[str, ...], str | None, dict[str, Any]]] = [
    ("slerp", "slerp", ("e0", "e1"), None, {"t": 0.35}),
    ("nuslerp", "nuslerp", ("e0", "e1"), None, {"weight": [0.7, 0.3]}),
    ("nuslerp_rows", "nuslerp", ("e0", "e1"), None, COLUMNS),
    ("nuslerp_task_vectors", "nuslerp", ("e0", "e1"), "base", {"weight": [0.6, 0.4]}),
    ("multislerp", "multislerp", ("e0", "e1", "e2"), None, {"weight": [0.4, 0.3, 0.3]}),
    ("karcher", "karcher", ("e0", "e1", "e2"), None, {}),
]


def count(name: str) -> int:
    return 2 if METHODS[name].models == (2, 2) else 3


@pytest.mark.parametrize(("case", "name", "experts", "origin", "parameters"), GOLDENS, ids=[g[0] for g in GOLDENS])
def test_goldens(case: str, name: str, experts: tuple[str, ...], origin: str | None, parameters: dict[str, Any]):
    expected, *models = golden(f"mergekit/{case}", *experts)
    base = golden(origin)[0] if origin else None
    for tensor, wanted in expected.items():
        inputs = [model[tensor] for model in models]
        merged = run_kernel(METHODS[name], inputs, base[tensor] if base else None, **parameters)
        assert worst(merged, wanted) < 1e-5, tensor


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("noise", [1.0, 1e-3, 0.0])
@pytest.mark.parametrize(("name", "on_base", "parameters"), CASES)
def test_matches_the_reference(name: str, on_base: bool, parameters: dict[str, Any], noise: float, scale: float):
    for shape in SHAPES:
        base, *models = random_models(shape, count(name), scale=scale, noise=noise)
        origin = base if on_base else None
        merged = run_kernel(METHODS[name], models, origin, **parameters)
        assert merged.shape == shape
        assert worst(merged, reference(METHODS[name], models, origin, **parameters)) < 1e-6, shape


@pytest.mark.parametrize(("name", "on_base", "parameters"), CASES)
def test_float64_is_exact_to_twelve_digits(name: str, on_base: bool, parameters: dict[str, Any]):
    base, *models = random_models((40, 33), count(name))
    origin = base if on_base else None
    merged = run_kernel(METHODS[name], models, origin, dtype=torch.float64, **parameters)
    assert worst(merged, reference(METHODS[name], models, origin, **parameters)) < 2e-12


@pytest.mark.parametrize("blocks", [2, 7, 33])
@pytest.mark.parametrize(("name", "on_base", "parameters"), CASES)
def test_bytes_do_not_depend_on_the_blocks(name: str, on_base: bool, parameters: dict[str, Any], blocks: int):
    base, *models = random_models((40, 33), count(name))
    origin = base if on_base else None
    whole = run_kernel(METHODS[name], models, origin, **parameters)
    assert torch.equal(whole, run_kernel(METHODS[name], models, origin, blocks=blocks, **parameters))


@pytest.mark.parametrize(("name", "on_base", "parameters"), CASES)
def test_equal_models_are_kept(name: str, on_base: bool, parameters: dict[str, Any]):
    base, model = random_models((40, 33), 1)
    share = sum(parameters["weight"]) if parameters.get("normalize_weights") is False else 1.0
    origin = base if on_base else None
    expected = base + share * (model - base) if on_base else model
    assert worst(run_kernel(METHODS[name], [model] * count(name), origin, **parameters), expected) < 1e-6


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
@pytest.mark.parametrize("name", METHODS)
def test_empty_tensors_stay_empty(name: str, shape: tuple[int, ...]):
    parameters: dict[str, Any] = {"t": 0.5} if name == "slerp" else {}
    assert run_kernel(METHODS[name], [torch.zeros(shape)] * count(name), **parameters).shape == shape


def test_slerp_ends_are_the_models_bit_by_bit():
    _, first, second = random_models((40, 33), 2)
    assert torch.equal(run_kernel(METHODS["slerp"], [first, second], t=0.0), first)
    assert torch.equal(run_kernel(METHODS["slerp"], [first, second], t=1.0), second)


def test_slerp_of_unit_vectors_walks_the_arc():
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.1, 0.5, 0.8):
        expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
        assert torch.allclose(run_kernel(METHODS["slerp"], [first, second], t=t), expected, atol=1e-7)


def test_slerp_is_linear_beyond_the_threshold_only():
    first, near, far = (torch.tensor([math.cos(a), math.sin(a)]) for a in (0.0, 0.0315, 0.0320))
    linear = [run_kernel(METHODS["slerp"], [first, other], t=0.5) - (first + other) / 2 for other in (near, far)]
    assert float(linear[0].abs().max()) < 1e-7
    assert float(linear[1].abs().max()) > 1e-4


@pytest.mark.parametrize(("name", "parameters"), [("slerp", {"t": 0.25}), ("nuslerp", {"weight": [3.0, 1.0]})])
@pytest.mark.parametrize("factor", [0.0, -1.0, -2.0])
def test_without_an_arc_the_two_are_interpolated_linearly(name: str, parameters: dict[str, Any], factor: float):
    """A zero vector has no direction, and opposite ones have no shortest arc."""
    _, model = random_models((8, 5), 1)
    merged = run_kernel(METHODS[name], [model * factor, model], **parameters)
    assert worst(merged, model * (0.75 * factor + 0.25)) < 1e-6


def test_nuslerp_on_a_base_moves_by_an_unchanged_expert_too():
    base, model = random_models((8, 5), 1)
    merged = run_kernel(METHODS["nuslerp"], [base, model], base, weight=[1.0, 1.0])
    assert worst(merged, (base + model) / 2) < 1e-6


def test_nuslerp_row_wise_interpolates_columns():
    """As measured on mergekit: `nuslerp_row_wise: true` takes the columns for vectors."""
    _, first, second = random_models((6, 4), 2)
    columns = run_kernel(METHODS["nuslerp"], [first, second], **COLUMNS)
    rows = run_kernel(METHODS["nuslerp"], [first.T, second.T], **ROWS)
    assert worst(columns, rows.T) < 1e-6
    assert worst(columns, run_kernel(METHODS["nuslerp"], [first, second], **ROWS)) > 1e-3


def test_multislerp_keeps_length_and_direction():
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    merged = run_kernel(METHODS["multislerp"], [first, second])
    assert torch.allclose(merged, torch.full((2,), 2.0 / math.sqrt(2.0)))


def test_multislerp_of_opposite_models_is_their_weighted_sum():
    _, model = random_models((8, 5), 1)
    merged = run_kernel(METHODS["multislerp"], [model, -3.0 * model], weight=[1.0, 1.0])
    assert worst(merged, -model) < 1e-6


def test_multislerp_of_an_unchanged_expert():
    base, model = random_models((8, 5), 1)
    assert worst(run_kernel(METHODS["multislerp"], [base, model], base), (base + model) / 2) < 1e-6


def test_karcher_of_two_is_the_middle_of_the_arc():
    _, first, second = random_models((8, 5), 2)
    first, second = first / first.norm(), second / second.norm()
    middle = run_kernel(METHODS["slerp"], [first, second], t=0.5)
    assert worst(run_kernel(METHODS["karcher"], [first, second], tol=1e-9, max_iter=50), middle) < 1e-6


def test_karcher_mean_has_no_pull_left():
    """At the mean the arcs to the points, as tangents, sum to zero."""
    _, *models = random_models((50,), 4)
    mean = run_kernel(METHODS["karcher"], models, dtype=torch.float64, max_iter=200, tol=1e-12)
    mean = mean / mean.norm()
    pull = torch.zeros_like(mean)
    for model in models:
        unit = model.double() / model.double().norm()
        cosine = torch.dot(unit, mean)
        pull += torch.acos(cosine) / (1 - cosine**2).sqrt() * (unit - cosine * mean)
    assert float(pull.norm()) < 1e-10


def test_karcher_counts_zero_models_for_the_length_only():
    _, model = random_models((8, 5), 1)
    zero = torch.zeros_like(model)
    assert worst(run_kernel(METHODS["karcher"], [zero, model, model]), model * (2 / 3)) < 1e-6
    assert not run_kernel(METHODS["karcher"], [zero, zero]).any()


def test_karcher_of_opposite_models_starts_from_the_first():
    _, model = random_models((8, 5), 1)
    assert worst(run_kernel(METHODS["karcher"], [model, -model]), model) < 1e-6


def test_karcher_resolves_models_that_nearly_agree():
    """Offsets of 1e-6 of the model survive; a Gram matrix in float32 would lose them."""
    base, *offsets = random_models((4000,), 3)
    models = [base + 1e-6 * offset for offset in offsets]
    merged = run_kernel(METHODS["karcher"], models, dtype=torch.float64) - base.double()
    expected = reference(METHODS["karcher"], models, None) - base.double()
    assert worst(merged, expected) < 1e-5


@pytest.mark.parametrize(("name", "parameters"), [("nuslerp", {}), ("multislerp", {})])
def test_weights_that_cancel_are_refused(name: str, parameters: dict[str, Any]):
    models = [torch.ones(3)] * 2
    with pytest.raises(ValueError, match="sum to zero"):
        run_kernel(METHODS[name], models, weight=[1.0, -1.0], **parameters)


def test_multislerp_weights_may_cancel_unnormalised():
    _, first, second = random_models((8, 5), 2)
    parameters: dict[str, Any] = {"weight": [1.0, -1.0], "normalize_weights": False}
    merged = run_kernel(METHODS["multislerp"], [first, second], **parameters)
    assert worst(merged, reference(METHODS["multislerp"], [first, second], None, **parameters)) < 1e-6


def test_gram_is_exact_where_float32_is_not():
    x, y = torch.tensor([1.0, 2.0**-20]), torch.tensor([1.0, -(2.0**-20)])
    assert gram([x, y])[0, 1] == 1.0 - 2.0**-40


def test_gram_of_rows_is_the_gram_of_each_row():
    _, *models = random_models((6, 9), 3)
    rows = gram(models)
    assert rows.shape == (6, 3, 3)
    for row in range(6):
        assert torch.allclose(rows[row], gram([model[row] for model in models]), rtol=1e-14)


def test_lengths_and_cosines():
    products = gram([torch.tensor([3.0, 4.0]), torch.tensor([4.0, -3.0]), torch.zeros(2)])
    assert lengths(products).tolist() == [5.0, 5.0, 0.0]
    assert cosines(products, undefined=0.5).tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.5, 0.5, 0.5]]


def test_settled_hides_the_last_bits_and_no_more():
    third = 1.0 / 3.0
    first, second = settled(torch.tensor([third, third * (1.0 + 1e-15)], dtype=torch.float64))
    assert first == second == pytest.approx(third, rel=1e-12)
    assert settled(torch.tensor([0.5, 0.0, -1.0, 2.0**-60])) == [0.5, 0.0, -1.0, 2.0**-60]


def test_slerp_coefficients_of_tiny_angles_tend_to_linear():
    for angle in (1e-3, 1e-5, 1e-8, 0.0):
        x = torch.tensor([1.0, 0.0], dtype=torch.float64)
        y = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        found = slerp_coefficients(gram([x, y]), t=0.3, colinear=1.0 - 1e-12)
        assert found.tolist() == pytest.approx([0.7, 0.3], abs=angle**2 + 1e-12)


def test_karcher_coefficients_do_not_blow_up_in_long_descents():
    _, *models = random_models((30,), 5)
    short = karcher_coefficients(gram(models), max_iter=100, tol=1e-12)
    assert torch.allclose(short, karcher_coefficients(gram(models), max_iter=3000, tol=0.0), rtol=1e-9)
