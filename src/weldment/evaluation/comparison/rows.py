"""The rows of a comparison: one model's scores on all tasks, and how they stand to the experts' and to each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weldment.errors import NonFiniteError, TaskError, WeldmentError
from weldment.evaluation.scores import Score, Scores, average, differs, normalised

if TYPE_CHECKING:
    from weldment.evaluation.evaluate import Evaluator
    from weldment.evaluation.heads import Heads
    from weldment.evaluation.states import ModelState

Kind = Literal["expert", "base", "baseline", "merge"]

AVERAGE = "average"
"""The column of the mean over tasks."""


@dataclass(frozen=True)
class Row:
    """One model on all tasks.

    Attributes:
        scores: by task, means over `runs` where there are several; a task is missing where the model has no head.
        seconds: that making the model took: opening and merging.
        nbytes: of its tensors and heads.
        evaluation_seconds: that scoring it took.
        runs: scores of each seed, for a method with random masks; empty for others.
        what: what the model is, in a few words or as a path.
    """

    name: str
    kind: Kind
    scores: Scores
    seconds: float = 0.0
    nbytes: int = 0
    evaluation_seconds: float = 0.0
    runs: tuple[Scores, ...] = ()
    what: str = ""

    @property
    def is_merge(self) -> bool:
        """Whether it is a merge, which can be the best one of a column."""
        return self.kind in ("baseline", "merge")


def score_row(
    evaluator: Evaluator,
    state: ModelState,
    *,
    name: str | None = None,
    kind: Kind = "merge",
    heads: Heads | None = None,
    seconds: float = 0.0,
    what: str = "",
    left_out: Callable[[str, WeldmentError], None] | None = None,
    tasks: Collection[str] | None = None,
) -> Row:
    """Scores of a model in memory as a row.

    Args:
        evaluator: has the tasks.
        name: of the row; the model's by default.
        heads: the experts', by task; the model's own kept heads come before them.
        seconds: that making the model took.
        left_out: told of tasks that the model cannot be scored on, if no head is given for them; such a task is
            missing in the row. By default it is an error.
        tasks: names of those that are scored; all by default.

    Raises:
        TaskError: the model cannot be evaluated on one of the tasks.
        NonFiniteError: its answers are NaN or infinite.
    """
    start = time.perf_counter()
    given = {**{task: head for task, head in (heads or {}).items() if task not in state.heads}, **evaluator.heads}
    scores: dict[str, Score] = {}
    for task in (task for task in evaluator.tasks if tasks is None or task.name in tasks):
        try:
            scores[task.name] = evaluator.score(state, task, given)
        except (TaskError, NonFiniteError) as error:
            if left_out is None or task.name in given:
                raise
            left_out(task.name, error)
    spent = time.perf_counter() - start
    return Row(name or state.name, kind, scores, seconds, total_bytes(state), spent, what=what)


def total_bytes(state: ModelState) -> int:
    """Of a model and of the heads kept beside it."""
    kept = (tensor for head in state.heads.values() for tensor in head.tensors.values())
    return state.nbytes + sum(tensor.numel() * tensor.element_size() for tensor in kept)


def mean_row(rows: Sequence[Row]) -> Row:
    """Rows of one merge with different seeds as one: mean scores, and mean times."""
    first = rows[0]
    scores = {task: _mean([row.scores[task] for row in rows]) for task in first.scores}
    count = len(rows)
    return replace(
        first,
        scores=scores,
        seconds=sum(row.seconds for row in rows) / count,
        evaluation_seconds=sum(row.evaluation_seconds for row in rows) / count,
        runs=tuple(row.scores for row in rows),
    )


def _mean(scores: Sequence[Score]) -> Score:
    """The mean of scores on the same examples: resamples stay paired, and what all have in common stays whole."""
    first = scores[0]
    errors = [score.error for score in scores if score.error is not None]
    details = {name: sum(score.details[name] for score in scores) / len(scores) for name in first.details}
    return replace(
        first,
        value=float(np.mean([score.value for score in scores])),
        samples=np.mean([score.samples for score in scores], axis=0),
        error=float(np.mean(errors)) if errors else None,
        details=details,
    )


@dataclass(frozen=True)
class Comparison:
    """Models on the same examples of the same tasks.

    Attributes:
        tasks: their names, in order.
        metrics: by task.
        examples: how many each task was scored on.
        rows: the experts, the base, the baselines, the merges.
        experts: by task, the name of the expert's row; a task is missing where it has none.
        split: of the tasks.
        limit: examples of each task, None for all.
        seeds: how often merges with random masks were made.
        notes: what the reader should know, one sentence each.
    """

    tasks: tuple[str, ...]
    metrics: Mapping[str, str]
    examples: Mapping[str, int]
    rows: tuple[Row, ...]
    experts: Mapping[str, str] = field(default_factory=dict)
    split: str = "test"
    limit: int | None = None
    seeds: int = 1
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def absolute(self, row: Row) -> dict[str, Score]:
        """The columns of a row: its scores by task, and their average where it has all and higher is always better."""
        scores = {task: row.scores[task] for task in self.tasks if task in row.scores}
        whole = len(scores) == len(self.tasks) and all(score.higher_is_better for score in scores.values())
        return scores | ({AVERAGE: average(list(scores.values()))} if whole else {})

    def relative(self, row: Row) -> dict[str, Score]:
        """The same in percent of each task's expert, over the tasks that have one; see `scores.normalised`."""
        return self._relative(row.scores)

    def _relative(self, scores: Scores) -> dict[str, Score]:
        known = {task: self.row(expert).scores.get(task) for task, expert in self.experts.items()}
        # Nothing is in percent of 0, and of a negative number more is worse.
        wanted = {task: score for task, score in known.items() if score is not None and score.value > 0}
        found = {
            task: normalised(scores[task], wanted[task]) for task in self.tasks if task in wanted and task in scores
        }
        return found | ({AVERAGE: average(list(found.values()))} if found and len(found) == len(wanted) else {})

    def spread(self, row: Row) -> dict[str, float]:
        """Standard deviations over seeds of what `relative` gives; empty for a row of one run."""
        runs = [self._relative(run) for run in row.runs]
        if len(runs) < 2:
            return {}
        return {column: float(np.std([run[column].value for run in runs], ddof=1)) for column in runs[0]}

    def best(self, *, relative: bool) -> dict[str, str]:
        """By column, the name of the best merge: the first of those with the best score."""
        table = self._merges(relative=relative)
        columns = dict.fromkeys(column for scores in table.values() for column in scores)
        return {column: _best(column, table) for column in columns}

    def marks(self, *, relative: bool) -> dict[tuple[str, str], str]:
        """By row and column: "best" for the best merges, "near" for those that differ from it by no more than noise."""
        table = self._merges(relative=relative)
        best = self.best(relative=relative)
        found: dict[tuple[str, str], str] = {}
        for name, scores in table.items():
            for column, score in scores.items():
                if score.value == table[best[column]][column].value:
                    found[name, column] = "best"
                elif not differs(score, table[best[column]][column]):
                    found[name, column] = "near"
        return found

    def _merges(self, *, relative: bool) -> dict[str, dict[str, Score]]:
        columns = self.relative if relative else self.absolute
        return {row.name: columns(row) for row in self.rows if row.is_merge}

    def record(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "split": self.split,
            "limit": self.limit,
            "seeds": self.seeds,
            "tasks": [self._task(task) for task in self.tasks],
            "rows": [self._record(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def _task(self, task: str) -> dict[str, Any]:
        expert = self.experts.get(task)
        return {"task": task, "metric": self.metrics[task], "examples": self.examples[task], "expert": expert}

    def _record(self, row: Row) -> dict[str, Any]:
        relative, spread = self.relative(row), self.spread(row)
        return {
            "name": row.name,
            "kind": row.kind,
            "what": row.what,
            "nbytes": row.nbytes,
            "merge_seconds": row.seconds,
            "evaluation_seconds": row.evaluation_seconds,
            "scores": {column: _numbers(score) for column, score in self.absolute(row).items()},
            "normalised": {column: _numbers(score) for column, score in relative.items()},
            **({"runs": len(row.runs), "spread": spread} if row.runs else {}),
        }


def _best(column: str, table: Mapping[str, Mapping[str, Score]]) -> str:
    def goodness(name: str) -> float:
        score = there[name]
        return (score.value if score.higher_is_better else -score.value) if np.isfinite(score.value) else -np.inf

    there = {name: scores[column] for name, scores in table.items() if column in scores}
    return max(there, key=goodness)


def _numbers(score: Score) -> dict[str, float | None]:
    """JSON knows no numbers that are not finite."""
    low, high = score.interval
    values = {"value": score.value, "low": low, "high": high}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}
