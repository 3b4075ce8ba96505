"""Plans of several merges that build on each other.

An intermediate merge is an input like any other, except that its files do not exist yet. First
every merge is planned in full, in order; then it is known which tensors of an intermediate merge
a later one reads, and it is laid out anew with these alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from weldment.checkpoint.layout import SHARD_BYTES
from weldment.checkpoint.model import Checkpoint, TensorEntry, WeightFile
from weldment.planning.build import build_plan, head_file, layout_of
from weldment.planning.jobs import head_name_of
from weldment.planning.ledger import narrowed
from weldment.planning.plan import Plan, TensorJob
from weldment.planning.recalibration import with_recalibration
from weldment.recipe import Recipe

_ONE_FILE = 1 << 62
"""An intermediate merge is one file, whatever its size: nobody else reads it."""

Stored = Mapping[tuple[str, str], TensorEntry]
"""Tensors of intermediate merges, by the merge's name and the tensor's, where they will lie."""


def plan_merges(
    recipes: Sequence[Recipe],
    models: Mapping[str, Checkpoint],
    *,
    shard_bytes: int = SHARD_BYTES,
    seed: int | None = None,
) -> Plan:
    """Plan merges that build on each other; the plan of the last one carries those of the others.

    Args:
        recipes: in the order in which they must run.
        models: every model that is not an intermediate merge, opened, by reference.
        shard_bytes: largest file of the final output.
        seed: replaces the recipes' seeds.

    Raises:
        PlanError: with all problems of the first merge that has any.
    """
    if seed is not None:
        recipes = [replace(recipe, seed=seed) for recipe in recipes]
    stages: dict[str, Plan] = {}
    for recipe in recipes[:-1]:
        stages[str(recipe.name)] = _plan_one(recipe, models, stages, _ONE_FILE)
    final = _plan_one(recipes[-1], models, stages, shard_bytes)
    if stages:
        final = _assembled(final, list(stages.values()), shard_bytes)
    return with_recalibration(final, recipes[:-1])


def _plan_one(recipe: Recipe, models: Mapping[str, Checkpoint], stages: Mapping[str, Plan], shard_bytes: int) -> Plan:
    used = [stages[reference] for reference in recipe.references() if reference in stages]
    made = {str(stage.recipe.name): as_checkpoint(stage) for stage in used}
    own = {reference: made.get(reference) or models[reference] for reference in recipe.references()}
    return build_plan(recipe, own, shard_bytes=shard_bytes, stages=used)


def as_checkpoint(stage: Plan) -> Checkpoint:
    """An intermediate merge as an input; its file appears when the merge has run."""
    files = {
        file.name: WeightFile(f"{stage.recipe.name}/{file.name}", file.size)
        for file in stage.layout.files
        if "/" not in file.name
    }
    tensors = {
        slot.name: TensorEntry(slot.name, slot.dtype, slot.shape, files[slot.file], slot.offset)
        for slot in stage.layout.slots
        if slot.file in files
    }
    return Checkpoint(reference=str(stage.recipe.name), tensors=tensors, weight_files=(), config=stage.config)


def _assembled(final: Plan, stages: Sequence[Plan], shard_bytes: int) -> Plan:
    """The final plan with its stages reduced to what is read, and with the heads that they keep."""
    final = _with_heads(final, stages)
    needed = _needed([*stages, final])
    stored: dict[tuple[str, str], TensorEntry] = {}
    kept: list[Plan] = []
    for stage in stages:
        name = str(stage.recipe.name)
        read = [job for job in stage.jobs if not job.file and (name, job.name) in needed]
        heads = [job for job in stage.jobs if job.file]
        if read:
            jobs, ledger = _relocated(read, stored), narrowed(stage.ledger, [*read, *heads])
            layout = layout_of(jobs, _ONE_FILE)
            kept.append(replace(stage, jobs=jobs, layout=layout, ledger=ledger, stages=(), heads={}))
            stored |= {(name, tensor): entry for tensor, entry in as_checkpoint(kept[-1]).tensors.items()}
    jobs = _relocated(final.jobs, stored)
    notes = [f"{stage.recipe.name}: {note}" for stage in kept for note in stage.notes]
    layout = layout_of(jobs, shard_bytes)
    return replace(final, jobs=jobs, layout=layout, stages=tuple(kept), notes=(*notes, *final.notes))


def _needed(plans: Sequence[Plan]) -> set[tuple[str, str]]:
    """What is read of each merge, by merge and tensor: what the last plan's jobs read, and what that needs in turn."""
    needed: set[tuple[str, str]] = set()
    for plan in reversed(plans):
        for job in plan.jobs:
            if plan is plans[-1] or (not job.file and (str(plan.recipe.name), job.name) in needed):
                needed |= {(model, entry.name) for model, entry in job.reads}
    return needed


def _relocated(jobs: Iterable[TensorJob], stored: Stored) -> tuple[TensorJob, ...]:
    """The jobs with the tensors of intermediate merges where they will lie."""

    def moved(model: str, entry: TensorEntry) -> TensorEntry:
        if entry.rows is None:
            return stored.get((model, entry.name), entry)
        lenders = {number: (other, moved(other, found)) for number, (other, found) in entry.rows.sources.items()}
        place = stored.get((model, entry.name), entry)
        return replace(entry, file=place.file, offset=place.offset, rows=replace(entry.rows, sources=lenders))

    return tuple(
        replace(
            job,
            sources=tuple(moved(model, entry) for model, entry in job.inputs[: len(job.sources)]),
            base=job.base and moved(job.models[-1], job.base),
        )
        for job in jobs
    )


def _with_heads(final: Plan, stages: Sequence[Plan]) -> Plan:
    """The final plan with the heads of the intermediate merges' experts, each once."""
    heads = dict(final.heads)
    jobs = {(job.file, job.name): job for job in final.jobs}
    for stage in stages:
        for name, expert in stage.heads.items():
            place = next((known for known, other in heads.items() if other is expert), None)
            place = place or head_name_of(expert, heads)
            heads[place] = expert
            for job in stage.jobs:
                if job.file == head_file(name):
                    moved = replace(job, file=head_file(place))
                    jobs.setdefault((moved.file, moved.name), moved)
    return replace(final, heads=heads, jobs=tuple(jobs.values()))
