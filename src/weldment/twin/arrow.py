"""Routing without data, by the directions that the experts' factors look for (Arrow).

Source: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", ICML 2024. There every
layer of every token is routed by itself; here one decision is made for an input, from all of its tokens and modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weldment.adapters.loading import factors
from weldment.adapters.lowrank import factorised
from weldment.adapters.opening import open_adapter_folder
from weldment.errors import CheckpointError
from weldment.twin.bundle import ExpertPart
from weldment.twin.features import features
from weldment.twin.mixing import Mix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from weldment.twin.router import Router


def directions(experts: Sequence[ExpertPart]) -> dict[str, Tensor]:
    """v_t, the first right singular vector of B_t A_t, of each linear module that all experts change.

    Returns:
        (experts, inputs) by module.

    Raises:
        CheckpointError: there is no such module.
    """
    adapters = [open_adapter_folder(e.adapter, e.name) if e.adapter is not None else None for e in experts]
    tables = [{} if adapter is None else adapter.layers for adapter in adapters]
    common = [
        name
        for name, layer in tables[0].items()
        if not layer.embedding and not layer.parameter and all(name in table for table in tables)
    ]
    if not common:
        fix = "Choose another kind of router under `router.kind`"
        raise CheckpointError("an arrow router needs modules that all experts change by factors", fix=fix)
    return {name: torch.stack([_first(table[name]) for table in tables]) for name in common}


def _first(layer: Any) -> Tensor:
    b, a = factors(layer)
    found = factorised(b, a, rank=1).v
    return found[0].float() if found.shape[0] else torch.zeros(a.shape[1])


class Watch:
    """Collects how far the inputs of modules lie in the experts' directions, in one pass of the shared model."""

    def __init__(self, router: Router, mask: Tensor | None, prefix: str) -> None:
        self.router, self.mask, self.prefix = router, mask, prefix
        self.parts: list[Tensor] = []

    def __call__(self, name: str, x: Tensor) -> None:
        name = next(
            (spelling for spelling in (name, name.removeprefix(self.prefix)) if spelling in self.router.names), ""
        )
        if name and x.ndim == 3:
            self.parts.append(shares(x, self.router.tensor(name), self.mask))


def shares(x: Tensor, directions: Tensor, mask: Tensor | None) -> Tensor:
    """mean_l |v_t . x_bl| / |x_bl| over the tokens of an input: (batch, experts)."""
    x = x.float()
    cosines = (x @ directions.T).abs() / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if mask is None or mask.shape[1] != x.shape[1]:
        return cosines.mean(dim=1)
    wide = mask.to(cosines)[:, :, None]
    return (cosines * wide).sum(dim=1) / wide.sum(dim=1).clamp(min=1.0)


def standardised(parts: Sequence[Tensor]) -> Tensor:
    """s_bt: the shares averaged over modules, then less their mean over experts, by their deviation."""
    mean = torch.stack(list(parts)).mean(dim=0)
    centred = mean - mean.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)


def arrow_scores(network: PreTrainedModel, inputs: Mapping[str, Any], *, mix: Mix, router: Router) -> Tensor:
    """s (batch, experts) of a batch, from one pass in which the shared model is calculated alone."""
    watch = Watch(router, inputs.get("attention_mask"), f"{network.base_model_prefix}.")
    with mix.watched_by(watch):
        features(network, inputs)
    if not watch.parts:
        raise CheckpointError("the arrow router knows none of the modules that were calculated", where="router")
    return standardised(watch.parts)
