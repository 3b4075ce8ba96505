"""Perplexity of texts, compared with a plain loop in float64, and tasks of lm-evaluation-harness; real tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from folders import weld
from models import ARCHITECTURES, VOCABULARY, save_state
from weldment.errors import TaskError, UserError
from weldment.evaluation.evaluate import evaluate
from weldment.evaluation.harness import score_of
from weldment.evaluation.language import Window, perplexity, tokens_of, windows
from weldment.evaluation.scores import Score

LETTERS = "abcdefghijklmnopqrstuvwxyzé \n."
TEXT = "the bée and the flower. " * 40
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None


def letters(*, bos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are letters; `bos` puts <s> before every text."""
    known = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


@dataclass(frozen=True)
class Writer:
    """A model in a folder, the same in float64, and its tokenizer."""

    folder: Path
    network: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Writer:
    """A Llama whose tokenizer puts <s> first, and a GPT-2 whose tokenizer puts nothing."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = ARCHITECTURES[request.param].build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4)
    tokenizer = letters(bos=request.param == "llama")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Writer(folder, network.double(), tokenizer)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "bees.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def by_hand(writer: Writer, text: str, window: int) -> list[float]:
    """Losses of all tokens but the first, one forward pass in float64 for each token, none of our code."""
    ids = writer.tokenizer(text)["input_ids"]
    stride = window // 2
    found = []
    for place in range(1, len(ids)):
        number = 0 if place < window else -(-(place - window + 1) // stride)
        context = torch.tensor([ids[number * stride : place]])
        with torch.no_grad():
            logits = writer.network(context).logits[0, -1]
        found.append(-float(logits.log_softmax(0)[ids[place]]))
    return found


def score(writer: Writer, path: Path, **options: object) -> Score:
    return evaluate(writer.folder, [f"perplexity:{path}"], **options)[path.stem]


@pytest.mark.parametrize("window", [16, 7, 2])
def test_perplexity_is_that_of_a_loop_over_the_tokens(writer: Writer, tmp_path: Path, window: int) -> None:
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:40], encoding="utf-8")
    losses = by_hand(writer, TEXT[:40], window)
    found = score(writer, path, max_length=window)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.details["tokens"] == len(losses)
    assert found.value > 1.5 * VOCABULARY or found.value < 0.9 * VOCABULARY, "not what any model would give"


def test_bits_per_byte_are_those_of_the_bytes_that_are_predicted(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("é" + TEXT[:30], encoding="utf-8")
    losses = by_hand(writer, "é" + TEXT[:30], 64)
    predicted = len(TEXT[:30].encode()) + (2 if len(losses) == 31 else 0)
    assert score(writer, path).details["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / predicted)


def test_a_text_shorter_than_a_window_is_one(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a bee", encoding="utf-8")
    found = score(writer, path)
    assert found.examples == 1
    assert found.value == pytest.approx(math.exp(np.mean(by_hand(writer, "a bee", 64))), rel=1e-5)


def test_a_long_text_is_read_in_windows_of_the_models_positions(writer: Writer, text: Path) -> None:
    found = score(writer, text)
    tokens = len(writer.tokenizer(TEXT)["input_ids"])
    assert found.examples == 1 + math.ceil((tokens - 64) / 32)
    low, high = found.interval
    assert low < found.value < high
    assert not found.higher_is_better


def test_batches_do_not_change_the_score(writer: Writer, text: Path) -> None:
    one, many = (score(writer, text, batch=batch).value for batch in (1, 7))
    assert one == pytest.approx(many, rel=1e-6)


def test_a_limit_takes_the_first_windows(writer: Writer, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.txt"
    path.write_text(TEXT[: 95 if writer.tokenizer("a")["input_ids"][0] == 1 else 96], encoding="utf-8")
    assert score(writer, text, limit=2).value == pytest.approx(score(writer, path).value, rel=1e-6)
    assert score(writer, text, limit=2).details == pytest.approx(score(writer, path).details)


def test_progress_counts_windows(writer: Writer, text: Path) -> None:
    told: list[tuple[int, int]] = []
    found = score(writer, text, batch=4, report=lambda what, count, total: told.append((count, total)))
    assert sum(count for count, _ in told) == found.examples
    assert {total for _, total in told} == {found.examples}


@pytest.mark.parametrize(("count", "length"), [(2, 2), (5, 2), (10, 10), (11, 10), (100, 9), (100, 16), (3, 100)])
def test_windows_predict_every_token_but_the_first_once(count: int, length: int) -> None:
    spans = windows(count, length)
    assert [place for span in spans for place in range(span.first, span.stop)] == list(range(1, count))
    assert all(span.start < span.first <= span.stop <= span.start + length for span in spans)
    later = [span for span in spans[1:] if span.stop < count]
    assert all(span.first - span.start >= length // 2 for span in later)


def test_windows_overlap_by_half() -> None:
    assert windows(10, 4) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 10, 8)]


def test_the_interval_is_that_of_blocks_of_tokens() -> None:
    losses = np.random.default_rng(0).normal(2.0, 1.0, size=20_000)
    low, high = perplexity("noise", losses, 1).interval
    wide = 2 * 1.96 / math.sqrt(20_000) * math.exp(losses.mean())
    assert high - low == pytest.approx(wide, rel=0.2)
    blocks = np.repeat(losses[::256], 256)[:20_000]
    low, high = perplexity("blocks", blocks, 1).interval
    assert high - low == pytest.approx(wide * 16, rel=0.3), "tokens of a block are drawn together"


def test_a_loss_beyond_all_numbers_is_infinite_and_no_crash() -> None:
    assert perplexity("broken", np.full(20, 1e4), 1).value == math.inf


def test_the_command_says_that_lower_is_better(writer: Writer, text: Path) -> None:
    done = weld("eval", writer.folder, "--task", f"perplexity:{text}", "--limit", 3)
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[1][:5] == ["bees", "perplexity", "(lower", "is", "better)"]
    assert lines[2][0] == "tokens"
    assert lines[3][:3] == ["bits", "per", "byte"]
    record = json.loads(weld("eval", writer.folder, "--task", f"perplexity:{text}", "--json").out)["scores"][0]
    assert record["metric"] == "perplexity"
    assert record["low"] < record["value"] < record["high"]
    assert record["bits_per_byte"] > 0


def test_texts_that_cannot_be_used(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"")
    with pytest.raises(TaskError, match=r"text.txt: is empty. Give a file with text"):
        score(writer, path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(TaskError, match=r"text.txt: is not UTF-8: .*. Convert it to UTF-8"):
        score(writer, path)
    with pytest.raises(TaskError, match=r"nowhere.txt: there is no such file"):
        score(writer, tmp_path / "nowhere.txt")
    path.write_text("a bee", encoding="utf-8")
    with pytest.raises(TaskError, match="a window of 1 token predicts nothing"):
        score(writer, path, max_length=1)


def test_a_text_of_one_token_has_nothing_to_predict() -> None:
    with pytest.raises(TaskError, match=r"one.txt: is too short: 1 token, and the first is not predicted"):
        tokens_of(letters(bos=False), "a", "one.txt")
    assert len(tokens_of(letters(bos=True), "a", "one.txt").ids) == 2


def test_a_tokenizer_that_knows_more_than_the_model(tmp_path: Path, text: Path) -> None:
    settings = {**ARCHITECTURES["gpt2"].settings, "vocab_size": 8}
    network = ARCHITECTURES["gpt2"].build(type(ARCHITECTURES["gpt2"].make_config())(**settings))
    network.save_pretrained(tmp_path)
    letters(bos=False).save_pretrained(tmp_path)
    with pytest.raises(TaskError, match=r"its tokenizer gives token \d+, and the model has embeddings for 8"):
        evaluate(tmp_path, [f"perplexity:{text}"])


def test_a_model_that_does_not_write(tmp_path: Path, text: Path) -> None:
    architecture = ARCHITECTURES["vit"]
    save_state(tmp_path / "vit", architecture.build().state_dict(), architecture.make_config().to_dict())
    with pytest.raises(TaskError, match="models of the type 'vit' do not write text"):
        evaluate(tmp_path / "vit", [f"perplexity:{text}"])


RESULTS = {
    "results": {
        "mine": {
            "alias": "mine",
            "sample_len": 9,
            "bleu,none": 0.1,
            "acc,none": 0.25,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": 0.06,
        },
        "text": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
        "tag": {"alias": "tag"},
    },
    "n-samples": {"mine": {"original": 100, "effective": 9}},
    "higher_is_better": {"mine": {"acc_norm": True}, "text": {"word_perplexity": False}},
}


def test_of_the_harness_metrics_the_main_one_counts() -> None:
    found = score_of(RESULTS, "mine", "mine")
    assert (found.metric, found.value, found.error, found.examples, found.higher_is_better) == (
        "acc_norm",
        0.5,
        0.06,
        9,
        True,
    )
    assert found.interval == pytest.approx((0.5 - 1.96 * 0.06, 0.5 + 1.96 * 0.06))


def test_a_metric_of_the_harness_that_should_be_low() -> None:
    found = score_of(RESULTS, "text", "text")
    assert (found.metric, found.value, found.error, found.higher_is_better) == ("word_perplexity", 12.5, None, False)


def test_a_name_that_stands_for_many_tasks_has_no_score() -> None:
    with pytest.raises(TaskError, match=r"lm:tag: has no score of its own. Give the tasks it stands for one by one"):
        score_of(RESULTS, "tag", "tag")


def test_without_the_harness_a_sentence_says_what_to_install(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskError, match=r"lm:arc_easy takes lm-evaluation-harness, .* pip install 'weldment\[lm\]'"):
        evaluate(writer.folder, ["lm:arc_easy"])


def test_a_description_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"none.yaml: there is no such file. Give a name, or a file that there is"):
        evaluate("model", ["lm:none.yaml"])


needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm_eval (weldment[lm]) is not installed")


def description(folder: Path, **changes: str) -> Path:
    """A task of two questions with local data, whose answers are the second choices."""
    rows = [{"question": "a bee", "choices": ["a", "bée"], "answer": 1}, {"question": "the", "choices": ["f", "b"]}]
    data = folder / "questions.json"
    data.write_text("\n".join(json.dumps({"answer": 1, **row}) for row in rows), encoding="utf-8")
    content = {
        "task": "bees",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
        **changes,
    }
    path = folder / "bees.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@needs_harness
def test_a_task_of_the_harness_in_a_file(writer: Writer, tmp_path: Path) -> None:
    found = evaluate(writer.folder, [f"lm:{description(tmp_path)}"])["bees"]
    assert (found.metric, found.examples, found.higher_is_better) == ("acc", 2, True)
    tokenizer, right = writer.tokenizer, []
    for question, choices in (("a bee", ["a", "bée"]), ("the", ["f", "b"])):
        likely = []
        for choice in choices:
            ids = tokenizer(f"{question} {choice}")["input_ids"]
            ids = ids if ids[0] == 1 else [2, *ids]
            chosen = len(choice) + 1
            with torch.no_grad():
                logits = writer.network(torch.tensor([ids])).logits[0].log_softmax(-1)
            likely.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(ids) - chosen, len(ids))))
        right.append(likely[1] > likely[0])
    assert found.value == pytest.approx(np.mean(right))


@needs_harness
def test_a_file_that_describes_no_task(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("dataset_path: json", encoding="utf-8")
    with pytest.raises(TaskError, match=r"empty.yaml: names no task: it has no `task`"):
        evaluate(writer.folder, [f"lm:{path}"])
    path.write_text("task: [", encoding="utf-8")
    with pytest.raises(TaskError, match=r"empty.yaml: cannot be read"):
        evaluate(writer.folder, [f"lm:{path}"])
