"""Make checkpoints of real shapes with random weights: a base and experts fine-tuned from it.

    python benchmarks/make_checkpoints.py FOLDER --shape llama-1b --experts 3

Writes FOLDER/base and FOLDER/expert-0, ...: Hugging Face folders with sharded safetensors. The
experts are the base plus normal noise of a tenth of its size, rounded to bfloat16, so that deltas
have the many equal magnitudes that real ones have.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import torch

SHAPES = {
    "tiny": {"hidden": 64, "inner": 176, "layers": 4, "heads": 4, "kv": 2, "vocab": 512, "tied": True},
    "llama-300m": {"hidden": 1024, "inner": 4096, "layers": 12, "heads": 16, "kv": 8, "vocab": 128256, "tied": True},
    "llama-1b": {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab": 128256, "tied": True},
    "llama-8b": {"hidden": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128256, "tied": False},
}
SHARD = 10**9


def config(shape: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "head_dim": shape["hidden"] // shape["heads"],
        "vocab_size": shape["vocab"],
        "tie_word_embeddings": shape["tied"],
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def tensors(shape: dict[str, int]) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape["hidden"], shape["inner"]
    kv = hidden // shape["heads"] * shape["kv"]
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (shape["vocab"], hidden))]
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}."
        found += [
            (prefix + "input_layernorm.weight", (hidden,)),
            (prefix + "self_attn.q_proj.weight", (hidden, hidden)),
            (prefix + "self_attn.k_proj.weight", (kv, hidden)),
            (prefix + "self_attn.v_proj.weight", (kv, hidden)),
            (prefix + "self_attn.o_proj.weight", (hidden, hidden)),
            (prefix + "post_attention_layernorm.weight", (hidden,)),
            (prefix + "mlp.gate_proj.weight", (inner, hidden)),
            (prefix + "mlp.up_proj.weight", (inner, hidden)),
            (prefix + "mlp.down_proj.weight", (hidden, inner)),
        ]
    found.append(("model.norm.weight", (hidden,)))
    return found if shape["tied"] else [*found, ("lm_head.weight", (shape["vocab"], hidden))]


def values(name: str, shape: tuple[int, ...], model: int) -> torch.Tensor:
    """The base's (model -1) or an expert's values, the same whenever they are made again."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    base = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
    if model < 0:
        return base
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{model}".encode()))
    return (base.float() + torch.randn(shape, generator=generator).mul_(0.002)).bfloat16()


def groups(listed: list[tuple[str, tuple[int, ...]]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    found: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, shape in listed:
        size = 2 * torch.Size(shape).numel()
        if found[-1] and used + size > SHARD:
            found.append([])
            used = 0
        found[-1].append((name, shape))
        used += size
    return found


def write(folder: Path, shape: dict[str, int], model: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    parts = groups(tensors(shape))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: values(name, size, model) for name, size in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys((name for name, _ in part), file))
    if len(parts) > 1:
        total = sum(2 * torch.Size(size).numel() for _, size in tensors(shape))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make checkpoints of real shapes with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--experts", type=int, default=3)
    options = parser.parse_args()
    for model in range(-1, options.experts):
        name = "base" if model < 0 else f"expert-{model}"
        write(options.folder / name, SHAPES[options.shape], model)


if __name__ == "__main__":
    main()
