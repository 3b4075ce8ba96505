"""LoRA layers from the difference of two models: the best approximation of a rank, written as B A."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from weldment.adapters.adapter import PREFIX
from weldment.adapters.extract.pairing import Pair, Pairing
from weldment.adapters.loading import load
from weldment.adapters.lowrank import ENERGY, Factors, decomposed
from weldment.checkpoint.compare import same_bytes
from weldment.checkpoint.dtypes import ITEM_BYTES, is_float, torch_dtype
from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20
"""Elements that are read at once."""


@dataclass(frozen=True)
class Settings:
    """How differences are approximated.

    Attributes:
        rank: the largest rank, None for the least that keeps `energy` of the squared Frobenius norm.
        dtype: of the factors and of what is saved, None for float32, or the fine-tune's own 16 bits.
    """

    rank: int | None = None
    energy: float = ENERGY
    dtype: torch.dtype | None = None

    def dtype_of(self, entry: TensorEntry) -> torch.dtype:
        """Of what is made from a tensor of the fine-tune."""
        own = torch_dtype(entry.dtype)
        return self.dtype or (own if own.itemsize == 2 else torch.float32)


@dataclass(frozen=True)
class ExtractedLayer:
    """A LoRA layer that was made.

    Attributes:
        module: its name in the fine-tune.
        shape: (outputs, inputs); the kernel of a convolution counts to its inputs.
        energy: the share of the squared Frobenius norm of the difference that was kept.
        error: the relative error that is left, in the Frobenius norm.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    energy: float
    error: float


@dataclass(frozen=True)
class Examined:
    """What was found of one pair of tensors.

    Attributes:
        energy: the squared Frobenius norm of the difference; infinite for a tensor without a partner.
        change: its root, relative to the norm of the base's tensor; None where that was not asked for.
        layer: what was made of it, if it became a layer.
        tensors: for the adapter's file, by their names there.
    """

    pair: Pair
    energy: float
    change: float | None = None
    layer: ExtractedLayer | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def examine(pair: Pair, settings: Settings) -> Examined:
    """Compare a pair, and make of it what it is to become.

    Raises:
        NonFiniteError: NaN or infinity in one of the models, or a factor that its dtype cannot hold.
        CheckpointError: a file cannot be read.
    """
    if pair.fate == "layer":
        return _layer(pair, settings)
    energy, change = _size_of_change(pair)
    if pair.fate == "left":
        return Examined(pair, energy, change)
    whole = torch.empty(pair.new.numel, dtype=settings.dtype_of(pair.new))
    for start in range(0, whole.numel(), BLOCK):
        stop = min(start + BLOCK, whole.numel())
        whole[start:stop] = load(part(pair.new, start, stop), whole.dtype)
    named = {f"{PREFIX}{pair.name}": _finite(whole.view(pair.new.shape), pair.name)}
    return Examined(pair, energy, change, tensors=named)


def _layer(pair: Pair, settings: Settings) -> Examined:
    delta = difference(pair)
    norm = float(torch.linalg.vector_norm(delta))
    if not math.isfinite(norm):
        raise NonFiniteError("the difference of the models holds NaN or infinity", where=pair.name)
    if norm == 0.0:
        return Examined(pair, 0.0)
    if pair.transposed:
        delta = delta.T
    if settings.rank is None:
        factors = decomposed(delta, energy=settings.energy)
    else:
        factors = decomposed(delta, rank=settings.rank)
    error = factors.lost
    layer = ExtractedLayer(pair.module, (delta.shape[0], delta.shape[1]), factors.rank, 1.0 - error**2, error)
    return Examined(pair, norm**2, layer=layer, tensors=_factor_tensors(pair, factors, settings))


def _factor_tensors(pair: Pair, factors: Factors, settings: Settings) -> dict[str, Tensor]:
    b, a = factors.balanced()
    if pair.kind == "convolution":
        a = a.reshape(-1, *pair.new.shape[1:])
        b = b.reshape(*b.shape, *(1 for _ in pair.new.shape[2:]))
    dtype = settings.dtype_of(pair.new)
    named = {f"{PREFIX}{pair.module}.lora_A.weight": a, f"{PREFIX}{pair.module}.lora_B.weight": b}
    return {name: _finite(tensor.to(dtype, copy=True), pair.name) for name, tensor in named.items()}


def _finite(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"what is to be saved is not finite as {tensor.dtype}", where=name, fix="Use --dtype float32"
        )
    return tensor


