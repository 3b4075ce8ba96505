"""Recipes of bundles: an ordinary recipe, whose merge makes the shared model, with a `twin` section."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weldment.checkpoint.dtypes import torch_dtype
from weldment.errors import RecipeError, joined
from weldment.methods import METHODS, Parameter
from weldment.recipe import Recipe
from weldment.recipe.build import build_recipe
from weldment.recipe.loading import read_documents
from weldment.recipe.overrides import apply_overrides
from weldment.recipe.parameters import is_conditional, value_of
from weldment.recipe.recipe import ModelInput, Settings
from weldment.recipe.schema import validated
from weldment.recipe.settings import Findings, read_setting
from weldment.recipe.words import Place, shown, yaml_path
from weldment.twin.sections import SECTIONS, ExclusiveSection, RouterSection, SharedSection, TwinSection

LAMBDA = 0.3
"""The factor of the sum of the task vectors in the shared model, if the recipe gives none."""

DENSITY = 0.1
"""The share of the singular values (or elements) that is kept, if the recipe does not say how much."""

ENERGY = 0.99
AUTO = "auto"

_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)
_IDLE = ("slices", "output", "space", "rank", "name")
"""Keys of ordinary recipes that have no meaning here."""

_NUMBERS = {
    "rank": Parameter("rank", "", minimum=1.0),
    "density": Parameter("density", "", minimum=0.0, maximum=1.0, open_minimum=True),
    "energy": Parameter("energy", "", minimum=0.0, maximum=1.0, open_minimum=True),
}


@dataclass(frozen=True)
class Exclusive:
    """How much of the experts' own parts is kept.

    Attributes:
        kind: "svd", "magnitude" or "random".
        settings: `rank` or `density` or (rank: auto) `energy`, as written: a number, a gradient or a list of
            {filter, value}.
        rescale: "random": divide what is kept by the share that is.
        dtype: safetensors name of the dtype of what is stored, None for that of the shared model's tensor.
    """

    kind: str = "svd"
    settings: Settings = field(default_factory=lambda: {"density": DENSITY})
    rescale: bool = True
    dtype: str | None = None

    def amount(self, tensor: str, position: float | None) -> tuple[str, float]:
        """What is said of one tensor: "rank", "density" or "energy", and the number.

        Args:
            position: 0 for the first layer, 1 for the last, None outside layers.
        """
        (key,) = self.settings
        value = value_of(_NUMBERS[key], (self.settings,), tensor, position)
        if value is None:
            fix = "End the list of filters with an entry that has a value only"
            raise RecipeError(f"no entry of `{key}` fits this tensor", where=f"twin.exclusive.{key}: {tensor}", fix=fix)
        return key, value

    def record(self) -> dict[str, Any]:
        """For `twin.json`."""
        return {
            "kind": self.kind,
            **self.settings,
            **({"rescale": self.rescale} if self.kind == "random" else {}),
            **({"dtype": str(torch_dtype(self.dtype)).removeprefix("torch.")} if self.dtype else {}),
        }


@dataclass(frozen=True)
class TwinRecipe:
    """A checked recipe.

    Attributes:
        merge: the merge of the experts; where the shared model is there already, it is not run as it stands.
        shared: the model that is there already, or None.
        names: of the experts that the recipe gives names, by their reference.
        exclude: patterns of the tensors that experts share.
        router: what the recipe says of it.
        source: the document after overrides.
    """

    merge: Recipe
    shared: str | None
    names: Mapping[str, str]
    exclusive: Exclusive
    exclude: tuple[str, ...]
    router: RouterSection
    source: Mapping[str, Any]

    @property
    def place(self) -> Place:
        return Place(self.merge.origin)

    @property
    def experts(self) -> tuple[ModelInput, ...]:
        """The models whose own parts are kept: those that are listed, without the base."""
        is_one = METHODS[self.merge.method].base_is_model
        return tuple(item for item in self.merge.models if is_one or item.model != self.merge.base_model)


def load_twin_recipe(
    source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), seed: int | None = None
) -> TwinRecipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, or its content.
        overrides: `path=value` changes.
        seed: replaces the recipe's.

    Raises:
        RecipeError: with everything that is wrong.
    """
    documents, origin = read_documents(source)
    place = Place(origin)
    if len(documents) > 1:
        fix = "Merge in steps first, and name the result as `twin: {shared: {model: FOLDER}}`"
        raise place.problem("a bundle is built by a recipe of one document", fix)
    document = documents[0]
    apply_overrides(document, overrides)
    if seed is not None:
        document["seed"] = seed
    twin = document.get("twin")
    if not isinstance(twin, dict):
        cause = "there is no `twin` section" if twin is None else f"{shown(twin)} is not a mapping"
        raise place.at("twin").problem(cause, "Add `twin: {}`, or say how the bundle is to be made")
    return _checked(document, twin, place)


