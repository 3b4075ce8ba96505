"""Merging changes in every space, against dense references in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from test_contract import TYPICAL, count, expected
from weldment import METHODS, merge_tensors
from weldment.adapters.lowrank import Factors
from weldment.adapters.merge.coefficients import coefficients
from weldment.adapters.merge.spaces import (
    Change,
    Kernel,
    Span,
    dense,
    in_core,
    in_delta,
    in_factors,
    side_by_side,
    weighted_sum,
    zeros,
)
from weldment.errors import NonFiniteError
from weldment.methods.arguments import settle

OUTPUTS, INPUTS = 24, 17


def change(seed: int, rank: int = 3, scale: float = 0.5, sizes: tuple[int, int] = (OUTPUTS, INPUTS)) -> Change:
    draw = torch.Generator().manual_seed(seed)
    b = torch.randn(sizes[0], rank, generator=draw).double()
    return b, torch.randn(rank, sizes[1], generator=draw).double(), scale


def whole(change: Change) -> Tensor:
    b, a, s = change
    return s * (b @ a)


def value(found: Factors) -> Tensor:
    return found.u @ torch.diag(found.s) @ found.v


def error(found: Tensor, wanted: Tensor) -> float:
    size = float(wanted.double().norm())
    return float((found.double() - wanted.double()).norm()) / (size or 1.0)


def kernel(method: str, models: int, **keys: Any) -> Kernel:
    return Kernel(method, settle(METHODS[method], TYPICAL[method], models), **keys)


def spans(changes: list[Change]) -> tuple[Span, Span]:
    return Span.of([b for b, _, _ in changes]), Span.of([a.T for _, a, _ in changes])


def test_a_span_is_orthonormal_and_knows_every_column() -> None:
    """Also of columns that are almost the same, of very different lengths, and of more columns than rows."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(12, 4, generator=draw).double() * torch.tensor([1.0, 1e-12, 1e9, 1.0])
    second = first + 1e-6 * torch.randn(12, 4, generator=draw).double()
    for parts in ([first], [first, second], [first, second, torch.randn(12, 9, generator=draw).double()]):
        span = Span.of(parts)
        basis = span.vectors(torch.eye(span.size).double())
        assert error(basis.T @ basis, torch.eye(span.size)) <= 1e-7
        for part, coordinates in zip(parts, span.coordinates, strict=True):
            lengths = part.norm(dim=0)
            assert error(basis @ coordinates / lengths, part / lengths) <= 1e-8


WEIGHTS = ([1.0, 0.5, 0.25], [1.0, -2.0, 0.3])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weighted_sums_are_exact_for_mixed_ranks_and_scales(weights: list[float]) -> None:
    terms = list(zip([change(0, 1), change(1, 5, -2.0), change(2, 4, 1e-3)], weights, strict=True))
    wanted = sum(whole(c) * w for c, w in terms)
    assert isinstance(wanted, Tensor)
    b, a = side_by_side(terms)
    assert (b.shape, a.shape) == ((OUTPUTS, 10), (10, INPUTS))
    assert error(b @ a, wanted) <= 1e-14
    assert error(value(weighted_sum(terms)), wanted) <= 1e-13
    assert torch.equal(b[:, 1:6], terms[1][0][0]), "the B stand side by side as they are"


def test_a_weighted_sum_of_more_directions_than_the_matrix_has() -> None:
    terms = [(change(seed, 12), 1.0) for seed in range(3)]
    found = weighted_sum(terms)
    assert found.rank == INPUTS
    assert error(value(found), sum((whole(c) for c, _ in terms), torch.zeros(OUTPUTS, INPUTS))) <= 1e-13


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_changes_do_not_depend_on_how_many_rows_are_taken(
    monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    wanted = dense(change(0), torch.float64, transposed=transposed)
    monkeypatch.setattr("weldment.adapters.merge.spaces._ROWS", 40)
    found = dense(change(0), torch.float64, transposed=transposed)
    assert error(found, wanted) <= 1e-15
    assert error(wanted.T if transposed else wanted, whole(change(0))) <= 1e-15


@pytest.mark.parametrize("name", sorted(METHODS))
def test_delta_is_the_method_on_the_changes(name: str) -> None:
    """Every method, with a base of zero where it needs one, against the float64 formula or itself in float64."""
    method = METHODS[name]
    changes = [change(seed, rank) for seed, rank in zip(range(count(name)), (2, 5, 3), strict=False)]
    run = kernel(name, len(changes), accumulate="float64", seed=7, name="x.weight")
    found = value(in_delta(changes, None, run))
    base = torch.zeros(OUTPUTS, INPUTS).double() if run.needs_base else None
    models = [whole(c) for c in changes]
    if not method.random:
        assert error(found, expected(name, models, base, **TYPICAL[name])) <= 1e-6
    named = [{"x.weight": model} for model in models]
    origin = None if base is None else {"x.weight": base}
    same = merge_tensors(name, named, origin, accumulate="float64", seed=7, **TYPICAL[name])["x.weight"]
    assert error(found, same) <= 1e-6


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.random))
def test_random_masks_differ_from_tensor_to_tensor_and_with_the_seed(name: str) -> None:
    changes = [change(seed) for seed in range(3)]
    runs = [
        value(in_delta(changes, None, kernel(name, 3, seed=seed, name=tensor)))
        for seed, tensor in ((0, "x"), (0, "x"), (1, "x"), (0, "y"))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])


