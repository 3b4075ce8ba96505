"""The configuration of the output: the reference's, with what the merge changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weldment.checkpoint.dtypes import FLOATS, is_float
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.planning.layers import DEPTH_KEYS, depth_of

Config = Mapping[str, Any]
Origin = tuple[Config, int]
"""A model's config and the number of one of its layers."""

_DTYPE_KEYS = ("torch_dtype", "dtype")
_PER_LAYER = frozenset(
    {"num_key_value_heads", "num_attention_heads", "num_query_heads", "intermediate_size", "block_configs"}
    | {"attn_type_list", "ffn_multipliers", "sliding_windows"}
)
"""Keys that do not speak of layers and still hold, in some families, a list with one value for each."""


def with_layers(config: Config, chosen: Sequence[Origin]) -> dict[str, Any]:
    """The config of a model that is made of the chosen layers.

    Counts of layers are replaced. Lists with one value per layer (layer types, windows) get the
    values of the chosen layers, lists of layer numbers their new numbers.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        inner = [(_text(origin), index) for origin, index in chosen]
        return {**config, "text_config": with_layers(text, inner)}
    depth = depth_of(config)
    if depth is None:
        return dict(config)
    return {key: _resliced(key, value, depth, chosen) for key, value in config.items()}


def _text(config: Config) -> Config:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _resliced(key: str, value: Any, depth: int, chosen: Sequence[Origin]) -> Any:
    """One value of a config of `depth` layers after the layers were chosen."""
    if key in DEPTH_KEYS and value == depth:
        return len(chosen)
    if not isinstance(value, list) or not ("layer" in key or key in _PER_LAYER):
        return value
    if len(value) == depth:
        return [_own_value(origin, key, index, value) for origin, index in chosen]
    if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < depth for item in value):
        return [place for place, (origin, index) in enumerate(chosen) if index in _list_of(origin, key, value)]
    return value


def _list_of(origin: Config, key: str, fallback: Sequence[Any]) -> Sequence[Any]:
    own = origin.get(key)
    return own if isinstance(own, list) else fallback


def _own_value(origin: Config, key: str, index: int, fallback: Sequence[Any]) -> Any:
    """The value for a layer in the config of the model it comes from."""
    values = _list_of(origin, key, fallback)
    return values[min(index, len(values) - 1)]


def main_dtype(tensors: Iterable[tuple[str, int]]) -> str | None:
    """The floating-point dtype that most elements have, of (dtype, number of elements)."""
    sizes: Counter[str] = Counter()
    for dtype, numel in tensors:
        if is_float(dtype):
            sizes[dtype] += numel
    return max(sorted(sizes), key=lambda dtype: sizes[dtype]) if sizes else None


def with_dtype(config: Config, dtype: str) -> dict[str, Any]:
    """The config with its dtype, wherever it states one; stated once if it is stated nowhere."""
    name = FLOATS[dtype]
    if not any(key in config for key in _DTYPE_KEYS):
        config = {**config, "torch_dtype": name}
    return {key: _dtyped(key, value, name) for key, value in config.items()}


def _dtyped(key: str, value: Any, name: str) -> Any:
    if key in _DTYPE_KEYS:
        return name
    if key.endswith("_config") and isinstance(value, Mapping):
        return {inner: name if inner in _DTYPE_KEYS else kept for inner, kept in value.items()}
    return value


def with_rows(config: Config, old: int, new: int) -> dict[str, Any]:
    """The config with another size of the vocabulary, wherever it states the old one."""
    return {
        key: new
        if key == "vocab_size" and value == old
        else with_rows(value, old, new)
        if key == "text_config" and isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }


def stated_dtype_holds(model: Checkpoint, dtype: str) -> bool:
    """Whether most of a model's own elements have this dtype, so that its config may go on saying what it says."""
    entries: Iterable[TensorEntry] = model.tensors.values()
    return main_dtype((entry.dtype, entry.numel) for entry in entries) == dtype
