"""Soups: means of models that were fine-tuned from one start on the same task, chosen by validation scores.

Wortsman et al. 2022, Model Soups. Test scores are calculated when the soup is chosen and written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weldment.errors import UserError
from weldment.evaluation.evaluate import Evaluator, Options, Report
from weldment.evaluation.heads import Heads, load_heads
from weldment.evaluation.scores import Score, Scores, average
from weldment.evaluation.soups.inputs import checked_models, checked_tasks, names_of
from weldment.evaluation.soups.running_mean import RunningMean
from weldment.evaluation.states import ModelState, load_state, merged_state
from weldment.evaluation.tasks import AnyTask, Task
from weldment.merging import check_target, merge, plan
from weldment.planning.plan import Plan

if TYPE_CHECKING:
    from weldment.merging import MergeResult

How = Literal["greedy", "uniform", "learned"]
HOWS: tuple[How, ...] = ("greedy", "uniform", "learned")

TRIALS = 30
"""Means that are scored to learn weights."""

Weights = Mapping[str, float]
"""By the model's reference."""


@dataclass(frozen=True)
class Candidate:
    """A model, or a mean of models.

    Attributes:
        weights: of the models in it, by their references.
        validation: what soups are chosen by.
        test: held out; empty as long as the soup is not written, and for tasks without a test split.
    """

    name: str
    weights: Weights
    validation: Scores
    test: Scores

    @property
    def value(self) -> float:
        """The mean over tasks of the validation scores."""
        return mean_of(self.validation).value


Told = Callable[[str, float, bool | None], None]
"""Told what was scored on validation, the score, and whether it was kept; None for a single model."""


@dataclass(frozen=True)
class SoupResult:
    """A soup that was written.

    Attributes:
        recipe: what was merged.
        models: the single models, the best on validation first.
        uniform: the mean of all.
        soup: the chosen one.
        tried: every mean that was scored to choose it, in order.
    """

    how: How
    merged: MergeResult
    recipe: Mapping[str, Any]
    models: tuple[Candidate, ...]
    uniform: Candidate
    soup: Candidate
    tried: tuple[Candidate, ...]

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.merged.path


@dataclass(frozen=True)
class _Chosen:
    models: tuple[Candidate, ...]
    uniform: Candidate
    soup: Candidate
    tried: tuple[Candidate, ...]


def soup(
    models: Sequence[str | Path],
    tasks: Iterable[str | Path | AnyTask],
    out: str | Path,
    *,
    how: How = "greedy",
    trials: int = TRIALS,
    heads: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
    report: Report = lambda what, count, total: None,
    told: Told = lambda what, value, kept: None,
    **options: Any,
) -> SoupResult:
    """Choose a mean of models by their scores on the tasks' validation splits, and write it as a merge.

    "greedy" begins with the best model and adds one after the other, where the mean does not get worse;
    "uniform" takes all; "learned" searches weights, beginning with equal ones. In memory are at most a
    sum, one model and the network.

    Args:
        models: folders, files, `org/name` on the Hub, or `base+adapter`.
        tasks: with a validation split; several count equally.
        out: the output folder.
        trials: means that are scored to learn weights.
        heads: for a task's name, where a head is stored; by default the models' own are averaged too.
        overwrite: replace a non-empty output folder.
        report: told of progress with examples.
        told: of every model and mean that was scored.
        options: attributes of `Options`, but for `split`.

    Raises:
        UserError: models, tasks or output folder are at fault; nothing was written.
        MergeError: the merge failed.
    """
    if how not in HOWS:
        raise UserError(f"there is no soup {how!r}", fix=f"The soups are {', '.join(HOWS)}")
    if trials < 1:
        raise UserError(f"trials must be at least 1, not {trials}")
    references = checked_models([str(model) for model in models])
    loaded = checked_tasks(tasks)
    check_target(Path(out), recipe_of(references), checked_plan(references).models, overwrite=overwrite)
    given = load_heads(heads)
    settings = Options(**options, split="validation")
    chosen = _chosen(references, Evaluator(loaded, settings, given, report), how, trials, told)
    recipe = recipe_of(chosen.soup.weights)
    merged = merge(recipe, out, overwrite=overwrite)
    return _tested(SoupResult(how, merged, recipe, **vars(chosen)), loaded, settings, given, report)


