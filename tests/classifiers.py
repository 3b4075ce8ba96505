"""Tiny classifiers of several families with a tokenizer beside them, and task folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from models import ARCHITECTURES, BERT, GROUPED, VOCABULARY, Architecture

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = tuple(f"w{number}" for number in range(VOCABULARY - len(SPECIAL)))

KINDS: dict[str, Architecture] = {
    "bert": Architecture("BertForSequenceClassification", "BertConfig", BERT),
    "roberta": Architecture("RobertaForSequenceClassification", "RobertaConfig", {**BERT, "pad_token_id": 0}),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "deberta": Architecture(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", ARCHITECTURES["deberta_v3"].settings
    ),
    "gpt2": Architecture(
        "GPT2ForSequenceClassification", "GPT2Config", {**ARCHITECTURES["gpt2"].settings, "pad_token_id": 0}
    ),
    "llama": Architecture("LlamaForSequenceClassification", "LlamaConfig", GROUPED),
    "modernbert": Architecture(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**BERT, "pad_token_id": 0, "classifier_pooling": "mean", "global_attn_every_n_layers": 2},
    ),
    # Its experts' matrices are stored one by one, and fused in the network.
    "mixtral": Architecture(
        "MixtralForSequenceClassification",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS, **keys: Any) -> None:
    """A tokenizer of words between spaces."""
    rows = {token: row for row, token in enumerate((*SPECIAL, *words))}
    inner = Tokenizer(WordLevel(rows, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", **keys}
    PreTrainedTokenizerFast(tokenizer_object=inner, **named).save_pretrained(folder)


def save_classifier(
    folder: Path, kind: str = "bert", *, labels: int | Sequence[str] = 2, seed: int = 0, **keys: Any
) -> PreTrainedModel:
    """A classifier in a folder with its tokenizer; `keys` go into its configuration."""
    names = [f"LABEL_{n}" for n in range(labels)] if isinstance(labels, int) else labels
    named = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    architecture = replace(KINDS[kind], settings={**KINDS[kind].settings, **named, **keys})
    torch.manual_seed(seed)
    model = architecture.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def write_task(
    folder: Path, examples: Sequence[Mapping[str, Any]], labels: Sequence[str] | None, split: str = "test", **keys: Any
) -> Path:
    """A task folder with one split; `keys` go into its `task.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"labels": labels, **keys}), encoding="utf-8")
    lines = "".join(json.dumps(example) + "\n" for example in examples)
    (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def texts(count: int, *, longest: int = 12, seed: int = 0) -> list[str]:
    """Texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[place] for place in torch.randint(len(WORDS), (length,), generator=generator))
        for length in lengths
    ]
