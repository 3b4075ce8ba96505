"""The main job: recipe -> plan -> engine -> checkpoint -> report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weldment.checkpoint.hub import download
from weldment.checkpoint.journal import Journal
from weldment.checkpoint.layout import SHARD_BYTES
from weldment.checkpoint.model import Checkpoint, TensorEntry, WeightFile
from weldment.checkpoint.opening import open_checkpoint
from weldment.checkpoint.side_files import write_json, write_side_files
from weldment.checkpoint.staging import MANIFEST, Staging, check_output, free_bytes
from weldment.engine.execute import Execution, execute
from weldment.engine.memory import fit
from weldment.engine.progress import Progress, Silent
from weldment.engine.run import Machine
from weldment.errors import CheckpointError, OutputError, UserError
from weldment.plan.build import build_plan, expert_names
from weldment.plan.plan import Plan
from weldment.recipe import Recipe, load_recipes
from weldment.report.card import model_card
from weldment.report.manifest import file_digest, manifest, write_manifest

RecipeSource = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: where it is, what was planned, and the checksum of every tensor."""

    path: Path
    plan: Plan
    checksums: Mapping[str, str]


def plan(
    recipe: RecipeSource,
    *,
    overrides: Sequence[str] = (),
    shard_size: int = SHARD_BYTES,
    seed: int | None = None,
) -> Plan:
    """Plan a merge from headers alone: nothing is downloaded but configs, nothing is written.

    Args:
        recipe: a YAML file, or its content as a mapping (or several, for staged merges).
        overrides: `key.path=value` changes to the recipe.
        shard_size: largest output file in bytes.
        seed: replaces the recipe's seed.

    Raises:
        UserError: recipe or models are at fault; the message lists every problem found.
    """
    return _plan(load_recipes(recipe, overrides=overrides), {}, shard_size, seed)


def _plan(recipes: Sequence[Recipe], opened: dict[str, Checkpoint], shard_size: int, seed: int | None) -> Plan:
    stages: dict[str, Plan] = {}
    for recipe in recipes[:-1]:
        assert recipe.name is not None
        # An intermediate merge is one file, whatever its size: nobody else reads it.
        stages[recipe.name] = _plan_one(recipe, opened, stages, 1 << 62, seed)
    final = _plan_one(recipes[-1], opened, stages, shard_size, seed)
    return _pruned(final)


def _plan_one(
    recipe: Recipe, opened: dict[str, Checkpoint], stages: Mapping[str, Plan], shard_size: int, seed: int | None
) -> Plan:
    models: dict[str, Checkpoint] = {}
    for reference, where in recipe.references().items():
        if reference in stages:
            models[reference] = _as_checkpoint(stages[reference])
            continue
        if reference not in opened:
            opened[reference] = open_checkpoint(reference, where=f"{recipe.origin}: {where}")
        models[reference] = opened[reference]
    used = [stages[name] for name in models if name in stages]
    return build_plan(replace(recipe, seed=recipe.seed if seed is None else seed), models, shard_bytes=shard_size, stages=used)


def _as_checkpoint(stage: Plan) -> Checkpoint:
    """An intermediate merge as an input; its file appears when the stage has run."""
    source = stage.models[stage.reference]
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
    return Checkpoint(
        reference=stage.recipe.name or "",
        tensors=tensors,
        weight_files=(),
        root=source.root,
        config=stage.config,
        side_files=source.side_files,
    )


def _pruned(final: Plan) -> Plan:
    """The plan with its stages reduced to the tensors that somebody reads."""
    needed: dict[str, set[str]] = {}

    def visit(plan: Plan) -> Plan:
        for job in plan.jobs:
            for entry in (*job.sources, *([job.base] if job.base else [])):
                if entry.file.path is None and "/" in entry.file.name:
                    needed.setdefault(entry.file.name.split("/")[0], set()).add(entry.name)
        return plan

    visit(final)
    kept: list[Plan] = []
    for stage in reversed(_in_order(final)):
        jobs = tuple(job for job in stage.jobs if job.name in needed.get(stage.recipe.name or "", set()) and not job.file)
        smaller = replace(stage, jobs=jobs, stages=())
        visit(smaller)
        kept.append(smaller)
    return replace(final, stages=tuple(reversed(kept)))


def _in_order(plan: Plan) -> list[Plan]:
    """All stages below a plan, each once, inputs before users."""
    found: dict[str, Plan] = {}
    for stage in plan.stages:
        for inner in (*_in_order(stage), stage):
            found.setdefault(inner.recipe.name or "", inner)
    return list(found.values())


