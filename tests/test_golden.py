"""The outputs of the official implementations, reproduced."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import weldment
from kernel_driver import golden
from paths import GOLDEN, needs_golden
from spectral_reference import Array, drm_matrix

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


DRM_CASES = sorted(path.name for path in (GOLDEN / "drm").iterdir()) if GOLDEN.is_dir() else []
SPECTRAL_CASES = sorted(path.name for path in (GOLDEN / "spectral").iterdir()) if GOLDEN.is_dir() else []

UNDECIDED = {"horizontal": ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight")}
"""DRM case -> tensors of which two entries are so close to the threshold that float32 puts them in another order."""


def drm_recipe(case: str) -> dict[str, Any]:
    """The parameters of a DRM file."""
    recipe = yaml.safe_load((GOLDEN / "drm" / case / "recipe.yml").read_text())
    config = {"svd_dtype" if key == "dtype" else key: value for key, value in recipe["merging_config"].items()}
    return {"coefficient": [model["parameters"]["coefficient"] for model in recipe["models"]], **config}


@cache
def drm(case: str) -> dict[str, torch.Tensor]:
    *experts, base = golden("e0", "e1", "e2", "base")
    return weldment.merge_tensors("drm", experts, base, **drm_recipe(case))


def off(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], limit: float) -> dict[str, float]:
    """The tensors whose changes are not those of the reference."""
    (base,) = golden("base")
    assert ours.keys() == theirs.keys()
    found = {name: relative(ours[name] - base[name], theirs[name] - base[name]) for name in theirs}
    return {name: distance for name, distance in found.items() if not distance <= limit}


@pytest.mark.parametrize("case", DRM_CASES)
def test_official_drm(case: str) -> None:
    (theirs,) = golden(f"drm/{case}")
    assert set(off(drm(case), theirs, 1e-4)) == set(UNDECIDED.get(case, ()))


def keep_the_next(magnitudes: Array, threshold: float) -> Any:
    """The largest entry that is dropped takes the place of the one at the threshold."""
    following = magnitudes[magnitudes < threshold].max()
    assert following > (1.0 - 2e-5) * threshold
    return (magnitudes > threshold) | (magnitudes == following)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, names in UNDECIDED.items() for name in names])
def test_where_drm_differs_float64_is_with_us(case: str, name: str) -> None:
    """Two entries within 2e-5 of each other, at the threshold: in the other order the formula gives the reference."""
    *experts, base, theirs = (
        tensors[name].double().numpy() for tensors in golden("e0", "e1", "e2", "base", f"drm/{case}")
    )
    taus = [expert - base for expert in experts]
    recipe = drm_recipe(case)
    settings = {"horizontal": True, "drop": recipe["singular_matrices_drop_rate"], "coefficient": recipe["coefficient"]}
    ours = drm(case)[name].double().numpy() - base
    size = np.linalg.norm(theirs - base)
    assert np.linalg.norm(ours - drm_matrix(taus, **settings)) <= 1e-5 * size
    assert np.linalg.norm(ours - (theirs - base)) > 1e-3 * size
    assert np.linalg.norm(drm_matrix(taus, decide=keep_the_next, **settings) - (theirs - base)) <= 1e-4 * size


@pytest.mark.parametrize("name", SPECTRAL_CASES)
def test_official_spectral(name: str) -> None:
    """Every matrix decomposed, embeddings as well; (a)swudi leaves the head to the mean."""
    *experts, base, theirs = golden("e0", "e1", "e2", "base", f"spectral/{name}")
    chosen: dict[str, Any] = {"linear_parameter_regex_pattern": [".*"]}
    if "wudi" in name:
        chosen["linear_parameter_ignore_regex_pattern"] = [r"lm_head\."]
    assert not off(weldment.merge_tensors(name, experts, base, **chosen), theirs, 1e-3)


def test_every_method_with_a_reference_has_a_case() -> None:
    covered = {
        yaml.safe_load((GOLDEN / "mergekit" / case / "recipe.yml").read_text())["merge_method"] for case in CASES
    }
    missing = covered - set(weldment.METHODS)
    assert not missing
