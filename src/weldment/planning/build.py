"""From a recipe and opened models to a plan; finds every problem that headers can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weldment.checkpoint.layout import SHARD_BYTES, Layout, Spec, lay_out, spec_bytes
from weldment.checkpoint.model import Checkpoint
from weldment.errors import PlanError, WeldmentError, joined
from weldment.planning.config import main_dtype, stated_dtype_holds, with_dtype, with_layers, with_rows
from weldment.planning.files import config_model, file_notes, side_model
from weldment.planning.inputs import Inputs, gather
from weldment.planning.jobs import copy_job, head_name_of, merge_jobs
from weldment.planning.ledger import account
from weldment.planning.patterns import check_patterns
from weldment.planning.plan import Plan, TensorJob
from weldment.planning.requests import Request, Slicing, is_in_stack, slicing, whole_models
from weldment.planning.roles import has_token_rows, input_embedding
from weldment.planning.sorting import Sorted, sort_tensors
from weldment.planning.tying import declared_tying, with_tying
from weldment.planning.vocabulary import Words, compare_vocabularies, settle_vocabulary
from weldment.recipe.recipe import Recipe
from weldment.vocabulary.checks import ids_beyond
from weldment.vocabulary.writing import GENERATION, generation_config, known_tokens, with_token_ids, written_tokens


def build_plan(
    recipe: Recipe, models: Mapping[str, Checkpoint], *, shard_bytes: int = SHARD_BYTES, stages: Sequence[Plan] = ()
) -> Plan:
    """Plan one merge.

    Args:
        recipe: the merge.
        models: every model the recipe names, opened.
        shard_bytes: largest output file.
        stages: plans of the intermediate merges among the models.

    Raises:
        PlanError: with all problems found.
    """
    inputs = gather(recipe, models)
    left = sort_tensors(inputs)
    words = settle_vocabulary(inputs, left, stages)
    inputs = words.inputs
    sliced, slice_problems = slicing(inputs, left.tensors) if recipe.slices else (None, [])
    made = merge_jobs(inputs, left, _requests(inputs, left, sliced), is_aligned=not words.problems)
    problems: list[WeldmentError] = [*left.problems, *slice_problems, *_taken_layers(inputs, left, sliced)]
    patterns = check_patterns(inputs, made.jobs)
    problems += [*made.problems, *words.problems, *_differences(inputs, left, made.jobs, stages), *patterns.problems]
    if problems:
        raise joined(PlanError, problems)
    jobs = [*made.jobs, *(copy_job(found, dtype=recipe.dtype) for found in left.taken)]
    if not jobs:
        raise PlanError("no tensor is left to merge", where=recipe.origin, fix="Check `drop`, `take` and `heads`")
    jobs = jobs if sliced else _in_file_order(inputs, jobs)
    heads, head_jobs = _heads(inputs, left)
    side = side_model(inputs, stages)
    config = _config(inputs, left, sliced, jobs, words)
    if lost := _lost_ids(inputs, jobs, words, config, side):
        raise joined(PlanError, lost)
    notes = [
        *recipe.notes,
        *inputs.notes,
        *left.notes,
        *words.notes,
        *patterns.notes,
        *file_notes(inputs, side),
    ]
    return Plan(
        recipe=recipe,
        models=models,
        reference=inputs.reference,
        experts=tuple(expert.model for expert in inputs.experts),
        jobs=(*jobs, *head_jobs),
        layout=layout_of((*jobs, *head_jobs), shard_bytes),
        ledger=account(models, inputs.participants, [*jobs, *head_jobs], left.dropped),
        config=config,
        side=side,
        tokenizer=words.tokenizer,
        output=words.output,
        heads=heads,
        notes=tuple(dict.fromkeys([*notes, *_size_notes(jobs, shard_bytes)])),
        stages=tuple(stages),
    )


def _requests(inputs: Inputs, left: Sorted, sliced: Slicing | None) -> Iterable[Request]:
    if inputs.recipe.slices:
        return sliced.requests() if sliced is not None else ()
    return whole_models(inputs, left.tensors)


def _differences(
    inputs: Inputs, left: Sorted, jobs: Sequence[TensorJob], stages: Sequence[Plan]
) -> Sequence[PlanError]:
    """Vocabularies that differ, although the output has rows of several models that are not aligned.

    Rows are mixed where they are merged, and where the embeddings come from one model and the head from another.
    """
    used = {model for job in jobs if has_token_rows(job.name) for model in job.models}
    used |= {found.model for found in left.taken if has_token_rows(found.name)}
    if inputs.recipe.tokenizer or len(used) < 2:
        return ()
    order = dict.fromkeys([*inputs.participants, *inputs.models])
    return compare_vocabularies(inputs, [model for model in order if model in used], stages)


def layout_of(jobs: Iterable[TensorJob], shard_bytes: int) -> Layout:
    """The files of the model and of the heads."""
    files: dict[str, list[Spec]] = {"": []}
    for job in jobs:
        files.setdefault(job.file, []).append((job.name, job.dtype, job.shape))
    return lay_out(files.pop(""), shard_bytes=shard_bytes, extra=files)


def _taken_layers(inputs: Inputs, left: Sorted, sliced: Slicing | None) -> list[PlanError]:
    """Layers of slices are numbered anew, so that a name in `take` could mean two of them."""
    inside = [found.name for found in left.taken if sliced and is_in_stack(found.name, sliced.stack)]
    if not inside:
        return []
    return [
        PlanError(
            f"`take` names {inside[0]}, a tensor of a layer, and slices number layers anew",
            where=f"{inputs.recipe.origin}: take",
            fix="Say which layers come from which model with `slices`",
        )
    ]


def _heads(inputs: Inputs, left: Sorted) -> tuple[dict[str, Checkpoint], list[TensorJob]]:
    """The experts that keep heads, by the names of their files, and the jobs that write these."""
    names: dict[str, str] = {}
    for expert in dict.fromkeys(expert.model for expert in inputs.experts):
        names[expert] = head_name_of(inputs.models[expert], names.values())
    kept = dict.fromkeys(expert for expert in names for found in left.heads if found.model == expert)
    jobs = [
        copy_job(found._replace(name=found.entry.name), head_file(names[expert]))
        for expert in kept
        for found in sorted(left.heads, key=lambda found: found.name)
        if found.model == expert
    ]
    return {names[expert]: inputs.models[expert] for expert in kept}, jobs


def head_file(name: str) -> str:
    """Where the heads of an expert are kept."""
    return f"heads/{name}.safetensors"


def _in_file_order(inputs: Inputs, jobs: Sequence[TensorJob]) -> list[TensorJob]:
    """The order of the reference's files, so that reading and writing go straight through them."""
    order = {name: place for place, name in enumerate(inputs.models[inputs.reference].tensors)}
    return sorted(jobs, key=lambda job: order.get(job.name, len(order)))


