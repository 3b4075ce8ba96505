"""Numbers of tensors, compared with plain float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models import perturbed, save_state
from weldment.checkpoint.opening import open_checkpoint
from weldment.doctor import measuring
from weldment.doctor.cases import joints_of
from weldment.doctor.measuring import Numbers, measure
from weldment.doctor.sampling import sample
from weldment.engine.progress import Silent

Measure = Callable[..., list[Numbers]]


def state(seed: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.mlp.up_proj.weight": (400, 700), "layers.0.norm.weight": (700,), "scale": ()}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def run(*folders: Path, threads: int = 1, budget: int | None = None) -> list[Numbers]:
    tensors = [open_checkpoint(str(folder)).tensors for folder in folders]
    joints = joints_of(tensors, [None] * len(tensors))
    sizes = [joint.numel for joint in joints]
    runs = [[(0, size)] for size in sizes] if budget is None else sample(sizes, budget=budget)
    return measure(joints, runs, threads, Silent())


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("three")
    base = state(0)
    states = [base, perturbed(base, 1, scale=1e-3), perturbed(base, 2, scale=3e-2)]
    return [save_state(folder / str(n), own) for n, own in enumerate(states)]


def values(folders: list[Path], name: str) -> np.ndarray:
    from models import read_state

    return np.stack([read_state(folder)[name].double().flatten().numpy() for folder in folders])


def test_norms_distances_and_signs_are_those_of_plain_arithmetic(three: list[Path]) -> None:
    for found in run(*three):
        plain = values(three, found.joint.name)
        for base in range(3):
            changes = plain - plain[base]
            np.testing.assert_allclose(found.changes(base), changes @ changes.T, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(found.weights(), plain @ plain.T, rtol=1e-5)
        np.testing.assert_allclose(found.peaks, np.abs(plain).max(axis=1), rtol=1e-6)
        signs = np.sign(plain[1:] - plain[0])
        np.testing.assert_allclose(found.signs, signs @ signs.T)
        np.testing.assert_allclose(found.both, np.abs(signs) @ np.abs(signs).T)


def test_a_small_change_keeps_its_digits_beside_large_weights(tmp_path: Path) -> None:
    base = {"layers.0.w": torch.full((300, 300), 1.0)}
    other = {"layers.0.w": base["layers.0.w"] + 2.0**-20}
    (found,) = run(save_state(tmp_path / "a", base), save_state(tmp_path / "b", other))
    assert found.changes(0)[1, 1] == pytest.approx(90000 * 2.0**-40, rel=1e-6)
    assert found.changes(1)[0, 0] == pytest.approx(90000 * 2.0**-40, rel=1e-6)


def test_a_sample_is_near_the_whole(three: list[Path]) -> None:
    whole, part = run(*three)[0], run(*three, budget=1 << 16)[0]
    assert part.read < 0.5 * whole.read
    np.testing.assert_allclose(part.changes(0).diagonal()[1:], whole.changes(0).diagonal()[1:], rtol=0.05)
    np.testing.assert_allclose(part.both.diagonal(), whole.both.diagonal(), rtol=0.02)


def test_threads_and_processes_change_nothing(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    once = run(*three)
    threads = run(*three, threads=3)
    monkeypatch.setattr(measuring, "_MANY", 0)
    processes = run(*three, threads=2)
    for first, second, third in zip(once, threads, processes, strict=True):
        assert first.joint.name == second.joint.name == third.joint.name
        assert np.array_equal(first.gram, second.gram)
        assert np.array_equal(first.gram, third.gram)


def test_torch_gets_its_threads_back(three: list[Path]) -> None:
    before = torch.get_num_threads()
    run(*three)
    assert torch.get_num_threads() == before


def test_what_is_not_finite_is_counted_and_left_out_of_the_sums(tmp_path: Path) -> None:
    base, broken = state(0), state(1)
    broken["scale"] = torch.tensor(torch.nan)
    broken["layers.0.norm.weight"][:3] = torch.inf
    found = {n.joint.name: n for n in run(save_state(tmp_path / "a", base), save_state(tmp_path / "b", broken))}
    assert found["scale"].nonfinite.tolist() == [0, 1]
    assert found["layers.0.norm.weight"].nonfinite.tolist() == [0, 3]
    assert found["layers.0.mlp.up_proj.weight"].nonfinite.tolist() == [0, 0]
    assert all(np.isfinite(numbers.gram).all() for numbers in found.values())


def test_dtypes_may_differ_and_other_numbers_are_left_out(tmp_path: Path) -> None:
    base = {**state(0), "position_ids": torch.arange(4)}
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    found = run(save_state(tmp_path / "a", base), save_state(tmp_path / "b", half))
    assert {numbers.joint.name for numbers in found} == set(state(0))
    change = found[0].changes(0)[1, 1] ** 0.5 / found[0].weights()[0, 0] ** 0.5
    assert 5e-4 < change < 4e-3, "what bfloat16 rounds"
