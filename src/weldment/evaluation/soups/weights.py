"""Weights of a soup, searched with Optuna from equal ones on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weldment.errors import TaskError

if TYPE_CHECKING:
    from weldment.evaluation.soups.soup import Candidate, Told, Weights

STEP = 0.05
"""Of weights, so that they read well in a recipe."""


def learned(
    order: Sequence[str],
    uniform: Candidate,
    validated: Callable[[Weights, str], Candidate],
    trials: int,
    told: Told,
    *,
    seed: int = 0,
) -> tuple[Candidate, tuple[Candidate, ...]]:
    """The best of so many weighted means by its validation score, equal weights among them.

    Args:
        order: the models' references.
        uniform: the mean with equal weights, scored: the first of the trials.
        validated: scores a mean, which gets a name.
        told: of every mean, and whether it is the best so far.

    Returns:
        the best, the first of equals; and all in order.

    Raises:
        TaskError: Optuna is not installed.
    """
    told("equal weights", uniform.value, True)
    best, tried = uniform, [uniform]
    with _quiet_optuna() as optuna:
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True)
        )
        study.add_trial(_equal(optuna, len(order), uniform.value))
        for number in range(1, trials):
            trial = study.ask(_ranges(optuna, len(order)))
            weights = {
                reference: weight
                for reference, weight in zip(order, (trial.params[str(n)] for n in range(len(order))), strict=True)
                if weight
            }
            if not weights:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            candidate = validated(weights, f"weighted mean {number}")
            study.tell(trial, candidate.value)
            shown = " ".join(f"{trial.params[str(place)]:.2f}" for place in range(len(order)))
            told(f"weights {shown}", candidate.value, candidate.value > best.value)
            best = max(best, candidate, key=lambda one: one.value)
            tried.append(candidate)
    return replace(best, name=f"learned soup of {len(best.weights)}"), tuple(tried)


def _ranges(optuna: Any, count: int) -> dict[str, Any]:
    return {str(place): optuna.distributions.FloatDistribution(0.0, 1.0, step=STEP) for place in range(count)}


def _equal(optuna: Any, count: int, value: float) -> Any:
    ranges = _ranges(optuna, count)
    return optuna.trial.create_trial(params=dict.fromkeys(ranges, 0.5), distributions=ranges, value=value)


@contextmanager
def _quiet_optuna() -> Iterator[Any]:
    """Optuna, which speaks up only about errors; without it, an error that says what to install."""
    try:
        import optuna
    except ImportError as error:
        fix = "Install it: pip install 'weldment[search]'"
        raise TaskError("learning weights takes Optuna, which is missing", fix=fix) from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(before)
