"""From a recipe and opened models to a plan; finds every problem that headers can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from weldment.checkpoint.dtypes import CONFIG, is_float
from weldment.checkpoint.layout import SHARD_BYTES, Spec, lay_out
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.errors import PlanError, RecipeError, WeldmentError, joined
from weldment.methods import METHODS, Method
from weldment.methods.masks import tensor_key
from weldment.plan.ledger import Ledger
from weldment.plan.layers import depths, with_layers
from weldment.plan.misfits import Misfits
from weldment.plan.names import align
from weldment.plan.plan import Plan, TensorJob
from weldment.plan.requests import Aligned, Request, SliceLayers, slice_layers, sliced_models, whole_models
from weldment.plan.roles import declared_tying, head_name, input_embedding, is_recomputed, matches, redundant_copy, tying, with_tying
from weldment.recipe import experts_of, resolve
from weldment.recipe.recipe import ModelInput, Recipe


@dataclass
class _Building:
    """What is known while a plan is being built."""

    recipe: Recipe
    method: Method
    models: Mapping[str, Checkpoint]
    experts: tuple[ModelInput, ...]
    tensors: dict[str, dict[str, TensorEntry]]
    ledger: Ledger
    base: str | None
    reference: str
    notes: list[str] = field(default_factory=list)
    problems: list[WeldmentError] = field(default_factory=list)
    tied: bool | None = None

    @property
    def participants(self) -> list[str]:
        """Experts and base, each once."""
        listed = [source.model for piece in self.recipe.slices for source in piece.sources]
        listed = listed or [expert.model for expert in self.experts]
        return list(dict.fromkeys([*([self.base] if self.base else []), *listed]))


def build_plan(
    recipe: Recipe,
    models: Mapping[str, Checkpoint],
    *,
    shard_bytes: int = SHARD_BYTES,
    seed: int | None = None,
    stages: Sequence[Plan] = (),
) -> Plan:
    """Plan one merge.

    Args:
        models: every model the recipe names, opened.
        shard_bytes: largest output file.
        seed: replaces the recipe's.
        stages: plans of the intermediate merges among the models.

    Raises:
        PlanError: with all problems found.
    """
    state = _begin(recipe, models)
    _place_special_tensors(state)
    sliced = slice_layers(recipe, state.tensors, models[state.reference].config) if recipe.slices else None
    requests = _requests(state, sliced)
    jobs = _jobs(state, requests, recipe.seed if seed is None else seed)
    if state.problems:
        raise joined(PlanError, state.problems)
    heads = _head_jobs(state)
    taken = _taken_jobs(state, {job.name for job in jobs})
    ordered = _in_file_order(state, [*jobs, *taken]) if sliced is None else [*jobs, *taken]
    specs: list[Spec] = [(job.name, job.dtype, job.shape) for job in ordered]
    extra: dict[str, list[Spec]] = {}
    for job in heads:
        extra.setdefault(job.file, []).append((job.name, job.dtype, job.shape))
    if not specs:
        raise PlanError("no tensor is left to merge", where=recipe.origin, fix="Check `drop`, `take` and `heads`")
    return Plan(
        recipe=recipe,
        models=models,
        reference=recipe.base_model or state.reference,
        experts=tuple(expert.model for expert in state.experts) or tuple(state.participants),
        jobs=(*ordered, *heads),
        layout=lay_out(specs, shard_bytes=shard_bytes, extra=extra),
        ledger=state.ledger.entries(models, [*ordered, *heads]),
        config=_config(state, sliced),
        notes=(*recipe.notes, *state.notes),
        stages=tuple(stages),
    )


def _begin(recipe: Recipe, models: Mapping[str, Checkpoint]) -> _Building:
    method = METHODS[recipe.method]
    experts = experts_of(recipe)
    takes_part = method.base != "unused" and not method.base_is_model and recipe.base_model is not None
    base = recipe.base_model if takes_part else None
    first = recipe.slices[0].sources[0].model if recipe.slices else experts[0].model
    reference = base or first
    state = _Building(recipe, method, models, tuple(experts), {}, Ledger(), base, reference)
    wanted = {name: entry.shape for name, entry in models[reference].tensors.items()}
    for model in state.participants:
        tensors = models[model].tensors
        names, renames = align({name: entry.shape for name, entry in tensors.items()}, wanted)
        state.tensors[model] = {names[name]: entry for name, entry in tensors.items()}
        state.ledger.renamed(model, names)
        state.notes += [f"{model}: tensor names were matched to {reference} by prefix, {change}" for change in renames]
    return state


def _place_special_tensors(state: _Building) -> None:
    """Take out of the merge what the recipe or the tensors' roles say is not merged."""
    _drop_patterns(state)
    _keep_heads(state)
    _drop_redundant(state)
    _settle_tying(state)


