from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weldment.errors import RecipeError
from weldment.recipe.overrides import apply_overrides


def document() -> dict[str, Any]:
    return {"models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 1}}, "c"], "dtype": "float32"}


def changed(*overrides: str) -> dict[str, Any]:
    result = document()
    apply_overrides(result, overrides)
    return result


@pytest.mark.parametrize("path", ["models[1].parameters.weight", "models.1.parameters.weight"])
def test_replaces_a_value(path: str) -> None:
    assert changed(f"{path}=0.3")["models"][1] == {"model": "b", "parameters": {"weight": 0.3}}


def test_creates_mappings_on_the_way() -> None:
    assert changed("parameters.t=0.5")["parameters"] == {"t": 0.5}
    assert changed("models[0].parameters.weight=[0, 1]")["models"][0]["parameters"] == {"weight": [0, 1]}


def test_replaces_list_items() -> None:
    assert changed("models[2]={model: d}")["models"][2] == {"model": "d"}


def test_values_are_yaml_and_may_contain_equals_signs() -> None:
    assert changed("chat_template='a == b'")["chat_template"] == "a == b"
    assert changed("dtype=")["dtype"] is None


def test_quoted_keys_may_contain_dots_and_equals_signs() -> None:
    assert changed('take."lm_head.w=x"=org/m')["take"] == {"lm_head.w=x": "org/m"}


def test_later_overrides_see_earlier_ones() -> None:
    assert changed("parameters.t=1", "parameters.t=2", "parameters.u=3")["parameters"] == {"t": 2, "u": 3}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("models[7].parameters.weight=1", "`models` is a list of 3, and '7' is not one of its indices"),
        ("models.x=1", "'x' is not one of its indices. Indices are 0 to 2"),
        ("models[99999999999999999999]=1", "not one of its indices"),
        ("dtype.x=1", "`dtype` is 'float32', which has no `x`"),
        ("models[2].parameters.weight=1", "`models.2` is 'c', which has no `parameters`"),
        ("dtype", "there is no `=`"),
        ("=1", "the path is empty"),
        ("a..b=1", "'a..b' is not a path"),
        ("[0]=1", "is not a path"),
        ("a=[1", "not valid YAML"),
        ("a=1\n---\n2", "more than one YAML document"),
    ],
)
def test_refuses_naming_the_override(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        changed(override)
    assert words in str(caught.value)
    assert str(caught.value).startswith("override (--set) ")


@given(st.text(max_size=30) | st.from_regex(r'(models|dtype)(\[\d\]|\.\w|\."x")*=.?', fullmatch=True))
def test_any_text_is_an_override_or_a_recipe_error(text: str) -> None:
    with suppress(RecipeError):
        apply_overrides(document(), [text])
        assert "=" in text
