"""What of a task vector is kept: the largest magnitudes, a band of them, or a random choice by rank."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from weldment.methods.masks import LEVELS, quantised


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


def row_order(tau: Tensor) -> Tensor:
    """The columns of each row by ascending |tau|; equal magnitudes by position.

    Args:
        tau: (rows, n) of float32 or float64.

    Returns:
        (rows, n), int64.
    """
    if tau.dtype != torch.float32 or tau.device.type != "cpu":
        return tau.abs().argsort(dim=1, stable=True)
    # One 64-bit key an element: |tau| above, its column below. Keys are distinct and carry their
    # column along, which beats an argsort threefold; read as float64 they order the same and
    # processors without 64-bit integer minima sort them faster. Infinity and NaN keep their order.
    keys = np.empty(tau.shape, dtype=np.float64)
    halves = keys.view(np.int32).reshape(*tau.shape, 2)
    low, high = (0, 1) if np.little_endian else (1, 0)
    np.bitwise_and(tau.numpy().view(np.int32), 0x7FFFFFFF, out=halves[..., high])
    halves[..., low] = np.arange(tau.shape[1], dtype=np.int32)
    keys.sort(axis=1)
    return torch.from_numpy(halves[..., low]).long()


def della_keep(tau: Tensor, density: float, epsilon: float, out: Tensor) -> Tensor:
    """Keep probabilities, multiples of 1/65536: density - epsilon + 2 epsilon r / (n - 1), in `out`.

    r is the rank of |tau| in its row. A row of one element keeps with `density`.
    """
    columns = tau.shape[1]
    if columns < 2 or epsilon == 0.0:
        return out.fill_(quantised(density))
    by_rank = torch.arange(columns, dtype=torch.float64).mul_(2.0 * epsilon / (columns - 1)).add_(density - epsilon)
    by_rank = by_rank.mul_(LEVELS).round_().clamp_(1.0, LEVELS).div_(LEVELS).to(out)
    return out.scatter_(1, row_order(tau), by_rank.expand_as(tau))
