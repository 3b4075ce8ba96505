"""The shape of a recipe: which keys there are and what each may hold.

Parameters of methods are only checked to be mappings here; `settings` knows what they mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from weldment.checkpoint import dtypes
from weldment.errors import RecipeError
from weldment.methods import METHODS, Parameter
from weldment.methods.arguments import checked
from weldment.recipe.recipe import OUTPUTS, RANKS, SEED, SPACES, is_seed
from weldment.recipe.settings import coerced, known_parameters
from weldment.recipe.words import Place, shown, suggestion

_NAME = re.compile(r"\w[\w.-]*")
_TEXT_RANGE = re.compile(r"\D*(\d+)\D+(\d+)\D*", re.ASCII)


class RefusedError(ValueError):
    """A value that its validator refuses, with the parts of a message."""

    def __init__(self, cause: str, fix: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.fix = fix


def _reference(value: object) -> object:
    """A model as one string; `{model: {path, revision}, lora: {path, revision}}` is written out."""
    if isinstance(value, Mapping):
        value = _written_out(value)
    if not isinstance(value, str):
        raise RefusedError(f"{shown(value)} is not a model: a path, org/name, org/name@revision or base+adapter")
    if not value.strip():
        raise RefusedError("a model is an empty text")
    return value.strip().rstrip("/") or "/"


def _written_out(value: Mapping[str, Any]) -> str:
    allowed = {"model", "lora"} if "model" in value else {"path", "revision"}
    wrong = [key for key in value if key not in allowed]
    if wrong:
        raise RefusedError(f"`{wrong[0]}` has no meaning in a model", suggestion(wrong[0], sorted(allowed)))
    if "model" in value:
        parts = [value["model"], *([value["lora"]] if value.get("lora") is not None else [])]
        return "+".join(str(_reference(part)) for part in parts)
    if not isinstance(value.get("path"), str):
        raise RefusedError(f"{shown(dict(value))} is not a model: `path` is missing")
    revision = value.get("revision")
    if not (revision is None or isinstance(revision, str)):
        raise RefusedError(f"the revision {shown(revision)} is not text", "Put it in quotes")
    return f"{value['path']}@{revision}" if revision else value["path"]


def _whole_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layer_range(value: object) -> object:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(_whole_number, value)):
        cause = f"{shown(value)} is not two whole numbers [start, end], the end not included"
        raise RefusedError(cause, _range_advice(value))
    start, end = value
    if start < 0:
        raise RefusedError(f"{shown(value)} begins before layer 0")
    if start >= end:
        raise RefusedError(f"{shown(value)} is empty: in [start, end] the end must be greater")
    return start, end


def _range_advice(value: object) -> str | None:
    """How to write a range that is text, such as `0-4`."""
    match = _TEXT_RANGE.fullmatch(value) if isinstance(value, str) else None
    return match and f"Write it as [{match[1]}, {match[2]}], which ends before layer {match[2]}"


def _method(value: object) -> object:
    if not isinstance(value, str):
        raise RefusedError(f"{shown(value)} is not the name of a method")
    if value not in METHODS:
        raise RefusedError(f"there is no method {shown(value)}", suggestion(value, METHODS))
    return value


def _dtype(value: object) -> object:
    """The safetensors name of a dtype; None for `auto`."""
    if value is None or value == "auto":
        return None
    if not isinstance(value, str) or value not in dtypes.RECIPE:
        advice = suggestion(str(value), [*dtypes.RECIPE, "auto"])
        raise RefusedError(f"{shown(value)} is not a dtype that a merged model can have", advice)
    return dtypes.RECIPE[value]


def _accumulate(value: object) -> object:
    name = dtypes.FLOATS.get(dtypes.RECIPE.get(value, "")) if isinstance(value, str) else None
    if name not in ("float32", "float64"):
        raise RefusedError(f"{shown(value)} is not a dtype to calculate in: float32 or float64")
    return name


def _seed(value: object) -> object:
    if not is_seed(value):
        raise RefusedError(f"{shown(value)} is not a seed: {SEED}")
    return value


def _output(value: object) -> object:
    if value not in OUTPUTS:
        raise RefusedError(f"{shown(value)} is not what a merge of adapters can give", "Write adapter or model")
    return value


def _space(value: object) -> object:
    if value not in SPACES:
        cause = f"{shown(value)} is not a space that adapters can be merged in"
        raise RefusedError(cause, suggestion(str(value), SPACES))
    return value


def _rank(value: object) -> object:
    if value in RANKS or (_whole_number(value) and isinstance(value, int) and value >= 1):
        return value
    raise RefusedError(f"{shown(value)} is not a rank", "Write a whole number of at least 1, auto or full")


def _number(parameter: Parameter) -> BeforeValidator:
    """A number, checked as parameters of methods are."""

    def check(value: object) -> object:
        try:
            return checked(parameter, coerced(parameter, value))
        except ValueError as error:
            raise RefusedError(str(error)) from error

    return BeforeValidator(check)


def _merge_name(value: object) -> object:
    if value is not None and not (isinstance(value, str) and _NAME.fullmatch(value)):
        raise RefusedError(f"{shown(value)} is not a name: letters, digits, `_`, `-` and `.`")
    return value


def _text(value: object) -> object:
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise RefusedError(f"{shown(value)} is not text", "Put it in quotes if it is meant as text")
    return value


def _patterns(value: object) -> object:
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(item, str) and item for item in listed):
        raise RefusedError(f"{shown(value)} is not a list of patterns for tensor names, like ['*.lm_head.*']")
    return listed


def _token_source(value: object) -> object:
    return {"model": value} if isinstance(value, str) else value


def _entry(value: object) -> object:
    """A model alone stands for an entry without parameters."""
    is_model = isinstance(value, str) or (isinstance(value, Mapping) and ("path" in value or "lora" in value))
    if not is_model and not isinstance(value, Mapping):
        raise RefusedError(f"{shown(value)} is neither a model nor a mapping with the key `model`")
    return {"model": value} if is_model else value


def _or_empty(value: object) -> object:
    return {} if value is None else value


Reference = Annotated[str, BeforeValidator(_reference)]
Settings = Annotated[dict[str, Any], BeforeValidator(_or_empty)]
Dtype = Annotated[str | None, BeforeValidator(_dtype)]
Text = Annotated[str | None, BeforeValidator(_text)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]
_BOOST = Parameter("subspace_boost", "", minimum=0.0, maximum=1.0, open_maximum=True)


class Section(BaseModel):
    """A mapping of a recipe; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """An item of `models`."""

    model: Reference
    parameters: Settings = Field(default_factory=dict)


