"""How well the eight tasks can be told apart by their texts at all, whatever the router.

    python benchmarks/distinguishable.py ../shared/tasks

A linear classifier on words, pairs of words and runs of 2 to 4 characters of the raw text, which sees spaces and
spellings that a model's tokenizer hides, is trained on the train splits. What it confuses on the test splits, a
router on a model's features is not expected to tell apart.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import confusion_matrix
from sklearn.pipeline import make_union

TASKS = ("sst2", "cola", "mrpc", "stsb", "trec", "agnews", "emotion", "subj")
SAME_SOURCE = {"subj": "sst2", "stsb": "mrpc"}
"""Both of a pair are drawn from one collection: reviews of Rotten Tomatoes; the Microsoft paraphrase corpus."""
PER_TASK = 2500


def texts(folder: Path, split: str, limit: int | None = None) -> tuple[list[str], np.ndarray]:
    """The texts of a split of all tasks, and the task of each."""
    found: list[str] = []
    labels: list[int] = []
    for number, task in enumerate(TASKS):
        with gzip.open(folder / task / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:limit]
        found += [" ".join(filter(None, (row["text"], row.get("text_pair")))) for row in rows]
        labels += [number] * len(rows)
    return found, np.array(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", type=Path)
    folder = parser.parse_args().tasks
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        TfidfVectorizer(analyzer="char", ngram_range=(2, 4), min_df=3, sublinear_tf=True, lowercase=False),
    )
    train, labels = texts(folder, "train", PER_TASK)
    model = SGDClassifier(loss="log_loss", alpha=1e-6, random_state=0, class_weight="balanced")
    model.fit(features.fit_transform(train), labels)
    groups = np.array([TASKS.index(SAME_SOURCE.get(task, task)) for task in TASKS])
    for split in ("validation", "test"):
        found, labels = texts(folder, split)
        chosen = model.predict(features.transform(found))
        right = [(chosen[labels == task] == task).mean() for task in range(len(TASKS))]
        grouped = [(groups[chosen[labels == task]] == groups[task]).mean() for task in range(len(TASKS))]
        print(
            f"{split}: mean over tasks {np.mean(right):.3f}, pairs of one source counted as one {np.mean(grouped):.3f}"
        )
        for task, row in zip(TASKS, confusion_matrix(labels, chosen), strict=True):
            print(f"  {task:8}", *(f"{count:5}" for count in row))


if __name__ == "__main__":
    main()
