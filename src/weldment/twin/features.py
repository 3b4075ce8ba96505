"""What a router sees of an input: the mean of the shared model's last hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weldment.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def features(network: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """f_b = sum_l m_bl h_bl / sum_l m_bl, of the last hidden states h and the attention mask m.

    Of an encoder-decoder these are the encoder's. Decoders count positions from the first token that is not padding,
    as they do when they write.

    Args:
        inputs: of the network: `input_ids` (batch, length) or `inputs_embeds`, `attention_mask`; what the backbone does
            not take is left out.

    Returns:
        (batch, hidden), float32.

    Raises:
        UserError: there is nothing to see, or a row is padding alone.
    """
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        cause = "there are no `input_ids` to route by"
        raise UserError(cause, fix="Give them, or say who answers: `experts=[...]` or `expert_weights=`")
    backbone = network.get_encoder() if network.config.is_encoder_decoder else network.base_model
    taken = inspect.signature(backbone.forward).parameters
    given = {key: value for key, value in inputs.items() if key in taken and value is not None}
    mask = given.get("attention_mask")
    if mask is not None and "position_ids" in taken and "position_ids" not in given and network.can_generate():
        given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in taken:
        given["use_cache"] = False
    return mean_state(backbone(**given, return_dict=True).last_hidden_state, mask)


def mean_state(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over tokens: (batch, length, hidden) and (batch, length) to (batch, hidden), float32."""
    if mask is None:
        return hidden.float().mean(dim=1)
    wide = mask.to(device=hidden.device, dtype=torch.float32)[:, :, None]
    return (hidden.float() * wide).sum(dim=1) / wide.sum(dim=1).clamp(min=1.0)
