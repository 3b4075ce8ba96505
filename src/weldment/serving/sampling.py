"""The next token of each row, by the row's own settings and its own random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import randbits

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: only the most probable tokens are drawn from, as few as have together at least this probability.
        chance: uniform numbers in [0, 1), one for each token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    chance: random.Random = field(default_factory=random.Random)


def chances(seed: int | None, count: int) -> list[random.Random]:
    """Random numbers for `count` rows of one request; the same for the same seed, and different for each row."""
    start = randbits(64) if seed is None else seed
    return [random.Random(f"{start}/{row}") for row in range(count)]


def draw(logits: Tensor, rows: Sequence[Sampling]) -> list[int]:
    """The next token of each row.

    A token depends on its row's logits, settings and random numbers alone, not on the other rows: it is the first one
    at which the cumulative probability exceeds u, over tokens in the vocabulary's order, or by descending probability
    where top_p leaves some out.

    Args:
        logits: (B, V).
        rows: B settings.
    """
    # Metal has no float64, in which probabilities are summed.
    logits = logits.cpu() if logits.device.type == "mps" else logits
    tokens = logits.argmax(-1)
    for cut in (False, True):
        places = [n for n, row in enumerate(rows) if row.temperature > 0 and (row.top_p < 1) == cut]
        if places:
            tokens[places] = _drawn(logits[places], [rows[place] for place in places], cut)
    return tokens.tolist()


def _drawn(logits: Tensor, rows: Sequence[Sampling], cut: bool) -> Tensor:
    # In float32 a tiny temperature is 0.
    temperatures = torch.tensor([row.temperature for row in rows], dtype=torch.float64, device=logits.device)
    uniform = torch.tensor([row.chance.random() for row in rows], dtype=torch.float64, device=logits.device)
    # Logits are shifted first: divided by a tiny temperature, they would overflow.
    logits = logits.double()
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]).softmax(-1)
    if not cut:
        return _first_above(probabilities, uniform)
    sorted_, order = probabilities.sort(dim=-1, descending=True, stable=True)
    limits = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=logits.device)
    before = sorted_.cumsum(-1) - sorted_
    kept = sorted_.where(before < limits[:, None], 0)
    return order.gather(-1, _first_above(kept, uniform)[:, None])[:, 0]


def _first_above(weights: Tensor, uniform: Tensor) -> Tensor:
    """In each row the first place where the cumulative weight exceeds the uniform number times the total: (B)."""
    sums = weights.cumsum(-1)
    below = sums <= uniform[:, None] * sums[:, -1:]
    # Rounding may leave nothing above; the last place that has any weight is right then.
    last = (weights > 0).long().mul(torch.arange(1, weights.shape[-1] + 1, device=weights.device)).amax(-1) - 1
    return below.sum(-1).minimum(last)
