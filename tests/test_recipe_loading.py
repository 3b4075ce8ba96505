from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weldment.errors import RecipeError
from weldment.methods import METHODS
from weldment.recipe import Recipe, experts_of, load_recipes, resolve
from weldment.recipe.recipe import Settings

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "mergekit"

LINEAR = """
models:
  - model: org/first
    parameters:
      weight: 1.0
  - model: org/second
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
"""
SLERP = """
slices:
  - sources:
      - model: org/chat
        layer_range: [0, 32]
      - model: org/math
        layer_range: [0, 32]
merge_method: slerp
base_model: org/chat
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""
TASK_ARITHMETIC = """
slices:
  - sources:
      - model: org/base
        layer_range: [0, 40]
      - model: org/first
        layer_range: [0, 40]
        parameters:
          weight: 0.5
      - model: org/second
        layer_range: [0, 40]
        parameters:
          weight: 0.5
merge_method: task_arithmetic
base_model: org/base
parameters:
  int8_mask: true
dtype: bfloat16
"""
TIES = """
models:
  - model: org/first
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/second
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: org/third
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
DARE_TIES = """
models:
  - model: org/base
    # No parameters necessary for base model
  - model: org/first
    parameters:
      density: 0.53
      weight: 0.4
  - model: org/second
    parameters:
      density: 0.53
      weight: 0.3
  - model: org/third
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: org/base
parameters:
  int8_mask: true
dtype: bfloat16
"""
PASSTHROUGH = """
slices:
  - sources:
      - model: org/first
        layer_range: [0, 24]
  - sources:
      - model: org/second
        layer_range: [8, 32]
merge_method: passthrough
dtype: float16
"""
STAGES = """
name: soup
merge_method: linear
models: [org/first, org/second]
---
merge_method: task_arithmetic
base_model: org/base
models:
  - {model: soup, parameters: {weight: 0.5}}
"""


class Part:
    def __init__(self, *levels: Settings) -> None:
        self.levels = levels


class Request:
    """The tensor `name` of a recipe without slices, as the plan asks for it."""

    def __init__(self, recipe: Recipe, name: str, position: float | None) -> None:
        self.name, self.position = name, position
        self.levels = (recipe.parameters,)
        self.parts = [Part(model.parameters, recipe.parameters) for model in experts_of(recipe)]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def _write(text: str) -> Path:
        (tmp_path / "recipe.yml").write_text(text, encoding="utf-8")
        return tmp_path / "recipe.yml"

    return _write


def names(recipe: Recipe) -> list[str]:
    return [model.model for model in experts_of(recipe)]


def needs(method: str) -> None:
    if method not in METHODS:
        pytest.skip(f"{method} is not in METHODS")


@pytest.mark.parametrize(
    ("text", "experts", "dtype"),
    [
        (LINEAR, ["org/first", "org/second"], "F16"),
        (SLERP, ["org/chat", "org/math"], "BF16"),
        (TASK_ARITHMETIC, ["org/first", "org/second"], "BF16"),
        (TIES, ["org/first", "org/second", "org/third"], "F16"),
        (DARE_TIES, ["org/first", "org/second", "org/third"], "BF16"),
        (PASSTHROUGH, ["org/first", "org/second"], "F16"),
    ],
    ids=["linear", "slerp", "task_arithmetic", "ties", "dare_ties", "passthrough"],
)
def test_recipes_written_for_mergekit_load(write: Any, text: str, experts: list[str], dtype: str) -> None:
    method = yaml.safe_load(text)["merge_method"]
    needs(method)
    (recipe,) = load_recipes(write(text))
    assert (recipe.method, names(recipe), recipe.dtype) == (method, experts, dtype)
    assert recipe.source == yaml.safe_load(text)
    assert recipe.origin.endswith("recipe.yml")
    assert recipe.notes == ((f"`int8_mask` has no effect on {method}",) if "int8_mask" in text else ())


def test_ties_gradients_and_filters_resolve() -> None:
    (recipe,) = load_recipes(yaml.safe_load(TIES))
    last = resolve(recipe, METHODS["ties"], Request(recipe, "model.layers.31.mlp.up_proj.weight", 1.0))
    assert last["density"] == (0.1, 0.5, 0.33)
    assert last["weight"] == (1.0, 1.0, 0.5)
    embedding = resolve(recipe, METHODS["ties"], Request(recipe, "model.embed_tokens.weight", None))
    assert embedding["density"] == (1.0, 0.5, 0.33)
    assert embedding["weight"] == (1.0, 0.0, 0.0)
    assert embedding["normalize"] is True


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference recipes are not beside the repository")
@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("*/")) if GOLDEN.is_dir() else [], ids=lambda path: path.name)
def test_every_reference_recipe_loads(folder: Path) -> None:
    needs(yaml.safe_load((folder / "recipe.yml").read_text())["merge_method"])
    (recipe,) = load_recipes(folder / "recipe.yml")
    low, high = METHODS[recipe.method].models
    assert low <= len(experts_of(recipe)) <= (high or 3) or recipe.slices
    assert recipe.dtype == "F32"


