"""DRM's own configuration file as a recipe.

models:
  - model: models/chat
    parameters: {coefficient: 1.0}
base_model: models/base
merging_config: {singular_matrices_drop_rate: 0.8, direction: vertical, linear_parameter_regex_pattern: [".*weight"]}
save_path: out
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from weldment.errors import RecipeError
from weldment.methods import METHODS
from weldment.methods.spectral.matrices import LINEAR
from weldment.recipe.schema import RecipeSection, RefusedError, Settings, Text, check_section
from weldment.recipe.settings import Findings, Steps, check_settings
from weldment.recipe.words import Place, suggestion

METHOD = "drm"
ALL_AVERAGED = f"without `{LINEAR.name}` nothing is decomposed, as in DRM's code: all tensors are trimmed and averaged"

_DTYPE = "svd_dtype"
_NATIVE_ONLY = ("merge_method", "slices", "input_model_parameters", "parameters")
_REQUIRED = {
    "models": "List the models to merge",
    "base_model": "Add `base_model:` with the model that the others were fine-tuned from",
}


def _path(value: object) -> object:
    """Text that can name a folder."""
    try:
        is_path = not isinstance(value, str) or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise RefusedError("the text has characters that no path can have")
    return value


class FileSection(RecipeSection):
    """A whole file: the keys of a native recipe but for `_NATIVE_ONLY`, and DRM's own."""

    merging_config: Settings = Field(default_factory=dict)
    save_path: Annotated[Text, BeforeValidator(_path)] = None


# DRM calls the dtype of the changes `dtype`.
_ROW = replace(
    METHODS[METHOD],
    parameters=tuple(
        replace(parameter, name="dtype" if parameter.name == _DTYPE else parameter.name)
        for parameter in METHODS[METHOD].parameters
    ),
)
_OF_MODELS = [parameter.name for parameter in _ROW.parameters if parameter.per_model]
_OF_THE_MERGE = [parameter.name for parameter in _ROW.parameters if not parameter.per_model]
_OWN = ["models", "base_model", "merging_config", "save_path"]
_KEYS = [*_OWN, *(key for key in FileSection.model_fields if key not in {*_OWN, *_NATIVE_ONLY})]


@dataclass(frozen=True)
class DrmFile:
    """What a file says, as a recipe's parts.

    Attributes:
        section: None if the shape of the file is wrong.
        settings: of each model and of the merge, under the names and at the places of a native recipe.
        findings: all that is wrong with the file, and notes.
    """

    section: FileSection | None
    settings: Mapping[Steps, dict[str, Any]]
    findings: Findings


def is_file(document: Mapping[str, Any]) -> bool:
    """Whether a document is a configuration file of DRM's rather than a recipe of the native dialect."""
    return ("merging_config" in document or "save_path" in document) and document.get("merge_method") is None


def read_file(document: Mapping[str, Any], place: Place) -> DrmFile:
    """A file of DRM's, checked as the native recipe that it stands for."""
    given = {key: value for key, value in document.items() if value is not None}
    findings = Findings([*_absent(given, place), *_unknown(given, _KEYS, place)])
    # A model stands in for missing ones, whose absence has been said.
    native = {"models": ["?"], **{key: given[key] for key in _KEYS if key in given}, "merge_method": METHOD}
    section, problems = check_section(native, place, FileSection)
    findings.problems += problems
    settings = {("parameters",): _settings_of_merge(given.get("merging_config"), place.at("merging_config"), findings)}
    return DrmFile(section, {**settings, **_settings_of_models(given.get("models"), place, findings)}, findings)


def _absent(given: Mapping[str, Any], place: Place) -> Iterator[RecipeError]:
    for key, advice in _REQUIRED.items():
        if key not in given:
            yield place.problem(f"the key `{key}` is missing", advice)


def _unknown(written: Mapping[str, Any], known: Iterable[str], place: Place) -> Iterator[RecipeError]:
    for key in written:
        if key not in known:
            yield place.at(key).problem(f"there is no key `{key}`", _advice(key, known))


def _advice(key: str, known: Iterable[str]) -> str:
    if known is _KEYS and key in _OF_THE_MERGE:
        return f"Write it as `merging_config: {{{key}: ...}}`"
    if known is _KEYS and key in _NATIVE_ONLY:
        return "Parameters stand under `merging_config`; with `merge_method: drm` in its place this is a native recipe"
    return suggestion(key, known)


def _settings_of_merge(written: object, place: Place, findings: Findings) -> dict[str, Any]:
    settings = _settings(written, _OF_THE_MERGE, place, findings)
    if "dtype" in settings:
        settings[_DTYPE] = settings.pop("dtype")
    if LINEAR.name not in settings:
        settings[LINEAR.name] = ()
        findings.notes[ALL_AVERAGED] = None
    return settings


def _settings_of_models(models: object, place: Place, findings: Findings) -> dict[Steps, dict[str, Any]]:
    """The settings of the models as far as they have the right shape; `check_section` tells of the others."""
    return {
        ("models", index, "parameters"): _settings(
            entry.get("parameters"), _OF_MODELS, place.at("models", index, "parameters"), findings
        )
        for index, entry in enumerate(models if isinstance(models, list) else [])
        if isinstance(entry, Mapping)
    }


def _settings(written: object, known: Iterable[str], place: Place, findings: Findings) -> dict[str, Any]:
    if not isinstance(written, Mapping):
        return {}
    findings.problems += _unknown(written, known, place)
    kept = {key: value for key, value in written.items() if key in known}
    return check_settings(_ROW, kept, "model" if known is _OF_MODELS else "merge", place, findings)
