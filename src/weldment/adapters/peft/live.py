"""`add_weighted_adapter` on a model in memory, in place of PEFT's method of that name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from weldment.adapters.config import parse_config
from weldment.adapters.peft.live_layers import MergedLayer, combined, has_adapter, lora_layers, write
from weldment.errors import MergeError, RecipeError, UserError, joined
from weldment.recipe.peft_call import build_call
from weldment.recipe.recipe import Combination
from weldment.recipe.words import Place, shown, suggestion

if TYPE_CHECKING:
    from peft import LoraModel, PeftModel

_HERE = Place("add_weighted_adapter")
_KEPT = (
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "lora_dropout"),
    *("megatron_config", "megatron_core", "runtime_config"),
)
"""Keys of the first adapter's configuration that the new adapter has too; the others say how B and A came about."""


def add_weighted_adapter(
    model: PeftModel | LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    seed: int = 0,
) -> None:
    """Merge LoRA adapters of a model into a new one of the same model, which is not made active.

    `weldment.add_weighted_adapter(model, ...)` takes what `model.add_weighted_adapter(...)` of PEFT takes and
    calculates the same, in float64 from the factors alone: the base's weights are not read, so they may be
    quantised. Ranks may differ and weights may be negative for every type. Modules get the rank that their merged
    layer has (`rank_pattern`). The values have the dtype and device of the adapters' and are not trainable.

    rsLoRA and rank and alpha patterns are merged as they act; LoRA biases by the types that keep every element
    (linear, cat, svd). DoRA, saved modules, target parameters and other variants are refused by name.

    Args:
        model: a `PeftModel` of LoRA adapters, or the `LoraModel` inside.
        adapters: names of the adapters to merge. One alone is only scaled, whatever the type.
        weights: one for each adapter.
        adapter_name: name of the new adapter.
        combination_type: linear, svd, cat, ties, ties_svd, dare_ties, dare_linear, dare_ties_svd,
            dare_linear_svd, magnitude_prune or magnitude_prune_svd (see `combine_layer`).
        svd_rank: rank of the result of the svd types; by default the largest of the adapters.
        svd_clamp: quantile, in (0.5, 1], that bounds the factors of the svd types.
        svd_full_matrices: accepted, without effect.
        svd_driver: accepted, without effect.
        density: share of elements that the ties, dare and magnitude_prune types keep, in (0, 1].
        majority_sign_method: "total" or "frequency", for the ties types.
        seed: of the dare types.

    Raises:
        UserError: an argument is wrong, the name is taken, or an adapter cannot be merged. The model is as before.
        NonFiniteError: the merged values are too large for their dtype. The model is as before.
    """
    tuner = _tuner(model)
    parameters = {"svd_rank": svd_rank, "svd_clamp": svd_clamp, "density": density}
    call = {"combination_type": combination_type, "majority_sign_method": majority_sign_method, **parameters}
    combination, factors = _checked(adapters, weights, call, seed)
    _check_names(tuner, adapters, adapter_name)
    configs = [_lora(tuner.peft_config[name], name) for name in adapters]
    if combination.svd_rank is None:
        largest = max(rank for config in configs for rank in (config.r, *(config.rank_pattern or {}).values()))
        combination = replace(combination, svd_rank=largest)
    merged = {
        module: combined(module, layer, adapters, factors, combination, seed)
        for module, layer in lora_layers(tuner)
        if any(has_adapter(layer, name) for name in adapters)
    }
    if not merged:
        raise UserError("the adapters have no LoRA layers in this model", where=str(_HERE))
    _register(tuner, adapter_name, _config(tuner, configs, merged), merged)


def _tuner(model: Any) -> Any:
    """The `LoraModel` of a model."""
    try:
        from peft import LoraModel, PeftModel
    except ImportError as error:
        fix = "Install it with `pip install 'weldment[peft]'`"
        raise UserError(f"PEFT cannot be imported: {error}", where=str(_HERE), fix=fix) from error
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, LoraModel):
        cause = f"{type(tuner).__name__} is not a model with LoRA adapters (a PeftModel or LoraModel)"
        raise UserError(cause, where=str(_HERE))
    return tuner