def test_several_documents_are_ordered_merges(write: Any) -> None:
    soup, final = load_recipes(write(STAGES))
    assert (soup.name, soup.method) == ("soup", "linear")
    assert (final.name, names(final), final.base_model) == (None, ["soup"], "org/base")
    assert soup.origin.endswith("recipe.yml, soup")


def test_parsed_documents_load_like_files(write: Any) -> None:
    documents = list(yaml.safe_load_all(STAGES))
    from_file = load_recipes(write(STAGES))
    assert [recipe.source for recipe in load_recipes(documents)] == [recipe.source for recipe in from_file]


def test_the_callers_mapping_stays_as_it_is() -> None:
    document = yaml.safe_load(LINEAR)
    (recipe,) = load_recipes(document, overrides=["models[0].parameters.weight=0.25"])
    assert recipe.models[0].parameters == {"weight": 0.25}
    assert recipe.source["models"][0]["parameters"] == {"weight": 0.25}
    assert document == yaml.safe_load(LINEAR)


def test_overrides_change_the_final_merge(write: Any) -> None:
    soup, final = load_recipes(write(STAGES), overrides=["parameters.lambda=2", "dtype=bf16"])
    assert (soup.dtype, final.dtype) == (None, "BF16")
    assert final.parameters == {"lambda": 2.0}


def test_overrides_are_checked_like_the_file(write: Any) -> None:
    with pytest.raises(RecipeError, match=r"parameters\.normalise: linear has no parameter"):
        load_recipes(write(LINEAR), overrides=["parameters.normalise=false"])


def test_problems_of_all_documents_are_reported_together() -> None:
    first = {"name": "x", "merge_method": "linear", "models": ["a"], "sed": 1}
    second = {"merge_method": "linear", "models": ["x", "b"], "parameters": {"weight": "much"}}
    with pytest.raises(RecipeError) as caught:
        load_recipes([first, second])
    assert str(caught.value).splitlines() == [
        "2 problems:",
        "  1. recipe, x: sed: there is no key `sed`. Did you mean `seed`?",
        "  2. recipe, document 2: parameters.weight: `weight` must be a number, not 'much'",
    ]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "the recipe is empty"),
        ("---\n---\n", "the recipe is empty"),
        ("- a\n- b", "a recipe is a mapping of keys, not ['a', 'b']"),
        ("just text", "not 'just text'"),
        ("merge_method: linear\nmerge_method: ties", "line 2, column 1"),
        (LINEAR + "---\n" + LINEAR, "several merges have no name"),
    ],
)
def test_files_that_are_no_recipe_are_refused(write: Any, source: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipes(write(source))
    assert words in str(caught.value)
    assert "recipe.yml" in str(caught.value)


def test_a_sequence_of_anything_else_is_refused() -> None:
    for source in ([], [3], {"a": {4}}):
        with pytest.raises(RecipeError):
            load_recipes(source)  # type: ignore[arg-type]


PIECES = [
    "merge_method",
    "models",
    "slices",
    "sources",
    "model",
    "parameters",
    "weight",
    "base_model",
    "filter",
    "value",
]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["linear", "ties", "nearswap", "a"])
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PIECES), inner, max_size=4),
    max_leaves=14,
)


@given(NESTED)
def test_any_structure_is_a_recipe_or_a_recipe_error(source: Any) -> None:
    if not isinstance(source, (list, dict)):
        source = [source]
    with suppress(RecipeError):
        assert all(isinstance(recipe, Recipe) for recipe in load_recipes(source))


@given(
    st.fixed_dictionaries({"merge_method": st.sampled_from(sorted(METHODS)), "models": NESTED}, optional={}),
    st.fixed_dictionaries({}, optional=dict.fromkeys(["parameters", "base_model", "slices", "take"], NESTED)),
)
def test_any_half_right_recipe_is_a_recipe_or_a_recipe_error(start: dict[str, Any], more: dict[str, Any]) -> None:
    with suppress(RecipeError):
        assert load_recipes({**start, **more})[0].method == start["merge_method"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_a_recipe_or_a_recipe_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yml"
    path.write_bytes(content)
    with suppress(RecipeError):
        assert load_recipes(path)
