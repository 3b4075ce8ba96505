"""Values of parameters, from any spelling to a kernel's keyword arguments."""

from __future__ import annotations

from typing import Any

import pytest

from weldment.methods import METHODS, Parameter
from weldment.methods.arguments import checked, interval, settle


def test_defaults_and_per_model_values() -> None:
    found = settle(METHODS["ties"], {"weight": [0.5, 2], "density": 0.3}, 2)
    assert found["weight"] == (0.5, 2.0)
    assert found["density"] == (0.3, 0.3)
    assert found["lambda_"] == 1.0
    assert found["trim"] == "tensor"


@pytest.mark.parametrize("name", ["lambda", "lambda_"])
def test_lambda_is_spelled_either_way(name: str) -> None:
    assert settle(METHODS["task_arithmetic"], {name: 0.5}, 1)["lambda_"] == 0.5


def test_alias_with_a_factor() -> None:
    assert settle(METHODS["della"], {"density": 0.5, "window_size": 0.4}, 1)["epsilon"] == (0.2,)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_default_is_valid(name: str) -> None:
    """A method runs on its required parameters alone."""
    method = METHODS[name]
    required = {parameter.name: 0.5 for parameter in method.parameters if parameter.required}
    found = settle(method, required, max(2, method.models[0]))
    assert set(found) == {parameter.argument for parameter in method.parameters}


@pytest.mark.parametrize(
    ("parameter", "value", "text"),
    [
        (Parameter("x", "", minimum=0.0, open_minimum=True), 0, "must be above 0, not 0"),
        (Parameter("x", "", maximum=1.0), 1.5, "must be at most 1, not 1.5"),
        (Parameter("x", ""), float("nan"), "must be a number"),
        (Parameter("x", ""), True, "must be a number, not True"),
        (Parameter("x", ""), "0.5", "must be a number, not '0.5'"),
        (Parameter("x", "", kind="int"), 1.5, "must be a whole number"),
        (Parameter("x", "", kind="bool"), 1, "must be true or false, not 1"),
        (Parameter("x", "", kind="choice", choices=("a", "b")), "c", "must be one of a, b, not 'c'"),
    ],
)
def test_what_does_not_fit(parameter: Parameter, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        checked(parameter, value)


def test_choices_take_yaml_booleans() -> None:
    assert checked(Parameter("x", "", kind="choice", choices=("true", "false", "norm")), False) == "false"


@pytest.mark.parametrize(
    ("low", "high", "open_low", "text"),
    [
        (0.0, 1.0, True, "in (0, 1]"),
        (0.0, None, False, "at least 0"),
        (None, 2.0, False, "at most 2"),
        (None, None, False, "any number"),
    ],
)
def test_interval_in_words(low: float | None, high: float | None, open_low: bool, text: str) -> None:
    assert interval(Parameter("x", "", minimum=low, maximum=high, open_minimum=open_low)) == text
