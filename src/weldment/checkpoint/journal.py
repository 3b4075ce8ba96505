"""The record of finished tensors that lets a killed merge go on where it was.

One line of JSON for each finished tensor, after a first line that says which merge it belongs to.
A line is written in one call after the tensor's bytes were written, so a line that is there in
full is true; a line cut short by a kill is ignored. A last line tells that the output is complete
and how it will be known once it is in its place.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left.

    Attributes:
        differs: None if its merge was the same one; otherwise the part of the identity that is
            another one, or "" if there is no journal.
        finished: checksums of the tensors that it finished, empty if its merge was another.
        sealed: the mark of its complete output, None if it did not get that far.
    """

    differs: str | None
    finished: Mapping[str, str] = field(default_factory=dict)
    sealed: str | None = None


class Journal:
    """An append-only file.

    Args:
        path: the journal's file.
        identity: what must be equal for earlier records to count, by the name of each part.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._lock = threading.Lock()
        self._descriptor = -1

    def earlier(self) -> Earlier:
        """What the file says of an earlier run."""
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return Earlier("")
        identity = _parse(lines[0]) if lines else {}
        differs = next((part for part in self._identity if identity.get(part) != self._identity[part]), None)
        if differs is not None:
            return Earlier(differs)
        records = [_parse(line) for line in lines[1:]]
        finished = {r["tensor"]: r["checksum"] for r in records if r.keys() == {"tensor", "checksum"}}
        return Earlier(None, finished, next((r["sealed"] for r in reversed(records) if "sealed" in r), None))

    def open(self, *, fresh: bool) -> None:
        """Begin to append; `fresh` discards earlier records."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if fresh else 0)
        self._descriptor = os.open(self._path, flags, 0o644)
        # The line feed ends a line that was cut short.
        self._append(json.dumps(self._identity) if fresh else "")

    def record(self, tensor: str, checksum: str) -> None:
        """Note that a tensor is written."""
        self._append(json.dumps({"tensor": tensor, "checksum": checksum}))

    def seal(self, mark: str) -> None:
        """Note, durably, that the output is complete."""
        self._append(json.dumps({"sealed": mark}))
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Stop appending."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, text: str) -> None:
        data = memoryview(text.encode() + b"\n")
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
