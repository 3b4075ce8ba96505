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


def perturbed(state: Mapping[str, Tensor], seed: int, *, scale: float = 0.05) -> State:
    """A state dict near another one: floating-point tensors get noise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in state.items()
    }


@dataclass(frozen=True)
class Family:
    """A base and two experts in folders, as transformers saved them."""

    base: Path
    experts: tuple[Path, Path]

    @property
    def all(self) -> tuple[Path, Path, Path]:
        return (self.base, *self.experts)


def save_family(architecture: Architecture, folder: Path, dtype: torch.dtype = torch.float32) -> Family:
    """Save a base and two experts that differ from it a little."""
    torch.manual_seed(0)
    model = architecture.build().to(dtype)
    model.save_pretrained(folder / "base")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for number in (1, 2):
        changed = perturbed(start, number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(changed[name])
        model.save_pretrained(folder / f"expert-{number}")
    return Family(folder / "base", (folder / "expert-1", folder / "expert-2"))


def save_state(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, **files: str) -> Path:
    """Save a state dict as a model folder, with a config and other files by their names."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors", {"format": "pt"}
    )
    if config is not None:
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


def read_state(folder: Path) -> State:
    """All tensors of a model folder, whatever its shards."""
    states: Iterable[State] = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {name: tensor for state in states for name, tensor in state.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def loaded(architecture: Architecture, folder: Path) -> PreTrainedModel:
    """The model in a folder; fails if transformers misses a key, finds one too many or one of another shape."""
    cls = getattr(transformers, architecture.model)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value and key != "error_msgs"}
    assert not problems, problems
    return model.eval()


def outputs(architecture: Architecture, model: PreTrainedModel) -> Tensor:
    """The first floating-point output of a forward pass."""
    with torch.no_grad():
        found = model(**architecture.inputs())
    logits = found.get("logits", found.get("logits_per_image"))
    assert logits is not None
    return logits


def recipe(method: str, *models: Path, base: Path | None = None, **keys: Any) -> dict[str, Any]:
    """A recipe as a mapping; `keys` go to the top level."""
    written: dict[str, Any] = {"merge_method": method, "models": [{"model": str(model)} for model in models], **keys}
    return written if base is None else {**written, "base_model": str(base)}


def decoder_state(
    *, layers: int = 2, rows: int = 12, tied: bool = True, prefix: str = "model.", seed: int = 0, width: int = 4
) -> State:
    """The names of a small decoder, with few tensors in a layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (rows, width)}
    for layer in range(layers):
        shapes[f"{prefix}layers.{layer}.self_attn.q_proj.weight"] = (width, width)
        shapes[f"{prefix}layers.{layer}.mlp.up_proj.weight"] = (2 * width, width)
        shapes[f"{prefix}layers.{layer}.input_layernorm.weight"] = (width,)
    shapes[f"{prefix}norm.weight"] = (width,)
    if not tied:
        shapes["lm_head.weight"] = (rows, width)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def decoder_config(*, layers: int = 2, rows: int = 12, tied: bool = True, **keys: Any) -> dict[str, Any]:
    """A config that goes with `decoder_state`."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        **keys,
    }


def save_decoder(path: Path, *, layers: int = 2, rows: int = 12, tied: bool = True, seed: int = 0, **keys: Any) -> Path:
    """A folder with `decoder_state` and `decoder_config`; `keys` go into the config."""
    state = decoder_state(layers=layers, rows=rows, tied=tied, seed=seed)
    return save_state(path, state, decoder_config(layers=layers, rows=rows, tied=tied, **keys))


def average(*states: Mapping[str, Tensor]) -> State:
    """The mean of state dicts, in float64, rounded to their own dtypes."""
    return {
        name: (sum(state[name].double() for state in states) / len(states)).to(tensor.dtype)
        for name, tensor in states[0].items()
    }


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, exact: bool = False) -> None:
    """Two state dicts have the same names, dtypes and shapes, and values that differ by rounding at most."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        limits = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-6, "atol": 2e-7}
        torch.testing.assert_close(
            found[name], tensor, **limits, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )
