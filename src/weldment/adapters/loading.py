"""Tensors of adapters, read into memory: they are small."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from weldment.adapters.adapter import Layer
from weldment.checkpoint.dtypes import torch_dtype
from weldment.checkpoint.model import TensorEntry
from weldment.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def load(entry: TensorEntry, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor that lies in a file on this machine, converted to `dtype`.

    Raises:
        CheckpointError: the file cannot be read, or is not any more what its header said.
    """
    path = entry.file.path
    assert path is not None
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            got = os.preadv(file.fileno(), [buffer.numpy().data], entry.offset) if entry.nbytes else 0
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if got != entry.nbytes:
        cause = f"the file ended inside tensor {entry.name!r}"
        raise CheckpointError(cause, where=str(path), fix="Check the file and run the merge again")
    return buffer.view(torch_dtype(entry.dtype)).view(entry.shape).to(dtype)


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity among them."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def factors(layer: Layer, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(B, A) of a layer as matrices: (outputs, r) and (r, inputs), the scale not applied.

    Stacked experts give (outputs, r * E) and (E * r, inputs), as they are stored.
    """
    a, b = load(layer.a, dtype), load(layer.b, dtype)
    return b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)


def delta(layer: Layer, dtype: torch.dtype = torch.float64) -> Tensor:
    """scale * B A as a matrix (outputs, inputs); stacked experts give (E, outputs, inputs)."""
    b, a = factors(layer, dtype)
    if layer.experts == 1:
        return (b @ a).mul_(layer.scale)
    lefts = b.view(b.shape[0], layer.rank, layer.experts)
    rights = a.view(layer.experts, layer.rank, a.shape[1])
    return torch.einsum("ore,eri->eoi", lefts, rights).mul_(layer.scale)