def test_rows_are_those_of_the_stored_weight() -> None:
    """della ranks elements within rows; a transposed weight has the columns of B A for rows."""
    changes = [change(seed) for seed in range(3)]
    run = kernel("della", 3, accumulate="float64")
    stored = merge_tensors(
        "della",
        [{"tensor": whole(c).T.contiguous()} for c in changes],
        {"tensor": torch.zeros(INPUTS, OUTPUTS).double()},
        accumulate="float64",
        **TYPICAL["della"],
    )["tensor"]
    assert error(value(in_delta(changes, None, run, transposed=True)), stored.T) <= 1e-6
    assert error(value(in_delta(changes, None, run)), stored.T) > 1e-2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear", {"weight": [0.5, 2.0, 1.0]}),
        ("linear", {"weight": [0.5, -2.0, 1.0], "normalize": False}),
        ("task_arithmetic", {"weight": [1.0, -1.5, 0.25], "lambda_": 0.6}),
        ("dare_linear", {"weight": [1.0, -1.5, 0.25], "density": 1.0, "normalize": True}),
        ("breadcrumbs", {"weight": 0.5, "density": 1.0, "gamma": 0.0}),
        ("della_linear", {"weight": 0.5, "density": 1.0, "epsilon": 0.0}),
    ],
)
def test_linear_methods_are_the_same_in_all_exact_spaces(name: str, parameters: dict[str, Any]) -> None:
    changes = [change(0, 2), change(1, 6, 2.0), change(2, 3, 0.01)]
    arguments = settle(METHODS[name], parameters, 3)
    run = Kernel(name, arguments, accumulate="float64")
    shares = coefficients(name, arguments)
    assert shares is not None
    exact = value(weighted_sum(list(zip(changes, shares, strict=True))))
    assert error(value(in_delta(changes, None, run)), exact) <= 1e-6
    assert error(value(in_core(changes, None, run)), exact) <= 1e-6


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ties", {"density": 1.0}),
        ("dare_linear", {"density": 0.5}),
        ("breadcrumbs", {"density": 1.0}),
        ("magmax", {}),
        ("task_arithmetic", {"weight": [1.0, -0.5, -0.5], "normalize": True}),
    ],
)
def test_other_merges_have_no_coefficients(name: str, parameters: dict[str, Any]) -> None:
    row = METHODS[name]
    settled = {p.argument: (p.default,) * 3 if p.per_model else p.default for p in row.parameters}
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in parameters.items()}
    listed = {key: (v,) * 3 if key in ("density",) else v for key, v in given.items()}
    assert coefficients(name, {**settled, **listed}) is None


@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "breadcrumbs_ties"])
def test_one_model_alone_elects_its_own_signs(name: str) -> None:
    settled = settle(METHODS[name], {"gamma": 0.0} if "breadcrumbs" in name else {}, 1)
    shares = coefficients(name, {**settled, "weight": (0.7,), "lambda_": 2.0, "normalize": False})
    assert shares == pytest.approx((1.4,))
    run = Kernel(name, {**settled, "weight": (0.7,), "lambda_": 2.0, "normalize": False}, accumulate="float64")
    assert error(value(in_delta([change(0)], None, run)), 1.4 * whole(change(0))) <= 1e-6


@pytest.mark.parametrize("name", sorted(METHODS))
def test_core_never_leaves_the_common_subspace(name: str) -> None:
    changes = [change(seed, rank) for seed, rank in zip(range(count(name)), (2, 4, 3), strict=False)]
    found = in_core(changes, None, kernel(name, len(changes)))
    assert found.rank <= sum(c[1].shape[0] for c in changes)
    u, v = (span.vectors(torch.eye(span.size).double()) for span in spans(changes))
    assert error(u @ (u.T @ value(found) @ v) @ v.T, value(found)) <= 1e-9


