"""From YAML text to plain data: safe, bounded, without duplicate keys.

Recipes come from strangers. Nothing but text, numbers, booleans, lists and mappings is built, an
alias counts as much as what it stands for, and size and depth are limited while the text is read.
Keys are always text, and so are dates.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from weldment.errors import RecipeError
from weldment.recipe.words import Place, shown

MAX_BYTES = 1_000_000
MAX_NODES = 30_000
MAX_DEPTH = 50
MAX_DOCUMENTS = 1_000
_INT_BITS = 63
_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "null"))
_DATE = _TAG + "timestamp"
_MERGE = _TAG + "merge"


class _Loader(yaml.SafeLoader):
    """Composes node trees of limited size and depth."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Compose a node, unless it is too deep or, with its aliases written out, too large."""
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(f"lists and mappings are nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._measure(node, is_alias, mark)
        return node

    def _measure(self, node: Node, is_alias: bool, mark: yaml.Mark) -> None:
        if is_alias:
            if id(node) not in self._sizes:
                raise _refused("an alias stands inside the value that it repeats", mark)
            return
        size = 1 + sum(self._sizes[id(child)] for child in _children(node))
        if size > MAX_NODES or len(self._sizes) > MAX_NODES:
            raise _refused(f"more than {MAX_NODES} values", mark)
        self._sizes[id(node)] = size


def _refused(problem: str, mark: yaml.Mark | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: the file is missing, cannot be read, is too large or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError("there is no such file", where=str(path), fix="Check the path of the recipe") from error
    except IsADirectoryError as error:
        raise RecipeError("this is a folder", where=str(path), fix="Name the YAML file in it") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=repr(str(path))) from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"the file is larger than {MAX_BYTES} bytes: not a recipe", where=str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        cause = f"not UTF-8 text (byte {error.start})"
        raise RecipeError(cause, where=str(path), fix="A recipe is a YAML file; save it as UTF-8") from error


def parse_documents(text: str, origin: str) -> list[Any]:
    """Plain data of each YAML document in `text`; empty documents are left out.

    Raises:
        RecipeError: a syntax error, a duplicate key, a tag of another kind, or too much data; the
            place is `origin`, line and column.
    """
    documents: list[Any] = []
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            if len(documents) >= MAX_DOCUMENTS:
                raise _refused(f"more than {MAX_DOCUMENTS} documents", None)
            documents.append(None if node is None else _build(loader, node))
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, origin) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}", where=origin) from error
    except (ValueError, IndexError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=origin) from error
    return [document for document in documents if document is not None]


def _syntax_error(error: yaml.MarkedYAMLError, origin: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    where = origin if mark is None else f"{origin}, line {mark.line + 1}, column {mark.column + 1}"
    cause = ": ".join(["not valid YAML", *(part for part in (error.context, error.problem) if part)])
    return RecipeError(cause, where=where)


def _build(loader: _Loader, node: Node) -> Any:
    if isinstance(node, MappingNode) and node.tag == _TAG + "map":
        return _build_mapping(loader, node)
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        return [_build(loader, child) for child in node.value]
    if isinstance(node, ScalarNode) and node.tag == _DATE:
        return node.value
    if not isinstance(node, ScalarNode) or node.tag not in _SCALARS:
        raise _refused(f"the tag {shown(node.tag)} has no meaning in a recipe", node.start_mark)
    try:
        value = loader.construct_object(node)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        kind = node.tag.removeprefix(_TAG)
        raise _refused(f"{shown(node.value)} is not a valid {kind}", node.start_mark) from error
    if isinstance(value, int) and value.bit_length() > _INT_BITS:
        raise _refused("a whole number of more than 64 bits", node.start_mark)
    return value


def _build_mapping(loader: _Loader, node: MappingNode) -> dict[str, Any]:
    own: dict[str, Any] = {}
    lines: dict[str, int] = {}
    merged: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            raise _refused("a key must be text", key.start_mark)
        if key.value in lines:
            cause = f"the key {shown(key.value)} is given twice, first on line {lines[key.value]}"
            raise _refused(cause, key.start_mark)
        lines[key.value] = key.start_mark.line + 1
        if key.tag == _MERGE:
            merged = _merged(loader, value)
        else:
            own[key.value] = _build(loader, value)
    return {**merged, **own}


def _merged(loader: _Loader, node: Node) -> dict[str, Any]:
    """What `<<` adds: a mapping, or several of which the first that has a key wins."""
    parts = _build(loader, node)
    mappings = parts if isinstance(parts, list) else [parts]
    if not all(isinstance(part, dict) for part in mappings):
        raise _refused("`<<` takes a mapping or a list of mappings", node.start_mark)
    return {key: value for part in reversed(mappings) for key, value in part.items()}


def plain(value: object, place: Place) -> Any:
    """A copy of data handed over from Python, made of dicts, lists, text, numbers and None only.

    Raises:
        RecipeError: other types, keys that are not text, too much data, too deep, or containing itself.
    """
    return _Plain().copy(value, place, 0)


class _Plain:
    """One copy in progress."""

    def __init__(self) -> None:
        self._count = 0

    def copy(self, value: object, place: Place, depth: int) -> Any:
        self._count += 1
        if depth > MAX_DEPTH:
            raise place.problem(f"lists and mappings are nested more than {MAX_DEPTH} deep")
        if self._count > MAX_NODES:
            raise place.problem(f"more than {MAX_NODES} values")
        if isinstance(value, Mapping):
            return self._mapping(value, place, depth)
        if isinstance(value, (list, tuple)):
            return [self.copy(item, place.at(index), depth + 1) for index, item in enumerate(value)]
        return _plain_scalar(value, place)

    def _mapping(self, value: Mapping[Any, object], place: Place, depth: int) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise place.problem(f"the key {shown(key)} is not text", "Put it in quotes")
            copied[str.__str__(key)] = self.copy(item, place.at(key), depth + 1)
        return copied


def _plain_scalar(value: object, place: Place) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, PurePath):
        return str(value)
    try:
        number = _number(value)
    except (OverflowError, ValueError) as error:
        raise place.problem("a number that is too large") from error
    if number is None:
        raise place.problem(f"a value of type {type(value).__name__} has no meaning in a recipe")
    return number


def _number(value: object) -> int | float | None:
    if isinstance(value, Integral):
        number = int(value)
        if number.bit_length() > _INT_BITS:
            raise OverflowError
        return number
    return float(value) if isinstance(value, Real) else None
