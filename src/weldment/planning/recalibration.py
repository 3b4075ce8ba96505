"""Whether the running statistics of batch normalisation can be measured anew, or should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weldment.errors import PlanError, TaskError, WeldmentError, joined
from weldment.planning.plan import Plan
from weldment.planning.roles import is_statistic
from weldment.recipe.recipe import Recipe


def with_recalibration(plan: Plan, stages: Sequence[Recipe] = ()) -> Plan:
    """The plan with notes on batch normalisation.

    Args:
        stages: the recipes of intermediate merges.

    Raises:
        PlanError: the recipe asks for a recalibration that cannot be done.
    """
    statistics = [job for job in plan.jobs if not job.file and is_statistic(job.name)]
    layers = {job.name.rpartition(".")[0] for job in statistics}
    count = f"{len(layers)} batch-norm layer{'' if len(layers) == 1 else 's'}"
    folder = plan.recipe.recalibrate
    problems = [_of_stage(recipe) for recipe in stages if recipe.recalibrate is not None]
    note = None
    if folder is not None:
        problems += _problems(plan, folder, bool(layers))
        note = f"{count}: the running statistics are measured anew on the inputs in {folder}"
    elif any(job.action == "merge" and len(set(job.models)) > 1 for job in statistics):
        note = (
            f"{count}: running statistics are merged like weights, but activations of a merged network have others; "
            "with a folder of unlabelled inputs, `recalibrate: DIR` measures them"
        )
    if problems:
        raise joined(PlanError, problems)
    return plan if note is None else replace(plan, notes=(*plan.notes, note))


def _of_stage(recipe: Recipe) -> WeldmentError:
    cause = f"{recipe.name} is an intermediate merge, whose running statistics nobody uses"
    return PlanError(cause, where=f"{recipe.origin}: recalibrate", fix="Write `recalibrate` into the final merge")


def _problems(plan: Plan, folder: str, has_layers: bool) -> list[WeldmentError]:
    # Only recipes that ask for it take transformers, which takes longer to import than to plan a merge.
    from weldment.evaluation.recalibration.unlabelled import input_files

    where = f"{plan.recipe.origin}: recalibrate"
    if not has_layers:
        cause = "the merged model has no batch normalisation: no tensor is called running_mean or running_var"
        return [PlanError(cause, where=where, fix="Remove it")]
    problems: list[WeldmentError] = []
    for check in (lambda: input_files(folder), lambda: _refuse_unknown(plan)):
        try:
            check()
        except TaskError as error:
            place = f"{where}: {error.where}" if error.where else where
            problems.append(PlanError(error.cause, where=place, fix=error.fix))
    return problems


def _refuse_unknown(plan: Plan) -> None:
    """TaskError if transformers cannot build the network."""
    from weldment.evaluation.networks import config_of, named_class, quiet_transformers

    with quiet_transformers():
        config = config_of(plan.config, plan.reference)
        named_class(config, plan.reference, backbone=bool(plan.heads))
