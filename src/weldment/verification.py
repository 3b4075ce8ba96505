"""Whether an output folder still is what was written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from weldment.checkpoint.headers import read_header
from weldment.checkpoint.layout import INDEX, Slot
from weldment.engine.execute import stored_checksum
from weldment.engine.run import default_threads
from weldment.errors import CheckpointError, UserError, VerificationError
from weldment.report.manifest import file_digest, read_manifest
from weldment.twin.bundle import TWIN, compare_files

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_LISTED = 50


@dataclass(frozen=True)
class Verification:
    """What was checked: numbers of tensors, files and bytes of weights, and all that is not as it was written."""

    tensors: int
    files: int
    nbytes: int
    problems: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """How many differences there are."""
        count = "1 difference" if len(self.problems) == 1 else f"{len(self.problems)} differences"
        return f"{count} from what was written"


def verify(out: str | Path, *, threads: int | None = None) -> Verification:
    """Check every tensor and file of an output against its manifest, and of a Twin bundle the files of its experts.

    Raises:
        UserError: `out` is not an output of a merge.
        VerificationError: names everything that is missing, changed or too much.
    """
    found = compare(out, threads=threads)
    require_unchanged(out, found)
    return found


def require_unchanged(out: str | Path, found: Verification) -> None:
    """VerificationError if anything was found to differ."""
    if not found.problems:
        return
    shown = [f"  - {problem}" for problem in found.problems[:_LISTED]]
    if len(found.problems) > _LISTED:
        shown.append(f"  - and {len(found.problems) - _LISTED} more")
    listing = "\n".join(shown)
    raise VerificationError(
        f"{found.summary}:\n{listing}",
        where=str(out),
        fix="Merge again and overwrite (--overwrite) if the changes are not yours",
    )


def compare(out: str | Path, *, threads: int | None = None) -> Verification:
    """What of an output differs from its manifest; of a Twin bundle, also what differs from `twin.json`.

    Raises:
        UserError: `out` is not an output of a merge, or its `twin.json` is damaged.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads (--threads) is {threads}", fix="It must be at least 1")
    folder = Path(out)
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(out), fix="Give a folder that `weld merge` wrote")
    record = read_manifest(folder)
    disk = _read_disk(folder, record["files"])
    expected: Mapping[str, str] = record["tensors"]
    labels = [label for label in disk.slots if label in expected]
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        found = pool.map(lambda label: _checksum(folder, disk.slots[label]), labels)
        changed = [label for label, checksum in zip(labels, found, strict=True) if checksum != expected[label]]
    problems = [
        *disk.problems,
        *_missing([label for label in expected if label not in disk.slots], bool(disk.lost)),
        *(f"tensor {disk.slots[label].name} is not in the manifest" for label in disk.slots if label not in expected),
        *(f"tensor {disk.slots[label].name} in {disk.slots[label].file} was changed" for label in changed),
    ]
    nbytes = sum(slot.nbytes for slot in disk.slots.values())
    others, altered = compare_files(folder, record["files"]) if (folder / TWIN).is_file() else (0, [])
    return Verification(len(expected), len(record["files"]) + others, nbytes, (*problems, *altered))


@dataclass
class _Disk:
    """What lies in a folder: tensors by label, and what is wrong with its files.

    `lost` are the weight files that are missing or have no header that can be read.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def _missing(labels: list[str], explained: bool) -> Iterable[str]:
    """One problem for each missing tensor, or one for all if whole files are missing."""
    names = [label.partition("|")[2] for label in labels]
    if explained and len(names) > 1:
        return [f"{len(names)} tensors are missing with that, such as {names[0]}"]
    return [f"tensor {name} is missing" for name in names]


def _read_disk(folder: Path, files: Mapping[str, str]) -> _Disk:
    disk = _Disk()
    for name, digest in files.items():
        _read_file(folder, name, digest, disk)
    for path in sorted(folder.iterdir()):
        # Programs that load the folder would find these; other new files do no harm.
        if path.name not in files and (path.name.endswith(_WEIGHTS) or path.name == INDEX):
            disk.problems.append(f"file {path.name} is not in the manifest")
    return disk


def _read_file(folder: Path, name: str, digest: str, disk: _Disk) -> None:
    path = folder / name
    is_weights = _is_weights(name)
    try:
        if is_weights:
            disk.slots.update(_weight_slots(path, name, digest, disk.problems))
        elif file_digest(path) != digest:
            disk.problems.append(f"file {name} was changed")
    except FileNotFoundError:
        disk.problems.append(f"file {name} is missing")
        disk.lost += [name] if is_weights else []
    except CheckpointError as error:
        disk.problems.append(f"file {name}: {error.cause}")
        disk.lost.append(name)
    except OSError as error:
        disk.problems.append(f"file {name} cannot be read: {error.strerror}")
        disk.lost += [name] if is_weights else []


def _is_weights(name: str) -> bool:
    """Whether a file holds merged tensors: those of modules in sub-folders were copied as they are."""
    path = PurePosixPath(name)
    return path.suffix == ".safetensors" and path.parent.name in ("", "heads")


def _weight_slots(path: Path, name: str, digest: str, problems: list[str]) -> dict[str, Slot]:
    path.stat()  # a missing file is told apart from a damaged one
    header = read_header(path)
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
