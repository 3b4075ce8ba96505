"""Changes to a recipe from the command line: `models[0].parameters.weight=0.3`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from weldment.recipe.documents import parse_documents
from weldment.recipe.words import Place, shown, yaml_path

_STEP = re.compile(r'(?:^|\.)(?:"(?P<quoted>[^"]*)"|(?P<plain>[^.\[\]="]+))|\[(?P<index>\d+)\]')


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change `document` in place.

    An override is `path=value`: keys joined by dots, list items as `[0]` or `.0`, keys that
    contain dots in double quotes (`take."lm_head.weight"=org/model`); the value is YAML. Mappings
    on the way are created where they are missing, list items are not. An empty value unsets.

    Raises:
        RecipeError: the path or the value cannot be read, or the path leads nowhere.
    """
    for override in overrides:
        place = Place(f"override (--set) {shown(override)}")
        text, equals, value = _split(override)
        if not equals:
            raise place.problem("there is no `=`", "Write it as path=value")
        documents = parse_documents(value, str(place))
        if len(documents) > 1:
            raise place.problem("the value is more than one YAML document")
        _assign(document, _steps(text.strip(), place), documents[0] if documents else None, place)


def _split(override: str) -> tuple[str, str, str]:
    """Split at the first `=` that is not inside quotes."""
    match = re.match(r'((?:[^"=]|"[^"]*")*)(=?)(.*)', override, re.DOTALL)
    assert match is not None
    return match[1], match[2], match[3]


def _steps(path: str, place: Place) -> list[str]:
    steps: list[str] = []
    end = 0
    while end < len(path):
        match = _STEP.match(path, end)
        if match is None or (end == 0 and match["index"] is not None):
            raise place.problem(f"{shown(path)} is not a path", "Write it as models[0].parameters.weight")
        steps.append(next(part for part in match.groups() if part is not None))
        end = match.end()
    if not steps:
        raise place.problem("the path is empty", "Write it as path=value")
    return steps


def _assign(document: dict[str, Any], steps: Sequence[str], value: Any, place: Place) -> None:
    target: Any = document
    for depth, step in enumerate(steps):
        is_last = depth == len(steps) - 1
        if isinstance(target, list):
            index = _index(target, step, yaml_path(steps[:depth]), place)
            target[index] = value if is_last else target[index]
            target = target[index]
        elif isinstance(target, dict):
            if is_last:
                target[step] = value
            elif target.get(step) is None:
                target[step] = {}
            target = target[step]
        else:
            raise place.problem(f"`{yaml_path(steps[:depth])}` is {shown(target)}, which has no `{step}`")


def _index(items: Sequence[Any], step: str, path: str, place: Place) -> int:
    if not (step.isascii() and step.isdigit()) or int(step[:10]) >= len(items):
        raise place.problem(
            f"`{path}` is a list of {len(items)}, and {shown(step)} is not one of its indices",
            f"Indices are 0 to {len(items) - 1}" if items else "The list is empty",
        )
    return int(step)
