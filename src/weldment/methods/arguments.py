"""From parameter values to the keyword arguments of a kernel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weldment.methods.method import Method, Parameter


def settle(method: Method, values: Mapping[str, Any], models: int) -> dict[str, Any]:
    """The kernel's keyword arguments: defaults filled in, per-model values as tuples.

    Args:
        values: by parameter name (or alias); a per-model parameter takes one value or one per model.
        models: number of models.

    Raises:
        ValueError: a value is missing or does not fit; the text says which.
    """
    spellings = {name for parameter in method.parameters for name, _ in _spellings(parameter)}
    for name in values:
        if name not in spellings:
            known = ", ".join(parameter.name for parameter in method.parameters)
            raise ValueError(f"{method.name} has no parameter {name!r}; it has {known or 'none'}")
    arguments = {parameter.argument: _value(parameter, values, models, method) for parameter in method.parameters}
    if method.check is not None:
        method.check(**arguments)
    return arguments


def _spellings(parameter: Parameter) -> list[tuple[str, float | None]]:
    """The names under which a parameter may be given, with the factor of each alias."""
    aliases = (parameter.aliases or {}).items()
    return [*dict.fromkeys([(parameter.name, None), (parameter.argument, None)]), *aliases]


def _value(parameter: Parameter, values: Mapping[str, Any], models: int, method: Method) -> Any:
    found = [(name, factor) for name, factor in _spellings(parameter) if name in values]
    if len(found) > 1:
        raise ValueError(f"`{found[0][0]}` and `{found[1][0]}` are the same parameter; give one of them")
    if parameter.required and not found:
        raise ValueError(f"{method.name} needs `{parameter.name}`: {parameter.help}")
    given, factor = (values[found[0][0]], found[0][1]) if found else (parameter.default, None)
    if not parameter.per_model:
        return checked(parameter, given, factor)
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * models
    if len(listed) != models:
        raise ValueError(f"`{parameter.name}` has {len(listed)} values for {models} models")
    return tuple(checked(parameter, value, factor) for value in listed)


def checked(parameter: Parameter, value: Any, factor: float | None = None) -> Any:
    """The value in its type, scaled if it was given under an alias.

    Raises:
        ValueError: wrong type or out of range.
    """
    if parameter.kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"`{parameter.name}` must be true or false, not {value!r}")
        return value
    if parameter.kind == "choice":
        word = str(value).lower() if isinstance(value, bool) else value
        if word not in parameter.choices:
            raise ValueError(f"`{parameter.name}` must be one of {', '.join(parameter.choices)}, not {value!r}")
        return word
    if parameter.kind in ("patterns", "counts"):
        return _by_pattern(parameter, value)
    return _number(parameter, value, factor)


def _by_pattern(parameter: Parameter, value: Any) -> Any:
    """A tuple of regular expressions, or a mapping of them to whole numbers; None if nothing is given."""
    if value is None:
        return None
    found = _patterns(parameter, value) if parameter.kind == "patterns" else _counts(parameter, value)
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`{parameter.name}`: {pattern!r} is no regular expression: {error}") from error
    return found


def _patterns(parameter: Parameter, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(item, str) and item for item in listed):
        raise ValueError(f"`{parameter.name}` must be a list of regular expressions, not {value!r}")
    return tuple(listed)


def _counts(parameter: Parameter, value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"`{parameter.name}` must be a mapping of regular expressions to numbers, not {value!r}")
    for count in value.values():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"`{parameter.name}` must have whole numbers of at least 1, not {count!r}")
    return dict(value)


def _number(parameter: Parameter, value: Any, factor: float | None) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        raise ValueError(f"`{parameter.name}` must be a number, not {value!r}")
    if parameter.kind == "int":
        if value != int(value):
            raise ValueError(f"`{parameter.name}` must be a whole number, not {value!r}")
        value = int(value)
    else:
        value = float(value) * (factor or 1.0)
    low, high = parameter.minimum, parameter.maximum
    too_low = low is not None and (value <= low if parameter.open_minimum else value < low)
    too_high = high is not None and (value >= high if parameter.open_maximum else value > high)
    if too_low or too_high:
        raise ValueError(f"`{parameter.name}` must be {interval(parameter)}, not {value:g}")
    return value


def interval(parameter: Parameter) -> str:
    """The range of a parameter in words: `in (0, 1]`, `at least 0`, `any number`."""
    low, high = parameter.minimum, parameter.maximum
    if low is None and high is None:
        return "any number"
    if high is None:
        return f"above {low:g}" if parameter.open_minimum else f"at least {low:g}"
    if low is None:
        return f"below {high:g}" if parameter.open_maximum else f"at most {high:g}"
    return f"in {'(' if parameter.open_minimum else '['}{low:g}, {high:g}{')' if parameter.open_maximum else ']'}"
