from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weldment.errors import RecipeError
from weldment.recipe.documents import plain
from weldment.recipe.schema import RecipeSection, check_shape
from weldment.recipe.words import Place

MODELS = {"merge_method": "linear", "models": ["a", "b"]}


def section(**keys: Any) -> RecipeSection:
    found, problems = check_shape({**MODELS, **keys}, Place("r.yml"))
    assert problems == []
    assert found is not None
    return found


def problems(**keys: Any) -> list[str]:
    return [str(problem) for problem in check_shape({**MODELS, **keys}, Place("r.yml"))[1]]


def sliced(*ranges: Any) -> dict[str, Any]:
    return {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": r} for r in ranges]}]}


@pytest.mark.parametrize(
    ("written", "reference"),
    [
        ("org/name", "org/name"),
        (" ./folder/ ", "./folder"),
        ("/", "/"),
        ({"path": "org/name"}, "org/name"),
        ({"path": "org/name", "revision": "abc"}, "org/name@abc"),
        ({"model": {"path": "org/name", "revision": "abc"}, "lora": {"path": "org/lora"}}, "org/name@abc+org/lora"),
        ({"model": {"path": "org/name", "revision": None}, "lora": None}, "org/name"),
        ({"model": "org/name", "lora": "org/lora"}, "org/name+org/lora"),
    ],
)
def test_models_are_written_in_several_ways(written: Any, reference: str) -> None:
    assert section(base_model=written).base_model == reference
    listed = section(models=[{"model": written}]).models
    assert listed is not None
    assert listed[0].model == reference


def test_an_item_of_models_may_be_the_model_alone() -> None:
    listed = section(
        models=["a", {"path": "b"}, {"model": "c", "lora": "d"}, {"model": "e", "parameters": None}]
    ).models
    assert listed is not None
    assert [item.model for item in listed] == ["a", "b", "c+d", "e"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dtype", "bf16", "BF16"),
        ("dtype", "auto", None),
        ("out_dtype", "float16", "F16"),
        ("accumulate", "float64", "float64"),
        ("accumulate", "fp32", "float32"),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("name", "first-merge.v2", "first-merge.v2"),
        ("heads", "*.classifier.*", ("*.classifier.*",)),
        ("drop", ["a.*", "b"], ("a.*", "b")),
        ("take", {"lm_head.*": {"path": "x"}}, {"lm_head.*": "x"}),
        ("chat_template", "auto", "auto"),
        ("base_model", None, None),
        ("parameters", None, {}),
    ],
)
def test_values_are_brought_into_one_form(key: str, value: Any, expected: Any) -> None:
    assert getattr(section(**{key: value}), key) == expected


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dtyp": "x"}, "r.yml: dtyp: there is no key `dtyp`. Did you mean `dtype`?"),
        (
            {"models": [{"model": "a", "paramters": {}}]},
            "models[0].paramters: there is no key `paramters`. Did you mean",
        ),
        (
            {"models": [{"model": "a", "weight": 0.5}]},
            "models[0].weight: there is no key `weight`. It is a parameter: write it as `parameters: {weight: ...}`",
        ),
        ({"density": 0.5}, "density: there is no key `density`. It is a parameter: write it as `parameters: {"),
        ({"models": ["a", 3]}, "models[1]: 3 is neither a model nor a mapping with the key `model`"),
        ({"models": [{"parameters": {}}]}, "models[0]: the key `model` is missing"),
        ({"models": [{"model": "a", "parameters": 3}]}, "models[0].parameters: 3 is not a mapping"),
        ({"models": []}, "r.yml: models: the list is empty"),
        ({"models": {"a": 1}}, "r.yml: models: {'a': 1} is not a list"),
        ({"models": "a"}, "r.yml: models: 'a' is not a list"),
        ({"models": None}, "r.yml: there are no models. Add `models:`"),
        ({"merge_method": "tise"}, "merge_method: there is no method 'tise'. Did you mean `ties`?"),
        ({"merge_method": 3}, "merge_method: 3 is not the name of a method"),
        ({"merge_method": None}, "r.yml: the key `merge_method` is missing"),
        ({"base_model": ""}, "base_model: a model is an empty text"),
        ({"base_model": 7}, "base_model: 7 is not a model: a path, org/name"),
        (
            {"base_model": {"path": "x", "revison": "y"}},
            "`revison` has no meaning in a model. Did you mean `revision`?",
        ),
        ({"base_model": {"revision": "y"}}, "`path` is missing"),
        ({"base_model": {"path": "x", "revision": 7}}, "the revision 7 is not text. Put it in quotes"),
        ({"dtype": "bfloat"}, "dtype: 'bfloat' is not a dtype that a merged model can have. Did you mean `"),
        ({"out_dtype": "int8"}, "out_dtype: 'int8' is not a dtype"),
        ({"dtype": ["float32"]}, "dtype: ['float32'] is not a dtype"),
        ({"accumulate": "bfloat16"}, "accumulate: 'bfloat16' is not a dtype to calculate in: float32 or float64"),
        ({"seed": -1}, "seed: -1 is not a seed"),
        ({"seed": 1.5}, "seed: 1.5 is not a seed"),
        ({"seed": True}, "seed: True is not a seed"),
        ({"name": "../x"}, "name: '../x' is not a name"),
        ({"heads": [1]}, "heads: [1] is not a list of patterns"),
        ({"take": {"lm_head.*": 3}}, "take.lm_head.*: 3 is not a model"),
        ({"take": ["lm_head.*"]}, "take: ['lm_head.*'] is not a mapping"),
        ({"chat_template": 3}, "chat_template: 3 is not text"),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]},
            "`models` and `slices` exclude each other",
        ),
        ({"tokenizer": {}, "tokenizer_source": "union"}, "tokenizer_source: `tokenizer` is given too"),
        ({"tokenizer": "union"}, "tokenizer: 'union' is not a mapping"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: 0 is not valid"),
        ({"tokenizer": {"tokens": {"<x>": {}}}}, "tokenizer.tokens.<x>: the key `source` is missing"),
        (
            {"tokenizer": {"tokens": {"<x>": {"source": {"kind": "none"}}}}},
            "tokenizer.tokens.<x>.source.kind: 'none' is not `zero` or `model_token`",
        ),
        (
            {"tokenizer": {"tokens": {"<x>": {"source": {"kidn": "zero"}}}}},
            "tokenizer.tokens.<x>.source.kidn: there is no key `kidn`. Did you mean `kind`?",
        ),
        (sliced(), "slices[0].sources: the list is empty"),
        (sliced([0, 0]), "slices[0].sources[0].layer_range: [0, 0] is empty"),
        (sliced([3, 2]), "[3, 2] is empty"),
        (sliced([-1, 2]), "[-1, 2] begins before layer 0"),
        (sliced([0, 2, 4]), "[0, 2, 4] is not two whole numbers"),
        (sliced("0-4"), "'0-4' is not two whole numbers [start, end], the end not included. Write it as [0, 4]"),
        (sliced("[0, 4)"), "Write it as [0, 4], which ends before layer 4"),
        (sliced([0, 1.5]), "[0, 1.5] is not two whole numbers"),
        (sliced([0, True]), "[0, True] is not two whole numbers"),
        (sliced([0, 2], [1, 4]), "slices[0].sources: the sources have 2, 3 layers; they must have equally many"),
    ],
)
def test_wrong_shapes_are_refused_with_their_path(keys: dict[str, Any], words: str) -> None:
    (problem,) = problems(**keys)
    assert words in problem


def test_all_problems_are_reported_together() -> None:
    assert len(problems(dtyp=1, seed=-1, models=[3, {"model": ""}], base_model=[])) == 5


def test_token_sources_may_be_a_model_or_a_kind() -> None:
    tokens = {
        "<a>": {"source": "org/m"},
        "<b>": {"source": {"kind": "zero"}, "force": True},
        "<c>": {"source": {"kind": "model_token", "model": "org/m", "token_id": 5}},
    }
    found = section(tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 64}).tokenizer
    assert found is not None
    assert found.tokens["<a>"].source.model == "org/m"
    assert found.tokens["<b>"].force


KEYS = st.sampled_from([*RecipeSection.model_fields, "model", "layer_range", "sources", "path", "lora", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("linear")
NESTED = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(KEYS, NESTED, max_size=6))
def test_any_document_is_a_section_or_a_list_of_problems(document: dict[str, Any]) -> None:
    with suppress(RecipeError):
        found, listed = check_shape(plain(document, Place("r.yml")), Place("r.yml"))
        assert found is not None or listed
        assert all(isinstance(problem, RecipeError) for problem in listed)
