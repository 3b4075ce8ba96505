"""The bundle on disk: what its files are called, and how a folder is known to be whole.

OUT/              the shared model: a model folder that loads by itself
OUT/experts/NAME/ a PEFT adapter on the shared model; beside it dense changes and the task head
OUT/router/       which expert an input belongs to
OUT/twin.json     what is in the bundle, and the digest of every file
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weldment.checkpoint.side_files import write_json
from weldment.checkpoint.staging import MANIFEST
from weldment.errors import CheckpointError
from weldment.report.manifest import file_digest
from weldment.version import __version__

TWIN = "twin.json"
EXPERTS = "experts"
ROUTER = "router"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CHANGES = "changes.safetensors"
HEAD = "head.safetensors"
HEAD_CONFIG = "head.json"
FORMAT = 1

_NOT_LISTED = frozenset({TWIN, MANIFEST, "README.md"})
_REBUILD = "Build the bundle again with `weld twin build`, or copy it again from where it is whole"
_NOT_ONE = "Give a folder that `weld twin build` wrote"


@dataclass(frozen=True)
class ExpertPart:
    """What a bundle holds of one expert; paths are absolute if the bundle's is, and None for what it has not.

    Attributes:
        name: in the bundle, unique.
        reference: the model it was made of.
        labels: of a classification head, by class; None if the expert has no such head.
        adapter: the folder of the PEFT adapter on the shared model.
        changes: the safetensors file of dense differences theta_t - theta_shared, by the shared model's names.
        head: the safetensors file of the task head, by the expert's names.
        head_config: the JSON file with the configuration of the expert, beside its head.
        nbytes: of all its files.
        kept: the share of the squared Frobenius norm of its differences (of the tensors that are not excluded) that
            compression kept, over all tensors; None if nothing differs.
        problem_type: as the expert's configuration says it.
    """

    name: str
    reference: str
    labels: tuple[str, ...] | None
    adapter: Path | None
    changes: Path | None
    head: Path | None
    head_config: Path | None
    nbytes: int
    kept: float | None
    problem_type: str | None = None


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are all there and as `twin.json` says.

    Attributes:
        shared: `model_type`, `class` (transformers' name) and `method` of the shared model.
        exclusive: how the exclusive parts were compressed.
        router: its folder; the shared model's is `folder` itself.
    """

    folder: Path
    experts: tuple[ExpertPart, ...]
    shared: Mapping[str, Any]
    exclusive: Mapping[str, Any]

    @property
    def router(self) -> Path:
        return self.folder / ROUTER

    @property
    def names(self) -> tuple[str, ...]:
        """Of the experts, in their order."""
        return tuple(expert.name for expert in self.experts)


def expert_part(folder: Path, name: str, record: Mapping[str, Any]) -> ExpertPart:
    """The part of an expert whose files lie in `folder/experts/name`.

    Args:
        folder: the bundle's.
        record: its entry in `twin.json`.
    """
    place = folder / EXPERTS / name
    labels = record.get("labels")
    return ExpertPart(
        name=name,
        reference=str(record["reference"]),
        labels=None if labels is None else tuple(str(label) for label in labels),
        adapter=place if record["adapter"] else None,
        changes=place / CHANGES if record["changes"] else None,
        head=place / HEAD if record["head"] else None,
        head_config=place / HEAD_CONFIG if record["head"] else None,
        nbytes=int(record["nbytes"]),
        kept=record.get("kept"),
        problem_type=record.get("problem_type"),
    )


def write_twin_json(
    folder: Path,
    *,
    shared: Mapping[str, Any],
    exclusive: Mapping[str, Any],
    experts: Sequence[Mapping[str, Any]],
) -> None:
    """Complete a bundle: its description, with size and SHA-256 of every other file.

    Args:
        folder: with everything but `twin.json`.
        shared: `model_type`, `class` and `method` of the shared model.
        exclusive: the settings of the compression.
        experts: for each its `name`, `reference`, `adapter`, `changes`, `head`, `labels`, `problem_type`, `nbytes`,
            `kept`.
    """
    content = {
        "format": FORMAT,
        "weldment": __version__,
        "shared": dict(shared),
        "experts": [dict(expert) for expert in experts],
        "exclusive": dict(exclusive),
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.relative_to(folder).as_posix() not in _NOT_LISTED
        },
    }
    write_json(folder / TWIN, content)


