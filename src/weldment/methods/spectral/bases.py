"""Singular vectors of matrices and of stacks of matrices, from the small side.

The right singular vectors of a matrix D are the eigenvectors of its Gram matrix D'D, and for a stack
of matrices D'D = sum_i A_i'A_i. Squaring costs digits: a singular value s is known up to eps s_max^2 / s. So

* a short side of up to 512 is calculated in float64, where that is cheap (and exact to 1e-9 of s_max);
* a longer one in the dtype of the matrices, and the part of the spectrum below a sixteenth of s_max
  once more from the images D V of that part alone, whose largest value is then the scale of its
  errors; and so on downwards (`_LEVELS` times).

Which of both Gram matrices is taken, D'D or D D', depends on the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

RANK = 1e-6
"""Singular values below this share of the largest are rounding errors of float32 matrices."""

SMALL = 512
"""Up to here, Gram matrices are float64."""

_GRADE = 1.0 / 16.0
"""Singular values below this share of the largest are determined again."""

_LEVELS = 4

_GRAM_BLOCK = 512

Rows = Sequence[Sequence["Tensor"]]
"""A matrix in pieces: rows of matrices, each row (m_i, n), its pieces side by side."""


@dataclass(frozen=True)
class Basis:
    """Right singular vectors of a matrix, by descending singular values (equal ones up to rounding in any order).

    Attributes:
        vectors: (n, k), orthonormal columns.
        images: the matrix times the vectors, (m_i, k) for each of its rows of pieces.
        lengths: of the columns of each image, (k,).
        values: (k,), the singular values: the lengths of the whole columns.
    """

    vectors: Tensor
    images: list[Tensor]
    lengths: list[Tensor]
    values: Tensor


@dataclass(frozen=True)
class Joint:
    """D = [A_1; ...; A_T] = U S V', by descending singular values.

    Attributes:
        parts: U_i S, (m, k) each.
        lengths: of the columns of each part, (k,).
        values: S, (k,).
    """

    parts: list[Tensor]
    lengths: list[Tensor]
    values: Tensor
    _matrices: Sequence[Tensor]
    _right: Tensor | None = None
    _left: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """V', (k, n); where U is known, S^-1 U'D."""
        if self._right is not None:
            return self._right.T
        return self._on_matrices((self._known_left() / self.values).T)

    def times_rows(self, x: Tensor) -> Tensor:
        """X V', (m, n), of X, (m, k); where U is known, (X S^-1 U') D, without V."""
        if self._right is not None:
            return x @ self._right.T
        return self._on_matrices((x / self.values) @ self._known_left().T)

    def _known_left(self) -> Tensor:
        assert self._left is not None
        return self._left

    def _on_matrices(self, x: Tensor) -> Tensor:
        """X D."""
        shares = x.split([len(matrix) for matrix in self._matrices], dim=1)
        total = shares[0] @ self._matrices[0]
        for share, matrix in zip(shares[1:], self._matrices[1:], strict=True):
            total.addmm_(share, matrix)
        return total


def joint(matrices: Sequence[Tensor], floor: float = RANK) -> Joint:
    """The singular vectors of matrices stacked one above the other, from the smaller of D'D and D D'.

    Args:
        matrices: A_i, (m, n) each; their elements about one, not all zero. They are used later, too.
        floor: singular values up to this share of the largest are left out.
    """
    count, rows, columns = len(matrices), *matrices[0].shape
    if columns <= count * rows:
        basis = right_basis([[matrix] for matrix in matrices], floor)
        return Joint(basis.images, basis.lengths, basis.values, matrices, _right=basis.vectors)
    left, values = _left_basis(matrices, floor)
    parts = list((left * values).split(rows))
    return Joint(parts, column_lengths(parts), values, matrices, _left=left)


def _left_basis(matrices: Sequence[Tensor], floor: float) -> tuple[Tensor, Tensor]:
    """U (T m, k) and S (k,) of the stack; what its rows would take to calculate is saved."""
    dtype = matrices[0].dtype
    if sum(map(len, matrices)) <= SMALL:
        matrices = [matrix.double() for matrix in matrices]
    vectors, _, squares = _graded([[matrix.T for matrix in matrices]], floor, None, images=False)
    values = squares.clamp_(min=0.0).sqrt_()
    kept = int((values > floor * values[0]).sum())
    return vectors[:, :kept].to(dtype), values[:kept].to(dtype)


def triples(matrix: Tensor, floor: float = RANK, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and V (n, k) of a matrix whose elements are about one, without what is rounding.

    Args:
        count: the largest number of triples that is wanted; all by default.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = triples(matrix.T, floor, count)
        return u, s, v
    found = right_basis([[matrix]], floor, count)
    return found.images[0].div_(found.values), found.values, found.vectors


def with_values(matrix: Tensor, change: Callable[[Tensor], Tensor], least: float = 0.0) -> Tensor:
    """U f(S) V' of a matrix U S V', (m, n), without the singular values that are rounding or at most `least`.

    Args:
        change: f, of the values that are left, of which there may be none.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return with_values(matrix.T, change, least).T
    wide = matrix.double() if matrix.shape[1] <= SMALL else matrix
    vectors, images, squares = _graded([[wide]], RANK, None, images=False)
    values = column_lengths(images)[0] if images else squares.clamp(min=0.0).sqrt()
    kept = int((values > max(RANK * float(values[0]), least)).sum())
    vectors, values = vectors[:, :kept], values[:kept]
    factors = change(values) / values
    if images:
        return ((images[0][:, :kept] * factors) @ vectors.T).to(matrix.dtype)
    # Without small singular values, or in float64, this is as exact and a product of large matrices less.
    return (wide @ ((vectors * factors) @ vectors.T)).to(matrix.dtype)