def test_core_keeps_small_changes_and_knows_repeated_ones() -> None:
    small = change(1, 2, 1e-9)
    changes = [change(0, 2), small, change(0, 2)]
    run = Kernel("task_arithmetic", settle(METHODS["task_arithmetic"], {"weight": [1.0, 1e9, -1.0]}, 3))
    assert [span.size for span in spans(changes)] == [4, 4]
    assert error(value(in_core(changes, None, run)), whole(small) * 1e9) <= 1e-6


def test_missing_layers_count_as_no_change() -> None:
    changes = [change(0), None]
    run = Kernel("linear", settle(METHODS["linear"], {}, 2), accumulate="float64")
    for found in (in_delta(changes, None, run), in_core(changes, None, run)):
        assert error(value(found), whole(change(0)) / 2) <= 1e-7


def test_changes_of_zero_give_rank_zero() -> None:
    nothing = (torch.zeros(OUTPUTS, 2).double(), change(0)[1][:2], 1.0)
    run = kernel("ties", 3)
    assert in_core([nothing] * 3, None, run).rank == 0
    assert in_delta([nothing] * 3, None, run).rank == 0


@pytest.mark.parametrize("name", ["ties", "task_arithmetic", "magmax"])
def test_an_adapter_may_be_the_base(name: str) -> None:
    base, changes = change(9, 4), [change(0), change(1)]
    run = Kernel(name, settle(METHODS[name], {}, 2), accumulate="float64")
    wanted = merge_tensors(name, [whole(c) for c in changes], whole(base), accumulate="float64")
    assert error(value(in_delta(changes, base, run)), wanted) <= 1e-6
    if name == "task_arithmetic":
        assert error(value(in_core(changes, base, run)), wanted) <= 1e-6


def test_factors_are_merged_apart_with_roots_of_weights_and_scales() -> None:
    changes, weights = [change(0, 3, 4.0), change(1, 3, 9.0)], (1.0, -0.25)
    run = Kernel("task_arithmetic", settle(METHODS["task_arithmetic"], {"weight": list(weights)}, 2))
    b, a = in_factors(changes, None, run, weights)
    (b0, a0, _), (b1, a1, _) = changes
    assert error(b, 2 * b0 + 1.5 * b1) <= 1e-15
    assert error(a, 2 * a0 - 1.5 * a1) <= 1e-15
    by_method = in_factors(changes, None, Kernel(run.method, run.parameters, "float64"))
    assert error(by_method[0], b) <= 1e-12
    assert error(by_method[1], a) <= 1e-12


def test_factors_of_a_method_that_elects() -> None:
    """ties with lambda: both factors are trimmed, elected and averaged with the roots."""
    changes = [change(seed, 3, 4.0) for seed in range(3)]
    parameters = {"weight": [0.25, 1.0, 4.0], "density": 0.5, "lambda_": 4.0}
    run = Kernel("ties", settle(METHODS["ties"], parameters, 3), "float64")
    found = in_factors(changes, None, run)
    for side in (0, 1):
        parts = [2 * c[side] for c in changes]
        wanted = merge_tensors(
            "ties", parts, torch.zeros_like(parts[0]), weight=[0.5, 1.0, 2.0], density=0.5, lambda_=2.0,
            accumulate="float64",
        )  # fmt: skip
        assert error(found[side], wanted) <= 1e-12


def test_factors_of_dropping_methods_divide_the_weights_before_their_roots() -> None:
    changes = [change(seed, 3, 1.0) for seed in range(2)]
    parameters = {"weight": [1.0, 3.0], "density": 0.999999, "normalize": True}
    run = Kernel("dare_linear", settle(METHODS["dare_linear"], parameters, 2), "float64")
    b, _ = in_factors(changes, None, run)
    assert error(b, 0.5 * changes[0][0] + 0.75**0.5 * changes[1][0]) <= 1e-4


def test_zeros_are_zeros() -> None:
    assert torch.equal(zeros((2, 3), torch.float64), torch.zeros(2, 3).double())
    assert zeros((2,), torch.float32).dtype == torch.float32


def test_a_method_that_overflows_is_an_error_with_a_place() -> None:
    run = Kernel("ties", settle(METHODS["ties"], {"lambda_": 3e38, "density": 0.5}, 2), name="x.weight")
    huge = [change(seed, 3, 1e3) for seed in range(2)]
    with pytest.raises(NonFiniteError, match=r"x\.weight: ties gave NaN or infinity"):
        in_delta(huge, None, run)
