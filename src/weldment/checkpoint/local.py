"""Models on this machine: a folder, or a single file of weights."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weldment.checkpoint.contents import (
    PICKLES,
    SAFETENSORS,
    check_tensors,
    is_skipped_folder,
    module_folders,
    parse_json,
    read_contents,
    side_files,
)
from weldment.checkpoint.headers import read_header
from weldment.checkpoint.model import Checkpoint, TensorEntry, WeightFile
from weldment.checkpoint.pickles import read_pickle
from weldment.checkpoint.refusals import ADAPTER_CONFIG, refuse_adapter, refuse_gguf
from weldment.errors import CheckpointError

MODULES = "modules.json"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Folder:
    """The files in a folder's root, as a `Source`."""

    root: Path
    names: frozenset[str]

    def place(self, name: str = "") -> str:
        """The path of a file."""
        return str(self.root / name)

    def nested_weights(self) -> Collection[str]:
        """Weight files one folder down, which the user may have meant."""
        return [file.relative_to(self.root).as_posix() for file in self.root.glob("*/*") if is_weights(file.name)]

    def json(self, name: str) -> Any:
        """The content of a JSON file."""
        return parse_json(read_bytes(self.root / name), self.place(name))

    def tensors(self, names: Sequence[str]) -> list[tuple[WeightFile, list[TensorEntry]]]:
        """What the headers of these files say."""
        files = [weight_file(self.root / name, name) for name in names]
        return [(file, tensor_entries(file, self.root / file.name)) for file in files]


def folder_source(root: Path) -> Folder:
    """A folder as a `Source`; CheckpointError if it cannot be listed."""
    try:
        with os.scandir(root) as entries:
            return Folder(root, frozenset(entry.name for entry in entries if entry.is_file()))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(root)) from error


def is_weights(name: str) -> bool:
    """Whether a file of this name can be opened as weights."""
    return name.endswith((*SAFETENSORS, *PICKLES))


def open_folder(root: Path, reference: str, *, repo: str | None = None, revision: str | None = None) -> Checkpoint:
    """A model in a folder.

    Args:
        root: the folder.
        reference: how the user named it.
        repo: the Hub repo, if the folder is a snapshot of one.
        revision: the commit of that snapshot.

    Raises:
        CheckpointError: there is no model that can be merged; see `read_contents`.
    """
    source = folder_source(root)
    contents = read_contents(source)
    modules = module_folders(source.json(MODULES)) if MODULES in source.names else ()
    return Checkpoint(
        reference=reference,
        tensors=contents.tensors,
        weight_files=contents.weight_files,
        root=root,
        config=contents.config,
        side_files=side_files(_all_names(root), modules),
        repo=repo,
        revision=revision,
    )


def open_file(path: Path, reference: str) -> Checkpoint:
    """A single file of weights: a plain state dict, without configuration or side files.

    Raises:
        CheckpointError: the file is no checkpoint that can be merged.
    """
    if path.suffix == ".gguf":
        refuse_gguf(str(path))
    if not is_weights(path.name):
        fix = f"Name a folder or a file that ends in {', '.join((*SAFETENSORS, *PICKLES))}"
        raise CheckpointError("is not a file of weights", where=str(path), fix=fix)
    if path.stem == "adapter_model" and (config := path.with_name(ADAPTER_CONFIG)).is_file():
        refuse_adapter(parse_json(read_bytes(config), str(config)), str(path.parent))
    file = weight_file(path, path.name)
    tensors = {entry.name: entry for entry in tensor_entries(file, path)}
    check_tensors(tensors, str(path))
    return Checkpoint(reference, tensors, (file,), root=path.parent)


def tensor_entries(file: WeightFile, path: Path) -> list[TensorEntry]:
    """The tensors of a weight file that lies at `path`; CheckpointError if it is damaged."""
    if path.suffix in SAFETENSORS:
        header = read_header(path)
        start = header.data_start
        return [TensorEntry(e.name, e.dtype, e.shape, file, start + e.start) for e in header.tensors.values()]
    return [TensorEntry(e.name, e.dtype, e.shape, file, e.offset) for e in read_pickle(path).values()]


def weight_file(path: Path, name: str) -> WeightFile:
    """A file of weights on this machine; CheckpointError if it cannot be seen."""
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return WeightFile(name, stat.st_size, path, _blob_sha256(path), (stat.st_size, stat.st_mtime_ns))


def _blob_sha256(path: Path) -> str | None:
    """The digest by which the Hub's cache names a large file: snapshots link to `blobs/<sha256>`."""
    if not path.is_symlink():
        return None
    target = path.readlink()
    return target.name if target.parent.name == "blobs" and SHA256.fullmatch(target.name) else None


def read_bytes(path: Path) -> bytes:
    """The content of a small file; CheckpointError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _all_names(root: Path) -> list[str]:
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if not is_skipped_folder((inside / name).as_posix())]
        names.extend((inside / name).as_posix() for name in files if (root / inside / name).is_file())
    return names
