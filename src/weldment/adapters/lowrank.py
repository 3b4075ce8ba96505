"""Low-rank algebra: products of thin factors, and the best approximations of a given rank.

Everything is calculated in float64, from the small side: a product B A of thin factors is
decomposed through triangular factors of both and an SVD of the small matrix between; a dense matrix through the
Gram matrix of its short side. A d x d matrix is never decomposed where it has thin factors.

Seconds on one core, 2048 x 2048 and 2048 x 8192: Gram matrix 0.5 and 1.9 (float32: 0.3 and 1.0), its
eigenvectors 3.5 (float32: 1.5), torch's SVD of the first 6.3 (float32: 4.1). Float32 loses what is
below 3e-4 of the largest singular value, and saves too little to be worth that.
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

_MISSED = 1e-6
"""What a sketch may miss of a matrix, as a share of its Frobenius norm."""

_CONDITION = 3e3
"""Up to here the square of a condition number leaves singular vectors orthonormal to 1e-9."""

_WORTH_A_SKETCH = 512
"""Short sides from which on an eigendecomposition takes much longer than a sketch."""


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


def factorised(b: Tensor, a: Tensor, *, rank: int | None = None) -> Factors:
    """B A, decomposed without ever being multiplied out.

    Args:
        b: (m, k).
        a: (k, n); k is small against m and n.
        rank: the largest number of singular values that is wanted; all by default.
    """
    left, right = _Range.of(b.double()), _Range.of(a.double().T)
    core = left.upper @ right.upper.T
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    found = _trimmed(u, s, v, float(core.square().sum()))
    found = found if rank is None else found.cut(rank)
    return Factors(left.basis(found.u), found.s, right.basis(found.v.T).T, found.energy)


@dataclass(frozen=True)
class _Range:
    """X = Q R, with Q as the product of a tall matrix and a small one.

    Attributes:
        tall: (m, k).
        small: (k, k), None for the identity.
        upper: R.
    """

    tall: Tensor
    small: Tensor | None
    upper: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Range:
        """From the Cholesky factor of X^T X where the columns of X are far from dependent; otherwise by reflections.

        The first way takes a fourth of the time. Its Q is orthonormal up to eps cond(X)^2, below 1e-9 here.
        """
        gram = x.T @ x
        lengths = gram.diagonal().sqrt()
        upper, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None], upper=True)
        if not failed.item():
            inverse = torch.linalg.solve_triangular(upper, torch.eye(upper.shape[0]).to(upper), upper=True)
            norms = torch.linalg.vector_norm(upper) * torch.linalg.vector_norm(inverse)
            if norms < _CONDITION:
                return cls(x, inverse / lengths[:, None], upper * lengths)
        q, r = torch.linalg.qr(x)
        return cls(q, None, r)

    def basis(self, columns: Tensor) -> Tensor:
        """Q times some columns."""
        return self.tall @ (columns if self.small is None else self.small @ columns)


def decomposed(dense: Tensor, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """A dense matrix (m, n), decomposed through the Gram matrix of its short side.

    A matrix whose rank is below an eighth of its short side, up to 1e-6 of its norm, is decomposed
    through its products with as many random vectors instead, the same for every run.

    Singular values below 1e-7 of the largest are dropped: they are smaller than the rounding of
    float32 data. All values must be finite, and their squares must be float64 numbers.

    Args:
        dense: of any dtype.
        rank: the largest number of singular values that is wanted; all by default.
        energy: the share of the squared Frobenius norm that is wanted; all by default.
    """
    wide = dense.double()
    if wide.shape[0] > wide.shape[1]:
        turned = decomposed(wide.T, rank=rank, energy=energy)
        return Factors(turned.v.T, turned.s, turned.u.T, turned.energy)
    whole = float(torch.linalg.vector_norm(wide)) ** 2
    if whole == 0.0:
        return Factors(wide[:, :0], wide.new_empty(0), wide[:0], 0.0)
    found = _sketched(wide, whole) or _from_gram(wide, whole, rank, energy)
    wanted = found.rank if energy is None else found.rank_for(energy)
    return found.cut(wanted if rank is None else min(wanted, rank))


def _sketched(wide: Tensor, whole: float) -> Factors | None:
    """A matrix of low rank from its range; None if it has none or is so small that it does not matter."""
    side = wide.shape[0]
    if side < _WORTH_A_SKETCH:
        return None
    chance = torch.Generator().manual_seed(0)
    directions = torch.randn(wide.shape[1], side // 8, generator=chance, dtype=wide.dtype).to(wide.device)
    basis = torch.linalg.qr(wide @ directions).Q
    rows = basis.T @ wide
    missed = whole - float(torch.linalg.vector_norm(rows)) ** 2
    if missed > _MISSED**2 * whole:
        return None
    found = factorised(basis, rows)
    return Factors(found.u, found.s, found.v, whole)


def _from_gram(wide: Tensor, whole: float, rank: int | None, energy: float | None) -> Factors:
    """Through the eigenvectors of the Gram matrix; at least as many triples as are wanted."""
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    wanted = wide.shape[0] if rank is None else min(rank, wide.shape[0])
    if energy is not None:
        shares = values.flip(0).cumsum(0) / whole
        # One more, because the eigenvalues are not as exact as the norms below.
        wanted = min(wanted, int((shares < energy).sum()) + 2)
    u = vectors.flip(1)[:, :wanted]
    rows = u.T @ wide
    s = torch.linalg.vector_norm(rows, dim=1)  # more exact than the roots of the eigenvalues
    order = s.argsort(descending=True, stable=True)
    s, u, rows = s[order], u[:, order], rows[order]
    return _trimmed(u, s, rows.div_(s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]), whole)


def _trimmed(u: Tensor, s: Tensor, v: Tensor, energy: float) -> Factors:
    """Without the singular values that are rounding errors."""
    count = int((s > _NOISE * s[0]).sum()) if s.numel() and s[0] > 0.0 else 0
    return Factors(u[:, :count], s[:count], v[:count], energy)


def stacked(bs: list[Tensor], as_: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of the sum of the products B_i A_i: the B side by side, the A one above the other."""
    return torch.cat(bs, dim=1), torch.cat(as_, dim=0)
