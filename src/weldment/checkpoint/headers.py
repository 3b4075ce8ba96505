"""Headers of safetensors files: parsed and checked in full, without reading the tensors.

A file is 8 bytes (little-endian length of the header), the header (JSON), then the data. Every
byte of the data belongs to exactly one tensor; a file that says otherwise is refused here, so
that nothing downstream has to doubt an offset.

Source: the format's description at https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.errors import CheckpointError

PREFIX_BYTES = 8
HEADER_LIMIT = 100_000_000
"""Longest header in bytes; the reference implementation refuses longer ones too."""

LFS_POINTER = b"version https://git-lfs"
AGAIN = "The file is damaged: download or save it again"
KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a header; its data are bytes [start, end) after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; the data begin at byte `data_start` of the file."""

    tensors: Mapping[str, HeaderEntry]
    metadata: Mapping[str, str]
    data_start: int


class _RepeatedKeyError(ValueError):
    """A JSON object names the same key twice."""


def read_header(path: Path) -> Header:
    """The header of a safetensors file on this machine.

    Args:
        path: the file.

    Returns:
        The checked header.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or breaks a rule of the format.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(len(LFS_POINTER))
            length = header_length(prefix, size, where)
            file.seek(PREFIX_BYTES)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=where) from error
    return parse_header(raw, size - PREFIX_BYTES - length, where)


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Length of the header in bytes, from the first bytes of a file.

    Args:
        prefix: the beginning of the file, 8 bytes or more if it has them.
        size: size of the whole file.
        where: the file, for messages.

    Raises:
        CheckpointError: not a safetensors file, truncated, or a header that is too long.
    """
    if prefix.startswith(LFS_POINTER):
        cause = "is a Git LFS pointer, not the weights themselves"
        raise CheckpointError(cause, where=where, fix="Run `git lfs pull` in that folder, or download the file again")
    if size < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        raise CheckpointError(f"is not a safetensors file: it has only {size} bytes", where=where, fix=AGAIN)
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > HEADER_LIMIT:
        cause = f"is not a safetensors file: its header would have {length} bytes, the limit is {HEADER_LIMIT}"
        raise CheckpointError(cause, where=where, fix="Check that the file is what its name says")
    if length > size - PREFIX_BYTES:
        cause = f"is truncated: its header has {length} bytes, the whole file has {size}"
        raise CheckpointError(cause, where=where, fix=AGAIN)
    return length


def parse_header(raw: bytes, data_bytes: int | None, where: str) -> Header:
    """A header from its bytes, all rules of the format checked.

    Args:
        raw: the JSON, without the 8 bytes of length before it.
        data_bytes: number of bytes after the header, or None if unknown.
        where: the file, for messages.

    Raises:
        CheckpointError: the header breaks a rule, or the data are longer or shorter than it says.
    """
    content = _json_object(raw, where)
    metadata = _metadata(content.pop("__metadata__", {}), where)
    entries = {name: _entry(name, fields, where) for name, fields in content.items()}
    _check_coverage(entries.values(), data_bytes, where)
    return Header(entries, metadata, PREFIX_BYTES + len(raw))


def _json_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _RepeatedKeyError as error:
        raise CheckpointError(f"the header names {error} twice", where=where, fix=AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not JSON: {error}", where=where, fix=AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError("the header is not a JSON object", where=where, fix=AGAIN)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(repr(next(name for name in names if names.count(name) > 1)))
    return content


def _metadata(fields: Any, where: str) -> dict[str, str]:
    valid = isinstance(fields, dict) and all(isinstance(value, str) for value in fields.values())
    if not valid or not all(is_text(text) for item in fields.items() for text in item):
        raise CheckpointError("__metadata__ is not a mapping from text to text", where=where, fix=AGAIN)
    return fields


def is_text(text: str) -> bool:
    """Whether the text is Unicode; JSON escapes can spell half a character."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _entry(name: str, fields: Any, where: str) -> HeaderEntry:
    place = f"{where}: tensor {name!r}"
    if not is_text(name):
        raise CheckpointError("the name is not Unicode text", where=place, fix=AGAIN)
    if not isinstance(fields, dict) or fields.keys() != KEYS:
        raise CheckpointError(f"its entry must have exactly the keys {', '.join(sorted(KEYS))}", where=place, fix=AGAIN)
    dtype = _dtype(fields["dtype"], place)
    shape = _sizes(fields["shape"], "shape", place)
    offsets = _sizes(fields["data_offsets"], "data_offsets", place)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"data_offsets {list(offsets)} are not [begin, end]", where=place, fix=AGAIN)
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        cause = f"{end - start} bytes do not hold {dtype} of shape {list(shape)}"
        raise CheckpointError(cause, where=place, fix=AGAIN)
    return HeaderEntry(name, dtype, shape, start, end)


def _dtype(value: Any, place: str) -> str:
    if isinstance(value, str) and value in ITEM_BYTES:
        return value
    fix = "If the model is quantised, use the unquantised one"
    raise CheckpointError(f"dtype {reprlib.repr(value)} is not one of {', '.join(ITEM_BYTES)}", where=place, fix=fix)


def _sizes(value: Any, key: str, place: str) -> tuple[int, ...]:
    # `type is int` because JSON's true is an int to Python.
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        cause = f"{key} {reprlib.repr(value)} is not a list of non-negative integers"
        raise CheckpointError(cause, where=place, fix=AGAIN)
    return tuple(value)


def _check_coverage(entries: Iterable[HeaderEntry], data_bytes: int | None, where: str) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    reached, last = 0, None
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        place = f"{where}: tensor {entry.name!r}"
        if entry.start < reached and last is not None:
            raise CheckpointError(f"its data overlap those of {last.name!r}", where=place, fix=AGAIN)
        if entry.start > reached:
            cause = f"bytes {reached} to {entry.start} before its data belong to no tensor"
            raise CheckpointError(cause, where=place, fix=AGAIN)
        if data_bytes is not None and entry.end > data_bytes:
            cause = f"the file is truncated: its data end at byte {entry.end} of {data_bytes}"
            raise CheckpointError(cause, where=place, fix=AGAIN)
        reached, last = entry.end, entry
    if data_bytes is not None and reached < data_bytes:
        raise CheckpointError(f"{data_bytes - reached} bytes after the last tensor", where=where, fix=AGAIN)