def read_bundle(folder: str | Path, *, check: bool = True) -> Bundle:
    """Open a bundle.

    Args:
        folder: what `weld twin build` wrote.
        check: compare the digests of all files, which reads them once; existence and sizes are always checked.

    Raises:
        CheckpointError: this is no bundle, it is of a later format, or a file is missing or altered; all such files are
            named.
    """
    folder = Path(folder).expanduser()
    content = _read_json(folder)
    if problems := _problems(folder, content["files"], check):
        raise CheckpointError("; ".join(problems), where=str(folder), fix=_REBUILD)
    experts = tuple(expert_part(folder, str(record["name"]), record) for record in content["experts"])
    return Bundle(folder, experts, content["shared"], content["exclusive"])


def compare_files(folder: Path, known: Container[str]) -> tuple[int, list[str]]:
    """How many files of a bundle, but for the known ones, were compared with `twin.json`, and what is wrong with them.

    Raises:
        CheckpointError: `twin.json` is damaged.
    """
    files = {name: stated for name, stated in _read_json(folder)["files"].items() if name not in known}
    return len(files), [f"file {problem}" for problem in _problems(folder, files, check=True)]


def _problems(folder: Path, files: Mapping[str, Mapping[str, Any]], check: bool) -> list[str]:
    """What is wrong with files, each with its name."""
    return [
        f"{name} {problem}" for name, stated in files.items() if (problem := _problem(folder / name, stated, check))
    ]


def _problem(path: Path, stated: Mapping[str, Any], check: bool) -> str:
    """What is wrong with a file, or nothing."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != stated["size"]:
        return f"was altered: it has {path.stat().st_size} bytes, and {TWIN} says {stated['size']}"
    if check and file_digest(path) != stated["sha256"]:
        return f"was altered: its SHA-256 is not the one in {TWIN}"
    return ""


def _read_json(folder: Path) -> dict[str, Any]:
    """The content of `twin.json`, of the right shape."""
    path = folder / TWIN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"there is no {TWIN} here: this is no Twin bundle", where=str(folder), fix=_NOT_ONE
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path), fix=_REBUILD) from error
    if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
        cause = f"the bundle is of format {content['format']}, and this version reads format {FORMAT}"
        raise CheckpointError(cause, where=str(path), fix="Use a later version of weldment")
    if not _is_well_formed(content):
        raise CheckpointError("this is not the description of a Twin bundle", where=str(path), fix=_REBUILD)
    return content


def _is_well_formed(content: Any) -> bool:
    """Whether everything that is read of `twin.json` is there, and no name leads out of the folder."""
    kinds = {"format": int, "shared": dict, "exclusive": dict, "experts": list, "files": dict}
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    needed = {"name": str, "reference": str, "adapter": bool, "changes": bool, "head": bool, "nbytes": int}
    experts = content["experts"]
    if not all(isinstance(e, dict) and all(isinstance(e.get(k), kind) for k, kind in needed.items()) for e in experts):
        return False
    files = content["files"]
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in [*files, *_names(experts)])
    stated = all(isinstance(f, dict) and isinstance(f.get("size"), int) and "sha256" in f for f in files.values())
    return inside and stated and all(_listed(expert, files) for expert in experts)


def _names(experts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [expert["name"] for expert in experts]


def _listed(expert: Mapping[str, Any], files: Mapping[str, Any]) -> bool:
    """Whether the files that an expert is said to have are among those whose digests are stated."""
    names = {"adapter": ADAPTER_WEIGHTS, "changes": CHANGES, "head": HEAD}
    return all(f"{EXPERTS}/{expert['name']}/{name}" in files for key, name in names.items() if expert[key])
