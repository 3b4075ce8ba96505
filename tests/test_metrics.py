"""Metrics: what scikit-learn and SciPy say, of resamples too."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from weldment.errors import TaskError
from weldment.evaluation import metrics
from weldment.evaluation.metrics import METRICS, bootstrap, check_metric, draws, interval

ANSWERS = np.array([0, 1, 2, 1, 0, 2, 2, 1, 0, 0]), np.array([0, 2, 2, 1, 1, 2, 0, 1, 0, 0])
BINARY = np.array([0, 1, 1, 1, 0, 0]), np.array([0, 1, 0, 1, 1, 0])
NUMBERS = np.array([1.0, 2.0, 2.0, 4.0, 5.0, 1.0]), np.array([1.5, 1.0, 3.0, 3.0, 6.0, 1.0])


def examples(name: str) -> tuple[np.ndarray, np.ndarray]:
    return NUMBERS if METRICS[name].regression else BINARY if name == "f1" else ANSWERS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 0.7),
        ("balanced_accuracy", (3 / 4 + 2 / 3 + 2 / 3) / 3),
        ("f1", 2 / 3),
        ("f1_macro", (6 / 8 + 4 / 6 + 4 / 6) / 3),
        ("f1_micro", 0.7),
        ("f1_weighted", (4 * 6 / 8 + 3 * 4 / 6 + 3 * 4 / 6) / 10),
        ("matthews_corrcoef", sklearn.matthews_corrcoef(*ANSWERS)),
        ("matthews_correlation", sklearn.matthews_corrcoef(*ANSWERS)),
        ("pearson", np.corrcoef(*NUMBERS)[0, 1]),
        ("spearman", stats.spearmanr(*NUMBERS).statistic),
        ("r2", 1 - 4.25 / np.square(NUMBERS[0] - 2.5).sum()),
    ],
)
def test_values(name: str, expected: float) -> None:
    assert METRICS[name].of(*examples(name)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.filterwarnings("ignore")
def test_resamples_are_the_metric_of_the_examples_drawn(name: str) -> None:
    """Also where classes are missing or numbers do not vary, as in small resamples."""
    labels, predictions = examples(name)
    counts = draws(len(labels), seed=3, resamples=40)
    row = METRICS[name]
    with np.errstate(all="ignore"):
        found = row.resampled(labels, predictions, counts.astype(float))
    for count, value in zip(counts, found, strict=True):
        places = np.repeat(np.arange(len(labels)), count)
        if name == "r2" and np.ptp(labels[places]) == 0:
            assert not np.isfinite(value)
        else:
            assert value == pytest.approx(row.of(labels[places], predictions[places]), abs=1e-9)


def test_resamples_of_one_class_or_of_constant_numbers() -> None:
    same, other = np.zeros(4, dtype=int), np.array([0, 0, 1, 1])
    assert set(bootstrap(METRICS["matthews_corrcoef"], same, other)) == {0.0}
    assert set(bootstrap(METRICS["pearson"], same * 1.0, other * 1.0)) == {0.0}
    assert set(bootstrap(METRICS["spearman"], other * 1.0, same * 1.0)) == {0.0}
    assert METRICS["pearson"].of(same * 1.0, other * 1.0) == METRICS["spearman"].of(same * 1.0, other * 1.0) == 0.0


def test_many_classes_take_no_table_of_all_pairs() -> None:
    labels = np.arange(3000) % 500
    predictions = np.where(np.arange(3000) % 3 == 0, labels, (labels + 1) % 500)
    low, high = interval(bootstrap(METRICS["matthews_corrcoef"], labels, predictions))
    assert low < METRICS["matthews_corrcoef"].of(labels, predictions) < high
    assert high - low == pytest.approx(4 * np.sqrt(2 / 9 / 3000), rel=0.1)


def test_draws_depend_on_the_seed_and_the_number_of_examples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draws(50, seed=1)
    assert whole.shape == (1000, 50)
    assert set(whole.sum(axis=1)) == {50}
    assert not np.array_equal(whole, draws(50, seed=2))
    monkeypatch.setattr(metrics, "_COUNTS", 50 * 7)
    assert np.array_equal(draws(50, seed=1), whole)


def test_a_confidence_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        right = (generator.random(200) < 0.8).astype(int)
        low, high = interval(bootstrap(METRICS["accuracy"], np.ones(200, dtype=int), right))
        held += low <= 0.8 <= high
    assert 88 <= held <= 99


def test_intervals_leave_out_what_is_not_defined() -> None:
    assert interval(np.array([np.nan, 1.0, np.inf, 1.0])) == (1.0, 1.0)
    assert np.isnan(interval(np.array([np.nan]))).all()


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("acuracy", ("a", "b"), "t: there is no metric 'acuracy'. Did you mean `accuracy`?"),
        ("bleu", None, "t: there is no metric 'bleu'."),
        (None, None, "t: there is no metric None."),
        ("pearson", ("a", "b"), "t: the metric 'pearson' is for regressions, and the task has labels. Use one of accu"),
        (
            "accuracy",
            None,
            "t: the metric 'accuracy' is for classes, and the task has no labels. Use one of pearson, s",
        ),
        ("f1", ("a", "b", "c"), "t: the metric 'f1' is for two classes, and the task has 3. Use f1_macro, f1_micro or"),
    ],
)
def test_metrics_that_do_not_exist_or_do_not_fit(name: object, labels: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        check_metric(name, labels, "t")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("name", "package"), [("accuracy", "sklearn"), ("pearson", "scipy")])
def test_without_the_extra_there_is_a_sentence(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest: Any, **named: Any) -> Any:
        if wanted.partition(".")[0] == package:
            raise ImportError(wanted)
        return real(wanted, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        TaskError, match=r"takes packages that are not installed. Install them: pip install 'weldment\["
    ):
        METRICS[name].of(*examples(name))
