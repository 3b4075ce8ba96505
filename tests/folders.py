"""Small models in folders, and the command line run on them in this process."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from weldment.cli import main

HIDDEN, INNER = 8, 24


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


def weld(*arguments: object) -> Result:
    """Run `weld` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            return Result(int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main returned")


def llama_shapes(layers: int = 2, vocabulary: int = 16, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    """Tensors of a tiny Llama with tied embeddings."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}mlp.up_proj.weight": (INNER, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, INNER),
        }
    return {**shapes, "model.norm.weight": (hidden,)}


def write_model(
    folder: Path,
    seed: int = 0,
    *,
    layers: int = 2,
    vocabulary: int = 16,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.bfloat16,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A tiny Llama: `config.json` and `model.safetensors`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in llama_shapes(layers, vocabulary, hidden).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_recipe(path: Path, content: Mapping[str, Any] | str) -> Path:
    """A recipe file."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(dict(content)))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in main memory; skips the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` to make a small disk with")
    if done.returncode:
        pytest.skip("only root can make a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
