"""A merged adapter's folder together with the heads that are kept per expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from weldment.adapters.adapter import PREFIX
from weldment.adapters.loading import load
from weldment.adapters.writing import AdapterFolder, write_adapter
from weldment.checkpoint.dtypes import safetensors_dtype, torch_dtype
from weldment.checkpoint.headers import read_header
from weldment.checkpoint.model import TensorEntry
from weldment.checkpoint.staging import Staging
from weldment.engine.checksum import Checksum
from weldment.planning.build import head_file
from weldment.report.manifest import file_digest, read_manifest, write_manifest

Heads = Mapping[str, Sequence[TensorEntry]]
"""Tensors by the names of the heads' files."""


def write_with_heads(out: Path, content: AdapterFolder, heads: Heads, *, overwrite: bool) -> dict[str, str]:
    """Write an adapter folder with its heads; it appears at `out` in one step, when it is complete.

    Returns:
        the checksum of every tensor, by `file|name`.

    Raises:
        OutputError: `out` is not empty, or cannot be written.
    """
    if not heads:
        return write_adapter(out, content, overwrite=overwrite)
    with Staging(out) as staging:
        staging.check(overwrite=overwrite)
        staging.clear()
        made = staging.stages / "adapter"
        write_adapter(made, content)
        made.rename(staging.folder)
        record = read_manifest(staging.folder)
        for name, entries in heads.items():
            _add_head(staging.folder, head_file(name), entries, record)
        write_manifest(staging.folder, record)
        staging.seal()
        staging.publish()
    return record["tensors"]


def _add_head(folder: Path, name: str, entries: Sequence[TensorEntry], record: dict[str, Any]) -> None:
    """Write the tensors of one expert, under their names in the model, and put them on record."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    tensors = {entry.name.removeprefix(PREFIX): load(entry, torch_dtype(entry.dtype)) for entry in entries}
    save_file(tensors, path, {"format": "pt"})
    record["files"][name] = file_digest(path, read_header(path).data_start)
    for label, tensor in tensors.items():
        checksum = Checksum(tensor.numel(), safetensors_dtype(tensor.dtype))
        checksum.add(0, tensor.reshape(-1))
        record["tensors"][f"{name}|{label}"] = checksum.digest()
