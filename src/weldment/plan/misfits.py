"""Tensors that do not fit together, gathered into few, clear problems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.errors import PlanError
from weldment.plan.layers import depths
from weldment.plan.roles import head_name, input_embedding
from weldment.recipe.recipe import Recipe

Holder = tuple[str, "TensorEntry | None"]


class Misfits:
    """Collects missing tensors and differing shapes, and explains them by their likeliest cause."""

    def __init__(self, recipe: Recipe, models: Mapping[str, Checkpoint], reference: str) -> None:
        self._recipe = recipe
        self._models = models
        self._reference = reference
        self._missing: dict[str, list[str]] = defaultdict(list)
        self._shapes: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
        self._kinds: list[str] = []

    def fits(self, name: str, holders: Sequence[Holder]) -> bool:
        """Whether every model has the tensor in one shape; what does not fit is remembered."""
        present = [(model, entry) for model, entry in holders if entry is not None]
        absent = [model for model, entry in holders if entry is None]
        for model in absent:
            self._missing[model].append(name)
        if absent or not present:
            return False
        first = present[-1][1] if present[-1][0] == self._reference else present[0][1]
        different = [(model, entry) for model, entry in present if entry.shape != first.shape]
        for model, entry in different:
            self._shapes[model].append((name, entry.shape, first.shape))
        if len({is_float(entry.dtype) for _, entry in present}) > 1:
            self._kinds.append(name)
            return False
        return not different

    def problems(self) -> list[PlanError]:
        """One problem for each model and cause."""
        found: list[PlanError] = []
        for model in dict.fromkeys([*self._missing, *self._shapes]):
            found += self._explain(model)
        if self._kinds:
            found.append(
                PlanError(
                    f"{_some(self._kinds)}: floating point in some models and integer in others",
                    where=self._recipe.origin,
                    fix=f"Name a model to take it from: `take: {{{self._kinds[0]}: {self._reference}}}`",
                )
            )
        return found

    def _explain(self, model: str) -> list[PlanError]:
        missing, shapes = self._missing.get(model, []), self._shapes.get(model, [])
        if (whole := self._other_architecture(model, missing, shapes)) is not None:
            return [whole]
        problems: list[PlanError] = []
        vocabulary = [item for item in shapes if self._is_vocabulary(model, *item)]
        if vocabulary:
            problems.append(self._vocabulary(model, vocabulary))
        heads = [item for item in shapes if item not in vocabulary]
        if heads:
            name, here, there = heads[0]
            problems.append(
                PlanError(
                    f"{_some([item[0] for item in heads])} has shape {list(here)} in {model} and {list(there)} in "
                    f"{self._reference}",
                    where=self._recipe.origin,
                    fix=f"If it is a task head, keep it per expert: `heads: [\"{_pattern(name)}\"]`",
                )
            )
        if missing:
            problems.append(
                PlanError(
                    f"{_some(missing)} missing from {model}",
                    where=self._recipe.origin,
                    fix=f"If these are task heads, keep them per expert: `heads: [\"{_pattern(missing[0])}\"]`; "
                    f"or leave them out with `drop`, or take them from one model with `take`",
                )
            )
        return problems

    def _other_architecture(self, model: str, missing: list[str], shapes: list[object]) -> PlanError | None:
        """Different kinds of model or numbers of layers explain everything else."""
        here, there = self._models[model], self._models[self._reference]
        kinds = here.config.get("model_type"), there.config.get("model_type")
        share = (len(missing) + len(shapes)) / max(1, len(there.tensors))
        if all(kinds) and kinds[0] != kinds[1] and share > 0.3:
            return PlanError(
                f"models of different architecture: {model} is {kinds[0]}, {self._reference} is {kinds[1]}",
                where=self._recipe.origin,
                fix="Only models with the same tensors can be merged",
            )
        own, other = depths(here.tensors), depths(there.tensors)
        differing = [s for s in own if s in other and own[s] != other[s]]
        if differing and missing and not self._recipe.slices:
            stack = differing[0]
            return PlanError(
                f"different numbers of layers: {stack} has {own[stack]} in {model} and {other[stack]} in {self._reference}",
                where=self._recipe.origin,
                fix="Choose the layers to merge with `slices` and `layer_range`",
            )
        if share > 0.9 and missing:
            return PlanError(
                f"{model} and {self._reference} have almost no tensor in common ({missing[0]!r} is missing, for one)",
                where=self._recipe.origin,
                fix="Only models with the same tensors can be merged",
            )
        return None

    def _is_vocabulary(self, model: str, name: str, here: tuple[int, ...], there: tuple[int, ...]) -> bool:
        tensors = self._models[self._reference].tensors
        special = {input_embedding(tensors), head_name(tensors)}
        return name in special and here[1:] == there[1:]

    def _vocabulary(self, model: str, items: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> PlanError:
        name, here, there = items[0]
        return PlanError(
            f"different vocabularies: {name} has {here[0]} rows in {model} and {there[0]} in {self._reference}",
            where=self._recipe.origin,
            fix="Merging rows by position would mix different tokens, and aligning vocabularies is not supported yet; "
            f"bring the models to one vocabulary, or take these tensors from one model: "
            f"`take: {{\"{name}\": {self._reference}}}`",
        )


def _some(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]!r}"
    return f"{len(names)} tensors ({names[0]!r}, {names[1]!r}{', ...' if len(names) > 2 else ''})"


def _pattern(name: str) -> str:
    return f"{name.split('.')[0]}.*" if "." in name else name
