"""A PEFT folder: `adapter_config.json`, `adapter_model.safetensors`, a model card and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from weldment.adapters.config import ADAPTER_CONFIG
from weldment.checkpoint.dtypes import safetensors_dtype
from weldment.checkpoint.side_files import write_json
from weldment.checkpoint.staging import MANIFEST, Staging
from weldment.engine.checksum import Checksum
from weldment.report.manifest import file_digest, write_manifest

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder will hold.

    Attributes:
        config: the content of `adapter_config.json`.
        tensors: by their names in the file, as PEFT writes them.
        card: the text of `README.md`.
        manifest: what `weldment.json` records besides checksums.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    card: str
    manifest: Mapping[str, Any]


def write_adapter(out: Path, content: AdapterFolder, *, overwrite: bool = False) -> dict[str, str]:
    """Write an adapter folder; it appears at `out` in one step, when it is complete.

    Returns:
        the checksum of every tensor, by `file|name` as in the manifest.

    Raises:
        OutputError: `out` is not empty, or cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in sorted(content.tensors.items())}
    with Staging(out) as staging:
        staging.check(overwrite=overwrite)
        staging.clear()
        folder = staging.folder
        folder.mkdir(parents=True)
        write_json(folder / ADAPTER_CONFIG, dict(sorted(content.config.items())))
        (folder / ADAPTER_WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        (folder / "README.md").write_text(content.card, encoding="utf-8")
        checksums = {f"|{name}": _checksum(tensor) for name, tensor in tensors.items()}
        files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
        write_manifest(folder, {**content.manifest, "tensors": checksums, "files": files})
        staging.seal()
        staging.publish()
    return checksums


def _digest(path: Path) -> str:
    """SHA-256 of a file, of weights that of the header, as `weld verify` expects."""
    if path.name != ADAPTER_WEIGHTS:
        return file_digest(path)
    with path.open("rb") as file:
        return file_digest(path, 8 + int.from_bytes(file.read(8), "little"))


def _checksum(tensor: Tensor) -> str:
    checksum = Checksum(tensor.numel(), safetensors_dtype(tensor.dtype))
    checksum.add(0, tensor.reshape(-1))
    return checksum.digest()
