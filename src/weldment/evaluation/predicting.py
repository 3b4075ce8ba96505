"""What a network answers: texts to batches of tokens, sorted by length, to logits."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weldment.errors import NonFiniteError, TaskError
from weldment.evaluation.tasks import Split

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 64
"""Examples of a batch."""

TOKENS = 2048
"""Of a batch on the CPU, where larger ones are not faster, and every worker has one."""


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


def encode(tokenizer: PreTrainedTokenizerBase, split: Split, max_length: int, *, name: str = "") -> Encoded:
    """The tokens of all examples.

    Args:
        max_length: tokens after which an example is cut.
        name: of the task.

    Raises:
        TaskError: an example has no tokens, as empty texts have where the tokenizer puts nothing around them.
    """
    pairs = None if split.pairs is None else list(split.pairs)
    found = tokenizer(list(split.texts), pairs, truncation=True, max_length=max_length)
    names = list(found)
    rows = [{name: found[name][place] for name in names} for place in range(len(split))]
    lengths = np.array([len(row["input_ids"]) for row in rows])
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        cause = f"{len(empty)} of {len(split)} examples have no tokens, first number {empty[0] + 1}"
        raise TaskError(cause, where=name or None, fix="Remove examples without text")
    order = np.argsort(-lengths, kind="stable")
    return Encoded(tuple(rows[place] for place in order), order)


def logits(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    *,
    name: str = "",
    batch: int = BATCH,
    report: Callable[[int], None] = lambda count: None,
) -> ndarray:
    """What a classifier says of each example, in the order of the split: (n, classes).

    Args:
        name: of the model.
        report: called with the number of examples that were done since the last call.

    Raises:
        TaskError: texts cannot be padded.
        NonFiniteError: an answer is NaN or infinite.
    """
    taken = inspect.signature(network.forward).parameters

    def read(inputs: Mapping[str, Any]) -> Tensor:
        return network(**{name: inputs[name] for name in inputs if name in taken}).logits

    out = read_in_batches(network, tokenizer, encoded, read, name=name, batch=batch, report=report)
    if not np.isfinite(out).all():
        cause = f"answers NaN or infinity to {np.count_nonzero(~np.isfinite(out).all(axis=1))} of {len(out)} examples"
        fix = "Its activations overflow: use float32, or merge with smaller weights"
        raise NonFiniteError(cause, where=name, fix=fix)
    return out


def read_in_batches(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    read: Callable[[Mapping[str, Any]], Tensor],
    *,
    name: str = "",
    batch: int = BATCH,
    report: Callable[[int], None] = lambda count: None,
    workers: int | None = None,
) -> ndarray:
    """What is read off a network for each example, in the order of the split: (n, ...), float32.

    Args:
        read: from a padded batch to a tensor with a row for each example; called in inference mode, by several
            threads on the CPU.
        name: of the model.
        report: called with the number of examples that were done since the last call.
        workers: threads that call `read`; with 1, batches come in the order of `encoded`. By default as many as torch
            has on the CPU, 1 elsewhere.

    Raises:
        TaskError: texts cannot be padded.
    """
    _agree_on_padding(network, tokenizer, name)

    def answer(rows: list[dict[str, Any]]) -> ndarray:
        inputs = tokenizer.pad(rows, return_tensors="pt").to(network.device)
        with torch.inference_mode():
            return read(inputs).float().cpu().numpy()

    parts: list[ndarray] = []
    on_cpu = network.device.type == "cpu"
    with _mapped(workers or (torch.get_num_threads() if on_cpu else 1)) as mapped:
        for part in mapped(answer, _batches(encoded.inputs, batch, TOKENS if on_cpu else None)):
            parts.append(part)
            report(len(part))
    out = np.empty((len(encoded), *parts[0].shape[1:]), dtype=np.float32)
    out[encoded.places] = np.concatenate(parts)
    return out


@contextmanager
def _mapped(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, by workers with one thread each.

    Workers need not wait for each other after every operation, as threads do that share one, and a
    batch's answers do not depend on how many there are.
    """
    if workers == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(workers, "weld", torch.set_num_threads, (1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(workers)


def _batches(rows: Sequence[dict[str, Any]], batch: int, tokens: int | None) -> Iterator[list[dict[str, Any]]]:
    """Rows that are read together, of those with the longest first: not more than some tokens, but always one row."""
    start = 0
    while start < len(rows):
        fitting = batch if tokens is None else max(1, min(batch, tokens // len(rows[start]["input_ids"])))
        yield list(rows[start : start + fitting])
        start += fitting


def _agree_on_padding(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Decoders look for the last token before the padding, and may know the token that the tokenizer does not name."""
    known = getattr(network.config, "pad_token_id", None)
    if tokenizer.pad_token is None and known is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
    if tokenizer.pad_token is None:
        fix = "Write `pad_token_id` into config.json, as it was when the head was trained"
        raise TaskError("neither its tokenizer nor its config.json names a token for padding", where=name, fix=fix)
    if known is None:
        network.config.pad_token_id = tokenizer.pad_token_id


def longest(tokenizer: PreTrainedTokenizerBase, network: PreTrainedModel, wanted: int | None) -> int:
    """Tokens after which texts are cut: what the network and the tokenizer can take, or fewer if that is wanted."""
    positions = positions_of(network) or 1 << 20
    return min(wanted or positions, positions, tokenizer.model_max_length)


def positions_of(network: PreTrainedModel) -> int | None:
    """How many tokens a network has positions for; None if its configuration names no limit."""
    positions = getattr(network.config, "max_position_embeddings", None)
    if positions is not None and network.config.model_type in _OFFSET:
        positions -= (getattr(network.config, "pad_token_id", None) or 0) + 1
    return positions


_OFFSET = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text", "xmod"})
"""Kinds of models whose positions begin after the padding token's."""


def tokenizer_digest(folder: Path | None) -> str:
    """Tells tokenizers apart by their files; those that are only written differently, too."""
    digest = hashlib.sha256()
    for name in _TOKENIZERS:
        if folder is not None and (folder / name).is_file():
            digest.update(f"{name}\n".encode() + (folder / name).read_bytes())
    return digest.hexdigest()


_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
