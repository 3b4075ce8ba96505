"""The exact bytes of an output before it is written: which tensor lies where in which file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weldment.checkpoint.dtypes import ITEM_BYTES

SHARD_BYTES = 5 * 10**9
"""Largest shard by default, as the Hub's other tools have it."""

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Slot:
    """The place of one tensor: `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: its first bytes and its full size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Layout:
    """All weight files of an output."""

    files: tuple[FileLayout, ...]
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    def index(self) -> dict[str, object] | None:
        """The content of the index file; None if the model is one file."""
        slots = [slot for slot in self.slots if "/" not in slot.file]
        if len({slot.file for slot in slots}) < 2:
            return None
        total = sum(slot.nbytes for slot in slots)
        return {
            "metadata": {"total_size": total},
            "weight_map": {slot.name: slot.file for slot in sorted(slots, key=lambda slot: slot.name)},
        }


Spec = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype and shape of a tensor."""


def spec_bytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec[2]) * ITEM_BYTES[spec[1]]


def shards(specs: Sequence[Spec], limit: int) -> list[list[Spec]]:
    """Tensors in order, cut where the next one would exceed `limit` bytes; a larger one stands alone."""
    groups: list[list[Spec]] = [[]]
    used = 0
    for spec in specs:
        size = spec_bytes(spec)
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += size
    return groups


def lay_out(
    specs: Sequence[Spec], *, shard_bytes: int = SHARD_BYTES, extra: Mapping[str, Sequence[Spec]] | None = None
) -> Layout:
    """Lay out a model in `model.safetensors` or shards of it, and `extra` files beside it."""
    groups = shards(specs, shard_bytes)
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    )
    files = [_file(name, group) for name, group in zip(names, groups, strict=True)]
    files += [_file(name, group) for name, group in (extra or {}).items()]
    return Layout(tuple(file for file, _ in files), tuple(slot for _, slots in files for slot in slots))


def _file(name: str, specs: Iterable[Spec]) -> tuple[FileLayout, list[Slot]]:
    # Wide items first keep every tensor aligned for readers that map the file.
    ordered = sorted(specs, key=lambda spec: -ITEM_BYTES[spec[1]])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in ordered:
        end = position + spec_bytes(spec)
        entries[spec[0]] = {"dtype": spec[1], "shape": list(spec[2]), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    slots, place = [], len(header)
    for spec in ordered:
        slots.append(Slot(*spec, file=name, offset=place))
        place += spec_bytes(spec)
    return FileLayout(name, header, place), slots
