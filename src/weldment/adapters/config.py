"""`adapter_config.json`: what an adapter's tensors mean, or why it cannot be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from weldment.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that change the base's weights, so that the adapter belongs to a base that nobody saved."""

_VARIANTS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
}
"""Keys that make an adapter one that is not B A, with the name of what they turn on."""


def _mapping(value: object) -> object:
    return {} if value is None else value


def _names(value: object) -> object:
    return () if value is None else (value,) if isinstance(value, str) else value


class AdapterConfig(BaseModel):
    """The keys that decide what the tensors of a LoRA adapter mean; the others are kept in `model_extra`."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    peft_type: str
    r: int = Field(8, ge=1)
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    rank_pattern: Annotated[dict[str, int], BeforeValidator(_mapping)] = Field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, float], BeforeValidator(_mapping)] = Field(default_factory=dict)
    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    target_parameters: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A in one module: alpha / r, or alpha / sqrt(r) for rsLoRA.

        Args:
            module: its name in the model.
            rank: r, as its tensors have it.
        """
        alpha = _pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def stated_rank(self, module: str) -> int:
        """The rank that the configuration gives a module."""
        return int(_pattern(self.rank_pattern, module, self.r))


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def parse_config(content: Any, where: str) -> AdapterConfig:
    """A LoRA adapter's configuration.

    Args:
        content: of `adapter_config.json`.
        where: that file, for messages.

    Raises:
        CheckpointError: it is not one, or that of an adapter of another kind, which is named.
    """
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError("is not an adapter's configuration: it has no peft_type", where=where, fix="Check it")
    if kind.upper() != "LORA":
        raise CheckpointError(
            f"is a {kind} adapter; only LoRA adapters (rsLoRA and DoRA among them) can be merged",
            where=where,
            fix="Merge it into its base with PEFT's merge_and_unload, if it has one, and merge full models",
        )
    refused = [name for key, name in _VARIANTS.items() if content.get(key)]
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        refused.append(f"the initialisation {start!r}, which changes the base's weights")
    if refused:
        raise CheckpointError(
            f"uses {' and '.join(refused)}, which cannot be merged exactly from the adapter's tensors alone",
            where=where,
            fix="Convert it to plain LoRA with PEFT, or merge it into its base first",
        )
    try:
        return AdapterConfig.model_validate({key: value for key, value in content.items() if value is not None})
    except ValidationError as error:
        raise CheckpointError(
            f"is not valid: {_first(error.errors())}", where=where, fix="Save the adapter again"
        ) from (error)


def _first(details: Sequence[Any]) -> str:
    place = ".".join(map(str, details[0]["loc"]))
    return f"{place}: {details[0]['msg'].lower()}"
