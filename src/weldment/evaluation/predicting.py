"""What a network answers: texts to batches of tokens, sorted by length, to logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weldment.evaluation.tasks import Split

if TYPE_CHECKING:
    from numpy import ndarray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 64
"""Examples of a batch."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a split.

    Attributes:
        inputs: of each example, the longest first: the network's inputs, lists by name.
        places: the examples' places in the split, in the same order.
    """

    inputs: tuple[dict[str, list[int]], ...]
    places: ndarray

    def __len__(self) -> int:
        return len(self.inputs)


def encode(tokenizer: PreTrainedTokenizerBase, split: Split, max_length: int) -> Encoded:
    """The tokens of all examples.

    Args:
        max_length: tokens after which an example is cut.
    """
    pairs = None if split.pairs is None else list(split.pairs)
    found = tokenizer(list(split.texts), pairs, truncation=True, max_length=max_length)
    names = list(found)
    rows = [{name: found[name][place] for name in names} for place in range(len(split))]
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = np.argsort(-lengths, kind="stable")
    return Encoded(tuple(rows[place] for place in order), order)


@torch.inference_mode()
def logits(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    *,
    batch: int = BATCH,
    report: Callable[[int], None] = lambda count: None,
) -> ndarray:
    """What a classifier says of each example, in the order of the split: (n, classes).

    Args:
        report: called with the number of examples that were done since the last call.
    """
    parts: list[ndarray] = []
    for rows in _batches(encoded.inputs, batch):
        inputs = tokenizer.pad(rows, return_tensors="pt").to(network.device)
        parts.append(network(**inputs).logits.float().cpu().numpy())
        report(len(rows))
    out = np.empty((len(encoded), parts[0].shape[-1]), dtype=np.float32)
    out[encoded.places] = np.concatenate(parts)
    return out


def _batches(rows: Sequence[dict[str, Any]], batch: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), batch):
        yield list(rows[start : start + batch])


def longest(tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel, wanted: int | None) -> int:
    """Tokens after which texts are cut: what the network and the tokenizer can take, or fewer if that is wanted."""
    positions = getattr(network.config, "max_position_embeddings", None) or 1 << 20
    if network.config.model_type in _OFFSET:
        positions -= (getattr(network.config, "pad_token_id", None) or 0) + 1
    return min(wanted or positions, positions, tokenizer.model_max_length)


_OFFSET = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text", "xmod"})
"""Kinds of models whose positions begin after the padding token's."""


def tokenizer_digest(folder: Path | None) -> str:
    """Tells tokenizers apart by the files that say which tokens there are."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"):
        if folder is not None and (folder / name).is_file():
            digest.update((folder / name).read_bytes())
            break
    return digest.hexdigest()