class SourceSection(Section):
    """An item of `slices[].sources`."""

    model: Reference
    layer_range: Annotated[tuple[int, int], BeforeValidator(_layer_range)]
    parameters: Settings = Field(default_factory=dict)


class SliceSection(Section):
    """An item of `slices`."""

    sources: tuple[SourceSection, ...] = Field(min_length=1)
    parameters: Settings = Field(default_factory=dict)


class TokenSourceSection(Section):
    """Where the embedding of one token comes from."""

    kind: Literal["zero", "model_token"] | None = None
    model: Reference | None = None
    token: Text = None
    token_id: Annotated[int, Field(strict=True, ge=0)] | None = None


class TokenSection(Section):
    """An item of `tokenizer.tokens`."""

    source: Annotated[TokenSourceSection, BeforeValidator(_token_source)]
    force: Annotated[bool, Field(strict=True)] = False


class TokenizerSection(Section):
    """`tokenizer`."""

    source: Reference | None = None
    tokens: Annotated[dict[str, TokenSection], BeforeValidator(_or_empty)] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[int, Field(strict=True, ge=1)] | None = None


class LayerScaleSection(Section):
    """`layer_scale`: factors of the first layer and of the last."""

    first: Annotated[float, _number(Parameter("from", "", minimum=0.0))] = Field(alias="from")
    last: Annotated[float, _number(Parameter("to", "", minimum=0.0))] = Field(alias="to")


class RecipeSection(Section):
    """A whole document."""

    merge_method: Annotated[str, BeforeValidator(_method)]
    models: tuple[Annotated[ModelSection, BeforeValidator(_entry)], ...] | None = Field(None, min_length=1)
    slices: tuple[SliceSection, ...] | None = Field(None, min_length=1)
    input_model_parameters: Annotated[dict[str, Settings], BeforeValidator(_or_empty)] = Field(default_factory=dict)
    base_model: Reference | None = None
    parameters: Settings = Field(default_factory=dict)
    dtype: Dtype = None
    out_dtype: Dtype = None
    accumulate: Annotated[str, BeforeValidator(_accumulate)] = "float32"
    seed: Annotated[int, BeforeValidator(_seed)] = 0
    name: Annotated[str | None, BeforeValidator(_merge_name)] = None
    tokenizer: TokenizerSection | None = None
    tokenizer_source: Text = None
    chat_template: Text = None
    output: Annotated[str | None, BeforeValidator(_output)] = None
    space: Annotated[str | None, BeforeValidator(_space)] = None
    rank: Annotated[int | str | None, BeforeValidator(_rank)] = None
    heads: Patterns = ()
    take: Annotated[dict[str, Reference], BeforeValidator(_or_empty)] = Field(default_factory=dict)
    drop: Patterns = ()
    layer_scale: LayerScaleSection | None = None
    subspace_boost: Annotated[float | None, _number(_BOOST)] = None
    recalibrate: Text = None


Whole = TypeVar("Whole", bound=RecipeSection)
Kind = TypeVar("Kind", bound=Section)
Sections = Mapping[tuple[str, ...], type[Section]]
"""The sections of a document, by the keys that lead to them."""

