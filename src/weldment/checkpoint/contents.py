"""What a model's files are: its weights, its configuration, and the files beside them.

All of it is decided from names, JSON files and headers, so a folder on this machine and a repo on
the Hub, seen through a `Source`, are opened by the same rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Protocol

from weldment.checkpoint.model import TensorEntry, WeightFile
from weldment.checkpoint.refusals import (
    ADAPTER_CONFIG,
    missing_weights,
    refuse_adapter,
    refuse_quantised_config,
    refuse_quantised_tensors,
)
from weldment.errors import CheckpointError

SAFETENSORS = (".safetensors",)
PICKLES = (".bin", ".pt", ".pth")
FOREIGN = (".h5", ".msgpack", ".onnx", ".ot", ".gguf")

STANDARD = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""A file of one of these names is the whole model, whatever lies beside it."""

NOT_THE_MODEL = (
    "adapter_model.*",
    "training_args.bin",
    "optimizer*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "random_states*",
)
"""Names that look like weights but belong to an adapter or to a training run."""

LEFT_OUT = (
    "README.md",
    "weldment.json",
    "trainer_state.json",
    "adapter_config.json",
    "*.index.json",
    *NOT_THE_MODEL,
)
"""Files in the root that say nothing about the model as such."""

LEFT_OUT_FOLDERS = ("checkpoint-*", "runs", "heads")
SKIPPED_ANYWHERE = (".git*", ".cache", "__pycache__")

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<suffix>\.[a-z]+)")


class Source(Protocol):
    """The files of one model, wherever they lie; `names` are those in its root."""

    @property
    def names(self) -> Collection[str]:
        """Names of the files in the root."""
        ...

    def place(self, name: str = "") -> str:
        """A file, or the whole model, for messages."""
        ...

    def nested_weights(self) -> Collection[str]:
        """Weight files in sub-folders that could be opened on their own."""
        ...

    def json(self, name: str) -> Any:
        """The content of a JSON file."""
        ...

    def tensors(self, names: Sequence[str]) -> list[tuple[WeightFile, list[TensorEntry]]]:
        """For each of these weight files, what its header says."""
        ...


@dataclass(frozen=True)
class Contents:
    """The part of a checkpoint that headers and JSON files tell."""

    config: Mapping[str, Any]
    weight_files: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Selection:
    """The files that hold the weights, and the index that names them, if there is one."""

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None


def read_contents(source: Source) -> Contents:
    """The configuration and the tensors of a model.

    Raises:
        CheckpointError: no weights, missing shards, a tensor that is missing or there twice, a
            damaged file, or a model of a kind that cannot be merged (quantised, adapter, GGUF).
    """
    config = _config(source)
    refuse_quantised_config(config, source.place("config.json"))
    selection = select_weights(source.names, source.json, source.place)
    if selection is None:
        if ADAPTER_CONFIG in source.names:
            refuse_adapter(source.json(ADAPTER_CONFIG), source.place())
        raise missing_weights(source.names, source.nested_weights(), source.place())
    files = source.tensors(selection.files)
    tensors = union(files, source.place)
    _check_index(selection, tensors, source.place)
    check_tensors(tensors, source.place())
    return Contents(config, tuple(file for file, _ in files), tensors)


