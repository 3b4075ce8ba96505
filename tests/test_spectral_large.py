"""Matrices whose short side is above the limit of float64, against the float64 formulas."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectral_inputs import (
    change,
    distance,
    energy,
    foremost,
    formula,
    low_rank_changes,
    random_changes,
    rank_of,
    steep_changes,
)
from spectral_reference import CUT, stack, svd
from weldment.methods.spectral.bases import SMALL

STEEP, RANDOM = (514, 540), (540, 514)
DIRECTIONS = ("vertical", "horizontal")


@cache
def inputs(shape: tuple[int, int]) -> list[Tensor]:
    return steep_changes(shape) if shape == STEEP else random_changes(shape)


def test_they_are_large() -> None:
    assert min(*STEEP, *RANDOM) > SMALL


@pytest.mark.parametrize("shape", [STEEP, RANDOM], ids=str)
@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "swudi"])
def test_reference(name: str, shape: tuple[int, int]) -> None:
    """float32 within 3e-4 of the change, also where singular values fall to 1e-5 of the largest."""
    taus = inputs(shape)
    assert distance(change(name, taus), formula(name, taus)) <= 3e-4


def blocks(taus: list[Tensor], direction: str) -> list[np.ndarray[Any, Any]]:
    return [tau.double().numpy() if direction == "vertical" else tau.double().numpy().T for tau in taus]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_drm_that_trims_nothing_is_the_mean_of_the_cut_stack(direction: str) -> None:
    """U_i S V' are the parts of the stack without its singular values below a hundredth; no sign loses an entry."""
    taus = inputs(STEEP)
    u, s, rows = svd(np.concatenate(parts := blocks(taus, direction)), CUT)
    mean = (u * s).reshape(len(parts), len(parts[0]), -1).mean(axis=0) @ rows
    found = change("drm", taus, direction=direction, singular_matrices_drop_rate=1e-9, enable_sign_resolution=False)
    assert distance(found if direction == "vertical" else found.T, torch.from_numpy(mean)) <= 1e-5
    assert distance(torch.from_numpy(mean), torch.from_numpy(np.mean(parts, axis=0))) > 1e-3


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_drm_decides_few_entries_differently(direction: str) -> None:
    """Entries at the threshold, and sums whose sign is rounding: less than one of a hundred, seen in the basis V."""
    taus = inputs(STEEP)
    settings: dict[str, Any] = {"direction": direction, "singular_matrices_drop_rate": 0.6}
    found, wanted = change("drm", taus, **settings).double(), formula("drm", taus, **settings)
    assert distance(found, wanted) <= 2e-2
    vectors = torch.from_numpy(stack(blocks(taus, direction)).rows.T)
    seen, meant = ((merged if direction == "vertical" else merged.T) @ vectors for merged in (found, wanted))
    assert float(((seen - meant).abs() > 1e-4 * meant.abs().max()).double().mean()) < 0.01


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "swudi"])
def test_low_rank(name: str) -> None:
    taus = low_rank_changes(STEEP, 4)
    found = change(name, taus)
    assert distance(found, formula(name, taus)) <= 1e-5
    assert rank_of(found) == 12


def test_equal_experts() -> None:
    (tau,) = random_changes(STEEP, 1)
    nearest = foremost(tau, STEEP[0] // 3)
    found = change("tsv_m", [tau] * 3)
    assert distance(found, nearest) <= 1e-4
    assert energy(found) == pytest.approx(energy(nearest), rel=1e-5)
    assert distance(change("iso_c", [tau] * 3), 3.0 * change("iso_c", [tau])) <= 1e-5


def test_an_expert_without_a_change_changes_nothing() -> None:
    """In a wide stack, where its part of the singular vectors is nothing but rounding."""
    first, second = random_changes((200, 900), 2)
    settings: dict[str, Any] = {
        "direction": "vertical",
        "singular_matrices_drop_rate": 0.5,
        "enable_sign_resolution": False,
    }
    with_it = change("drm", [first, torch.zeros(200, 900), second], **settings)
    assert distance(with_it, change("drm", [first, second], **settings)) <= 2e-3
