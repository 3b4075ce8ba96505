"""The output folder while it is being made, and how it becomes OUT in one step.

`OUT.partial/` holds `out/` (what will be OUT), `stages/` (intermediate merges), the journal and a
lock. When `out/` is complete and on disk, one rename makes it OUT, so OUT is absent, as it was, or
whole. A folder that is to be replaced changes places with `out/` in one step where the system can
do that; where it cannot, it waits in `old/` between two renames, and the next run puts it back if
the second one never happened.

The journal is the last thing to go: as long as it is there, a run can tell how far an earlier one got.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from weldment.errors import MergeError, NonFiniteError, OutputError, UserError

MANIFEST = "weldment.json"

_OWN = frozenset({"out", "old", "stages", "journal", "lock"})
_MODEL_FILES = (MANIFEST, "config.json", "*.safetensors", "*.bin", "*.pt", "*.pth")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

_LOCK_SECONDS = 3.0
"""Workers of a merge that was killed share its lock until the system has ended them, too."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """The place beside OUT where the output is made; a context manager that holds its lock.

    What was done stays for the next run, unless nothing was, or the user's input is at fault and
    the next run will be another merge.

    Args:
        out: the output folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.realpath(out))
        self.root = partial_folder(out)
        self.folder = self.root / "out"
        self.stages = self.root / "stages"
        self._old = self.root / "old"
        self._lock = -1

    def __enter__(self) -> Staging:
        try:
            self._claim()
            self._settle()
        except OSError as error:
            self._release()
            raise unwritable(self.out, error) from error
        except OutputError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_final = isinstance(error, (UserError, NonFiniteError)) and not isinstance(error, OutputError)
        if is_final or (error is not None and not self.journal.exists()):
            self.discard()
        self._release()
        if isinstance(error, OSError):
            raise full_disk(error, Path(error.filename or self.out)) from error

    @property
    def journal(self) -> Path:
        """The record of what is finished."""
        return self.root / "journal"

    def check(self, *, overwrite: bool) -> None:
        """OutputError if OUT cannot be replaced; what an earlier run left does not matter any more."""
        _check_target(self.out, self.out, overwrite)

    def clear(self) -> None:
        """Remove what an earlier run left, all but the lock."""
        self.journal.unlink(missing_ok=True)
        for path in (self.folder, self.stages):
            shutil.rmtree(path, ignore_errors=True)

    def tidy(self, keep: Collection[str]) -> None:
        """Remove every file of `out/` that is not in `keep`: an earlier run may have got further."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.folder).as_posix() not in keep:
                path.unlink()

    def discard(self) -> None:
        """Remove everything: nothing will be resumed."""
        for path in (self.folder, self._old, self.stages):
            shutil.rmtree(path, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        (self.root / "lock").unlink(missing_ok=True)
        # Without the lock's file the next run may already be here, and the folder is its own.
        with suppress(OSError):
            self.root.rmdir()

    def seal(self) -> str:
        """Make `out/` durable; returns the mark by which OUT is known once it is published."""
        sync_tree(self.folder)
        return seal_mark(self.folder)

    def publish(self) -> None:
        """Put a sealed `out/` in the place of OUT and remove the rest."""
        try:
            self._replace()
            sync(self.out.parent)
        except OSError as error:
            raise unwritable(self.out, error) from error
        self.discard()

    def _replace(self) -> None:
        if not self.out.exists() or not any(self.out.iterdir()):
            self.folder.rename(self.out)
        elif not exchange(self.folder, self.out):
            self.out.rename(self._old)
            self.folder.rename(self.out)

    def _claim(self) -> None:
        """Make the folder and take its lock."""
        while True:
            self._refuse_strangers()
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # another run has just published and removed the folder
            self._take_lock()
            if self._is_current():
                return
            self._release()

    def _take_lock(self) -> None:
        patience = time.monotonic() + _LOCK_SECONDS
        while not _locked(self._lock):
            if time.monotonic() > patience:
                raise OutputError(
                    "another merge is writing this output",
                    where=str(self.out),
                    fix="Wait until it is done, or choose another folder",
                )
            time.sleep(0.02)

    def _is_current(self) -> bool:
        """Whether the locked file is still the one at its path."""
        try:
            return os.path.samestat(os.fstat(self._lock), (self.root / "lock").stat())
        except FileNotFoundError:
            return False

    def _refuse_strangers(self) -> None:
        """Everything in the folder will be removed at the end, so it must be our own."""
        if not os.path.lexists(self.root):
            return
        is_ours = self.root.is_dir() and not self.root.is_symlink()
        strangers = sorted(path.name for path in self.root.iterdir() if path.name not in _OWN) if is_ours else []
        if strangers or not is_ours:
            what = f"holds {strangers[0]!r}, which" if strangers else "is there and"
            raise OutputError(
                f"the merge needs this path for its work, but it {what} is not of a merge",
                where=str(self.root),
                fix="Move it away, or choose another output folder",
            )

    def _settle(self) -> None:
        """Finish a replacement that was cut off between two renames."""
        if self._old.exists():
            if self.out.exists():
                shutil.rmtree(self._old, ignore_errors=True)
            else:
                self._old.rename(self.out)

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _locked(descriptor: int) -> bool:
    """Whether the lock could be taken, or the file system has none: a merge without one is better than none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    return True


