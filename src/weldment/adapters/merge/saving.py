"""Tensors that adapters store whole: merged as tensors, or kept per expert."""

from __future__ import annotations

import json
from collections.abc import Mapping

from weldment.adapters.merge.inputs import AdapterInputs
from weldment.adapters.merge.plan import SavedTensor
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.errors import PlanError, RecipeError, WeldmentError
from weldment.methods import METHODS
from weldment.methods.arguments import settle
from weldment.planning.jobs import head_name_of
from weldment.planning.layers import depths, position
from weldment.planning.misfits import some
from weldment.planning.roles import input_embedding, is_head
from weldment.recipe import resolve


def saved_tensors(inputs: AdapterInputs) -> tuple[list[SavedTensor], list[WeldmentError]]:
    """The saved tensors of the merged adapter, and what stands in the way of others."""
    names = list(dict.fromkeys(name for own in inputs.saved.values() for name in own))
    misfits = {name: problem for name in names if (problem := _misfit(inputs, name))}
    problems: list[WeldmentError] = _gathered(inputs, misfits)
    made: list[SavedTensor] = []
    averaged: list[str] = []
    stacks = depths(names)
    for name in (name for name in names if name not in misfits):
        try:
            made.append(_saved(inputs, name, position(name, stacks), averaged))
        except RecipeError as error:
            problems.append(error)
    if averaged:
        inputs.notes.append(
            f"{some(averaged)}: {inputs.method.name} needs the base's values, which are not here; averaged instead"
        )
    return made, problems


def _holders(inputs: AdapterInputs, name: str) -> dict[str, TensorEntry]:
    return {reference: own[name] for reference, own in inputs.saved.items() if name in own}


def _misfit(inputs: AdapterInputs, name: str) -> str:
    """Why a saved tensor cannot be merged; empty if it can."""
    if name in inputs.taken:
        return ""
    holders = _holders(inputs, name)
    shapes = {reference: list(entry.shape) for reference, entry in holders.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        return ", ".join(f"{shape} in {reference}" for reference, shape in shapes.items())
    lacking = [reference for reference in inputs.participants if reference not in holders]
    return f"missing from {' and '.join(lacking)}" if lacking else ""


def _gathered(inputs: AdapterInputs, misfits: Mapping[str, str]) -> list[WeldmentError]:
    """One problem for each cause; rows of vocabularies have one of their own."""
    by_cause: dict[tuple[bool, str], list[str]] = {}
    for name, cause in misfits.items():
        by_cause.setdefault((_has_rows(name), cause), []).append(name)
    return [_problem(inputs, names, cause, rows=rows) for (rows, cause), names in by_cause.items()]


def _has_rows(name: str) -> bool:
    return input_embedding([name]) is not None or is_head(name)


def _problem(inputs: AdapterInputs, names: list[str], cause: str, *, rows: bool) -> PlanError:
    patterns = dict.fromkeys(f"{name.rpartition('.')[0] or name}.*" for name in names)
    listing = json.dumps(list(patterns)[:3])
    fix = f"Keep them per expert: `heads: {listing}`; or leave them out with `drop`, or take them from one with `take`"
    if rows:
        cause = f"different vocabularies: {some(names)}: {cause}"
        fix = f"Rows of token embeddings are never merged by row position, which would mix different tokens. {fix}"
    else:
        cause = f"{some(names)}, stored whole: {cause}"
    return PlanError(cause, where=inputs.recipe.origin, fix=fix)


def _saved(inputs: AdapterInputs, name: str, where: float | None, averaged: list[str]) -> SavedTensor:
    """How one saved tensor is made.

    Raises:
        RecipeError: parameters that do not fit.
    """
    recipe, method = inputs.recipe, inputs.method
    holders = _holders(inputs, name)
    dtype = recipe.dtype or next(iter(holders.values())).dtype
    if name in inputs.taken:
        return SavedTensor(name, (holders[inputs.taken[name]],), "passthrough", {"scale": (1.0,)}, dtype)
    entries = tuple(holders[expert.model] for expert in inputs.experts)
    base = holders[inputs.base] if inputs.base else None
    if method.base == "required" and not method.base_is_model and base is None:
        averaged += [name] if len(entries) > 1 else []
        return SavedTensor(name, entries, "linear", settle(METHODS["linear"], {}, len(entries)), dtype)
    parameters = resolve(recipe, method, inputs.request(name, where))
    return SavedTensor(name, entries, method.name, parameters, dtype, base)


def kept_heads(inputs: AdapterInputs) -> dict[str, tuple[TensorEntry, ...]]:
    """The saved tensors that are kept, by the names of the heads' files."""
    names: dict[str, str] = {}
    for reference in inputs.participants:
        stand_in = Checkpoint(reference, {}, (), repo=inputs.adapters[reference].repo)
        names[reference] = head_name_of(stand_in, names.values())
    return {names[reference]: tuple(entries) for reference, entries in inputs.heads.items()}
