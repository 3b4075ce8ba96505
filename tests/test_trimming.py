"""Trimming of task vectors: thresholds, bands, ranks in rows."""

from __future__ import annotations

import pytest
import torch

from weldment.methods.trimming import della_levels, drop_above, keep_above, kept_count, row_order


@pytest.mark.parametrize(("density", "numel", "kept"), [(0.2, 10, 2), (0.29, 10, 2), (0.01, 10, 1), (1.0, 7, 7)])
def test_kept_count(density: float, numel: int, kept: int) -> None:
    assert kept_count(density, numel) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_itself_is_kept(dtype: torch.dtype) -> None:
    """All elements at the threshold stay, those one step below go."""
    at = torch.tensor(0.1, dtype=dtype)
    below = torch.nextafter(at, torch.tensor(0.0, dtype=dtype))
    tau = torch.stack([at, -at, below, -below, torch.tensor(0.0, dtype=dtype), torch.tensor(3.0, dtype=dtype)])
    kept = keep_above(tau.clone(), float(at))
    assert kept.tolist() == [float(at), -float(at), 0.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_no_threshold_keeps_everything(threshold: float | None) -> None:
    tau = torch.randn(100)
    assert torch.equal(keep_above(tau.clone(), threshold), tau)


def test_subnormal_threshold() -> None:
    tau = torch.tensor([1e-45, -3e-45, 0.0, 1e-44])
    assert keep_above(tau.clone(), float(tau[1].abs())).tolist() == [0.0, float(tau[1]), 0.0, float(tau[3])]


def test_drop_above() -> None:
    tau = torch.tensor([0.5, -2.0, 2.0, -1.999, 3.0])
    dropped = drop_above(tau.clone(), 2.0, torch.empty(5))
    assert torch.equal(dropped, torch.tensor([0.5, 0.0, 0.0, -1.999, 0.0]))
    assert torch.equal(drop_above(tau.clone(), None, torch.empty(5)), tau)
    assert torch.equal(drop_above(tau.clone(), 0.0, torch.empty(5)), torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_order_is_a_stable_argsort(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tau = torch.randn(9, 301, generator=draw, dtype=dtype).mul(4).round().div(4)  # many equal magnitudes
    tau[2] = 0.0
    tau[3, 5], tau[3, 6] = float("inf"), -float("inf")
    assert torch.equal(row_order(tau, torch.empty(9, 301, dtype=torch.float64)), tau.abs().argsort(dim=1, stable=True))


def test_row_order_of_extreme_magnitudes() -> None:
    """Subnormal, tiny and huge magnitudes keep their order."""
    tau = torch.tensor([[3e38, -1e-45, 0.0, 2e-45, -1e38, 1e-38]])
    assert row_order(tau, torch.empty(1, 6, dtype=torch.float64)).tolist() == [[2, 1, 3, 5, 4, 0]]


def test_keep_probabilities_rise_with_the_rank() -> None:
    tau = torch.tensor([[0.1, -0.4, 0.2, 0.3, 0.0]])
    keep = della_levels(tau, 0.5, 0.2, torch.empty(1, 5), torch.empty(1, 5, dtype=torch.float64))
    expected = torch.tensor([[0.4, 0.7, 0.5, 0.6, 0.3]])
    assert (keep / 65536 - expected).abs().max() <= 0.5 / 65536 + 1e-7
    assert torch.equal(keep, keep.round())


def test_rows_of_one_element_keep_with_the_density() -> None:
    assert della_levels(torch.randn(4, 1), 0.5, 0.2, torch.empty(4, 1), torch.empty(4, 1)).tolist() == [[32768]] * 4
