"""Bases and adapters of a few tensors in folders, and what two sets of tensors have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

BASE: Shapes = {
    "model.embed_tokens.weight": (12, 4),
    "model.layers.0.q.weight": (6, 4),
    "model.layers.0.q.bias": (6,),
    "model.layers.0.square.weight": (4, 4),
    "lm_head.weight": (12, 4),
}
Q = "model.layers.0.q"
LORA: Shapes = {f"{Q}.lora_A.weight": (2, 4), f"{Q}.lora_B.weight": (6, 2)}
CONFIG = {"model_type": "llama", "vocab_size": 12, "architectures": ["LlamaForCausalLM"]}


def draw(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def base(folder: Path, shapes: Shapes = BASE, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(draw(shapes, 0), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def adapter(folder: Path, shapes: Shapes = LORA, *, seed: int = 1, **config: Any) -> Path:
    folder.mkdir(parents=True)
    prefixed = {f"base_model.model.{name}": value for name, value in draw(shapes, seed).items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def tokenizer(folder: Path, *tokens: str) -> None:
    vocabulary = {token: row for row, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 2e-6) -> None:
    """The same tensors, up to rounding relative to the largest element."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.2e}"
