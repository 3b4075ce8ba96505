from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weldment.errors import RecipeError
from weldment.methods import METHODS, Method, Parameter
from weldment.methods.average import linear
from weldment.recipe.parameters import interpolated, is_conditional, resolve, value_of
from weldment.recipe.recipe import Recipe, Settings

WEIGHT = Parameter("weight", "w", default=1.0, per_model=True)
NEEDED = Method(
    name="trial",
    family="test",
    summary="one required parameter of each sort",
    kernel=linear,
    parameters=(
        Parameter("t", "t", required=True),
        Parameter("share", "s", required=True, per_model=True),
        Parameter("lambda", "l", default=0.5),
    ),
)
RECIPE = Recipe("linear", origin="r.yml")
Q, UP, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


@dataclass(frozen=True)
class Part:
    levels: tuple[Settings, ...]


@dataclass(frozen=True)
class Request:
    parts: tuple[Part, ...]
    levels: tuple[Settings, ...] = ()
    name: str = Q
    position: float | None = 0.0


def weight(*levels: Settings, tensor: str = Q, position: float | None = 0.0) -> Any:
    return value_of(WEIGHT, levels, tensor, position)


def test_the_first_level_that_has_a_value_decides() -> None:
    source, piece, model, recipe = {"weight": 1.5}, {"weight": 2.0}, {"weight": 3.0}, {"weight": 4.0}
    assert weight(source, piece, model, recipe) == 1.5
    assert weight({}, piece, model, recipe) == 2.0
    assert weight({}, {}, model, recipe) == 3.0
    assert weight({}, {}, {}, recipe) == 4.0
    assert weight({}, {}, {}, {}) == 1.0


def test_zero_is_a_value() -> None:
    assert weight({"weight": 0.0}, {"weight": 4.0}) == 0.0


def test_the_first_fitting_filter_wins() -> None:
    setting = {
        "weight": [
            {"filter": "self_attn", "value": 0.1},
            {"filter": "attn", "value": 0.2},
            {"filter": None, "value": 0.3},
        ]
    }
    assert weight(setting) == 0.1
    assert weight(setting, tensor="h.0.attn.c_attn.weight") == 0.2
    assert weight(setting, tensor=UP) == 0.3


def test_without_a_fitting_filter_the_next_level_is_asked() -> None:
    only_mlp = {"weight": [{"filter": "mlp", "value": 0.5}]}
    assert weight(only_mlp, {"weight": 0.7}, tensor=UP) == 0.5
    assert weight(only_mlp, {"weight": 0.7}, tensor=Q) == 0.7
    assert weight(only_mlp, tensor=Q) == 1.0


def test_filters_may_hold_gradients() -> None:
    setting = {"weight": [{"filter": "self_attn", "value": [0.0, 1.0]}, {"filter": None, "value": 0.5}]}
    assert weight(setting, position=0.25) == 0.25
    assert weight(setting, tensor=UP, position=0.25) == 0.5


@pytest.mark.parametrize(
    ("values", "position", "expected"),
    [
        ([0.0, 1.0, 0.2], 0.0, 0.0),
        ([0.0, 1.0, 0.2], 0.5, 1.0),
        ([0.0, 1.0, 0.2], 1.0, 0.2),
        ([0.0, 1.0, 0.2], 0.75, 0.6),
        ([0.0, 1.0, 0.2], None, 0.0),
        ([0.7], 0.9, 0.7),
        ([1.0, 0.0], None, 1.0),
    ],
)
def test_gradients_are_interpolated(values: list[float], position: float | None, expected: float) -> None:
    assert interpolated(values, position) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=130))
def test_a_gradient_with_one_value_for_each_layer_gives_exactly_these(values: list[float]) -> None:
    last = max(1, len(values) - 1)
    assert [interpolated(values, layer / last) for layer in range(len(values))] == values


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9), st.floats(0.0, 1.0))
def test_a_gradient_stays_within_its_values(values: list[float], position: float) -> None:
    assert min(values) <= interpolated(values, position) <= max(values)


@given(st.floats(-1e3, 1e3), st.integers(1, 9), st.floats(0.0, 1.0))
def test_a_constant_gradient_is_its_value(value: float, length: int, position: float) -> None:
    assert interpolated([value] * length, position) == value


def test_mergekit_gradients_over_four_layers() -> None:
    """Weights that mergekit used for t: [0, 0.5, 0.3, 0.7, 1], read off its output."""
    t = [interpolated([0, 0.5, 0.3, 0.7, 1], layer / 3) for layer in range(4)]
    assert t == pytest.approx([0.0, 0.4333333, 0.5666667, 1.0])


def test_arguments_are_one_value_or_one_for_each_model() -> None:
    parts = (Part(({"share": 0.2}, {"t": 9.0})), Part(({}, {"share": 0.3})))
    arguments = resolve(RECIPE, NEEDED, Request(parts, ({"t": 0.5},)))
    assert arguments == {"t": 0.5, "share": (0.2, 0.3), "lambda_": 0.5}


@pytest.mark.parametrize(
    ("share", "t", "missing"),
    [({"share": 1.0}, {}, "`t`"), ({"share": [{"filter": "mlp", "value": 1.0}]}, {"t": 1.0}, "`share`")],
)
def test_a_required_parameter_that_no_entry_gives_names_the_tensor(share: Settings, t: Settings, missing: str) -> None:
    with pytest.raises(RecipeError, match=missing) as caught:
        resolve(RECIPE, NEEDED, Request((Part((share,)),), (t,)))
    assert caught.value.where == f"r.yml: {Q}"


def test_values_that_do_not_go_together_name_the_tensor() -> None:
    parts = (Part(({"weight": 1.0},)), Part(({"weight": -1.0},)))
    with pytest.raises(RecipeError, match="sum to zero") as caught:
        resolve(RECIPE, METHODS["linear"], Request(parts, name=NORM))
    assert str(caught.value).startswith(f"r.yml: {NORM}: ")


def test_only_lists_of_mappings_are_conditional() -> None:
    assert is_conditional([{"filter": None, "value": 1.0}])
    assert not is_conditional([1.0, 2.0])
    assert not is_conditional(1.0)


def test_a_large_model_is_resolved_quickly() -> None:
    levels = ({}, {}, {"weight": [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": None, "value": 0.5}]}, {})
    request = Request((Part(levels),) * 5, ({}, {"normalize": False}), name=Q, position=0.3)
    start = time.process_time()
    for _ in range(1200):
        resolve(RECIPE, METHODS["linear"], request)
    assert time.process_time() - start < 1.0
