from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weldment.errors import RecipeError
from weldment.methods import METHODS, Method, Parameter
from weldment.methods.average import linear
from weldment.recipe.documents import plain
from weldment.recipe.settings import Findings, Level, check_settings, settings_by_path
from weldment.recipe.words import Place

METHOD = Method(
    name="trial",
    family="test",
    summary="has a parameter of every kind",
    kernel=linear,
    parameters=(
        Parameter("weight", "w", default=1.0, per_model=True),
        Parameter("density", "d", default=1.0, per_model=True, minimum=0.0, maximum=1.0, open_minimum=True),
        Parameter("epsilon", "e", default=0.0, per_model=True, minimum=0.0, maximum=0.5, aliases={"window_size": 0.5}),
        Parameter("normalize", "n", kind="bool", default=True),
        Parameter("steps", "s", kind="int", default=10, minimum=1),
        Parameter("rescale", "r", kind="choice", default="true", choices=("true", "false", "norm")),
    ),
)
PLACE = Place("r.yml", "parameters")


def check(written: dict[str, Any], level: Level = "merge") -> tuple[dict[str, Any], list[str], list[str]]:
    findings = Findings()
    settings = check_settings(METHOD, written, level, PLACE, findings)
    return settings, [str(problem) for problem in findings.problems], list(findings.notes)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"weight": 1}, {"weight": 1.0}),
        ({"weight": "1e-5"}, {"weight": 1e-5}),
        ({"weight": "-.5E+2"}, {"weight": -50.0}),
        ({"weight": [0, "1e-1", 1]}, {"weight": [0.0, 0.1, 1.0]}),
        ({"weight": [2]}, {"weight": [2.0]}),
        ({"weight": None}, {}),
        ({"window_size": 0.5}, {"epsilon": 0.25}),
        ({"window_size": [0, 1]}, {"epsilon": [0.0, 0.5]}),
        ({"normalize": 1}, {"normalize": True}),
        ({"normalize": 0.0}, {"normalize": False}),
        ({"steps": 3.0}, {"steps": 3}),
        ({"steps": "1e2"}, {"steps": 100}),
        ({"rescale": True}, {"rescale": "true"}),
        ({"rescale": "norm"}, {"rescale": "norm"}),
        (
            {"weight": [{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 2}, {"value": 3}]},
            {
                "weight": [
                    {"filter": "mlp", "value": [0.0, 1.0]},
                    {"filter": None, "value": 2.0},
                    {"filter": None, "value": 3.0},
                ]
            },
        ),
        ({"weight": {"filter": "mlp", "value": 1}}, {"weight": [{"filter": "mlp", "value": 1.0}]}),
        ({"normalize": [{"value": False}]}, {"normalize": [{"filter": None, "value": False}]}),
    ],
)
def test_values_get_their_type_and_proper_name(written: dict[str, Any], expected: dict[str, Any]) -> None:
    settings, problems, notes = check(written)
    assert (settings, problems, notes) == (expected, [], [])
    assert str(settings) == str(expected), "types differ"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"density": 1.5}, "r.yml: parameters.density: `density` must be in (0, 1], not 1.5"),
        ({"density": 0}, "must be in (0, 1], not 0"),
        ({"density": [0.5, 2]}, "parameters.density[1]: `density` must be in (0, 1], not 2"),
        ({"density": [{"filter": "mlp", "value": [1, -1]}]}, "parameters.density[0].value[1]: "),
        ({"weight": math.nan}, "must be a number, not nan"),
        ({"weight": [1, math.inf]}, "parameters.weight[1]: `weight` must be a number, not inf"),
        ({"weight": True}, "must be a number, not True"),
        ({"weight": "much"}, "must be a number, not 'much'"),
        ({"weight": "0.5"}, "must be a number, not '0.5'"),
        ({"weight": []}, "the list of values is empty"),
        ({"weight": [None]}, "parameters.weight[0]: "),
        ({"weight": [[1]]}, "parameters.weight[0]: "),
        ({"weight": [1, {"value": 2}]}, "parameters.weight[0]: 1 stands among conditions. Write it as {value: ...}"),
        (
            {"weight": [{"filtr": "mlp", "value": 2}]},
            "weight[0].filtr: there is no key `filtr`. Did you mean `filter`?",
        ),
        ({"weight": [{"filter": "mlp"}]}, "parameters.weight[0]: the key `value` is missing"),
        ({"weight": [{"filter": 3, "value": 2}]}, "weight[0].filter: 3 is not text. Put it in quotes"),
        ({"weight": [{"value": {"value": 2}}]}, "parameters.weight[0].value: "),
        ({"normalize": 2}, "must be true or false, not 2"),
        ({"normalize": "true"}, "must be true or false, not 'true'"),
        ({"normalize": [True, False]}, "`normalize` takes one value, not a list"),
        ({"steps": 2.5}, "must be a whole number, not 2.5"),
        ({"steps": 0}, "must be at least 1, not 0"),
        ({"rescale": "mean"}, "must be one of true, false, norm, not 'mean'"),
        ({"rescale": 1}, "must be one of true, false, norm, not 1"),
        ({"window_size": 1.2}, "`window_size` is `epsilon` / 0.5: `epsilon` must be in [0, 0.5], not 0.6"),
        ({"epsilon": 0.1, "window_size": 0.2}, "Keep one of `epsilon` and `window_size`"),
        ({"weigth": 1}, "parameters.weigth: trial has no parameter `weigth`. Did you mean `weight`?"),
        ({"qqq": 1}, "Known: weight, density, epsilon, window_size, normalize, steps, rescale"),
    ],
)
def test_wrong_values_are_refused_with_their_path(written: dict[str, Any], words: str) -> None:
    _, problems, _ = check(written)
    assert len(problems) == 1
    assert words in problems[0]


