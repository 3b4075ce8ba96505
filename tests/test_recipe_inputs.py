from __future__ import annotations

import pytest

from weldment.methods import METHODS, Method, Parameter
from weldment.methods.average import linear
from weldment.recipe.inputs import experts_of, misfits, slice_experts
from weldment.recipe.recipe import ModelInput, Recipe, Slice, SliceSource
from weldment.recipe.words import Place

ROWS = {
    "plain": Method("plain", "test", "ignores the base", linear, base="unused"),
    "deltas": Method("deltas", "test", "needs a base", linear, base="required", models=(2, None)),
    "optional": Method("optional", "test", "takes a base", linear, base="optional", models=(2, 2)),
    "pair": Method("pair", "test", "base and another", linear, models=(2, 2), base_is_model=True),
    "single": Method("single", "test", "one model", linear, base="unused", models=(1, 1)),
    "few": Method("few", "test", "some models", linear, base="unused", models=(2, 3), parameters=(Parameter("w", ""),)),
}


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, row in ROWS.items():
        monkeypatch.setitem(METHODS, name, row)


def recipe(method: str, models: str, base: str | None = None) -> Recipe:
    listed = tuple(ModelInput(name, {"w": 1.0}, f"models[{index}]") for index, name in enumerate(models))
    return Recipe(method, listed, base_model=base)


def sliced(method: str, *pieces: str, base: str | None = None) -> Recipe:
    """One slice for each text, one source for each letter."""
    return Recipe(
        method,
        base_model=base,
        slices=tuple(
            Slice(tuple(SliceSource(name, (0, 2), where=f"at {name}") for name in piece), where=f"slices[{index}]")
            for index, piece in enumerate(pieces)
        ),
    )


def names(found: Recipe) -> str:
    return "".join(model.model for model in experts_of(found))


def problems(found: Recipe) -> list[str]:
    return [str(problem) for problem in misfits(found, Place("r.yml"))[0]]


@pytest.mark.parametrize(
    ("method", "models", "base", "experts"),
    [
        ("plain", "abc", None, "abc"),
        ("plain", "abc", "a", "abc"),
        ("plain", "aab", None, "aab"),
        ("deltas", "abc", "o", "abc"),
        ("deltas", "aobc", "o", "abc"),
        ("deltas", "oabco", "o", "abc"),
        ("optional", "ab", None, "ab"),
        ("optional", "ab", "o", "ab"),
        ("pair", "ab", "a", "ab"),
        ("pair", "ab", "b", "ba"),
        ("pair", "b", "a", "ab"),
        ("pair", "aa", "a", "aa"),
    ],
)
def test_experts_in_merge_order(method: str, models: str, base: str | None, experts: str) -> None:
    found = recipe(method, models, base)
    assert names(found) == experts
    assert problems(found) == []


def test_experts_keep_their_parameters() -> None:
    assert all(model.parameters == {"w": 1.0} for model in experts_of(recipe("deltas", "oab", "o")))


@pytest.mark.parametrize(
    ("method", "models", "base", "words"),
    [
        ("deltas", "ab", None, "deltas needs a base model. Add `base_model:` with the model that the others"),
        ("pair", "ab", None, "pair needs a base model. Add `base_model:` with the one of the two models"),
        ("deltas", "oa", "o", "r.yml: models: deltas merges at least 2 models and here is 1 besides the base"),
        ("optional", "ab", "a", "merges 2 models and here is 1 besides the base"),
        (
            "pair",
            "ab",
            "c",
            "merges 2 models, the base among them, and here are 3. `base_model` must be one of the two",
        ),
        ("pair", "a", "a", "merges 2 models, the base among them, and here is 1"),
        ("pair", "abc", "a", "and here are 3. Remove models, or use a method that merges any number, such as"),
        ("single", "ab", None, "single merges 1 model and here are 2"),
        ("few", "abcd", None, "few merges 2 to 3 models and here are 4"),
        ("few", "a", "a", "few merges 2 to 3 models and here is 1"),
    ],
)
def test_wrong_numbers_of_models_are_refused(method: str, models: str, base: str | None, words: str) -> None:
    (problem,) = problems(recipe(method, models, base))
    assert words in problem


def test_slices_name_their_experts_once_in_order_of_appearance() -> None:
    assert names(sliced("plain", "ba", "ca")) == "bac"
    assert names(sliced("deltas", "oab", "bc", base="o")) == "abc"


def test_experts_of_slices_bring_their_own_parameters() -> None:
    given = ModelInput("b", {"w": 2.0})
    found = sliced("plain", "ab")
    found = Recipe(found.method, (given,), found.slices)
    assert experts_of(found) == (ModelInput("a"), given)


def test_sources_of_a_slice_follow_the_same_rules() -> None:
    found = sliced("pair", "ab", "ba", base="b")
    assert [[source.model for source in slice_experts(found, piece)] for piece in found.slices] == [["b", "a"]] * 2
    assert problems(found) == []


def test_problems_name_the_slice() -> None:
    (problem,) = problems(sliced("deltas", "oab", "oa", base="o"))
    assert problem.startswith("r.yml: slices[1].sources: deltas merges at least 2 models")


def test_a_slice_with_two_ranges_of_the_base_is_ambiguous() -> None:
    (problem,) = problems(sliced("deltas", "oaob", base="o"))
    assert "slices[0].sources: the base is listed 2 times" in problem


def test_parameters_of_the_base_are_noted() -> None:
    _, notes = misfits(recipe("deltas", "oab", "o"), Place("r.yml"))
    assert notes == ["the parameters of o have no effect: it is the base"]
