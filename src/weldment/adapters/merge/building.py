"""From a recipe and opened adapters to a plan; finds every problem that headers can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weldment.adapters.adapter import Adapter, Layer
from weldment.adapters.merge.coefficients import coefficients, uses_base
from weldment.adapters.merge.fitting import check_fit
from weldment.adapters.merge.inputs import AdapterInputs, gather_adapters, parts_of
from weldment.adapters.merge.meaning import check_meaning, notes_on
from weldment.adapters.merge.plan import AdapterPlan, Module, possible_rank
from weldment.adapters.merge.saving import kept_heads, saved_tensors
from weldment.adapters.merge.settings import base_config
from weldment.errors import PlanError, RecipeError, WeldmentError, joined
from weldment.methods import METHODS
from weldment.planning.layers import depths, position
from weldment.planning.plan import LedgerEntry
from weldment.recipe import resolve
from weldment.recipe.recipe import Recipe

IDLE = "only named as the base, which the method does not use"


def plan_adapters(recipe: Recipe, adapters: Mapping[str, Adapter], *, seed: int | None = None) -> AdapterPlan:
    """Plan a merge of adapters to an adapter.

    Args:
        recipe: all of whose models are adapters.
        adapters: every adapter that it names, opened.
        seed: replaces the recipe's.

    Raises:
        PlanError: with all problems found.
    """
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    inputs = gather_adapters(_with_first_as_base(recipe), adapters)
    check_fit(inputs)
    if inputs.problems:
        raise joined(PlanError, inputs.problems)
    modules, problems = _modules(inputs)
    saved, more = saved_tensors(inputs)
    problems += more
    if not modules and not saved:
        fix = "Check `drop` and `heads`"
        problems.append(PlanError("nothing is left to merge", where=recipe.origin, fix=fix))
    check_meaning(inputs, modules)
    if problems or inputs.problems:
        raise joined(PlanError, [*_distinct(problems), *inputs.problems])
    plan = AdapterPlan(
        recipe=recipe,
        adapters=adapters,
        experts=tuple(expert.model for expert in inputs.experts),
        base=inputs.base,
        modules=tuple(modules),
        saved=tuple(saved),
        dtype=recipe.dtype or _dtype(inputs),
        config=base_config(inputs, modules),
        ledger=_account(inputs),
        heads=kept_heads(inputs),
    )
    return replace(plan, notes=tuple(dict.fromkeys([*recipe.notes, *inputs.notes, *notes_on(plan)])))


def _with_first_as_base(recipe: Recipe) -> Recipe:
    """Methods that move from one model towards another start from the first, if the recipe does not say."""
    if recipe.base_model is None and METHODS[recipe.method].base_is_model and recipe.models:
        return replace(recipe, base_model=recipe.models[0].model)
    return recipe


def _distinct(problems: Sequence[WeldmentError]) -> list[WeldmentError]:
    """The same bad value meets many tensors; the first of them stands for all."""
    return list({problem.cause: problem for problem in reversed(problems)}.values())[::-1]


def _modules(inputs: AdapterInputs) -> tuple[list[Module], list[WeldmentError]]:
    made: list[Module] = []
    problems: list[WeldmentError] = []
    names = sorted(inputs.modules(), key=_in_order)
    tensors = {name: inputs.tensor(name) for name in names}
    stacks = depths(tensors.values())
    for name, tensor in tensors.items():
        try:
            parameters = resolve(inputs.recipe, inputs.method, inputs.request(tensor, position(tensor, stacks)))
        except RecipeError as error:
            problems.append(error)
            continue
        made.append(_module(inputs, name, parameters))
    return made, problems


def _in_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """Names as people sort them: layer 2 before layer 10."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in name.split("."))


def _module(inputs: AdapterInputs, name: str, parameters: Mapping[str, Any]) -> Module:
    layers = tuple(inputs.layers[expert.model].get(name) for expert in inputs.experts)
    base = inputs.layers[inputs.base].get(name) if inputs.base else None
    found = coefficients(inputs.method.name, parameters)
    base_share = 1.0 - sum(found) if found is not None and base is not None and uses_base(inputs.method.name) else 0.0
    if name in inputs.taken:
        found, base_share, base = _one_hot(inputs, name, layers), 0.0, None
    space = inputs.recipe.space or "delta"
    module = Module(name, layers, parameters, base, found, base_share, space)
    return replace(module, rank=_rank(inputs.recipe, module))


def _one_hot(inputs: AdapterInputs, name: str, layers: Sequence[Layer | None]) -> tuple[float, ...]:
    source = inputs.taken[name]
    place = next(n for n, expert in enumerate(inputs.experts) if expert.model == source)
    return tuple(float(n == place) for n in range(len(layers)))


def _rank(recipe: Recipe, module: Module) -> int:
    """The largest rank that the result may have."""
    outputs, inputs = module.pattern.sizes
    largest = max(module.ranks)
    if (combination := recipe.combination) is not None:
        if combination.type == "cat":
            return sum(module.ranks)
        is_cut = combination.type.endswith("svd")
        return min(combination.svd_rank or largest, outputs, inputs) if is_cut else largest
    possible = largest if module.space == "factors" else possible_rank(module)
    if recipe.rank is None:
        return possible if module.space == "cat" else min(largest, possible)
    # Only a cut needs a decomposition, which makes the rank no larger than the matrix.
    return min(possible, outputs, inputs, recipe.rank if isinstance(recipe.rank, int) else possible)


def _dtype(inputs: AdapterInputs) -> str:
    """That of the first layer, or saved tensor, of the first adapter that has any."""
    entries = [layer.a for own in inputs.layers.values() for layer in own.values()]
    entries += [entry for own in inputs.saved.values() for entry in own.values()]
    return entries[0].dtype


def _account(inputs: AdapterInputs) -> tuple[LedgerEntry, ...]:
    """One entry for each tensor of each adapter."""
    used: dict[tuple[str, str], LedgerEntry] = {}
    for reference in inputs.participants:
        found = [(n, part) for n, layer in inputs.layers[reference].items() for part in parts_of(layer)]
        for name, part in [*found, *inputs.saved[reference].items()]:
            fate = "copied" if name in inputs.taken else "merged"
            used[reference, part.name] = LedgerEntry(reference, part.name, fate)
        for part in inputs.heads.get(reference, ()):
            used[reference, part.name] = LedgerEntry(reference, part.name, "head")
    return tuple(
        used.get((reference, name))
        or LedgerEntry(reference, name, "dropped", inputs.dropped.get((reference, name), IDLE))
        for reference, adapter in inputs.adapters.items()
        for name in adapter.tensors
    )