def check_output(out: Path, *, overwrite: bool) -> None:
    """Check that OUT can be made.

    Raises:
        OutputError: a file, a mount point, not empty (without `overwrite`), not a model's folder
            (with it), or not writable.
    """
    target = Path(os.path.realpath(out))
    try:
        # What an earlier run left may be OUT itself; `Staging` finds out.
        _check_target(target, out, overwrite or is_unfinished(out))
        parent = next(path for path in target.parents if os.path.lexists(path))
    except OSError as error:
        raise unwritable(out, error) from error
    if not parent.is_dir():
        raise OutputError("a part of the output's path is a file", where=str(parent), fix="Choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError("no permission to write here", where=str(parent), fix="Choose another folder")


def _check_target(target: Path, out: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError("the output is a file, not a folder", where=str(out), fix="Choose another path")
    if os.path.ismount(target):
        cause = "the output is a mount point, which cannot be replaced in one step"
        raise OutputError(cause, where=str(out), fix=f"Choose a folder in it, such as {out / 'merged'}")
    if not any(target.iterdir()):
        return
    if not overwrite:
        fix = "Choose another folder, or overwrite this one (--overwrite)"
        raise OutputError("the output folder is not empty", where=str(out), fix=fix)
    if not any(next(target.glob(pattern), None) for pattern in _MODEL_FILES):
        cause = "the output folder holds other things than a model, and overwriting would delete them"
        raise OutputError(cause, where=str(out), fix="Choose another folder, or delete this one yourself")


def is_unfinished(out: Path) -> bool:
    """Whether an earlier run left its journal; then only `Staging` can tell what OUT is."""
    return partial_folder(out).joinpath("journal").exists()


def partial_folder(out: Path) -> Path:
    """`OUT.partial`, beside what OUT really is: a link stays, and what it points to is replaced."""
    real = Path(os.path.realpath(out))
    return real.with_name(real.name + ".partial")


def is_published(out: Path, mark: str) -> bool:
    """Whether OUT is the folder that was sealed with this mark."""
    try:
        return seal_mark(out) == mark
    except OSError:
        return False


def seal_mark(folder: Path) -> str:
    """Tells a complete output from all others, by any name: its manifest's digest, and its inode.

    The manifest has checksums of all that lies beside it, but an output that is made again has
    the same manifest as the one it replaces.
    """
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return f"{digest} {folder.stat().st_ino}"


def exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system has no way to do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0


def unwritable(out: Path, error: OSError) -> OutputError:
    """The error for a folder that the system will not let us write."""
    if error.errno in _NO_SPACE:
        return OutputError("the disk is full", where=str(out), fix="Free some space, or choose another disk")
    return OutputError(
        f"the output cannot be written: {error.strerror or error}",
        where=str(error.filename or out),
        fix="Choose another folder",
    )


def full_disk(error: OSError, where: Path) -> MergeError:
    """The error for a write that failed."""
    if error.errno in _NO_SPACE:
        fix = "Free some space and run the same command again; it will go on from here"
        return MergeError("the disk is full", where=str(where), fix=fix)
    fix = "Check the disk and run the same command again; it will go on from here"
    return MergeError(f"reading or writing failed: {error.strerror or error}", where=str(where), fix=fix)


def free_bytes(path: Path) -> int:
    """Free space on the disk that will hold `path`."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def sync(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below a folder, and the folders, durable."""
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
