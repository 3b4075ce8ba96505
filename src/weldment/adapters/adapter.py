"""One adapter: which tensors it changes and how, read from its configuration and the headers of its weights.

Every tensor of an adapter is accounted for: it is a part of a LoRA layer, or saved whole, or the
adapter is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from weldment.adapters.applying.parameters import Target, targets
from weldment.adapters.config import AdapterConfig
from weldment.checkpoint.dtypes import is_float
from weldment.checkpoint.model import TensorEntry, WeightFile
from weldment.errors import CheckpointError

PREFIX = "base_model.model."
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPED = (".original_module.", ".modules_to_save.")

_PARTS = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(?P<last>weight|bias))?"
)
_FOREIGN = re.compile(
    r"(?:^|\.)(?P<kind>lora_[a-z]\w*|trainable_tokens_delta|trainable_tokens_original|token_adapter|hada_\w+|lokr_\w+"
    r"|ia3_\w+|oft_\w+|vera_\w+|prompt_embeddings)(?:\.|$)"
)


@dataclass(frozen=True)
class Layer:
    """One LoRA layer: scale * B A is added to the weight of a module.

    Attributes:
        module: its name in the model, such as `model.layers.0.self_attn.q_proj`; where a parameter is
            adapted and not a module, that of the parameter (`model.layers.0.mlp.experts.down_proj`).
        a: (r, inputs); (r, inputs, kernel ...) of a convolution; (E r, inputs) of stacked experts.
        b: (outputs, r); (outputs, r, 1 ...) of a convolution; (outputs, r E) of stacked experts.
        rank: r.
        scale: the factor of B A.
        transposed: the weight is stored as (inputs, outputs): embeddings and `fan_in_fan_out` layers;
            of stacks only the base can tell.
        magnitude: DoRA's lengths.
        bias: (outputs,), added to the module's bias, times `scale`.
        experts: E of a stack of experts that `target_parameters` names; 1 otherwise.
        embedding: the module is an embedding.
        parameter: `module` names a parameter.
    """

    module: str
    a: TensorEntry
    b: TensorEntry
    rank: int
    scale: float
    transposed: bool = False
    magnitude: TensorEntry | None = None
    bias: TensorEntry | None = None
    experts: int = 1
    embedding: bool = False
    parameter: bool = False

    @property
    def tensor(self) -> str:
        """The tensor that it changes."""
        return self.module if self.parameter else f"{self.module}.weight"

    @property
    def bias_tensor(self) -> str:
        """The tensor that its bias changes."""
        return f"{self.module}.bias"

    @property
    def sizes(self) -> tuple[int, int]:
        """(outputs, inputs) of the matrix B A; the kernel of a convolution counts to its inputs."""
        return self.b.shape[0], self.a.numel // self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        reference: as the user wrote it.
        layers: by module.
        saved: tensors stored whole (`modules_to_save`, trained biases, resized embeddings), by their name in the model.
        files: its weights.
        folder: where it lies, or None.
    """

    reference: str
    config: AdapterConfig
    layers: Mapping[str, Layer]
    saved: Mapping[str, TensorEntry]
    files: tuple[WeightFile, ...] = ()
    folder: str | None = None
    revision: str | None = None
    repo: str | None = None
    side_files: tuple[str, ...] = ()
    raw_config: Mapping[str, object] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor of its files, by its name there."""
        found = {entry.name: entry for entry in self.saved.values()}
        for layer in self.layers.values():
            for entry in (layer.a, layer.b, layer.magnitude, layer.bias):
                if entry is not None:
                    found[entry.name] = entry
        return found


def read_layers(
    config: AdapterConfig, tensors: Mapping[str, TensorEntry], where: str
) -> tuple[dict[str, Layer], dict[str, TensorEntry]]:
    """The layers of an adapter and the tensors that it stores whole.

    Args:
        tensors: all that its weight files hold.
        where: the adapter, for messages.

    Raises:
        CheckpointError: a tensor that belongs to nothing, a layer that lacks a half, or shapes that do not fit.
    """
    if not tensors:
        raise CheckpointError("the adapter holds no tensors", where=where, fix="Save it again")
    parts: dict[str, dict[str, TensorEntry]] = {}
    saved: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        inner = name.removeprefix(PREFIX)
        match = _PARTS.fullmatch(inner)
        if _is_left_over(name, tensors):
            continue
        if not is_float(entry.dtype):
            raise CheckpointError(f"tensor {name!r} is {entry.dtype}, not floating point", where=where, fix="Check it")
        if match is not None:
            part = match["part"] + (".bias" if match["last"] == "bias" else "")
            parts.setdefault(match["module"], {})[part] = entry
        elif (foreign := _FOREIGN.search(inner)) is not None:
            cause = f"tensor {name!r} is of a kind that cannot be merged ({foreign['kind']})"
            raise CheckpointError(
                cause, where=where, fix="Only LoRA's A and B, DoRA's magnitudes and saved modules can be"
            )
        else:
            whole = inner.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
            if whole in saved:
                cause = f"{saved[whole].name!r} and {name!r} are both said to be {whole!r}"
                raise CheckpointError(cause, where=where, fix="The adapter is damaged: save it again")
            saved[whole] = entry
    layers = {
        target.name: _layer(target, parts[module], config, where)
        for module, target in targets(parts, config, where).items()
    }
    if not layers and not saved:
        raise CheckpointError("the adapter changes nothing", where=where, fix="Check its files")
    return layers, saved


def _is_left_over(name: str, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether a tensor is a part of PEFT's wrapper of a saved module, and the module's own tensor is there too.

    PEFT writes both for resized embeddings, and reads the module's own alone.
    """
    return any(part in name and name.replace(part, ".") in tensors for part in _WRAPPED)


