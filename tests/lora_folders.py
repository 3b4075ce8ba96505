"""Small LoRA adapters in folders, written and read without the product."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."
SIZES = {"q_proj": (12, 8), "v_proj": (6, 8), "up_proj": (20, 8)}
MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]


def write_lora(
    folder: Path,
    *,
    modules: Mapping[str, tuple[int, int]] | None = None,
    rank: int = 2,
    alpha: float = 4.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    more: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """An adapter with random A and B; `more` are tensors by their names after the prefix."""
    draw = torch.Generator().manual_seed(seed)
    sizes = modules if modules is not None else {name: SIZES[name.rpartition(".")[2]] for name in MODULES}
    tensors: dict[str, Tensor] = {}
    for module, (outputs, inputs) in sizes.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw)
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=draw)
    tensors |= more or {}
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
        "target_modules": sorted({name.rpartition(".")[2] for name in sizes}),
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"{PREFIX}{name}": tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`."""
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by their names after the prefix."""
    return {
        name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


def deltas(folder: Path) -> dict[str, Tensor]:
    """scale * B A of every module in float64, as matrices, with ranks from the shapes and alphas as PEFT finds them."""
    config, tensors = config_of(folder), tensors_of(folder)
    found: dict[str, Tensor] = {}
    for name, a in tensors.items():
        for kind, last in (("lora_A", ".weight"), ("lora_embedding_A", "")):
            if not name.endswith(f".{kind}{last}"):
                continue
            module = name.removesuffix(f".{kind}{last}")
            b = tensors[f"{module}.{kind[:-1]}B{last}"]
            alpha = next(
                (value for key, value in (config.get("alpha_pattern") or {}).items() if _fits(key, module)),
                config["lora_alpha"],
            )
            rank = a.shape[0]
            scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
            found[module] = scale * (b.double().flatten(1) @ a.double().flatten(1))
    return found


def _fits(key: str, module: str) -> bool:
    plain = key.replace("\\", "")
    return module == plain or module.endswith(f".{plain}")


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative difference, in the Frobenius norm, of changes by module."""
    assert found.keys() == wanted.keys()
    return max((float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp(min=1e-30)) for n in wanted), default=0.0)


def adapters_recipe(method: str, *folders: Path, **keys: Any) -> dict[str, Any]:
    """A recipe; `weight` lists are spread over the models."""
    weights = keys.pop("weight", None)
    models = [{"model": str(folder)} for folder in folders]
    if isinstance(weights, list):
        models = [{**m, "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    return {"merge_method": method, "models": models, **keys}
