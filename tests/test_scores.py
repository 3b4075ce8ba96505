"""Scores: intervals, percents of an expert's, averages, and what is noise."""

from __future__ import annotations

import json

import numpy as np
import pytest

from weldment.evaluation.scores import Score, average, differs, normalised, score


def of(right: np.ndarray, task: str = "t", seed: int = 0) -> Score:
    """The accuracy of answers that are right or not."""
    return score(task, "accuracy", np.ones(len(right), dtype=int), right.astype(int), seed)


def shares(*percents: int, count: int = 400) -> list[Score]:
    """Models that are right on so many percent of the same examples, the better ones wherever the worse are."""
    return [of(np.arange(count) < count * percent // 100) for percent in percents]


def test_a_score_has_an_interval_from_resamples() -> None:
    found = shares(75)[0]
    assert (found.value, found.examples) == (0.75, 400)
    low, high = found.interval
    error = np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - 1.96 * error, abs=0.006)
    assert high == pytest.approx(0.75 + 1.96 * error, abs=0.006)
    assert found.spread == pytest.approx(error, rel=0.1)


def test_the_same_answers_give_the_same_interval_and_other_seeds_another() -> None:
    right = np.arange(100) < 60
    assert np.array_equal(of(right).samples, of(right).samples)
    assert not np.array_equal(of(right).samples, of(right, seed=1).samples)


def test_intervals_where_only_the_error_is_known_or_nothing() -> None:
    assert Score("t", "acc", 0.5, 10, error=0.1).interval == pytest.approx((0.304, 0.696))
    assert Score("t", "acc", 0.5, 10).interval == (0.5, 0.5)


def test_percents_of_an_expert_are_paired() -> None:
    """Both are drawn on the same examples, so a model that equals its expert has no uncertainty."""
    model, expert = shares(60, 80)
    found = normalised(model, expert)
    assert found.value == pytest.approx(75)
    assert found.interval[0] < 75 < found.interval[1]
    assert normalised(expert, expert).interval == (100.0, 100.0)


def test_percents_of_a_perplexity_grow_as_it_falls() -> None:
    model, expert = (Score("t", "perplexity", value, 5, higher_is_better=False) for value in (20.0, 10.0))
    assert normalised(model, expert).value == 50.0
    assert normalised(model, expert).higher_is_better


def test_percents_of_known_errors() -> None:
    model, expert = Score("t", "acc", 0.4, 9, error=0.04), Score("t", "acc", 0.8, 9, error=0.06)
    assert normalised(model, expert).error == pytest.approx(50 * np.hypot(0.1, 0.075))


def test_percents_of_an_expert_that_scores_nothing_are_not_defined() -> None:
    assert np.isnan(normalised(shares(50)[0], shares(0)[0]).value)


def test_the_average_is_less_uncertain_than_its_tasks() -> None:
    draw = np.random.default_rng(0)
    tasks = [of(draw.random(400) < 0.7, task=name) for name in "abcd"]
    found = average(tasks)
    assert found.value == pytest.approx(np.mean([task.value for task in tasks]))
    assert found.examples == 1600
    assert found.spread == pytest.approx(np.sqrt(0.7 * 0.3 / 400) / 2, rel=0.2)


def test_tasks_are_drawn_independently_of_each_other() -> None:
    """Two tasks of as many examples, sorted by label: a model that always says the same is right on the same places."""
    first, second = (of(np.arange(400) < 200, task=name) for name in ("a", "b"))
    assert average([first, second]).spread == pytest.approx(first.spread / np.sqrt(2), rel=0.1)


def test_the_average_of_resampled_scores_and_known_errors_counts_both() -> None:
    resampled, known = shares(75)[0], Score("lm", "acc", 0.25, 100, error=0.04)
    found = average([resampled, known])
    assert found.value == 0.5
    assert found.spread == pytest.approx(np.hypot(resampled.spread, 0.04) / 2)


def test_differences_within_noise() -> None:
    worse, near, better = shares(60, 61, 90)
    assert differs(worse, better)
    assert not differs(better, better)
    places = np.arange(400)
    assert not differs(of(places < 280), of((places >= 40) & (places < 324))), "44 are better, and 40 worse"
    assert differs(worse, near), "the same answers but for four, all of which are better"
    known, far = Score("t", "acc", 0.5, 10, error=0.1), Score("t", "acc", 0.9, 10, error=0.1)
    assert differs(known, far)
    assert not differs(known, Score("t", "acc", 0.6, 10, error=0.1))


def test_what_is_not_defined_differs_from_nothing() -> None:
    unknown = Score("t", "accuracy", float("nan"), 400, np.full(1000, np.nan))
    assert not differs(unknown, shares(50)[0])


def test_records_are_json() -> None:
    record = Score("t", "pearson", float("nan"), 3, np.array([np.nan]), details={"tokens": 7, "bits": np.inf}).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "task": "t",
        "metric": "pearson",
        "value": None,
        "low": None,
        "high": None,
        "examples": 3,
        "tokens": 7,
        "bits": None,
    }
