"""What an expert has beyond the shared model, tensor by tensor, compressed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from weldment.adapters.adapter import PREFIX
from weldment.adapters.loading import load
from weldment.adapters.lowrank import Factors, decomposed, factorised, stacked
from weldment.checkpoint.model import LowRank
from weldment.engine.sources import PIECE, Source, read_one
from weldment.engine.workspace import Workspace
from weldment.errors import NonFiniteError
from weldment.methods.masks import keep_mask, levels_of, quantised
from weldment.twin.plan import Piece, Term
from weldment.twin.recipe import Exclusive

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One tensor of one expert.

    Attributes:
        new, old: the expert's tensor and the stored shared model's; not read where the piece has terms.
        dtype: of what is stored.
        key: of random masks.
    """

    piece: Piece
    new: Source
    old: Source
    dtype: torch.dtype
    key: int


@dataclass(frozen=True)
class Compressed:
    """What is left of a difference.

    Attributes:
        energy: the squared Frobenius norm of the difference.
        kept: the part of it that is kept, no more than `energy`.
        before: the squared norm of the shared model's tensor, 0 where that was not read.
        rank: of the layer; 0 where nothing differs.
        factors: the layer's tensors, by their names in the adapter.
        dense: the difference to be stored as it is.
    """

    piece: Piece
    energy: float
    kept: float
    before: float = 0.0
    rank: int = 0
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    dense: Tensor | None = None


def compress(task: Task, exclusive: Exclusive) -> Compressed:
    """theta_t - theta_shared of one tensor, in float64, and its best approximation.

    theta_shared is what is stored, rounded as it is, so that full rank gives the expert back.

    Raises:
        NonFiniteError: the expert holds NaN or infinity, or its dtype cannot hold the result.
    """
    piece = task.piece
    if piece.terms is not None and piece.is_layer:
        b, a = _stacked(piece.terms)
        return _layer(task, factorised(*((a.T, b.T) if _is_turned(piece) else (b, a))), 0.0)
    delta, before = _difference(task)
    energy = float(torch.linalg.vector_norm(delta)) ** 2
    if not math.isfinite(energy):
        raise NonFiniteError("the expert holds NaN or infinity", where=piece.tensor, fix="Check the model")
    if energy == 0.0:
        return Compressed(piece, 0.0, 0.0, before)
    if not piece.is_layer:
        return _dense(task, delta, energy, before, exclusive)
    matrix = delta.view(piece.sides)
    return _layer(task, decomposed(matrix.T if _is_turned(piece) else matrix, **_wanted(piece)), before)


def _is_turned(piece: Piece) -> bool:
    """Whether PEFT's B A is the transpose of what is stored."""
    return piece.transposed or piece.kind == "embedding"


def _wanted(piece: Piece) -> dict[str, Any]:
    return {"rank": piece.rank} if piece.rank is not None else {"energy": piece.energy or 1.0}


def _difference(task: Task) -> tuple[Tensor, float]:
    """(numel,), float64, and the squared norm of the shared tensor."""
    work = Workspace(torch.device("cpu"), torch.float64)
    delta = torch.empty(task.piece.entry.numel, dtype=torch.float64)
    read_one(task.new, 0, delta, work)
    before = 0.0
    for low in range(0, delta.numel(), PIECE):
        part = delta[low : low + PIECE]
        old = work.numbers("shared", tuple(part.shape))
        task.old.read(low, old, work)
        before += float(old.square().sum())
        part.sub_(old)
    return delta, before


def _stacked(terms: tuple[Term, ...]) -> tuple[Tensor, Tensor]:
    """(B, A) of the sum of all terms, in the orientation that is stored."""
    pairs = [_oriented(share, change) for share, change in terms]
    return stacked([b for b, _ in pairs], [a for _, a in pairs])


def _oriented(share: float, change: LowRank) -> tuple[Tensor, Tensor]:
    a, b = load(change.a), load(change.b)
    b, a = b.reshape(b.shape[0], -1) * (share * change.scale), a.reshape(a.shape[0], -1)
    return (a.T, b.T) if change.transposed else (b, a)


def _layer(task: Task, found: Factors, before: float) -> Compressed:
    piece = task.piece
    cut = found.cut(piece.rank if piece.rank is not None else found.rank_for(piece.energy or 1.0))
    if cut.rank == 0 or cut.energy == 0.0:
        return Compressed(piece, 0.0, 0.0, before)
    b, a = cut.balanced()
    if piece.kind == "convolution":
        a = a.reshape(-1, *piece.entry.shape[1:])
        b = b.reshape(*b.shape, *(1 for _ in piece.entry.shape[2:]))
    names = layer_names(piece.module, embedding=piece.kind == "embedding")
    stored = {name: _stored(t, task, piece.tensor) for name, t in zip(names, (a, b), strict=True)}
    return Compressed(piece, cut.energy, min(cut.energy, float(cut.s.square().sum())), before, cut.rank, stored)


def layer_names(module: str, *, embedding: bool) -> tuple[str, str]:
    """What A and B of a layer are called in an adapter."""
    kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
    return f"{PREFIX}{module}.{kind}A{end}", f"{PREFIX}{module}.{kind}B{end}"


def _dense(task: Task, delta: Tensor, energy: float, before: float, exclusive: Exclusive) -> Compressed:
    """The difference itself, or the elements of it that are kept."""
    piece, density = task.piece, task.piece.density
    if density is not None:
        mask = _random(task, density, delta) if exclusive.kind == "random" else _largest(density, delta)
        delta.mul_(mask)
    kept = float(torch.linalg.vector_norm(delta)) ** 2
    if density is not None and exclusive.kind == "random" and exclusive.rescale:
        delta.div_(quantised(density))
    return Compressed(
        piece, energy, min(energy, kept), before, dense=_stored(delta.view(piece.entry.shape), task, piece.tensor)
    )


def _largest(density: float, delta: Tensor) -> Tensor:
    """1 for the share of the elements that are largest in magnitude, and those equal to the least of them."""
    count = max(1, round(density * delta.numel()))
    sizes = delta.abs()
    return (sizes >= sizes.kthvalue(delta.numel() - count + 1).values).to(delta.dtype)


def _random(task: Task, density: float, delta: Tensor) -> Tensor:
    mask = torch.empty(delta.numel(), dtype=torch.float32)
    return keep_mask(task.key, 0, levels_of(density), mask).double()


def _stored(tensor: Tensor, task: Task, name: str) -> Tensor:
    stored = tensor.to(task.dtype, copy=True).contiguous()
    if not bool(torch.isfinite(stored).all()):
        fix = "Write `dtype: float32` under `twin: {exclusive: ...}`"
        raise NonFiniteError(f"what is to be saved is not finite as {task.dtype}", where=name, fix=fix)
    return stored
