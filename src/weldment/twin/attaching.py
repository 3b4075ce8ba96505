"""The exclusive parts in a bundle's files, put into the modules of a network of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weldment.adapters.adapter import Layer
from weldment.adapters.loading import factors
from weldment.adapters.opening import open_adapter_folder
from weldment.checkpoint.local import tensor_entries, weight_file
from weldment.errors import CheckpointError
from weldment.twin.bundle import Bundle, ExpertPart
from weldment.twin.layers import Exclusive, ExclusiveMatrix, ExclusiveVectors, Pair
from weldment.twin.mixing import Mix, blend_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from weldment.twin.heads import Chosen

_EXCLUDE = "Build the bundle with this module under `exclude`"


@dataclass
class Parts:
    """What the experts add to one module, by the places of the experts."""

    factors: dict[int, Pair] = field(default_factory=dict)
    changes: dict[str, dict[int, Tensor]] = field(default_factory=dict)


def attach(network: PreTrainedModel, bundle: Bundle, mix: Mix) -> tuple[Exclusive, ...]:
    """Put the exclusive parts of all experts into the network.

    Raises:
        CheckpointError: a file is damaged, belongs to another network, or changes something that cannot have a value of
            its own for each row of a batch.
    """
    found: dict[str, Parts] = {}
    for place, expert in enumerate(bundle.experts):
        for name, layer in _layers(expert).items():
            found.setdefault(_module_name(network, name, expert), Parts()).factors[place] = _scaled(layer)
        for name, change in _changes(expert).items():
            module, _, parameter = name.rpartition(".")
            owner = _user_of(network, _module_name(network, module, expert), parameter)
            parts = found.setdefault(owner, Parts())
            parts.changes.setdefault(parameter, {})[place] = change
    _tie(network, found)
    layers = [_layer(network, name, parts, mix, len(bundle.experts)) for name, parts in found.items()]
    for layer in layers:
        layer.attach(network.get_submodule(layer.name))
    return tuple(layers)


def _layers(expert: ExpertPart) -> Mapping[str, Layer]:
    if expert.adapter is None:
        return {}
    adapter = open_adapter_folder(expert.adapter, expert.name)
    for layer in adapter.layers.values():
        odd = "is a stack of experts" if layer.parameter else "has DoRA's magnitudes" if layer.magnitude else None
        odd = odd or ("has a bias beside its factors" if layer.bias else None)
        if odd is not None:
            raise CheckpointError(f"the change {odd}", where=f"{expert.name}: {layer.module}", fix=_EXCLUDE)
    return adapter.layers


def _scaled(layer: Layer) -> Pair:
    b, a = factors(layer, torch.float32)
    return a, b * layer.scale


def _changes(expert: ExpertPart) -> dict[str, Tensor]:
    return {} if expert.changes is None else read_tensors(expert.changes)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors.torch import load_file

    tensor_entries(weight_file(path, path.name), path)
    return load_file(path)


def _module_name(network: PreTrainedModel, name: str, expert: ExpertPart) -> str:
    """How the network calls a module that the shared model calls `name`: with the prefix of backbones, or without."""
    prefix = f"{network.base_model_prefix}."
    names = {module for module, _ in network.named_modules()}
    for spelling in (name, prefix + name, name.removeprefix(prefix)):
        if spelling in names:
            return spelling
    cause = f"{type(network).__name__} has no module {name!r}, which the expert {expert.name!r} changes"
    raise CheckpointError(cause, where=str(expert.adapter or expert.changes), fix="Load it with the class it is of")


def _user_of(network: PreTrainedModel, name: str, parameter: str) -> str:
    """The module that calculates with a parameter: one within it, where it only lends the parameter to that.

    The heads of masked language models hold the bias of their linear layer.
    """
    module = network.get_submodule(name)
    own = getattr(module, parameter, None)
    for inner, child in module.named_modules():
        if inner and own is not None and getattr(child, parameter, None) is own:
            return f"{name}.{inner}"
    return name


def _tie(network: PreTrainedModel, found: dict[str, Parts]) -> None:
    """Give an output layer what changes the embedding that it shares its weight with."""
    inputs, outputs = network.get_input_embeddings(), network.get_output_embeddings()
    if outputs is None or getattr(outputs, "weight", None) is not getattr(inputs, "weight", None):
        return
    names = {id(module): name for name, module in network.named_modules()}
    source, target = names[id(inputs)], names[id(outputs)]
    own = found.get(target, Parts())
    if source not in found or own.factors or "weight" in own.changes:
        return
    turned = {place: (b.T, a.T) for place, (a, b) in found[source].factors.items()}
    found[target] = Parts(turned, {**own.changes, "weight": found[source].changes.get("weight", {})})


def _layer(network: nn.Module, name: str, parts: Parts, mix: Mix, experts: int) -> Exclusive:
    """The layer for one module.

    Raises:
        CheckpointError: there is none for modules of this kind, or shapes do not fit.
    """
    module = network.get_submodule(name)
    own = dict(module.named_parameters(recurse=False))
    for key, changes in parts.changes.items():
        if key not in own or any(change.shape != own[key].shape for change in changes.values()):
            raise CheckpointError(f"a change of {key!r} does not fit a {type(module).__name__}", where=name)
    if _is_matrix(module):
        return _matrix(module, name, parts, mix, experts)
    alone = len(own) == len(list(module.parameters()))  # what lies within a module may have changes of its own
    if not parts.factors and alone and all(parameter.ndim == 1 for parameter in own.values()):
        return ExclusiveVectors(name, mix, experts, module=module, vectors=parts.changes)
    cause = f"a {type(module).__name__} cannot have weights of its own for each row of a batch"
    raise CheckpointError(cause, where=name, fix=_EXCLUDE)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or _is_turned(module)


def _is_turned(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is stored as (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _matrix(module: nn.Module, name: str, parts: Parts, mix: Mix, experts: int) -> ExclusiveMatrix:
    weight = module.get_parameter("weight")
    inputs, outputs = weight.shape if _is_turned(module) or isinstance(module, nn.Embedding) else weight.shape[::-1]
    for place, (a, b) in parts.factors.items():
        if (b.shape[0], a.shape[1]) != (outputs, inputs):
            cause = f"factors for {[b.shape[0], a.shape[1]]} (expert {place}) do not fit {[outputs, inputs]}"
            raise CheckpointError(cause, where=name, fix="The bundle is damaged: build it again")
    return ExclusiveMatrix(
        name,
        mix,
        experts,
        sizes=(inputs, outputs),
        factors=parts.factors,
        dense=parts.changes.get("weight"),
        vectors=parts.changes.get("bias"),
        embedding=isinstance(module, nn.Embedding),
        transposed=_is_turned(module),
    )


def prove(network: PreTrainedModel, layers: Sequence[Exclusive], mix: Mix, chosen: Chosen) -> None:
    """Run the network once on a few tokens, to see that every layer is called with inputs that tell rows apart.

    Raises:
        CheckpointError: a module's weights are used without calling it, or for all rows alike.
    """
    rows, length = 3, 5
    inputs = {"input_ids": torch.arange(rows * length, device=network.device).view(rows, length) % _words(network)}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    experts = layers[0].experts if layers else 1
    chosen.heads = torch.zeros(rows, dtype=torch.long, device=network.device)
    weights = torch.linspace(0.1, 0.9, rows * experts, device=network.device).view(rows, experts)
    try:
        with torch.inference_mode(), mix.using(blend_of(weights, length)):
            network(**inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        cause = f"a {type(network).__name__} cannot be calculated with other weights for each row: {_first_line(error)}"
        fix = "Exclude the modules that it applies to what all rows share, and build the bundle again"
        raise CheckpointError(cause, fix=fix) from error
    silent = [layer.name for layer in layers if not layer.calls]
    if silent:
        cause = f"a {type(network).__name__} reads the weights of {silent[0]} without calling it"
        raise CheckpointError(cause, where=silent[0], fix=_EXCLUDE)


def _words(network: PreTrainedModel) -> int:
    return int(network.config.get_text_config().vocab_size)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
