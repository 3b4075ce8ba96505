"""Examples in files: JSON lines, CSV and Parquet, compressed or not."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from weldment.errors import TaskError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


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
            return list(_csv(file, path) if ".csv" in path.suffixes else _lines(file, path))
    except (OSError, EOFError) as error:
        raise TaskError(f"cannot be read: {error}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise TaskError(f"is not UTF-8: {error.reason}", where=str(path), fix="Convert it to UTF-8") from error


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    else:
        with path.open(encoding="utf-8", newline="") as file:
            yield file


def _lines(file: TextIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise TaskError(f"is not JSON: {error}", where=place, fix="Write one JSON object a line") from error
        if not isinstance(values, dict):
            raise TaskError("is not a JSON object", where=place, fix='Write {"text": ..., "label": ...}')
        yield Record(values, place)


def _csv(file: TextIO, path: Path) -> Iterator[Record]:
    """Rows by the names in the first one; all cells are text."""
    reader = csv.DictReader(file)
    for row in reader:
        place = f"{path}: line {reader.line_num}"
        if None in row or None in row.values():
            raise TaskError(f"has not as many cells as the first line ({len(reader.fieldnames or ())})", where=place)
        yield Record(row, place)


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
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        fix = "Install it: pip install 'weldment[data]'"
        raise TaskError("reading Parquet files takes pyarrow, which is missing", where=str(path), fix=fix) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise TaskError(f"is not a Parquet file: {error}", where=str(path)) from error
    return [Record(row, f"{path}: row {place}") for place, row in enumerate(rows, 1)]
