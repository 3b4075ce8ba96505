"""The plan of a merge of adapters: everything it will do, known from configurations and headers alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from weldment.adapters.adapter import PREFIX, Adapter, Layer
from weldment.checkpoint.dtypes import ITEM_BYTES
from weldment.checkpoint.model import TensorEntry
from weldment.methods import METHODS
from weldment.planning.plan import LedgerEntry
from weldment.recipe.recipe import Recipe


@dataclass(frozen=True)
class Module:
    """How the merged adapter's layer of one module is made.

    Attributes:
        name: of the module in the model.
        layers: one per expert; None where an adapter leaves the module as it is: a change of zero.
        parameters: the kernel's keyword arguments.
        base: the layer of an adapter that is the base; None for no change.
        coefficients: one per expert, if the merge is a weighted sum of the changes; None if it is not.
        base_coefficient: of `base`, if the merge is a weighted sum.
        space: where the method runs: "delta", "core", "factors", "cat".
        rank: the largest that the result can have.
    """

    name: str
    layers: tuple[Layer | None, ...]
    parameters: Mapping[str, Any]
    base: Layer | None = None
    coefficients: tuple[float, ...] | None = None
    base_coefficient: float = 0.0
    space: str = "delta"
    rank: int = 1

    @property
    def present(self) -> tuple[Layer, ...]:
        """The layers that are there, the base's last."""
        return tuple(layer for layer in (*self.layers, self.base) if layer is not None)

    @property
    def pattern(self) -> Layer:
        """A layer that shows what kind of module it is."""
        return self.present[0]

    @property
    def tensor(self) -> str:
        """The tensor that is changed."""
        return self.name if self.pattern.parameter else f"{self.name}.weight"

    @property
    def stored_name(self) -> str:
        """Its name in an adapter's file without the prefix; wrapped parameters are called after their wrappers."""
        if not self.pattern.parameter:
            return self.name
        return self.pattern.a.name.removeprefix(PREFIX).removesuffix(".lora_A.weight")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the layers that are there."""
        return tuple(layer.rank for layer in self.present)

    @property
    def copied(self) -> Layer | None:
        """The only layer that takes part, with coefficient 1; None if there is more to calculate."""
        if self.coefficients is None or (self.base_coefficient and self.base is not None):
            return None
        used = [(layer, c) for layer, c in zip(self.layers, self.coefficients, strict=True) if layer and c]
        return used[0][0] if len(used) == 1 and used[0][1] == 1.0 else None

    @property
    def has_bias(self) -> bool:
        return any(layer.bias is not None for layer in self.present)

    @property
    def numel(self) -> int:
        """Elements of the result, if it has the largest rank that it can have."""
        outputs, inputs = self.pattern.sizes
        return (outputs + inputs) * self.rank * self.pattern.experts

    @property
    def read_bytes(self) -> int:
        """Bytes of all tensors that are read."""
        parts = (part for layer in self.present for part in (layer.a, layer.b, layer.bias, layer.magnitude))
        return sum(part.nbytes for part in parts if part is not None)

    def record(self) -> dict[str, Any]:
        """What determines the result's bytes, as JSON-able values."""
        return {
            "name": self.name,
            "layers": [_record(layer) for layer in (*self.layers, self.base)],
            "parameters": dict(self.parameters),
            "coefficients": self.coefficients,
            "space": self.space,
            "rank": self.rank,
        }


def _record(layer: Layer | None) -> list[Any] | None:
    if layer is None:
        return None
    parts = (layer.a, layer.b, layer.magnitude, layer.bias)
    return [layer.scale, layer.experts, *([part.name, part.dtype, list(part.shape)] for part in parts if part)]


