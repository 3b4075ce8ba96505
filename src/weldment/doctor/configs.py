"""Differences between configurations that matter to a merge: same tensors, calculated with differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weldment.checkpoint.model import Checkpoint
from weldment.doctor.findings import Finding


@dataclass(frozen=True)
class Setting:
    """Something that configurations say under one of several names.

    Attributes:
        keys: where it stands; a dot goes into a part of the configuration.
        why: what a merge of models that differ in it means.
        breaks: whether the weights of such models do not mean the same thing.
        default: what it is where nothing is said; None for nothing.
    """

    name: str
    keys: tuple[str, ...]
    why: str
    breaks: bool = False
    default: Any = None


_HEADS = "the same matrices are cut into heads differently"
_LEARNT = "each model's weights were trained for its own value, and the merge can have only one"

SETTINGS: Sequence[Setting] = (
    Setting("hidden size", ("hidden_size", "n_embd", "d_model"), "matrices have other shapes", breaks=True),
    Setting("layers", ("num_hidden_layers", "n_layer", "num_layers"), "the models have other layers", breaks=True),
    Setting("attention heads", ("num_attention_heads", "n_head", "num_heads"), _HEADS, breaks=True),
    Setting("key-value heads", ("num_key_value_heads",), _HEADS, breaks=True),
    Setting("size of a head", ("head_dim", "d_kv"), _HEADS, breaks=True),
    Setting("MLP size", ("intermediate_size", "n_inner", "d_ff"), "matrices have other shapes", breaks=True),
    Setting("experts of a layer", ("num_local_experts", "num_experts", "n_routed_experts"), "other MLPs", breaks=True),
    Setting("activation", ("hidden_act", "activation_function", "hidden_activation"), _LEARNT),
    Setting("epsilon of norms", ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _LEARNT),
    Setting("RoPE base", ("rope_theta", "rope_parameters.rope_theta", "rotary_emb_base"), _LEARNT, default=10000.0),
    Setting("RoPE scaling", ("rope_scaling", "rope_parameters"), _LEARNT),
    Setting("share of RoPE", ("partial_rotary_factor", "rotary_pct"), _LEARNT),
    Setting("sliding window", ("sliding_window",), _LEARNT),
    Setting("logit soft-capping", ("final_logit_softcapping", "attn_logit_softcapping"), _LEARNT),
    Setting("longest context", ("max_position_embeddings", "n_positions"), "the merge promises that of one of them"),
    Setting("tied head", ("tie_word_embeddings",), "the merge has a head of its own if one of them has"),
)
"""What is compared. The vocabulary is compared by its tokens, not by its size."""

_IN_ROPE = frozenset({"rope_theta", "type", "rope_type"})
_PLAIN_ROPE = frozenset({None, "default"})


def compare_configs(models: Sequence[Checkpoint]) -> list[Finding]:
    """What the configurations of models say differently, as far as more than one says it."""
    configs = {model.reference: model.config for model in models if model.config}
    kinds = {name: str(config["model_type"]) for name, config in configs.items() if config.get("model_type")}
    if len(set(kinds.values())) > 1:
        text = f"models of different architecture: {_listed(kinds)}"
        advice = "Only models with the same tensors, used in the same way, can be merged"
        return [Finding("problem", "architecture", "", text, advice, {"architectures": kinds})]
    return list(_differences(configs))


def _differences(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    for setting in SETTINGS:
        said = {name: _value(config, setting) for name, config in configs.items()}
        if setting.default is None and setting.name != "RoPE scaling" and setting.name != "sliding window":
            said = {name: value for name, value in said.items() if value is not None}
        if len({repr(value) for value in said.values()}) < 2:
            continue
        text = f"{setting.name} differs: {_listed(said)}; {setting.why}"
        level = "problem" if setting.breaks else "warning"
        advice = "" if setting.breaks else "The merge gets that of the base, or of the first model"
        evidence = {"setting": setting.name, "values": said}
        yield Finding(level, "config", "", text, advice, evidence)


def _value(config: Mapping[str, Any], setting: Setting) -> Any:
    """What a configuration says, or its text config."""
    text = config.get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config):
        for key in setting.keys:
            value = _at(part, key)
            if setting.name == "RoPE scaling":
                value = _scaling(value)
            if value is not None:
                return float(value) if isinstance(setting.default, float) and isinstance(value, int) else value
    return setting.default


def _at(config: Mapping[str, Any], key: str) -> Any:
    place: Any = config
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _scaling(value: Any) -> Any:
    """A scaling without what is compared elsewhere; None for plain RoPE."""
    if not isinstance(value, Mapping):
        return value
    kind = value.get("rope_type", value.get("type"))
    if kind in _PLAIN_ROPE:
        return None
    return {"type": kind, **{key: item for key, item in sorted(value.items()) if key not in _IN_ROPE}}


def _listed(values: Mapping[str, Any]) -> str:
    """`8 in a and b, 4 in c`."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault("none" if value is None else str(value), []).append(name)
    return ", ".join(f"{value} in {' and '.join(names)}" for value, names in by_value.items())
