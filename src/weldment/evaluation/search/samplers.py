"""How the points of a search are chosen: marks as Optuna's distributions, and its samplers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weldment.errors import UserError
from weldment.evaluation.search.marks import Choices, Range
from weldment.evaluation.search.space import Space
from weldment.evaluation.search.study import load_optuna, missing_search
from weldment.recipe.words import suggestion

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

SAMPLERS = ("tpe", "cmaes", "random", "grid")

_SMALLEST_CMAES = 2


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The marks in Optuna's words."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for name, mark in space.marks.items():
        if isinstance(mark, Choices):
            found[name] = CategoricalDistribution(mark.labels)
        elif mark.is_whole:
            found[name] = IntDistribution(int(mark.low), int(mark.highest), log=mark.log, step=int(mark.step or 1))
        else:
            found[name] = FloatDistribution(mark.low, mark.highest, log=mark.log, step=mark.step)
    return found


def grid_size(space: Space) -> int:
    """Points of the space.

    Raises:
        UserError: a mark has more than can be counted.
    """
    return math.prod(len(points) for points in _points(space).values())


def _points(space: Space) -> dict[str, Sequence[Any]]:
    found = {name: mark.points() for name, mark in space.marks.items()}
    endless = [name for name, points in found.items() if points is None]
    if endless:
        fix = f"Give `{endless[0]}` a `step`, or use --sampler tpe"
        raise UserError(f"a grid needs steps, and `{endless[0]}` has none", where=space.origin, fix=fix)
    return {name: points for name, points in found.items() if points is not None}


def sampler_of(kind: str, space: Space, seed: int) -> BaseSampler:
    """The sampler of a name in `SAMPLERS`.

    Raises:
        UserError: there is none of that name, or it cannot search this space.
        TaskError: a package that it needs is not installed.
    """
    if kind not in SAMPLERS:
        raise UserError(f"there is no sampler {kind!r}", where="--sampler", fix=suggestion(kind, SAMPLERS))
    samplers = load_optuna().samplers
    if kind == "grid":
        points = _points(space)
        return _by_number(lambda _: samplers.GridSampler(points, seed=seed), seed)
    ranges = sum(isinstance(mark, Range) for mark in space.marks.values())
    if kind == "cmaes" and ranges < _SMALLEST_CMAES:
        cause = f"CMA-ES takes at least two ranges, and the recipe has {ranges or 'choices only'}"
        raise UserError(cause, where="--sampler", fix="Use --sampler tpe")
    try:
        return _by_number(_MAKERS[kind], seed)
    except ImportError as error:
        raise missing_search(error) from error


def _tpe(seed: int) -> BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(seed=seed)


def _cmaes(seed: int) -> BaseSampler:
    from optuna.samplers import CmaEsSampler

    return CmaEsSampler(seed=seed, warn_independent_sampling=False)


def _random(seed: int) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


_MAKERS: dict[str, Callable[[int], BaseSampler]] = {"tpe": _tpe, "cmaes": _cmaes, "random": _random}


def _by_number(make: Callable[[int], BaseSampler], seed: int) -> BaseSampler:
    """A sampler whose draws depend on the seed, the trial's number and the finished trials alone.

    So a search that goes on chooses what it would have chosen without the interruption, and processes that
    work together with one seed do not choose the same. What samplers do after a trial is left out: it is for
    constraints, which there are none of, and ends Optuna's own loop, which is not used.
    """
    from optuna.samplers import BaseSampler

    class ByNumber(BaseSampler):
        def __init__(self) -> None:
            self._number = -1
            self._sampler = make(seed)

        def _of(self, trial: FrozenTrial) -> BaseSampler:
            if trial.number != self._number:
                self._number, self._sampler = trial.number, make((seed + trial.number) % 2**32)
            return self._sampler

        def before_trial(self, study: Study, trial: FrozenTrial) -> None:
            self._of(trial).before_trial(study, trial)

        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
            return self._of(trial).infer_relative_search_space(study, trial)

        def sample_relative(
            self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
        ) -> dict[str, Any]:
            return self._of(trial).sample_relative(study, trial, search_space)

        def sample_independent(
            self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
        ) -> Any:
            return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    return ByNumber()
