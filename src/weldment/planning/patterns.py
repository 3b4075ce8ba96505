"""Parameters that go by the names of tensors, checked against the names there are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weldment.errors import PlanError
from weldment.methods import Method, Parameter
from weldment.planning.inputs import Inputs
from weldment.planning.plan import TensorJob
from weldment.recipe.recipe import Recipe

_UNTIED = "lm_head.weight"
"""What patterns that leave tensors out may name in models that do not store it, because it is tied."""

_DECOMPOSED = "linear_parameter_regex_pattern"
_IGNORING = ("linear_parameter_ignore_regex_pattern", "ignore_module_regex_pattern")


@dataclass
class PatternFindings:
    """What is wrong with patterns, and what the user should know of them."""

    problems: list[PlanError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_patterns(inputs: Inputs, jobs: Sequence[TensorJob]) -> PatternFindings:
    """What `pattern_findings` says of the jobs, and how many tensors are decomposed."""
    if inputs.method.arrange is None:
        return PatternFindings()
    merged = [job for job in jobs if job.action == "merge"]
    decomposed = {job.name for job in merged if job.parameters["form"] is not None and not job.parameters["ignored"]}
    kept = sum(bool(job.parameters["ignored"]) for job in merged)
    names = {name for tensors in inputs.tensors.values() for name in tensors}
    found = pattern_findings(inputs.recipe, inputs.method, {job.name: job.shape for job in jobs}, decomposed, names)
    rest = len(merged) - len(decomposed) - kept
    counts = {"decomposed": len(decomposed), "merged without that": rest, "kept as in the base": kept}
    listed = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    found.notes.insert(0, f"{inputs.method.name}: of {len(merged)} tensors {listed}")
    return found


def pattern_findings(
    recipe: Recipe,
    method: Method,
    shapes: Mapping[str, tuple[int, ...]],
    decomposed: Collection[str],
    others: Collection[str] = (),
) -> PatternFindings:
    """Patterns that match no tensor, or nothing that can be decomposed, are problems.

    Args:
        shapes: of the tensors that are merged, by name.
        decomposed: names of those that are.
        others: names of tensors that the models have besides.
    """
    found = PatternFindings()
    for parameter, pattern, where in _written(recipe, method):
        known = {*shapes, *others, *([_UNTIED] if parameter.name in _IGNORING else [])}
        matched = [name for name in known if re.match(pattern, name)]
        flat = [name for name in matched if len(shapes.get(name, ())) == 1]
        if not matched:
            cause = f"`{parameter.name}`: {pattern!r} matches no tensor"
            found.problems.append(PlanError(cause, where=where, fix=_advice(pattern)))
        elif parameter.kind == "counts" and not any(name in decomposed for name in matched):
            cause = (
                f"`{parameter.name}`: {pattern!r} matches only tensors that are not decomposed, such as {min(matched)}"
            )
            found.problems.append(PlanError(cause, where=where, fix=f"Name a matrix, or choose it by `{_DECOMPOSED}`"))
        elif parameter.name == _DECOMPOSED and flat:
            _flat(found, pattern, flat, where, only=len(flat) == len(matched))
    return found


def _advice(pattern: str) -> str:
    if pattern.startswith(".*"):
        return "Leave it out, or name tensors that the models have (`weld plan --all` lists them)"
    return "Patterns are matched from the start of the name: begin with .* to match anywhere"


def _flat(found: PatternFindings, pattern: str, names: Sequence[str], where: str, *, only: bool) -> None:
    """Tensors of one dimension cannot be decomposed; a pattern may match some, but not nothing else."""
    if only:
        cause = f"`{_DECOMPOSED}`: {pattern!r} matches only tensors of one dimension, such as {min(names)}"
        fix = "Only tensors of two dimensions or more can be decomposed; the others have a rule of their own"
        found.problems.append(PlanError(cause, where=where, fix=fix))
        return
    one = len(names) == 1
    them = "a tensor of one dimension, which is" if one else f"{len(names)} tensors of one dimension, which are"
    found.notes.append(f"{pattern!r} also matches {them} not decomposed")


def _written(recipe: Recipe, method: Method) -> Iterator[tuple[Parameter, str, str]]:
    """Every pattern of the recipe: its parameter, itself and where it stands."""
    section = "merging_config" if "merging_config" in recipe.source else "parameters"
    levels = [
        (recipe.parameters, section),
        *((piece.parameters, f"{piece.where}.parameters") for piece in recipe.slices),
    ]
    for settings, path in levels:
        for parameter in method.parameters:
            if parameter.by_pattern:
                for pattern in settings.get(parameter.name) or ():
                    yield parameter, pattern, f"{recipe.origin}: {path}.{parameter.name}"
