"""Several merges in one recipe: which needs which, and in what order they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from weldment.errors import RecipeError, joined
from weldment.recipe.recipe import Recipe


def in_order(recipes: Sequence[Recipe], origin: str) -> tuple[Recipe, ...]:
    """The recipes with every intermediate merge before those that use it; the final merge is last.

    Raises:
        RecipeError: two recipes have one name, a merge needs itself, or there is not exactly one
            merge whose result no other uses.
    """
    _check_names(recipes, origin)
    named = {recipe.name: index for index, recipe in enumerate(recipes) if recipe.name is not None}
    needs = {
        index: sorted({named[name] for name in references(recipe) if name in named})
        for index, recipe in enumerate(recipes)
    }
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        circle = " -> ".join(str(recipes[index].name) for index in reversed(error.args[1]))
        raise RecipeError(f"the merges need each other in a circle: {circle}", where=origin) from error
    used = {need for indices in needs.values() for need in indices}
    finals = [index for index in range(len(recipes)) if index not in used]
    if len(finals) > 1:
        listing = ", ".join(recipes[index].name or "the one without a name" for index in finals)
        raise RecipeError(
            f"{len(finals)} merges are used by no other: {listing}",
            where=origin,
            fix="A recipe has one final merge; put the others into recipes of their own",
        )
    return tuple(recipes[index] for index in order)


def _check_names(recipes: Sequence[Recipe], origin: str) -> None:
    names = Counter(recipe.name for recipe in recipes)
    problems: list[RecipeError] = []
    if names.pop(None, 0) > 1:
        fix = "Give every merge but the final one a `name:`"
        problems.append(RecipeError("several merges have no name", where=origin, fix=fix))
    for name, times in names.items():
        if times > 1:
            problems.append(RecipeError(f"{times} merges are named `{name}`", where=origin, fix="Rename all but one"))
    if problems:
        raise joined(RecipeError, problems)


def references(recipe: Recipe) -> set[str]:
    """Everything that a recipe names as a model; of `base+adapter` both."""
    written = [recipe.base_model, *recipe.take.values(), *(model.model for model in recipe.models)]
    written += [source.model for piece in recipe.slices for source in piece.sources]
    written += _texts(recipe.tokenizer)
    return {part for reference in written if reference for part in reference.split("+")}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
