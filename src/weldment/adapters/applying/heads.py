"""Heads that are tied to the embeddings, where an adapter changes only one of the two.

PEFT keeps a tied head as it is when it adapts the embeddings, and the embeddings when it adapts the
head. The model with the adapter has two tensors then, where its base stores one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from weldment.adapters.adapter import Adapter
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.planning.roles import head_name, input_embedding, is_head
from weldment.planning.tying import declared_tying

_LANGUAGE_MODEL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_HEAD = "lm_head.weight"


def with_tied_head(base: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, TensorEntry]:
    """The base's tensors, with a head of their own where it is tied and does not stay so."""
    tensors = dict(base.tensors)
    embedding = input_embedding(tensors)
    if embedding is None or head_name(tensors) is not None or declared_tying(base.config) is False:
        return tensors
    name = next((name for adapter in adapters for name in _adapted(adapter) if is_head(name)), None)
    if (
        name is None
        and _is_language_model(base)
        and any(_parts_with(adapter, tensors[embedding].shape) for adapter in adapters)
    ):
        name = _HEAD
    return tensors if name is None else {**tensors, name: replace(tensors[embedding], name=name)}


def _adapted(adapter: Adapter) -> list[str]:
    return [layer.tensor for layer in adapter.layers.values()]


def _parts_with(adapter: Adapter, shape: tuple[int, ...]) -> bool:
    """Whether an adapter changes the embeddings and leaves the head; another number of rows is always that of both."""
    if (adapter.config.model_extra or {}).get("ensure_weight_tying"):
        return False
    names = [*_adapted(adapter), *adapter.saved]
    embedding = input_embedding(names)
    if embedding is None or head_name(names) is not None:
        return False
    return embedding not in adapter.saved or adapter.saved[embedding].shape == shape


def _is_language_model(base: Checkpoint) -> bool:
    kinds = base.config.get("architectures")
    return isinstance(kinds, list) and any(isinstance(k, str) and _LANGUAGE_MODEL.search(k) for k in kinds)
