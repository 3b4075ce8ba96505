"""The models of a diagnosis: opened, adapters on their bases, under common names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weldment.adapters.adapter import Adapter
from weldment.adapters.opening import find_adapter, open_model, split_reference
from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.doctor.measuring import Joint
from weldment.doctor.tokens import Tokens
from weldment.errors import CheckpointError, UserError, joined
from weldment.planning.inputs import under_names_of
from weldment.planning.roles import holds_tokens


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


def joints_of(tensors: Sequence[Mapping[str, TensorEntry]], tokens: Sequence[Tokens | None]) -> list[Joint]:
    """Every floating-point tensor, with the models that have it in one shape; one joint for each shape.

    Rows of embeddings are compared as far as all models have them, unless tokens lie at different rows.
    """
    names = dict.fromkeys(name for own in tensors for name in own)
    aligned = same_rows(tokens)
    found: list[Joint] = []
    for name in names:
        holders = {n: own[name] for n, own in enumerate(tensors) if name in own and is_float(own[name].dtype)}
        groups: dict[tuple[object, ...], dict[int, TensorEntry]] = {}
        for number, entry in holders.items():
            by_rows = holds_tokens(name, entry.shape)
            shape = entry.shape[1:] if by_rows else entry.shape
            groups.setdefault((*shape, None if aligned or not by_rows else number), {})[number] = entry
        found += [Joint(name, group, min(e.numel for e in group.values())) for group in groups.values()]
    return [joint for joint in found if joint.numel]


def same_rows(tokens: Sequence[Tokens | None]) -> bool:
    """Whether no token that two of the models have lies at different rows, as far as is known."""
    known = [own.vocabulary for own in tokens if own is not None]
    return all(known[0].get(token, row) == row for other in known[1:] for token, row in other.items())
