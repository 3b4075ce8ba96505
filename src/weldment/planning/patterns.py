"""Parameters that go by the names of tensors, checked against the names there are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from weldment.errors import PlanError
from weldment.methods import Parameter
from weldment.planning.inputs import Inputs
from weldment.planning.plan import TensorJob

_UNTIED = ("lm_head.weight",)
"""Names that patterns may speak of in models that do not store them, because they are tied."""

_DECOMPOSED = "linear_parameter_regex_pattern"


@dataclass
class PatternFindings:
    """What is wrong with patterns, and what the user should know of them."""

    problems: list[PlanError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_patterns(inputs: Inputs, jobs: Sequence[TensorJob]) -> PatternFindings:
    """Patterns that match no tensor, or nothing that can be decomposed, are problems."""
    found = PatternFindings()
    shapes = {job.name: job.shape for job in jobs}
    names = {name for tensors in inputs.tensors.values() for name in tensors} | set(shapes) | set(_UNTIED)
    for parameter, pattern, where in _written(inputs):
        matched = [name for name in names if re.match(pattern, name)]
        flat = [name for name in matched if len(shapes.get(name, ())) == 1]
        if not matched:
            cause = f"`{parameter.name}`: {pattern!r} matches no tensor"
            fix = "Patterns are matched from the start of the name: begin with .* to match anywhere"
            found.problems.append(PlanError(cause, where=where, fix=fix))
        elif parameter.name == _DECOMPOSED and flat:
            _flat(found, pattern, flat, where, only=len(flat) == len(matched))
    return found


def _flat(found: PatternFindings, pattern: str, names: Sequence[str], where: str, *, only: bool) -> None:
    """Tensors of one dimension cannot be decomposed; a pattern may match some, but not nothing else."""
    if only:
        cause = f"`{_DECOMPOSED}`: {pattern!r} matches only tensors of one dimension, such as {min(names)}"
        fix = "Only tensors of two dimensions or more can be decomposed; the others have a rule of their own"
        found.problems.append(PlanError(cause, where=where, fix=fix))
        return
    them = (
        "a tensor of one dimension, which is"
        if len(names) == 1
        else f"{len(names)} tensors of one dimension, which are"
    )
    found.notes.append(f"{pattern!r} also matches {them} not decomposed")


def _written(inputs: Inputs) -> Iterator[tuple[Parameter, str, str]]:
    """Every pattern of the recipe: its parameter, itself and where it stands."""
    recipe = inputs.recipe
    section = "merging_config" if "merging_config" in recipe.source else "parameters"
    levels = [
        (recipe.parameters, section),
        *((piece.parameters, f"{piece.where}.parameters") for piece in recipe.slices),
    ]
    for settings, path in levels:
        for parameter in inputs.method.parameters:
            if parameter.by_pattern:
                for pattern in settings.get(parameter.name) or ():
                    yield parameter, pattern, f"{recipe.origin}: {path}.{parameter.name}"
