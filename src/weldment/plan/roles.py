"""Tensors that need more than the method: tied heads, buffers, task heads; told by name and config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from weldment.checkpoint.compare import same_bytes
from weldment.checkpoint.model import TensorEntry

Tensors = Mapping[str, TensorEntry]

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|cls\.predictions\.decoder)\.weight$")
_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings|backbone\.embeddings?|embedding)\.weight$"
)
_COPY_OF_SHARED = re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio", re.IGNORECASE)
_RECOMPUTED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|masked_bias|attn\.bias"
    r"|attention\.bias|causal_mask)$"
)


def is_recomputed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a constant that the model's code computes itself (positions, masks, frequencies)."""
    return bool(_RECOMPUTED.search(name)) and not (name.endswith(".bias") and len(shape) < 3)


def matches(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern (a glob) that fits the whole name or the name behind a dot."""
    return next((p for p in patterns if fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}")), None)


def head_name(tensors: Tensors) -> str | None:
    """The output embedding's name, None if the model has none."""
    return next((name for name in tensors if _HEAD.search(name)), None)


def input_embedding(tensors: Tensors) -> str | None:
    """The name of the token embeddings, None if the model has none that is known by name."""
    found = [name for name in tensors if _INPUT.search(name) and not _OTHER_TOWER.search(name)]
    shared = [name for name in found if name.endswith("shared.weight")]
    return next(iter(shared + found), None)


def declared_tying(config: Mapping[str, Any]) -> bool | None:
    """What the config says of tied embeddings; None if it says nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None


@dataclass(frozen=True)
class Tying:
    """How one model relates its head to its token embeddings.

    `state`: "tied" (one tensor serves as both), "untied" (a head of its own), "none" (no head).
    """

    state: str
    detail: str = ""


def tying(tensors: Tensors, config: Mapping[str, Any]) -> Tying:
    """Whether a model's head is its token embeddings, from names, config and, where both are stored, bytes."""
    head, embedding = head_name(tensors), input_embedding(tensors)
    declared = declared_tying(config)
    if head is None:
        return Tying("tied", "no head is stored") if declared and embedding else Tying("none")
    if declared is False or embedding is None:
        return Tying("untied")
    same = same_bytes(tensors[head], tensors[embedding])
    if same is None:
        return Tying("tied", "the head is taken to equal the embeddings until the weights are here") if declared else Tying("untied")
    return Tying("tied", "the head equals the embeddings") if same else Tying("untied", "the head differs from the embeddings")


def redundant_copy(name: str, tensors: Tensors) -> bool:
    """Whether a stored tensor only repeats the shared embedding (T5 and its kin)."""
    shared = input_embedding(tensors)
    if not _COPY_OF_SHARED.search(name) or shared is None or not shared.endswith("shared.weight"):
        return False
    return same_bytes(tensors[name], tensors[shared]) is not False


def with_tying(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The config with `tie_word_embeddings` set, also in a text config that states it."""
    changed = {**config, "tie_word_embeddings": tied}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": tied}
    return changed
