"""A comparison as files beside each other: for people, for spreadsheets, for programs and for a browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from weldment.errors import OutputError
from weldment.evaluation.comparison import page, tables
from weldment.evaluation.comparison.rows import Comparison
from weldment.version import __version__

STEM = "comparison"

_MARKS = {
    ".md": tables.MADE_BY,
    ".csv": ",".join(tables.CSV_HEADER),
    ".json": '"made_by": "weld compare"',
    ".html": page.MADE_BY,
}
"""By the ending of a file, what stands near its beginning if we wrote it."""

_NEAR = 1000


def as_json(comparison: Comparison) -> str:
    """The comparison as a document."""
    head = {"made_by": "weld compare", "weldment": __version__}
    return json.dumps(head | comparison.record(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


_WRITERS: dict[str, Callable[[Comparison], str]] = {
    ".md": tables.as_markdown,
    ".csv": tables.as_csv,
    ".json": as_json,
}


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Check that a comparison may be saved in a folder.

    Raises:
        OutputError: it is a file, or files in it are in the way that are no comparison.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError("is no folder", where=str(folder), fix="Choose another --out")
    for ending, mark in _MARKS.items():
        path = folder / f"{STEM}{ending}"
        if path.exists() and not overwrite and not _is_ours(path, mark):
            fix = "Choose another --out, or replace it with --overwrite"
            raise OutputError("is in the way, and no file of an earlier comparison", where=str(path), fix=fix)


def _is_ours(path: Path, mark: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return mark.encode() in file.read(_NEAR)


def save(comparison: Comparison, folder: Path, sections: Iterable[str] = ()) -> list[Path]:
    """Write `comparison.md`, `.csv`, `.json` and `.html` into a folder, which is made if need be.

    Args:
        sections: of the page, HTML; see `page.as_page`.

    Raises:
        OutputError: it cannot be written.
    """
    paths: list[Path] = []
    texts = {ending: written(comparison) for ending, written in _WRITERS.items()}
    texts[".html"] = page.as_page(comparison, sections)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            path = folder / f"{STEM}{ending}"
            draft = path.with_name(f"{path.name}.partial")
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
            paths.append(path)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=str(error.filename or folder)) from error
    return paths
