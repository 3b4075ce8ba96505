"""The parts of a network that a table shows apart, told by the names of tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from weldment.planning.layers import is_embedding, layer_of
from weldment.planning.roles import is_head

Group = Literal["embeddings", "attention", "mlp", "norms", "head", "other"]
GROUPS: Sequence[Group] = ("embeddings", "attention", "mlp", "norms", "head", "other")

_NORM = re.compile(r"(^|[._])(\w*norm\w*|ln_?\w*)(\.|$)", re.IGNORECASE)
_TASK_HEAD = re.compile(r"(^|\.)(classifier|score|qa_outputs|classification_head|pre_classifier)(\.|$)")
_ATTENTION = re.compile(r"attn|attention|[._](q|k|v|o|qkv|query|key|value)(_proj|_lin)?(\.|$)", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|densereludense|experts?[._]|intermediate|output\.dense|[._](fc\d|w[123]|(up|down|gate)_proj)\.",
    re.IGNORECASE,
)


def group_of(name: str) -> Group:
    """The part that a tensor belongs to; biases belong to the part that they are in."""
    if is_head(name) or is_task_head(name):
        return "head"
    if _NORM.search(name):
        return "norms"
    if layer_of(name) is None and is_embedding(name):
        return "embeddings"
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else "other"


def is_task_head(name: str) -> bool:
    """Whether a tensor outside the layers answers one task, and not the next token."""
    return layer_of(name) is None and _TASK_HEAD.search(name) is not None
