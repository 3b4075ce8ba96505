"""The guide to evaluation: its commands are such as `weld` takes, and run on tiny classifiers of the same names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

import weldment
from folders import weld
from models import perturbed
from test_docs import DOCS, PAGES, blocks, name_of, run_python
from weldment.cli import app
from weldment.evaluation.search.space import load_space

GUIDE = DOCS / "guide-evaluating.md"
WORDS = ["[PAD]", "[UNK]", "good", "bad", "long", "short"]
TASKS: dict[str, int] = {"sst2": 2, "cola": 2, "trec": 6, "stsb": 0}
"""By name, how many labels; none for a regression."""
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `weld` in the shell blocks of a page."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words[:1] == ["weld"]]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_of_the_pages_are_such_as_weld_takes(page: Path) -> None:
    known: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    for name, *arguments in commands(page):
        if name.startswith("-"):
            continue
        assert name in known
        known[name].make_context(name, arguments)


def save_classifier(folder: Path, name: str, labels: int) -> None:
    """A tiny BERT near the base with a head for so many labels, and its tokenizer."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES))
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=labels or 1)) if name != "base" else base
    if name != "base":
        model.bert.load_state_dict(perturbed(base.state_dict(), sum(map(ord, name))))
    model.save_pretrained(folder / name)
    raw = Tokenizer(models.WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder / name)


def save_task(folder: Path, labels: int) -> None:
    """Twelve examples in each of two splits."""
    folder.mkdir(parents=True)
    names = [f"label {number}" for number in range(labels)] or None
    metric = "accuracy" if labels else "pearson"
    (folder / "task.json").write_text(json.dumps({"labels": names, "metric": metric}))
    for split in ("validation", "test"):
        rows = [{"text": " ".join(WORDS[2:][i % 4 :]), "label": i % labels if labels else -i / 4} for i in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the guide's experts, tasks and recipes."""
    folder = tmp_path_factory.mktemp("guide")
    save_classifier(folder / "experts", "base", 0)
    for name, labels in TASKS.items():
        save_classifier(folder / "experts", name, labels)
        save_task(folder / "tasks" / name, labels)
    for text in blocks(GUIDE, "yaml"):
        for file in re.findall(r"^# (\S+\.yml)$", text, re.MULTILINE):
            (folder / file).write_text(text, encoding="utf-8")
    return folder


def test_recipes_can_be_planned_and_marks_searched(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert {path.name for path in place.glob("*.yml")} == {"ties.yml", "tsv_m.yml", "marked.yml"}
    assert weldment.plan("ties.yml").jobs
    space = load_space("marked.yml")
    assert len(space.marks) == 2
    space.check()


def test_commands_run_and_print_what_the_guide_shows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each table in the guide, those that the commands print have the head and the first cells of every line."""
    monkeypatch.chdir(place)
    shown = iter(blocks(GUIDE, "text")[1:])
    for arguments in commands(GUIDE):
        if arguments[0] not in ("eval", "merge", "compare") or "perplexity:notes.txt" in arguments:
            continue
        result = weld(*arguments)
        assert result.code == 0, result.err
        if arguments[0] == "eval":
            assert names_in(result.out) == names_in(next(shown))
        elif arguments[0] == "compare":
            expected = next(text for text in shown if "task arithmetic" in text)
            assert names_in(result.out) == names_in(expected)
    result = weld("eval", "experts/sst2", "--task", "tasks/trec")
    assert result.code == 2
    assert result.err in blocks(GUIDE, "text")


def names_in(table: str) -> list[str]:
    """What each line of a table begins with: words up to the first number or wide gap; rules left out."""
    lines = [line.strip() for line in table.splitlines()]
    return [re.split(r"\s{2,}|\s+[-\d]", line)[0] for line in lines if line.strip("─ ")]


def test_python_of_the_guide_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(place)
    run_python(GUIDE, place)
    assert re.findall(r"^(\S+) \{'sst2': [\d.]+, 'trec': [\d.]+\}$", capsys.readouterr().out, re.MULTILINE) == [
        "0.5",
        "1.0",
    ]