def merge(
    recipe: RecipeSource,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    seed: int | None = None,
    shard_size: int = SHARD_BYTES,
    overwrite: bool = False,
    resume: bool = True,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge models into the folder `out`.

    The output is made beside `out`, checked, and renamed into place; a merge that was killed goes
    on where it was when it is called again with the same arguments.

    Args:
        recipe: a YAML file, or its content as a mapping (or several, for staged merges).
        overrides: `key.path=value` changes to the recipe.
        device: "cpu", "cuda", "mps" or "auto".
        threads: worker threads; all processors by default.
        max_memory: bytes that the merge may use, or None.
        seed: replaces the recipe's seed.
        shard_size: largest output file in bytes.
        overwrite: replace a non-empty `out`, once the new output is complete.
        resume: go on from an interrupted run of the same merge.
        allow_nonfinite: report NaN and infinity in the output instead of failing.
        progress: receives events.

    Raises:
        UserError: recipe, models or output folder are at fault; nothing was written.
        MergeError: the merge failed while it ran.
    """
    progress = progress or Silent()
    recipes = load_recipes(recipe, overrides=overrides)
    opened: dict[str, Checkpoint] = {}
    planned = _plan(recipes, opened, shard_size, seed)
    target = Path(out)
    check_output(target, overwrite=overwrite)
    _refuse_own_input(target, opened)
    machine, block = fit(planned, device, threads, max_memory)
    if not planned.is_local:
        opened = {name: download(model) if not model.is_local else model for name, model in opened.items()}
        planned = _plan(recipes, opened, shard_size, seed)
    return run_plan(
        planned,
        target,
        machine=machine,
        block=block,
        overwrite=overwrite,
        resume=resume,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )


def _refuse_own_input(out: Path, opened: Mapping[str, Checkpoint]) -> None:
    for reference, model in opened.items():
        if model.root is not None and model.root.resolve() == out.resolve():
            raise OutputError(
                f"the output is also an input ({reference})", where=str(out), fix="Choose another output folder"
            )


def run_plan(
    planned: Plan,
    out: Path,
    *,
    machine: Machine,
    block: int,
    overwrite: bool = False,
    resume: bool = True,
    allow_nonfinite: bool = False,
    progress: Progress,
) -> MergeResult:
    """Execute a plan whose inputs are all local."""
    with Staging(out, overwrite=overwrite) as staging:
        stamps = _stamps(planned)
        journal = Journal(staging.journal, {"plan": planned.hash, "inputs": stamps})
        finished = journal.finished() if resume else None
        if finished is None:
            if staging.journal.exists():
                progress.message("what an earlier run left belongs to another merge; starting afresh")
            staging.clear()
        elif finished:
            progress.message(f"resuming: {len(finished)} tensors are done")
        _check_space(planned, staging, finished or {})
        staging.folder.mkdir(parents=True, exist_ok=True)
        journal.open(fresh=finished is None)
        try:
            checksums = _run_stages(planned, staging, journal, finished or {}, machine, block, allow_nonfinite, progress)
        finally:
            journal.close()
        if _stamps(planned) != stamps:
            raise CheckpointError("an input file changed while it was merged", fix="Run the merge again")
        _complete(planned, staging, checksums, out.name)
        staging.publish()
    return MergeResult(Path(out), planned, checksums)


def _run_stages(
    planned: Plan,
    staging: Staging,
    journal: Journal,
    finished: Mapping[str, str],
    machine: Machine,
    block: int,
    allow_nonfinite: bool,
    progress: Progress,
) -> dict[str, str]:
    def find(file: WeightFile) -> Path:
        return file.path if file.path is not None else staging.stages / file.name

    checksums: dict[str, str] = {}
    for stage in (*planned.stages, planned):
        last = stage is planned
        if not last:
            progress.message(f"stage {stage.recipe.name}: {len(stage.jobs)} tensors")
        folder = staging.folder if last else staging.stages / str(stage.recipe.name)
        checksums = execute(
            stage,
            Execution(
                folder=folder,
                label="" if last else f"{stage.recipe.name}:",
                journal=journal,
                finished=finished,
                find=find,
                machine=replace(machine, accumulate=stage.recipe.accumulate),
                progress=progress,
                block=block,
                allow_nonfinite=allow_nonfinite,
            ),
        )
    return checksums


def _stamps(planned: Plan) -> dict[str, list[list[Any]]]:
    """Size and modification time of every input file as they are now."""
    found: dict[str, list[list[Any]]] = {}
    for plan in (*planned.stages, planned):
        for reference, model in plan.models.items():
            stats = [(file.name, file.path.stat()) for file in model.weight_files if file.path is not None]
            found[reference] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return found


def _check_space(planned: Plan, staging: Staging, finished: Mapping[str, str]) -> None:
    needed = sum(stage.write_bytes for stage in (*planned.stages, planned))
    present = sum(path.stat().st_blocks * 512 for path in staging.root.rglob("*") if path.is_file())
    free = free_bytes(staging.root)
    if needed > free + present:
        staging_left = not finished
        if staging_left:
            staging.discard()
        raise OutputError(
            f"not enough disk space: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            where=str(staging.out),
            fix="Free some space or choose another disk",
        )


def _complete(planned: Plan, staging: Staging, checksums: Mapping[str, str], name: str) -> None:
    """Everything but the weights: side files, config, index, heads' configs, card, manifest."""
    folder = staging.folder
    write_side_files(folder, planned.models[planned.reference], planned.config, planned.layout)
    heads = {job.file for job in planned.jobs if job.file}
    for reference, short in expert_names(planned.experts).items():
        if f"heads/{short}.safetensors" in heads and planned.models[reference].config:
            write_json(folder / "heads" / f"{short}.json", planned.models[reference].config)
    (folder / "README.md").write_text(model_card(planned, name), encoding="utf-8")
    sizes = {file.name: len(file.header) for file in planned.layout.files}
    files = {
        path.relative_to(folder).as_posix(): file_digest(path, sizes.get(path.relative_to(folder).as_posix()))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_manifest(folder, manifest(planned, checksums, files))


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        UserError: there is none, or it is not one.
    """
    path = out / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no {MANIFEST} here", where=str(out), fix="Give a folder that `weld merge` wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{MANIFEST} cannot be read: {error}", where=str(path)) from error
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
        raise UserError(f"{MANIFEST} is not a manifest", where=str(path))
    return content
