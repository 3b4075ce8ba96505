"""Marks in recipes: what they mean, what is wrong with them, and the recipes that they span."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import decoder_config, decoder_state, perturbed, save_state
from weldment.errors import RecipeError, UserError
from weldment.evaluation.search.marks import Choices, Range
from weldment.evaluation.search.space import MOST_CORNERS, load_space, point
from weldment.recipe import load_recipes


def recipe(**parameters: Any) -> dict[str, Any]:
    return {"merge_method": "ties", "base_model": "base", "models": ["a", "b"], "parameters": parameters}


def only(mark: Any) -> Any:
    """The mark that a recipe has for `density`."""
    return load_space(recipe(density=mark)).marks["parameters.density"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"search": [0.1, 0.9]}, Range(0.1, 0.9)),
        ({"search": [0, 0.5]}, Range(0.0, 0.5)),
        ({"search": [1, 8]}, Range(1, 8, is_whole=True)),
        ({"search": [1, 9], "step": 2}, Range(1, 9, step=2, is_whole=True)),
        ({"search": [0, 1], "step": 0.1}, Range(0.0, 1.0, step=0.1)),
        ({"search": ["1e-5", 0.1], "log": True}, Range(1e-5, 0.1, log=True)),
        ({"choices": ["ties", 1, None, [0.1, 0.2]]}, Choices(("ties", 1, None, [0.1, 0.2]))),
    ],
    ids=str,
)
def test_a_mark_is_read_as_written(written: Any, expected: Any) -> None:
    mark = only(written)
    assert mark == expected
    assert [type(end) for end in mark.ends] == [type(end) for end in expected.ends]


def test_marks_have_the_names_of_their_paths_wherever_they_stand() -> None:
    mark = {"search": [0.1, 0.9]}
    written = {
        "merge_method": {"choices": ["ties", "dare_ties"]},
        "models": [{"model": "a", "parameters": {"weight": [mark, 1.0, mark]}}],
        "parameters": {"density": [{"filter": "mlp", "value": mark}, {"value": 0.5}]},
    }
    space = load_space(written)
    assert list(space.marks) == [
        "merge_method",
        "models[0].parameters.weight[0]",
        "models[0].parameters.weight[2]",
        "parameters.density[0].value",
    ]
    filled = space.filled({name: number for number, name in enumerate(space.marks)})
    assert filled == [
        {
            "merge_method": 0,
            "models": [{"model": "a", "parameters": {"weight": [1, 1.0, 2]}}],
            "parameters": {"density": [{"filter": "mlp", "value": 3}, {"value": 0.5}]},
        }
    ]


def test_merges_that_build_on_each_other_have_their_names_before_the_path() -> None:
    first = {"name": "first", **recipe(density={"search": [0.1, 0.9]})}
    space = load_space([first, recipe(density={"search": [0.2, 0.8]})])
    assert list(space.marks) == ["first.parameters.density", "parameters.density"]
    filled = space.filled({"first.parameters.density": 0.3, "parameters.density": 0.4})
    assert [document["parameters"]["density"] for document in filled] == [0.3, 0.4]


def test_names_that_a_user_gives_are_no_marks() -> None:
    written = recipe(density={"search": [0.1, 0.9]})
    written["tokenizer"] = {"tokens": {"search": {"source": "a"}, "choices": {"source": "b"}}}
    written["input_model_parameters"] = {"search": {"weight": 1.0}}
    space = load_space(written)
    assert list(space.marks) == ["parameters.density"]
    assert space.filled({"parameters.density": 0.5})[0]["tokenizer"] == written["tokenizer"]


@pytest.mark.parametrize(
    ("written", "where", "cause", "fix"),
    [
        ({"search": [0.9, 0.1]}, ".search", "out of order: 0.9 is above 0.1", "Write [0.1, 0.9]"),
        ({"search": [0.5, 0.5]}, ".search", "both ends are 0.5", "Write the value alone"),
        ({"search": [0, 1.0], "log": True}, ".search", "0 is not on a logarithmic scale", "remove `log`"),
        ({"search": [0.1, 1.0], "log": "yes please"}, ".log", "is not true or false", ""),
        ({"search": [0.1, 0.9], "step": 0}, ".step", "0 is not a number above 0", ""),
        ({"search": [0.1, 0.9], "step": -0.1}, ".step", "-0.1 is not a number above 0", ""),
        ({"search": [0.1, 0.9], "step": 2}, ".step", "the step 2 is larger than the range", "Make it smaller"),
        ({"search": [0.1, 0.9], "step": 0.1, "log": True}, ".step", "exclude each other", ""),
        ({"search": [0.1, 0.9], "steps": 0.1}, ".steps", "no key `steps` beside `search`", "Did you mean `step`?"),
        ({"choices": [1, 2], "log": True}, ".log", "no key `log` beside `choices`", "Remove it"),
        ({"search": [0.1, 0.9], "choices": [1, 2]}, ".choices", "no key `choices` beside `search`", ""),
        ({"search": 0.5}, ".search", "0.5 is not two numbers", "{search: [0.1, 0.9]}"),
        ({"search": [0.1, 0.5, 0.9]}, ".search", "is not two numbers", "{choices: [...]}"),
        ({"search": [0.1, float("nan")]}, ".search", "is not two numbers", ""),
        ({"search": [False, True]}, ".search", "is not two numbers", ""),
        ({"choices": []}, ".choices", "the list of choices is empty", "at least two"),
        ({"choices": ["a"]}, ".choices", "the only choice is 'a'", ""),
        ({"choices": "ties"}, ".choices", "'ties' is not a list", ""),
        ({"choices": ["a", "b", "a"]}, ".choices[2]", "'a' is given twice", ""),
    ],
    ids=str,
)
def test_a_bad_mark_is_refused_with_its_path(written: Any, where: str, cause: str, fix: str) -> None:
    with pytest.raises(RecipeError) as caught:
        only(written)
    assert caught.value.where == f"recipe: parameters.density{where}"
    assert cause in caught.value.cause
    assert fix in (caught.value.fix or "")


def test_all_bad_marks_are_named_at_once() -> None:
    with pytest.raises(RecipeError, match=r"(?s)2 problems.*parameters\.density.*parameters\.lambda"):
        load_space(recipe(density={"search": [1.0, 0.0]}, **{"lambda": {"choices": []}}))


def test_a_recipe_without_marks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plain.yml"
    file.write_text(json.dumps(recipe(density=0.5)))
    with pytest.raises(RecipeError, match=r"plain\.yml: the recipe has no marks.*density: \{search: \[0\.1, 0\.9\]\}"):
        load_space(file)


def test_a_step_ends_at_the_last_number_that_it_reaches() -> None:
    assert only({"search": [0, 1.0], "step": 0.1}).points() == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert only({"search": [0.1, 1.0], "step": 0.4}).ends == (0.1, 0.9)
    assert only({"search": [0.1, 1.0]}).points() is None
    assert only({"search": [2, 5]}).points() == (2, 3, 4, 5)


@given(st.integers(-50, 50), st.integers(1, 60), st.integers(1, 9), st.floats(0, 1))
def test_every_value_of_a_stepped_range_is_one_of_its_points(low: int, width: int, step: int, share: float) -> None:
    if step > width:
        return
    mark = only({"search": [low / 10, (low + width) / 10], "step": step / 10})
    points = mark.points()
    value = mark.value(mark.low + share * (mark.highest - mark.low))
    assert value in points
    assert points[0] == mark.low
    assert points[-1] <= mark.high + 1e-12
    assert len(points) == width // step + 1


def test_few_marks_have_all_their_corners_and_many_have_some() -> None:
    few = load_space(recipe(density={"search": [0.1, 0.9]}, method={"choices": ["a", "b", "c"]}))
    assert len(list(few.corners())) == 6
    assert next(few.corners()) == {"parameters.density": 0.1, "parameters.method": "a"}
    many = load_space(recipe(**{f"p{n}": {"search": [0.0, 1.0]} for n in range(7)}))
    corners = [tuple(corner.values()) for corner in many.corners()]
    assert len(corners) == len(set(corners)) == 2 + 7 + 7
    assert len(corners) <= MOST_CORNERS < 2**7
    assert {(0.0,) * 7, (1.0,) * 7} <= set(corners)


def test_a_point_is_shown_with_short_numbers() -> None:
    assert point({"a": 0.123456, "b": "ties", "c": 3}) == "a = 0.1235, b = ties, c = 3"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    state = decoder_state()
    for number, name in enumerate(("base", "a", "b")):
        save_state(folder / name, perturbed(state, number), decoder_config())
    return folder


@pytest.fixture
def folder(family: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(family)
    return family


def test_a_valid_space_is_checked_and_says_which_marks_have_no_effect(folder: Path) -> None:
    notes = [f"`density` has no effect on {method}" for method in ("task_arithmetic", "linear")]
    written = recipe(weight=1.0, density={"search": [0.1, 0.9]})
    written["merge_method"] = {"choices": ["task_arithmetic", "linear"]}
    assert load_space(written).check() == notes
    written["merge_method"] = "task_arithmetic"
    assert load_space(written).check() == notes[:1]
    written["merge_method"] = {"choices": ["ties", "task_arithmetic"]}
    assert load_space(written).check() == []


@pytest.mark.parametrize("ends", [[0.1, 1.5], [-0.5, 0.5]])
def test_an_end_outside_the_parameters_range_is_found_before_any_trial(folder: Path, ends: list[float]) -> None:
    wrong = next(end for end in ends if not 0 <= end <= 1)
    with pytest.raises(RecipeError, match=rf"not valid with parameters\.density = {wrong}: .*density"):
        load_space(recipe(density={"search": ends})).check()


def test_a_choice_that_is_no_method_is_found_before_any_trial(folder: Path) -> None:
    written = {**recipe(weight=1.0), "merge_method": {"choices": ["ties", "tie"]}}
    with pytest.raises(RecipeError, match=r"not valid with merge_method = tie: .*Did you mean `ties`"):
        load_space(written).check()


def test_a_mistake_that_has_nothing_to_do_with_marks_is_told_as_it_is(folder: Path) -> None:
    written = {**recipe(density={"search": [0.1, 0.9]}), "models": ["a", "nowhere"]}
    with pytest.raises(UserError) as caught:
        load_space(written).check()
    assert "not valid with" not in str(caught.value)
    assert "nowhere" in str(caught.value)


def test_a_merge_says_that_marks_are_for_a_search() -> None:
    with pytest.raises(RecipeError, match=r"parameters\.density: a mark stands here.*Run `weld search`"):
        load_recipes(recipe(density={"search": [0.1, 0.9]}))
