"""Examples in files: JSON lines, CSV and Parquet, compressed or not."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from weldment.errors import TaskError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")

_ENCODING = "utf-8-sig"
"""Spreadsheets begin their UTF-8 with a mark, which is no part of the first column's name."""

_CELL = 1 << 30
"""Characters of a cell; the csv module's own limit is less than a long document."""


@dataclass(frozen=True)
class Record:
    """One example: its fields, and where it stands."""

    values: Mapping[str, Any]
    place: str


def read_records(path: Path) -> list[Record]:
    """All examples of a file.

    Raises:
        TaskError: the file cannot be read or is not what its name says.
    """
    try:
        if path.name.endswith(".parquet"):
            return _parquet(path)
        with _opened(path) as file:
            return list(_csv(file, path) if is_csv(path) else _lines(file, path))
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"cannot be read: {error}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise TaskError(f"is not UTF-8: {error.reason}", where=str(path), fix="Convert it to UTF-8") from error


def is_csv(path: Path) -> bool:
    """Whether a file's cells are all text."""
    return path.name.endswith((".csv", ".csv.gz"))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding=_ENCODING, newline="") as file:
            yield file
    else:
        with path.open(encoding=_ENCODING, newline="") as file:
            yield file


def _lines(file: TextIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"is not JSON: {error}", where=place, fix="Write one JSON object a line") from error
        if not isinstance(values, dict):
            raise TaskError("is not a JSON object", where=place, fix='Write {"text": ..., "label": ...}')
        yield Record(values, place)


def _csv(file: TextIO, path: Path) -> Iterator[Record]:
    """Rows by the names in the first one; all cells are text."""
    csv.field_size_limit(_CELL)
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            place = f"{path}: line {reader.line_num}"
            if None in row or None in row.values():
                cause = f"has not as many cells as the first line ({len(reader.fieldnames or ())})"
                raise TaskError(cause, where=place, fix="Put cells with commas or line breaks in double quotes")
            yield Record(row, place)
    except csv.Error as error:
        place = f"{path}: line {reader.reader.line_num}"
        raise TaskError(f"is not CSV: {error}", where=place, fix='Double the quotes inside of cells: ""') from error


def number(cell: str) -> Any:
    """A cell as a whole number, a number or text."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _parquet(path: Path) -> list[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        fix = "Install it: pip install 'weldment[data]'"
        raise TaskError("reading Parquet files takes pyarrow, which is missing", where=str(path), fix=fix) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise TaskError(f"is not a Parquet file that can be read: {error}", where=str(path)) from error
    return [Record(row, f"{path}: row {place}") for place, row in enumerate(rows, 1)]
