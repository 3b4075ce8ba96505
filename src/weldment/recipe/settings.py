"""Parameters as a recipe writes them, checked against what the method takes.

Four levels may set a parameter. A parameter that each model has a value of (`weight`, `density`)
may stand at any of them. A parameter that the whole merge has one value of (`normalize`, `lambda`)
stands at the top or in a slice: under one model it would be ignored, so there it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from weldment.errors import RecipeError
from weldment.methods import METHODS, Method, Parameter
from weldment.methods.arguments import checked
from weldment.recipe.words import Place, nearest, shown, suggestion

Steps = tuple[str | int, ...]
Level = Literal["model", "merge"]
"""Whether settings belong to one model or to all of them."""

WITHOUT_EFFECT = frozenset({"int8_mask"})
"""Parameters of other tools that change how they calculate, not what."""

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass
class Findings:
    """What checking the settings of a recipe brought up."""

    problems: list[RecipeError] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)


def check_settings(
    method: Method, written: Mapping[str, Any], level: Level, place: Place, findings: Findings
) -> dict[str, Any]:
    """The settings of one level that the method uses, under their proper names, checked and typed.

    A value is a scalar, a list of numbers (a gradient) or a list of {filter, value}. Settings
    without a value (`weight:` with nothing after it) are left out.
    """
    settings: dict[str, Any] = {}
    for name, value in written.items():
        parameter = method.parameter(name)
        if parameter is None:
            _unused(method, name, place, findings)
        elif value is None:
            continue
        elif level == "model" and not parameter.per_model:
            cause = f"`{name}` is one value for the whole merge, not for one model"
            findings.problems.append(place.at(name).problem(cause, "Move it to `parameters` at the top of the recipe"))
        elif parameter.name in settings:
            cause = f"`{name}` is the same parameter as another one here"
            names = " and ".join(f"`{known}`" for known in (parameter.name, *(parameter.aliases or {})))
            findings.problems.append(place.at(name).problem(cause, f"Keep one of {names}"))
        else:
            reader = _Reader(parameter, name, findings)
            settings[parameter.name] = reader.setting(value, place.at(name))
    return settings


def settings_by_path(document: Mapping[str, Any], place: Place, findings: Findings) -> dict[Steps, dict[str, Any]]:
    """The checked settings of all levels, by where they stand; parts of the wrong shape are passed over."""
    method = METHODS.get(document["merge_method"]) if isinstance(document.get("merge_method"), str) else None
    if method is None:
        return {}
    return {
        steps: check_settings(method, written, level, place.at(*steps), findings)
        for steps, level, written in _written_settings(document)
        if isinstance(written, Mapping)
    }


def _written_settings(document: Mapping[str, Any]) -> Iterator[tuple[Steps, Level, object]]:
    yield ("parameters",), "merge", document.get("parameters")
    for name, written in _mapping(document.get("input_model_parameters")).items():
        yield ("input_model_parameters", name), "model", written
    for index, entry in enumerate(_listed(document.get("models"))):
        yield ("models", index, "parameters"), "model", _mapping(entry).get("parameters")
    for index, piece in enumerate(_listed(document.get("slices"))):
        yield ("slices", index, "parameters"), "merge", _mapping(piece).get("parameters")
        for number, source in enumerate(_listed(_mapping(piece).get("sources"))):
            steps = ("slices", index, "sources", number, "parameters")
            yield steps, "model", _mapping(source).get("parameters")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else []


def known_parameters() -> dict[str, None]:
    """Names and aliases of the parameters of all methods."""
    return {
        name: None
        for method in METHODS.values()
        for parameter in method.parameters
        for name in (parameter.name, *(parameter.aliases or {}))
    }


def _unused(method: Method, name: str, place: Place, findings: Findings) -> None:
    known = known_parameters()
    if name in known or name in WITHOUT_EFFECT:
        findings.notes[f"`{name}` has no effect on {method.name}"] = None
        return
    own = [n for parameter in method.parameters for n in (parameter.name, *(parameter.aliases or {}))]
    advice = suggestion(name, own) if own else f"{method.name} has no parameters"
    findings.problems.append(place.at(name).problem(f"{method.name} has no parameter `{name}`", advice))


def read_setting(parameter: Parameter, value: object, place: Place, findings: Findings) -> Any:
    """One value as a recipe writes it, checked: a scalar, a gradient or a list of {filter, value}."""
    return _Reader(parameter, parameter.name, findings).setting(value, place)


@dataclass(frozen=True)
class _Reader:
    """Reads the values of one parameter; `name` is how the recipe spells it."""

    parameter: Parameter
    name: str
    findings: Findings

    def setting(self, value: object, place: Place) -> Any:
        """A scalar, a gradient or a conditional list; what goes by patterns has one value for the merge."""
        if self.parameter.by_pattern:
            return self._scalar(value, place)
        if isinstance(value, Mapping):
            return [self._condition(value, place)]
        if isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
            return [self._condition(item, place.at(index)) for index, item in enumerate(value)]
        return self._value(value, place)

    def _condition(self, entry: object, place: Place) -> dict[str, Any]:
        if not isinstance(entry, Mapping):
            return self._refuse(place, f"{shown(entry)} stands among conditions", "Write it as {value: ...}")
        if entry.keys() & {"search", "choices"}:
            return self._refuse(place, "a mark stands here, of which a search makes a value", "Run `weld search`")
        for key in entry.keys() - {"filter", "value"}:
            self._refuse(place.at(key), f"there is no key `{key}`", suggestion(key, ("filter", "value")))
        pattern = entry.get("filter")
        if not (pattern is None or isinstance(pattern, str)):
            self._refuse(place.at("filter"), f"{shown(pattern)} is not text", "Put it in quotes")
        if entry.get("value") is None:
            return self._refuse(place, "the key `value` is missing")
        return {"filter": None if pattern == "*" else pattern, "value": self._value(entry["value"], place.at("value"))}

    def _value(self, value: object, place: Place) -> Any:
        if not isinstance(value, (list, tuple)):
            return self._scalar(value, place)
        if self.parameter.kind != "float":
            return self._refuse(place, f"`{self.name}` takes one value, not a list", None)
        if not value:
            return self._refuse(place, "the list of values is empty")
        return [self._scalar(item, place.at(index)) for index, item in enumerate(value)]

    def _scalar(self, value: object, place: Place) -> Any:
        factor = (self.parameter.aliases or {}).get(self.name)
        try:
            return checked(self.parameter, coerced(self.parameter, value), factor)
        except ValueError as error:
            spelling = "" if factor is None else f"`{self.name}` is `{self.parameter.name}` / {factor:g}: "
            close = nearest(str(value), self.parameter.choices) if self.parameter.choices else None
            return self._refuse(place, f"{spelling}{error}", f"Did you mean `{close}`?" if close else None)

    def _refuse(self, place: Place, cause: str, fix: str | None = None) -> dict[str, Any]:
        self.findings.problems.append(place.problem(cause, fix))
        return {}


def coerced(parameter: Parameter, value: object) -> object:
    """The value with YAML's surprises undone: `1e-5`, which YAML 1.1 takes for text, and 0 and 1 for booleans."""
    if parameter.kind == "bool" and not isinstance(value, bool) and value in (0, 1):
        return bool(value)
    if parameter.kind in ("float", "int") and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value
