"""The shape of a recipe's `twin` section: which keys there are and what each may hold."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from weldment.recipe.schema import Dtype, Patterns, Reference, RefusedError, Section, Sections, Settings, Text
from weldment.recipe.words import shown, suggestion

KINDS = ("svd", "magnitude", "random")
ROUTERS = ("mlp", "centroid", "arrow", "fixed", "uniform")


def _one_of(words: tuple[str, ...], what: str) -> BeforeValidator:
    def check(value: object) -> object:
        if value not in words:
            raise RefusedError(f"{shown(value)} is not {what}", suggestion(str(value), words))
        return value

    return BeforeValidator(check)


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise RefusedError(f"{shown(value)} is not true or false")
    return value


def _whole(least: int) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RefusedError(f"{shown(value)} is not a whole number of at least {least}")
        return value

    return BeforeValidator(check)


def _positive(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
        raise RefusedError(f"{shown(value)} is not a number above 0")
    return float(value)


def _not_negative(value: object) -> object:
    if value == 0 and not isinstance(value, bool):
        return 0.0
    return _positive(value)


def _folders(value: object) -> object:
    if not isinstance(value, dict):
        raise RefusedError(f"{shown(value)} is not a mapping", "Write the name of each expert with its task folder")
    return value


def _empty(value: object) -> object:
    return {} if value is None else value


class SharedSection(Section):
    """`twin.shared`: a merge, or a model that is there."""

    merge_method: Text = None
    parameters: Settings = Field(default_factory=dict)
    model: Reference | None = None


class ExclusiveSection(Section):
    """`twin.exclusive`: how the experts' own parts are compressed; numbers are checked with the recipe's place."""

    kind: Annotated[str, _one_of(KINDS, "a kind of compression")] = "svd"
    rank: Any = None
    density: Any = None
    energy: Any = None
    rescale: Annotated[bool, BeforeValidator(_flag)] = True
    dtype: Dtype = None


class RouterSection(Section):
    """`twin.router`; what is not given is as the router has it."""

    kind: Annotated[str | None, _one_of(ROUTERS, "a kind of router")] = None
    data: Annotated[dict[str, Text], BeforeValidator(_folders)] = Field(default_factory=dict)
    expert: Text = None
    top_k: Annotated[int | None, _whole(1)] = None
    temperature: Annotated[float | None, BeforeValidator(_positive)] = None
    fallback: Annotated[bool | None, BeforeValidator(_flag)] = None
    seed: Annotated[int | None, _whole(0)] = None
    fallback_share: Annotated[float | None, BeforeValidator(_positive)] = None
    min_weight: Annotated[float | None, BeforeValidator(_not_negative)] = None
    examples: Annotated[int | None, _whole(1)] = None
    max_length: Annotated[int | None, _whole(1)] = None
    layers: Text = None
    width: Annotated[int | None, _whole(1)] = None
    epochs: Annotated[int | None, _whole(1)] = None


class TwinSection(Section):
    """`twin`."""

    shared: Annotated[SharedSection, BeforeValidator(_empty)] = Field(default_factory=SharedSection)
    exclusive: Annotated[ExclusiveSection, BeforeValidator(_empty)] = Field(default_factory=ExclusiveSection)
    exclude: Patterns = ("*.bias",)
    router: Annotated[RouterSection, BeforeValidator(_empty)] = Field(default_factory=RouterSection)


SECTIONS: Sections = {
    (): TwinSection,
    ("shared",): SharedSection,
    ("exclusive",): ExclusiveSection,
    ("router",): RouterSection,
}
