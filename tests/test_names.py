"""The same tensors under different prefixes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weldment.planning.names import align

Shapes = Mapping[str, tuple[int, ...]]


def layers(prefix: str, count: int = 2, width: int = 4) -> dict[str, tuple[int, ...]]:
    names = ("attn.q.weight", "attn.k.weight", "mlp.up.weight")
    return {f"{prefix}layers.{layer}.{name}": (width, width) for layer in range(count) for name in names}


def renames(found: Shapes, reference: Shapes) -> tuple[dict[str, str], list[str]]:
    names, made = align(found, reference)
    return names, [str(rename) for rename in made]


def test_equal_names_stay() -> None:
    assert renames(layers("model."), layers("model.")) == ({name: name for name in layers("model.")}, [])


@pytest.mark.parametrize(
    ("own", "reference", "said"),
    [
        ("bert.", "", "bert. -> (no prefix)"),
        ("", "bert.", "(no prefix) -> bert."),
        ("model.", "", "model. -> (no prefix)"),
        ("language_model.model.", "model.language_model.", "language_model.model. -> model.language_model."),
        ("model.", "model.language_model.", "model. -> model.language_model."),
        ("base.model.", "model.", "base. -> (no prefix)"),
    ],
)
def test_prefixes_are_added_removed_and_reordered(own: str, reference: str, said: str) -> None:
    names, made = renames(layers(own), layers(reference))
    assert set(names.values()) == set(layers(reference))
    assert len(made) == 1
    assert said.split(" -> ")[0].rstrip(".") in made[0] or made[0] == said


def test_several_prefixes_of_a_vision_language_model() -> None:
    own = {
        **layers("language_model.model."),
        **layers("vision_tower.encoder."),
        "language_model.lm_head.weight": (9, 4),
        "multi_modal_projector.weight": (4, 4),
    }
    reference = {
        **layers("model.language_model."),
        **layers("model.vision_tower.encoder."),
        "lm_head.weight": (9, 4),
        "model.multi_modal_projector.weight": (4, 4),
    }
    names, made = renames(own, reference)
    assert set(names.values()) == set(reference)
    assert names["language_model.model.layers.1.attn.q.weight"] == "model.language_model.layers.1.attn.q.weight"
    assert names["vision_tower.encoder.layers.0.mlp.up.weight"] == "model.vision_tower.encoder.layers.0.mlp.up.weight"
    assert len(made) >= 3


def test_head_without_partner_keeps_its_name() -> None:
    own = {**layers("bert."), "classifier.weight": (3, 4)}
    names, _ = renames(own, layers(""))
    assert names["classifier.weight"] == "classifier.weight"


def test_embeddings_with_other_rows_are_still_matched() -> None:
    own = {**layers("model."), "model.embed_tokens.weight": (10, 4)}
    names, _ = renames(own, {**layers(""), "embed_tokens.weight": (12, 4)})
    assert names["model.embed_tokens.weight"] == "embed_tokens.weight"


def test_other_words_are_not_a_prefix() -> None:
    own, reference = layers("encoder."), layers("decoder.")
    assert renames(own, reference) == ({name: name for name in own}, [])


def test_layers_are_not_shifted() -> None:
    own = {"h.0.0.weight": (2, 2), "h.0.1.weight": (2, 2)}
    reference = {"h.1.0.weight": (2, 2), "h.1.1.weight": (2, 2)}
    assert renames(own, reference)[1] == []


def test_one_stack_that_could_be_either_of_two_is_not_matched() -> None:
    reference = {**layers("text_model."), **layers("vision_model.")}
    assert renames(layers(""), reference) == ({name: name for name in layers("")}, [])


def test_shapes_decide_between_two_stacks() -> None:
    reference = {**layers("text_model.", width=4), **layers("vision_model.", width=6)}
    names, _ = renames(layers("", width=6), reference)
    assert all(new.startswith("vision_model.") for new in names.values())


def test_two_stacks_are_not_folded_into_one() -> None:
    own = {**layers("text_model."), **layers("vision_model.")}
    names, made = renames(own, layers(""))
    assert names == {name: name for name in own}
    assert made == []


def test_a_single_tensor_is_matched() -> None:
    assert renames({"lm_head.weight": (2,)}, {"model.lm_head.weight": (2,)})[0] == {
        "lm_head.weight": "model.lm_head.weight"
    }


def test_names_that_say_too_little_are_not_matched() -> None:
    assert renames({"weight": (2,)}, {"model.weight": (2,)})[1] == []


PARTS = st.sampled_from(["model", "layers", "0", "1", "attn", "weight", "bias", "bert"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
SHAPES = st.dictionaries(NAMES, st.sampled_from([(2,), (3,), (2, 2)]), max_size=12)


@given(own=SHAPES, reference=SHAPES)
def test_matching_is_one_to_one_and_never_touches_equal_names(own: Shapes, reference: Shapes) -> None:
    names, _ = align(own, reference)
    assert names.keys() == own.keys()
    assert len(set(names.values())) == len(names)
    assert all(names[name] == name for name in own if name in reference)
    assert all(new == name or new in reference for name, new in names.items())


@given(reference=SHAPES)
def test_a_model_matches_itself_under_a_new_prefix(reference: Shapes) -> None:
    nested = {f"wrapper.{name}": shape for name, shape in reference.items()}
    names, _ = align(nested, reference)
    assert all(new in (name, name.removeprefix("wrapper.")) for name, new in names.items())
