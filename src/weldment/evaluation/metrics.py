"""Metrics of classification and regression, under the names that scikit-learn gives them, and GLUE's; more is better.

A resample of n examples is n counts, how often each was drawn. Metrics of all resamples come from sums over
the examples, weighted by the counts, and take a few matrix products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from weldment.errors import TaskError
from weldment.recipe.words import suggestion

if TYPE_CHECKING:
    from numpy import ndarray

RESAMPLES = 1000
LEVEL = 0.95
"""Of confidence intervals."""

_COUNTS = 1 << 22
"""That are held at a time."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        of: labels (n,) and predictions (n,) to the value: predicted classes, or numbers for a regression.
        resampled: the same with counts (B, n), to (B,) values; NaN where it is not defined.
        regression: whether it compares numbers.
    """

    name: str
    of: Callable[[ndarray, ndarray], float]
    resampled: Callable[[ndarray, ndarray, ndarray], ndarray]
    regression: bool = False


def bootstrap(metric: Metric, labels: ndarray, predictions: ndarray, seed: int = 0, task: str = "") -> ndarray:
    """The metric of resamples.

    Args:
        labels, predictions: (n,).
        seed: of the resamples, which depend on it, on n and on the task's name alone: so those of models are paired,
            and those of tasks are not.

    Returns:
        (RESAMPLES,); NaN where it is not defined for a resample.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        blocks = draw_blocks(len(labels), seed, task=task)
        return np.concatenate([metric.resampled(labels, predictions, counts.astype(np.float64)) for counts in blocks])


def draws(examples: int, seed: int = 0, resamples: int = RESAMPLES, task: str = "") -> ndarray:
    """Counts (B, n) of resamples with replacement; the same for the same seed, task and number of examples."""
    return np.concatenate(list(draw_blocks(examples, seed, resamples, task)))


def draw_blocks(examples: int, seed: int = 0, resamples: int = RESAMPLES, task: str = "") -> Iterator[ndarray]:
    """The same, some resamples at a time, for numbers of examples that leave no memory for all."""
    generator = np.random.default_rng([seed, examples, crc32(task.encode())])
    step = max(1, _COUNTS // examples)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        places = generator.integers(0, examples, size=(rows, examples))
        places += examples * np.arange(rows)[:, None]
        yield np.bincount(places.reshape(-1), minlength=rows * examples).reshape(rows, examples)


def interval(values: ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle share of values, by percentiles; NaN if there are none."""
    kept = values[np.isfinite(values)]
    if kept.size == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _sklearn(name: str, **options: Any) -> Callable[[ndarray, ndarray], float]:
    def of(labels: ndarray, predictions: ndarray) -> float:
        try:
            from sklearn import metrics
        except ImportError as error:
            raise missing_extra() from error
        with warnings.catch_warnings():
            # Classes that no example has are no news where only some examples are looked at.
            warnings.simplefilter("ignore", UserWarning)
            return float(getattr(metrics, name)(labels, predictions, **options))

    return of


def _scipy(name: str) -> Callable[[ndarray, ndarray], float]:
    def of(labels: ndarray, predictions: ndarray) -> float:
        try:
            from scipy import stats
        except ImportError as error:
            raise missing_extra() from error
        if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(getattr(stats, name)(labels, predictions).statistic)

    return of


def missing_extra() -> TaskError:
    """An error that says what to install."""
    return TaskError(
        "evaluation takes packages that are not installed", fix="Install them: pip install 'weldment[eval]'"
    )


def _accuracies(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    return counts @ (labels == predictions).astype(np.float64) / counts.sum(axis=1)


@dataclass(frozen=True)
class _Tallies:
    """Of each class in each resample (B, C): how often it was predicted rightly, there, and predicted."""

    right: ndarray
    true: ndarray
    predicted: ndarray

    @property
    def recall(self) -> ndarray:
        """NaN for classes that a resample has no example of."""
        return self.right / self.true

    @property
    def f1(self) -> ndarray:
        """NaN for classes that are neither there nor predicted."""
        return 2 * self.right / (self.true + self.predicted)


def _tallies(labels: ndarray, predictions: ndarray, counts: ndarray, classes: ndarray | None = None) -> _Tallies:
    kinds = np.union1d(labels, predictions) if classes is None else classes
    true, predicted = ((values[:, None] == kinds).astype(np.float64) for values in (labels, predictions))
    return _Tallies(counts @ (true * predicted), counts @ true, counts @ predicted)


def _balanced(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    recall = _tallies(labels, predictions, counts, np.unique(labels)).recall
    return np.nanmean(recall, axis=1)


def _f1_of_ones(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    return np.nan_to_num(_tallies(labels, predictions, counts, np.array([1])).f1[:, 0])


def _f1_macro(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    return np.nanmean(_tallies(labels, predictions, counts).f1, axis=1)


def _f1_weighted(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    tallies = _tallies(labels, predictions, counts)
    return (np.nan_to_num(tallies.f1) * tallies.true).sum(axis=1) / counts.sum(axis=1)


def _matthews(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    """Gorodkin's R_K, which is Matthews' coefficient for two classes; 0 where it is not defined."""
    tallies = _tallies(labels, predictions, counts)
    true, predicted, all_ = tallies.true, tallies.predicted, counts.sum(axis=1)
    covariance = tallies.right.sum(axis=1) * all_ - (true * predicted).sum(axis=1)
    spread = (all_**2 - (predicted**2).sum(axis=1)) * (all_**2 - (true**2).sum(axis=1))
    return np.where(spread > 0, covariance / np.sqrt(spread), 0.0)


def _pearsons(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    """From weighted moments of the centred numbers; 0 where one of them does not vary."""
    x, y = labels - labels.mean(), predictions - predictions.mean()
    total = counts.sum(axis=1)
    mx, my, xx, yy, xy = (counts @ np.stack([x, y, x * x, y * y, x * y], axis=1) / total[:, None]).T
    spread = (xx - mx**2) * (yy - my**2)
    return np.where(spread > 0, (xy - mx * my) / np.sqrt(spread), 0.0)


def _spearmans(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    """Pearson's coefficient of the ranks within each resample, whose means are known."""
    middle = (counts.sum(axis=1, keepdims=True) + 1) / 2
    x, y = (_ranks(values, counts) - middle for values in (labels, predictions))
    xx, yy, xy = ((counts * a * b).sum(axis=1) for a, b in ((x, x), (y, y), (x, y)))
    return np.where(xx * yy > 0, xy / np.sqrt(xx * yy), 0.0)


def _ranks(values: ndarray, counts: ndarray) -> ndarray:
    """Ranks (B, n) of values (n,) within resamples; equal ones share the mean of theirs."""
    distinct, places = np.unique(values, return_inverse=True)
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(distinct)))
    equal = np.add.reduceat(counts[:, order], starts, axis=1)
    return (np.cumsum(equal, axis=1) - (equal - 1) / 2)[:, places]


