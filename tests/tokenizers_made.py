"""Real tokenizers trained on a few words, and tiny networks with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedModel, PreTrainedTokenizerFast

FOX = "the quick brown fox jumps over the lazy dog and the cat sat on the mat while rain fell"
ROWS = "the model merges weights of networks and the tokens are aligned by rows in the table"
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")


def byte_level(text: str, size: int = 290) -> Tokenizer:
    """BPE on bytes, as GPT-2 and Llama 3 have it."""
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text] * 3, trainer)
    return made


def word_piece(text: str, size: int = 80) -> Tokenizer:
    """WordPiece, as BERT has it."""
    made = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    made.train_from_iterator([text] * 3, trainer)
    return made


def unigram(text: str, size: int = 60) -> Tokenizer:
    """Unigram with SentencePiece's spelling, as T5 has it."""
    made = Tokenizer(kinds.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([text] * 3, trainer)
    return made


KINDS = {"bpe": byte_level, "wordpiece": word_piece, "unigram": unigram}


@lru_cache
def trained(kind: str, text: str) -> str:
    """A tokenizer as JSON."""
    return KINDS[kind](text).to_str()


def tokenizer(kind: str = "bpe", text: str = FOX, added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers."""
    made = Tokenizer.from_str(trained(kind, text))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return wrapped(made.to_str())


def wrapped(content: str) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers from `tokenizer.json`."""
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), **names)


def permuted(given: PreTrainedTokenizerFast, seed: int = 0) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The same tokenizer with its tokens at other rows, and for every old row the new one."""
    content = json.loads(given.backend_tokenizer.to_str())
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).tolist()
    content["model"]["vocab"] = moved(content["model"]["vocab"], order)
    content["added_tokens"] = sorted(
        ({**token, "id": order[token["id"]]} for token in content["added_tokens"]), key=lambda token: token["id"]
    )
    if "unk_id" in content["model"]:
        content["model"]["unk_id"] = order[content["model"]["unk_id"]]
    return wrapped(json.dumps(content)), order


def moved(vocab: Any, order: Sequence[int]) -> Any:
    """A vocabulary with its tokens at other rows."""
    if isinstance(vocab, Mapping):
        return dict(sorted(((token, order[row]) for token, row in vocab.items()), key=lambda pair: pair[1]))
    return [pair for _, pair in sorted(zip(order, vocab, strict=True), key=lambda pair: pair[0])]


def save(folder: Path, network: PreTrainedModel, made: PreTrainedTokenizerFast) -> Path:
    """A model folder."""
    network.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
