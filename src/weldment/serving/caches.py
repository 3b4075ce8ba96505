"""Key-value caches of several rows: put together, taken apart, cut where no row has a token.

Rows are padded on the left, so that their last tokens are in one column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def can_be_joined(cache: Any) -> bool:
    """Whether each layer keeps a key and a value for every token, one column after the other, and nothing else.

    Caches of sliding windows and of recurrent layers do not; rows with such caches start together or not at all.
    """
    from transformers import cache_utils

    plain = getattr(cache_utils, "DynamicLayer", None)
    return plain is not None and all(type(layer) is plain for layer in getattr(cache, "layers", [None]))


def join(cache: Any, other: Any) -> Any:
    """The cache of the rows of both, in this order; `cache` is changed."""
    for layer, new in zip(cache.layers, other.layers, strict=True):
        length = max(layer.keys.shape[-2], new.keys.shape[-2])
        layer.keys = torch.cat([_padded(layer.keys, length), _padded(new.keys, length)])
        layer.values = torch.cat([_padded(layer.values, length), _padded(new.values, length)])
    return cache


def join_masks(mask: Tensor, other: Tensor) -> Tensor:
    """The masks (B, T) of both, padded as their caches are."""
    length = max(mask.shape[-1], other.shape[-1])
    return torch.cat([_left(each, length - each.shape[-1], dim=-1) for each in (mask, other)])


def keep(cache: Any, mask: Tensor, rows: Tensor) -> Tensor:
    """Drop all rows but some from a cache, and columns in which none of these has a token; returns their mask.

    Args:
        cache: is changed.
        mask: (B, T), 1 at tokens.
        rows: indices of those to keep.
    """
    cache.batch_select_indices(rows)
    mask = mask[rows]
    empty = int(mask.any(0).long().argmax()) if len(rows) else 0
    if empty and can_be_joined(cache):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[..., empty:, :], layer.values[..., empty:, :]
        mask = mask[:, empty:]
    return mask


def _padded(tensor: Tensor, length: int) -> Tensor:
    return _left(tensor, length - tensor.shape[-2], dim=-2)


def _left(tensor: Tensor, count: int, *, dim: int) -> Tensor:
    """The tensor with so many zeros before it."""
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim) if count else tensor
