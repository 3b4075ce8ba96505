"""The outputs of the official implementations, reproduced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import weldment
from paths import GOLDEN, needs_golden

pytestmark = needs_golden

CASES = sorted(path.name for path in (GOLDEN / "mergekit").iterdir()) if GOLDEN.is_dir() else []

DIVERGENCES = {
    "breadcrumbs": ("norm", "mergekit keeps nothing of a tensor where int(gamma * n) is 0"),
    "breadcrumbs_ties": ("norm", "mergekit keeps nothing of a tensor where int(gamma * n) is 0"),
}
"""Case -> (tensors whose names contain this differ, why). The reference is wrong there; we do not follow it."""

NEGATIVE_STEPS = {
    "model_stock_rows": "mergekit steps backwards where a row's deltas disagree; ours clamps the share to [0, 1]",
}
"""Case -> why rows that differ must equal the base in ours."""


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def merged(case: str, tmp_path: Path) -> dict[str, torch.Tensor]:
    text = (GOLDEN / "mergekit" / case / "recipe.yml").read_text().replace("MODELS", str(GOLDEN))
    weldment.merge(yaml.safe_load(text), tmp_path / "out")
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_mergekit(case: str, tmp_path: Path) -> None:
    ours = merged(case, tmp_path)
    theirs = load_file(GOLDEN / "mergekit" / case / "model.safetensors")
    assert ours.keys() == theirs.keys()
    part, _ = DIVERGENCES.get(case, ("", ""))
    base = load_file(GOLDEN / "base" / "model.safetensors")
    wrong: dict[str, float] = {}
    for name, tensor in theirs.items():
        found = ours[name]
        if case in NEGATIVE_STEPS:
            found = torch.where(stays(found, base[name]), tensor, found)
        if not (part and part in name) and (distance := relative(found, tensor)) > 1e-5:
            wrong[name] = distance
    assert not wrong


def stays(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """True for every element of the rows that equal the base's."""
    same = (merged == base).all(dim=-1, keepdim=True)
    return same.expand_as(merged)


@pytest.mark.parametrize("case", sorted(DIVERGENCES))
def test_divergences_are_where_we_say(case: str, tmp_path: Path) -> None:
    """The listed tensors do differ, and ours keep what the reference loses."""
    if case not in CASES:
        pytest.skip("no such reference")
    ours = merged(case, tmp_path)
    base = load_file(GOLDEN / "base" / "model.safetensors")
    theirs = load_file(GOLDEN / "mergekit" / case / "model.safetensors")
    part, _ = DIVERGENCES[case]
    for name in (name for name in theirs if part in name):
        torch.testing.assert_close(theirs[name], base[name])
        assert not torch.equal(ours[name], base[name])


def test_official_ties(tmp_path: Path) -> None:
    """Global trim at 20 %, mass election, zero signs to the model-wide majority."""
    models = [{"model": str(GOLDEN / f"e{n}"), "parameters": {"density": 0.2, "weight": 1.0}} for n in range(3)]
    recipe = {
        "models": models,
        "merge_method": "ties",
        "base_model": str(GOLDEN / "base"),
        "parameters": {"trim": "global", "sign_ties": "majority"},
        "dtype": "float32",
    }
    weldment.merge(recipe, tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(GOLDEN / "official" / "ties_global_20" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(relative(ours[name], theirs[name]) for name in theirs) < 1e-6


def test_every_method_with_a_reference_has_a_case() -> None:
    covered = {
        yaml.safe_load((GOLDEN / "mergekit" / case / "recipe.yml").read_text())["merge_method"] for case in CASES
    }
    missing = covered - set(weldment.METHODS)
    assert not missing
