"""The models of one merge, their tensors brought under common names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weldment.checkpoint.model import Checkpoint, TensorEntry
from weldment.methods import METHODS, Method
from weldment.planning.names import Rename, align
from weldment.recipe import experts_of
from weldment.recipe.recipe import ModelInput, Recipe

Aligned = Mapping[str, Mapping[str, TensorEntry]]
"""By model reference: its tensors under the names of the reference model."""


@dataclass(frozen=True)
class Inputs:
    """What a merge starts from.

    Attributes:
        models: every model that the recipe names, opened.
        experts: the merged models, in order.
        base: the base that takes part in the arithmetic, be it that after the method; None if there is none.
        reference: the model that gives the tensors' names and their order, the configuration and the side files.
        tensors: of every model, under the reference's names.
        notes: how names were matched.
    """

    recipe: Recipe
    method: Method
    models: Mapping[str, Checkpoint]
    experts: tuple[ModelInput, ...]
    base: str | None
    reference: str
    tensors: Aligned
    notes: tuple[str, ...]

    @property
    def participants(self) -> list[str]:
        """The base, if it takes part, and the experts, each once."""
        listed = [expert.model for expert in self.experts]
        return list(dict.fromkeys([*([self.base] if self.base else []), *listed]))


def gather(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Inputs:
    """Find out what each model is in this merge and match the names of its tensors."""
    method = METHODS[recipe.method]
    experts = experts_of(recipe)
    reference = recipe.base_model or (recipe.slices[0].sources[0] if recipe.slices else experts[0]).model
    tensors: dict[str, Mapping[str, TensorEntry]] = {}
    renamed: dict[str, list[str]] = {}
    for model, checkpoint in models.items():
        tensors[model], renames = under_names_of(models[reference], checkpoint)
        for change in renames:
            renamed.setdefault(str(change), []).append(model)
    notes = [
        f"tensor names of {' and '.join(found)} were matched to {reference} by prefix: {change}"
        for change, found in renamed.items()
    ]
    notes += [note for checkpoint in models.values() for note in checkpoint.notes]
    base = recipe.base_model if method.takes_base or recipe.is_finished else None
    return Inputs(recipe, method, models, tuple(experts), base, reference, tensors, tuple(notes))


def under_names_of(reference: Checkpoint, model: Checkpoint) -> tuple[Mapping[str, TensorEntry], tuple[Rename, ...]]:
    """The tensors of a model under the names of another one, and which prefixes were replaced for that."""
    shapes, wanted = ({name: entry.shape for name, entry in m.tensors.items()} for m in (model, reference))
    names, renames = align(shapes, wanted)
    return {names[name]: entry for name, entry in model.tensors.items()}, renames