def _drop_patterns(state: _Building) -> None:
    for kind, patterns in (("drop", state.recipe.drop), ("take", tuple(state.recipe.take))):
        for pattern in patterns:
            found = [(m, n) for m, tensors in state.tensors.items() for n in tensors if matches(n, (pattern,))]
            if not found:
                state.problems.append(_unmatched(state, kind, pattern))
            for model, name in found:
                entry = state.tensors[model].pop(name)
                source = state.recipe.take.get(pattern)
                if kind == "take" and source == model:
                    state.ledger.take(name, model, entry)
                else:
                    reason = f"the recipe drops {pattern}" if kind == "drop" else f"taken from {source}"
                    state.ledger.drop(model, entry.name, reason)


def _unmatched(state: _Building, key: str, pattern: str) -> PlanError:
    return PlanError(
        f"the pattern {pattern!r} fits no tensor", where=f"{state.recipe.origin}: {key}", fix="Check its spelling"
    )


def _keep_heads(state: _Building) -> None:
    experts = {expert.model for expert in state.experts}
    for pattern in state.recipe.heads:
        found = [(m, n) for m, tensors in state.tensors.items() for n in tensors if matches(n, (pattern,))]
        if not any(model in experts for model, _ in found):
            state.problems.append(_unmatched(state, "heads", pattern))
        for model, name in found:
            entry = state.tensors[model].pop(name)
            if model in experts:
                state.ledger.keep(name, model, entry)
            else:
                state.ledger.drop(model, entry.name, "a head of the base")


def _drop_redundant(state: _Building) -> None:
    """Constants and repeated embeddings that only some models store are left out."""
    for name in {name for tensors in state.tensors.values() for name in tensors}:
        holders = {model: tensors for model, tensors in state.tensors.items() if name in tensors}
        if len(holders) == len(state.tensors):
            continue
        for model, tensors in holders.items():
            entry = tensors[name]
            if is_recomputed(name, entry.shape):
                state.ledger.drop(model, tensors.pop(name).name, "a constant that the model's code computes")
            elif redundant_copy(name, tensors):
                state.ledger.drop(model, tensors.pop(name).name, "a copy of the shared embeddings")


def _settle_tying(state: _Building) -> None:
    """Decide whether the output has a head of its own."""
    found = {model: tying(tensors, state.models[model].config) for model, tensors in state.tensors.items()}
    states = {tied.state for tied in found.values()}
    if states <= {"none"}:
        return
    if "untied" not in states:
        state.tied = True
        for model, tensors in state.tensors.items():
            head = head_name(tensors)
            if head is not None:
                state.ledger.drop(model, tensors.pop(head).name, "equal to the token embeddings, to which it is tied")
        return
    state.tied = False
    head = next(head_name(state.tensors[model]) for model, tied in found.items() if tied.state == "untied")
    for model, tied in found.items():
        tensors = state.tensors[model]
        embedding = input_embedding(tensors)
        if tied.state == "tied" and head is not None and head not in tensors and embedding is not None:
            tensors[head] = tensors[embedding]
            state.notes.append(f"{model}: its head is tied; its token embeddings stand in, and the output's head is untied")


def _requests(state: _Building, sliced: SliceLayers | None) -> list[Request]:
    aligned: Aligned = state.tensors
    if sliced is None:
        return whole_models(state.recipe, state.experts, aligned, state.base is not None)
    return sliced_models(state.recipe, sliced, aligned, state.base)


