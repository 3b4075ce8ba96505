"""Recipes: what the user asks for, read, checked and frozen."""

from __future__ import annotations

from weldment.recipe.inputs import experts_of, slice_experts
from weldment.recipe.loading import load_recipes
from weldment.recipe.parameters import resolve
from weldment.recipe.recipe import ModelInput, Recipe, Slice, SliceSource, canonical

__all__ = [
    "ModelInput",
    "Recipe",
    "Slice",
    "SliceSource",
    "canonical",
    "experts_of",
    "load_recipes",
    "resolve",
    "slice_experts",
]