def right_basis(rows: Rows, floor: float = RANK, count: int | None = None) -> Basis:
    """Right singular vectors of a matrix in pieces, for singular values above `floor` times the largest.

    Args:
        rows: pieces, their elements about one; views are fine.
        count: the largest number of vectors that is wanted; all by default.
    """
    dtype = rows[0][0].dtype
    if sum(piece.shape[1] for piece in rows[0]) <= SMALL:
        rows = [[piece.double() for piece in row] for row in rows]
    vectors, images, _ = _graded(rows, floor, count)
    lengths = column_lengths(images)
    values = torch.stack(lengths).square_().sum(dim=0).sqrt_()
    kept = int((values > floor * values.max()).sum()) if len(values) else 0
    if kept < len(values):
        vectors, images = vectors[:, :kept], [image[:, :kept] for image in images]
        lengths, values = [length[:kept] for length in lengths], values[:kept]
    return Basis(
        vectors.to(dtype),
        [image.to(dtype) for image in images],
        [length.to(dtype) for length in lengths],
        values.to(dtype),
    )


def column_lengths(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The lengths of the columns of each matrix."""
    return [matrix.square().sum(dim=0).sqrt_() for matrix in matrices]


def _graded(rows: Rows, floor: float, count: int | None, *, images: bool = True) -> tuple[Tensor, list[Tensor], Tensor]:
    """Eigenvectors of the Gram matrix, their images, and eigenvalues, graded: see the module's text.

    Args:
        images: false gives images only if they had to be calculated anyway, or else none.
    """
    squares, vectors = descending(gram(rows))
    wanted = len(squares) if count is None else min(count, len(squares))
    limit = (0.5 * floor) ** 2 * float(squares[0])
    done: list[tuple[Tensor, list[Tensor], Tensor]] = []
    seen: list[Tensor] = []
    for _ in range(0 if vectors.dtype == torch.float64 else _LEVELS):
        grade = _GRADE**2 * float(squares[0])
        top = int((squares > grade).sum())
        if top >= min(wanted, len(squares)) or grade <= limit:
            break
        above, below = vectors[:, :top].contiguous(), vectors[:, top:].contiguous()
        tops = [image[:, :top] for image in seen] or times(rows, above)
        rest = [image[:, top:].contiguous() for image in seen] or times(rows, below)
        del seen, vectors
        _free_(below, rest, above, tops, squares[:top])
        done.append((above, tops, squares[:top]))
        wanted -= top
        squares, turn = descending(gram([[image] for image in rest]))
        vectors, seen = below @ turn, [image @ turn for image in rest]
    kept = min(wanted, int((squares > limit).sum()))
    vectors, squares = vectors[:, :kept], squares[:kept]
    last = [image[:, :kept] for image in seen] or (times(rows, vectors) if images else [])
    if not done:
        return vectors, last, squares
    levels = [*done, (vectors, last, squares)]
    joined = [torch.cat(parts, dim=1) for parts in zip(*(found for _, found, _ in levels), strict=True)]
    return torch.cat([found for found, _, _ in levels], dim=1), joined, torch.cat([found for _, _, found in levels])


def _free_(below: Tensor, images: Sequence[Tensor], above: Tensor, tops: Sequence[Tensor], squares: Tensor) -> None:
    """Free vectors and their images, in place, of what rounding left in them of the vectors `above`."""
    shared = torch.zeros(above.shape[1], below.shape[1], dtype=below.dtype, device=below.device)
    for top, image in zip(tops, images, strict=True):
        shared.addmm_(top.T, image)
    shared.div_(squares[:, None])
    below.addmm_(above, shared, alpha=-1.0)
    for top, image in zip(tops, images, strict=True):
        image.addmm_(top, shared, alpha=-1.0)


def times(rows: Rows, vectors: Tensor) -> list[Tensor]:
    """The matrix times some vectors, (m_i, k) for each row of pieces."""
    images: list[Tensor] = []
    for row in rows:
        shares = vectors.split([piece.shape[1] for piece in row])
        image = row[0] @ shares[0]
        for piece, share in zip(row[1:], shares[1:], strict=True):
            image.addmm_(piece, share)
        images.append(image)
    return images


def gram(rows: Rows) -> Tensor:
    """D'D of a matrix in pieces, (n, n); only the lower triangle, in blocks, is filled."""
    widths = [piece.shape[1] for piece in rows[0]]
    starts = [sum(widths[:number]) for number in range(len(widths))]
    total = rows[0][0].new_empty(sum(widths), sum(widths))
    for left, (start, width) in enumerate(zip(starts, widths, strict=True)):
        for low in range(0, width, _GRAM_BLOCK):
            high = min(low + _GRAM_BLOCK, width)
            band = total[start + low : start + high]
            for right in range(left + 1):
                columns = high if right == left else widths[right]
                out = band[:, starts[right] : starts[right] + columns]
                for number, row in enumerate(rows):
                    beta = float(number > 0)  # what was in it does not count at first
                    torch.addmm(out, row[left][:, low:high].T, row[right][:, :columns], beta=beta, out=out)
    return total


def descending(lower: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, from the largest, and eigenvectors of the symmetric matrix of this lower triangle; overwrites it."""
    vectors = lower.T  # in Fortran's order, so that no copy is made
    squares = lower.new_empty(0)
    torch.linalg.eigh(vectors, UPLO="U", out=(squares, vectors))
    return squares.flip(0), vectors.flip(1)


def rounding_of(matrix: Tensor) -> float:
    """About the largest singular value, and not less, of the errors that one rounding leaves in a matrix (m, n)."""
    rows, columns = matrix.shape
    spread = rows**-0.5 + columns**-0.5
    return torch.finfo(matrix.dtype).eps * spread * float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def scale_(matrices: Sequence[Tensor]) -> float:
    """Divide matrices by a power of two, in place, so that their largest element is about one and squares are numbers.

    Returns:
        the power; 1 if all are zero or the largest is infinite.
    """
    largest = max((float(matrix.abs().max()) for matrix in matrices), default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    # In two steps: the reciprocal of the smallest powers is no number.
    half = math.frexp(largest)[1] // 2
    rest = math.frexp(largest)[1] - half
    for matrix in matrices:
        matrix.mul_(2.0**-half).mul_(2.0**-rest)
    return 2.0 ** (half + rest)
