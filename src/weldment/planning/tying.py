"""Whether a model's output head is its token embeddings, and what that means for a merge.

A tied model stores one tensor for both, or the same bytes twice. Models that merge need not agree:
if every head is tied, the output is too, and heads that are stored twice are left out; if one
differs from its embeddings, the output has a head of its own, to which tied models contribute
their embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weldment.checkpoint.compare import same_bytes
from weldment.planning.inputs import Aligned
from weldment.planning.roles import Tensors, head_name, input_embedding

State = Literal["tied", "untied", "unknown", "none"]
"""Of one model. "unknown": it stores no head and does not say why; "none": it has none."""


@dataclass(frozen=True)
class Tying:
    """What is decided.

    Attributes:
        tied: whether the output is tied; None if it has no head.
        repeated: by model the stored head that only repeats the embeddings, where the output needs none.
        stand_ins: by model the name of its token embeddings, which are also its head.
        head: the output's head, None if it has none of its own.
    """

    tied: bool | None = None
    repeated: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None


def settle_tying(tensors: Aligned, configs: Mapping[str, Mapping[str, Any]]) -> Tying:
    """Decide for all participants together.

    Args:
        tensors: of the participants.
        configs: their configurations, by model.
    """
    states = {model: tying_state(own, configs[model]) for model, own in tensors.items()}
    heads = {model: name for model, own in tensors.items() if (name := head_name(own)) is not None}
    untied = [model for model, state in states.items() if state == "untied"]
    if untied:
        head = heads[untied[0]]
        lacking = [m for m, state in states.items() if state in ("tied", "unknown") and head not in tensors[m]]
        embeddings = {model: input_embedding(tensors[model]) for model in lacking}
        return Tying(False, stand_ins={model: name for model, name in embeddings.items() if name}, head=head)
    if "tied" not in states.values():
        return Tying()
    return Tying(True, repeated=heads)


def tying_state(tensors: Tensors, config: Mapping[str, Any]) -> State:
    """How one model relates its head to its token embeddings: by names, config and, where both are stored, bytes."""
    head, embedding = head_name(tensors), input_embedding(tensors)
    declared = declared_tying(config)
    if head is None:
        if embedding is None or declared is False:
            return "none"
        return "tied" if declared else "unknown"
    if declared is False or embedding is None:
        return "untied"
    same = same_bytes(tensors[head], tensors[embedding])
    if same is None:
        # The weights are still on the Hub; the plan is made again when they are here.
        return "tied" if declared else "untied"
    return "tied" if same else "untied"


def declared_tying(config: Mapping[str, Any]) -> bool | None:
    """What the config says of tied embeddings; None if it says nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None


def with_tying(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The config with `tie_word_embeddings` set, also in a text config that states it."""
    changed = {**config, "tie_word_embeddings": tied}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": tied}
    return changed
