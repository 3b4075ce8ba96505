"""LoRA layers of a model in memory: their factors read, combined and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from weldment.adapters.peft.combination import TYPES, combine_layer
from weldment.errors import NonFiniteError, UserError
from weldment.recipe.recipe import Combination

if TYPE_CHECKING:
    from torch import Tensor

_LAYERS = {
    "ParamWrapper": "adapts a parameter of its own (target_parameters)",
    "MultiheadAttention": "adapts nn.MultiheadAttention, two layers in one",
}
"""Classes of PEFT's layers whose factors do not stand for one matrix."""


@dataclass(frozen=True)
class MergedLayer:
    """One merged layer: B (outputs, r), A (r, inputs), and the bias of B if an adapter has one."""

    b: Tensor
    a: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def lora_layers(tuner: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of every LoRA layer of a `LoraModel`."""
    from peft.tuners.lora import LoraLayer

    for name, module in tuner.model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def has_adapter(layer: Any, adapter: str) -> bool:
    """Whether an adapter changes a layer."""
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def combined(
    module: str, layer: Any, adapters: Sequence[str], weights: Sequence[float], combination: Combination, seed: int
) -> MergedLayer:
    """The merged layer of one module, in the dtype and on the device of its adapters' factors.

    Raises:
        UserError: a layer cannot be merged.
        NonFiniteError: the merged values are too large for the dtype.
    """
    found = {name: _factors(module, layer, name) for name in adapters if has_adapter(layer, name)}
    exact = [
        (_exact(found[name][0]), _exact(found[name][1]), layer.scaling[name]) if name in found else None
        for name in adapters
    ]
    b, a = combine_layer(combination, exact, weights, seed=seed, name=module)
    bias = _bias(module, layer, adapters, weights, combination)
    factors = [factor for pair in found.values() for factor in pair]
    dtype, device = reduce(torch.promote_types, [factor.dtype for factor in factors]), factors[0].device

    def stored(x: Tensor) -> Tensor:
        x = x.to(dtype).to(device)
        if not bool(x.isfinite().all()):
            cause = f"the merged values do not fit into {dtype}"
            raise NonFiniteError(cause, where=module, fix="Use smaller weights, or adapters in float32")
        return x

    return MergedLayer(stored(b), stored(a), None if bias is None else stored(bias))


def write(layer: Any, adapter: str, merged: MergedLayer) -> None:
    """Give an adapter of a layer its values, frozen; a bias that they do not have becomes 0."""
    b, a, bias = _parameters(layer, adapter)
    pairs = [(b, merged.b), (a, merged.a)]
    if bias is not None:
        pairs.append((bias, merged.b.new_zeros(bias.shape) if merged.bias is None else merged.bias))
    for parameter, values in pairs:
        parameter.data = values.contiguous().view(parameter.shape)
        parameter.requires_grad_(False)


def _parameters(layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """B, A and the bias of B, as the layer holds them."""
    if adapter in layer.lora_A:
        b = layer.lora_B[adapter]
        return b.weight, layer.lora_A[adapter].weight, b.bias
    return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter], None


def _factors(module: str, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a layer as matrices.

    Raises:
        UserError: they are not the whole of what the adapter does, or not numbers.
    """
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    b, a = (x.detach().flatten(1) for x in _parameters(layer, adapter)[:2])
    cause = None
    if variant is not None:
        cause = f"the layer is of the variant {type(variant).__name__}"
    elif type(layer).__name__ in _LAYERS:
        cause = f"the layer {_LAYERS[type(layer).__name__]}"
    elif b.shape[1] != a.shape[0]:
        cause = "the convolution has groups"
    elif b.is_meta or a.is_meta:
        cause = "the weights are not in memory"
    elif not bool(b.isfinite().all() and a.isfinite().all()):
        cause = "the weights are not finite"
    if cause is not None:
        raise UserError(f"{cause}: it cannot be merged", where=f"adapter {adapter!r}, {module}", fix="Leave it out")
    return b, a


def _exact(x: Tensor) -> Tensor:
    """In float64, which Apple's graphics processors do not have."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _bias(
    module: str, layer: Any, adapters: Sequence[str], weights: Sequence[float], combination: Combination
) -> Tensor | None:
    """sum_i w_i s_i b_i of the biases b_i that the layers' B have, or None if none has one."""
    parts: list[Tensor] = []
    for name, weight in zip(adapters, weights, strict=True):
        bias = _parameters(layer, name)[2] if has_adapter(layer, name) else None
        if bias is None:
            continue
        if len(adapters) > 1 and TYPES[combination.type].trim != "none":
            cause = f"{combination.type} has no meaning for the biases of lora_bias"
            raise UserError(cause, where=f"adapter {name!r}, {module}", fix="Use linear, cat or svd")
        parts.append(_exact(bias.detach()) * (weight * layer.scaling[name]))
    return torch.stack(parts).sum(0) if parts else None
