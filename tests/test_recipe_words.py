from __future__ import annotations

from weldment.recipe.words import Place, nearest, shown, suggestion, yaml_path


def test_yaml_path_writes_indices_in_brackets() -> None:
    assert yaml_path(("slices", 0, "sources", 1, "layer_range")) == "slices[0].sources[1].layer_range"


def test_place_descends_from_the_file_to_the_value() -> None:
    place = Place("recipe.yml").at("models", 1).at("parameters", "density")
    assert str(place) == "recipe.yml: models[1].parameters.density"


def test_problem_carries_cause_place_and_fix() -> None:
    assert str(Place("r.yml").at("seed").problem("wrong", "Use 0")) == "r.yml: seed: wrong. Use 0"


def test_long_values_are_cut() -> None:
    assert len(shown("x" * 10_000)) == 60
    assert shown([1, 2]) == "[1, 2]"


def test_nearest_finds_misspellings_whatever_their_case() -> None:
    assert nearest("Densty", ["weight", "density"]) == "density"
    assert nearest("qqq", ["weight", "density"]) is None


def test_suggestion_lists_all_words_if_none_is_near() -> None:
    assert suggestion("qqq", ["weight", "density"]) == "Known: weight, density"
    assert suggestion("wieght", ["weight", "density"]) == "Did you mean `weight`?"
