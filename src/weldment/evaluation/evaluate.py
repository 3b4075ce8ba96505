"""Scores of one model after another on the same tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import TaskError, UserError
from weldment.evaluation.heads import Heads, answers, choose_head, load_heads
from weldment.evaluation.scores import Score, score
from weldment.evaluation.states import ModelState, load_state
from weldment.evaluation.tasks import SPLITS, AnyTask, LanguageTask, Split, Task, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weldment.evaluation.predicting import Encoded

Report = Callable[[str, int, int], None]
"""Told what is scored, how many examples of it are done since the last call, and how many there are."""


@dataclass(frozen=True)
class Options:
    """How models are evaluated.

    Attributes:
        split: of the tasks.
        limit: examples of each task, the first ones; None for all.
        batch: examples of a batch.
        max_length: tokens after which texts are cut; None for the task's own, or as many as the model takes.
        device: where networks run.
        dtype: of their arithmetic: "float32", "bfloat16", or "auto" for bfloat16 where the processor has it.
        seed: of the resamples for confidence intervals.
        recalibrate: a folder of unlabelled inputs, on which running statistics of batch normalisation are measured
            before a model is evaluated; None to leave them as they are.
    """

    split: str = "test"
    limit: int | None = None
    batch: int = 64
    max_length: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    recalibrate: str | Path | None = None

    def __post_init__(self) -> None:
        for name, option in (("limit", "--limit"), ("batch", "--batch-size"), ("max_length", "--max-length")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} ({option}) is {value}", fix="Give at least 1")
        if self.split not in SPLITS:
            raise UserError(f"there is no split {self.split!r}", fix=f"The splits are {', '.join(SPLITS)}")
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise UserError(f"dtype is {self.dtype!r}", fix="Use float32, bfloat16 or auto")


@dataclass
class Evaluator:
    """Scores models on tasks; tokens are made once for all models with the same tokenizer.

    Attributes:
        heads: for tasks, besides those that the models have.
    """

    tasks: Sequence[AnyTask]
    options: Options = field(default_factory=Options)
    heads: Heads = field(default_factory=dict)
    report: Report = lambda what, count, total: None

    def __post_init__(self) -> None:
        from weldment.evaluation.sharing import Networks

        self._networks = Networks(self.options.device, dtype_of(self.options.dtype))
        self._ready: tuple[ModelState, ModelState] | None = None
        self._splits: dict[str, Split] = {}
        self._encoded: dict[tuple[str, str, int], Encoded] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        _refuse_doubles(self.tasks)
        unknown = [name for name in self.heads if name not in {task.name for task in self.tasks}]
        if unknown:
            names = ", ".join(task.name for task in self.tasks)
            raise TaskError(f"there is no task {unknown[0]!r}", where="--head", fix=f"The tasks are {names}")

    def scores(self, state: ModelState, heads: Heads | None = None) -> dict[str, Score]:
        """Its score on each task.

        Args:
            heads: used before the model's own, besides the evaluator's.

        Raises:
            TaskError: the model cannot be evaluated on one of them.
            NonFiniteError: its answers are NaN or infinite.
        """
        chosen = {**self.heads, **(heads or {})}
        return {task.name: self.score(state, task, chosen) for task in self.tasks}

    def score(self, state: ModelState, task: AnyTask, heads: Heads) -> Score:
        """Its score on one task, with the head that is given for it or its own."""
        state = self.recalibrated(state)
        if isinstance(task, LanguageTask):
            from weldment.evaluation.language import language_score

            self._networks.use(state)
            return language_score(self._networks.writer(), state, task, self.options, self.report)
        return self._score(state, task, heads)

    def recalibrated(self, state: ModelState) -> ModelState:
        """The model as it is evaluated: the same, unless `recalibrate` is asked for.

        Raises:
            TaskError: its running statistics cannot be measured.
        """
        if self.options.recalibrate is None:
            return state
        if self._ready is None or self._ready[0] is not state:
            from weldment.evaluation.recalibration.recalibration import recalibrated

            self._ready = (state, recalibrated(state, self.options.recalibrate))
        return self._ready[1]

    def _score(self, state: ModelState, task: Task, heads: Heads) -> Score:
        from weldment.evaluation.predicting import encode, logits, longest

        head = choose_head(state, task, heads)
        split = self.split(task)
        self._networks.use(state)
        network = self._networks.classifier(head)
        digest, tokenizer = self._tokenizer(state)
        length = longest(tokenizer, network, self.options.max_length or task.max_length)
        key = (task.name, digest, length)
        if key not in self._encoded:
            self._encoded[key] = encode(tokenizer, split, length, name=task.name)
        encoded = self._encoded[key]
        what = f"{state.name} on {task.name}"
        found = logits(
            network,
            tokenizer,
            encoded,
            name=state.name,
            batch=self.options.batch,
            report=lambda count: self.report(what, count, len(split)),
        )
        return score(task.name, task.metric, split.labels, answers(found, task, head.config), self.options.seed)

    def _tokenizer(self, state: ModelState) -> tuple[str, PreTrainedTokenizerBase]:
        """The tokenizer, loaded once for all models that have the same files of it, and what tells it from others."""
        from weldment.evaluation.networks import tokenizer_of
        from weldment.evaluation.predicting import tokenizer_digest

        digest = tokenizer_digest(state.folder)
        if digest not in self._tokenizers:
            self._tokenizers[digest] = tokenizer_of(state)
        return digest, self._tokenizers[digest]

    def split(self, task: Task) -> Split:
        """The examples of a task that models are evaluated on."""
        if task.name not in self._splits:
            self._splits[task.name] = task.split(self.options.split).first(self.options.limit)
        return self._splits[task.name]


def evaluate(
    model: str | Path | ModelState,
    tasks: Iterable[str | Path | AnyTask],
    *,
    heads: Mapping[str, str | Path] | None = None,
    report: Report = lambda what, count, total: None,
    **options: Any,
) -> dict[str, Score]:
    """Scores of a model on tasks.

    Args:
        model: a folder, a file, `org/name` on the Hub, or `base+adapter`.
        tasks: task folders, files of examples, or ids of datasets on the Hub.
        heads: for a task's name, where the head for it is stored; by default the model's own.
        options: attributes of `Options`.

    Returns:
        the score on each task, by its name.

    Raises:
        UserError: the model, a task or a head is at fault.
        NonFiniteError: the model's answers are NaN or infinite.
    """
    loaded = load_tasks(tasks)
    given = load_heads(heads)
    evaluator = Evaluator(loaded, Options(**options), given, report)
    state = model if isinstance(model, ModelState) else load_state(model)
    return evaluator.scores(state)


def dtype_of(name: str) -> Any:
    """The dtype of the arithmetic."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    has_bfloat16 = torch.cuda.is_available() or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _refuse_doubles(tasks: Sequence[AnyTask]) -> None:
    names = [task.name for task in tasks]
    if not names:
        raise TaskError("there is no task", fix="Give --task DIR")
    for name in names:
        if names.count(name) > 1:
            raise TaskError(f"two tasks are called {name!r}", fix="Give each a `name` of its own in task.json")
