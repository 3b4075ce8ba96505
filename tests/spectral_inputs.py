"""Changes for spectral methods to merge, and what the formulas make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_reference import SPECTRAL_REFERENCE
from weldment import METHODS, merge_tensors
from weldment.methods.arguments import settle

SPECTRAL = [name for name, method in METHODS.items() if method.family == "spectral"]


def random_changes(
    shape: tuple[int, ...], count: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=dtype) for _ in range(count)]


def low_rank_changes(shape: tuple[int, int], rank: int, count: int = 3, seed: int = 0) -> list[Tensor]:
    """Products of small whole numbers: float32 holds them and their sums exactly."""
    draw = torch.Generator().manual_seed(seed)

    def whole(*size: int) -> Tensor:
        return torch.randint(-9, 10, size, generator=draw).float()

    return [whole(shape[0], rank) @ whole(rank, shape[1]) / 64.0 for _ in range(count)]


def steep_changes(shape: tuple[int, int], count: int = 3, seed: int = 0) -> list[Tensor]:
    """Singular values from 1 down to 1e-5."""
    draw = torch.Generator().manual_seed(seed)
    rank = min(shape)
    values = 10.0 ** (-5.0 * torch.arange(rank, dtype=torch.float64) / rank)

    def frame(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, rank, generator=draw, dtype=torch.float64)).Q

    return [((frame(shape[0]) * values) @ frame(shape[1]).T).float() for _ in range(count)]


def orthogonal(size: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q


def change(name: str, taus: Sequence[Tensor], **parameters: Any) -> Tensor:
    """The merged change, in the dtype of the changes."""
    accumulate = "float64" if taus[0].dtype == torch.float64 else "float32"
    return merge_tensors(name, taus, torch.zeros_like(taus[0]), accumulate=accumulate, **parameters)


def formula(name: str, taus: Sequence[Tensor], **parameters: Any) -> Tensor:
    """The same by the float64 reference."""
    method = METHODS[name]
    arguments = settle(method, parameters, len(taus))
    arguments = method.arranged(arguments, "tensor", tuple(taus[0].shape), is_embedding=False)
    wide = [tau.double().numpy() for tau in taus]
    return torch.from_numpy(np.asarray(SPECTRAL_REFERENCE[name](wide, np.zeros_like(wide[0]), **arguments)))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in Frobenius norms."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300))


def energy(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())


def rank_of(matrix: Tensor, share: float = 1e-4) -> int:
    """Singular values above a share of the largest."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > share * values.max()).sum())


def foremost(matrix: Tensor, count: int) -> Tensor:
    """The nearest matrix of a rank."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :count] * s[:count]) @ v[:count]
