"""Who takes part in a comparison: the recipes by name, their experts, the base, and which expert is which task's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weldment.adapters.merge.recognising import as_models, merged_references
from weldment.adapters.opening import split_reference
from weldment.errors import PlanError, TaskError, UserError, joined
from weldment.evaluation.states import short_name
from weldment.merging import plan, recognised
from weldment.methods import METHODS
from weldment.recipe import Recipe, load_recipes

if TYPE_CHECKING:
    from weldment.merging import RecipeSource

BASE = "base"
AVERAGED = "plain average"
ARITHMETIC = "task arithmetic 0.3"
LAMBDA = 0.3
"""Of the baseline."""

_OWN = (BASE, AVERAGED, ARITHMETIC)


@dataclass(frozen=True)
class Entry:
    """One recipe.

    Attributes:
        recipes: the merges it consists of, adapters written as base+adapter.
        experts: what it merges, in order, as it names them.
        base: the model whose fine-tunes these are, None where it names none.
    """

    source: RecipeSource
    recipes: tuple[Recipe, ...]
    experts: tuple[str, ...]
    base: str | None

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed."""
        return any(METHODS[recipe.method].random for recipe in self.recipes)

    @property
    def seed(self) -> int:
        return self.recipes[-1].seed

    @property
    def origin(self) -> str:
        return self.recipes[-1].origin


