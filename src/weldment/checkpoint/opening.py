"""From the name of a model to what is known of it before its weights are read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weldment.checkpoint.local import is_weights, open_file, open_folder
from weldment.checkpoint.model import Checkpoint
from weldment.errors import CheckpointError, HubError

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[^@\s]+))?", re.ASCII)


def open_checkpoint(reference: str, *, where: str | None = None) -> Checkpoint:
    """A model's tensors, configuration and files, from headers alone.

    Args:
        reference: a folder, a `.safetensors`, `.pt`, `.pth` or `.bin` file, `org/name` or
            `org/name@revision` on the Hugging Face Hub. What exists on this machine wins.
        where: the place in the recipe that names the model, for messages.

    Returns:
        The checkpoint; `is_local` is false if its weights are still to be downloaded.

    Raises:
        CheckpointError: there is no such model, or it is damaged or of a kind that cannot be merged.
        HubError: the Hub does not give access to it.
    """
    try:
        return _open(reference)
    except CheckpointError as error:
        raise placed(error, where) from error


def placed(error: CheckpointError, where: str | None) -> CheckpointError:
    """The error with the place in the recipe that names the model before its own, if there is one."""
    if where is None:
        return error
    return type(error)(error.cause, where=f"{where}: {error.where}" if error.where else where, fix=error.fix)


def _open(reference: str) -> Checkpoint:
    path = Path(reference).expanduser()
    if reference and exists(path):
        return open_folder(path, reference) if path.is_dir() else open_file(path, reference)
    match = HUB_ID.fullmatch(reference)
    if match is None or is_weights(reference) or reference.endswith(".gguf"):
        raise _missing(reference, path)
    if _is_neighbour(path) and _nearest(path) is not None:
        raise _missing(reference, path)
    # Only models on the Hub need its library, which takes longer to import than to open a folder.
    from weldment.checkpoint.hub import open_repo

    with local_first(path):
        return open_repo(match["repo"], match["revision"])


@contextmanager
def local_first(path: Path) -> Iterator[None]:
    """Let errors of the Hub say that the name is that of a file in a folder here, too, which does not exist."""
    try:
        yield
    except HubError as error:
        if not _is_neighbour(path):
            raise
        cause = f"there is no {path.name!r} in the folder {path.parent}, and {error.cause}"
        raise HubError(cause, where=error.where, fix=error.fix) from error


def _is_neighbour(path: Path) -> bool:
    """Whether a name of two parts could be meant as a file or folder in a folder that exists here."""
    return len(path.parts) == 2 and path.parent.is_dir() and "@" not in path.name


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; false for what cannot be one."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _missing(reference: str, path: Path) -> CheckpointError:
    fix = "Name an existing folder or file, or a model on the Hub as org/name or org/name@revision"
    near = _nearest(path)
    if near is not None:
        is_name = HUB_ID.fullmatch(reference) is not None and not is_weights(reference)
        hub = f" For a model of this name on the Hub, write {reference}@main" if is_name else ""
        fix = f"Did you mean {near}?{hub}"
    return CheckpointError(f"there is no file or folder {reference!r}", fix=fix)


def _nearest(path: Path) -> Path | None:
    """A sibling with almost the same name."""
    try:
        siblings = [sibling.name for sibling in path.parent.iterdir()]
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return path.with_name(close[0]) if close else None
