"""Spectral merges of equal experts, of many, of low rank and of none; the energy (squared norm) that is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_inputs import (
    SPECTRAL,
    change,
    distance,
    energy,
    foremost,
    formula,
    low_rank_changes,
    random_changes,
    rank_of,
)
from weldment import merge_tensors

DRM: list[dict[str, Any]] = [
    {"singular_matrices_drop_rate": 0.6, "direction": direction} for direction in ("vertical", "horizontal", "auto")
]
CASES: list[tuple[str, dict[str, Any]]] = [
    *[("drm", parameters) for parameters in DRM],
    *[(name, {}) for name in SPECTRAL if name != "drm"],
]
SHAPES = [(12, 15), (15, 12), (4, 40), (40, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
cases = pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)


def values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


@shapes
def test_equal_experts(shape: tuple[int, int]) -> None:
    """What each formula says of three copies of tau = U S V', k = floor(r / 3)."""
    (tau,) = random_changes(shape, 1)
    copies, each = [tau] * 3, min(shape) // 3
    assert distance(change("tsv_m", copies), foremost(tau, each)) <= 1e-5
    assert energy(change("tsv_m", copies)) == pytest.approx(float(values(tau)[:each].square().sum()), rel=1e-5)
    assert distance(change("iso_c", copies), 3.0 * change("iso_c", [tau])) <= 1e-5
    assert energy(change("iso_c", [tau])) == pytest.approx(float(values(tau).mean() ** 2 * min(shape)), rel=1e-5)
    assert distance(change("knots_ties", copies), tau) <= 1e-5
    assert distance(change("aswudi", copies), 3.0 * tau - 2.0 * foremost(tau, effective(tau))) <= 1e-5
    assert distance(change("swudi", copies, t=1e6, keep=1.0), tau) <= 1e-5
    assert distance(change("swudi", copies, t=0.0), 3.0 * tau) <= 1e-6


def effective(tau: Tensor) -> int:
    """aswudi's count of directions: three copies make squares in proportion to those of one."""
    found = values(tau)
    return int((found.sum() ** 2 / found.square().sum() - 1e-9).ceil())


@shapes
def test_equal_experts_in_two_subspaces(shape: tuple[int, int]) -> None:
    """iso_cts: k_c values are three times as large, three times k_t are not; all are replaced by their mean."""
    (tau,) = random_changes(shape, 1)
    r = min(shape)
    own = round((r - int(0.5 * r)) / 3)
    s, common = values(tau), r - 3 * own
    mean = float((3.0 * s[:common].sum() + 3.0 * s[common : common + own].sum()) / r)
    found = change("iso_cts", [tau] * 3, common_space_fraction=0.5)
    assert torch.allclose(values(found)[: common + own], torch.tensor(mean).double(), rtol=1e-5)
    assert rank_of(found) == common + own
    assert energy(found) == pytest.approx(mean**2 * (common + own), rel=1e-5)


@pytest.mark.parametrize("parameters", DRM[:2], ids=str)
@shapes
def test_equal_experts_are_trimmed_as_one(shape: tuple[int, int], parameters: dict[str, Any]) -> None:
    (tau,) = random_changes(shape, 1)
    half = parameters | {"singular_matrices_drop_rate": 0.5}  # a whole number of entries
    assert distance(change("drm", [tau] * 3, **half), change("drm", [tau], **half)) <= 1e-5
    assert 0.5 * energy(tau) < energy(change("drm", [tau] * 3, **half)) < energy(tau)


@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (2, 2), (1, 6), (6, 1)], ids=str)
@cases
def test_more_experts_than_rank(name: str, parameters: dict[str, Any], shape: tuple[int, int]) -> None:
    """Nothing is NaN, and no method but the descents ends with more energy than went in."""
    taus = random_changes(shape, 7)
    found = change(name, taus, **parameters)
    assert distance(found, formula(name, taus, **parameters)) <= 1e-5
    assert energy(found) > 0.0
    if name.startswith("iso"):
        assert energy(found) <= energy(torch.stack(taus).sum(dim=0)) * (1.0 + 1e-6)
    elif "wudi" not in name:
        assert energy(found) <= sum(map(energy, taus)) * (1.0 + 1e-6)