def _checked(document: Mapping[str, Any], twin: Mapping[str, Any], place: Place) -> TwinRecipe:
    section, problems = validated(twin, place.at("twin"), TwinSection, SECTIONS)
    names, name_problems = _names(document, place)
    shared = section.shared if section is not None else SharedSection()
    merge, merge_problems = _merge(document, shared, place)
    found = [*problems, *name_problems, *merge_problems]
    exclusive = Exclusive()
    if section is not None:
        exclusive, wrong = _exclusive(section.exclusive, twin.get("exclusive") or {}, place.at("twin", "exclusive"))
        found += [*wrong, *_router(section.router, place.at("twin", "router"))]
    if found or merge is None or section is None:
        raise joined(RecipeError, found)
    named = {item.model: names[item.where] for item in merge.models if item.where in names}
    recipe = TwinRecipe(merge, shared.model, named, exclusive, section.exclude, section.router, document)
    if problems := _expert_problems(recipe):
        raise joined(RecipeError, problems)
    return recipe


def _names(document: Mapping[str, Any], place: Place) -> tuple[dict[str, str], list[RecipeError]]:
    """The names that items of `models` give, by the items' places."""
    found: dict[str, str] = {}
    problems: list[RecipeError] = []
    for index, item in enumerate(_listed(document)):
        if not isinstance(item, Mapping) or item.get("name") is None:
            continue
        name, at = item["name"], place.at("models", index, "name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(at.problem(f"{shown(name)} is not a name: letters, digits, `_`, `-` and `.`"))
        elif name.lower() in (other.lower() for other in found.values()):
            problems.append(at.problem(f"two experts are named `{name}`", "Rename one of them"))
        else:
            found[yaml_path(("models", index))] = name
    return found, problems


def _listed(document: Mapping[str, Any]) -> Sequence[Any]:
    models = document.get("models")
    return models if isinstance(models, list) else []


def _merge(document: Mapping[str, Any], shared: SharedSection, place: Place) -> tuple[Recipe | None, list[RecipeError]]:
    """The ordinary recipe that makes the shared model."""
    plain = {key: value for key, value in document.items() if key != "twin"}
    plain["models"] = [_without_name(item) for item in _listed(document)] or document.get("models")
    problems = list(_idle_keys(plain, shared, place))
    is_inner = "merge_method" not in plain
    if is_inner:
        plain |= {"merge_method": shared.merge_method or "task_arithmetic", "parameters": dict(shared.parameters)}
        if plain["merge_method"] == "task_arithmetic":
            plain["parameters"] = {"lambda": LAMBDA, **plain["parameters"]}
    if shared.model is not None:
        # No arithmetic: the plan is that of the experts' tensors, with the shared model in the place of the base.
        plain |= {"parameters": {"lambda": 0.0}, "accumulate": "float64"}
    recipe, found = build_recipe(plain, place)
    return recipe, [*problems, *(_moved(problem, place) if is_inner else problem for problem in found)]


def _without_name(item: Any) -> Any:
    return {key: value for key, value in item.items() if key != "name"} if isinstance(item, Mapping) else item


def _moved(problem: RecipeError, place: Place) -> RecipeError:
    """A problem with the method or its parameters, where the recipe writes them."""
    for key in ("parameters", "merge_method"):
        if problem.where and problem.where.startswith(str(place.at(key))):
            where = f"{place.at('twin', 'shared', key)}{problem.where[len(str(place.at(key))) :]}"
            return RecipeError(problem.cause, where=where, fix=problem.fix)
    return problem


def _idle_keys(plain: Mapping[str, Any], shared: SharedSection, place: Place) -> Iterator[RecipeError]:
    for key in _IDLE:
        if plain.get(key) is not None:
            yield place.at(key).problem(f"`{key}` has no meaning for a bundle", "Remove it")
    at = place.at("twin", "shared")
    if shared.model is not None and (shared.merge_method is not None or shared.parameters):
        yield at.problem("`model` is a model that is there, and is not merged", "Keep `model` or `merge_method`")
    if "merge_method" not in plain and plain.get("parameters"):
        fix = "Move them to `twin: {shared: {parameters: ...}}`"
        yield place.at("parameters").problem("the parameters belong to no method", fix)
    if "merge_method" in plain and shared.model_fields_set:
        fix = "Remove `merge_method` from the top of the recipe, or `twin.shared`"
        yield at.problem("the shared model is also said to be made by `merge_method`", fix)


def _exclusive(
    section: ExclusiveSection, written: Mapping[str, Any], place: Place
) -> tuple[Exclusive, list[RecipeError]]:
    """The settings, checked and typed."""
    problems = list(_contradictions(section, place))
    findings = Findings()
    settings: dict[str, Any] = {}
    for key, parameter in _NUMBERS.items():
        value = getattr(section, key)
        if value is not None and not (key == "rank" and value == AUTO):
            settings[key] = read_setting(parameter, value, place.at(key), findings)
    if section.rank == AUTO:
        settings.setdefault("energy", ENERGY)
    problems += findings.problems
    if not findings.problems and (odd := [n for n in _values(settings.get("rank")) if n != int(n)]):
        problems.append(place.at("rank").problem(f"{odd[0]:g} is not a whole number of singular values"))
    is_given = "rescale" in written and section.kind != "random"
    if is_given:
        problems.append(place.at("rescale").problem("`rescale` is of the kind `random`", "Remove it"))
    return Exclusive(section.kind, settings or {"density": DENSITY}, section.rescale, section.dtype), problems


def _contradictions(section: ExclusiveSection, place: Place) -> Iterator[RecipeError]:
    if section.rank is not None and section.density is not None:
        yield place.problem("both `rank` and `density` say how much is kept", "Keep one of them")
    if section.energy is not None and section.rank != AUTO:
        yield place.at("energy").problem("`energy` goes with `rank: auto`", "Write `rank: auto`, or remove it")
    if section.kind != "svd" and section.rank is not None:
        fix = "Write `density`, the share of the elements that is kept"
        yield place.at("rank").problem(f"`rank` is of the kind `svd`, and this is `{section.kind}`", fix)


def _values(setting: Any) -> Iterator[float]:
    """Every number in a setting."""
    if is_conditional(setting):
        for entry in setting:
            yield from _values(entry["value"])
    elif setting is not None:
        yield from setting if isinstance(setting, list) else [setting]


def _router(section: RouterSection, place: Place) -> Iterator[RecipeError]:
    """What contradicts itself in the section."""
    if section.kind == "fixed" and section.expert is None:
        yield place.problem("a fixed router needs `expert`", "Add `expert:` with the name of one")
    if section.expert is not None and section.kind != "fixed":
        yield place.at("expert").problem("`expert` is of the kind `fixed`", "Write `kind: fixed`, or remove it")
    if section.kind in ("mlp", "centroid") and not section.data:
        fix = "Add `data:` with the task folder of every expert, or use arrow, fixed or uniform"
        yield place.problem(f"the router `{section.kind}` learns from examples, and there are none", fix)
    if section.kind in ("arrow", "fixed", "uniform") and section.data:
        fix = "Remove it, or use mlp or centroid"
        yield place.at("data").problem(f"the router `{section.kind}` takes no data", fix)


def _expert_problems(recipe: TwinRecipe) -> list[RecipeError]:
    """Experts that are not there, or there twice."""
    place, references = recipe.place, [item.model for item in recipe.experts]
    repeated = [reference for reference, times in Counter(references).items() if times > 1]
    problems = [
        place.at("models").problem(f"{reference} is listed {Counter(references)[reference]} times", "List it once")
        for reference in repeated
    ]
    if not references:
        problems.append(place.at("models").problem("there are no experts besides the base", "Name some"))
    return problems


def check_router(recipe: TwinRecipe, names: Sequence[str]) -> list[RecipeError]:
    """What of the router does not fit the experts, whose names are known once the models are opened."""
    section, place = recipe.router, recipe.place.at("twin", "router")
    known = f"The experts are: {', '.join(names)}"
    problems = [
        place.at("data", name).problem(f"there is no expert `{name}`", known)
        for name in section.data
        if name not in names
    ]
    lacking = [name for name in names if section.data and name not in section.data]
    if lacking:
        fix = "Add the task folder of each, or leave the expert out"
        problems.append(place.at("data").problem(f"there are no examples for {', '.join(lacking)}", fix))
    problems += [
        place.at("data", name).problem(f"there is no folder {shown(folder)}", "Give a task folder")
        for name, folder in section.data.items()
        if not Path(str(folder)).expanduser().is_dir()
    ]
    if section.expert is not None and section.expert not in names:
        problems.append(place.at("expert").problem(f"there is no expert `{section.expert}`", known))
    if section.top_k is not None and section.top_k > len(names):
        problems.append(place.at("top_k").problem(f"top_k is {section.top_k}, and there are {len(names)} experts"))
    return problems


def with_defaults(section: RouterSection, exclusive: Exclusive) -> RouterSection:
    """The section with its kind: learned where there are examples, else from the adapters, else uniform."""
    kind = section.kind or ("mlp" if section.data else "arrow" if exclusive.kind == "svd" else "uniform")
    return section.model_copy(update={"kind": kind})


def with_base(recipe: Recipe, base: str) -> Recipe:
    """The merge with another model in the place of the base, which is none of the experts."""
    models = tuple(item for item in recipe.models if item.model != recipe.base_model)
    return replace(recipe, base_model=base, models=models)