def recipe_of(weights: Iterable[str] | Weights) -> dict[str, Any]:
    """The recipe of a mean of models."""
    models = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights, 1.0)
    if len(set(models.values())) == 1:
        return {"merge_method": "linear", "models": list(models)}
    entries = [{"model": model, "parameters": {"weight": weight}} for model, weight in models.items() if weight]
    return {"merge_method": "linear", "models": entries}


def checked_plan(references: Sequence[str]) -> Plan:
    """The plan of their mean.

    Raises:
        UserError: they cannot be averaged.
    """
    planned = plan(recipe_of(references))
    assert isinstance(planned, Plan)
    return planned


def mean_of(scores: Scores) -> Score:
    """The mean over tasks, or the score itself of one."""
    return next(iter(scores.values())) if len(scores) == 1 else average(list(scores.values()))


def _chosen(references: Sequence[str], evaluator: Evaluator, how: How, trials: int, told: Told) -> _Chosen:
    """The soup, by validation scores alone."""
    names = names_of(references)
    singles = [_single(reference, names[reference], evaluator, told) for reference in references]
    ranked = tuple(sorted(singles, key=lambda single: -single.value))
    order = [next(iter(single.weights)) for single in ranked]
    uniform = _validated(evaluator, dict.fromkeys(order, 1.0), f"uniform soup of {len(order)}")
    if how == "uniform":
        told(uniform.name, uniform.value, True)
        return _Chosen(ranked, uniform, uniform, (uniform,))
    if how == "learned":
        from weldment.evaluation.soups.weights import learned

        best, tried = learned(order, uniform, lambda weights, name: _validated(evaluator, weights, name), trials, told)
    else:
        best, tried = _greedy(ranked, order, evaluator, told)
    return _Chosen(ranked, uniform, best, tried)


def _single(reference: str, name: str, evaluator: Evaluator, told: Told) -> Candidate:
    with _held(load_state(reference), name) as state:
        candidate = Candidate(name, {reference: 1.0}, evaluator.scores(state), {})
    told(name, candidate.value, None)
    return candidate


@contextmanager
def _held(state: ModelState, name: str) -> Iterator[ModelState]:
    """A model under another name, whose tensors go when it is done with, whoever still knows the model."""
    tensors = dict(state.tensors)
    state = replace(state, name=name, tensors=tensors)
    yield state
    tensors.clear()


def _validated(evaluator: Evaluator, weights: Weights, name: str) -> Candidate:
    """A mean, scored as a merge would write it."""
    with _held(merged_state(recipe_of(weights), name), name) as state:
        return Candidate(name, weights, evaluator.scores(state), {})


def _greedy(
    ranked: Sequence[Candidate], order: Sequence[str], evaluator: Evaluator, told: Told
) -> tuple[Candidate, tuple[Candidate, ...]]:
    """The best model, and with it each next one with which the mean is not worse."""
    best, tried = ranked[0], list[Candidate]()
    mean = RunningMean(checked_plan(order), order[0], load_state(order[0]).tensors)
    for reference, single in zip(order[1:], ranked[1:], strict=True):
        with _held(load_state(reference), reference) as state:
            with_it = mean.with_(reference, state.tensors)
            members = (*mean.members, reference)
            scores = evaluator.scores(with_it)
            candidate = Candidate(f"greedy soup of {len(members)}", dict.fromkeys(members, 1.0), scores, {})
            kept = candidate.value >= best.value
            if kept:
                mean.add(reference, state.tensors)
                best = candidate
        tried.append(candidate)
        told(f"with {single.name}", candidate.value, kept)
    return replace(best, name=f"greedy soup of {len(best.weights)}"), tuple(tried)


def _tested(result: SoupResult, tasks: Sequence[Task], settings: Options, heads: Heads, report: Report) -> SoupResult:
    """The same with scores on the test splits, of what was written."""
    if not all("test" in task.files for task in tasks):
        return result
    evaluator = Evaluator(tasks, replace(settings, split="test"), heads, report)

    def tested(candidate: Candidate, loaded: ModelState) -> Candidate:
        with _held(loaded, candidate.name) as state:
            return replace(candidate, test=evaluator.scores(state))

    models = tuple(tested(single, load_state(next(iter(single.weights)))) for single in result.models)
    soup = tested(result.soup, load_state(result.path))
    recipe = recipe_of(result.uniform.weights)
    if recipe == result.recipe:
        uniform = replace(result.uniform, test=soup.test)
    else:
        uniform = tested(result.uniform, merged_state(recipe, result.uniform.name))
    return replace(result, models=models, uniform=uniform, soup=soup)
