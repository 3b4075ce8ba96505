"""The output folder while it is being made, and how it becomes OUT in one step.

`OUT.partial/` holds `out/` (what will be OUT), `stages/` (intermediate merges), the journal and a
lock. `out/` is renamed to OUT when it is complete, so OUT is either absent, as it was, or whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

from weldment.checkpoint.layout import Layout
from weldment.errors import MergeError, OutputError

MANIFEST = "weldment.json"


class Staging:
    """The place beside OUT where the output is made; a context manager that holds its lock."""

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        self.root = self.out.with_name(self.out.name + ".partial")
        self.folder = self.root / "out"
        self.stages = self.root / "stages"
        self._lock = -1

    def __enter__(self) -> Staging:
        check_output(self.out, overwrite=self.overwrite)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self.out, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise OutputError(
                "another merge is writing this output", where=str(self.out), fix="Wait for it, or choose another folder"
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._lock)

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    def clear(self) -> None:
        """Remove what an earlier run left, all but the lock."""
        for path in (self.folder, self.stages):
            shutil.rmtree(path, ignore_errors=True)
        self.journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything: the merge will not be resumed."""
        shutil.rmtree(self.root, ignore_errors=True)

    def publish(self) -> None:
        """Make `out/` durable and rename it to OUT."""
        sync_tree(self.folder)
        try:
            if self.out.exists() and any(self.out.iterdir()):
                old = self.root / "old"
                os.rename(self.out, old)
                os.rename(self.folder, self.out)
            else:
                os.rename(self.folder, self.out)
        except OSError as error:
            raise unwritable(self.out, error) from error
        sync_folder(self.out.parent)
        shutil.rmtree(self.root, ignore_errors=True)


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise if OUT cannot be made: a file, not empty without `overwrite`, or not writable."""
    if out.exists() and not out.is_dir():
        raise OutputError("the output is a file, not a folder", where=str(out), fix="Choose another path")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(
            "the output folder is not empty",
            where=str(out),
            fix="Choose another folder, or pass --overwrite to replace it",
        )
    parent = next(path for path in (out, *out.parents) if path.exists())
    if not parent.is_dir():
        raise OutputError("a part of the output's path is a file", where=str(parent), fix="Choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError("no permission to write here", where=str(parent), fix="Choose another folder")


def unwritable(out: Path, error: OSError) -> OutputError:
    """The error for a folder that the system will not let us write."""
    return OutputError(
        f"the output cannot be written: {error.strerror or error}",
        where=str(error.filename or out),
        fix="Choose another folder",
    )


def full_disk(error: OSError, where: Path) -> MergeError | OutputError:
    """The error for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MergeError(
            "the disk is full",
            where=str(where),
            fix="Free some space and run the same command again; it will go on from here",
        )
    return MergeError(f"writing failed: {error.strerror or error}", where=str(where))


def free_bytes(path: Path) -> int:
    """Free space on the disk that will hold `path`."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


class OutputFiles:
    """Weight files created at their full size with their headers, open for writing at any place."""

    def __init__(self, folder: Path, layout: Layout, *, fresh: bool) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        try:
            for file in layout.files:
                path = folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                self._descriptors[file.name] = descriptor
                if fresh or os.fstat(descriptor).st_size != file.size:
                    os.ftruncate(descriptor, file.size)
                os.pwrite(descriptor, file.header, 0)
        except OSError as error:
            self.close()
            raise full_disk(error, folder) from error

    def descriptor(self, name: str) -> int:
        """The open file."""
        return self._descriptors[name]

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""
        try:
            while data:
                written = os.pwrite(self._descriptors[name], data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise full_disk(error, self._folder / name) from error

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below a folder, and the folders, durable."""
    for root, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))