@pytest.mark.parametrize("shape", [(4, 5), (12, 15), (15, 12)], ids=str)
@pytest.mark.parametrize("count", [2, 7])
def test_the_descent_ends_where_interference_is_least(shape: tuple[int, int], count: int) -> None:
    """sum_i |(tau - tau_i) tau_i'|^2 / |tau_i|^2 falls with t, to the minimum: its gradient tau C - D is zero."""
    taus = [tau.double() for tau in random_changes(shape, count)]

    def interference(merged: Tensor) -> float:
        return sum(energy((merged - tau) @ tau.T) / energy(tau) for tau in taus)

    found = [change("swudi", taus, t=t, keep=1.0) for t in (0.0, 1.0, 1e9)]
    assert interference(found[0]) > interference(found[1]) > interference(found[2])
    gradient = sum((found[2] - tau) @ tau.T @ tau / energy(tau) for tau in taus)
    assert isinstance(gradient, Tensor)
    assert energy(gradient) <= 1e-16 * energy(found[2])


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_sums_of_low_rank_stay_of_low_rank(name: str, shape: tuple[int, int], rank: int) -> None:
    """One value in every direction of the sum, and nothing outside them."""
    taus = low_rank_changes(shape, rank)
    total = torch.stack(taus).sum(dim=0).double()
    found = change(name, taus).double()
    assert rank_of(found) == rank_of(total) == 3 * rank
    left, s, right = torch.linalg.svd(total)
    outside = [left[:, 3 * rank :].T @ found, found @ right[3 * rank :].T]
    assert max(map(energy, outside)) <= 1e-10 * energy(found)
    assert energy(found) == pytest.approx(float(s[: 3 * rank].mean() ** 2 * 3 * rank), rel=1e-5)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (4, 60), (60, 4)], ids=str)
@cases
def test_low_rank(name: str, parameters: dict[str, Any], shape: tuple[int, int]) -> None:
    """What a formula says of experts of rank 2, and no energy outside the rows and columns that they span."""
    taus = low_rank_changes(shape, 2, count=2)
    found = change(name, taus, **parameters)
    assert distance(found, formula(name, taus, **parameters)) <= 1e-5
    if name in ("drm", "knots_ties"):  # elected signs make directions of their own on one side
        return
    for stacked, merged in ((torch.cat(taus).T, found.T), (torch.cat(taus, dim=1), found)):
        span = torch.linalg.svd(stacked.double(), full_matrices=False).U[:, :4]
        assert distance(span @ (span.T @ merged.double()), merged) <= 1e-5


@cases
def test_no_change_is_the_base_exactly(name: str, parameters: dict[str, Any]) -> None:
    (base,) = random_changes((12, 15), 1)
    assert torch.equal(merge_tensors(name, [base] * 3, base, **parameters), base)


@shapes
@pytest.mark.parametrize(
    ("name", "parameters"),
    [case for case in CASES if case[0] not in ("tsv_m", "iso_cts")]
    + [("drm", DRM[0] | {"enable_sign_resolution": False})],
    ids=str,
)
def test_an_expert_without_a_change_changes_nothing(
    name: str, parameters: dict[str, Any], shape: tuple[int, int]
) -> None:
    """In the sum and in the descents it is nothing; in disjoint means it has no entries."""
    first, second = random_changes(shape, 2)
    with_it = change(name, [first, torch.zeros(shape), second], **parameters)
    assert distance(with_it, change(name, [first, second], **parameters)) <= 1e-5


