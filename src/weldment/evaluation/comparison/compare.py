"""Recipes compared: their experts, the base, baselines and the merges, all on the same examples of the same tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.adapters.opening import open_model
from weldment.errors import TaskError, UserError, WeldmentError
from weldment.evaluation.comparison.digests import model_digest
from weldment.evaluation.comparison.lineup import BASE, Entry, Lineup, line_up, plan_all
from weldment.evaluation.comparison.rows import Comparison, Kind, Row, mean_row, score_row
from weldment.evaluation.evaluate import Evaluator, Options, Report
from weldment.evaluation.heads import load_head, load_heads
from weldment.evaluation.states import Head, ModelState, load_state, merged_state
from weldment.evaluation.tasks import AnyTask, Task, load_tasks
from weldment.evaluation.tokenizers import refuse_different

if TYPE_CHECKING:
    from weldment.merging import RecipeSource

__all__ = ["Comparison", "Row", "check_comparison", "compare", "score_row"]


def compare(
    recipes: Sequence[RecipeSource],
    tasks: Iterable[str | Path | AnyTask],
    *,
    base: str | None = None,
    experts: Mapping[str, str] | None = None,
    heads: Mapping[str, str | Path] | None = None,
    seeds: int = 1,
    crossed: bool = True,
    report: Report = lambda what, count, total: None,
    finished: Callable[[Row], None] = lambda row: None,
    **options: Any,
) -> Comparison:
    """Scores of recipes' merges beside those of their experts, the base, the plain average and task arithmetic.

    Merges are made in memory, one after the other, and nothing is written. All are planned before anything is
    calculated. Each task is scored with the head that a merge has kept for it, else with that of the task's expert.

    Args:
        recipes: files or their contents.
        tasks: task folders, files of examples, or ids of datasets on the Hub.
        base: the model that the experts were fine-tuned from; by default what the recipes say.
        experts: for a task's name, the model that is its expert; by default the one of the same name.
        heads: for a task's name, where the head for it is stored; used before all others.
        seeds: how often merges with random masks are made, from the recipe's seed on.
        crossed: score experts on each other's tasks, too, not only on those that percents are taken of.
        report: told what is merged or scored at the moment.
        finished: called with each row.
        options: attributes of `Options`.

    Raises:
        UserError: a recipe, a model, a task or a head is at fault.
        MergeError: a merge failed.
    """
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, not {seeds}", where="--seeds")
    loaded = load_tasks(tasks)
    given = load_heads(heads)
    evaluator = Evaluator(loaded, Options(**options), given, report)
    lineup = line_up(recipes, [task.name for task in loaded], base=base, experts=experts or {})
    return _Comparing(evaluator, lineup, seeds, report, finished, crossed).run()


def check_comparison(lineup: Lineup, evaluator: Evaluator) -> None:
    """Find what is wrong with a comparison, from headers and heads alone.

    Raises:
        UserError: a recipe or a baseline cannot be planned, or the models have different tokenizers.
    """
    _Comparing(evaluator, lineup, 1, evaluator.report, lambda row: None).check()


@dataclass
class _Comparing:
    """One comparison while it runs."""

    evaluator: Evaluator
    lineup: Lineup
    seeds: int
    report: Report
    finished: Callable[[Row], None]
    crossed: bool = True
    rows: list[Row] = field(default_factory=list)
    equal: list[tuple[str, str]] = field(default_factory=list)
    missing: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    known: dict[str, Row] = field(default_factory=dict)

    def check(self) -> Mapping[str, RecipeSource]:
        """Plan everything, so that mistakes show before anything is calculated; gives the recipes of the baselines."""
        plan_all({name: entry.source for name, entry in self.lineup.entries.items()})
        _refuse_tokenizers(self.lineup)
        self.heads = self._expert_heads()
        self._refuse_headless()
        baselines = self.lineup.baselines(self._patterns())
        plan_all(baselines)
        return baselines

    def run(self) -> Comparison:
        baselines = self.check()
        for name, reference in self.lineup.models.items():
            self._add(self._stored(name, "expert", reference))
        self._add(self._stored(BASE, "base", self.lineup.base))
        for name, recipe in baselines.items():
            self._add(self._merged(name, "baseline", recipe, what=_what(recipe)))
        for name, entry in self.lineup.entries.items():
            self._add(self._recipe(name, entry))
        return self._comparison()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.finished(row)

    def _expert_heads(self) -> dict[str, Head]:
        """The heads of the tasks' experts, by task."""
        kinds = {task.name: task for task in self.evaluator.tasks}
        models = self.lineup.models
        wanted = {
            task: models[name]
            for task, name in self.lineup.tasks.items()
            if isinstance(kinds[task], Task) and task not in self.evaluator.heads
        }
        return {task: load_head(reference) for task, reference in wanted.items()}

    def _refuse_headless(self) -> None:
        """TaskError for a task that merges of heads kept apart could not be scored on."""
        keeping = [name for name, entry in self.lineup.entries.items() if any(r.heads for r in entry.recipes)]
        known = {**self.heads, **self.evaluator.heads}
        for task in self.evaluator.tasks:
            if keeping and isinstance(task, Task) and task.name not in known:
                cause = f"there is no head for the task {task.name!r}, and no model is its expert"
                fix = f"Give --head {task.name}=FOLDER or FILE, or --expert {task.name}=MODEL"
                raise TaskError(cause, where=keeping[0], fix=fix)

    def _patterns(self) -> Sequence[str]:
        """Which tensors the baselines do not merge: what recipes keep as heads, else what all experts' heads have."""
        if self.lineup.patterns or not self.heads:
            return self.lineup.patterns
        names = [set(head.tensors) for head in self.heads.values()]
        return sorted(set.intersection(*names) - set(open_model(self.lineup.base).tensors))

    def _stored(self, name: str, kind: Kind, reference: str) -> Row:
        self.report(f"opening {name}", 0, 1)
        start = time.perf_counter()
        state = replace(load_state(reference), name=name)
        return self._scored(state, kind, time.perf_counter() - start, reference)

    def _merged(self, name: str, kind: Kind, recipe: RecipeSource, *, what: str, seed: int | None = None) -> Row:
        self.report(f"merging {name}", 0, 1)
        start = time.perf_counter()
        state = merged_state(recipe, name, seed=seed)
        return self._scored(state, kind, time.perf_counter() - start, what)

    def _recipe(self, name: str, entry: Entry) -> Row:
        source, what = entry.source, _what(entry.source)
        if not entry.is_random or self.seeds == 1:
            return self._merged(name, "merge", source, what=what)
        seeds = range(entry.seed, entry.seed + self.seeds)
        return mean_row([self._merged(name, "merge", source, what=what, seed=seed) for seed in seeds])

    def _scored(self, state: ModelState, kind: Kind, seconds: float, what: str) -> Row:
        """The row of a model; one that is equal to another is not scored once more."""
        tasks = self._own_tasks(state.name) if kind == "expert" and not self.crossed else None
        digest = model_digest(state)
        same = self.known.get(digest)
        if tasks is None and same is not None and (kind != "merge" or len(same.scores) == len(self.evaluator.tasks)):
            self.equal += [(state.name, same.name)] if same.name != state.name else []
            return replace(same, name=state.name, kind=kind, seconds=seconds, what=what)
        row = score_row(
            self.evaluator,
            state,
            kind=kind,
            heads=self.heads,
            seconds=seconds,
            what=what,
            left_out=None if kind == "merge" else lambda task, error: self._left_out(state.name, task, error),
            tasks=tasks,
        )
        if tasks is None:
            self.known[digest] = row
        return row

    def _own_tasks(self, expert: str) -> set[str]:
        """The tasks that a model is the expert of."""
        return {task for task, name in self.lineup.tasks.items() if name == expert}

    def _left_out(self, name: str, task: str, error: WeldmentError) -> None:
        self.missing.setdefault(task, []).append((name, error.cause))

    def _comparison(self) -> Comparison:
        scores = {task: score for row in self.rows for task, score in row.scores.items()}
        options = self.evaluator.options
        return Comparison(
            tasks=tuple(task.name for task in self.evaluator.tasks),
            metrics={task: score.metric for task, score in scores.items()},
            examples={task: score.examples for task, score in scores.items()},
            rows=tuple(self.rows),
            experts=self.lineup.tasks,
            split=options.split,
            limit=options.limit,
            seeds=self.seeds,
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        names = self.lineup.tasks
        for task in self.evaluator.tasks:
            if task.name not in names:
                yield f"{task.name}: no expert among the models, so nothing to be in percent of (--expert names one)"
        for row in self.rows:
            for task in (task for task, name in names.items() if name == row.name):
                score = row.scores.get(task)
                if score is not None and not score.value > 0:
                    yield f"{task}: its expert's score is {score.value:g}, of which nothing can be in percent"
        for task, models in self.missing.items():
            listing = ", ".join(name for name, _ in models)
            yield f"{task}: not scored for {listing}: {models[0][1]}"
        yield from (f"{name} is the same model as {other}, scored once" for name, other in dict.fromkeys(self.equal))
        random = [name for name, entry in self.lineup.entries.items() if entry.is_random]
        if random and self.seeds == 1:
            yield f"{', '.join(random)}: one draw of random masks; --seeds 3 shows how much they matter"
        elif self.seeds > 1 and not random:
            yield "no recipe has random masks: one seed is as good as several"


def _refuse_tokenizers(lineup: Lineup) -> None:
    models = {BASE: lineup.base, **lineup.models}
    refuse_different({name: open_model(reference).root for name, reference in models.items()})


def _what(recipe: RecipeSource) -> str:
    """A recipe in a few words."""
    if isinstance(recipe, (str, Path)):
        return str(recipe)
    last = recipe if isinstance(recipe, Mapping) else recipe[-1]
    parameters = ", ".join(f"{name} {value}" for name, value in (last.get("parameters") or {}).items())
    return f"{last.get('merge_method')} of {len(last.get('models') or ())} experts" + (
        f", {parameters}" if parameters else ""
    )