def _layer(target: Target, found: Mapping[str, TensorEntry], config: AdapterConfig, where: str) -> Layer:
    place = f"{where}: {target.name}"
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    kind = "lora_embedding_" if embedding else "lora_"
    left = dict(found)
    a, b = left.pop(f"{kind}A", None), left.pop(f"{kind}B", None)
    if a is None or b is None:
        missing = f"{kind}{'A' if a is None else 'B'}"
        raise CheckpointError(f"the layer has no {missing}", where=place, fix="The adapter is damaged: save it again")
    magnitude, bias = left.pop("lora_magnitude_vector", None), left.pop("lora_B.bias", None)
    if left:
        raise CheckpointError(f"the layer has a part without meaning: {sorted(left)[0]}", where=place, fix="Check it")
    rank = a.shape[0] if a.shape else 0
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or b.shape[1] != rank or rank == 0:
        raise CheckpointError(
            f"A {list(a.shape)} and B {list(b.shape)} do not fit together", where=place, fix=_grouped(b)
        )
    if any(size != 1 for size in b.shape[2:]):
        raise CheckpointError(f"B has the kernel {list(b.shape[2:])}, which must be 1", where=place, fix="Check it")
    experts = _experts(target, rank, config, place)
    rank //= experts
    return Layer(
        target.name,
        a,
        b,
        rank,
        config.scale(target.key, rank),
        transposed=embedding or (config.fan_in_fan_out and not target.parameter),
        magnitude=magnitude,
        bias=bias,
        experts=experts,
        embedding=embedding,
        parameter=target.parameter,
    )


def _experts(target: Target, rows: int, config: AdapterConfig, place: str) -> int:
    """How many experts A, which has r rows for each, is for."""
    if not target.parameter:
        return 1
    rank = config.stated_rank(target.key)
    if rows % rank:
        cause = f"A has {rows} rows, which are not {rank} (the rank) for each of a number of experts"
        raise CheckpointError(cause, where=place, fix="Check r and rank_pattern in adapter_config.json")
    return rows // rank


def _grouped(b: TensorEntry) -> str:
    if len(b.shape) > 2:
        return "Convolutions with groups cannot be merged (PEFT cannot merge them either)"
    return "The adapter is damaged: save it again"
