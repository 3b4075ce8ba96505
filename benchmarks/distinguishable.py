"""How well the eight tasks can be told apart by their texts at all, whatever the router.

    python benchmarks/distinguishable.py ../shared/tasks [--cheat] [--tokenizer MODEL]

A linear classifier on words, pairs of words and runs of 2 to 4 characters of the raw text, which sees spaces and
spellings that a model's tokenizer hides, is trained on the train splits. What it confuses on the test splits, a
router on a model's features is not expected to tell apart. With `--cheat` it learns from one half of each test split
as well and is judged on the other half, both ways round: what then is still confused is not for want of examples like
those of the test. With `--tokenizer` it reads words and characters of the tokens of a model instead, which is what a
router on that model's features has to go by: SST-2's texts end in a space and part "did n't", which tokenizers undo.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import confusion_matrix
from sklearn.pipeline import Pipeline, make_pipeline, make_union

TASKS = ("sst2", "cola", "mrpc", "stsb", "trec", "agnews", "emotion", "subj")
SAME_SOURCE = {"subj": "sst2", "stsb": "mrpc"}
"""Both of a pair are drawn from one collection: reviews of Rotten Tomatoes; the Microsoft paraphrase corpus."""
PER_TASK = 2500


Spelling = Callable[[str], str]


def texts(folder: Path, split: str, spelt: Spelling, limit: int | None = None) -> tuple[list[str], np.ndarray]:
    """The texts of a split of all tasks as they are `spelt`, and the task of each."""
    found: list[str] = []
    labels: list[int] = []
    for number, task in enumerate(TASKS):
        with gzip.open(folder / task / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:limit]
        found += [spelt(" ".join(filter(None, (row["text"], row.get("text_pair"))))) for row in rows]
        labels += [number] * len(rows)
    return found, np.array(labels)


def spelling(model: str | None) -> Spelling:
    """Texts as they are, or as a model's tokens with spaces between."""
    if model is None:
        return str
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: " ".join(tokenizer.tokenize(text))


def learnt(found: list[str], labels: np.ndarray) -> Pipeline:
    """The classifier, trained."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), min_df=3, sublinear_tf=True, lowercase=False)
    linear = SGDClassifier(loss="log_loss", alpha=1e-6, random_state=0, class_weight="balanced")
    return make_pipeline(make_union(words, characters), linear).fit(found, labels)


def cheated(train: list[str], labels: np.ndarray, test: list[str], truth: np.ndarray) -> np.ndarray:
    """What is chosen for each half of the test split when the other half was learnt from, too."""
    chosen = np.empty_like(truth)
    for rest in (0, 1):
        places = np.arange(len(test)) % 2 == rest
        halves = [text for text, other in zip(test, places, strict=True) if not other]
        model = learnt([*train, *halves], np.concatenate([labels, truth[~places]]))
        chosen[places] = model.predict([text for text, other in zip(test, places, strict=True) if other])
    return chosen


def show(name: str, labels: np.ndarray, chosen: np.ndarray) -> None:
    """Print the accuracies and the confusion matrix."""
    groups = np.array([TASKS.index(SAME_SOURCE.get(task, task)) for task in TASKS])
    right = [(chosen[labels == task] == task).mean() for task in range(len(TASKS))]
    grouped = [(groups[chosen[labels == task]] == groups[task]).mean() for task in range(len(TASKS))]
    print(f"{name}: mean over tasks {np.mean(right):.3f}, pairs of one source counted as one {np.mean(grouped):.3f}")
    for task, row in zip(TASKS, confusion_matrix(labels, chosen), strict=True):
        print(f"  {task:8}", *(f"{count:5}" for count in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--cheat", action="store_true", help="learn from the other half of the test splits, too")
    parser.add_argument("--tokenizer", metavar="MODEL", help="see the tokens of this model's tokenizer")
    options = parser.parse_args()
    spelt = spelling(options.tokenizer)
    train, known = texts(options.tasks, "train", spelt, PER_TASK)
    if options.cheat:
        test, labels = texts(options.tasks, "test", spelt)
        show("test, its other half learnt", labels, cheated(train, known, test, labels))
        return
    model = learnt(train, known)
    for split in ("validation", "test"):
        found, labels = texts(options.tasks, split, spelt)
        show(split, labels, model.predict(found))


if __name__ == "__main__":
    main()
