"""A PEFT folder: `adapter_config.json`, `adapter_model.safetensors`, heads, a model card and the manifest.

Tensors are written as they come, so that a large adapter never lies in memory: their bytes gather
in a file beside, and become a safetensors file when all shapes are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import torch

from weldment.adapters.config import ADAPTER_CONFIG
from weldment.checkpoint.dtypes import safetensors_dtype
from weldment.checkpoint.headers import PREFIX_BYTES
from weldment.checkpoint.side_files import write_json
from weldment.checkpoint.staging import MANIFEST, Staging
from weldment.engine.checksum import Checksum
from weldment.report.manifest import file_digest, write_manifest

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_COPIED = 1 << 24


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
    """Write an adapter whose tensors are in memory; it appears at `out` in one step, when it is complete.

    Returns:
        the checksum of every tensor, by `file|name` as in the manifest.

    Raises:
        OutputError: `out` is not empty, or cannot be written.
    """
    with AdapterWriter(out, overwrite=overwrite) as writer:
        for name, tensor in content.tensors.items():
            writer.add(name, tensor)
        return writer.publish(content.config, content.card, content.manifest)


@dataclass
class Gathering:
    """A safetensors file in the making: its tensors' bytes, and what its header will say."""

    data: IO[bytes]
    header: dict[str, Any] = field(default_factory=lambda: {"__metadata__": {"format": "pt"}})
    size: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.data.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        end = self.size + tensor.nbytes
        dtype = safetensors_dtype(tensor.dtype)
        self.header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [self.size, end]}
        self.size = end

    def finish(self, path: Path) -> None:
        """Write the file: the header, padded to 8 bytes, and the data."""
        text = json.dumps(self.header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.data.seek(0)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(PREFIX_BYTES, "little") + text)
            while piece := self.data.read(_COPIED):
                file.write(piece)
        self.data.close()


class AdapterWriter:
    """Writes an adapter folder tensor by tensor; a context manager that leaves nothing behind on an error.

    Args:
        out: the folder, which appears when `publish` is called.
        overwrite: replace it if it is not empty.

    Raises:
        OutputError: `out` is not empty, or cannot be written.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self._staging = Staging(out)
        self._overwrite = overwrite
        self._files: dict[str, Gathering] = {}
        self._checksums: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> AdapterWriter:
        staging = self._staging
        staging.__enter__()
        self._stack.push(staging)
        try:
            staging.check(overwrite=self._overwrite)
            staging.clear()
            staging.folder.mkdir(parents=True)
            staging.stages.mkdir(parents=True)
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for gathering in self._files.values():
            gathering.data.close()
        self._stack.__exit__(kind, error, trace)

    def add(self, name: str, tensor: Tensor, file: str = ADAPTER_WEIGHTS) -> None:
        """Write one tensor, on the CPU, into a file of the folder."""
        if file not in self._files:
            self._files[file] = Gathering((self._staging.stages / str(len(self._files))).open("w+b"))
        tensor = tensor.detach().contiguous()
        self._files[file].add(name, tensor)
        checksum = Checksum(tensor.numel(), safetensors_dtype(tensor.dtype))
        checksum.add(0, tensor.reshape(-1))
        self._checksums[f"{'' if file == ADAPTER_WEIGHTS else file}|{name}"] = checksum.digest()

    def publish(self, config: Mapping[str, Any], card: str, manifest: Mapping[str, Any]) -> dict[str, str]:
        """Complete the folder and put it in its place; the checksum of every tensor, by `file|name`."""
        folder = self._staging.folder
        for name, gathering in self._files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            gathering.finish(folder / name)
            (self._staging.stages / Path(gathering.data.name).name).unlink()
        write_json(folder / ADAPTER_CONFIG, dict(sorted(config.items())))
        (folder / "README.md").write_text(card, encoding="utf-8")
        checksums = dict(sorted(self._checksums.items()))
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
        files = {path.relative_to(folder).as_posix(): _digest(path) for path in paths}
        write_manifest(folder, {**manifest, "tensors": checksums, "files": files})
        self._staging.seal()
        self._staging.publish()
        return checksums


def _digest(path: Path) -> str:
    """SHA-256 of a file, of weights that of the header, as `weld verify` expects."""
    if path.suffix != ".safetensors":
        return file_digest(path)
    with path.open("rb") as file:
        return file_digest(path, PREFIX_BYTES + int.from_bytes(file.read(PREFIX_BYTES), "little"))
