"""Random masks: rate, independence, the same for every cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weldment import merge_tensors
from weldment.methods.block import CHUNK
from weldment.methods.masks import keep_mask, levels_of, quantised, random_levels, tensor_key

N = 1 << 22


def mask(seed: int, model: str, tensor: str, probability: float, start: int = 0, count: int = N) -> Tensor:
    return keep_mask(tensor_key(seed, model, tensor), start, levels_of(probability), torch.empty(count))


def deviations(rate: float, probability: float, count: int) -> float:
    return abs(rate - probability) / math.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.53, 0.9, 0.999])
def test_keep_rate(probability: float) -> None:
    """Of all elements, of every second, of the low and high half of chunks, and from chunk to chunk."""
    kept = mask(0, "model", "tensor", probability)
    p = quantised(probability)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    for part in (kept, kept[::2], kept[1::2], kept.view(-1, CHUNK)[:, : CHUNK // 2].reshape(-1), kept[::CHUNK]):
        assert deviations(float(part.mean()), p, part.numel()) < 4.5
    spread = kept.view(-1, CHUNK).mean(1).std() / math.sqrt(p * (1 - p) / CHUNK)
    assert 0.6 < spread < 1.5


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, "a", "x"), (1, "a", "x")),
        ((0, "a", "x"), (0, "b", "x")),
        ((0, "a", "x"), (0, "a", "y")),
    ],
    ids=["seeds", "models", "tensors"],
)
def test_independence(first: tuple[int, str, str], second: tuple[int, str, str]) -> None:
    one, other = (mask(*key, 0.5) for key in (first, second))
    assert deviations(float((one * other).mean()), 0.25, N) < 4.5


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, 4096, CHUNK // 2, CHUNK, 3 * CHUNK])
def test_neighbours_are_independent(lag: int) -> None:
    kept = mask(0, "model", "tensor", 0.5)
    both = (kept[:-lag] * kept[lag:]).mean()
    assert deviations(float(both), 0.25, N - lag) < 4.5


def test_levels_are_uniform() -> None:
    """Chi-squared over 1024 cells, and each of the 16 bits is fair."""
    levels = random_levels(tensor_key(3, "m", "t"), 0, torch.empty(N)).to(torch.int32) + 32768
    counts = torch.bincount(levels >> 6, minlength=1024).double()
    expected = N / 1024
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi - 1023) < 4.5 * math.sqrt(2 * 1023)
    for bit in range(16):
        assert deviations(float(((levels >> bit) & 1).double().mean()), 0.5, N) < 4.5


@pytest.mark.parametrize(("start", "count"), [(0, 10), (1, 10), (CHUNK - 3, 7), (5 * CHUNK + 1, 2 * CHUNK + 9)])
def test_any_cut_gives_the_same_mask(start: int, count: int) -> None:
    whole = mask(0, "m", "t", 0.3, 0, 8 * CHUNK)
    assert torch.equal(mask(0, "m", "t", 0.3, start, count), whole[start : start + count])


def test_tensor_of_probabilities() -> None:
    """Each element has its own probability."""
    keep = torch.arange(N).remainder(8).add(1).mul(8192).float()
    kept = keep_mask(tensor_key(0, "m", "t"), 0, keep, torch.empty(N))
    for step in range(8):
        p, part = (step + 1) / 8, kept[step::8]
        assert float(part.mean()) == 1.0 if p == 1.0 else deviations(float(part.mean()), p, part.numel()) < 4.5


def test_golden_values() -> None:
    """The hash is part of the format: seeds written into model cards must mean the same for ever."""
    levels = random_levels(tensor_key(7, "org/model", "model.embed_tokens.weight"), CHUNK - 2, torch.empty(6))
    assert levels.tolist() == GOLDEN


GOLDEN = [10643.0, 4846.0, 24862.0, -1422.0, 17758.0, 27725.0]


UNBIASED = {
    "dare_linear": {"density": 0.3},
    "della_linear": {"density": 0.4, "epsilon": 0.3},
}


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(name: str) -> None:
    """The mean over many seeds is the task vector, for small and for large elements."""
    base = torch.zeros(64, 64)
    tau = torch.linspace(-1.0, 1.0, 64 * 64).view(64, 64)[
        torch.randperm(64, generator=torch.Generator().manual_seed(0))
    ]
    seeds = 600
    runs = torch.stack(
        [merge_tensors(name, [tau], base, seed=seed, threads=1, **UNBIASED[name]) for seed in range(seeds)]
    )
    ratio = runs.mean(0) / tau
    large, small = tau.abs() > 0.5, (tau.abs() > 0.05) & (tau.abs() < 0.3)
    for part in (large, small):
        smallest = UNBIASED[name]["density"] - UNBIASED[name].get("epsilon", 0.0)
        error = math.sqrt((1 / smallest - 1) / (seeds * int(part.sum())))
        assert abs(float(ratio[part].mean()) - 1.0) < 4.5 * error


@pytest.mark.parametrize("name", UNBIASED)
def test_variance(name: str) -> None:
    """Var = x^2 (1 - p) / p for an element kept with probability p."""
    tau = torch.full((32, 64), 0.5)
    seeds = 600
    runs = torch.stack(
        [merge_tensors(name, [tau], torch.zeros(32, 64), seed=seed, threads=1, density=0.4) for seed in range(seeds)]
    )
    p = quantised(0.4)
    expected = 0.25 * (1 - p) / p
    assert abs(float(runs.var(0).mean()) / expected - 1) < 0.02
