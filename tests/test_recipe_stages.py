from __future__ import annotations

import pytest

from weldment.errors import RecipeError
from weldment.recipe.recipe import ModelInput, Recipe, Slice, SliceSource
from weldment.recipe.stages import in_order, references


def merge(name: str | None, *models: str, base: str | None = None) -> Recipe:
    return Recipe("linear", tuple(ModelInput(model) for model in models), base_model=base, name=name)


def order(*recipes: Recipe) -> list[str | None]:
    return [recipe.name for recipe in in_order(recipes, "r.yml")]


def test_one_recipe_is_the_final_one_named_or_not() -> None:
    assert order(merge(None, "a", "b")) == [None]
    assert order(merge("x", "a", "b")) == ["x"]


def test_intermediates_come_before_those_that_use_them() -> None:
    final = merge(None, "y", "c")
    assert order(final, merge("y", "b", base="x"), merge("x", "a", "b")) == ["x", "y", None]


def test_if_all_have_names_the_one_that_nobody_uses_is_final() -> None:
    assert order(merge("z", "y", "x"), merge("x", "a"), merge("y", "x")) == ["x", "y", "z"]


def test_references_are_found_wherever_a_model_may_be_named() -> None:
    recipe = Recipe(
        "linear",
        (ModelInput("m+adapter"),),
        (Slice((SliceSource("s", (0, 1)),)),),
        base_model="b",
        take={"*": "t"},
        tokenizer={"source": "k", "tokens": {"<x>": {"source": {"model": "n"}}}},
    )
    assert {"m", "adapter", "s", "b", "t", "k", "n"} <= references(recipe)


@pytest.mark.parametrize(
    ("recipes", "words"),
    [
        ((merge("x", "y"), merge("y", "x"), merge(None, "x")), "in a circle: x -> y -> x"),
        ((merge("x", "x"),), "in a circle: x -> x"),
        ((merge("x", "a"), merge("x", "b"), merge(None, "x")), "2 merges are named `x`"),
        ((merge(None, "a"), merge(None, "b")), "several merges have no name"),
        ((merge("x", "a"), merge(None, "b")), "2 merges are used by no other: x, the one without a name"),
        ((merge("x", "a"), merge("y", "a")), "2 merges are used by no other: x, y"),
    ],
)
def test_refuses_what_has_no_order(recipes: tuple[Recipe, ...], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        in_order(recipes, "r.yml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("r.yml: ")
