"""Tensors that do not fit together, gathered into few, clear problems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from weldment.checkpoint.compare import same_bytes
from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import TensorEntry
from weldment.errors import PlanError
from weldment.planning.inputs import Inputs
from weldment.planning.layers import depths, layer_of
from weldment.planning.roles import input_embedding
from weldment.planning.vocabulary import compare_vocabularies

Holder = tuple[str, "TensorEntry | None"]
"""A model and its tensor, None if it has none of that name."""

_FEW, _MOST = 0.3, 0.9
"""Shares of a model's tensors that do not fit: more than a few are not an accident."""

Shapes = Mapping[str, tuple[int, ...]]
Absence = tuple[tuple[str, ...], tuple[str, ...]]
"""Models that have a tensor, and those that do not."""


class Misfits:
    """Collects tensors that are missing or differ, and explains them by their likeliest cause."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._fitting: list[str] = []
        self._absent: dict[str, Absence] = {}
        self._shapes: dict[str, Shapes] = {}
        self._kinds: list[str] = []
        self._values: list[str] = []

    def fits(self, name: str, holders: Sequence[Holder], pattern: TensorEntry | None = None) -> bool:
        """Whether every model has the tensor in one shape and kind; what does not fit is remembered.

        Args:
            name: of the output's tensor.
            holders: the models' tensors.
            pattern: the tensor of the reference in this place, where it is not among them: the
                reference gives the configuration, which must be that of the output.
        """
        present = _by_model(holders)
        absent = dict.fromkeys(model for model, entry in holders if entry is None)
        shapes = {model: entry.shape for model, entry in present.items()}
        if pattern is not None:
            shapes.setdefault(self._inputs.reference, pattern.shape)
        if absent:
            self._absent[name] = (tuple(present), tuple(absent))
        elif len(set(shapes.values())) > 1:
            self._shapes[name] = shapes
        elif len({is_float(entry.dtype) for entry in present.values()}) > 1:
            self._kinds.append(name)
        elif not _agree([entry for _, entry in holders if entry is not None]):
            self._values.append(name)
        else:
            self._fitting.append(name)
            return True
        return False

    def problems(self, *, is_aligned: bool = True) -> list[PlanError]:
        """One problem for each cause; none for vocabularies where it is known that they could not be aligned."""
        foreign = {model: why for model in self._inputs.participants if (why := self._foreign(model))}
        found = list(foreign.values())
        found += self._shape_problems(
            {n: s for n, s in self._shapes.items() if not foreign.keys() & s.keys()}, is_aligned=is_aligned
        )
        absences = {n: a for n, a in self._absent.items() if not foreign.keys() & {*a[0], *a[1]}}
        for absence in dict.fromkeys(absences.values()):
            found.append(self._absence_problem(absence, [n for n, other in absences.items() if other == absence]))
        if self._kinds:
            cause = f"{some(self._kinds)}: floating point in some models and integer in others"
            found.append(self._problem(cause, f"Take from one model: {self._take(self._kinds)}"))
        if self._values:
            cause = f"{some(self._values)}: not floating point, so not merged, and different in the models"
            fix = f"Take from one model: {self._take(self._values)}; or leave out with `drop`"
            found.append(self._problem(cause, fix))
        return found

    def _problem(self, cause: str, fix: str) -> PlanError:
        return PlanError(cause, where=self._inputs.recipe.origin, fix=fix)

    def _foreign(self, model: str) -> PlanError | None:
        """Another kind of model, size or number of layers explains everything else that is wrong with a model."""
        reference = self._inputs.reference
        if model == reference:
            return None
        lacking = [n for n, (_, absent) in self._absent.items() if (model in absent) != (reference in absent)]
        misshapen = [n for n, shapes in self._shapes.items() if shapes.get(model) != shapes.get(reference)]
        if not (lacking or misshapen or reference not in self._inputs.participants):
            return None
        here, there = self._inputs.models[model], self._inputs.models[reference]
        kinds = here.config.get("model_type"), there.config.get("model_type")
        count = max(1, len(there.tensors))
        fix = "Only models with the same tensors can be merged"
        if all(kinds) and kinds[0] != kinds[1] and len(lacking) + len(misshapen) > _FEW * count:
            cause = f"models of different architecture: {model} is {kinds[0]}, {reference} is {kinds[1]}"
        elif (stack := self._different_depth(model)) is not None:
            own, other = (depths(self._inputs.tensors[m]).get(stack, 0) for m in (model, reference))
            cause = f"different numbers of layers: {stack} has {own} in {model} and {other} in {reference}"
            fix = "Choose the layers to merge with `slices` and `layer_range`"
        elif len(lacking) > _MOST * count:
            cause = f"{model} and {reference} have almost no tensor in common ({lacking[0]!r} is in one of them only)"
        elif len(misshapen) > _FEW * count and any(layer_of(name) for name in misshapen):
            shapes = _listed(self._shapes[misshapen[0]])
            cause = f"models of different size: {some(misshapen)}: {shapes}"
        else:
            return None
        return self._problem(cause, fix)

    def _different_depth(self, model: str) -> str | None:
        """A stack of layers that both have, in different numbers."""
        if self._inputs.recipe.slices:
            return None
        own, other = (depths(self._inputs.tensors[m]) for m in (model, self._inputs.reference))
        return next((stack for stack in own if stack in other and own[stack] != other[stack]), None)

    def _shape_problems(self, shapes: Mapping[str, Shapes], *, is_aligned: bool) -> list[PlanError]:
        rows = {name: self._is_vocabulary(found) for name, found in shapes.items()}
        vocabulary = [name for name, is_rows in rows.items() if is_rows]
        others = [name for name, is_rows in rows.items() if not is_rows]
        problems: list[PlanError] = []
        participants = self._inputs.participants
        is_asked = self._inputs.recipe.tokenizer
        differences = compare_vocabularies(self._inputs, participants) if vocabulary and not is_asked else ()
        if differences:
            problems += differences
        elif vocabulary and is_aligned:
            cause = f"different vocabularies: {some(vocabulary)}: {_listed(shapes[vocabulary[0]])}"
            fix = (
                "Merging rows by position would mix different tokens. Align them (`tokenizer: {source: union}`), "
                f"for which the models need their tokenizers, or take from one model: {self._take(vocabulary)}"
            )
            problems.append(self._problem(cause, fix))
        if others:
            cause = f"different shapes: {some(others)}: {_listed(shapes[others[0]])}"
            problems.append(self._problem(cause, self._advice(others)))
        return problems

    def _is_vocabulary(self, shapes: Shapes) -> bool:
        """Whether the shapes differ just as the numbers of the models' token embeddings do."""
        for model, shape in shapes.items():
            tensors = self._inputs.tensors.get(model, {})
            embedding = input_embedding(tensors)
            if embedding is None or shape[:1] != tensors[embedding].shape[:1]:
                return False
        return len({shape[1:] for shape in shapes.values()}) == 1

    def _absence_problem(self, absence: Absence, names: Sequence[str]) -> PlanError:
        present, absent = absence
        if len(present) < len(absent):
            cause = f"{some(names)}: only in {' and '.join(present)}"
        else:
            cause = f"{some(names)}: missing from {' and '.join(absent)}"
        return self._problem(cause, self._advice(names))

    def _advice(self, names: Sequence[str]) -> str:
        """Suggest `heads` for tensors that can be heads: those outside layers, under a prefix of their own."""
        outer = [name for name in names if layer_of(name) is None]
        if len(outer) < len(names):
            return f"Take them from one model with `take`, or leave them out: `drop: {json.dumps([names[0]])}`"
        patterns = list(dict.fromkeys(self._pattern(name) for name in outer))
        more = ", ..." if len(patterns) > 3 else ""
        listing = ", ".join(json.dumps(pattern) for pattern in patterns[:3])
        return (
            f"If they are task heads, keep them per expert: `heads: [{listing}{more}]`; "
            "otherwise leave them out with `drop`, or take them from one model with `take`"
        )

    def _pattern(self, name: str) -> str:
        """The shortest prefix of the name that no tensor has which fits, as a glob."""
        parts = name.split(".")
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length]) + "."
            if not any(other.startswith(prefix) for other in self._fitting):
                return f"{prefix}*"
        return name

    def _take(self, names: Sequence[str]) -> str:
        last = {name.rpartition(".")[2] for name in names}
        patterns = [f"*.{last.pop()}"] if len(names) > 2 and len(last) == 1 else list(names)
        return f"`take: {json.dumps(dict.fromkeys(patterns, self._inputs.reference), ensure_ascii=False)}`"


def _by_model(holders: Sequence[Holder]) -> dict[str, TensorEntry]:
    """The tensors that are there, by model; a model's second one, of another layer, under both names."""
    present: dict[str, TensorEntry] = {}
    for model, entry in holders:
        if entry is not None and present.setdefault(model, entry) is not entry:
            present[f"{model} ({entry.name})"] = entry
    return present


def _agree(entries: Sequence[TensorEntry]) -> bool:
    """Whether tensors that are not floating point are equal, as far as can be seen before the weights are here."""
    if is_float(entries[0].dtype):
        return True
    return all(same_bytes(entries[0], other) is not False for other in entries[1:])


def some(names: Sequence[str]) -> str:
    """One or several tensors, the first two by name."""
    if len(names) == 1:
        return f"tensor {names[0]!r}"
    return f"{len(names)} tensors ({names[0]!r}, {names[1]!r}{', ...' if len(names) > 2 else ''})"


def _listed(shapes: Shapes) -> str:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for model, shape in shapes.items():
        by_shape.setdefault(shape, []).append(model)
    return ", ".join(f"{list(shape)} in {' and '.join(models)}" for shape, models in by_shape.items())
