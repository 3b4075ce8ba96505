"""What a tensor is, told by its name: a head, token embeddings, a constant, a copy of another tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from weldment.checkpoint.model import TensorEntry
from weldment.planning.layers import OTHER_TOWER, is_embedding, layer_of

Tensors = Mapping[str, TensorEntry]

_HEAD = re.compile(r"(^|\.)(lm_head|lm_head\.decoder|embed_out|predictions\.decoder|vocab_projector)\.weight$")
_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings|backbone\.embeddings?|embedding)\.weight$"
)
_TOKEN_BIAS = re.compile(
    r"(^|\.)(lm_head|lm_head\.decoder|predictions|predictions\.decoder|vocab_projector)\.bias$"
    r"|(^|\.)final_logits_bias$|^decoder\.bias$"
)
_OTHER_ROWS = re.compile(rf"position|wpe|pos_emb|{OTHER_TOWER.pattern}", re.IGNORECASE)
_COPIES = (
    (re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$"), r"\1shared.weight"),
    (re.compile(r"(^|\.)predictions\.decoder\.bias$"), r"\1predictions.bias"),
    (re.compile(r"(^|\.)lm_head\.decoder\.bias$"), r"\1lm_head.bias"),
)
"""Tensors that models of some families store twice: the copy's name, and the original's."""

_RECOMPUTED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|masked_bias|attn\.bias"
    r"|attention\.bias|causal_mask)$"
)


_STATISTIC = re.compile(r"(^|\.)running_(mean|var)$")


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic of batch normalisation."""
    return _STATISTIC.search(name) is not None


def is_count(name: str) -> bool:
    """Whether a tensor counts the batches that running statistics were measured on."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def is_recomputed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a constant that the model's code computes itself (positions, masks, frequencies)."""
    return bool(_RECOMPUTED.search(name)) and not (name.endswith(".bias") and len(shape) < 3)


def matches(patterns: Iterable[str], *names: str) -> bool:
    """Whether one of the patterns (globs) fits one of the names, whole or from a dot on."""
    return any(fnmatchcase(name, form) for pattern in patterns for form in (pattern, f"*.{pattern}") for name in names)


def head_name(tensors: Iterable[str]) -> str | None:
    """The output embedding's name, None if the model has none."""
    return next((name for name in tensors if is_head(name)), None)


def is_head(name: str) -> bool:
    """Whether a tensor is an output embedding."""
    return _HEAD.search(name) is not None


def is_token_bias(name: str) -> bool:
    """Whether a tensor is the bias of an output embedding, with an element for each token."""
    return _TOKEN_BIAS.search(name) is not None


def has_token_rows(name: str) -> bool:
    """Whether a tensor has a row, or an element, for each token: token embeddings, heads and their biases."""
    return name == input_embedding([name]) or is_head(name) or is_token_bias(name)


def seems_to_hold_tokens(name: str, shape: tuple[int, ...], embedding: tuple[int, ...]) -> bool:
    """Whether a tensor looks as if it had a row for each token, though its name is not known for it.

    Args:
        embedding: the shape of the model's token embeddings.
    """
    if has_token_rows(name) or layer_of(name) is not None or _OTHER_ROWS.search(name):
        return False
    return "embed_tokens_per_layer" in name or shape[:1] == embedding[:1] != embedding[-1:]


def holds_tokens(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the rows of a tensor belong to tokens or positions; convolutions that embed patches have none such."""
    return len(shape) == 2 and (is_head(name) or is_embedding(name))


def input_embedding(tensors: Iterable[str]) -> str | None:
    """The name of the token embeddings, None if the model has none that is known by name."""
    found = [name for name in tensors if _INPUT.search(name) and not OTHER_TOWER.search(name)]
    shared = [name for name in found if name.endswith("shared.weight")]
    return next(iter(shared + found), None)


def original_of(name: str) -> str | None:
    """The tensor that this one repeats in models that store it twice; None for all others."""
    for copy, original in _COPIES:
        if copy.search(name):
            return copy.sub(original, name)
    return None
