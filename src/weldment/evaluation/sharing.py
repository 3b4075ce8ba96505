"""Networks for one model after another: their heads share one backbone, in which models replace each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from weldment.evaluation.networks import (
    classifier_class,
    config_of,
    is_of_head,
    load,
    quiet_transformers,
    refuse_misfits,
    with_head,
    without_data,
    writer_class,
)
from weldment.evaluation.states import Head, ModelState, Tensors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_SAYS_NOTHING = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache")
"""Keys of configurations that change no logits of a classifier."""


class Networks:
    """Networks for one model after another.

    The first model is loaded as transformers loads it. Where the next ones have the same configuration and the
    same tensors, these are copied into the networks that are there; all others are loaded anew.

    Args:
        device: where they run.
        dtype: of the arithmetic.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._device = torch.device(device)
        self._dtype = dtype
        self._state: ModelState | None = None
        self._networks: dict[str, PreTrainedModel] = {}
        self._backbone: PreTrainedModel | None = None
        self._kind: dict[str, Any] = {}
        self._writer: PreTrainedModel | None = None
        self._lent: set[str] = set()

    def use(self, state: ModelState) -> None:
        """From now on the networks are those of this model."""
        if state is self._state:
            return
        self._state = self._writer = None
        self._lent = set()
        if self._backbone is None or not self._replaced(self._backbone, state):
            self._networks.clear()
            self._backbone = None
        self._state = state

    def classifier(self, head: Head) -> PreTrainedModel:
        """The model with a head, ready to classify until a head of the same kind is asked for.

        Raises:
            TaskError: the model and the head do not make a whole network.
        """
        assert self._state is not None
        with quiet_transformers():
            content = with_head(self._state.config, head.config)
            key = json.dumps(content, sort_keys=True)
            if key not in self._networks:
                self._networks[key] = self._built(self._state, head, content)
        network = self._networks[key]
        with torch.no_grad():
            for name, target in _own(network).items():
                target.copy_(head.tensors[name])
            if _backbone_of(network) is self._backbone:
                self._lend(head, self._state)
        return network

    def _lend(self, head: Head, state: ModelState) -> None:
        """Put what a head has of the backbone (a pooler of its own) there, and take back what other heads had put."""
        assert self._backbone is not None
        kept, own = _spelled(self._backbone, head.tensors), _spelled(self._backbone, state.tensors)
        inside = self._backbone.state_dict()
        for name in kept:
            inside[name].copy_(head.tensors[kept[name]])
        for name in self._lent - set(kept):
            if name in own:
                inside[name].copy_(state.tensors[own[name]])
        self._lent = set(kept)

    def writer(self) -> PreTrainedModel:
        """The model as one that writes text.

        Raises:
            TaskError: it is not of such a kind.
        """
        assert self._state is not None
        if self._writer is None:
            state = self._state
            with quiet_transformers():
                config = config_of(state.config, state.name)
                network = load(writer_class(config, state.name), config, state.tensors, state.name, self._dtype)
            self._writer = writer = self._ready(network)
            return writer
        return self._writer

    def _replaced(self, backbone: PreTrainedModel, state: ModelState) -> bool:
        """Whether the model's tensors are those of the networks now."""
        names = names_of(backbone, state.tensors)
        with quiet_transformers():
            if names is None or _kind_of(config_of(state.config, state.name)) != self._kind:
                return False
        with torch.no_grad():
            for name, target in backbone.state_dict().items():
                target.copy_(state.tensors[names[name]])
        shared = {key: network for key, network in self._networks.items() if _backbone_of(network) is backbone}
        self._networks = shared
        return True

    def _built(self, state: ModelState, head: Head, content: Mapping[str, Any]) -> PreTrainedModel:
        config = config_of(content, state.name)
        kind = classifier_class(config, state.name)
        blank = without_data(kind, config, state.name)
        refuse_misfits(kind, _own(blank), head.tensors, state.name)
        if self._backbone is not None and _is_around(blank, self._backbone):
            return self._ready(blank)
        # What is loaded may be the very tensors of the model, and other models will replace them.
        tensors = {name: tensor.clone() for name, tensor in {**state.tensors, **head.tensors}.items()}
        network = self._ready(load(kind, config, tensors, state.name, self._dtype))
        if self._backbone is None:
            self._backbone, self._kind = _backbone_of(network), _kind_of(config_of(state.config, state.name))
        return network

    def _ready(self, network: torch.nn.Module) -> Any:
        return network.to(device=self._device, dtype=self._dtype).eval()


def names_of(backbone: PreTrainedModel, tensors: Tensors) -> dict[str, str] | None:
    """For each tensor of a network, the name of a model's tensor that belongs there; None if one is missing."""
    found = _spelled(backbone, tensors)
    return found if len(found) == len(backbone.state_dict()) else None


def _spelled(backbone: PreTrainedModel, tensors: Tensors) -> dict[str, str]:
    """For each tensor of a network that is among others, how it is spelled there: with the network's prefix or not."""
    found: dict[str, str] = {}
    for name, target in backbone.state_dict().items():
        for spelling in (name, f"{backbone.base_model_prefix}.{name}"):
            if spelling in tensors and tensors[spelling].shape == target.shape:
                found.setdefault(name, spelling)
    return found


def _kind_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a configuration says of the backbone; models that differ in it are different networks."""
    content = config.to_dict()
    return {key: value for key, value in content.items() if key not in _SAYS_NOTHING and not is_of_head(key)}


def _backbone_of(network: PreTrainedModel) -> Any:
    return getattr(network, network.base_model_prefix, None)


def _own(network: PreTrainedModel) -> dict[str, Tensor]:
    """What a network has besides its backbone, by name."""
    prefix = f"{network.base_model_prefix}."
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(prefix)}


def _is_around(network: PreTrainedModel, backbone: PreTrainedModel) -> bool:
    """Give a network without data a backbone that others have too, and a head to be filled, if its kind allows it."""
    if type(_backbone_of(network)) is not type(backbone):
        return False
    setattr(network, network.base_model_prefix, backbone)
    own = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in _own(network).items()}
    network.load_state_dict(own, strict=False, assign=True)
    return not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
