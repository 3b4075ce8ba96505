"""Scores with their uncertainty, and whether two of them differ by more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from weldment.evaluation.metrics import LEVEL, METRICS, bootstrap, interval

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class Score:
    """How good a model is on one task.

    Attributes:
        examples: how many it was tested on.
        samples: values of resampled examples (bootstrap), the same resamples for every model; empty if
            only the standard error is known.
        error: the standard error, where there are no samples.
        higher_is_better: false for perplexity.
        details: what else was found on the same examples, by name.
    """

    task: str
    metric: str
    value: float
    examples: int
    samples: ndarray = field(repr=False, default_factory=lambda: np.empty(0))
    error: float | None = None
    higher_is_better: bool = True
    details: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval."""
        if self.samples.size:
            return interval(self.samples)
        if self.error is None:
            return self.value, self.value
        return self.value - 1.96 * self.error, self.value + 1.96 * self.error

    @property
    def spread(self) -> float:
        """The standard error: that of the samples where there are some, else what is known; 0 if nothing is."""
        kept = self.samples[np.isfinite(self.samples)]
        return float(kept.std()) if kept.size else self.error or 0.0

    def record(self) -> dict[str, Any]:
        """As JSON-able values; JSON knows no numbers that are not finite, which become None."""
        value, low, high = (number if math.isfinite(number) else None for number in (self.value, *self.interval))
        return {
            "task": self.task,
            "metric": self.metric,
            "value": value,
            "low": low,
            "high": high,
            "examples": self.examples,
            **{name: number if math.isfinite(number) else None for name, number in self.details.items()},
        }


def score(task: str, metric: str, labels: ndarray, predictions: ndarray, seed: int = 0) -> Score:
    """The score of predictions.

    Args:
        labels, predictions: (n,); classes, or numbers for a regression.
        seed: of the resamples.
    """
    row = METRICS[metric]
    samples = bootstrap(row, labels, predictions, seed, task)
    return Score(task, metric, row.of(labels, predictions), len(labels), samples)


def normalised(score: Score, expert: Score) -> Score:
    """The score in percent of an expert's on the same examples; resamples are paired."""
    up, down = (score, expert) if score.higher_is_better else (expert, score)
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = 100 * up.samples / down.samples if up.samples.shape == down.samples.shape else np.empty(0)
    value = 100 * up.value / down.value if down.value else float("nan")
    error = None
    if score.error is not None and expert.error is not None and score.value and expert.value:
        error = abs(value) * float(np.hypot(score.error / score.value, expert.error / expert.value))
    return Score(score.task, score.metric, value, score.examples, samples, error)


def average(scores: Sequence[Score]) -> Score:
    """The mean over tasks, whose examples are independent of each other."""
    values = [score.value for score in scores]
    paired = all(score.samples.size and score.samples.shape == scores[0].samples.shape for score in scores)
    samples = np.mean([score.samples for score in scores], axis=0) if paired and scores else np.empty(0)
    spread = float(np.sqrt(np.sum(np.square([score.spread for score in scores]))) / len(scores))
    return Score(
        "average", "", float(np.mean(values)), sum(s.examples for s in scores), samples, None if paired else spread
    )


def differs(first: Score, second: Score) -> bool:
    """Whether two scores on the same examples differ by more than noise: the difference's interval leaves out 0."""
    if first.samples.size and first.samples.shape == second.samples.shape:
        with np.errstate(invalid="ignore"):  # a resample in which an expert scores 0 has no percentage
            low, high = interval(first.samples - second.samples, LEVEL)
        return low > 0 or high < 0
    return abs(first.value - second.value) > 1.96 * float(np.hypot(first.spread, second.spread))


Scores = Mapping[str, Score]
"""By the name of the task."""
