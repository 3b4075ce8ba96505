"""Small models whose relations are known: a base, experts near it, and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from models import State, decoder_config, decoder_state, perturbed, save_state

WIDTH, ROWS, LAYERS = 16, 24, 3
TOKENS = [f"t{number}" for number in range(ROWS - 4)]


def base_state(*, tied: bool = True, seed: int = 0, rows: int = ROWS) -> State:
    return decoder_state(layers=LAYERS, rows=rows, tied=tied, width=WIDTH, seed=seed)


def config(*, tied: bool = True, rows: int = ROWS, **keys: Any) -> dict[str, Any]:
    return decoder_config(layers=LAYERS, rows=rows, tied=tied, **keys)


def tokenizer(tokens: list[str] | None = None) -> str:
    """A `tokenizer.json` whose tokens are words, at the rows they are listed in."""
    rows = {token: row for row, token in enumerate(TOKENS if tokens is None else tokens)}
    return Tokenizer(WordLevel(rows, unk_token=next(iter(rows)))).to_str()


def save(
    path: Path, state: State, *, tokens: list[str] | None = None, files: dict[str, Any] | None = None, **keys: Any
) -> Path:
    """A folder with a model, a tokenizer and other JSON files."""
    texts = {
        name: content if isinstance(content, str) else json.dumps(content) for name, content in (files or {}).items()
    }
    return save_state(path, state, config(**keys), **{"tokenizer.json": tokenizer(tokens), **texts})


def family(folder: Path, count: int = 2, *, scale: float = 0.05) -> tuple[Path, list[Path]]:
    """A base, and experts with independent changes of a known relative size."""
    state = base_state()
    experts = [save(folder / f"expert-{n}", perturbed(state, n + 1, scale=scale)) for n in range(count)]
    return save(folder / "base", state), experts


def low_rank(state: State, seed: int, rank: int = 1, scale: float = 0.05) -> State:
    """The state with a change of low rank in every matrix of the layers."""
    chance = torch.Generator().manual_seed(seed)
    changed = dict(state)
    for name, tensor in state.items():
        if tensor.ndim == 2 and "layers" in name:
            left = torch.randn(tensor.shape[0], rank, generator=chance)
            changed[name] = tensor + scale * left @ torch.randn(rank, tensor.shape[1], generator=chance)
    return changed


def codes(diagnosis: Any, *levels: str) -> list[str]:
    """The codes of what was found, of some levels."""
    return [finding.code for finding in diagnosis.findings if not levels or finding.level in levels]


def only(diagnosis: Any, code: str) -> Any:
    """The one finding of that code."""
    (found,) = [finding for finding in diagnosis.findings if finding.code == code]
    return found
