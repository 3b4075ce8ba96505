"""Whether an output folder still is what was written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weldment.checkpoint.headers import read_header
from weldment.checkpoint.layout import Slot
from weldment.engine.execute import stored_checksum
from weldment.engine.run import default_threads
from weldment.errors import CheckpointError, UserError, VerificationError
from weldment.report.manifest import file_digest, read_manifest


@dataclass(frozen=True)
class Verification:
    """What was checked: numbers of tensors, other files and bytes."""

    tensors: int
    files: int
    nbytes: int


def verify(out: str | Path, *, threads: int | None = None) -> Verification:
    """Check every tensor and file of an output against its manifest.

    Raises:
        UserError: `out` is not an output of a merge.
        VerificationError: names everything that is missing, changed or too much.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder))
    record = read_manifest(folder)
    problems: list[str] = []
    slots = _slots(folder, record["files"], problems)
    expected: Mapping[str, str] = record["tensors"]
    problems += [f"tensor {label.partition('|')[2]} is missing" for label in expected if label not in slots]
    problems += [f"tensor {label.partition('|')[2]} is not in the manifest" for label in slots if label not in expected]
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        labels = [label for label in slots if label in expected]
        found = pool.map(lambda label: _checksum(folder, slots[label]), labels)
        problems += [
            f"tensor {slots[label].name} in {slots[label].file} was changed"
            for label, checksum in zip(labels, found, strict=True)
            if checksum != expected[label]
        ]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise VerificationError(f"{len(problems)} differences from the manifest:\n{listing}", where=str(folder))
    return Verification(len(expected), len(record["files"]), sum(slot.nbytes for slot in slots.values()))


def _slots(folder: Path, files: Mapping[str, str], problems: list[str]) -> dict[str, Slot]:
    """The tensors on disk by label; checks the other files on the way."""
    slots: dict[str, Slot] = {}
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"file {name} is missing")
        elif name.endswith(".safetensors") and _is_weights(name):
            slots.update(_weight_slots(path, name, digest, problems))
        elif file_digest(path) != digest:
            problems.append(f"file {name} was changed")
    return slots


def _is_weights(name: str) -> bool:
    return "/" not in name or name.startswith("heads/")


def _weight_slots(path: Path, name: str, digest: str, problems: list[str]) -> dict[str, Slot]:
    try:
        header = read_header(path)
    except CheckpointError as error:
        problems.append(f"file {name}: {error.cause}")
        return {}
    if file_digest(path, header.data_start) != digest:
        problems.append(f"the header of {name} was changed")
    prefix = name if "/" in name else ""
    return {
        f"{prefix}|{entry.name}": Slot(entry.name, entry.dtype, entry.shape, name, header.data_start + entry.start)
        for entry in header.tensors.values()
    }


def _checksum(folder: Path, slot: Slot) -> str:
    descriptor = os.open(folder / slot.file, os.O_RDONLY)
    try:
        return stored_checksum(descriptor, slot)
    finally:
        os.close(descriptor)
