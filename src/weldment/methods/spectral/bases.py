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
from collections.abc import Sequence
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

_DEPENDENT = 1e-5
"""Eigenvalues of a Gram matrix of unit vectors below this share of the largest mean that the vectors are dependent;
in float64, the square of it."""

_GRAM_BLOCK = 512

Rows = Sequence[Sequence["Tensor"]]
"""A matrix in pieces: rows of matrices, each row (m_i, n), its pieces side by side."""


@dataclass(frozen=True)
class Basis:
    """Right singular vectors of a matrix, by descending singular values.

    Attributes:
        vectors: (n, k), orthonormal columns.
        images: the matrix times the vectors, (m_i, k) for each of its rows of pieces; the whole columns
            have the singular values as lengths.
        values: (k,), the singular values.
    """

    vectors: Tensor
    images: list[Tensor]
    values: Tensor


@dataclass(frozen=True)
class Joint:
    """D = [A_1; ...; A_T] = U S V', by descending singular values.

    Attributes:
        parts: U_i S, (m, k) each.
        values: S, (k,).
        rows: V', (k, n).
    """

    parts: list[Tensor]
    values: Tensor
    rows: Tensor


def joint(matrices: Sequence[Tensor], floor: float = RANK) -> Joint:
    """The singular vectors of matrices stacked one above the other, from the smaller of D'D and D D'.

    Args:
        matrices: A_i, (m, n) each; their elements about one, not all zero.
        floor: singular values up to this share of the largest are left out.
    """
    count, rows, columns = len(matrices), *matrices[0].shape
    if columns <= count * rows:
        basis = right_basis([[matrix] for matrix in matrices], floor)
        return Joint(basis.images, basis.values, basis.vectors.T)
    turned = right_basis([[matrix.T for matrix in matrices]], floor)
    parts = turned.vectors.mul_(turned.values).split(rows)
    return Joint(list(parts), turned.values, turned.images[0].div_(turned.values).T)


def triples(matrix: Tensor, floor: float = RANK) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k,) and V (n, k) of a matrix whose elements are about one, without what is rounding."""
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = triples(matrix.T, floor)
        return u, s, v
    found = right_basis([[matrix]], floor)
    return found.images[0].div_(found.values), found.values, found.vectors


def right_basis(rows: Rows, floor: float = RANK) -> Basis:
    """The right singular vectors of a matrix in pieces, for singular values above `floor` times the largest.

    Args:
        rows: pieces, their elements about one; views are fine.
    """
    dtype = rows[0][0].dtype
    if sum(piece.shape[1] for piece in rows[0]) <= SMALL:
        rows = [[piece.double() for piece in row] for row in rows]
    vectors = _vectors(rows, floor)
    images = times(rows, vectors)
    values = torch.stack([torch.linalg.vector_norm(image, dim=0) for image in images]).norm(dim=0)
    order = values.argsort(descending=True, stable=True)
    kept = int((values > floor * values.max()).sum()) if len(values) else 0
    if kept < len(values) or not torch.equal(order, torch.arange(kept, device=order.device)):
        order = order[:kept]
        vectors, images, values = vectors[:, order], [image[:, order] for image in images], values[order]
    return Basis(vectors.to(dtype), [image.to(dtype) for image in images], values.to(dtype))


def _vectors(rows: Rows, floor: float) -> Tensor:
    """Eigenvectors of the Gram matrix, graded: see the module's text."""
    squares, vectors = descending(gram(rows))
    limit = (0.5 * floor) ** 2 * float(squares[0])
    done: list[Tensor] = []
    for _ in range(_LEVELS if vectors.dtype == torch.float32 else 0):
        grade = _GRADE**2 * float(squares[0])
        top = int((squares > grade).sum())
        if top == len(squares) or grade <= limit:
            break
        above, below = vectors[:, :top], vectors[:, top:].contiguous()
        done.append(above)
        images = _without(rows, above, squares[:top], below)
        squares, turn = descending(gram([[image] for image in images]))
        vectors = below @ turn
    kept = vectors[:, : int((squares > limit).sum())]
    return torch.cat([*done, kept], dim=1) if done else kept


def _without(rows: Rows, above: Tensor, squares: Tensor, below: Tensor) -> list[Tensor]:
    """The images of the vectors `below`, which are freed, in place, of what rounding left in them of those `above`."""
    images, tops = times(rows, below), times(rows, above)
    shared = torch.zeros(above.shape[1], below.shape[1], dtype=below.dtype, device=below.device)
    for top, image in zip(tops, images, strict=True):
        shared.addmm_(top.T, image)
    shared.div_(squares[:, None])
    below.addmm_(above, shared, alpha=-1.0)
    return [image.addmm_(top, shared, alpha=-1.0) for top, image in zip(tops, images, strict=True)]


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


def inverse_root(vectors: Tensor) -> Tensor:
    """(X'X)^(-1/2) on the range of X'X, (k, k): X times it is the polar factor of X.

    Args:
        vectors: X, (m, k), columns of length one.
    """
    wide = vectors.double() if vectors.shape[1] <= SMALL else vectors
    squares, turn = descending(gram([[wide]]))
    least = _DEPENDENT**2 if squares.dtype == torch.float64 else _DEPENDENT
    keep = squares > least * squares[0]
    turn = turn[:, keep]
    return ((turn / squares[keep].sqrt()) @ turn.T).to(vectors.dtype)


def scale_(matrices: Sequence[Tensor]) -> float:
    """Divide matrices by a power of two, in place, so that their largest element is about one and squares are numbers.

    Returns:
        the power; 1 if all are zero or some are not finite.
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