_SECTIONS: Sections = {
    (): RecipeSection,
    ("models",): ModelSection,
    ("slices",): SliceSection,
    ("slices", "sources"): SourceSection,
    ("layer_scale",): LayerScaleSection,
    ("tokenizer",): TokenizerSection,
    ("tokenizer", "tokens"): TokenSection,
    ("tokenizer", "tokens", "source"): TokenSourceSection,
}
_EXPECTED = {
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "literal_error": "`zero` or `model_token`",
}


def check_shape(document: Mapping[str, Any], place: Place) -> tuple[RecipeSection | None, list[RecipeError]]:
    """The document in its sections, or everything that is wrong with its shape."""
    return check_section(document, place, RecipeSection)


def check_section(
    document: Mapping[str, Any], place: Place, kind: type[Whole]
) -> tuple[Whole | None, list[RecipeError]]:
    """The same for documents with more keys."""
    section, problems = validated(document, place, kind, _SECTIONS)
    return section, problems if section is None else _contradictions(section, place)


def validated(
    document: Mapping[str, Any], place: Place, kind: type[Kind], sections: Sections
) -> tuple[Kind | None, list[RecipeError]]:
    """A mapping as a section, or everything that is wrong with its shape.

    Args:
        sections: it and those inside it, for advice about unknown keys.
    """
    try:
        # Unset optional keys (`dtype:` with nothing after it) are as good as absent.
        return kind.model_validate({key: value for key, value in document.items() if value is not None}), []
    except ValidationError as error:
        # A list whose items are all wrong is also reported as too short.
        found = [details for details in error.errors() if details["type"] != "too_short" or not details["input"]]
        return None, [_problem(details, place, sections) for details in found]


def _problem(details: ErrorDetails, place: Place, sections: Sections) -> RecipeError:
    steps = details["loc"]
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        key = str(steps[-1])
        return place.at(*steps).problem(f"there is no key `{key}`", _key_advice(key, _fields(steps[:-1], sections)))
    if kind == "missing":
        return place.at(*steps[:-1]).problem(f"the key `{steps[-1]}` is missing")
    if kind == "too_short":
        return place.at(*steps).problem("the list is empty")
    if kind == "value_error" and isinstance(refusal := details.get("ctx", {}).get("error"), RefusedError):
        return place.at(*steps).problem(refusal.cause, refusal.fix)
    if kind in _EXPECTED:
        return place.at(*steps).problem(f"{shown(value)} is not {_EXPECTED[kind]}")
    return place.at(*steps).problem(f"{shown(value)} is not valid: {details['msg'].lower()}")


def _key_advice(key: str, fields: Sequence[str]) -> str:
    if key in ("merging_config", "save_path"):
        return "It is a key of DRM's configuration files, which have no `merge_method`"
    if "parameters" in fields and key in known_parameters():
        return f"It is a parameter: write it as `parameters: {{{key}: ...}}`"
    return suggestion(key, fields)


def _fields(steps: tuple[int | str, ...], sections: Sections) -> list[str]:
    """The keys of the section at these steps; names of tokens are not steps of `_SECTIONS`."""
    keys = tuple(step for step in steps if isinstance(step, str))
    if keys[:2] == ("tokenizer", "tokens"):
        keys = (*keys[:2], *keys[3:])
    return sorted(field.alias or name for name, field in sections[keys].model_fields.items())


def _contradictions(section: RecipeSection, place: Place) -> list[RecipeError]:
    found: list[RecipeError] = []
    if section.models is None and section.slices is None:
        found.append(place.problem("there are no models", "Add `models:` with a list of them, or `slices:`"))
    if section.models is not None and section.slices is not None:
        fix = "Keep `slices`; parameters of one model go under `input_model_parameters`"
        found.append(place.at("models").problem("`models` and `slices` exclude each other", fix))
    if section.tokenizer is not None and section.tokenizer_source is not None:
        fix = "Write `source` under `tokenizer`"
        found.append(place.at("tokenizer_source").problem("`tokenizer` is given too", fix))
    idle = [key for key in ("space", "rank") if section.output == "model" and getattr(section, key) is not None]
    for key in idle:
        cause = f"`{key}` says how the merged adapter is made, and `output: model` makes none"
        found.append(place.at(key).problem(cause, "Remove one of the two"))
    return found + _unequal_slices(section, place)


def _unequal_slices(section: RecipeSection, place: Place) -> list[RecipeError]:
    found: list[RecipeError] = []
    for index, piece in enumerate(section.slices or ()):
        lengths = [source.layer_range[1] - source.layer_range[0] for source in piece.sources]
        if len(set(lengths)) > 1:
            cause = f"the sources have {', '.join(map(str, lengths))} layers; they must have equally many"
            fix = "Write ranges of one length, [start, end] with the end not included"
            found.append(place.at(*("slices", index, "sources")).problem(cause, fix))
    return found
