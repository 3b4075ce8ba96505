"""Stacks of layers, found in tensor names: `model.layers.7.mlp.up_proj.weight` is layer 7 of `model.layers`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weldment.errors import PlanError

_EMBEDDINGS = re.compile(r"(^|\.)(embed\w*|\w*embeddings?|wte|wpe|shared)(\.|$)", re.IGNORECASE)
OTHER_TOWER = re.compile(r"vision|visual|image|audio", re.IGNORECASE)
"""Names of parts of a model that are not its language model."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "depth")
"""Keys of configs that state a number of layers."""


@dataclass(frozen=True)
class LayerName:
    """A tensor name taken apart."""

    stack: str
    index: int
    rest: str

    @property
    def name(self) -> str:
        """The whole name."""
        return f"{self.stack}.{self.index}.{self.rest}"


def layer_of(name: str) -> LayerName | None:
    """The layer a tensor belongs to (the first number in its name), None for tensors outside layers."""
    parts = name.split(".")
    for place in range(1, len(parts) - 1):
        if parts[place].isdecimal():
            return LayerName(".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :]))
    return None


def depths(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of every stack."""
    found: dict[str, int] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            found[layer.stack] = max(found.get(layer.stack, 0), layer.index + 1)
    return found


def is_embedding(name: str) -> bool:
    """Whether a tensor outside layers comes before them (token and position embeddings)."""
    return _EMBEDDINGS.search(name) is not None


def position(name: str, stacks: Mapping[str, int]) -> float | None:
    """Where a tensor lies on the way through its stack, 0 to 1: what gradients are evaluated at.

    Layer i of n is at i / (n - 1). Tensors outside layers have no position.
    """
    layer = layer_of(name)
    return None if layer is None else layer.index / max(1, stacks[layer.stack] - 1)


def sliced_stack(stacks: Mapping[str, int], config: Mapping[str, Any], where: str) -> str:
    """The stack that `layer_range` speaks of: the language model's, or the only one.

    Raises:
        PlanError: no stack, or several that could be meant.
    """
    if len(stacks) == 1:
        return next(iter(stacks))
    depth = depth_of(config)
    fitting = [stack for stack, count in stacks.items() if count == depth and not OTHER_TOWER.search(stack)]
    if len(fitting) == 1:
        return fitting[0]
    listing = ", ".join(f"{stack} ({count} layers)" for stack, count in stacks.items()) or "none"
    raise PlanError(
        f"slices need one stack of layers; this model has: {listing}",
        where=where,
        fix="Use `models` instead of `slices`, with gradients or filters to treat layers differently",
    )


def depth_of(config: Mapping[str, Any]) -> int | None:
    """The number of layers that a config, or its text config, states."""
    text = config.get("text_config")
    part = text if isinstance(text, Mapping) else config
    return next((part[key] for key in DEPTH_KEYS if isinstance(part.get(key), int)), None)
