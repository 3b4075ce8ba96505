"""From a file or a mapping to checked recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weldment.errors import RecipeError, joined
from weldment.recipe.build import build_recipe
from weldment.recipe.documents import parse_documents, plain, read_text
from weldment.recipe.overrides import apply_overrides
from weldment.recipe.recipe import Recipe
from weldment.recipe.stages import in_order
from weldment.recipe.words import Place, shown

Source = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def load_recipes(source: Source, *, overrides: Sequence[str] = ()) -> tuple[Recipe, ...]:
    """Read and check a recipe; several documents are merges that build on each other.

    Args:
        source: a file of one or more YAML documents, a parsed document, or several.
        overrides: `path=value` changes (see `overrides`) to the final merge: the document without
            a `name`, or the last one if all have names.

    Returns:
        the merges in the order in which they must run; the last is the final one.

    Raises:
        RecipeError: with everything that is wrong.
    """
    documents, origin = read_documents(source)
    places = _places(documents, origin)
    if overrides:
        nameless = [document for document in documents if document.get("name") is None]
        apply_overrides((nameless or documents)[-1], overrides)
    recipes: list[Recipe] = []
    problems: list[RecipeError] = []
    for document, place in zip(documents, places, strict=True):
        recipe, found = build_recipe(document, place)
        problems += found
        recipes += [recipe] if recipe is not None else []
    if problems:
        raise joined(RecipeError, problems)
    return in_order(recipes, origin)


def read_documents(source: Source) -> tuple[list[dict[str, Any]], str]:
    """The documents of a recipe, not checked yet and nobody else's, and what to call it in messages.

    Raises:
        RecipeError: it cannot be read, or is no mapping.
    """
    if isinstance(source, (str, Path)):
        origin = str(source)
        documents = parse_documents(read_text(Path(source)), origin)
    else:
        origin = "recipe"
        copied = plain(source, Place(origin))
        documents = copied if isinstance(copied, list) else [copied]
    if not documents:
        raise RecipeError("the recipe is empty", where=origin, fix="It needs at least `merge_method` and `models`")
    for document in documents:
        if not isinstance(document, dict):
            fix = "It needs at least `merge_method` and `models`"
            raise RecipeError(f"a recipe is a mapping of keys, not {shown(document)}", where=origin, fix=fix)
    return documents, origin


def _places(documents: Sequence[Mapping[str, Any]], origin: str) -> list[Place]:
    if len(documents) == 1:
        return [Place(origin)]
    names = [document.get("name") for document in documents]
    return [
        Place(f"{origin}, {name if isinstance(name, str) else f'document {number}'}")
        for number, name in enumerate(names, 1)
    ]