def _size_notes(jobs: Sequence[TensorJob], shard_bytes: int) -> list[str]:
    large = sum(spec_bytes((job.name, job.dtype, job.shape)) > shard_bytes for job in jobs)
    if not large:
        return []
    return [
        f"{large} tensor{'s are' if large > 1 else ' is'} larger than a shard should be and will be alone in a file"
    ]


def _config(
    inputs: Inputs, left: Sorted, sliced: Slicing | None, jobs: Sequence[TensorJob], words: Words
) -> Mapping[str, Any]:
    """The output's config; empty if there is none to start from."""
    origin = inputs.models[config_model(inputs)]
    config = origin.config
    if not config:
        return {}
    if sliced is not None:
        layers = [layer.first for layer in sliced.layers]
        config = with_layers(config, [(inputs.models[model].config, index) for model, index in layers])
    if left.tied is not None and declared_tying(config) != left.tied:
        config = with_tying(config, left.tied)
    dtype = main_dtype((job.dtype, math.prod(job.shape)) for job in jobs)
    if dtype is not None and (inputs.recipe.dtype or not stated_dtype_holds(origin, dtype)):
        config = with_dtype(config, dtype)
    if words.tokenizer is not origin:
        new = written_tokens(words.tokenizer, words.output)
        config = with_token_ids(config, words.tokenizer.config, known_tokens(origin), new)
    old, new = _rows(inputs, jobs)
    return config if old == new else with_rows(config, old, new)


def _lost_ids(
    inputs: Inputs, jobs: Sequence[TensorJob], words: Words, config: Mapping[str, Any], side: Checkpoint
) -> list[PlanError]:
    """Ids of special tokens in the output's configurations that its embeddings have no row for."""
    _, rows = _rows(inputs, jobs)
    if words.output is None or not rows:
        return []
    generation = generation_config(side, words.tokenizer, words.output.tokens)
    owners = dict.fromkeys((words.tokenizer.reference, config_model(inputs), side.reference))
    fix = f"Correct it in {' or '.join(owners)}; null says that there is none"
    return [
        PlanError(said, where=inputs.recipe.origin, fix=fix)
        for name, content in (("config.json", config), (GENERATION, generation))
        for said in ids_beyond(name, content, rows)
    ]


def _rows(inputs: Inputs, jobs: Sequence[TensorJob]) -> tuple[int, int]:
    """Rows of the token embeddings, of the reference and of the output."""
    shapes = {job.name: job.shape for job in jobs}
    tensors = inputs.tensors[inputs.reference]
    name = input_embedding(tensors)
    if name is None or name not in shapes:
        return 0, 0
    stored = inputs.models[inputs.reference].tensors[tensors[name].name]
    return stored.shape[0], shapes[name][0]