def difference(pair: Pair) -> Tensor:
    """The fine-tune's tensor minus the base's, float64, as a matrix (shape[0], rest).

    A base of more precision than the fine-tune is rounded as the fine-tune was, so that what
    training did not touch does not differ.
    """
    delta = torch.empty(pair.new.numel, dtype=torch.float64)
    for start, new, old in _blocks(pair):
        torch.sub(new, old, out=delta[start : start + new.numel()])
    return delta.view(pair.new.shape[0], -1)


def _size_of_change(pair: Pair) -> tuple[float, float | None]:
    """The squared norm of the difference, and its norm relative to that of the base's tensor."""
    if pair.old is None or pair.old.shape != pair.new.shape:
        return math.inf, None
    if not (is_float(pair.new.dtype) and is_float(pair.old.dtype)):
        return (0.0 if same_bytes(pair.new, pair.old) else math.inf), None
    energy = before = 0.0
    for _, new, old in _blocks(pair):
        before += float(old.square().sum())
        energy += float(new.sub_(old).square().sum())
    return energy, math.sqrt(energy / before) if before else (math.inf if energy else 0.0)


def _blocks(pair: Pair) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Where a block of elements starts, and both models' values, float64."""
    assert pair.old is not None
    is_wider = ITEM_BYTES[pair.old.dtype] > ITEM_BYTES[pair.new.dtype]
    common = torch_dtype(pair.new.dtype if is_wider else pair.old.dtype)
    for start in range(0, pair.new.numel, BLOCK):
        stop = min(start + BLOCK, pair.new.numel)
        yield start, load(part(pair.new, start, stop)), load(part(pair.old, start, stop), common).double()


def part(entry: TensorEntry, start: int, stop: int) -> TensorEntry:
    """Some elements of a tensor, flattened."""
    return replace(entry, shape=(stop - start,), offset=entry.offset + start * ITEM_BYTES[entry.dtype])


def adapter_config(layers: Sequence[ExtractedLayer], pairing: Pairing, models: Sequence[Checkpoint]) -> dict[str, Any]:
    """`adapter_config.json` for layers whose scale is 1.

    Args:
        models: the fine-tune and the base.
    """
    finetuned, base = models
    saved = [*pairing.saved, *(name.removesuffix(".weight") for name in pairing.copies)]
    return {
        **lora_config({layer.module: layer.rank for layer in layers}, pairing.modules, saved=saved),
        "base_model_name_or_path": base.repo or base.reference,
        "fan_in_fan_out": pairing.transposed,
        "revision": base.revision,
        "task_type": task_type(finetuned.config),
    }


def lora_config(ranks: Mapping[str, int], modules: frozenset[str], *, saved: Sequence[str] = ()) -> dict[str, Any]:
    """What `adapter_config.json` says of layers whose scale is 1.

    Args:
        ranks: by module.
        modules: every module of the model and every part that holds some.
        saved: modules that are stored whole.
    """
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda r: (counts[r], r), default=8)
    pattern = rank_pattern(ranks, rank)
    return {
        "alpha_pattern": pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": pattern,
        "target_modules": target_modules(list(ranks), modules),
        "use_dora": False,
        "use_rslora": False,
    }


def rank_pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """The ranks that are not the usual one, by the shortest ends of names that tell them apart.

    PEFT takes a pattern for the end of a name, from a dot on. Short ends also fit where a model is
    loaded under other prefixes than it is stored with.
    """
    found_at: dict[str, set[int]] = {}
    for module, rank in ranks.items():
        for end in _ends(module):
            found_at.setdefault(end, set()).add(rank)
    found: dict[str, int] = {}
    for module, rank in ranks.items():
        if rank != usual:
            end = next((end for end in _ends(module) if found_at[end] == {rank}), f"^{module}")
            found[end.replace(".", r"\.")] = rank
    return found


def _ends(module: str) -> list[str]:
    """Of a name, from a dot on, the shortest first."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def target_modules(targets: Sequence[str], modules: frozenset[str]) -> list[str] | str:
    """What PEFT is to replace: last parts of names if they select these modules and no others, else whole names."""
    wanted = set(targets)
    for chosen in ({name.rpartition(".")[2] for name in targets}, wanted):
        ends = tuple(f".{name}" for name in chosen)
        if {module for module in modules if module in chosen or module.endswith(ends)} == wanted:
            return sorted(chosen)
    # As one text it is a regular expression that must fit the whole name.
    return "|".join(name.replace(".", r"\.") for name in sorted(wanted))


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's, where it only says how the model is called; for classifiers it also says what is saved whole."""
    names = config.get("architectures") or [""]
    if str(names[0]).endswith("ForCausalLM"):
        return "CAUSAL_LM"
    is_both = str(names[0]).endswith("ForConditionalGeneration") and config.get("is_encoder_decoder")
    return "SEQ_2_SEQ_LM" if is_both else None
