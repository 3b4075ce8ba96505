"""Scores of models that write text: the perplexity of a file, and tasks of lm-evaluation-harness.

A text longer than a model takes is read in windows that overlap by half. Every token but the
first is predicted once, in the first window that has it, so that it has half a window before it
wherever the text has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weldment.errors import TaskError
from weldment.evaluation.metrics import draws
from weldment.evaluation.networks import tokenizer_of
from weldment.evaluation.predicting import longest
from weldment.evaluation.scores import Score

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from weldment.evaluation.evaluate import Options, Report
    from weldment.evaluation.states import ModelState
    from weldment.evaluation.tasks import LanguageTask

WINDOW = 2048
"""Tokens of a window, for models that take as many."""

BLOCK = 256
"""Tokens that resamples draw together, since neighbours are not independent; fewer of short texts."""

_LOGITS = 1 << 27
"""Logits that are calculated at once."""


@dataclass(frozen=True)
class Window:
    """Tokens that are read together.

    Attributes:
        start, stop: their places in the text.
        first: the first of them that is predicted here.
    """

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    Attributes:
        ids: (n,).
        ends: how many characters of the text each token and those before it cover, (n,); None if the
            tokenizer does not tell.
    """

    text: str
    ids: Tensor
    ends: ndarray | None


def language_score(
    network: PreTrainedModel, state: ModelState, task: LanguageTask, options: Options, report: Report
) -> Score:
    """The score of a model that writes text.

    Of a text, `options.limit` is the number of windows, and `options.max_length` their length; of a task of
    lm-evaluation-harness they are the number of examples and the longest context.

    Args:
        network: the model's.

    Raises:
        TaskError: the text or the task cannot be used, or a package is missing.
    """
    tokenizer = tokenizer_of(state)
    if task.kind == "lm":
        from weldment.evaluation.harness import harness_score

        return harness_score(network, tokenizer, task, options)
    text = tokens_of(tokenizer, read_text(Path(task.source).expanduser()), task.source)
    _check_vocabulary(network, text, state.name)
    length = longest(tokenizer, network, options.max_length or WINDOW)
    spans = windows(len(text.ids), length)[: options.limit]
    what = f"{state.name} on {task.name}"
    found = losses(network, text.ids, spans, options.batch, lambda count: report(what, count, len(spans)))
    return perplexity(task.name, found, len(spans), bytes_=_covered(text, spans), seed=options.seed)


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        TaskError: it cannot be read, is not UTF-8 or is empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TaskError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise TaskError(f"is not UTF-8: {error.reason}", where=str(path), fix="Convert it to UTF-8") from error
    if not text:
        raise TaskError("is empty", where=str(path), fix="Give a file with text")
    return text


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> Text:
    """A text as tokens, with the special tokens that the tokenizer puts around texts.

    Raises:
        TaskError: it has fewer than two, so that there is nothing to predict.
    """
    found = tokenizer(text, verbose=False, return_offsets_mapping=bool(tokenizer.is_fast))
    ids = torch.tensor(found["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        cause = f"is too short: {len(ids)} token{'' if len(ids) == 1 else 's'}, and the first is not predicted"
        raise TaskError(cause, where=where, fix="Give a longer text")
    # Special tokens cover nothing: they end at 0.
    ends = np.maximum.accumulate([stop for _, stop in found["offset_mapping"]]) if tokenizer.is_fast else None
    return Text(text, ids, ends)


def _covered(text: Text, spans: Sequence[Window]) -> int | None:
    """Bytes of the tokens that are predicted."""
    if text.ends is None:
        return None
    return len(text.text[text.ends[0] : text.ends[spans[-1].stop - 1]].encode())


def _check_vocabulary(network: PreTrainedModel, text: Text, name: str) -> None:
    weight: Any = network.get_input_embeddings().weight
    rows, largest = weight.shape[0], int(text.ids.max())
    if largest >= rows:
        cause = f"its tokenizer gives token {largest}, and the model has embeddings for {rows}"
        raise TaskError(cause, where=name, fix="Put the tokenizer that belongs to the model beside its weights")


def windows(count: int, length: int) -> list[Window]:
    """The windows of a text.

    Args:
        count: tokens of the text.
        length: tokens of a window.

    Raises:
        TaskError: windows of one token predict nothing.
    """
    if length < 2:
        raise TaskError(f"a window of {length} token predicts nothing", where="max_length", fix="Give at least 2")
    spans: list[Window] = []
    first = 1
    for start in range(0, count, length // 2):
        spans.append(Window(start, min(start + length, count), first))
        first = spans[-1].stop
        if first == count:
            break
    return spans


@torch.inference_mode()
def losses(
    network: PreTrainedModel,
    ids: Tensor,
    spans: Sequence[Window],
    batch: int = 1,
    report: Callable[[int], None] = lambda count: None,
) -> ndarray:
    """Negative log likelihoods of the predicted tokens, in nats and in the text's order: (m,).

    Args:
        ids: of the text, (n,).
        batch: windows that are read together, where memory is enough for their logits.
        report: called with the number of windows that were done since the last call.
    """
    parts: list[ndarray] = []
    for group in _batches(spans, batch, network.config.get_text_config().vocab_size):
        rows = torch.stack([ids[span.start : span.stop] for span in group]).to(network.device)
        logits = network(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
        for span, row, of in zip(group, rows, logits, strict=True):
            place = span.first - span.start
            found = torch.nn.functional.cross_entropy(of[place - 1 : -1].float(), row[place:], reduction="none")
            parts.append(found.cpu().numpy())
        report(len(group))
    return np.concatenate(parts).astype(np.float64)


def _batches(spans: Sequence[Window], batch: int, classes: int) -> Iterator[list[Window]]:
    """Windows of the same length that are read together."""
    for length, equal in groupby(spans, lambda span: span.stop - span.start):
        group, count = list(equal), max(1, min(batch, _LOGITS // (length * classes)))
        yield from (group[start : start + count] for start in range(0, len(group), count))


def perplexity(task: str, losses: ndarray, examples: int, *, bytes_: int | None = None, seed: int = 0) -> Score:
    """exp of the mean negative log likelihood of a token, with resampled blocks of tokens.

    Args:
        losses: in nats, (m,).
        examples: windows.
        bytes_: of the predicted text; bits per byte compare models with different tokenizers.
    """
    size = max(1, min(BLOCK, len(losses) // 10))
    starts = np.arange(0, len(losses), size)
    sums, sizes = np.add.reduceat(losses, starts), np.diff(starts, append=len(losses))
    counts = draws(len(starts), seed, task=task)
    details: dict[str, float] = {"tokens": len(losses)}
    if bytes_:
        details["bits_per_byte"] = float(losses.sum() / np.log(2) / bytes_)
    with np.errstate(over="ignore"):
        samples = np.exp((counts @ sums) / (counts @ sizes))
        value = float(np.exp(losses.mean()))
    return Score(task, "perplexity", value, examples, samples, higher_is_better=False, details=details)
