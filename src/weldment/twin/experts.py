"""The files of one expert in a bundle, written as its tensors come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weldment.adapters.adapter import PREFIX
from weldment.adapters.config import ADAPTER_CONFIG
from weldment.adapters.extract.extraction import lora_config, task_type
from weldment.adapters.extract.pairing import tied_copies
from weldment.adapters.loading import load
from weldment.adapters.writing import ADAPTER_WEIGHTS, Gathering
from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.side_files import write_json
from weldment.planning.misfits import some
from weldment.twin.bundle import CHANGES
from weldment.twin.compression import Compressed, layer_names

if TYPE_CHECKING:
    from torch import Tensor


class ExpertWriter:
    """Gathers what is kept of an expert.

    Args:
        folder: `experts/NAME`.
        scratch: a folder for unfinished files.
        shared: the finished shared model.
        modules: every module of it and every part that holds some.
    """

    def __init__(self, folder: Path, scratch: Path, shared: Checkpoint, modules: frozenset[str]) -> None:
        self.folder = folder
        self._scratch, self._shared, self._modules = scratch, shared, modules
        self._files: dict[str, Gathering] = {}
        self._ranks: dict[str, int] = {}
        self._embeddings = False
        self._small: dict[str, Tensor] = {}
        self.energy = self.kept = self.before = 0.0

    @property
    def share(self) -> float | None:
        """Of the squared norm of all differences, what was kept."""
        return self.kept / self.energy if self.energy > 0.0 else None

    def add(self, found: Compressed) -> None:
        """Write what is left of one tensor."""
        self.energy += found.energy
        self.kept += found.kept
        self.before += found.before
        piece = found.piece
        if found.dense is not None:
            self._write(CHANGES, piece.tensor, found.dense)
            if found.dense.ndim == 1 and piece.density is None:
                self._small[piece.tensor] = found.dense
        if not found.factors:
            return
        self._embeddings |= piece.kind == "embedding"
        a, b = found.factors.values()
        for module, is_embedding in self._places(piece.tensor, embedding=piece.kind == "embedding"):
            turned = (b.T, a.T) if piece.kind == "embedding" and not is_embedding else (a, b)
            self._ranks[module] = found.rank
            for name, tensor in zip(layer_names(module, embedding=is_embedding), turned, strict=True):
                self._write(ADAPTER_WEIGHTS, name, tensor.contiguous())

    def _places(self, tensor: str, *, embedding: bool) -> list[tuple[str, bool]]:
        """The modules that have this tensor, and whether each is an embedding: of tied ones PEFT adapts each."""
        module = tensor.removesuffix(".weight")
        copies = (
            [name for name, own in tied_copies(self._shared, [tensor]).items() if own == tensor] if embedding else []
        )
        towers = [name.removesuffix(".weight") for name in copies if name.endswith("embed_tokens.weight")]
        heads = [name.removesuffix(".weight") for name in copies if not name.endswith("embed_tokens.weight")]
        return [*((name, embedding) for name in towers or [module]), *((name, False) for name in heads)]

    def _write(self, file: str, name: str, tensor: Tensor) -> None:
        if file not in self._files:
            path = self._scratch / f"{self.folder.name}-{file}"
            self._files[file] = Gathering(path.open("w+b"))
        self._files[file].add(name, tensor)

    def finish(self, base: str) -> tuple[bool, bool, list[str]]:
        """Complete the files: whether there is an adapter, whether there are dense changes, and what PEFT lacks.

        Args:
            base: what the adapter says that it belongs to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        saved, lacking = self._saved_modules() if self._ranks else ([], [])
        biases = self._biases() if self._ranks else {}
        lacking = [name for name in lacking if name not in biases]
        for file, gathering in self._files.items():
            gathering.finish(self.folder / file)
            Path(gathering.data.name).unlink()
        if self._ranks:
            write_json(self.folder / ADAPTER_CONFIG, self._config(base, saved, bool(biases)))
        notes = [f"{self.folder.name}: PEFT cannot hold the differences of {some(lacking)}"] if lacking else []
        return bool(self._ranks), CHANGES in self._files, notes

    def _config(self, base: str, saved: Sequence[str], has_biases: bool) -> dict[str, Any]:
        modules = self._modules | {part for module in self._ranks for part in _parents(module)} | self._ranks.keys()
        config = {
            **lora_config(self._ranks, frozenset(modules), saved=saved),
            "base_model_name_or_path": base,
            "lora_bias": has_biases,
            "task_type": task_type(self._shared.config),
        }
        return dict(sorted(config.items()))

    def _saved_modules(self) -> tuple[list[str], list[str]]:
        """Modules that PEFT stores whole, whose tensors are written; and tensors that it cannot hold."""
        wanted = {name.rpartition(".")[0] for name in self._small} - self._ranks.keys() - {""}
        # PEFT replaces every module whose name ends with one that is listed, and then wants its tensors.
        closed = wanted | {module for module in self._modules if module.endswith(tuple(wanted))} if wanted else wanted
        whole = {module: self._tensors_of(module) for module in closed}
        good = [m for m, names in sorted(whole.items()) if names and m not in self._ranks and self._is_small(m, names)]
        if len(good) < len(closed):
            good = []
        for module in good:
            for name in whole[module]:
                self._write(ADAPTER_WEIGHTS, f"{PREFIX}{name}", self._value(name))
        return good, [name for name in self._small if name.rpartition(".")[0] not in good]

    def _tensors_of(self, module: str) -> list[str]:
        return [name for name in self._shared.tensors if name.startswith(f"{module}.")]

    def _is_small(self, module: str, names: Iterable[str]) -> bool:
        own = {f"{module}.weight", f"{module}.bias"}
        return all(name in own and len(self._shared.tensors[name].shape) == 1 for name in names)

    def _value(self, name: str) -> Tensor:
        """What the expert's tensor is: the shared model's and the difference."""
        value = load(self._shared.tensors[name])
        delta = self._small.get(name)
        return (value if delta is None else value + delta.double()).to(
            delta.dtype if delta is not None else torch.float32
        )

    def _biases(self) -> Mapping[str, Tensor]:
        """Differences of biases of layers, which PEFT adds with B's; it refuses them beside embeddings."""
        found = {name: delta for name, delta in self._small.items() if name.removesuffix(".bias") in self._ranks}
        if not found or self._embeddings:
            return {}
        for module in self._ranks:
            bias = found.get(f"{module}.bias")
            size = self._shared.tensors[f"{module}.weight"].shape[0]
            value = bias if bias is not None else torch.zeros(size, dtype=next(iter(found.values())).dtype)
            self._write(ADAPTER_WEIGHTS, f"{PREFIX}{module}.lora_B.bias", value)
        return found


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def modules_of(tensors: Iterable[str]) -> frozenset[str]:
    """Every module of some tensors and every part that holds some."""
    return frozenset(part for name in tensors for part in _parents(name))
