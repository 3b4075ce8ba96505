"""Adapters that PEFT itself makes, on models of a few layers, and what PEFT makes of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

import weldment
from adapter_folders import tensors

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
EXPERTS: dict[str, Any] = {**SIZES, "head_dim": 4, "num_hidden_layers": 1, "num_experts_per_tok": 1}


def llama(**more: Any) -> PreTrainedModel:
    """A decoder; biases and tied embeddings on request."""
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **more}))


def gpt2() -> PreTrainedModel:
    """A decoder whose layers are stored as (inputs, outputs), and whose head is tied."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16))


def bert() -> PreTrainedModel:
    """A classifier."""
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return BertForSequenceClassification(BertConfig(**{**sizes, "num_labels": 3}))


def resnet() -> PreTrainedModel:
    """Convolutions of kernels 7, 3 and 1."""
    sizes: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))


def mixtral(**more: Any) -> PreTrainedModel:
    """Experts that are one tensor in memory, (experts, outputs, inputs), and many in files."""
    return MixtralForCausalLM(MixtralConfig(**{**EXPERTS, "num_local_experts": 3, **more}))


def qwen(**more: Any) -> PreTrainedModel:
    """The same under other names."""
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**EXPERTS, "moe_intermediate_size": 6, "num_experts": 3, **more}))


def gpt_oss(**more: Any) -> PreTrainedModel:
    """Experts that are one tensor in memory and in files, (experts, inputs, outputs), some of them square."""
    return GptOssForCausalLM(GptOssConfig(**{**EXPERTS, "intermediate_size": 8, "num_local_experts": 3, **more}))


@dataclass(frozen=True)
class Pair:
    """A base and an adapter in folders.

    Attributes:
        merged: the tensors of PEFT's merge_and_unload, as a folder of the model would hold them.
        adapted: the model with the adapter on it, not merged.
    """

    base: Path
    adapter: Path
    merged: dict[str, Tensor]
    adapted: PeftModel

    @property
    def reference(self) -> str:
        return f"{self.base}+{self.adapter}"


def make(
    folder: Path,
    build: Callable[[], Any],
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    **lora: Any,
) -> Pair:
    """Save a model that `build` makes, the same every time, and an adapter of it that is drawn by `seed`."""
    torch.manual_seed(0)
    base = build().to(dtype).eval()
    if not (folder / "base").exists():
        base.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 3, **lora})).eval()
        _draw(adapted, seed)
        adapted.save_pretrained(str(folder / f"adapter-{seed}"))
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(build().to(dtype).eval(), folder / f"adapter-{seed}")
        again.merge_and_unload().save_pretrained(folder / f"merged-{seed}")
    merged = load_file(folder / f"merged-{seed}" / "model.safetensors")
    return Pair(folder / "base", folder / f"adapter-{seed}", merged, adapted)


def _draw(adapted: nn.Module, seed: int) -> None:
    """Every weight that was trained gets a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) / 4
            parameter.data += noise.to(parameter.dtype)


def merged_by_weldment(
    reference: str, out: Path, method: str = "linear", threads: int | None = None, **recipe: Any
) -> dict[str, Tensor]:
    """The tensors of a merge of one model."""
    weldment.merge({"models": [{"model": reference}], "merge_method": method, **recipe}, out, threads=threads)
    return tensors(out)
