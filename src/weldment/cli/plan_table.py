"""A plan as text: what all tensors share is said once, the table says what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weldment.cli.console import columns, count, plural, size, styled
from weldment.methods import METHODS
from weldment.planning.layers import layer_of

if TYPE_CHECKING:
    from weldment.cli.plan import Forecast
    from weldment.planning.plan import Plan, TensorJob

Key = tuple[str, str]
"""A parameter and the model it is for, "" for the whole merge."""


def describe(planned: Plan, cast: Forecast, *, every: bool = False, width: int = 80) -> list[str]:
    """The lines of `weld plan`.

    Args:
        every: list each tensor instead of groups that differ only in their layer.
        width: of the terminal.
    """
    settings = Settings.of(planned)
    return [
        styled(_title(planned), bold=True),
        *columns([*_models(planned, settings), *_slices(planned)], width),
        *columns([("with ", settings.shared())] if settings.shared() else [], width),
        "",
        *_table(planned, settings, every, width),
        "",
        *columns([("note", note) for note in planned.notes], width),
        *columns(_totals(planned, cast), width),
    ]


@dataclass(frozen=True)
class Settings:
    """The parameters of all merged tensors: those that are the same for all, and those that are not.

    Attributes:
        names: a short name for each model.
        by_job: all settings of each merged tensor, by the identity of its job (or of an adapter's module).
        common: those that have one value wherever they occur.
    """

    names: Mapping[str, str]
    by_job: Mapping[int, Mapping[Key, Any]]
    common: Mapping[Key, Any]

    @classmethod
    def of(cls, planned: Plan) -> Settings:
        """The settings of a plan."""
        names = short_names(planned.models)
        merged = [job for job in planned.jobs if job.action == "merge"]
        return cls.over(names, {id(job): dict(_settings(planned, job, names)) for job in merged})

    @classmethod
    def over(cls, names: Mapping[str, str], by_job: Mapping[int, Mapping[Key, Any]]) -> Settings:
        """The settings of what is merged, sorted into those that are the same for all and those that are not."""
        values: dict[Key, list[Any]] = {}
        for found in by_job.values():
            for key, value in found.items():
                values.setdefault(key, []).append(value)
        return cls(names, by_job, {key: v[0] for key, v in values.items() if all(other == v[0] for other in v)})

    def of_model(self, name: str) -> str:
        """What is the same for all tensors of one model and differs from other models."""
        parts = [
            f"{key[0]} {_text(v)}" for key, v in self.common.items() if key[1] == name and not self._is_shared(key)
        ]
        return ", ".join(parts)

    def shared(self) -> str:
        """What is the same for all tensors and all models."""
        whole = {key[0]: value for key, value in self.common.items() if not key[1] or self._is_shared(key)}
        return ", ".join(f"{name} {_text(value)}" for name, value in whole.items())

    def _is_shared(self, key: Key) -> bool:
        """Whether a parameter of one model has the same value for all others."""
        every = {other: found.get(other) for found in self.by_job.values() for other in found if other[0] == key[0]}
        return all(other in self.common and self.common[other] == self.common[key] for other in every)

    def of_group(self, jobs: Iterable[object]) -> str:
        """What is special about a group of tensors."""
        values: dict[Key, list[Any]] = {}
        for job in jobs:
            for key, value in self.by_job.get(id(job), {}).items():
                if key not in self.common:
                    values.setdefault(key, []).append(value)
        texts: dict[str, dict[str, str]] = {}
        for (name, model), listed in values.items():
            texts.setdefault(name, {})[model] = _range(listed)
        return ", ".join(_by_model(name, by_model) for name, by_model in texts.items())


def short_names(references: Iterable[str]) -> dict[str, str]:
    """As much of the end of each model's path as tells it from the others."""
    parts = {reference: reference.split("/") for reference in references}
    longest = max(map(len, parts.values()))
    for length in range(1, longest + 1):
        names = {reference: "/".join(split[-length:]) for reference, split in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {reference: reference for reference in parts}


def _settings(planned: Plan, job: TensorJob, names: Mapping[str, str]) -> Iterable[tuple[Key, Any]]:
    yield from labelled(job.method, job.parameters, [names[model] for model, _ in job.inputs[: len(job.sources)]])
    if job.finish is not None and planned.recipe.layer_scale is not None:
        yield ("layer_scale", ""), job.finish.scale
    if job.finish is not None and job.finish.boost is not None:
        yield ("subspace_boost", ""), job.finish.boost


def labelled(method: str, parameters: Mapping[str, Any], models: Sequence[str]) -> Iterable[tuple[Key, Any]]:
    """The parameters of a merge; those that each model has a value of with the models' names."""
    labels = [m if models.count(m) == 1 else f"{m}#{models[: n + 1].count(m)}" for n, m in enumerate(models)]
    for parameter in METHODS[method].parameters:
        if parameter.by_pattern:
            continue  # it chose what is done to the tensor, and is no argument of the kernel
        value = parameters[parameter.argument]
        if parameter.per_model:
            yield from (((parameter.name, label), item) for label, item in zip(labels, value, strict=True))
        else:
            yield (parameter.name, ""), value


def _by_model(name: str, texts: Mapping[str, str]) -> str:
    """`weight 0.5 (a, b), 0..1 (c)`; without the models if there is but one value."""
    if len(set(texts.values())) == 1 and (len(texts) > 1 or "" in texts):
        return f"{name} {next(iter(texts.values()))}"
    models: dict[str, list[str]] = {}
    for model, text in texts.items():
        models.setdefault(text, []).append(model)
    return f"{name} " + ", ".join(f"{text} ({', '.join(listed)})" for text, listed in models.items())


def _range(values: Sequence[Any]) -> str:
    """One value, or from where to where it goes over the layers."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        return _text(distinct[0])
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in distinct):
        return "/".join(map(_text, distinct))
    ends = sorted((min(distinct), max(distinct)), reverse=values[0] > values[-1])
    return "..".join(map(_text, ends))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _title(planned: Plan) -> str:
    models = plural(len(set(planned.experts)), "model")
    dtypes = "/".join(sorted({job.dtype.lower() for job in planned.jobs}))
    return f"{planned.recipe.method}: {models}, {count(planned.parameters_count)} parameters, {dtypes}"


def _models(planned: Plan, settings: Settings) -> list[tuple[str, str, str]]:
    rows = [
        ("stage", str(stage.recipe.name), f"{stage.recipe.method}, {plural(len(stage.jobs), 'tensor')} of it are read")
        for stage in planned.stages
    ]
    base = planned.recipe.base_model
    if base and base not in planned.experts:
        rows.append(("base", base, ""))
    for expert in dict.fromkeys(planned.experts):
        rows.append(("base" if expert == base else "model", expert, settings.of_model(settings.names[expert])))
    return rows


def _slices(planned: Plan) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    first = 0
    for piece in planned.recipe.slices:
        last = first + piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0] - 1
        sources = ", ".join(f"{source.model} {list(source.layer_range)}" for source in piece.sources)
        rows.append(("slice", f"layers {first} to {last}", sources))
        first = last + 1
    return rows


def _table(planned: Plan, settings: Settings, every: bool, width: int) -> list[str]:
    """The tensors, in groups; a column in which no row says anything is left out."""
    several = len({job.dtype for job in planned.jobs}) > 1
    rows = [("tensors", "", "shape", "dtype" if several else "", "")]
    for name, jobs in _groups(planned, every).items():
        shapes = {"x".join(map(str, job.shape)) or "scalar" for job in jobs}
        dtypes = "/".join(sorted({job.dtype.lower() for job in jobs})) if several else ""
        shape = shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes"
        rows.append((name, str(len(jobs)), shape, dtypes, _how(jobs, settings)))
    kept = [n for n in range(5) if any(row[n] for row in rows[1:])]
    head, *lines = columns([[row[n] for n in kept] for row in rows], width, right=(1,))
    return [styled(head, dim=True), *lines]


def _groups(planned: Plan, every: bool) -> dict[str, list[TensorJob]]:
    """Jobs by name, the layer number left open unless every tensor is wanted."""
    groups: dict[str, list[TensorJob]] = {}
    for job in planned.jobs:
        layer = None if every else layer_of(job.name)
        name = job.name if layer is None else f"{layer.stack}.*.{layer.rest}"
        groups.setdefault(f"{job.file}: {name}" if job.file else name, []).append(job)
    return groups


def _how(jobs: Sequence[TensorJob], settings: Settings) -> str:
    """What is done with a group, as far as it is not what is done with most."""
    parts = [settings.of_group(jobs)] if any(job.action == "merge" for job in jobs) else []
    copied = Counter(settings.names[job.models[0]] for job in jobs if job.action == "copy")
    if copied:
        models = ", ".join(model if len(copied) == 1 else f"{model} ({number})" for model, number in copied.items())
        parts.append(f"copied from {models}")
    if any(job.action == "agree" for job in jobs):
        parts.append("copied if all models agree")
    return "; ".join(filter(None, parts))


def _totals(planned: Plan, cast: Forecast) -> list[tuple[str, str, str]]:
    fates = ", ".join(f"{number} {fate}" for fate, number in planned.counts().items())
    free = f"{size(cast.free)} free" if cast.free >= cast.write else f"only {size(cast.free)} free"
    rows = [("input", plural(len(planned.ledger), "tensor"), fates)]
    dropped = Counter(entry.detail for entry in planned.ledger if entry.fate == "dropped")
    rows += [("", f"{number} dropped", reason) for reason, number in dropped.items()]
    if cast.download:
        rows.append(("download", size(cast.download), ""))
    return [
        *rows,
        ("read", size(cast.read), ""),
        ("write", size(cast.write), f"in {plural(len(planned.layout.files), 'file')} ({free})"),
        ("memory", f"about {size(cast.memory)}", f"with {plural(cast.threads, 'thread')}"),
        ("plan", planned.hash[:12], ""),
    ]