def _r2(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    x, total = labels - labels.mean(), counts.sum(axis=1)
    spread = counts @ x**2 - (counts @ x) ** 2 / total
    return 1 - counts @ (labels - predictions) ** 2 / spread


_ROWS = (
    Metric("accuracy", _sklearn("accuracy_score"), _accuracies),
    Metric("balanced_accuracy", _sklearn("balanced_accuracy_score"), _balanced),
    Metric("f1", _sklearn("f1_score", zero_division=0.0), _f1_of_ones),
    Metric("f1_macro", _sklearn("f1_score", average="macro", zero_division=0.0), _f1_macro),
    Metric("f1_micro", _sklearn("f1_score", average="micro"), _accuracies),
    Metric("f1_weighted", _sklearn("f1_score", average="weighted", zero_division=0.0), _f1_weighted),
    Metric("matthews_corrcoef", _sklearn("matthews_corrcoef"), _matthews),
    Metric("matthews_correlation", _sklearn("matthews_corrcoef"), _matthews),
    Metric("pearson", _scipy("pearsonr"), _pearsons, regression=True),
    Metric("spearman", _scipy("spearmanr"), _spearmans, regression=True),
    Metric("r2", _sklearn("r2_score"), _r2, regression=True),
)

METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}


def check_metric(name: object, labels: Sequence[str] | None, where: str) -> str:
    """The name of a metric that fits a task.

    Raises:
        TaskError: there is none of that name, or it is for the other kind of task.
    """
    metric = METRICS.get(str(name))
    fitting = [row.name for row in _ROWS if row.regression == (labels is None)]
    if metric is None:
        raise TaskError(f"there is no metric {name!r}", where=where, fix=suggestion(str(name), fitting))
    if metric.name not in fitting:
        kind = "regressions, and the task has labels" if metric.regression else "classes, and the task has no labels"
        raise TaskError(f"the metric {name!r} is for {kind}", where=where, fix=f"Use one of {', '.join(fitting)}")
    if metric.name == "f1" and labels is not None and len(labels) != 2:
        fix = "Use f1_macro, f1_micro or f1_weighted"
        raise TaskError(f"the metric 'f1' is for two classes, and the task has {len(labels)}", where=where, fix=fix)
    return metric.name