def _checked(
    adapters: Sequence[str], weights: Sequence[float], call: Mapping[str, object], seed: int
) -> tuple[Combination, list[float]]:
    """The combination and the weights of a call whose values have a meaning."""
    if not isinstance(adapters, (list, tuple)) or not all(isinstance(name, str) for name in adapters):
        raise UserError(f"{shown(adapters)} is not a list of names", where=str(_HERE.at("adapters")))
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise UserError(f"{shown(weights)} is not a list of numbers", where=str(_HERE.at("weights"))) from error
    # The names stand for themselves: as references of a recipe they would be brought into another form.
    document = {"adapters": ["adapter"] * len(adapters), "weights": numbers, "seed": seed, **call}
    recipe, problems = build_call(document, _HERE)
    if recipe is None or recipe.combination is None:
        raise joined(RecipeError, problems)
    return recipe.combination, numbers


def _check_names(tuner: Any, adapters: Sequence[str], adapter_name: str) -> None:
    for name in adapters:
        if name not in tuner.peft_config:
            fix = suggestion(name, tuner.peft_config)
            raise UserError(f"there is no adapter {name!r}", where=str(_HERE.at("adapters")), fix=fix)
    where = str(_HERE.at("adapter_name"))
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise UserError(f"{adapter_name!r} is not a name for an adapter", where=where, fix="Names have no full stops")
    if hasattr(nn.ModuleDict(), adapter_name) or hasattr(nn.ParameterDict(), adapter_name):
        raise UserError(f"torch has another use for the name {adapter_name!r}", where=where, fix="Choose another")
    if adapter_name in tuner.peft_config:
        fix = "Choose another, or remove it with `model.delete_adapter` first"
        raise UserError(f"there is an adapter {adapter_name!r} already", where=where, fix=fix)


def _lora(config: Any, name: str) -> Any:
    """The configuration, if all of what it describes is in the factors of LoRA layers."""
    where = str(_HERE.at(f"adapter {name!r}"))
    # How the factors began does not matter here: the base that the adapter belongs to is at hand.
    parse_config({**config.to_dict(), "init_lora_weights": True}, where)
    foreign = {
        "DoRA, whose lengths depend on the merged weights": config.use_dora,
        "saved modules (modules_to_save)": config.modules_to_save,
        "target_parameters": getattr(config, "target_parameters", None),
        f"trained biases of the base (bias: {config.bias})": config.bias != "none",
    }
    if used := [what for what, value in foreign.items() if value]:
        cause = f"uses {' and '.join(used)}, which cannot be merged in a model in memory"
        raise UserError(cause, where=where, fix="Merge the saved adapters with `weld merge`, or leave this one out")
    return config


def _config(tuner: Any, configs: Sequence[Any], merged: Mapping[str, MergedLayer]) -> Any:
    """The configuration of the new adapter: scale 1 in every module."""
    first = configs[0]
    has_bias = any(layer.bias is not None for layer in merged.values())
    if has_bias and any(
        getattr(module, "lora_embedding_A", None) for name, module in lora_layers(tuner) if name in merged
    ):
        cause = "an adapter has lora_bias and another an embedding, which PEFT cannot have in one"
        raise UserError(cause, where=str(_HERE), fix="Leave one of the two out")
    rank = Counter(layer.rank for layer in merged.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(name)}": layer.rank for name, layer in merged.items() if layer.rank != rank}
    kept = {name: getattr(first, name) for name in _KEPT if hasattr(first, name)}
    extra = {"lora_bias": True} if has_bias else {}
    config = type(first)(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets([name for name, _ in tuner.model.named_modules()], merged),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        **extra,
    )
    for name, value in kept.items():
        setattr(config, name, value)
    return config


def _targets(modules: Sequence[str], wanted: Collection[str]) -> list[str] | str:
    """`target_modules` that match exactly the wanted modules: last names, whole names, or an expression."""
    for names in ({name.rpartition(".")[2] for name in wanted}, set(wanted)):
        matched = {module for module in modules if any(module == n or module.endswith(f".{n}") for n in names)}
        if matched == set(wanted):
            return sorted(names)
    return "|".join(re.escape(name) for name in wanted)


def _register(tuner: Any, adapter_name: str, config: Any, merged: Mapping[str, MergedLayer]) -> None:
    """Add the adapter to the model; after an error nothing of it is left."""
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
        added = {name: layer for name, layer in lora_layers(tuner) if has_adapter(layer, adapter_name)}
        if added.keys() != merged.keys():
            raise MergeError("PEFT added the adapter to other modules", where=", ".join(added.keys() ^ merged.keys()))
        for name, layer in added.items():
            write(layer, adapter_name, merged[name])
    except BaseException:
        tuner.delete_adapter(adapter_name)
        raise
