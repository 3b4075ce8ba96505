"""Search: the best recipe among those that the marks in a recipe span, by trials on the validation split.

    choose                                   report
    validation split, one trial per point    test split: the best recipe, the experts, the base, the baselines

Trials are merged in memory and scored with one network. The test split is not looked at before the search is over.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.errors import MergeError, UserError
from weldment.evaluation.comparison.compare import check_comparison, compare
from weldment.evaluation.comparison.digests import model_digest
from weldment.evaluation.comparison.lineup import Lineup, line_up
from weldment.evaluation.evaluate import Evaluator, Options, Report
from weldment.evaluation.heads import choose_head, load_heads
from weldment.evaluation.scores import Score
from weldment.evaluation.search.result import (
    Messages,
    SearchResult,
    Settings,
    checked_out,
    explained,
    with_storage,
    write_recipe,
)
from weldment.evaluation.search.samplers import grid_size, sampler_of
from weldment.evaluation.search.space import Space, load_space, point
from weldment.evaluation.search.study import digest, open_study
from weldment.evaluation.search.trials import Goal, Runner, Trial, best_of, finished
from weldment.evaluation.states import Head, ModelState, load_state, short_name
from weldment.evaluation.tasks import AnyTask, LanguageTask, Task, load_tasks
from weldment.report.manifest import file_digest

if TYPE_CHECKING:
    from weldment.merging import RecipeSource

__all__ = ["Messages", "SearchResult", "Settings", "Trial", "search"]


def search(
    recipe: RecipeSource,
    tasks: Iterable[str | Path | AnyTask],
    *,
    trials: int = 50,
    sampler: str = "tpe",
    seed: int = 0,
    storage: str | Path | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    overwrite: bool = False,
    timeout: float | None = None,
    base: str | None = None,
    experts: Mapping[str, str] | None = None,
    heads: Mapping[str, str | Path] | None = None,
    messages: Messages | None = None,
    **options: Any,
) -> SearchResult:
    """Find the best values for the marks in a recipe.

    A study of Optuna proposes them; each trial merges in memory and is scored on the tasks' validation splits.
    Trials that do worse than most after some of the tasks are given up. What is maximised is the mean over tasks of
    the scores in percent of the experts', or of the scores where a task has no expert. Run again, a search goes on;
    processes with the same storage work on one search.

    Args:
        recipe: a YAML file, or its content as a mapping (or several, for staged merges), with marks.
        tasks: task folders, files of examples, or ids of datasets on the Hub; first those that are quick to score
            and tell most.
        trials, sampler, seed, storage, out, fresh, overwrite, timeout: attributes of `Settings`.
        base: the model that the experts were fine-tuned from; by default what the recipe says.
        experts: for a task's name, the model that is its expert; by default the one of the same name.
        heads: for a task's name, where the head for it is stored; used before all others.
        messages: who is told what happens.
        options: attributes of `Options`, without `split`.

    Raises:
        UserError: the recipe, a mark, a model, a task or a setting is at fault.
        MergeError: no trial was completed.
        KeyboardInterrupt: Ctrl-C; it ends after the running trial, and the next run goes on.
    """
    settings = with_storage(Settings(trials, sampler, seed, storage, out, fresh, overwrite, timeout), recipe)
    messages = messages or Messages()
    space = load_space(recipe)
    chosen_by = sampler_of(sampler, space, seed)
    notes = space.check()
    target = checked_out(settings, recipe)
    evaluator = _evaluator(tasks, heads or {}, options, messages.report)
    notes += _check_splits(evaluator)
    names = [task.name for task in evaluator.tasks]
    lineup = line_up([space.filled(next(space.corners()))], names, base=base, experts=experts or {})
    check_comparison(lineup, evaluator)
    study = open_study(
        short_name(space.origin), settings.storage, chosen_by, _of(space, lineup, evaluator), fresh=fresh
    )
    goal, expert_heads = _goal(evaluator, lineup, notes)
    for note in notes:
        messages.text(f"note: {note}")
    done = _run(Runner(study, space, evaluator, goal, expert_heads, settings.place, messages.trial), settings, messages)
    best = best_of(done)
    if best is None:
        raise _nothing(done, space)
    documents = space.filled(best.values)
    if target is not None:
        write_recipe(target, documents, explained(best, len(done), names, goal, space.origin))
    table = compare(
        [documents if target is None else target],
        evaluator.tasks,
        base=base,
        experts=experts,
        heads=heads,
        crossed=False,
        report=messages.report,
        **{**options, "split": "test"},
    )
    return SearchResult(best, documents, tuple(done), goal, table, tuple(notes), settings)


def _evaluator(
    tasks: Iterable[str | Path | AnyTask], heads: Mapping[str, str | Path], options: Mapping[str, Any], report: Report
) -> Evaluator:
    """What scores trials."""
    if "split" in options:
        fix = "Give tasks that have a validation split and a test split"
        raise UserError("a search chooses on validation and reports on test; there is no split to give", fix=fix)
    loaded = load_tasks(tasks)
    given = load_heads(heads)
    return Evaluator(loaded, Options(**options, split="validation"), given, report)


def _check_splits(evaluator: Evaluator) -> list[str]:
    """Read both splits of all tasks, so that nothing is missing at the end; notes on those that are one."""
    notes: list[str] = []
    for task in evaluator.tasks:
        if isinstance(task, LanguageTask):
            shared = "has no splits"
        else:
            evaluator.split(task)
            task.split("test")
            shared = "is one file without splits" if "all" in task.files else ""
        if shared:
            notes.append(
                f"{task.name} {shared}: its scores in the table are on the examples that the recipe was chosen by"
            )
    return notes


def _of(space: Space, lineup: Lineup, evaluator: Evaluator) -> dict[str, str]:
    """What values of a study depend on besides the point, as digests."""
    options, heads = evaluator.options, evaluator.heads
    experts = {task: lineup.models[name] for task, name in lineup.tasks.items()}
    return {
        "recipe": digest(space.documents),
        "experts": digest([lineup.base, experts]),
        "heads": digest({task: model_digest(ModelState(task, h.tensors, h.config)) for task, h in heads.items()}),
        "tasks": digest([_content(task, evaluator) for task in evaluator.tasks]),
        "options": digest([options.limit, options.max_length, options.dtype, options.recalibrate]),
    }


def _content(task: AnyTask, evaluator: Evaluator) -> list[Any]:
    """A task as its examples, wherever they lie."""
    if isinstance(task, LanguageTask):
        source = Path(task.source).expanduser()
        return [task.name, task.kind, file_digest(source) if source.is_file() else task.source]
    split = task.split(evaluator.options.split)
    return [task.name, task.metric, task.labels, task.max_length, split.texts, split.pairs, split.labels.tolist()]


def _goal(evaluator: Evaluator, lineup: Lineup, notes: list[str]) -> tuple[Goal, dict[str, Head]]:
    """What is maximised, and the heads of the experts by task; adds to the notes where scores are not normalised."""
    scores: dict[str, Score] = {}
    heads: dict[str, Head] = {}
    for task in evaluator.tasks:
        if task.name in lineup.tasks:
            state = load_state(lineup.models[lineup.tasks[task.name]])
            if isinstance(task, Task):
                heads[task.name] = choose_head(state, task, evaluator.heads)
            scores[task.name] = evaluator.score(state, task, {**heads, **evaluator.heads})
    missing = [f"{task.name} has no expert" for task in evaluator.tasks if task.name not in scores]
    missing += [f"the expert of {name} scores {score.value:g}" for name, score in scores.items() if score.value <= 0]
    if missing:
        notes.append(
            f"{', '.join(missing)}: the search maximises the mean of the scores, not of percents of the experts'"
        )
    return Goal({} if missing else scores), heads


def _run(runner: Runner, settings: Settings, messages: Messages) -> list[Trial]:
    """All trials that ended, once there are enough or the time is over.

    Raises:
        KeyboardInterrupt: somebody asked to stop before.
    """
    wanted = settings.trials
    if settings.sampler == "grid" and grid_size(runner.space) < wanted:
        wanted = grid_size(runner.space)
        messages.text(f"note: the grid has {wanted} points, which are all tried")
    before = finished(runner.study, runner.space)
    if before and len(before) < wanted:
        messages.text(f"going on after {len(before)} trials that are in {runner.storage}")
    with _stopping(messages.text) as is_asked_to_stop:
        runner.run(wanted, settings.timeout, is_asked_to_stop)
        done = finished(runner.study, runner.space)
        if is_asked_to_stop() and len(done) < wanted:
            raise KeyboardInterrupt(_how_to_go_on(len(done), wanted, settings))
    return done


@contextmanager
def _stopping(message: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C ask to stop, and a second one interrupt at once; gives whether it was asked."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        message("stopping after this trial; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _how_to_go_on(done: int, wanted: int, settings: Settings) -> str:
    if settings.storage is None:
        return f"{done} of {wanted} trials were done"
    finish = f", or with --trials {done} for the result so far" if done else ""
    return f"{done} of {wanted} trials are done; run the same command again to go on{finish}"


def _nothing(done: Sequence[Trial], space: Space) -> MergeError:
    failures = [trial for trial in done if trial.failure]
    last = f"; the last failed with {point(failures[-1].values)}: {failures[-1].failure}" if failures else ""
    fix = "Change the ranges" if failures else "Give it more time or more trials"
    return MergeError(f"no trial was completed ({len(done)} ended){last}", where=space.origin, fix=fix)
