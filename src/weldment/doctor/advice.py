"""Which method and settings to begin with, and why; as a recipe that the planner has checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weldment.checkpoint.dtypes import FLOATS
from weldment.doctor.agreement import Comparison
from weldment.doctor.cases import Cases
from weldment.doctor.findings import Finding
from weldment.doctor.groups import is_task_head
from weldment.doctor.relating import AGAINST, ALIKE, UNEVEN, merged
from weldment.errors import UserError
from weldment.planning.config import main_dtype
from weldment.planning.layers import layer_of
from weldment.planning.roles import holds_tokens

SMALL = 1024
"""Shortest side of the widest matrices up to which decomposing all of them takes a minute at most (0.14 s each)."""

SEVERAL = 3
"""Experts from which on signs are elected: of two that disagree, an election can only drop one."""

DENSITY = 0.2
"""What TIES keeps of each change: the paper's choice, at which experts still had nearly all of their skill."""

_MEASURED = (
    "of the methods measured on eight real encoders it kept most (79 % of the experts' scores, plain averages 40 %)"
)


@dataclass(frozen=True)
class Advice:
    """Where to begin.

    Attributes:
        method: its name.
        reasons: sentences without a full stop, each with what it rests on.
        recipe: as a mapping, for `weldment.merge`.
    """

    method: str
    reasons: tuple[str, ...]
    recipe: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The recipe as YAML."""
        import yaml

        return yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True, width=120)

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {"method": self.method, "reasons": list(self.reasons), "recipe": dict(self.recipe), "yaml": self.text}


@dataclass
class _Draft:
    """A recipe in the making.

    Attributes:
        members: the experts that are merged, by their numbers.
        weights: by expert, where they are not all 1.
        keys: of the recipe, besides models and base.
    """

    members: list[int]
    method: str
    reasons: list[str]
    parameters: dict[str, Any]
    weights: dict[int, float]
    keys: dict[str, Any]


def advise(cases: Cases, comparison: Comparison, findings: Sequence[Finding]) -> tuple[Advice | None, list[Finding]]:
    """A first recipe, and a finding if the planner refuses it; None where no merge makes sense."""
    members = _members(comparison, findings)
    if len(members) < 2:
        return None, []
    draft = _method(cases, comparison, members)
    _leave_out(draft, comparison)
    _balance(draft, comparison)
    _keep_heads(draft, cases)
    alone = all(number in cases.adapters for number in members)
    if not alone and any(finding.code in ("moved-tokens", "other-tokens") for finding in findings):
        draft.keys["tokenizer"] = {"source": "union"}
        draft.reasons.append("tokenizer: union, because the vocabularies differ: rows are matched by token")
    recipe = _recipe(draft, cases)
    problem = _refused(recipe)
    if problem is not None:
        return None, [Finding("problem", "not-mergeable", "", problem)]
    return Advice(draft.method, tuple(draft.reasons), recipe), []


def _members(comparison: Comparison, findings: Sequence[Finding]) -> list[int]:
    """The experts that can be merged; none if a better recipe needs one more word from the user."""
    problems = {finding.code for finding in findings if finding.level == "problem"}
    without_base = comparison.base is None and problems & {"another-base", "nothing-in-common"}
    if problems & {"architecture", "config"} or without_base or any(f.code == "base-guess" for f in findings):
        return []
    out = {finding.subject for finding in findings if finding.code == "non-finite"}
    out |= {finding.other for finding in findings if finding.code == "same-change"}
    return [number for number in merged(comparison) if comparison.name(number) not in out]


def _method(cases: Cases, comparison: Comparison, members: Sequence[int]) -> _Draft:
    """The method, from what is known of base, changes and sizes; the first rule that fits decides."""
    draft = _Draft(list(members), "linear", [], {}, {}, {})
    count = len(members)
    pairs = [(i, j) for i, j in comparison.pairs if i in members and j in members]
    cosine = sum(comparison.whole.change_cosine(i, j) for i, j in pairs) / len(pairs)
    if comparison.base is None and count == 2:
        draft.method, draft.parameters = "slerp", {"t": 0.5}
        reason = "slerp: two models and no base; it keeps the length of the weights, which averages shorten"
        draft.reasons.append(reason)
    elif comparison.base is None:
        draft.reasons.append("linear: with no base named, a plain average is where to begin")
    elif cosine >= ALIKE:
        draft.reasons.append(f"linear: the changes point the same way (mean cosine {cosine:.2f}), as in a soup of runs")
    elif cosine <= AGAINST:
        _vote(draft, f"changes undo each other (mean cosine {cosine:.2f}), and a vote on every sign keeps one side")
    elif all(number in cases.adapters for number in members):
        _sum(draft, cosine)
        draft.keys["rank"] = "auto"
        draft.reasons.append("weighted sums of adapters are exact; rank: auto keeps 99 % of the squared norm")
    elif (widest := _widest(cases)) <= SMALL:
        draft.method = "swudi"
        draft.reasons.append(f"swudi: matrices are small enough to decompose (up to {widest} wide), and {_MEASURED}")
    elif count >= SEVERAL:
        _vote(draft, f"{count} models, whose changes have a mean cosine of {cosine:.2f}, vote on every sign")
        draft.reasons.append("tsv_m and swudi kept more of small encoders, and take minutes to hours at this size")
    else:
        _sum(draft, cosine)
    return draft


def _vote(draft: _Draft, reason: str) -> None:
    """The largest parts of all changes, where their signs agree."""
    draft.method, draft.parameters = "ties", {"density": DENSITY, "lambda": 1.0}
    draft.reasons.append(f"ties: {reason}")


def _sum(draft: _Draft, cosine: float) -> None:
    """A sum of changes that is as long as one of them."""
    count = len(draft.members)
    weight = round(1.0 / math.sqrt(count * max(1.0 / count, 1.0 + (count - 1) * cosine)), 2)
    draft.method = "task_arithmetic"
    draft.weights = dict.fromkeys(draft.members, min(1.0, weight))
    text = f"task_arithmetic: changes with a mean cosine of {cosine:.2f} add up without much disturbing each other"
    draft.reasons.append(f"{text}; with weights of {min(1.0, weight)} the sum is as large as one of them")


def _widest(cases: Cases) -> int:
    """The shortest side of the widest matrix inside layers."""
    shapes = [entry.shape for name, entry in cases.tensors[0].items() if layer_of(name) and len(entry.shape) == 2]
    return max((min(shape) for shape in shapes), default=0)


def _leave_out(draft: _Draft, comparison: Comparison) -> None:
    for number in comparison.experts:
        if number not in draft.members:
            draft.reasons.append(f"{comparison.name(number)} is left out, for the reason given above")


def _balance(draft: _Draft, comparison: Comparison) -> None:
    """Smaller weights for much larger changes: half-way between equal weights and equal changes."""
    if comparison.base is None or draft.method == "linear":
        return
    sizes = {number: comparison.whole.relative(number) for number in draft.members}
    least = min(sizes.values())
    if least <= 0.0 or max(sizes.values()) < UNEVEN * least:
        return
    before = draft.weights or dict.fromkeys(draft.members, 1.0)
    draft.weights = {n: round(before[n] * math.sqrt(least / size), 2) for n, size in sizes.items()}
    draft.reasons.append("smaller weights for larger changes: the square root of their sizes' ratio")


def _keep_heads(draft: _Draft, cases: Cases) -> None:
    """Tensors outside the layers that not all models have alike are kept for each expert, or dropped from the base."""
    numbers = [*([0] if cases.base else []), *draft.members]
    tensors = [cases.tensors[number] for number in numbers]
    labels = {str(cases.models[number].config.get("id2label")) for number in draft.members}
    heads: dict[str, None] = {}
    dropped: list[str] = []
    for name in dict.fromkeys(name for own in tensors for name in own):
        shapes = {own[name].shape if name in own else None for own in tensors}
        if layer_of(name) is not None or any(shape and holds_tokens(name, shape) for shape in shapes):
            continue
        if len(shapes) == 1 and not (is_task_head(name) and len(labels) > 1):
            continue
        if any(name in cases.tensors[number] for number in draft.members):
            heads[f"{name.split('.')[0]}*" if is_task_head(name) else name] = None
        else:
            dropped.append(name)
    if heads:
        draft.keys["heads"] = list(heads)
        draft.reasons.append(f"heads: {', '.join(heads)} answer each expert's own task, and are kept apart")
    if dropped:
        draft.keys["drop"] = dropped
        draft.reasons.append(f"drop: only the base has {', '.join(dropped)}")


def _recipe(draft: _Draft, cases: Cases) -> dict[str, Any]:
    alone = all(number in cases.adapters for number in draft.members)
    names = {number: cases.given[number] if alone else cases.models[number].reference for number in draft.members}
    models = [
        {"model": names[number], **({"parameters": {"weight": weight}} if weight is not None else {})}
        for number in draft.members
        for weight in [draft.weights.get(number)]
    ]
    recipe: dict[str, Any] = {"merge_method": draft.method}
    if draft.method == "slerp":
        recipe["base_model"] = names[draft.members[0]]
    elif cases.base and not alone:
        recipe["base_model"] = cases.models[0].reference
    recipe["models"] = models
    if draft.parameters:
        recipe["parameters"] = draft.parameters
    dtype = main_dtype((entry.dtype, entry.numel) for entry in cases.models[0].tensors.values())
    return {**recipe, **draft.keys, **({"dtype": FLOATS[dtype]} if dtype is not None and not alone else {})}


def _refused(recipe: Mapping[str, Any]) -> str | None:
    """What the planner has against a recipe."""
    from weldment.merging import plan

    try:
        plan(recipe)
    except UserError as error:
        return str(error)
    return None