def parse_json(raw: bytes, where: str) -> Any:
    """A JSON file; CheckpointError if it is none."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON: {error}", where=where, fix="Repair the file") from error


def _config(source: Source) -> Mapping[str, Any]:
    if "config.json" not in source.names:
        return {}
    config = source.json("config.json")
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", where=source.place("config.json"), fix="Repair the file")
    return config


def select_weights(
    names: Collection[str], read_json: Callable[[str], Any], place: Callable[[str], str]
) -> Selection | None:
    """The weight files among the files of a model's root; safetensors before pickles.

    An index decides; without one, a file of a standard name; without that, all candidates.

    Args:
        names: the files in the root.
        read_json: reads one of them.
        place: names one of them in messages.

    Returns:
        The selection, or None if there are no weights.

    Raises:
        CheckpointError: an index that is damaged or ambiguous, or missing shards.
    """
    for suffixes in (SAFETENSORS, PICKLES):
        index = _index(names, suffixes, place)
        if index is not None:
            weight_map = _weight_map(read_json(index), place(index))
            files = tuple(sorted(set(weight_map.values())))
            _check_present(files, names, place(index))
            return Selection(files, index, weight_map)
        candidates = sorted(name for name in names if name.endswith(suffixes) and not _matches(name, NOT_THE_MODEL))
        if candidates:
            files = next(((name,) for name in STANDARD if name in candidates), tuple(candidates))
            _check_numbering(files, place(""))
            return Selection(files)
    return None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _index(names: Collection[str], suffixes: Sequence[str], place: Callable[[str], str]) -> str | None:
    found = sorted(name for name in names if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes)))
    standard = [f"{name}.index.json" for name in STANDARD if f"{name}.index.json" in found]
    if not standard and len(found) > 1:
        cause = f"has several index files: {', '.join(found)}"
        raise CheckpointError(cause, where=place(""), fix="Keep the one that describes the model")
    return next(iter(standard + found), None)


def _weight_map(index: Any, where: str) -> Mapping[str, str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("has no weight_map from tensors to files", where=where, fix="Save the model again")
    if not weight_map:
        raise CheckpointError("its weight_map is empty", where=where, fix="Save the model again")
    return weight_map


def _check_present(files: Sequence[str], names: Collection[str], where: str) -> None:
    missing = [name for name in files if name not in names]
    if missing:
        cause = f"names {len(missing)} of {len(files)} shards that are not there: {_few(missing)}"
        raise CheckpointError(cause, where=where, fix="Download or copy the missing files")


def _check_numbering(files: Sequence[str], where: str) -> None:
    """Files named `x-00001-of-00003` announce how many they are."""
    shards = [match for match in map(SHARD.fullmatch, files) if match]
    present = {(shard["stem"], int(shard["number"]), int(shard["total"])) for shard in shards}
    for stem, total in sorted({(stem, total) for stem, _, total in present}):
        missing = [number for number in range(1, total + 1) if (stem, number, total) not in present]
        # Some tools count from 0.
        if missing and not (missing == [total] and (stem, 0, total) in present):
            cause = f"{len(missing)} of {total} shards of {stem} are missing: number {_few(map(str, missing))}"
            raise CheckpointError(cause, where=where, fix="Download or copy the missing files")


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def union(files: Iterable[tuple[WeightFile, list[TensorEntry]]], place: Callable[[str], str]) -> dict[str, TensorEntry]:
    """The tensors of all files, by name; CheckpointError if two files hold the same one."""
    tensors: dict[str, TensorEntry] = {}
    for file, entries in files:
        for entry in entries:
            other = tensors.setdefault(entry.name, entry)
            if other is not entry:
                cause = f"tensor {entry.name!r} is in {other.file.name} too"
                raise CheckpointError(cause, where=place(file.name), fix="Remove the file that is not of this model")
    return tensors


def check_tensors(tensors: Mapping[str, TensorEntry], where: str) -> None:
    """CheckpointError if there are no tensors, or tensors that only a quantised model has."""
    if not tensors:
        raise CheckpointError("its weights hold no tensors", where=where, fix="Save the model again")
    refuse_quantised_tensors({name: entry.dtype for name, entry in tensors.items()}, where)


def _check_index(selection: Selection, tensors: Mapping[str, TensorEntry], place: Callable[[str], str]) -> None:
    if selection.index is None or selection.weight_map is None:
        return
    for name, file in selection.weight_map.items():
        found = tensors[name].file.name if name in tensors else None
        if found != file:
            cause = f"tensor {name!r} should be in {file}, but is " + (
                f"in {found}" if found else "in none of the shards"
            )
            fix = "The index is not of these shards: download or save both again"
            raise CheckpointError(cause, where=place(selection.index), fix=fix)


def module_folders(modules: Any) -> tuple[str, ...]:
    """The sub-folders that a sentence-transformers `modules.json` lists."""
    listed = modules if isinstance(modules, list) else []
    paths = [module.get("path") for module in listed if isinstance(module, dict)]
    return tuple(path.strip("/") for path in paths if isinstance(path, str) and path.strip("/."))


def side_files(names: Iterable[str], modules: Sequence[str] = ()) -> tuple[str, ...]:
    """The files of a model that are not its weights, sorted.

    Weights in other formats, leftovers of training and what describes only this one model (its
    README, its adapter) are left out.

    Args:
        names: all files, relative to the root, with forward slashes.
        modules: sub-folders that are modules of their own, whose weights are side files.
    """
    return tuple(sorted(name for name in names if _is_side_file(PurePosixPath(name), modules)))


def _is_side_file(path: PurePosixPath, modules: Sequence[str]) -> bool:
    if any(_matches(part, SKIPPED_ANYWHERE) for part in path.parts):
        return False
    if any(path.is_relative_to(module) for module in modules):
        return True
    left_out = LEFT_OUT if len(path.parts) == 1 else NOT_THE_MODEL
    if _matches(path.name, left_out) or (len(path.parts) > 1 and _matches(path.parts[0], LEFT_OUT_FOLDERS)):
        return False
    return path.suffix not in (*SAFETENSORS, *PICKLES, *FOREIGN)


def is_skipped_folder(name: str) -> bool:
    """Whether a folder of this name, relative to the root, holds no side files."""
    parts = PurePosixPath(name).parts
    return _matches(parts[-1], SKIPPED_ANYWHERE) or _matches(parts[0], LEFT_OUT_FOLDERS)
