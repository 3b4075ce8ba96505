"""The models of a diagnosis: opened, adapters on their bases, under common names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weldment.adapters.adapter import Adapter
from weldment.adapters.opening import find_adapter, open_model, split_reference
from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.doctor.findings import Finding, few
from weldment.doctor.groups import is_task_head
from weldment.doctor.measuring import Joint
from weldment.doctor.tokens import Tokens
from weldment.errors import CheckpointError, UserError, joined
from weldment.planning.inputs import under_names_of
from weldment.planning.roles import holds_tokens, is_head


@dataclass(frozen=True)
class Cases:
    """The models of a diagnosis.

    Attributes:
        models: opened; the base first, if there is one.
        given: how the user wrote each of them.
        base: whether the first one is the base of the others.
        tensors: of each, under the names of the first.
        adapters: those of them that are adapters on their bases, by their number.
    """

    models: tuple[Checkpoint, ...]
    given: tuple[str, ...]
    base: bool
    tensors: tuple[Mapping[str, TensorEntry], ...]
    adapters: Mapping[int, Adapter]

    @property
    def experts(self) -> range:
        """The numbers of the models that are no base."""
        return range(int(self.base), len(self.models))

    def with_models(self, models: Sequence[Checkpoint]) -> Cases:
        """The same with other checkpoints of the same models."""
        return replace(self, models=tuple(models), tensors=_aligned(models))

    def with_base_second(self) -> Cases:
        """The same with the first expert before the base, from which nothing is counted any more."""
        order = [1, 0, *range(2, len(self.models))]
        models = [self.models[number] for number in order]
        return Cases(
            models=tuple(models),
            given=tuple(self.given[number] for number in order),
            base=False,
            tensors=_aligned(models),
            adapters={order.index(number): adapter for number, adapter in self.adapters.items()},
        )


def open_cases(references: Sequence[str], base: str | None) -> Cases:
    """Open all models of a diagnosis.

    Args:
        references: models, adapters, or `base+adapter`.
        base: the model that they come from; by default the one that all of them name, if they are adapters.

    Raises:
        UserError: a model is given twice.
        CheckpointError: with what is wrong with each model that cannot be opened.
    """
    given = [reference.rstrip("/") or reference for reference in references]
    base = base if base is None else base.rstrip("/") or base
    _refuse_doubles(given, base)
    adapters = {place: found for place, name in enumerate(given) if (found := find_adapter(name)) is not None}
    base = base or _common_base(given, adapters)
    names = [_on_base(name, adapters.get(place), base) for place, name in enumerate(given)]
    first = [] if base is None else [base]
    models = _opened([*first, *names])
    shift = len(first)
    return Cases(
        models=tuple(models),
        given=(*first, *given),
        base=base is not None,
        tensors=_aligned(models),
        adapters={place + shift: adapter for place, adapter in adapters.items()},
    )


def _aligned(models: Sequence[Checkpoint]) -> tuple[Mapping[str, TensorEntry], ...]:
    """The tensors of each, under the names of the first."""
    return tuple(under_names_of(models[0], model)[0] for model in models)


def _refuse_doubles(given: Sequence[str], base: str | None) -> None:
    places: dict[str, str] = {}
    for name in [*given, *([base] if base is not None else [])]:
        path = Path(name).expanduser()
        place = str(path.resolve()) if path.exists() else name
        if place in places:
            what = "also given as --base" if name is base else "given twice"
            raise UserError(f"{places[place]} is {what}", fix="Name each model once, and the base by --base alone")
        places[place] = name


def _common_base(given: Sequence[str], adapters: Mapping[int, Adapter]) -> str | None:
    """The base that all models name, if they are adapters or `base+adapter`."""
    named = [_base_of(name, adapters.get(place)) for place, name in enumerate(given)]
    return named[0] if named[0] and len(set(named)) == 1 else None


def _base_of(name: str, adapter: Adapter | None) -> str | None:
    if adapter is not None:
        return adapter.config.base_model_name_or_path or None
    base, *applied = split_reference(name)
    return base if applied else None


def _on_base(name: str, adapter: Adapter | None, base: str | None) -> str:
    if adapter is None:
        return name
    own = base or adapter.config.base_model_name_or_path
    if not own:
        fix = "Name the model that it was trained on: --base MODEL"
        raise CheckpointError("is an adapter that does not say what its base is", where=name, fix=fix)
    return f"{own}+{name}"


def _opened(names: Sequence[str]) -> list[Checkpoint]:
    models: list[Checkpoint] = []
    problems: list[CheckpointError] = []
    for name in names:
        try:
            models.append(open_model(name))
        except CheckpointError as error:
            problems.append(error)
    if problems:
        raise joined(CheckpointError, list({str(problem): problem for problem in problems}.values()))
    return models


def compare_tensors(cases: Cases) -> list[Finding]:
    """Which tensors of each model the first one lacks or has in another shape, and which it has besides.

    Heads and rows of embeddings are left out: models of one base often differ in them.
    """
    first = cases.tensors[0]
    found: list[Finding] = []
    for name, own in zip(cases.given[1:], cases.tensors[1:], strict=True):
        more, less = (
            [n for n in one if n not in two and not _is_apart(n)] for one, two in ((own, first), (first, own))
        )
        shapes = [n for n in own if n in first and not _same_shape(n, own[n], first[n])]
        kinds = {"only here": more, f"only in {cases.given[0]}": less, "of another shape": shapes}
        parts = [f"{len(names)} {what} ({few(names)})" for what, names in kinds.items() if names]
        if parts:
            text = f"has other tensors than {cases.given[0]}: {', '.join(parts)}"
            evidence = {"only_here": more, "only_there": less, "other_shape": shapes}
            found.append(Finding("note", "other-tensors", name, text, evidence=evidence))
    return found


def _is_apart(name: str) -> bool:
    return is_task_head(name) or is_head(name)


def _same_shape(name: str, one: TensorEntry, other: TensorEntry) -> bool:
    skipped = 1 if holds_tokens(name, one.shape) else 0
    return one.shape[skipped:] == other.shape[skipped:] or is_task_head(name)


def joints_of(tensors: Sequence[Mapping[str, TensorEntry]], tokens: Sequence[Tokens | None]) -> list[Joint]:
    """Every floating-point tensor, with the models that have it in one shape; one joint for each shape.

    Rows of embeddings are compared as far as all models have them; those of a model whose tokens lie at other
    rows than the first's stand alone.
    """
    names = dict.fromkeys(name for own in tensors for name in own)
    apart = _other_rows(tokens)
    found: list[Joint] = []
    for name in names:
        groups: dict[tuple[object, ...], dict[int, TensorEntry]] = {}
        for number, entry in ((n, own[name]) for n, own in enumerate(tensors) if name in own):
            if not is_float(entry.dtype):
                continue
            by_rows = holds_tokens(name, entry.shape)
            key = (entry.shape[1:], number if number in apart else None) if by_rows else entry.shape
            groups.setdefault(key, {})[number] = entry
        found += [Joint(name, group, min(e.numel for e in group.values())) for group in groups.values()]
    return [joint for joint in found if joint.numel]


def _other_rows(tokens: Sequence[Tokens | None]) -> set[int]:
    """The models with a token that lies at another row than in the first model whose tokens are known."""
    first = next((own.vocabulary for own in tokens if own is not None), {})
    return {
        number
        for number, own in enumerate(tokens)
        if own is not None and any(first.get(token, row) != row for token, row in own.vocabulary.items())
    }