def test_every_problem_is_found() -> None:
    _, problems, _ = check({"density": [2, 3], "weight": "x", "unknwon": 1})
    assert len(problems) == 4


def test_parameters_of_other_methods_are_noted_once() -> None:
    findings = Findings()
    for _ in range(2):
        assert check_settings(METHOD, {"lambda": "whatever", "int8_mask": True}, "model", PLACE, findings) == {}
    assert findings.problems == []
    assert list(findings.notes) == ["`lambda` has no effect on trial", "`int8_mask` has no effect on trial"]


def test_one_value_for_the_merge_cannot_stand_under_one_model() -> None:
    _, problems, _ = check({"normalize": True, "weight": 1}, "model")
    assert len(problems) == 1
    assert "`normalize` is one value for the whole merge, not for one model. Move it to `parameters`" in problems[0]


def test_settings_are_found_at_all_levels() -> None:
    weight = {"weight": 2}
    document = {
        "merge_method": "linear",
        "parameters": weight,
        "models": ["a", {"model": "b", "parameters": weight}],
        "input_model_parameters": {"c": weight},
        "slices": [{"parameters": weight, "sources": [{"parameters": weight}, 3]}, None],
    }
    found = settings_by_path(document, Place("r.yml"), Findings())
    assert set(found) == {
        ("parameters",),
        ("input_model_parameters", "c"),
        ("models", 1, "parameters"),
        ("slices", 0, "parameters"),
        ("slices", 0, "sources", 0, "parameters"),
    }
    assert all(settings == {"weight": 2.0} for settings in found.values())


SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5) | st.just("1e-5")
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["filter", "value", "x"]), inner),
    max_leaves=8,
)
NAMES = st.sampled_from([p.name for m in METHODS.values() for p in m.parameters]) | st.text(max_size=8)


@given(st.sampled_from(sorted(METHODS)), st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_settings_are_checked_without_an_exception(method: str, written: dict[str, Any]) -> None:
    findings = Findings()
    with suppress(RecipeError):
        settings = check_settings(METHODS[method], plain(written, PLACE), "merge", PLACE, findings)
        assert set(settings) <= {parameter.name for parameter in METHODS[method].parameters}