@shapes
def test_an_expert_without_a_change_counts(shape: tuple[int, int]) -> None:
    """In drm's mean over all, and in how many vectors of the others tsv_m and iso_cts take."""
    first, second = random_changes(shape, 2)
    three, two = [first, torch.zeros(shape), second], [first, second]
    for parameters in DRM[:2]:
        means = [change("drm", taus, enable_disjoint_mean=False, **parameters) for taus in (three, two)]
        assert distance(means[0], means[1] * 2 / 3) <= 1e-5
    each = min(shape) // 3
    found = change("tsv_m", three)
    assert distance(found, change("tsv_m", [foremost(tau, each).float() for tau in two])) <= 1e-5
    assert rank_of(found) == 2 * each
    own = round((min(shape) - int(0.8 * min(shape))) / 3)
    assert rank_of(change("iso_cts", three)) == min(shape) - own


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)], ids=str)
def test_one_row_or_column(shape: tuple[int, int]) -> None:
    """A matrix of rank one has one direction on one side: the sum, or the unit of the largest, or the signs' mean."""
    taus = random_changes(shape)
    assert distance(change("iso_c", taus), torch.stack(taus).sum(dim=0)) <= 1e-6
    for name, parameters in CASES:
        assert distance(change(name, taus, **parameters), formula(name, taus, **parameters)) <= 1e-5


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(5, 20), (20, 5), (4, 4)], ids=str)
def test_subspaces_never_hold_more_than_the_rank(shape: tuple[int, int], fraction: float) -> None:
    """5 directions are 2 too few for 3 x round(5 / 3): experts get floor(5 / 3) of their own."""
    taus = random_changes(shape)
    found = change("iso_cts", taus, common_space_fraction=fraction)
    assert distance(found, formula("iso_cts", taus, common_space_fraction=fraction)) <= 1e-5
    assert rank_of(found) == min(shape)


def test_rows_without_a_change_have_no_entries() -> None:
    """Of a row that one expert did not change, the mean is over the others; also where parts are calculated at once."""
    taus = random_changes((20, 100))
    taus[0][5] = 0.0
    kept = {"singular_matrices_drop_rate": 1e-9, "enable_sign_resolution": False, "direction": "vertical"}
    found = change("drm", taus, **kept)
    mean = torch.stack(taus).mean(dim=0)
    mean[5] *= 3 / 2
    assert distance(found, mean) <= 1e-5
    turned = [tau.T.contiguous() for tau in taus]
    assert distance(change("knots_ties", turned), formula("knots_ties", turned)) <= 1e-5
    assert distance(change("knots_ties", turned)[:, 5], change("knots_ties", turned[1:] + turned[:1])[:, 5]) <= 1e-5


def test_experts_on_different_rows_are_kept_as_they_are() -> None:
    """Each has a part in its own directions alone; rounding errors in the others are no entries that halve a mean."""
    first, second = (low_rank_changes((20, 24), 2, count=1, seed=seed)[0] for seed in (0, 1))
    first[10:], second[:10] = 0.0, 0.0
    second *= 0.9
    kept = {"singular_matrices_drop_rate": 1e-9}
    assert distance(change("drm", [first, second], direction="horizontal", **kept), first + second) <= 1e-5
    assert distance(change("knots_ties", [first, second]), first + second) <= 1e-5
    turned = [first.T.contiguous(), second.T.contiguous()]
    assert distance(change("drm", turned, direction="vertical", **kept), (first + second).T) <= 1e-5


@cases
def test_what_is_not_finite_ends_as_nan(name: str, parameters: dict[str, Any]) -> None:
    """In its own matrix; the other matrices of a tensor are merged."""
    taus = random_changes((2, 6, 5))
    clean = [
        merge_tensors(name, [{"experts.up": tau} for tau in taus], {"experts.up": torch.zeros(2, 6, 5)}, **parameters)
    ]
    for bad in (float("nan"), float("inf")):
        taus[1][0, 2, 3] = bad
        found = merge_tensors(
            name, [{"experts.up": tau} for tau in taus], {"experts.up": torch.zeros(2, 6, 5)}, **parameters
        )
        assert found["experts.up"][0].isnan().all()
        assert torch.equal(found["experts.up"][1], clean[0]["experts.up"][1])


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_rounding_of_the_models_is_no_direction(name: str, size: float) -> None:
    """Low-rank changes that are stored as float32 models: what rounding added to them has full rank."""
    base = 0.02 * random_changes((96, 120), 1, seed=1)[0]
    taus = [0.02 * size * tau for tau in low_rank_changes((96, 120), 4)]
    merged = merge_tensors(name, [base + tau for tau in taus], base, dtype=torch.float64) - base.double()
    assert distance(merged, change(name, taus)) <= 1e-3
    assert rank_of(merged) <= 12
