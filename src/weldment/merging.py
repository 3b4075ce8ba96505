"""The main job: recipe -> plan -> engine -> checkpoint -> report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from weldment.adapters.adapter import Adapter
from weldment.adapters.merge.building import plan_adapters
from weldment.adapters.merge.memory import fit_adapters
from weldment.adapters.merge.plan import AdapterPlan
from weldment.adapters.merge.recognising import adapters_of, as_models
from weldment.adapters.opening import open_model
from weldment.checkpoint.layout import SHARD_BYTES
from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.staging import Staging, check_output
from weldment.engine.memory import fit
from weldment.engine.progress import Progress, Silent
from weldment.errors import CheckpointError, OutputError, UserError, joined
from weldment.planning.plan import Plan
from weldment.planning.stages import plan_merges
from weldment.recipe import Recipe, load_recipes
from weldment.recipe.drm_file import is_file
from weldment.recipe.recipe import SEED, is_seed
from weldment.writing import Run

if TYPE_CHECKING:
    from torch import Tensor

Input = Checkpoint | Adapter
RecipeSource = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    Attributes:
        path: where it is.
        plan: what was planned; an `AdapterPlan` if adapters were merged to an adapter.
        checksums: of every tensor, by `file|name`.
        lost: of a merged adapter, what the cut to the rank lost of every module: the relative error in the
            Frobenius norm.
    """

    path: Path
    plan: Plan | AdapterPlan
    checksums: Mapping[str, str]
    lost: Mapping[str, float] = field(default_factory=dict)


def plan(
    recipe: RecipeSource,
    *,
    overrides: Sequence[str] = (),
    shard_size: int = SHARD_BYTES,
    seed: int | None = None,
) -> Plan | AdapterPlan:
    """Plan a merge from headers alone: no weights are read, and nothing is written.

    A recipe all of whose models are adapters, and that does not ask for `output: model`, gives the plan of
    an adapter.

    Of models on the Hub, the JSON files that describe them (the configuration, and `tokenizer.json` where
    token embeddings are merged) are downloaded, and weights only where they are PyTorch files.

    Args:
        recipe: a YAML file, or its content as a mapping (or several, for staged merges).
        overrides: `key.path=value` changes to the recipe.
        shard_size: largest output file in bytes.
        seed: replaces the recipe's seed.

    Raises:
        UserError: recipe or models are at fault; the message lists every problem found.
    """
    _check_numbers(seed=seed, shard_size=shard_size)
    recipes, adapters = recognised(load_recipes(recipe, overrides=overrides))
    if adapters:
        return plan_adapters(recipes[-1], adapters, seed=seed)
    return plan_merges(recipes, open_models(recipes), shard_bytes=shard_size, seed=seed)


def recognised(recipes: Sequence[Recipe]) -> tuple[Sequence[Recipe], Mapping[str, Adapter]]:
    """The recipes, and the adapters by reference if these are to be merged to an adapter; else none."""
    adapters = adapters_of(recipes)
    if adapters and recipes[-1].output == "model":
        return [as_models(recipes[-1], adapters)], {}
    return recipes, adapters


def open_models(recipes: Sequence[Recipe]) -> dict[str, Checkpoint]:
    """Every model that the recipes name and do not make, by its reference.

    Raises:
        CheckpointError: with what is wrong with each model that cannot be opened.
    """
    made = {recipe.name for recipe in recipes}
    wanted: dict[str, str] = {}
    for recipe in recipes:
        for reference, where in recipe.references().items():
            wanted.setdefault(reference, f"{recipe.origin}: {where}")
    opened: dict[str, Checkpoint] = {}
    problems: list[CheckpointError] = []
    for reference, where in wanted.items():
        if reference in made:
            continue
        try:
            opened[reference] = open_model(reference, where=where, stages=made)
        except CheckpointError as error:
            problems.append(error)
    if problems:
        raise joined(CheckpointError, problems)
    return opened


