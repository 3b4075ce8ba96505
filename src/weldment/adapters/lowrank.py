"""Low-rank algebra: products of thin factors, and the best approximations of a given rank.

Everything is calculated in float64, from the small side: a product B A of thin factors is
decomposed through QR of both and an SVD of the small matrix between; a dense matrix through the
Gram matrix of its short side. A d x d matrix is never decomposed where it has thin factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ENERGY = 0.99
"""The share of the squared Frobenius norm that `rank: auto` keeps."""

_NOISE = 1e-7
"""Singular values below this share of the largest are rounding errors of float32 data."""


@dataclass(frozen=True)
class Factors:
    """A matrix as U S V^T.

    Attributes:
        u: (m, k), float64, orthonormal columns.
        s: (k,), float64, from the largest down; none is rounding error.
        v: (k, n), float64, orthonormal rows.
        energy: the squared Frobenius norm of the whole matrix.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    energy: float

    def cut(self, rank: int) -> Factors:
        """The best approximation of at most this rank."""
        return Factors(self.u[:, :rank], self.s[:rank], self.v[:rank], self.energy)

    @property
    def rank(self) -> int:
        return self.s.numel()

    @property
    def lost(self) -> float:
        """Relative error of the approximation in the Frobenius norm, 0 to 1."""
        if self.energy <= 0.0:
            return 0.0
        return max(0.0, 1.0 - float(self.s.square().sum()) / self.energy) ** 0.5

    def balanced(self) -> tuple[Tensor, Tensor]:
        """(B, A), float64: U sqrt(S) and sqrt(S) V^T, so that both have the same scale."""
        root = self.s.sqrt()
        return self.u * root, root[:, None] * self.v

    def rank_for(self, energy: float = ENERGY) -> int:
        """The least rank, at least 1, that keeps a share of the squared Frobenius norm."""
        if self.energy <= 0.0 or self.rank == 0:
            return 1
        kept = self.s.square().cumsum(0) / self.energy
        return min(self.rank, int((kept < energy * (1.0 - 1e-12)).sum()) + 1)


def factorised(b: Tensor, a: Tensor) -> Factors:
    """B A, decomposed without ever being multiplied out.

    Args:
        b: (m, k).
        a: (k, n); k is small against m and n.
    """
    left, lower = torch.linalg.qr(b.double())
    right, upper = torch.linalg.qr(a.double().T)
    core = lower @ upper.T
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    return _trimmed(left @ u, s, v @ right.T, float(core.square().sum()))


def decomposed(dense: Tensor) -> Factors:
    """A dense matrix (m, n), decomposed through the Gram matrix of its short side.

    Singular values below 1e-7 of the largest are dropped: they are smaller than the rounding of
    float32 data.
    """
    wide = dense.double()
    if wide.shape[0] > wide.shape[1]:
        turned = decomposed(wide.T)
        return Factors(turned.v.T, turned.s, turned.u.T, turned.energy)
    u = torch.linalg.eigh(wide @ wide.T).eigenvectors
    u = u.flip(1)
    rows = u.T @ wide
    s = rows.norm(dim=1)  # more exact than the roots of the eigenvalues
    order = s.argsort(descending=True, stable=True)
    s, u, rows = s[order], u[:, order], rows[order]
    v = rows / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
    return _trimmed(u, s, v, float(wide.square().sum()))


def _trimmed(u: Tensor, s: Tensor, v: Tensor, energy: float) -> Factors:
    """Without the singular values that are rounding errors."""
    count = int((s > _NOISE * s[0]).sum()) if s.numel() and s[0] > 0.0 else 0
    return Factors(u[:, :count], s[:count], v[:count], energy)


def stacked(bs: list[Tensor], as_: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of the sum of the products B_i A_i: the B side by side, the A one above the other."""
    return torch.cat(bs, dim=1), torch.cat(as_, dim=0)
