"""Tiny models for tests: real ones with random weights, and plain state dicts in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

State = dict[str, Tensor]

VOCABULARY = 96
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def token_inputs() -> dict[str, Tensor]:
    """Two short texts."""
    return {"input_ids": torch.arange(3, 19).reshape(2, 8)}


def encoder_decoder_inputs() -> dict[str, Tensor]:
    """Two short texts and the beginning of their translations."""
    return {**token_inputs(), "decoder_input_ids": torch.tensor([[0, 5], [0, 6]])}


def pixels() -> Tensor:
    """Two small images."""
    return torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, a tiny config of it, and inputs for a forward pass."""

    model: str
    config: str
    settings: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = token_inputs
    parts: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None

    def make_config(self) -> PretrainedConfig:
        """The config, with those of its parts."""
        parts = {key: getattr(transformers, name)(**settings) for key, (name, settings) in (self.parts or {}).items()}
        return getattr(transformers, self.config)(**self.settings, **parts)

    def build(self, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """A model with random weights, in evaluation mode."""
        return getattr(transformers, self.model)(config or self.make_config()).eval()


def _image_and_text() -> dict[str, Tensor]:
    return {**token_inputs(), "pixel_values": pixels()}


def _image_in_text() -> dict[str, Tensor]:
    """One text for each image; token 95 stands for the 4 patches."""
    tokens = token_inputs()["input_ids"].clone()
    tokens[:, 2:6] = VOCABULARY - 1
    return {"input_ids": tokens, "pixel_values": pixels(), "attention_mask": torch.ones_like(tokens)}


BERT = {**TEXT, "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", GROUPED),
    "gemma": Architecture("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "mixtral": Architecture(
        "MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "bert": Architecture("BertForMaskedLM", "BertConfig", BERT),
    "roberta": Architecture("RobertaForMaskedLM", "RobertaConfig", BERT),
    "deberta_v3": Architecture(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {
            **BERT,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 16,
            "type_vocab_size": 0,
        },
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        encoder_decoder_inputs,
    ),
    "vit": Architecture(
        "ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 3}, lambda: {"pixel_values": pixels()}
    ),
    "clip": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {"projection_dim": 16},
        _image_and_text,
        {"text_config": ("CLIPTextConfig", {**TEXT, "eos_token_id": 2}), "vision_config": ("CLIPVisionConfig", VISION)},
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4},
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"image_token_index": VOCABULARY - 1, "vision_feature_layer": -1},
        _image_in_text,
        {"text_config": ("LlamaConfig", GROUPED), "vision_config": ("CLIPVisionConfig", VISION)},
    ),
}
