"""Whether two models are the same one, without keeping both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weldment.evaluation.states import ModelState

if TYPE_CHECKING:
    from torch import Tensor


def model_digest(state: ModelState) -> str:
    """Equal for models that give the same answers: of all tensors and heads, the configuration and the tokenizer."""
    from weldment.evaluation.predicting import tokenizer_digest

    digest = hashlib.sha256(tokenizer_digest(state.folder).encode())
    parts: dict[str, Mapping[str, Tensor]] = {"": state.tensors}
    parts |= {name: head.tensors for name, head in state.heads.items()}
    configs = [state.config, *(head.config for head in state.heads.values())]
    digest.update(json.dumps(configs, sort_keys=True, default=str).encode())
    for part, tensors in sorted(parts.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{part}|{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
