"""The trials of a search: what is maximised, and one point after another until there are enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from weldment.errors import MergeError
from weldment.evaluation.evaluate import Evaluator
from weldment.evaluation.heads import Heads
from weldment.evaluation.scores import Score, normalised
from weldment.evaluation.search.samplers import distributions
from weldment.evaluation.search.space import Space
from weldment.evaluation.search.study import FAILURE, storage_errors
from weldment.evaluation.states import ModelState, merged_state

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

State = Literal["complete", "pruned", "failed"]

SCORES, SECONDS = "scores", "seconds"


@dataclass(frozen=True)
class Trial:
    """A point that was tried.

    Attributes:
        values: of the marks, by their names.
        state: "pruned" if it was given up as worse than most after some of the tasks; "failed" if its merge failed.
        value: what the search maximises; None unless complete.
        scores: on validation, by task; of a pruned trial those that there are.
        failure: why its merge failed.
    """

    number: int
    values: Mapping[str, Any]
    state: State
    value: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "number": self.number,
            "parameters": dict(self.values),
            "state": self.state,
            "value": self.value,
            "scores": dict(self.scores),
            "seconds": round(self.seconds, 3),
            **({"failure": self.failure} if self.failure else {}),
        }


@dataclass(frozen=True)
class Goal:
    """What is maximised: the mean over tasks of scores in percent of the experts', or else of the scores.

    Attributes:
        experts: their scores on validation, by task; empty if scores are not normalised.
    """

    experts: Mapping[str, Score] = field(default_factory=dict)

    @property
    def is_normalised(self) -> bool:
        return bool(self.experts)

    def part(self, score: Score) -> float:
        """What a score adds to the mean."""
        if self.experts:
            return normalised(score, self.experts[score.task]).value
        return score.value if score.higher_is_better else -score.value

    def shown(self, value: float) -> str:
        """`87.3 % of the experts`, or `0.8123`."""
        return f"{value:.1f} % of the experts" if self.is_normalised else f"{value:.4f}"


Told = Callable[[Trial, Trial | None, Goal], None]
"""Told of a trial that has ended, of the best one so far, and of what is maximised."""


@dataclass(frozen=True)
class Runner:
    """Runs trials of a study in this process.

    Attributes:
        evaluator: of the validation split.
        heads: the experts', by task.
        storage: for messages.
    """

    study: optuna.Study
    space: Space
    evaluator: Evaluator
    goal: Goal
    heads: Heads
    storage: str
    told: Told = lambda trial, best, goal: None

    def run(self, trials: int, timeout: float | None, is_asked_to_stop: Callable[[], bool]) -> None:
        """Trials until there are so many in all, the time is over, or somebody asks to stop.

        Raises:
            UserError: the recipe is not valid at a point, or the model that it makes cannot be evaluated.
            OutputError: the storage fails.
        """
        with storage_errors(self.storage):
            dimensions = distributions(self.space)
            start = time.monotonic()
            while len(finished(self.study, self.space)) < trials and not is_asked_to_stop():
                if timeout is not None and time.monotonic() - start >= timeout:
                    break
                asked = self.study.ask(dimensions)
                self._tell(asked, time.monotonic())
                done = finished(self.study, self.space)
                self.told(next(trial for trial in done if trial.number == asked.number), best_of(done), self.goal)

    def _tell(self, asked: optuna.Trial, start: float) -> None:
        """Run a trial and keep what came of it; what interrupts it leaves it unfinished, and it is not counted."""
        from optuna.trial import TrialState

        try:
            value = self._value(asked)
        except MergeError as error:
            asked.set_user_attr(FAILURE, str(error))
            self.study.tell(asked, state=TrialState.FAIL)
            return
        asked.set_user_attr(SECONDS, time.monotonic() - start)
        if value is None:
            self.study.tell(asked, state=TrialState.PRUNED)
        else:
            self.study.tell(asked, value)

    def _value(self, asked: optuna.Trial) -> float | None:
        """What is maximised at a point; None if the trial is not worth going on.

        Raises:
            MergeError: the merge fails, or its scores are not numbers.
        """
        values = values_of(asked.params, self.space)
        known = self._same(values)
        if known is not None:
            asked.set_user_attr(SCORES, dict(known.scores))
            return known.value
        state = merged_state(self.space.filled(values), f"trial {asked.number}")
        return self._scored(asked, state)

    def _scored(self, asked: optuna.Trial, state: ModelState) -> float | None:
        tasks, parts = self.evaluator.tasks, []
        scores: dict[str, float] = {}
        heads = {task: head for task, head in self.heads.items() if task not in state.heads} | dict(
            self.evaluator.heads
        )
        for step, task in enumerate(tasks):
            score = self.evaluator.score(state, task, heads)
            scores[task.name] = score.value
            parts.append(self.goal.part(score))
            mean = sum(parts) / len(parts)
            if not math.isfinite(mean):
                raise MergeError(f"the score on {task.name!r} is {score.value}")
            asked.set_user_attr(SCORES, scores)
            asked.report(mean, step)
            if step + 1 < len(tasks) and asked.should_prune():
                return None
        return sum(parts) / len(parts)

    def _same(self, values: Mapping[str, Any]) -> Trial | None:
        """A complete trial of the same point, whose value needs no second calculation."""
        done = finished(self.study, self.space)
        return next((trial for trial in done if trial.state == "complete" and trial.values == values), None)


def finished(study: optuna.Study, space: Space) -> list[Trial]:
    """The trials that ended on their own, in order; not those that were interrupted."""
    found = (_trial(trial, space) for trial in study.get_trials(deepcopy=False))
    return [trial for trial in found if trial is not None]


def _trial(stored: FrozenTrial, space: Space) -> Trial | None:
    from optuna.trial import TrialState

    states: dict[TrialState, State] = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
    }
    attributes = stored.user_attrs
    if stored.state not in states or (stored.state == TrialState.FAIL and FAILURE not in attributes):
        return None
    state = states[stored.state]
    return Trial(
        stored.number,
        values_of(stored.params, space),
        state,
        stored.value if state == "complete" else None,
        attributes.get(SCORES, {}),
        attributes.get(SECONDS, 0.0),
        attributes.get(FAILURE, ""),
    )


def values_of(parameters: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """What the parameters of a study stand for, by the marks' names in the recipe's order."""
    return {name: mark.value(parameters[name]) for name, mark in space.marks.items()}


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The complete trial with the highest value, the first of those that have it."""
    return max((t for t in trials if t.value is not None), key=lambda trial: trial.value or 0.0, default=None)
