"""The record of finished tensors that lets a killed merge go on where it was.

One line of JSON for each finished tensor, after a first line that says which merge it belongs to.
A line is written in one call after the tensor's bytes were written, so a line that is there in
full is true; a line cut short by a kill is ignored.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file.

    Args:
        path: the journal's file.
        identity: what must be equal for earlier records to count: plan hash and the inputs' stamps.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity = identity
        self._lock = threading.Lock()
        self._descriptor = -1

    def finished(self) -> dict[str, str] | None:
        """Checksums of finished tensors; None if there is no journal of this merge."""
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        records = [record for line in lines if (record := _parse(line)) is not None]
        if not records or records[0] != json.loads(json.dumps(self._identity)):
            return None
        return {record["tensor"]: record["checksum"] for record in records[1:] if "tensor" in record}

    def open(self, *, fresh: bool) -> None:
        """Begin to append; `fresh` discards earlier records."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if fresh else 0)
        self._descriptor = os.open(self._path, flags, 0o644)
        self._append(self._identity) if fresh else os.write(self._descriptor, b"\n")

    def record(self, tensor: str, checksum: str) -> None:
        """Note that a tensor is written."""
        self._append({"tensor": tensor, "checksum": checksum})

    def close(self) -> None:
        """Stop appending."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            os.write(self._descriptor, line)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
