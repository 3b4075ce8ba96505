from __future__ import annotations

import json
from typing import Any

import pytest

from weldment.errors import RecipeError
from weldment.recipe.build import build_recipe, missing_parameters
from weldment.recipe.inputs import slice_experts
from weldment.recipe.recipe import ModelInput, Recipe, Slice, SliceSource, canonical
from weldment.recipe.words import Place

PLACE = Place("r.yml")
LINEAR = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def build(document: dict[str, Any]) -> Recipe:
    recipe, problems = build_recipe(document, PLACE)
    assert [str(problem) for problem in problems] == []
    assert recipe is not None
    return recipe


def problems(document: dict[str, Any]) -> list[str]:
    recipe, found = build_recipe(document, PLACE)
    assert recipe is None
    assert all(isinstance(problem, RecipeError) for problem in found)
    return [str(problem) for problem in found]


def pair(*sources: str, base: str = "a") -> dict[str, Any]:
    listed = [{"model": name, "layer_range": [2, 4]} for name in sources]
    return {"merge_method": "nearswap", "base_model": base, "slices": [{"sources": listed}], "parameters": {"t": 1}}


def test_everything_a_recipe_may_say_arrives() -> None:
    document = {
        "merge_method": "ties",
        "name": "x",
        "slices": [
            {
                "sources": [
                    {"model": "o", "layer_range": [0, 2]},
                    {"model": "a", "layer_range": [0, 2], "parameters": {"density": 0.5}},
                ],
                "parameters": {"lambda": 2},
            }
        ],
        "input_model_parameters": {"a": {"weight": [0, 1]}},
        "base_model": {"path": "o"},
        "parameters": {"normalize": 0},
        "dtype": "float16",
        "out_dtype": "bfloat16",
        "accumulate": "float64",
        "seed": 7,
        "tokenizer_source": "union",
        "chat_template": "auto",
        "heads": ["score.*"],
        "take": {"lm_head.*": "a"},
        "drop": ["*.rotary_emb.*"],
    }
    assert build(document) == Recipe(
        method="ties",
        models=(ModelInput("a", {"weight": [0.0, 1.0]}, "input_model_parameters.a"),),
        slices=(
            Slice(
                (
                    SliceSource("o", (0, 2), {}, "slices[0].sources[0]"),
                    SliceSource("a", (0, 2), {"density": 0.5}, "slices[0].sources[1]"),
                ),
                {"lambda": 2.0},
                "slices[0]",
            ),
        ),
        base_model="o",
        parameters={"normalize": False},
        dtype="BF16",
        accumulate="float64",
        seed=7,
        name="x",
        tokenizer={"source": "union"},
        chat_template="auto",
        heads=("score.*",),
        take={"lm_head.*": "a"},
        drop=("*.rotary_emb.*",),
        source=document,
        origin="r.yml",
    )


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [({}, None), ({"dtype": "float16"}, "F16"), ({"dtype": "float16", "out_dtype": "auto"}, None)],
)
def test_out_dtype_wins_over_dtype(dtypes: dict[str, str], expected: str | None) -> None:
    assert build({**LINEAR, **dtypes}).dtype == expected


def test_float64_output_in_float32_arithmetic_is_noted() -> None:
    assert "`accumulate: float64`" in build({**LINEAR, "dtype": "float64"}).notes[0]
    assert build({**LINEAR, "dtype": "float64", "accumulate": "float64"}).notes == ()


def test_input_model_parameters_apply_where_the_entry_says_nothing() -> None:
    document = {
        "merge_method": "ties",
        "base_model": "o",
        "models": [{"model": "a", "parameters": {"weight": {"filter": "mlp", "value": 2}}}, "b"],
        "input_model_parameters": {"a": {"weight": 3, "density": 0.5}},
    }
    first, second = build(document).models
    assert first.parameters == {
        "density": 0.5,
        "weight": [{"filter": "mlp", "value": 2.0}, {"filter": None, "value": 3.0}],
    }
    assert second.parameters == {}


def test_input_model_parameters_of_other_models_are_refused() -> None:
    (problem,) = problems({**LINEAR, "input_model_parameters": {"org/modle": {}}, "models": ["org/model"]})
    assert problem == "r.yml: input_model_parameters: the recipe does not merge 'org/modle'. Did you mean `org/model`?"


@pytest.mark.parametrize(("sources", "order"), [(("a", "b"), "ab"), (("b", "a"), "ab"), (("b",), "ab")])
def test_the_base_of_a_pair_may_be_left_out_of_a_slice(sources: tuple[str, ...], order: str) -> None:
    recipe = build(pair(*sources))
    found = slice_experts(recipe, recipe.slices[0])
    assert [(source.model, source.layer_range) for source in found] == [(name, (2, 4)) for name in order]


def test_a_base_outside_the_pair_is_refused() -> None:
    assert "slices[0].sources: nearswap merges 2 models" in problems(pair("b", "c"))[0]


def test_shape_settings_and_rules_are_reported_together() -> None:
    document = {
        "merge_method": "nearswap",
        "models": [{"model": "a", "parameters": {"tt": 1}}, {"model": "b", "layers": 2}],
        "dtype": "x",
    }
    found = problems(document)
    assert len(found) == 3
    document["models"], document["dtype"] = ["a", "b"], "float32"
    assert ["needs a base model" in found for found in problems(document)] == [True, False]


@pytest.mark.parametrize(
    ("slice_parameters", "parameters", "count"),
    [({}, {}, 1), ({"t": 1}, {}, 0), ({}, {"t": 1}, 0), ({"t": None}, {"t": [{"filter": "mlp", "value": 1}]}, 0)],
)
def test_a_required_parameter_may_stand_at_any_level(
    slice_parameters: dict[str, Any], parameters: dict[str, Any], count: int
) -> None:
    document = pair("a", "b")
    document["slices"][0]["parameters"] = slice_parameters
    document["parameters"] = parameters
    recipe, found = build_recipe(document, PLACE)
    assert len(found) == count
    assert recipe is None or missing_parameters(recipe, PLACE) == []


def test_a_missing_parameter_is_named_with_its_place() -> None:
    assert problems({**LINEAR, "merge_method": "nearswap", "base_model": "a"}) == [
        "r.yml: parameters: nearswap needs `t`. Add `t: ...` there: largest step of an element"
    ]


def test_canonical_forms_are_json_and_equal_for_equal_merges() -> None:
    parameters = {"weight": 1, "int8_mask": True}
    first = build({**LINEAR, "models": ["a", "b"], "parameters": parameters, "dtype": "bf16"})
    second = build({**LINEAR, "parameters": {"weight": 1.0}, "out_dtype": "bfloat16", "seed": 0})
    assert first != second
    assert json.dumps(canonical(first), sort_keys=True) == json.dumps(canonical(second), sort_keys=True)
    assert canonical(build({**LINEAR, "seed": 1})) != canonical(second)