@dataclass(frozen=True)
class Lineup:
    """Who takes part.

    Attributes:
        entries: the recipes, by the names of their rows.
        experts: references of the models that the recipes merge, by the names of their rows.
        others: those of models that are no recipe's, and experts of tasks nonetheless.
        base: reference of the base.
        tasks: the name of the expert, by that of its task.
    """

    entries: Mapping[str, Entry]
    experts: Mapping[str, str]
    base: str
    others: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, str]:
        """References of all experts, by the names of their rows."""
        return {**self.experts, **self.others}

    @property
    def patterns(self) -> tuple[str, ...]:
        """What the recipes keep as heads."""
        found = (p for entry in self.entries.values() for recipe in entry.recipes for p in recipe.heads)
        return tuple(dict.fromkeys(found))

    def baselines(self, heads: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The recipes of the baselines, by the names of their rows.

        Args:
            heads: patterns of the tensors that are not merged.
        """
        common = {"models": list(self.experts.values()), **({"heads": list(heads)} if heads else {})}
        lambda_ = {"base_model": self.base, "parameters": {"lambda": LAMBDA}}
        return {
            AVERAGED: {"merge_method": "linear", **common},
            ARITHMETIC: {"merge_method": "task_arithmetic", **lambda_, **common},
        }


def line_up(
    recipes: Sequence[RecipeSource], tasks: Sequence[str], *, base: str | None, experts: Mapping[str, str]
) -> Lineup:
    """Who takes part.

    Args:
        recipes: files or their contents.
        tasks: their names.
        base: of all models, where the recipes do not say it or differ.
        experts: for a task's name, the expert: a model that recipes name, or its short name, or another one.

    Raises:
        UserError: a recipe is not valid, it is not clear what the base is, or who a task's expert is.
    """
    if not recipes:
        raise UserError("there is no recipe to compare", fix="Give a recipe, or several")
    entries = [_entry(source) for source in recipes]
    base = base or _common_base(entries)
    merged = _distinct(expert for entry in entries for expert in entry.experts if _place(expert) != _place(base))
    names = _expert_names(merged)
    _refuse_unknown(experts, tasks)
    others = _distinct(model for model in experts.values() if _known(model, names) is None)
    names |= _expert_names(others, taken=names)
    chosen = {task: _known(experts[task], names) if task in experts else _expert_of(task, names) for task in tasks}
    return Lineup(
        _named(entries, taken=names),
        {names[reference]: reference for reference in merged},
        base,
        {names[reference]: reference for reference in others},
        {task: name for task, name in chosen.items() if name is not None},
    )


def _entry(source: RecipeSource) -> Entry:
    recipes, adapters = recognised(load_recipes(source))
    if adapters:
        recipes = [as_models(recipes[-1], adapters)]
    made = {recipe.name for recipe in recipes}
    bases = [_base(recipe) for recipe in reversed(recipes)]
    references = [reference for recipe in recipes for reference in _merged(recipe)]
    base = next((base for base in bases if base is not None and base not in made), None)
    experts = dict.fromkeys(reference for reference in references if reference not in made and reference != base)
    return Entry(source, tuple(recipes), tuple(experts), base)


def _base(recipe: Recipe) -> str | None:
    """The model that the others are compared with; where methods go from one model to another, it is one of these."""
    return None if METHODS[recipe.method].base_is_model else recipe.base_model


def _merged(recipe: Recipe) -> list[str]:
    first = [recipe.base_model] if METHODS[recipe.method].base_is_model and recipe.base_model else []
    return [*first, *merged_references(recipe)]


def _common_base(entries: Sequence[Entry]) -> str:
    found = _distinct(entry.base for entry in entries if entry.base is not None)
    if not found:
        cause = "names no base model, with which merges are compared"
        raise PlanError(cause, where=entries[0].origin, fix="Name it: --base MODEL, or `base_model` in the recipe")
    if len(found) > 1:
        cause = f"the recipes have different base models: {' and '.join(found)}"
        raise PlanError(cause, fix="Say which one the merges are compared with: --base MODEL")
    return found[0]


def _place(reference: str) -> str:
    """The same for two spellings of one model."""
    parts = [Path(part).expanduser() for part in split_reference(reference)]
    return "+".join(str(path.resolve()) if path.exists() else str(path) for path in parts)


def _distinct(references: Iterable[str]) -> list[str]:
    """The references without repeated models."""
    found: dict[str, str] = {}
    for reference in references:
        found.setdefault(_place(reference), reference)
    return list(found.values())


def _short(reference: str) -> str:
    return short_name(split_reference(reference)[-1])


def _expert_names(references: Sequence[str], taken: Mapping[str, str] | None = None) -> dict[str, str]:
    """Names of rows by reference: the short ones where these tell models apart."""
    used = [*_OWN, *(taken or {}).values(), *map(_short, references)]
    return {ref: _short(ref) if used.count(_short(ref)) == 1 else ref for ref in references}


def _known(model: str, names: Mapping[str, str]) -> str | None:
    """The row of an expert that is given by its reference, in any spelling, or by its name."""
    same = [name for reference, name in names.items() if _place(reference) == _place(model)]
    return next(iter(same), model if model in names.values() else None)


def _refuse_unknown(given: Mapping[str, str], tasks: Sequence[str]) -> None:
    for task in given:
        if task not in tasks:
            fix = f"The tasks are {', '.join(tasks)}"
            raise TaskError(f"there is no task {task!r} that could have an expert", where="--expert", fix=fix)


def _expert_of(task: str, names: Mapping[str, str]) -> str | None:
    found = [reference for reference in names if _short(reference) == task]
    if len(found) > 1:
        cause = f"two models are called like the task {task!r}: {' and '.join(found)}"
        raise TaskError(cause, where="--expert", fix=f"Say which is its expert: --expert {task}={found[0]}")
    return names[found[0]] if found else None


def _named(entries: Sequence[Entry], taken: Mapping[str, str]) -> dict[str, Entry]:
    """The entries by the stems of their files, or by their paths where stems do not tell rows apart."""
    stems = [_stem(entry) for entry in entries]
    used = [*_OWN, *taken.values(), *stems]
    found: dict[str, Entry] = {}
    for entry, stem in zip(entries, stems, strict=True):
        name = stem if used.count(stem) == 1 else _path(entry, stem, found)
        if name in found:
            raise UserError("the recipe is given twice", where=name, fix="Give each recipe once")
        found[name] = entry
    return found


def _stem(entry: Entry) -> str:
    return short_name(str(entry.source)) if isinstance(entry.source, (str, Path)) else entry.recipes[-1].method


def _path(entry: Entry, stem: str, found: Mapping[str, Entry]) -> str:
    """The path of a file; contents have none, and are counted."""
    if isinstance(entry.source, (str, Path)):
        return str(entry.source)
    numbers = (f"{stem} ({number})" for number in range(1, len(found) + 2))
    return next(name for name in numbers if name not in found)


def plan_all(recipes: Mapping[str, RecipeSource]) -> None:
    """Plan every merge, by the names of their rows, so that mistakes show before anything is calculated.

    Raises:
        UserError: with the problems of all of them.
    """
    problems: list[UserError] = []
    for name, recipe in recipes.items():
        try:
            plan(recipe)
        except UserError as error:
            is_file = isinstance(recipe, (str, Path))
            problems.append(
                error if is_file else type(error)(f"{name}: {error.cause}", where=error.where, fix=error.fix)
            )
    if problems:
        raise joined(UserError, problems)
