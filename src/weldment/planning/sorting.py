"""What is not merged: tensors that are dropped, taken from one model, kept as heads, or stored twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from weldment.checkpoint.compare import same_bytes
from weldment.checkpoint.model import TensorEntry
from weldment.errors import PlanError
from weldment.planning.inputs import Inputs
from weldment.planning.roles import is_head, matches, original_of
from weldment.planning.tying import settle_tying


class Found(NamedTuple):
    """A tensor of a model, under its common name."""

    model: str
    name: str
    entry: TensorEntry


@dataclass
class Sorted:
    """The tensors of a merge, sorted.

    Attributes:
        tensors: by participant, what is left to merge.
        heads: kept per expert.
        taken: from one model, unmerged.
        dropped: reasons, by model and the model's own name of the tensor.
        tied: whether the output's head is its token embeddings; None if it has no head.
    """

    tensors: dict[str, dict[str, TensorEntry]]
    heads: list[Found] = field(default_factory=list)
    taken: list[Found] = field(default_factory=list)
    dropped: dict[tuple[str, str], str] = field(default_factory=dict)
    tied: bool | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[PlanError] = field(default_factory=list)

    def drop(self, model: str, name: str, reason: str) -> None:
        """Leave a tensor out."""
        self.dropped[model, self.tensors[model].pop(name).name] = reason

    def fitting(self, pattern: str) -> list[Found]:
        """The tensors left whose name, common or the model's own, a pattern fits."""
        return [
            Found(model, name, entry)
            for model, tensors in self.tensors.items()
            for name, entry in tensors.items()
            if matches((pattern,), name, entry.name)
        ]


def sort_tensors(inputs: Inputs) -> Sorted:
    """Take out of the merge what the recipe or the tensors' roles say is not merged."""
    left = Sorted({model: dict(inputs.tensors[model]) for model in inputs.participants})
    _drop(inputs, left)
    _take(inputs, left)
    _keep_heads(inputs, left)
    _drop_copies(left)
    _settle_head(inputs, left)
    return left


def _drop(inputs: Inputs, left: Sorted) -> None:
    for pattern in inputs.recipe.drop:
        found = left.fitting(pattern)
        if not found:
            left.problems.append(_unmatched(inputs, "drop", pattern))
        for model, name, _ in found:
            left.drop(model, name, f"the recipe drops {pattern}")


def _take(inputs: Inputs, left: Sorted) -> None:
    for pattern, source in inputs.recipe.take.items():
        others = left.fitting(pattern)
        own = _own(inputs, left, pattern, source)
        if (problem := _take_problem(inputs, pattern, source, own, others)) is not None:
            left.problems.append(problem)
        for found in others:
            if found.model == source:
                del left.tensors[source][found.name]
            else:
                left.drop(found.model, found.name, f"taken from {source}")
        left.taken += own


def _own(inputs: Inputs, left: Sorted, pattern: str, source: str) -> list[Found]:
    """The tensors of the source of `take`, which may be a base that is not merged, that fit and are not dropped."""
    return [
        Found(source, name, entry)
        for name, entry in inputs.tensors.get(source, {}).items()
        if matches((pattern,), name, entry.name) and (source, entry.name) not in left.dropped
    ]


def _take_problem(
    inputs: Inputs, pattern: str, source: str, own: Sequence[Found], others: Sequence[Found]
) -> PlanError | None:
    where = f"{inputs.recipe.origin}: take.{pattern}"
    if source not in inputs.models:
        fix = f"Take tensors from one of: {', '.join(inputs.models)}"
        return PlanError(f"{source} is not among the models of this merge", where=where, fix=fix)
    if not own and not others:
        return _unmatched(inputs, "take", pattern)
    lost = [found for found in others if found.name not in {mine.name for mine in own}]
    if not lost:
        return None
    cause = f"{source} has no tensor {lost[0].name!r}, which {lost[0].model} has"
    return PlanError(cause, where=where, fix="Take it from a model that has it, or use `drop`")


def _unmatched(inputs: Inputs, key: str, pattern: str) -> PlanError:
    return PlanError(
        f"the pattern {pattern!r} fits no tensor", where=f"{inputs.recipe.origin}: {key}", fix="Check its spelling"
    )


def _keep_heads(inputs: Inputs, left: Sorted) -> None:
    experts = {expert.model for expert in inputs.experts}
    for pattern in inputs.recipe.heads:
        found = left.fitting(pattern)
        kept = [head for head in found if head.model in experts]
        if not kept:
            left.problems.append(_unmatched(inputs, "heads", pattern))
        left.heads += kept
        for head in found:
            if head.model in experts:
                del left.tensors[head.model][head.name]
            else:
                left.drop(head.model, head.name, "a head of the base")


def _drop_copies(left: Sorted) -> None:
    """Leave out tensors that only repeat another one of their model, unless a copy differs from its original."""
    names = dict.fromkeys(name for tensors in left.tensors.values() for name in tensors)
    for name, original in ((name, original) for name in names if (original := original_of(name))):
        holders = {model for model, tensors in left.tensors.items() if name in tensors}
        repeating = {model for model in holders if _repeats(left.tensors[model], name, original)}
        for model, tensors in left.tensors.items():
            if repeating == holders and model in holders:
                left.drop(model, name, f"a copy of {original}")
            elif repeating != holders and model not in holders and original in tensors:
                tensors[name] = tensors[original]


def _repeats(tensors: Mapping[str, TensorEntry], name: str, original: str) -> bool:
    """Whether a tensor holds the same values as another one, as far as can be seen."""
    return original in tensors and same_bytes(tensors[name], tensors[original]) is not False


def _settle_head(inputs: Inputs, left: Sorted) -> None:
    """Decide whether the output has a head of its own."""
    if any(is_head(found.name) for found in left.taken):
        left.tied = False
        return
    before = {model: {**inputs.tensors[model], **left.tensors[model]} for model in left.tensors}
    visible = {model: _without_gone_heads(tensors, left.tensors[model]) for model, tensors in before.items()}
    tying = settle_tying(visible, {model: inputs.models[model].config for model in left.tensors})
    left.tied = tying.tied
    for model, head in tying.repeated.items():
        left.drop(model, head, "equal to the token embeddings, to which it is tied")
    for model, embedding in tying.stand_ins.items():
        left.tensors[model][str(tying.head)] = visible[model][embedding]
        left.notes.append(f"{model}: its head is tied; its token embeddings stand in, and the output's head is untied")


def _without_gone_heads(tensors: Mapping[str, TensorEntry], left: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """All tensors but heads that are no longer to be merged; embeddings count even if they are taken."""
    return {name: entry for name, entry in tensors.items() if name in left or not is_head(name)}
