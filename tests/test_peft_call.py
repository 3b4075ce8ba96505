"""PEFT's call as a recipe: what it becomes, and all that can be wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from weldment.errors import RecipeError
from weldment.recipe import canonical, load_recipes
from weldment.recipe.peft_call import TYPES, build_call, is_call
from weldment.recipe.recipe import Combination, ModelInput, Recipe
from weldment.recipe.words import Place

CALL = {"adapters": ["a", "b"], "combination_type": "ties", "density": 0.5}


def built(**keys: Any) -> Recipe:
    recipe, problems = build_call({**CALL, **keys}, Place("r.yml"))
    assert [str(problem) for problem in problems] == []
    assert recipe is not None
    return recipe


def problems(**keys: Any) -> list[str]:
    recipe, found = build_call({**CALL, **keys}, Place("r.yml"))
    assert recipe is None
    assert all(isinstance(problem, RecipeError) for problem in found)
    return [str(problem) for problem in found]


def test_everything_a_call_may_say_arrives() -> None:
    document = {
        "adapters": ["x/a", {"path": "org/b", "revision": "v1"}],
        "weights": [1, -0.5],
        "combination_type": "dare_ties_svd",
        "density": 0.2,
        "svd_rank": 5,
        "svd_clamp": 0.99,
        "majority_sign_method": "frequency",
        "base_model": "org/base",
        "output": "adapter",
        "dtype": "bf16",
        "seed": 7,
        "name": "both",
    }
    (recipe,) = load_recipes(document)
    assert recipe == Recipe(
        method="task_arithmetic",
        models=(
            ModelInput("x/a", {"weight": 1.0}, "adapters[0]"),
            ModelInput("org/b@v1", {"weight": -0.5}, "adapters[1]"),
        ),
        base_model="org/base",
        dtype="BF16",
        seed=7,
        name="both",
        output="adapter",
        combination=Combination("dare_ties_svd", 0.2, 5, 0.99, "frequency"),
        source=document,
        origin="recipe",
    )


def test_defaults_are_peft_s() -> None:
    (recipe,) = load_recipes({"adapters": ["a", "b"]})
    assert recipe.combination == Combination("svd")
    assert recipe.output is None
    assert [item.parameters for item in recipe.models] == [{"weight": 1.0}] * 2


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, [1.0, 1.0]),
        (0.5, [0.5, 0.5]),
        (-2, [-2.0, -2.0]),
        ("1e-3", [0.001, 0.001]),
        ([0.5, 2], [0.5, 2.0]),
        (["1e-3", 0], [0.001, 0.0]),
    ],
)
def test_weights_are_one_for_each_or_one_for_all(written: Any, expected: list[float]) -> None:
    assert [item.parameters["weight"] for item in built(weights=written).models] == expected


def test_a_key_without_a_value_is_as_good_as_absent() -> None:
    call = dict.fromkeys(("weights", "svd_rank", "svd_clamp", "majority_sign_method", "base_model", "output", "dtype"))
    assert built(**call).combination == Combination("ties", 0.5)


def test_numbers_may_be_written_as_yaml_1_1_misreads_them() -> None:
    assert built(density="2e-1", svd_rank=4.0).combination == Combination("ties", 0.2, 4)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_a_recipe(name: str) -> None:
    combination = built(combination_type=name).combination
    assert combination is not None
    assert combination.type == name


@pytest.mark.parametrize("key", ["adapters", "combination_type"])
def test_a_call_is_told_by_its_keys(key: str) -> None:
    assert is_call({key: None})
    assert not is_call({"models": ["a"], "merge_method": "linear"})


def test_a_file_of_a_call_is_read_with_overrides(tmp_path: Any) -> None:
    path = tmp_path / "call.yml"
    path.write_text("adapters: [a, b]\nweights: [1, 1]\ncombination_type: cat\n")
    (recipe,) = load_recipes(path, overrides=["weights[1]=0.25", "seed=3"])
    assert [item.parameters["weight"] for item in recipe.models] == [1.0, 0.25]
    assert recipe.seed == 3


def test_a_call_may_be_a_part_of_several_merges() -> None:
    documents = [{**CALL, "name": "both"}, {"adapters": ["both", "c"], "combination_type": "cat"}]
    assert [recipe.name for recipe in load_recipes(documents)] == ["both", None]


def test_cat_into_a_model_is_task_arithmetic() -> None:
    recipe = built(combination_type="cat", output="model", weights=[2, -1], density=None, base_model="o")
    assert (recipe.method, recipe.output, recipe.combination) == ("task_arithmetic", "model", None)
    assert [item.parameters for item in recipe.models] == [{"weight": 2.0}, {"weight": -1.0}]


@pytest.mark.parametrize("name", [name for name in TYPES if name != "cat"])
def test_the_other_types_into_a_model_are_refused_by_name(name: str) -> None:
    (problem,) = problems(combination_type=name, output="model")
    assert problem.startswith(f"r.yml: output: {name} makes an adapter and cannot be merged into a model")


def test_what_a_call_is_shows_in_its_canonical_form() -> None:
    """Plans of calls that differ in the combination alone must not be taken for one another."""
    forms = [canonical(built(**keys)) for keys in ({}, {"density": 0.4}, {"combination_type": "dare_ties"})]
    assert forms[0] != forms[1] != forms[2] != forms[0]


@pytest.mark.parametrize(
    ("keys", "notes"),
    [
        ({"density": 0.5}, ()),
        ({"svd_rank": 4}, ("`svd_rank` has no effect on ties",)),
        ({"combination_type": "svd"}, ("`density` has no effect on svd",)),
        (
            {"combination_type": "cat", "majority_sign_method": "total"},
            ("`density` has no effect on cat", "`majority_sign_method` has no effect on cat"),
        ),
        ({"adapters": ["a"]}, ("`density` has no effect on one adapter alone, which is only scaled by its weight",)),
    ],
)
def test_what_changes_nothing_is_said(keys: dict[str, Any], notes: tuple[str, ...]) -> None:
    assert built(**keys).notes == notes


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"densty": 0.5}, "r.yml: densty: there is no key `densty`. Did you mean `density`?"),
        ({"weight": [1, 1]}, "r.yml: weight: there is no key `weight`. Did you mean `weights`?"),
        ({"merge_method": "ties"}, "r.yml: merge_method: there is no key `merge_method`. With `models` and"),
        ({"models": ["a"]}, "list them there instead of under `adapters`"),
        ({"svd_driver": "gesvd"}, "r.yml: svd_driver: there is no key `svd_driver`"),
        ({"adapters": None}, "r.yml: the key `adapters` is missing. List the adapters to merge"),
        ({"adapters": []}, "r.yml: adapters: the list is empty"),
        ({"adapters": "a"}, "r.yml: adapters: 'a' is not a list"),
        ({"adapters": ["a", 3]}, "r.yml: adapters[1]: 3 is not a model"),
        ({"adapters": ["a", " "]}, "r.yml: adapters[1]: a model is an empty text"),
        ({"weights": [1, 2, 3]}, "r.yml: weights: there are 3 weights for 2 adapters. Give each adapter its weight"),
        ({"weights": []}, "r.yml: weights: the list is empty"),
        ({"weights": [1, "x"]}, "r.yml: weights[1]: `weight` must be a number, not 'x'"),
        ({"weights": [1, float("nan")]}, "r.yml: weights[1]: `weight` must be a number, not nan"),
        ({"weights": "x"}, "r.yml: weights: `weight` must be a number, not 'x'"),
        ({"weights": True}, "r.yml: weights: `weight` must be a number, not True"),
        ({"combination_type": "tie"}, "combination_type: there is no combination type 'tie'. Did you mean `ties`?"),
        ({"combination_type": ["ties"]}, "r.yml: combination_type: there is no combination type ['ties']"),
        ({"combination_type": 3}, "there is no combination type 3. Known: linear, svd, cat"),
        ({"density": None}, "r.yml: density: ties needs `density`. Give the share of elements to keep, in (0, 1]"),
        ({"density": 0}, "r.yml: density: `density` must be in (0, 1], not 0"),
        ({"density": [0.5]}, "r.yml: density: `density` must be a number, not [0.5]"),
        ({"density": 1.01}, "r.yml: density: `density` must be in (0, 1], not 1.01"),
        ({"svd_rank": 0}, "r.yml: svd_rank: `svd_rank` must be at least 1, not 0"),
        ({"svd_rank": 2.5}, "r.yml: svd_rank: `svd_rank` must be a whole number, not 2.5"),
        ({"svd_clamp": 2}, "r.yml: svd_clamp: `svd_clamp` must be in (0.5, 1], not 2"),
        ({"majority_sign_method": "mass"}, "`majority_sign_method` must be one of total, frequency, not 'mass'"),
        ({"output": "adaptor"}, "r.yml: output: 'adaptor' is not what a merge of adapters can give"),
        ({"dtype": "int8"}, "r.yml: dtype: 'int8' is not a dtype that a merged model can have"),
        ({"seed": -1}, "r.yml: seed: -1 is not a seed"),
        ({"name": "a/b"}, "r.yml: name: 'a/b' is not a name"),
        ({"base_model": 3}, "r.yml: base_model: 3 is not a model"),
    ],
)
def test_what_is_wrong_is_said_once_with_its_place(keys: dict[str, Any], expected: str) -> None:
    (problem,) = problems(**keys)
    assert expected in problem


def test_all_problems_are_found_at_once() -> None:
    wrong = {"adapters": ["a", 1, "c"], "weights": [1], "density": 2, "seed": 0.5, "output": "model", "rnk": 3}
    found = problems(**wrong)
    for path in ("adapters[1]", "weights", "density", "seed", "output", "rnk"):
        assert any(problem.startswith(f"r.yml: {path}: ") for problem in found), path
    assert len(found) == len(wrong)
    with pytest.raises(RecipeError, match="6 problems"):
        load_recipes({**CALL, **wrong})
