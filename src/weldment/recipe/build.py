"""From one document of the native dialect to a `Recipe`, with every problem that the document alone shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weldment.errors import RecipeError
from weldment.methods import METHODS, Parameter
from weldment.recipe.dialects import refuse_foreign
from weldment.recipe.drm_file import is_file, read_file
from weldment.recipe.inputs import IMPLIED, experts_of, misfits, missing_base, slice_experts
from weldment.recipe.parameters import is_conditional
from weldment.recipe.peft_call import build_call, is_call
from weldment.recipe.recipe import LayerScale, ModelInput, Recipe, Settings, Slice, SliceSource
from weldment.recipe.schema import RecipeSection, check_shape
from weldment.recipe.settings import Findings, Steps, settings_by_path
from weldment.recipe.words import Place, shown, suggestion, yaml_path

NO_CHANGE = "\0no change"
"""Stands for a base of adapters; no model has this name."""


def build_recipe(document: Mapping[str, Any], place: Place) -> tuple[Recipe | None, list[RecipeError]]:
    """The recipe that a plain document describes, or None and all that is wrong with it."""
    if is_call(document):
        return build_call(document, place)
    if is_file(document):
        return _build_file(document, place)
    try:
        refuse_foreign(document, place)
    except RecipeError as error:
        return None, [error]
    section, shape_problems = check_shape(document, place)
    findings = Findings(shape_problems)
    settings = settings_by_path(document, place, findings)
    if section is None or (section.models is None) == (section.slices is None):
        return None, findings.problems
    return _checked(_Builder(section, settings, place).recipe(document), section, findings, place)


def _build_file(document: Mapping[str, Any], place: Place) -> tuple[Recipe | None, list[RecipeError]]:
    """The recipe that a configuration file of DRM's stands for, or None and all that is wrong with it."""
    file = read_file(document, place)
    if file.section is None or file.findings.problems:
        return None, file.findings.problems
    recipe = _Builder(file.section, file.settings, place).recipe(document)
    return _checked(replace(recipe, save_path=file.section.save_path), file.section, file.findings, place)


def _checked(
    recipe: Recipe, section: RecipeSection, findings: Findings, place: Place
) -> tuple[Recipe | None, list[RecipeError]]:
    """The recipe with its notes, or None and what was found and what only the whole recipe shows to be wrong."""
    problems, notes = misfits(_with_base(recipe), place)
    findings.problems += [*problems, *_unknown_models(section, recipe, place)]
    findings.problems += missing_parameters(recipe, place)
    if findings.problems:
        return None, [*baseless(recipe), *findings.problems]
    return replace(recipe, notes=(*findings.notes, *dict.fromkeys(notes), *_dtype_notes(recipe))), []


def baseless(recipe: Recipe) -> list[RecipeError]:
    """The errors of a recipe without the base that its method, or what is done after it, needs.

    They stand unless all models are adapters, for which the base is no change at all; the recipe alone does not
    show that.
    """
    return missing_base(recipe, Place(recipe.origin))


def _with_base(recipe: Recipe) -> Recipe:
    """The recipe with a base where adapters alone would have one: no change, or the first of the models."""
    if recipe.slices or not baseless(recipe):
        return recipe
    return replace(recipe, base_model=recipe.models[0].model if METHODS[recipe.method].base_is_model else NO_CHANGE)


