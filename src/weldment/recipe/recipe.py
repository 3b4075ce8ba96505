"""A checked recipe, whatever dialect it was written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SEED = "a whole number from 0 to 2**63 - 1"
"""What a seed is, for messages."""

OUTPUTS = ("adapter", "model")
SPACES = ("delta", "core", "factors", "cat")
RANKS = ("auto", "full")

Settings = Mapping[str, Any]
"""Parameters as written: name -> scalar, gradient (list of scalars) or list of {filter, value}."""


@dataclass(frozen=True)
class ModelInput:
    """One model among those merged, with its own parameters; `where` is its YAML path."""

    model: str
    parameters: Settings = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class SliceSource:
    """Layers [start, end) of one model."""

    model: str
    layer_range: tuple[int, int]
    parameters: Settings = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Slice:
    """Layers of the output: as many as each of its sources has."""

    sources: tuple[SliceSource, ...]
    parameters: Settings = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class LayerScale:
    """LiNeS: factors of the merged change, from the first layer's to the last's."""

    first: float
    last: float


@dataclass(frozen=True)
class Combination:
    """A call of PEFT's `add_weighted_adapter`, its weights being those of the models.

    Attributes:
        type: one of PEFT's eleven combination types.
        density: share of elements kept, for types that prune.
        svd_rank: rank of the result, for the `svd` types; the largest rank of the adapters by default.
        svd_clamp: quantile at which the factors are clamped, for the `svd` types.
        majority_sign_method: "total" or "frequency", for the `ties` types.
    """

    type: str
    density: float | None = None
    svd_rank: int | None = None
    svd_clamp: float | None = None
    majority_sign_method: str = "total"


@dataclass(frozen=True)
class Recipe:
    """One merge.

    Attributes:
        method: a name in `METHODS`.
        models: the models as listed; may include the base. With `slices`, only the
            per-model parameters of models that slices name.
        slices: layer slices, or empty.
        base_model: the base as written, or None.
        parameters: the recipe's global parameters.
        dtype: safetensors name of the output's dtype, or None to keep each tensor's own.
        accumulate: "float32" or "float64".
        seed: for random methods.
        name: of an intermediate merge in a multi-document recipe.
        heads, take, drop: patterns (globs over tensor names): `heads` are kept per expert, `take`
            come from the named model unmerged, `drop` are left out.
        output: "adapter" or "model", for merges of adapters; None where the recipe does not say.
        space: where adapters are merged: "delta", "core", "factors" or "cat"; None where the recipe does not say.
        rank: of the merged adapter: a number, "auto" (by energy) or "full"; None for the largest of the adapters.
        combination: the call of PEFT's that the recipe is, or None.
        layer_scale, subspace_boost: what is done to the merged change after the method; None for nothing.
        recalibrate: a folder of unlabelled inputs, on which running statistics of batch normalisation are measured
            anew; None where they are merged as they are.
        save_path: the output folder, where the recipe names one and the user none.
        notes: what was accepted but has no effect, one sentence each.
        source: the recipe's YAML mapping after overrides, as the user wrote it.
        origin: file name for messages.
    """

    method: str
    models: tuple[ModelInput, ...] = ()
    slices: tuple[Slice, ...] = ()
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    accumulate: str = "float32"
    seed: int = 0
    name: str | None = None
    tokenizer: Any = None
    chat_template: str | None = None
    heads: tuple[str, ...] = ()
    take: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    output: str | None = None
    space: str | None = None
    rank: int | str | None = None
    combination: Combination | None = None
    layer_scale: LayerScale | None = None
    subspace_boost: float | None = None
    recalibrate: str | None = None
    save_path: str | None = None
    notes: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "recipe"

    @property
    def is_finished(self) -> bool:
        """Whether the merged change is processed further, which takes the base."""
        return self.layer_scale is not None or self.subspace_boost is not None

    def references(self) -> dict[str, str]:
        """Every model that is named, with the YAML path where it is named first."""
        found: dict[str, str] = {}
        if self.base_model is not None:
            found[self.base_model] = "base_model"
        for source in (source for piece in self.slices for source in piece.sources):
            found.setdefault(source.model, source.where)
        for model in self.models if not self.slices else ():
            found.setdefault(model.model, model.where)
        return found


def is_seed(value: object) -> bool:
    """Whether a value can be the seed of random methods."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def canonical(recipe: Recipe) -> dict[str, Any]:
    """What a recipe asks for, as JSON-able values: equal for recipes that are only written differently."""
    return {
        "method": recipe.method,
        "models": [{"model": item.model, "parameters": dict(item.parameters)} for item in recipe.models],
        "slices": [
            {
                "sources": [
                    {
                        "model": source.model,
                        "layer_range": list(source.layer_range),
                        "parameters": dict(source.parameters),
                    }
                    for source in piece.sources
                ],
                "parameters": dict(piece.parameters),
            }
            for piece in recipe.slices
        ],
        "base_model": recipe.base_model,
        "parameters": dict(recipe.parameters),
        "dtype": recipe.dtype,
        "accumulate": recipe.accumulate,
        "seed": recipe.seed,
        "name": recipe.name,
        "tokenizer": recipe.tokenizer,
        "chat_template": recipe.chat_template,
        "heads": list(recipe.heads),
        "take": dict(recipe.take),
        "drop": list(recipe.drop),
        "output": recipe.output,
        "space": recipe.space,
        "rank": recipe.rank,
        "combination": None if recipe.combination is None else asdict(recipe.combination),
        "layer_scale": None if recipe.layer_scale is None else asdict(recipe.layer_scale),
        "subspace_boost": recipe.subspace_boost,
        "recalibrate": recipe.recalibrate,
    }
