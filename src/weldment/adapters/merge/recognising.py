"""Which merges are merges of adapters, and how they are written as merges of full models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from weldment.adapters.adapter import Adapter
from weldment.adapters.opening import find_adapter
from weldment.errors import CheckpointError, PlanError, RecipeError, joined
from weldment.methods import METHODS
from weldment.recipe import Recipe
from weldment.recipe.build import baseless
from weldment.recipe.recipe import ModelInput

Adapters = Mapping[str, Adapter]
"""By their reference in the recipe."""


def adapters_of(recipes: Sequence[Recipe], find: Callable[[str], Adapter | None] = find_adapter) -> Adapters:
    """The adapters that a recipe merges with each other; empty for merges of full models.

    Args:
        find: the adapter that a reference names, or None.

    Raises:
        CheckpointError: an adapter is damaged or of a kind that cannot be merged.
        PlanError: adapters among full models, or keys that do not go with what the models are.
        RecipeError: a merge of full models lacks its base.
    """
    made = {recipe.name for recipe in recipes}
    places = {ref: f"{r.origin}: {where}" for r in reversed(recipes) for ref, where in r.references().items()}
    found: dict[str, Adapter] = {}
    damaged: list[CheckpointError] = []
    for reference, where in places.items():
        try:
            adapter = None if reference in made else find(reference)
        except CheckpointError as error:
            damaged.append(_placed(error, where))
            continue
        found |= {reference: adapter} if adapter is not None else {}
    merged = [ref for recipe in recipes for ref in merged_references(recipe)]
    whole = [ref for ref in merged if ref not in found]
    if found and len(recipes) > 1:
        raise _staged(recipes[-1], found)
    if len(damaged) + sum(ref in found for ref in dict.fromkeys(merged)) < len(dict.fromkeys(merged)) or not merged:
        _refuse_among_models(found, whole, places)
        _refuse_keys(recipes)
        return {}
    if damaged:
        raise joined(CheckpointError, damaged)
    return found


def merged_references(recipe: Recipe) -> list[str]:
    """The models that a recipe merges, without the base where that is not one of them."""
    references = [model.model for model in recipe.models if not recipe.slices]
    references += [source.model for piece in recipe.slices for source in piece.sources]
    return references


def _placed(error: CheckpointError, where: str) -> CheckpointError:
    place = f"{where}: {error.where}" if error.where else where
    return type(error)(error.cause, where=place, fix=error.fix)


def _staged(recipe: Recipe, found: Adapters) -> PlanError:
    return PlanError(
        f"{' and '.join(found)}: adapters cannot be merged in a recipe of several merges",
        where=recipe.origin,
        fix="Merge them in a recipe of their own, or name them with their base: base+adapter",
    )


def _refuse_among_models(found: Adapters, whole: Sequence[str], places: Mapping[str, str]) -> None:
    """PlanError for adapters that are to be merged with full models."""
    problems: list[PlanError] = []
    for reference, adapter in found.items():
        base = adapter.config.base_model_name_or_path
        cause = f"is a LoRA adapter of {base or 'a base that it does not name'}, and {whole[0]} is none"
        spelling = f"{base or 'BASE'}+{reference}"
        fix = f"A model with the adapter in it is written {spelling!r}"
        problems.append(PlanError(cause, where=f"{places[reference]}: {reference}", fix=fix))
    if problems:
        raise joined(PlanError, problems)


def _refuse_keys(recipes: Sequence[Recipe]) -> None:
    """Errors for recipes of full models that want what only adapters can be asked for."""
    problems: list[PlanError | RecipeError] = []
    for recipe in recipes:
        problems += baseless(recipe)
        keys = [key for key in ("output", "space", "rank") if getattr(recipe, key) is not None]
        keys += ["combination_type"] if recipe.combination is not None else []
        for key in keys:
            cause = f"`{key}` is for merges of adapters, and {merged_references(recipe)[0]} is none"
            where = f"{recipe.origin}: {key}"
            problems.append(PlanError(cause, where=where, fix="Remove it, or merge adapters"))
    if problems:
        raise joined(PlanError, problems)


def as_models(recipe: Recipe, adapters: Adapters) -> Recipe:
    """A merge of adapters with `output: model` as one of full models: each adapter x is base+x.

    Raises:
        PlanError: it is not clear what the base is.
    """
    base = base_model_of(recipe, adapters)

    def written(reference: str) -> str:
        return f"{base}+{reference}" if reference in adapters else reference

    # Methods that move from one model towards another start from the first, if the recipe does not say.
    first = recipe.models[0].model if METHODS[recipe.method].base_is_model else base
    return replace(
        recipe,
        models=tuple(ModelInput(written(m.model), m.parameters, m.where) for m in recipe.models),
        base_model=written(recipe.base_model or first),
        take={pattern: written(source) for pattern, source in recipe.take.items()},
        output=None,
    )


def base_model_of(recipe: Recipe, adapters: Adapters) -> str:
    """The model that adapters change: the one that the recipe names, else the one that all of them do.

    Raises:
        PlanError: the recipe names none, and the adapters none or different ones.
    """
    if recipe.base_model is not None and recipe.base_model not in adapters:
        return recipe.base_model
    named = {ref: adapter.config.base_model_name_or_path for ref, adapter in adapters.items()}
    bases = {base for base in named.values() if base}
    if len(bases) == 1 and all(named.values()):
        return bases.pop()
    listing = ", ".join(f"{base or 'none'} in {reference}" for reference, base in named.items())
    raise PlanError(
        f"which base to merge into is not said; the adapters name: {listing}",
        where=recipe.origin,
        fix="Add `base_model:` with the model that they were trained on",
    )
