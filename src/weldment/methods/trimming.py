"""What of a task vector is kept: the largest magnitudes, a band of them, or a random choice by rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from weldment.methods.masks import LEVELS, levels_of

if TYPE_CHECKING:
    from torch import Tensor


def kept_count(density: float, numel: int) -> int:
    """floor(density * n), but at least one element."""
    return max(1, int(density * numel))


def keep_above(tau: Tensor, threshold: float | None) -> Tensor:
    """Zero the elements with |tau| < threshold, in place (all elements at the threshold stay)."""
    if threshold is None or threshold <= 0.0:
        return tau
    below = math.nextafter(float(threshold), 0.0) if tau.dtype == torch.float64 else _below32(threshold)
    return torch.hardshrink(tau, below, out=tau)


def _below32(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(0.0)))


def drop_above(tau: Tensor, threshold: float | None, work: Tensor) -> Tensor:
    """Zero the elements with |tau| >= threshold, in place."""
    if threshold is None:
        return tau
    if threshold <= 0.0:
        return tau.zero_()
    work.copy_(tau)
    return tau.sub_(keep_above(work, threshold))


def row_order(tau: Tensor, keys: Tensor) -> Tensor:
    """The columns of each row by ascending |tau|; equal magnitudes by position.

    Args:
        tau: (rows, n) of float32 or float64.
        keys: (rows, n) of float64 to work in.

    Returns:
        (rows, n), int64; may lie in `keys`.
    """
    if tau.dtype != torch.float32 or tau.device.type != "cpu" or not np.little_endian:
        return tau.abs().argsort(dim=1, stable=True)
    # One 64-bit key an element: |tau| above, its column below. Keys are distinct and carry their
    # column along, which beats an argsort threefold; read as float64 they order the same and
    # processors without 64-bit integer minima sort them faster. Infinity and NaN keep their order.
    halves = keys.view(torch.int32).numpy().reshape(*tau.shape, 2)
    np.bitwise_and(tau.numpy().view(np.int32), 0x7FFFFFFF, out=halves[..., 1])
    halves[..., 0] = np.arange(tau.shape[1], dtype=np.int32)
    keys.numpy().sort(axis=1)
    return keys.view(torch.int64).bitwise_and_(0xFFFFFFFF)


def della_levels(tau: Tensor, density: float, epsilon: float, out: Tensor, keys: Tensor) -> Tensor:
    """Keep probabilities in 1/65536: 65536 * (density - epsilon + 2 epsilon r / (n - 1)), rounded, in `out`.

    r is the rank of |tau| in its row. A row of one element keeps with `density`. `keys` as in `row_order`.
    """
    columns = tau.shape[1]
    if columns < 2 or epsilon == 0.0:
        return out.fill_(levels_of(density))
    return out.scatter_(1, row_order(tau, keys), _by_rank(columns, density, epsilon).to(out).expand_as(tau))


@lru_cache(maxsize=256)
def _by_rank(columns: int, density: float, epsilon: float) -> Tensor:
    rising = torch.arange(columns, dtype=torch.float64).mul_(2.0 * epsilon / (columns - 1)).add_(density - epsilon)
    return rising.mul_(LEVELS).round_().clamp_(1.0, LEVELS).float()


_SAMPLE = 1 << 16
"""About so many numbers tell where to look for one of a given rank."""


def kth_smallest(numbers: Callable[[int, int], Tensor], shape: tuple[int, ...], rank: int) -> float:
    """The number of a rank, 0 for the smallest, among those of several tensors.

    A sample gives an interval that the number lies in almost surely; one more look at all numbers counts those
    below it and collects those in it. Neither copies them all.

    Args:
        numbers: of a tensor's place and a step gives every so-manieth of its rows; the next call may overwrite it.
        shape: (tensors, rows, columns).
    """
    pieces, rows, columns = shape
    step = max(1, min(rows, pieces * rows * columns // _SAMPLE))
    sample = torch.cat([numbers(piece, step).reshape(-1).clone() for piece in range(pieces)]).sort().values
    place, margin = rank / (pieces * rows * columns) * len(sample), 8.0 * len(sample) ** 0.5 + 1.0
    low, high = int(place - margin), int(place + margin)
    least = float(sample[low]) if low > 0 else -math.inf
    most = float(sample[high]) if high < len(sample) else math.inf
    found = [_between(numbers(piece, 1), least, most) for piece in range(pieces)]
    below, inside = sum(count for count, _ in found), torch.cat([values for _, values in found])
    if not 0 <= rank - below < len(inside):
        below, inside = 0, torch.cat([numbers(piece, 1).reshape(-1).clone() for piece in range(pieces)])
    return float(inside.kthvalue(rank - below + 1).values)


def _between(numbers: Tensor, least: float, most: float) -> tuple[int, Tensor]:
    """How many numbers are below an interval, and those in it; numpy does both several times as fast as torch."""
    if numbers.device.type != "cpu":
        return int((numbers < least).sum()), numbers[(numbers >= least) & (numbers <= most)]
    values = numbers.numpy()
    return int(np.count_nonzero(values < least)), torch.from_numpy(values[(values >= least) & (values <= most)])
