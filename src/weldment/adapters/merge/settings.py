"""The `adapter_config.json` of a merged adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weldment.adapters.adapter import Adapter, Layer
from weldment.adapters.merge.inputs import AdapterInputs
from weldment.adapters.merge.plan import AdapterPlan, Module

_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that narrow down what `target_modules` selects."""

_SPENT = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
"""Keys that only say how training began."""

_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types whose adapters PEFT loads with a head only."""


def base_config(inputs: AdapterInputs, modules: Sequence[Module]) -> dict[str, Any]:
    """The configuration, but for the ranks; keys of the first adapter that do not change meaning are kept."""
    adapters = [inputs.adapters[reference] for reference in inputs.participants]
    kept = {key: value for key, value in adapters[0].raw_config.items() if key not in _SPENT}
    return {
        **kept,
        "peft_type": "LORA",
        "base_model_name_or_path": _base(inputs, adapters),
        "task_type": _task(inputs, adapters),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any(layer.magnitude is not None for module in modules for layer in module.present),
        "lora_bias": any(module.has_bias for module in modules),
        "bias": next((bias for bias in ("all", "lora_only") if any(a.config.bias == bias for a in adapters)), "none"),
        "fan_in_fan_out": any(m.pattern.transposed and not m.pattern.embedding for m in modules),
        "modules_to_save": _saved_modules(inputs, adapters),
        "target_parameters": next((list(p) for a in adapters if (p := a.config.target_parameters)), None),
        **_targets(inputs, adapters, modules),
    }


def with_ranks(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with the ranks of the modules and alphas that make every scale 1.

    Args:
        ranks: by the patterns that stand for the modules, see `pattern_of`.
    """
    counts = Counter(ranks.values())
    most = max(counts, key=lambda rank: (counts[rank], rank), default=8)
    others = {pattern: rank for pattern, rank in ranks.items() if rank != most}
    return {**config, "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": dict(others)}


def pattern_of(plan: AdapterPlan, module: Module) -> str:
    """The rank and alpha pattern that fits one module alone; of parameters PEFT compares their own names."""
    is_weight = not module.pattern.parameter and _is_parameter(plan.adapters.values(), module.name, module.pattern)
    return re.escape(module.name) + (r"(\.weight)?" if is_weight else "")


def _is_parameter(adapters: Iterable[Adapter], name: str, layer: Layer) -> bool:
    """Whether a layer was made for a parameter that `target_parameters` names, if only a module's own weight."""
    named = {parameter for adapter in adapters for parameter in adapter.config.target_parameters}
    return layer.parameter or any(f".{name}.weight".endswith(f".{parameter}") for parameter in named)


def _base(inputs: AdapterInputs, adapters: Sequence[Adapter]) -> str | None:
    """The base that all adapters name, else the recipe's, else the first that is named."""
    named = list(dict.fromkeys(a.config.base_model_name_or_path for a in adapters if a.config.base_model_name_or_path))
    wanted = inputs.recipe.base_model
    if len(named) != 1 and wanted is not None and wanted not in inputs.adapters:
        return wanted
    return named[0] if named else None


def _saved_modules(inputs: AdapterInputs, adapters: Sequence[Adapter]) -> list[str] | None:
    """Those of which the merged adapter holds tensors."""
    names = dict.fromkeys(name for a in adapters for name in a.config.modules_to_save)
    modules = {tensor.rpartition(".")[0] for own in inputs.saved.values() for tensor in own}
    return [name for name in names if any(_ends_with(module, name) for module in modules)] or None


def _task(inputs: AdapterInputs, adapters: Sequence[Adapter]) -> str | None:
    """That of the first adapter, unless PEFT would then look for a head that is not there."""
    task = next((a.config.task_type for a in adapters if a.config.task_type), None)
    if task not in _WITH_HEAD or _saved_modules(inputs, adapters):
        return task
    inputs.notes.append(f"task_type {task} is left out: with it PEFT would not load an adapter without its head")
    return None


def _ends_with(module: str, name: str) -> bool:
    """Whether a module is that of this name, or in it."""
    return f".{name}." in f".{module}."


def _targets(inputs: AdapterInputs, adapters: Sequence[Adapter], modules: Sequence[Module]) -> dict[str, Any]:
    """Keys that select just these modules: the adapters' own words where they do, else the modules' whole names."""
    names = [module.name for module in modules if not _is_parameter(adapters, module.name, module.pattern)]
    words = list(dict.fromkeys(word for adapter in adapters for word in adapter.config.target_modules))
    narrowing = [{key: a.raw_config.get(key) for key in _CHOOSING} for a in adapters]
    own = [
        [name for name, layer in inputs.layers[reference].items() if not _is_parameter(adapters, name, layer)]
        for reference in inputs.participants
    ]
    is_plain = all(not isinstance(a.raw_config.get("target_modules"), str) for a in adapters)
    untouched = not inputs.dropped and all(narrow == narrowing[0] for narrow in narrowing)
    if is_plain and untouched and all(_selects(a, mine, names) for a, mine in zip(adapters, own, strict=True)):
        return {"target_modules": words, **narrowing[0]}
    if words and untouched and all(a.raw_config.get("target_modules") == words[0] for a in adapters):
        return {"target_modules": words[0], **narrowing[0]}
    return {"target_modules": names, **dict.fromkeys(_CHOOSING)}


def _selects(adapter: Adapter, own: Sequence[str], names: Sequence[str]) -> bool:
    """Whether an adapter's list of targets selects, among all modules, just those that it changes."""
    words = adapter.config.target_modules
    chosen = {name for name in names if any(name == word or name.endswith(f".{word}") for word in words)}
    return chosen == set(own)
