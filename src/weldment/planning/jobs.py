"""From requests to jobs: the tensors looked up and compared, the parameters resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import Checkpoint
from weldment.errors import RecipeError, WeldmentError
from weldment.methods.masks import tensor_key
from weldment.planning.finishing import finish_of
from weldment.planning.inputs import Inputs
from weldment.planning.layers import depths
from weldment.planning.misfits import Holder, Misfits
from weldment.planning.plan import TensorJob
from weldment.planning.requests import Request
from weldment.planning.roles import holds_tokens, is_count, is_recomputed
from weldment.planning.sorting import Found, Sorted
from weldment.recipe import resolve

CONSTANT = "a constant that the model's code computes"
COUNTED = "counted anew where running statistics are measured anew"


@dataclass
class Jobs:
    """Jobs made from requests, and what stands in the way of others."""

    jobs: list[TensorJob] = field(default_factory=list)
    problems: list[WeldmentError] = field(default_factory=list)


def merge_jobs(inputs: Inputs, left: Sorted, requests: Iterable[Request], *, is_aligned: bool = True) -> Jobs:
    """A job for each request; what does not fit is among the problems, and constants that are left out in `left`.

    Args:
        is_aligned: false where vocabularies could not be aligned, which explains that their sizes differ.
    """
    misfits = Misfits(inputs)
    made = Jobs()
    requests = list(requests)
    stacks = depths([*(request.name for request in requests), *(found.name for found in left.taken)])
    for request in requests:
        holders = _holders(inputs, left, request)
        if _is_constant(request, holders):
            made.jobs += _constant_jobs(left, request, holders, CONSTANT)
        elif inputs.recipe.recalibrate is not None and is_count(request.name):
            made.jobs += _constant_jobs(left, request, holders, COUNTED)
        elif misfits.fits(request.name, holders, inputs.tensors[inputs.reference].get(request.parts[0].tensor)):
            try:
                made.jobs.append(_job(inputs, request, holders, stacks))
            except RecipeError as error:
                made.problems.append(error)
    made.problems += misfits.problems(is_aligned=is_aligned)
    # The same bad value meets many tensors; the first of them stands for all.
    made.problems = list({problem.cause: problem for problem in reversed(made.problems)}.values())[::-1]
    return made


def _holders(inputs: Inputs, left: Sorted, request: Request) -> list[Holder]:
    """The parts' tensors in the order of the recipe, the base's last; None for those that are missing."""
    holders: list[Holder] = [(part.model, left.tensors[part.model].get(part.tensor)) for part in request.parts]
    if request.base is not None and inputs.base is not None:
        holders.append((inputs.base, left.tensors[inputs.base].get(request.base)))
    return holders


def _is_constant(request: Request, holders: Sequence[Holder]) -> bool:
    return all(entry is None or is_recomputed(request.name, entry.shape) for _, entry in holders)


def _constant_jobs(left: Sorted, request: Request, holders: Sequence[Holder], why: str) -> list[TensorJob]:
    """Keep a constant where the base (or the first model) stores it; the others' copies are not needed."""
    model, entry = holders[-1] if request.base is not None else holders[0]
    for other, found in holders:
        if found is not None and found is not entry:
            left.dropped[other, found.name] = why
    return [] if entry is None else [copy_job(Found(model, request.name, entry))]


def _job(inputs: Inputs, request: Request, holders: Sequence[Holder], stacks: Mapping[str, int]) -> TensorJob:
    """A job for a tensor that all models have; `stacks` are the output's, with their numbers of layers."""
    found = [(model, entry) for model, entry in holders if entry is not None]
    models, entries = tuple(model for model, _ in found), tuple(entry for _, entry in found)
    sources, base = (entries[:-1], entries[-1]) if request.base is not None else (entries, None)
    first = base if base is not None and inputs.method.takes_base else sources[0]
    if not is_float(first.dtype):
        return TensorJob(request.name, first.dtype, first.shape, "agree", (*sources, *([base] if base else [])), models)
    dtype = inputs.recipe.dtype or first.dtype
    parameters = _arguments(inputs, request, first.shape)
    finish = finish_of(inputs.recipe, request.name, first.shape, stacks)
    if inputs.method.name == "passthrough" and parameters["scale"] == (1.0,) and finish is None:
        return TensorJob(request.name, dtype, first.shape, "copy", sources, models, parameters=parameters)
    return TensorJob(
        request.name,
        dtype,
        first.shape,
        "merge",
        sources,
        models,
        base,
        inputs.method.name,
        parameters,
        tuple(_keys(request, inputs.recipe.seed)) if inputs.method.random else (),
        finish=finish,
    )


def _arguments(inputs: Inputs, request: Request, shape: tuple[int, ...]) -> dict[str, Any]:
    """The kernel's arguments."""
    parameters = resolve(inputs.recipe, inputs.method, request)
    try:
        is_embedding = holds_tokens(request.name, shape)
        return inputs.method.arranged(parameters, request.name, shape, is_embedding=is_embedding)
    except ValueError as error:
        raise RecipeError(str(error), where=f"{inputs.recipe.origin}: {request.name}") from error


def _keys(request: Request, seed: int) -> list[int]:
    """One key per model, from its reference as the recipe writes it; a model that is listed twice gets two."""
    seen: dict[str, int] = {}
    keys: list[int] = []
    for part in request.parts:
        number = seen.get(part.model, 0)
        seen[part.model] = number + 1
        keys.append(tensor_key(seed, f"{part.model}#{number}" if number else part.model, request.name))
    return keys


def copy_job(found: Found, file: str = "", dtype: str | None = None) -> TensorJob:
    """A job that copies one tensor, into a file of its own or, converted if it is floating point, into the model."""
    model, name, entry = found
    target = dtype if dtype and is_float(entry.dtype) else entry.dtype
    return TensorJob(name, target, entry.shape, "copy", (entry,), (model,), file=file)


def head_name_of(model: Checkpoint, taken: Iterable[str]) -> str:
    """A file name for an expert: the last part of its reference, numbered where it is taken already."""
    path = PurePath(model.repo or model.reference)
    stem = (path.stem if path.suffix in (".safetensors", ".bin", ".pt", ".pth") else path.name).strip(".") or "model"
    used = {name.lower() for name in taken}
    return next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))) if n.lower() not in used)
