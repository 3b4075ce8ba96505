"""A recipe with marks as the space of a search: its dimensions, its corners, and the recipe at a point.

A mark (see `marks.py`) may stand for any value of a recipe; a list of marks is a gradient over
the layers. A mark's name is its YAML path.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weldment.errors import RecipeError, UserError, joined
from weldment.evaluation.search.marks import KINDS, Mark, read_mark
from weldment.recipe.documents import parse_documents, plain, read_text
from weldment.recipe.loading import Source
from weldment.recipe.words import Place, shown, yaml_path

Steps = tuple[str | int, ...]
Document = dict[str, Any]

MOST_CORNERS = 32
"""If there are no more corners than these, a recipe is planned at all of them; otherwise at some."""

_NAMES_BELOW = ("take", "tokens", "input_model_parameters")
"""Keys of mappings whose own keys are names, which may be `search` or `choices`."""


@dataclass(frozen=True)
class Space:
    """A recipe with marks.

    Attributes:
        documents: of the recipe, as written.
        marks: by their names.
        origin: of the recipe, for messages.
    """

    documents: tuple[Document, ...]
    marks: Mapping[str, Mark]
    origin: str

    def filled(self, values: Mapping[str, Any]) -> list[Document]:
        """The recipe's documents at a point: a value for each mark, by the marks' names."""
        return [_filled(document, start, values) for start, document in _started(self.documents)]

    def corners(self) -> Iterator[dict[str, Any]]:
        """Points at the ends of the marks, first the one where all are at their lowest or first.

        All such points if they are few. Otherwise those where all marks are at their lowest, or highest, and those
        where one of them is not.
        """
        ends = {name: mark.ends for name, mark in self.marks.items()}
        if math.prod(map(len, ends.values())) <= MOST_CORNERS:
            yield from (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values()))
            return
        lowest = {name: values[0] for name, values in ends.items()}
        highest = {name: values[-1] for name, values in ends.items()}
        yield from (lowest, highest)
        yield from ({**lowest, name: value} for name, values in ends.items() for value in values[1:])
        yield from ({**highest, name: value} for name, values in ends.items() for value in values[:-1])

    def check(self) -> list[str]:
        """Plan the recipe at its corners, from headers alone.

        Returns:
            what all plans note about marked parameters: that they have no effect.

        Raises:
            UserError: it cannot be planned; says at which values, unless it is so at all corners.
        """
        from weldment.merging import plan

        corners = list(self.corners())
        found: list[tuple[dict[str, Any], UserError]] = []
        notes: list[tuple[str, ...]] = []
        for values in corners:
            try:
                notes.append(tuple(plan(self.filled(values)).notes))
            except UserError as error:
                found.append((values, error))
        if found:
            raise self._refusal(found, everywhere=len(found) == len(corners))
        about = (note for name in self.marks for note in _in_all(name, notes))
        return list(dict.fromkeys(about))

    def _refusal(self, found: Sequence[tuple[dict[str, Any], UserError]], *, everywhere: bool) -> UserError:
        values, error = found[0]
        if everywhere and len({str(other) for _, other in found}) == 1:
            return error
        return type(error)(f"the recipe is not valid with {point(values)}: {error}", where=self.origin)


def _in_all(name: str, notes: Sequence[Sequence[str]]) -> list[str]:
    """The notes about a mark, if each of several plans has one."""
    words = [f"`{step}`" for step in re.split(r"[.\[]", name)]
    about = [[note for note in those if any(word in note for word in words)] for those in notes]
    return [note for those in about for note in those] if all(about) else []


def point(values: Mapping[str, Any]) -> str:
    """`parameters.lambda = 0.312, merge_method = ties`."""
    return ", ".join(f"{name} = {f'{v:.4g}' if isinstance(v, float) else v}" for name, v in values.items())


def load_space(source: Source) -> Space:
    """Read a recipe and find its marks; what stands beside the marks is not checked.

    Args:
        source: a YAML file, or its content as a mapping (or several, for staged merges).

    Raises:
        RecipeError: with every mark that is wrong; or there is none.
    """
    documents, origin = _documents(source)
    marks: dict[str, Mark] = {}
    problems: list[RecipeError] = []
    for start, document in _started(documents):
        for steps, written in _marks(document, start):
            try:
                marks[yaml_path(steps)] = read_mark(written, Place(origin, yaml_path(steps)))
            except RecipeError as error:
                problems.append(error)
    if problems:
        raise joined(RecipeError, problems)
    if not marks:
        fix = "Mark values, like `density: {search: [0.1, 0.9]}` or `merge_method: {choices: [ties, dare_ties]}`"
        raise RecipeError("the recipe has no marks: there is nothing to search", where=origin, fix=fix)
    return Space(documents, marks, origin)


def _documents(source: Source) -> tuple[tuple[Document, ...], str]:
    if isinstance(source, (str, Path)):
        origin = str(source)
        found = parse_documents(read_text(Path(source)), origin)
    else:
        origin = "recipe"
        copied = plain(source, Place(origin))
        found = copied if isinstance(copied, list) else [copied]
    for document in found:
        if not isinstance(document, dict):
            raise RecipeError(f"a recipe is a mapping of keys, not {shown(document)}", where=origin)
    return tuple(found), origin


def _started(documents: tuple[Document, ...]) -> Iterator[tuple[Steps, Document]]:
    """Documents with what their paths begin with: the merge's name where merges build on each other."""
    for document in documents:
        name = document.get("name")
        yield (name,) if len(documents) > 1 and isinstance(name, str) else (), document


def _is_mark(value: object, steps: Steps) -> bool:
    if not isinstance(value, Mapping) or not KINDS.keys() & value.keys() or "merge_method" in value:
        return False
    return not steps or steps[-1] not in _NAMES_BELOW


def _marks(value: object, steps: Steps) -> Iterator[tuple[Steps, Mapping[str, Any]]]:
    if isinstance(value, Mapping) and _is_mark(value, steps):
        yield steps, value
    else:
        items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for step, item in items:
            yield from _marks(item, (*steps, step))


def _filled(value: Any, steps: Steps, values: Mapping[str, Any]) -> Any:
    if _is_mark(value, steps):
        return values[yaml_path(steps)]
    if isinstance(value, dict):
        return {key: _filled(item, (*steps, key), values) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, (*steps, index), values) for index, item in enumerate(value)]
    return value