@dataclass(frozen=True)
class SavedTensor:
    """How a tensor that adapters store whole is made.

    Attributes:
        entries: one per expert, or the only one that is copied.
        method: that merges them.
        base: the tensor of an adapter that is the base.
    """

    name: str
    entries: tuple[TensorEntry, ...]
    method: str
    parameters: Mapping[str, Any]
    dtype: str
    base: TensorEntry | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(entry.nbytes for entry in (*self.entries, *([self.base] if self.base else [])))

    @property
    def stored_name(self) -> str:
        """Its name in an adapter's file without the prefix; tensors of wrapped modules are called differently."""
        if not any(".base_layer." in entry.name for entry in self.entries):
            return self.name
        module, _, last = self.name.rpartition(".")
        return f"{module}.base_layer.{last}"

    def record(self) -> dict[str, Any]:
        """What determines the result's bytes, as JSON-able values."""
        return {
            "name": self.name,
            "entries": [[entry.name, entry.dtype, list(entry.shape)] for entry in self.entries],
            "base": self.base and self.base.name,
            "method": self.method,
            "parameters": dict(self.parameters),
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class AdapterPlan:
    """One merge of adapters to an adapter, ready to run.

    Attributes:
        adapters: the opened inputs by their reference in the recipe.
        experts: references of the merged adapters, in order.
        base: the adapter that is the base of the arithmetic; None where that is no change at all.
        modules: of the merged adapter, in order.
        saved: tensors that it stores whole.
        heads: tensors kept per expert, by the names of the heads' files.
        dtype: safetensors name of the dtype of A and B.
        config: of the output, but for the ranks and what follows from them.
        notes: what the user should know, one sentence each.
    """

    recipe: Recipe
    adapters: Mapping[str, Adapter]
    experts: tuple[str, ...]
    base: str | None
    modules: tuple[Module, ...]
    saved: tuple[SavedTensor, ...]
    dtype: str
    config: Mapping[str, Any]
    ledger: tuple[LedgerEntry, ...]
    heads: Mapping[str, tuple[TensorEntry, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        kept = sum(entry.nbytes for entries in self.heads.values() for entry in entries)
        return sum(part.read_bytes for part in (*self.modules, *self.saved)) + kept

    @property
    def write_bytes(self) -> int:
        """Of weights, if every module has the largest rank that it can have."""
        kept = sum(entry.nbytes for entries in self.heads.values() for entry in entries)
        whole = sum(part.entries[0].numel * ITEM_BYTES[part.dtype] for part in self.saved)
        return sum(module.numel for module in self.modules) * ITEM_BYTES[self.dtype] + whole + kept

    @property
    def is_exact(self) -> bool:
        """Whether nothing can be lost: every module has room for the whole result."""
        return all(self.room(module) <= module.rank for module in self.modules)

    def room(self, module: Module) -> int:
        """The rank that the whole result of a module can have."""
        if self.recipe.combination is not None or module.space == "factors":
            return module.rank
        return possible_rank(module)

    @cached_property
    def hash(self) -> str:
        """Identifies what is calculated; covers neither the values in the files nor where these lie."""
        combination = self.recipe.combination
        record = {
            "format": 1,
            "method": self.recipe.method,
            "combination": combination and asdict(combination),
            "accumulate": self.recipe.accumulate,
            "seed": self.recipe.seed if combination or METHODS[self.recipe.method].random else 0,
            "rank": self.recipe.rank,
            "experts": list(self.experts),
            "base": self.base,
            "modules": [module.record() for module in self.modules],
            "saved": [saved.record() for saved in self.saved],
            "heads": {name: [entry.name for entry in entries] for name, entries in self.heads.items()},
            "dtype": self.dtype,
            "config": self.config,
        }
        return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """How many input tensors had each fate."""
        return dict(Counter(entry.fate for entry in self.ledger))


def possible_rank(module: Module) -> int:
    """The rank that the whole result of a module can have, before it is cut."""
    outputs, inputs = module.pattern.sizes
    if module.space == "cat":
        return sum(module.ranks)
    if module.space == "delta" and module.coefficients is None:
        return min(outputs, inputs)
    return min(sum(module.ranks), outputs, inputs)