def merge(
    recipe: RecipeSource,
    out: str | Path | None = None,
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
    """Merge models, or adapters with each other, into the folder `out`, or where the recipe says (`save_path`).

    The output is made beside that folder, checked, and renamed into place; a merge that was killed goes
    on where it was when it is called again with the same arguments.

    Args:
        recipe: a YAML file, or its content as a mapping (or several, for staged merges).
        out: the output folder; needed unless the recipe has `save_path`.
        overrides: `key.path=value` changes to the recipe.
        device: "cpu", "cuda", "mps" or "auto".
        threads: workers; all processors by default.
        max_memory: bytes that the merge may use, or None.
        seed: replaces the recipe's seed.
        shard_size: largest output file in bytes.
        overwrite: replace a non-empty output folder, once the new output is complete.
        resume: go on from an interrupted run of the same merge.
        allow_nonfinite: report NaN and infinity in the output instead of failing.
        progress: receives events.

    Raises:
        UserError: recipe, models or output folder are at fault; nothing was written.
        MergeError: the merge failed while it ran.
    """
    _check_numbers(seed=seed, shard_size=shard_size, max_memory=max_memory)
    recipes = load_recipes(recipe, overrides=overrides)
    target = output_folder(out, recipes[-1])
    recipes, adapters = recognised(recipes)
    if adapters:
        planned = plan_adapters(recipes[-1], adapters, seed=seed)
        check_target(target, recipe, adapters, overwrite=overwrite)
        workers = fit_adapters(planned, device, threads, max_memory)
        return _merge_adapters(planned, target, workers, overwrite, allow_nonfinite, progress or Silent())
    models = open_models(recipes)
    check_target(target, recipe, models, overwrite=overwrite)
    planned = plan_merges(recipes, models, shard_bytes=shard_size, seed=seed)
    _refuse_unlabelled(target, planned.recipe)
    machine, block = fit(planned, device, threads, max_memory)
    progress = progress or Silent()
    if not planned.is_local:
        models = {reference: downloaded(model, progress) for reference, model in models.items()}
        planned = plan_merges(recipes, models, shard_bytes=shard_size, seed=seed)
    for note in planned.notes:
        progress.message(f"note: {note}")
    run = Run(planned, machine, block, progress, allow_nonfinite)
    with Staging(target) as staging:
        checksums = run.into(staging, overwrite=overwrite, resume=resume)
    return MergeResult(target, planned, checksums)


@dataclass(frozen=True)
class MergedModel:
    """A merged model in memory.

    Attributes:
        tensors: of the model, by name.
        heads: of the experts, where the recipe keeps them: by the expert's name, then the tensor's.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    heads: Mapping[str, Mapping[str, Tensor]]


def merge_in_memory(
    recipe: RecipeSource,
    *,
    overrides: Sequence[str] = (),
    threads: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> MergedModel:
    """Merge full models (or adapters with `output: model`) without writing anything; arguments as for `merge`.

    Raises:
        UserError: recipe or models are at fault, or the recipe merges adapters to an adapter.
        MergeError: the merge failed while it ran.
    """
    from weldment.engine.in_memory import execute_in_memory

    _check_numbers(seed=seed, shard_size=SHARD_BYTES)
    recipes, adapters = recognised(load_recipes(recipe, overrides=overrides))
    if adapters:
        fix = "Add `output: model`, or name the adapters with their base: base+adapter"
        raise UserError("the recipe merges adapters to an adapter, not to a model", where=recipes[-1].origin, fix=fix)
    models = {name: downloaded(model, progress or Silent()) for name, model in open_models(recipes).items()}
    planned = plan_merges(recipes, models, seed=seed)
    machine, block = fit(planned, "cpu", threads, None)
    tensors: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {name: {} for name in planned.heads}
    for (file, name), tensor in execute_in_memory(planned, machine, block).items():
        (heads[PurePath(file).stem] if file else tensors)[name] = tensor
    if planned.recipe.recalibrate is not None:
        from weldment.evaluation.recalibration.recalibration import merge_statistics

        tensors |= merge_statistics(planned, tensors, machine.threads)
    return MergedModel(planned, tensors, heads)


def _merge_adapters(
    planned: AdapterPlan, out: Path, threads: int, overwrite: bool, allow_nonfinite: bool, progress: Progress
) -> MergeResult:
    # Plans, and merges of full models, do without the code that calculates with adapters.
    from weldment.adapters.merge.merging import merge_adapters

    for note in planned.notes:
        progress.message(f"note: {note}")
    checksums, lost = merge_adapters(
        planned, out, threads=threads, overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=progress
    )
    return MergeResult(out, planned, checksums, lost)


def _check_numbers(*, seed: int | None, shard_size: int, max_memory: int | None = None) -> None:
    """UserError for numbers that mean nothing; the command line's have been read, but not all checked."""
    if seed is not None and not is_seed(seed):
        raise UserError(f"seed (--seed) is {seed!r}", fix=f"A seed is {SEED}")
    sizes: dict[str, object] = {"shard_size (--shard-size)": shard_size}
    if max_memory is not None:
        sizes["max_memory (--max-memory)"] = max_memory
    for name, size in sizes.items():
        if not isinstance(size, (int, float)) or isinstance(size, bool) or not 1 <= size < math.inf:
            raise UserError(f"{name} is {size!r}", fix="Give bytes as a number, such as 2_000_000_000")


def downloaded(model: Checkpoint, progress: Progress) -> Checkpoint:
    """The model with all its weights on this machine."""
    if model.is_local:
        return model
    # Only models on the Hub need its library, which takes longer to import than to plan a merge.
    from weldment.checkpoint.hub import download

    missing = sum(file.size for file in model.weight_files if file.path is None)
    progress.message(f"downloading {model.reference}, {missing / 1e6:.1f} MB")
    return download(model)


def output_folder(out: str | Path | None, recipe: Recipe) -> Path:
    """Where the result goes: `out`, or what the recipe says.

    Raises:
        UserError: neither says it.
    """
    folder = recipe.save_path if out is None else out
    if folder is not None:
        return Path(folder)
    fix = "Give OUT, or `save_path` in the recipe" if is_file(recipe.source) else "Give OUT"
    raise UserError("there is no output folder to write to", where=recipe.origin, fix=fix)


def check_target(out: Path, recipe: RecipeSource, models: Mapping[str, Input], *, overwrite: bool) -> None:
    """Check that an output may stand at `out`.

    Raises:
        OutputError: it cannot be made there, would replace the recipe or an input, or would become a part of one.
    """
    _refuse_inputs(out, models)
    if isinstance(recipe, (str, Path)) and out.resolve() in Path(recipe).resolve().parents:
        raise OutputError("the recipe lies inside the output folder", where=str(out), fix="Choose another folder")
    check_output(out, overwrite=overwrite)


def _refuse_unlabelled(out: Path, recipe: Recipe) -> None:
    """Raise if the output would replace a folder that holds the inputs that the recipe measures on."""
    if recipe.recalibrate is None:
        return
    folder = Path(recipe.recalibrate).expanduser().resolve()
    if out.resolve() in (folder, *folder.parents):
        cause = f"the output would replace the inputs to measure on ({recipe.recalibrate})"
        raise OutputError(cause, where=str(out), fix="Choose another output folder")


def _refuse_inputs(out: Path, models: Mapping[str, Input]) -> None:
    """Raise if the output would replace a folder that holds an input, or be copied with one."""
    target = out.resolve()
    for reference, model in models.items():
        root, files = (model.root, model.weight_files) if isinstance(model, Checkpoint) else (model.folder, model.files)
        own = None if root is None else Path(root).resolve()
        folders = {file.path.resolve().parent for file in files if file.path is not None} | ({own} if own else set())
        if target in folders:
            cause = f"the output is also an input ({reference})"
        elif any(target in folder.parents for folder in folders):
            cause = f"an input ({reference}) lies inside the output folder"
        elif own in target.parents and Path(reference).expanduser().is_dir():
            cause = f"the output lies inside an input ({reference}), whose files are copied"
        else:
            continue
        raise OutputError(cause, where=str(out), fix="Choose another output folder")
