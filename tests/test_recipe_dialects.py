from __future__ import annotations

from typing import Any

import pytest

from weldment.errors import RecipeError
from weldment.recipe import load_recipes
from weldment.recipe.dialects import refuse_foreign
from weldment.recipe.words import Place


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"base_model": "a", "gate_mode": "hidden", "experts": []}, "this is a mixture-of-experts configuration"),
        ({"merge_method": "linear", "modules": {}}, "this is a multi-module configuration"),
    ],
)
def test_foreign_recipes_are_refused_by_name_and_once(document: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipes(document)
    assert words in str(caught.value)
    assert "problems" not in str(caught.value)


def test_native_recipes_pass() -> None:
    refuse_foreign({"models": [], "merge_method": "linear", "parameters": {}}, Place("recipe"))