def _jobs(state: _Building, requests: Sequence[Request], seed: int) -> list[TensorJob]:
    misfits = Misfits(state.recipe, state.models, state.reference)
    jobs: list[TensorJob] = []
    for request in requests:
        entries = [state.tensors[part.model].get(part.tensor) for part in request.parts]
        base = None
        if request.base is not None and state.base is not None:
            base = state.tensors[state.base].get(request.base)
        holders = [(part.model, entry) for part, entry in zip(request.parts, entries, strict=True)]
        if request.base is not None and state.base is not None:
            holders.append((state.base, base))
        if not misfits.fits(request.name, holders):
            continue
        sources = [entry for entry in entries if entry is not None]
        try:
            jobs.append(_job(state, request, sources, base, seed))
        except RecipeError as error:
            state.problems.append(error)
    state.problems += misfits.problems()
    if len(state.problems) > 20:
        state.problems = _distinct(state.problems)
    return jobs


def _distinct(problems: Sequence[WeldmentError]) -> list[WeldmentError]:
    """One problem of each cause: the same bad value meets many tensors."""
    return list({problem.cause: problem for problem in problems}.values())


def _job(
    state: _Building, request: Request, sources: Sequence[TensorEntry], base: TensorEntry | None, seed: int
) -> TensorJob:
    first = base or sources[0]
    constant = is_recomputed(request.name, first.shape)
    if constant or not is_float(first.dtype):
        every = (*sources, *([base] if base else []))
        return TensorJob(request.name, first.dtype, first.shape, "agree" if len(every) > 1 else "copy", every)
    dtype = state.recipe.dtype or first.dtype
    parameters = resolve(state.recipe, state.method, request)
    if state.method.name == "passthrough" and parameters["scale"] == (1.0,):
        return TensorJob(request.name, dtype, first.shape, "copy", tuple(sources), parameters=parameters)
    keys = tuple(_keys(request, seed)) if state.method.random else ()
    return TensorJob(
        request.name, dtype, first.shape, "merge", tuple(sources), base, state.method.name, parameters, keys
    )


def _keys(request: Request, seed: int) -> list[int]:
    """One key per model; a model that is listed twice gets two different ones."""
    seen: dict[str, int] = {}
    keys: list[int] = []
    for part in request.parts:
        number = seen.get(part.model, 0)
        seen[part.model] = number + 1
        keys.append(tensor_key(seed, f"{part.model}#{number}" if number else part.model, request.name))
    return keys


def _copy_job(name: str, entry: TensorEntry, file: str = "", dtype: str | None = None) -> TensorJob:
    return TensorJob(name, dtype if dtype and is_float(entry.dtype) else entry.dtype, entry.shape, "copy", (entry,), file=file)


def _head_jobs(state: _Building) -> list[TensorJob]:
    names = expert_names([expert.model for expert in state.experts])
    return [
        _copy_job(entry.name, entry, f"heads/{names[model]}.safetensors")
        for _, model, entry in sorted(state.ledger.heads, key=lambda head: (head[1], head[0]))
    ]


def expert_names(references: Sequence[str]) -> dict[str, str]:
    """A short file name for each expert: the last part of its reference, numbered where two are equal."""
    names: dict[str, str] = {}
    for reference in dict.fromkeys(references):
        stem = PurePath(reference.partition("@")[0]).name or "model"
        taken = set(names.values())
        names[reference] = next(n for n in [stem, *(f"{stem}-{i}" for i in range(2, 1000))] if n not in taken)
    return names


def _taken_jobs(state: _Building, present: set[str]) -> list[TensorJob]:
    return [
        _copy_job(name, entry, dtype=state.recipe.dtype)
        for name, _, entry in state.ledger.taken
        if name not in present
    ]


def _in_file_order(state: _Building, jobs: Sequence[TensorJob]) -> list[TensorJob]:
    """The order of the reference's files, so that reading and writing go straight through them."""
    order = {name: place for place, name in enumerate(state.models[state.reference].tensors)}
    return sorted(jobs, key=lambda job: order.get(job.name, len(order)))


def _config(state: _Building, sliced: SliceLayers | None) -> dict[str, Any]:
    source = state.models[state.recipe.base_model or state.reference].config
    config = dict(source)
    if not config:
        return config
    if sliced is not None:
        old = depths(state.tensors[state.recipe.slices[0].sources[0].model])[sliced.stack]
        config = with_layers(config, old, sliced.first_sources)
    if state.tied is not None and (declared_tying(config) != state.tied):
        config = with_tying(config, state.tied)
    if state.recipe.dtype is not None:
        for key in ("torch_dtype", "dtype"):
            if key in config:
                config[key] = CONFIG[state.recipe.dtype]
    return config
