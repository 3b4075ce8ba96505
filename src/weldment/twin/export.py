"""A bundle for vLLM's multi-LoRA: the shared model, and one adapter of one rank for each expert."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weldment.adapters.config import ADAPTER_CONFIG
from weldment.checkpoint.side_files import write_json
from weldment.checkpoint.staging import Staging, check_output
from weldment.errors import PlanError, joined
from weldment.report.manifest import file_digest, write_manifest
from weldment.twin.bundle import ADAPTER_WEIGHTS, EXPERTS, ROUTER, TWIN, Bundle, ExpertPart, read_bundle
from weldment.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be started with."""

_MODEL = "model"
_SHARED = "shared"
_OTHER = (EXPERTS, ROUTER, TWIN, "README.md", "weldment.json")
_README = """# {count} experts for vLLM

`model/` is the shared model, every other folder a LoRA adapter on it. In this folder:

```sh
{command}
```

A request names the expert as its `model`; `shared` is the shared model alone. vLLM applies one adapter to a request
and does not route: which expert an input belongs to is what the router of the bundle says
(`weldment.TwinModel.from_pretrained(BUNDLE).route(...)`), and its first choice is the name to send. `routes.json`
has the names.
"""


def export_vllm(bundle: str | Path, out: str | Path, *, overwrite: bool = False) -> str:
    """Write a bundle as vLLM serves it; the command that does.

    Factors of smaller rank are filled with zeros, so that all adapters have one rank, and products stay the same.

    Args:
        bundle: the folder of a bundle.
        out: the export's folder, which appears when it is whole.
        overwrite: replace it if it is not empty.

    Raises:
        PlanError: an expert needs what vLLM's adapters cannot hold; everything is named.
        CheckpointError: the bundle is not whole.
        OutputError: `out` cannot be used.
    """
    read, target = read_bundle(bundle), Path(out)
    check_output(target, overwrite=overwrite)
    configs = {part.name: _config(part) for part in read.experts}
    problems = [problem for part in read.experts for problem in _problems(part, configs[part.name])]
    rank = max((_rank_of(config) for config in configs.values()), default=1)
    if rank > RANKS[-1]:
        fix = f"Build the bundle with `rank: {RANKS[-1]}` or less"
        problems.append(PlanError(f"rank {rank} is more than vLLM's largest, {RANKS[-1]}", where=str(bundle), fix=fix))
    if problems:
        raise joined(PlanError, problems)
    command = _command(read.names, rank)
    with Staging(target) as staging:
        staging.check(overwrite=overwrite)
        staging.clear()
        _copy_model(read, staging.folder / _MODEL)
        for part in read.experts:
            _write_adapter(part, configs[part.name], rank, staging.folder / part.name)
        routes = {"shared": _SHARED, "experts": list(read.names), "rank": rank, "command": command}
        write_json(staging.folder / "routes.json", routes)
        text = _README.format(count=len(read.experts), command=command)
        (staging.folder / "README.md").write_text(text, encoding="utf-8")
        _write_manifest(staging.folder)
        staging.seal()
        staging.publish()
    return command


def _config(part: ExpertPart) -> dict[str, object]:
    if part.adapter is None:
        return {}
    return json.loads((part.adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))


def _rank_of(config: Mapping[str, object]) -> int:
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=1)


def _problems(part: ExpertPart, config: Mapping[str, object]) -> list[PlanError]:
    """What of an expert vLLM cannot hold."""
    from safetensors import safe_open

    found: list[tuple[str, str]] = []
    if part.name.lower() in (_MODEL, _SHARED):
        found.append(("the shared model has that name there", "Build the bundle with another `name` for it"))
    if part.adapter is None:
        found.append(("it has no LoRA layers", "Build it with `exclusive: {kind: svd}`"))
    else:
        with safe_open(part.adapter / ADAPTER_WEIGHTS, framework="pt") as file:
            names = list(file.keys())
        tables = [name for name in names if "lora_embedding_" in name or "lm_head." in name]
        if tables:
            found.append(("embeddings or an output head change", "Exclude them: `*embed*`, `*wte*`, `*lm_head*`"))
    if config.get("modules_to_save") or config.get("lora_bias") or part.changes is not None:
        found.append(("norms, biases or other tensors change that are no matrices", "Exclude them: `*norm*`, `*.bias`"))
    if part.head is not None:
        found.append(("it has a task head", "Serve it with `weld twin serve`"))
    return [
        PlanError(f"vLLM cannot serve {part.name}: {cause}", where=f"{EXPERTS}/{part.name}", fix=fix)
        for cause, fix in found
    ]


def _command(names: Sequence[str], rank: int) -> str:
    most = next(allowed for allowed in RANKS if allowed >= rank)
    modules = " ".join(shlex.quote(f"{name}={name}") for name in names)
    return (
        f"vllm serve {_MODEL} --served-model-name {_SHARED} --enable-lora --max-loras {len(names)} "
        f"--max-lora-rank {most} --lora-modules {modules}"
    )


def _copy_model(bundle: Bundle, target: Path) -> None:
    target.mkdir(parents=True)
    for path in sorted(bundle.folder.iterdir()):
        if path.name not in _OTHER:
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, target / path.name)


def _write_adapter(part: ExpertPart, config: Mapping[str, object], rank: int, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert part.adapter is not None
    target.mkdir()
    tensors = load_file(part.adapter / ADAPTER_WEIGHTS)
    padded = {name: _padded(tensor, rank, 0 if ".lora_A." in name else 1) for name, tensor in tensors.items()}
    save_file(padded, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    same = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    write_json(target / ADAPTER_CONFIG, {**config, **same, "base_model_name_or_path": _MODEL})


def _padded(tensor: Tensor, rank: int, axis: int) -> Tensor:
    """The factor with zeros up to a rank."""
    if tensor.shape[axis] == rank:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = rank
    wide = tensor.new_zeros(shape)
    wide.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return wide


def _write_manifest(folder: Path) -> None:
    """A record by which the folder is known as an output that may be replaced."""
    files = {
        path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    write_manifest(folder, {"format": 1, "weldment": __version__, "tensors": {}, "files": files})
