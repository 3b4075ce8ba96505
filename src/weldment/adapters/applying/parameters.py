"""Which parameters an adapter's layers change where `target_parameters` names parameters, not modules.

PEFT wraps a module once for each of its parameters that is named, the one that the module defines
first innermost. The layers are saved as `module.base_layer.lora_A` and `module.lora_A`: which
parameter each belongs to must be found out.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from weldment.adapters.config import AdapterConfig
from weldment.errors import CheckpointError

_WRAPPED = ".base_layer"
_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""As the modules of fused experts define their parameters."""


@dataclass(frozen=True)
class Target:
    """What a layer changes.

    Attributes:
        name: a module, whose `weight` is meant, or a parameter.
        key: the name that rank and alpha patterns are compared with.
        parameter: whether `name` is a parameter.
    """

    name: str
    key: str
    parameter: bool = False


def targets(modules: Collection[str], config: AdapterConfig, where: str) -> dict[str, Target]:
    """What every layer of an adapter changes, by the module under which it is saved.

    Raises:
        CheckpointError: it cannot be known which of a module's parameters a layer belongs to.
    """
    nested: dict[str, list[str]] = {}
    for module in sorted(modules, key=len, reverse=True):
        nested.setdefault(_unwrapped(module), []).append(module)
    found: dict[str, Target] = {}
    for module, saved in nested.items():
        named = _parameters(module, config)
        names = _ordered(named, len(saved), f"{where}: {module}")
        found |= {
            name: _target(module, parameter, named=bool(named)) for name, parameter in zip(saved, names, strict=True)
        }
    return {module: found[module] for module in modules}


def _unwrapped(module: str) -> str:
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module.replace(f"{_WRAPPED}.", ".")


def _parameters(module: str, config: AdapterConfig) -> list[str]:
    """The parameters of a module that `target_parameters` names; those named with their module come first."""
    split = [name.rpartition(".") for name in config.target_parameters]
    own = [leaf for path, _, leaf in split if path and (module == path or module.endswith(f".{path}"))]
    if own or any(_matches(module, target) for target in config.target_modules):
        return sorted(set(own))
    return sorted({leaf for path, _, leaf in split if not path})


def _matches(module: str, target: str) -> bool:
    if module == target or module.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, module) is not None
    except re.error:
        return False


def _ordered(parameters: list[str], count: int, where: str) -> list[str]:
    """The parameters of the `count` layers of a module, innermost first; "weight" is that of the module itself."""
    if count == 1 and len(parameters) < 2:
        return parameters or ["weight"]
    if count != len(parameters):
        cause = f"it has {count} layers, and target_parameters names {len(parameters)} of its parameters: {parameters}"
        fix = "Name the parameters together with their module, as mlp.experts.down_proj, in adapter_config.json"
        raise CheckpointError(cause, where=where, fix=fix)
    if unknown := [name for name in parameters if name not in _ORDER]:
        cause = f"which of its {count} layers belongs to the parameter {unknown[0]} is not known"
        raise CheckpointError(cause, where=where, fix="Merge it into its base with PEFT's merge_and_unload first")
    return sorted(parameters, key=_ORDER.index)


def _target(module: str, parameter: str, *, named: bool) -> Target:
    name = f"{module}.{parameter}"
    if parameter == "weight":  # a module that is named as such has patterns of its own name
        return Target(module, name if named else module)
    return Target(name, name, parameter=True)
