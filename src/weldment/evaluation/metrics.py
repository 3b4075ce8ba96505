"""Metrics of classification and regression, under the names that scikit-learn gives them, and GLUE's; more is better.

A resample of n examples is n counts, how often each was drawn; where a metric can be calculated from
sums over the examples, that of all resamples takes one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weldment.errors import TaskError
from weldment.recipe.words import suggestion

if TYPE_CHECKING:
    from numpy import ndarray

RESAMPLES = 1000
LEVEL = 0.95
"""Of confidence intervals."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        of: labels (n,) and predictions (n,) to the value: predicted classes, or numbers for a regression.
        regression: whether it compares numbers.
        resampled: the same for counts (B, n), to (B,) values; None where there is no quick way.
    """

    name: str
    of: Callable[[ndarray, ndarray], float]
    regression: bool = False
    resampled: Callable[[ndarray, ndarray, ndarray], ndarray] | None = None


def bootstrap(metric: Metric, labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    """The metric of resamples.

    Args:
        labels, predictions: (n,).
        counts: (B, n), how often each example was drawn.

    Returns:
        (B,); NaN where it is not defined for a resample.
    """
    if metric.resampled is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            return metric.resampled(labels, predictions, counts)
    drawn = [np.repeat(np.arange(len(labels)), row) for row in counts]
    return np.array([metric.of(labels[places], predictions[places]) for places in drawn])


def draws(examples: int, seed: int = 0, resamples: int = RESAMPLES) -> ndarray:
    """Counts (B, n) of resamples with replacement; the same for the same seed and number of examples."""
    generator = np.random.default_rng([seed, examples])
    places = generator.integers(0, examples, size=(resamples, examples))
    counts = np.zeros((resamples, examples), dtype=np.int32)
    np.add.at(counts, (np.arange(resamples)[:, None], places), 1)
    return counts


def interval(values: ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle share of values, by percentiles; NaN if there are none."""
    kept = values[np.isfinite(values)]
    if kept.size == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(kept, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _sklearn(name: str, **options: str) -> Callable[[ndarray, ndarray], float]:
    def of(labels: ndarray, predictions: ndarray) -> float:
        try:
            from sklearn import metrics
        except ImportError as error:
            raise missing_extra() from error
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
    return counts @ (labels == predictions) / counts.sum(axis=1)


def confusions(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    """Confusion matrices (B, C, C) of resamples: rows are labels, columns predictions."""
    classes, places = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    number = len(classes)
    cells = places[: len(labels)] * number + places[len(labels) :]
    return (counts @ np.eye(number**2)[cells]).reshape(-1, number, number)


def _matthews(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    """Gorodkin's R_K, which is Matthews' coefficient for two classes; 0 where it is not defined."""
    table = confusions(labels, predictions, counts)
    true, predicted, all_ = table.sum(axis=2), table.sum(axis=1), table.sum(axis=(1, 2))
    right = np.trace(table, axis1=1, axis2=2)
    covariance = right * all_ - (true * predicted).sum(axis=1)
    spread = (all_**2 - (predicted**2).sum(axis=1)) * (all_**2 - (true**2).sum(axis=1))
    return np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1e-300)), 0.0)


def _pearsons(labels: ndarray, predictions: ndarray, counts: ndarray) -> ndarray:
    """From weighted moments of the centred numbers; 0 where one of them does not vary."""
    x, y = labels - labels.mean(), predictions - predictions.mean()
    total = counts.sum(axis=1)
    mx, my, xx, yy, xy = (counts @ np.stack([x, y, x * x, y * y, x * y], axis=1) / total[:, None]).T
    spread = (xx - mx**2) * (yy - my**2)
    return np.where(spread > 0, (xy - mx * my) / np.sqrt(np.maximum(spread, 1e-300)), 0.0)


_ROWS = (
    Metric("accuracy", _sklearn("accuracy_score"), resampled=_accuracies),
    Metric("balanced_accuracy", _sklearn("balanced_accuracy_score")),
    Metric("f1", _sklearn("f1_score")),
    Metric("f1_macro", _sklearn("f1_score", average="macro")),
    Metric("f1_micro", _sklearn("f1_score", average="micro"), resampled=_accuracies),
    Metric("f1_weighted", _sklearn("f1_score", average="weighted")),
    Metric("matthews_corrcoef", _sklearn("matthews_corrcoef"), resampled=_matthews),
    Metric("matthews_correlation", _sklearn("matthews_corrcoef"), resampled=_matthews),
    Metric("pearson", _scipy("pearsonr"), regression=True, resampled=_pearsons),
    Metric("spearman", _scipy("spearmanr"), regression=True),
    Metric("r2", _sklearn("r2_score"), regression=True),
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