@dataclass(frozen=True)
class _Builder:
    """Puts the parts of a recipe together; `settings` are those of all levels by their place."""

    section: RecipeSection
    settings: Mapping[Steps, dict[str, Any]]
    place: Place

    def recipe(self, document: Mapping[str, Any]) -> Recipe:
        section = self.section
        has_out_dtype = "out_dtype" in section.model_fields_set
        return Recipe(
            method=section.merge_method,
            models=tuple(self._models()),
            slices=tuple(self._slices()),
            base_model=section.base_model,
            parameters=self.settings.get(("parameters",), {}),
            dtype=section.out_dtype if has_out_dtype else section.dtype,
            accumulate=section.accumulate,
            seed=section.seed,
            name=section.name,
            tokenizer=_tokenizer(document),
            chat_template=section.chat_template,
            output=section.output,
            space=section.space,
            rank=section.rank,
            layer_scale=section.layer_scale and LayerScale(section.layer_scale.first, section.layer_scale.last),
            subspace_boost=section.subspace_boost,
            recalibrate=section.recalibrate,
            heads=section.heads,
            take=section.take,
            drop=section.drop,
            source=document,
            origin=self.place.origin,
        )

    def _models(self) -> Iterator[ModelInput]:
        inputs = {name: ("input_model_parameters", name) for name in self.section.input_model_parameters}
        if self.section.models is None:
            for name, steps in inputs.items():
                yield ModelInput(name, self.settings.get(steps, {}), yaml_path(steps))
        for index, entry in enumerate(self.section.models or ()):
            own = self.settings.get(("models", index, "parameters"), {})
            shared = self.settings.get(inputs.get(entry.model, ()), {})
            yield ModelInput(entry.model, _over(own, shared), f"models[{index}]")

    def _slices(self) -> Iterator[Slice]:
        for index, piece in enumerate(self.section.slices or ()):
            sources = [
                SliceSource(
                    source.model,
                    source.layer_range,
                    self.settings.get(("slices", index, "sources", number, "parameters"), {}),
                    f"slices[{index}].sources[{number}]",
                )
                for number, source in enumerate(piece.sources)
            ]
            settings = self.settings.get(("slices", index, "parameters"), {})
            yield Slice(tuple(self._with_base(sources)), settings, f"slices[{index}]")

    def _with_base(self, sources: Sequence[SliceSource]) -> Sequence[SliceSource]:
        """The sources, and the base before them where it is one of the merged models but is not listed."""
        base = self.section.base_model
        is_merged = METHODS[self.section.merge_method].base_is_model
        if base is None or not is_merged or any(source.model == base for source in sources):
            return sources
        return [SliceSource(base, sources[0].layer_range, where=IMPLIED), *sources]


def _over(own: Settings, shared: Settings) -> dict[str, Any]:
    """Settings of which `own` win; where the filters of `own` do not fit, `shared` ones apply."""
    merged = {**shared, **own}
    for name in own.keys() & shared.keys():
        entries = [own[name], shared[name]]
        listed = [entry if is_conditional(entry) else [{"filter": None, "value": entry}] for entry in entries]
        merged[name] = [*listed[0], *listed[1]]
    return merged


def _tokenizer(document: Mapping[str, Any]) -> Any:
    """`tokenizer` as written, a union if it does not say; the older `tokenizer_source` as what stands for it."""
    if document.get("tokenizer_source") is not None:
        return {"source": document["tokenizer_source"]}
    written = document.get("tokenizer")
    return {"source": "union", **written} if isinstance(written, Mapping) else written


def _unknown_models(section: RecipeSection, recipe: Recipe, place: Place) -> list[RecipeError]:
    """Parameters for models that the recipe does not merge."""
    named = dict.fromkeys(entry.model for entry in section.models or ())
    named |= dict.fromkeys(source.model for piece in recipe.slices for source in piece.sources)
    return [
        place.at("input_model_parameters").problem(f"the recipe does not merge {shown(name)}", suggestion(name, named))
        for name in section.input_model_parameters
        if name not in named
    ]


def missing_parameters(recipe: Recipe, place: Place) -> list[RecipeError]:
    """An error for every required parameter that has no value at any level."""
    required = [parameter for parameter in METHODS[recipe.method].parameters if parameter.required]
    missing = {
        (parameter.name, path): _advice(parameter, path, place, recipe.method)
        for parameter in required
        for path, levels in _level_chains(recipe, parameter)
        if not any(parameter.name in settings for settings in levels)
    }
    return list(missing.values())


def _advice(parameter: Parameter, path: str, place: Place, method: str) -> RecipeError:
    fix = f"Add `{parameter.name}: ...` there: {parameter.help}"
    return place.at(path, "parameters").problem(f"{method} needs `{parameter.name}`", fix)


def _level_chains(recipe: Recipe, parameter: Parameter) -> Iterator[tuple[str, tuple[Settings, ...]]]:
    """Where a parameter may stand: the path to name, and the levels to look at."""
    own = {model.model: model.parameters for model in recipe.models}
    if not parameter.per_model:
        for piece in recipe.slices or (Slice(()),):
            yield "", (piece.parameters, recipe.parameters)
    elif not recipe.slices:
        for model in experts_of(recipe):
            yield model.where, (model.parameters, recipe.parameters)
    for piece in recipe.slices if parameter.per_model else ():
        for source in slice_experts(recipe, piece):
            shared = own.get(source.model, {})
            yield source.where, (source.parameters, piece.parameters, shared, recipe.parameters)


def _dtype_notes(recipe: Recipe) -> list[str]:
    if recipe.dtype != "F64" or recipe.accumulate == "float64":
        return []
    return ["the output is float64 but is calculated in float32; `accumulate: float64` changes that"]
