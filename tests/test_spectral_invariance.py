"""What turning, scaling, transposing and negating the experts' changes does to spectral merges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_inputs import SPECTRAL, change, distance, orthogonal, random_changes
from weldment import merge_tensors

DIRECTIONS: list[dict[str, Any]] = [{"direction": "vertical"}, {"direction": "horizontal"}]
TRIMMED = {"singular_matrices_drop_rate": 0.6}
CASES: list[tuple[str, dict[str, Any]]] = [
    *[("drm", TRIMMED | direction) for direction in DIRECTIONS],
    ("knots_ties", {"density": 0.4}),
    *[(name, {}) for name in SPECTRAL if name not in ("drm", "knots_ties")],
]
SMOOTH = ["tsv_m", "iso_c", "iso_cts", "swudi", "aswudi"]
"""Methods that trim no entries: they know no basis."""

SIDES = st.integers(1, 9)


def wide(rows: int, columns: int, count: int, seed: int) -> list[Tensor]:
    return random_changes((rows, columns), count, seed, torch.float64)


@pytest.mark.parametrize("name", SMOOTH)
@settings(max_examples=15)
@given(SIDES, SIDES, st.integers(1, 4), st.integers(0, 1000))
def test_an_orthogonal_change_of_basis_commutes(name: str, rows: int, columns: int, count: int, seed: int) -> None:
    taus = wide(rows, columns, count, seed)
    left, right = orthogonal(rows, seed), orthogonal(columns, seed + 1)
    turned = change(name, [left @ tau @ right for tau in taus])
    assert distance(turned, left @ change(name, taus) @ right) <= 1e-5


@settings(max_examples=15)
@given(SIDES, SIDES, st.integers(2, 4), st.integers(0, 1000))
def test_methods_that_trim_know_the_basis_of_the_stacked_side_alone(
    rows: int, columns: int, count: int, seed: int
) -> None:
    """drm, vertical: any basis of the columns, the rows' order and signs; drm, horizontal, and knots the other way.

    Two experts at least: the entries of a turn of the plane, U of a single 2 x 2 matrix, tie at the threshold.
    """
    taus = wide(rows, columns, count, seed)
    basis, order = orthogonal(columns, seed), torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    signs = torch.where(order % 2 == 0, 1.0, -1.0).double()[:, None]
    turned = [(signs * tau)[order] @ basis for tau in taus]
    for name, parameters in CASES[:3]:
        across = parameters.get("direction") == "vertical"
        plain, other = (taus, turned) if across else ([tau.T for tau in taus], [tau.T for tau in turned])
        merged, found = change(name, plain, **parameters), change(name, other, **parameters)
        merged, found = (merged, found) if across else (merged.T, found.T)
        assert distance(found, (signs * merged)[order] @ basis) <= 1e-5


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
@pytest.mark.parametrize("scale", [3.7, 1e-5, -1.0])
def test_scaling_all_experts_scales_the_merge(name: str, parameters: dict[str, Any], scale: float) -> None:
    """Negating as well: no method prefers a sign."""
    taus = wide(11, 14, 3, 0)
    assert (
        distance(change(name, [scale * tau for tau in taus], **parameters), scale * change(name, taus, **parameters))
        < 1e-9
    )


@pytest.mark.parametrize("shape", [(11, 14), (14, 11), (5, 60), (60, 5)], ids=str)
def test_transposing_swaps_the_directions_of_drm(shape: tuple[int, int]) -> None:
    taus = random_changes(shape)
    turned = [tau.T.contiguous() for tau in taus]
    vertical, horizontal = (change("drm", taus, **TRIMMED, **direction) for direction in DIRECTIONS)
    assert distance(change("drm", turned, **TRIMMED, **DIRECTIONS[0]), horizontal.T) <= 1e-6
    assert distance(change("drm", turned, **TRIMMED, **DIRECTIONS[1]), vertical.T) <= 1e-6
    assert distance(vertical, horizontal) > 0.05


@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
def test_transposing_commutes(name: str) -> None:
    taus = random_changes((11, 14))
    assert distance(change(name, [tau.T.contiguous() for tau in taus]), change(name, taus).T) <= 1e-5


@pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
def test_the_base_is_only_where_the_merge_begins(name: str, parameters: dict[str, Any]) -> None:
    taus, (base,) = wide(11, 14, 3, 0), wide(11, 14, 1, 1)
    merged = merge_tensors(name, [base + tau for tau in taus], base, accumulate="float64", lambda_=0.3, **parameters)
    assert distance(merged - base, 0.3 * change(name, taus, **parameters)) <= 1e-9
