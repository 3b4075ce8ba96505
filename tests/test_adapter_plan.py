"""Plans of merges of adapters: what is seen from configurations and headers, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from folders import weld, write_model, write_recipe
from lora_folders import MODULES, SIZES, adapters_recipe, write_lora
from weldment import CheckpointError, PlanError, RecipeError, plan
from weldment.adapters.merge.memory import fit_adapters, peak_bytes
from weldment.adapters.merge.plan import AdapterPlan
from weldment.adapters.merge.recognising import adapters_of, as_models
from weldment.errors import UserError
from weldment.recipe import load_recipes

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_lora(tmp_path / "a", rank=2, seed=1), write_lora(tmp_path / "b", rank=3, alpha=1.0, seed=2)


def planned(method: str, *folders: Path, **keys: Any) -> AdapterPlan:
    found = plan(adapters_recipe(method, *folders, **keys))
    assert isinstance(found, AdapterPlan)
    return found


def refused(method: str, *folders: Path, **keys: Any) -> str:
    with pytest.raises((PlanError, RecipeError)) as caught:
        plan(adapters_recipe(method, *folders, **keys))
    assert caught.value.fix or "\n" in str(caught.value)
    return str(caught.value)


def test_a_recipe_of_adapters_alone_gives_an_adapter(pair: tuple[Path, Path]) -> None:
    found = planned("ties", *pair, parameters={"density": 0.5})
    assert [module.name for module in found.modules] == MODULES
    assert found.modules[0].ranks == (2, 3)
    assert [module.rank for module in found.modules] == [3] * 6
    assert found.counts() == {"merged": 24}
    assert found.base is None
    assert found.modules[0].parameters["density"] == (0.5, 0.5)
    assert found.read_bytes == sum(path.stat().st_size for folder in pair for path in folder.glob("*.saf*")) - sum(
        8 + int.from_bytes((folder / "adapter_model.safetensors").read_bytes()[:8], "little") for folder in pair
    )


@pytest.mark.parametrize(
    ("keys", "method", "ranks"),
    [
        ({}, "task_arithmetic", {"q": 3, "v": 3}),
        ({"rank": 1}, "task_arithmetic", {"q": 1, "v": 1}),
        ({"rank": 4}, "task_arithmetic", {"q": 4, "v": 4}),
        ({"rank": 99}, "task_arithmetic", {"q": 5, "v": 5}),
        ({"rank": "full"}, "task_arithmetic", {"q": 5, "v": 5}),
        ({"rank": "full"}, "ties", {"q": 8, "v": 6}),
        ({"rank": "full", "space": "core"}, "ties", {"q": 5, "v": 5}),
        ({"space": "cat"}, "task_arithmetic", {"q": 5, "v": 5}),
        ({"space": "cat", "rank": 2}, "linear", {"q": 2, "v": 2}),
    ],
)
def test_the_rank_that_a_result_can_have(
    pair: tuple[Path, Path], keys: dict[str, Any], method: str, ranks: dict[str, int]
) -> None:
    more = {"parameters": {"density": 0.5}} if method == "ties" else {}
    found = {module.name: module.rank for module in planned(method, *pair, **keys, **more).modules}
    assert (found[Q], found[V]) == (ranks["q"], ranks["v"])


def test_a_rank_that_is_too_large_is_reduced_and_said(pair: tuple[Path, Path]) -> None:
    assert any(
        "rank 99 is larger than possible" in note and "to 5" in note for note in planned("linear", *pair, rank=99).notes
    )
    assert not any("larger than possible" in note for note in planned("linear", *pair, rank=5).notes)


def test_what_will_be_cut_is_said(pair: tuple[Path, Path]) -> None:
    assert any("rank up to 5 and is cut to 3" in note for note in planned("linear", *pair).notes)
    assert not planned("linear", *pair, rank="full").notes
    assert planned("linear", *pair, rank="full").is_exact


def test_gradients_and_filters_are_resolved_as_for_full_models(pair: tuple[Path, Path]) -> None:
    weights = {"weight": [{"filter": "v_proj.weight", "value": 0.25}, {"value": [0.0, 1.0]}]}
    found = planned("linear", *pair, parameters={**weights, "normalize": False})
    got = {module.name: module.parameters["weight"][0] for module in found.modules}
    assert [got[f"model.layers.{n}.self_attn.q_proj"] for n in range(3)] == [0.0, 0.5, 1.0]
    assert got[V] == 0.25


def test_layers_are_listed_as_people_count(tmp_path: Path) -> None:
    names = {f"h.{n}.q_proj": (4, 4) for n in (10, 2, 1)}
    found = planned("linear", write_lora(tmp_path / "a", modules=names))
    assert [module.name for module in found.modules] == ["h.1.q_proj", "h.2.q_proj", "h.10.q_proj"]


def test_a_base_is_not_needed_nor_opened(pair: tuple[Path, Path]) -> None:
    found = planned("ties", *pair, base_model="org/base", parameters={"density": 0.5})
    assert found.config["base_model_name_or_path"] == "org/base"
    assert found.experts == tuple(map(str, pair))
    other = planned("task_arithmetic", *pair, base_model="someone/other-base")
    assert any("different bases: org/base" in note and "other-base" in note for note in other.notes)


def test_methods_that_start_from_a_model_start_from_the_first_adapter(pair: tuple[Path, Path]) -> None:
    a, b = pair
    keys = {"parameters": {"t": 0.25}}
    assert planned("slerp", a, b, **keys).experts == (str(a), str(b))
    assert planned("slerp", a, b, base_model=str(b), **keys).experts == (str(b), str(a))
    assert "needs `t`" in refused("slerp", a, b)


def test_an_adapter_may_be_the_base(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base = write_lora(tmp_path / "base", seed=5)
    found = planned("task_arithmetic", *pair, base_model=str(base), weight=[1.0, 0.5])
    assert found.base == str(base)
    assert found.modules[0].base_coefficient == pytest.approx(-0.5)
    assert len(found.ledger) == 36
    idle = planned("linear", *pair, base_model=str(base))
    assert idle.counts() == {"merged": 24, "dropped": 12}


def test_adapters_that_name_other_bases_are_noticed(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a", base_model_name_or_path="/home/me/llama/")
    b = write_lora(tmp_path / "b", base_model_name_or_path="org/llama@main")
    c = write_lora(tmp_path / "c", base_model_name_or_path="org/qwen")
    assert not any("bases" in note for note in planned("linear", a, b).notes)
    (note,) = [note for note in planned("linear", a, c).notes if "bases" in note]
    assert "/home/me/llama/" in note
    assert "org/qwen" in note


def test_adapters_of_bases_of_another_size_are_refused(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a")
    b = write_lora(
        tmp_path / "b",
        modules=dict.fromkeys(MODULES, (16, 16)),
        base_model_name_or_path="org/larger",
    )
    text = refused("linear", a, b)
    assert "different bases (org/base in" in text
    assert "org/larger" in text
    assert f"6 modules ('{Q}', '{V}', ...): [12 x 8] in {a}, [16 x 16] in {b}" in text


def test_adapters_of_other_bases_that_share_no_module_are_refused(tmp_path: Path) -> None:
    """With one base that is a merge like any other: one adapter changes the attention, the other the rest."""
    modules = {"encoder.layer.0.dense": (8, 12), "encoder.layer.1.dense": (8, 12)}
    a = write_lora(tmp_path / "a")
    b = write_lora(tmp_path / "b", modules=modules, base_model_name_or_path="org/encoder")
    text = refused("linear", a, b)
    assert f"different bases: org/base ({a}), org/encoder ({b}); no module of {a} and {b} is one of the others" in text
    c = write_lora(tmp_path / "c", modules=modules)
    assert len(planned("linear", a, c).modules) == len(MODULES) + 2


def test_modules_that_some_adapters_do_not_change_are_counted(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a")
    b = write_lora(tmp_path / "b", modules={Q: (12, 8), "lm_head": (5, 8)})
    found = planned("linear", a, b)
    assert f"{a} does not change 1 of the 7 modules; there it counts as a change of zero" in found.notes
    assert found.modules[-1].layers[1] is None
    assert [m.name for m in found.modules if m.layers[0] is None] == ["lm_head"]


def test_names_are_matched_by_prefix(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a")
    inner = {name.removeprefix("model."): SIZES[name.rpartition(".")[2]] for name in MODULES}
    found = planned("linear", a, write_lora(tmp_path / "b", modules=inner))
    assert [module.name for module in found.modules] == MODULES
    assert all(None not in module.layers for module in found.modules)
    assert any("by prefix: (no prefix) -> model." in note for note in found.notes)


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "embedding": (
        {
            "modules": {},
            "more": {f"{Q}.lora_embedding_A": torch.zeros(2, 8), f"{Q}.lora_embedding_B": torch.zeros(12, 2)},
        },
        "an embedding in",
    ),
    "transposed": ({"fan_in_fan_out": True}, "a transposed linear layer (fan_in_fan_out) in"),
    "convolution": (
        {
            "modules": {},
            "more": {f"{Q}.lora_A.weight": torch.zeros(2, 8, 3, 3), f"{Q}.lora_B.weight": torch.zeros(12, 2, 1, 1)},
        },
        "a convolution with the kernel [3, 3] in",
    ),
}


@pytest.mark.parametrize(("changes", "words"), KINDS.values(), ids=KINDS)
def test_a_module_of_different_kinds_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    text = refused("linear", write_lora(tmp_path / "a"), write_lora(tmp_path / "b", **changes))
    assert "a linear layer in" in text
    assert words in text


def test_fan_in_fan_out_is_one_for_the_whole_adapter(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a", modules={Q: (12, 8)})
    b = write_lora(tmp_path / "b", modules={V: (6, 8)}, fan_in_fan_out=True)
    assert "stored transposed (fan_in_fan_out) and others are not" in refused("linear", a, b)


def dora(folder: Path, seed: int = 0) -> Path:
    return write_lora(
        folder, modules={Q: (12, 8)}, seed=seed, use_dora=True, more={f"{Q}.lora_magnitude_vector": torch.ones(12)}
    )


def test_dora_is_refused_by_name_unless_it_is_copied(tmp_path: Path) -> None:
    a, b = dora(tmp_path / "a"), dora(tmp_path / "b", 1)
    text = refused("linear", a, b)
    assert "DoRA" in text
    assert "`output: model`" in text
    assert "DoRA" in refused("task_arithmetic", a, weight=[0.5])
    assert "DoRA" in refused("linear", a, rank=1)
    assert "DoRA" in refused("dare_linear", a, parameters={"density": 0.5})
    for method in ("linear", "passthrough", "task_arithmetic", "ties", "dare_ties"):
        assert planned(method, a).config["use_dora"] is True


def test_biases_of_lora_cannot_be_merged_apart_from_its_matrices(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a", modules={Q: (12, 8)}, lora_bias=True, more={f"{Q}.lora_B.bias": torch.ones(12)})
    assert "`lora_bias` has no meaning" in refused("linear", a, space="factors")
    more = {"wte.lora_embedding_A": torch.zeros(2, 9), "wte.lora_embedding_B": torch.zeros(4, 2)}
    b = write_lora(tmp_path / "b", modules={}, more=more)
    assert "can have none beside them" in refused("linear", a, b)
    assert planned("linear", a).config["lora_bias"] is True


def test_the_space_must_fit_the_method_and_the_ranks(pair: tuple[Path, Path]) -> None:
    text = refused("ties", *pair, space="cat", parameters={"density": 0.5})
    assert "space: `space: cat` is a weighted sum of the changes, and ties is none" in text
    text = refused("linear", *pair, space="factors")
    assert "needs equal ranks" in text
    assert "ranks 2 and 3" in text
    assert "`space: delta` or `space: core`" in text


@pytest.mark.parametrize("parameters", [{"trim": "global"}, {"sign_ties": "majority"}])
def test_statistics_of_a_whole_model_are_refused(pair: tuple[Path, Path], parameters: dict[str, Any]) -> None:
    text = refused("ties", *pair, parameters={"density": 0.5, **parameters})
    assert "statistics over the whole model" in text


def saved(folder: Path, rows: int = 4, seed: int = 0, name: str = "classifier.weight", **keys: Any) -> Path:
    more = {name: torch.full((rows, 8), float(seed))}
    return write_lora(folder, seed=seed, more=more, modules_to_save=[name.partition(".")[0], "score"], **keys)


def test_saved_tensors_are_merged_averaged_or_kept(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=2)
    by_method = planned("linear", a, b, weight=[3.0, 1.0])
    assert (by_method.saved[0].method, by_method.saved[0].parameters["weight"]) == ("linear", (3.0, 1.0))
    averaged = planned("task_arithmetic", a, b, weight=[3.0, 1.0])
    assert (averaged.saved[0].method, averaged.saved[0].parameters["weight"]) == ("linear", (1.0, 1.0))
    assert any("averaged instead" in note and "classifier.weight" in note for note in averaged.notes)
    assert averaged.config["modules_to_save"] == ["classifier"]
    kept = planned("linear", a, b, heads=["classifier.*"])
    assert kept.saved == ()
    assert kept.config["modules_to_save"] is None
    assert {name: len(entries) for name, entries in kept.heads.items()} == {"a": 1, "b": 1}
    assert kept.counts() == {"merged": 24, "head": 2}


def test_saved_tensors_that_do_not_fit_name_heads(tmp_path: Path) -> None:
    a, b, c = saved(tmp_path / "a"), saved(tmp_path / "b", rows=6), write_lora(tmp_path / "c")
    text = refused("linear", a, b)
    assert '`heads: ["classifier.*"]`' in text
    assert "[4, 8]" in text
    assert "[6, 8]" in text
    assert f"missing from {c}" in refused("linear", a, c)


def test_rows_of_resized_embeddings_are_never_merged_by_position(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    a, b = saved(tmp_path / "a", rows=32, name=name), saved(tmp_path / "b", rows=34, name=name)
    assert "never merged by row position" in refused("linear", a, b)
    layers = [
        write_lora(
            tmp_path / f"e{rows}",
            modules={},
            more={
                "model.embed_tokens.lora_embedding_A": torch.zeros(2, rows),
                "model.embed_tokens.lora_embedding_B": torch.zeros(8, 2),
            },
        )
        for rows in (32, 34)
    ]
    text = refused("linear", *layers)
    assert "different vocabularies" in text
    assert "never merged by position" in text


@pytest.mark.parametrize("tokens", [["a", "c", "b"], ["a", "b", "x"]], ids=["moved", "another token"])
def test_other_tokens_in_the_rows_of_merged_embeddings_are_refused(tmp_path: Path, tokens: list[str]) -> None:
    name = "model.embed_tokens.weight"
    a, b = saved(tmp_path / "a", rows=3, name=name), saved(tmp_path / "b", rows=3, name=name)
    for folder, words in ((a, ["a", "b", "c"]), (b, tokens)):
        vocabulary = {token: row for row, token in enumerate(words)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    text = refused("linear", a, b)
    assert "different vocabularies" in text
    assert planned("linear", a, b, take={"*embed_tokens*": str(a)}).counts()["copied"] == 1
    assert planned("linear", a, b, heads=["*embed_tokens*"]).counts()["head"] == 2


def test_a_damaged_tokenizer_does_not_hide_that_the_others_differ(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    layers = [saved(tmp_path / folder, rows=3, name=name) for folder in "abc"]
    for folder, words in zip(layers[1:], (["a", "b", "c"], ["a", "c", "b"]), strict=True):
        vocabulary = {token: row for row, token in enumerate(words)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    (layers[0] / "tokenizer.json").write_text("{}")
    assert "different vocabularies" in refused("linear", *layers)


def test_drop_and_take_work_on_modules(pair: tuple[Path, Path]) -> None:
    a, b = pair
    found = planned("linear", a, b, drop=["*.v_proj"], take={f"{Q}*": str(b)})
    assert [module.name.rpartition(".")[2] for module in found.modules] == ["q_proj"] * 3
    assert found.modules[0].coefficients == (0.0, 1.0)
    assert found.modules[0].rank == 3
    assert found.modules[1].coefficients == (0.5, 0.5)
    assert found.counts() == {"dropped": 14, "copied": 2, "merged": 8}
    assert {entry.detail for entry in found.ledger if entry.fate == "dropped"} == {
        "the recipe drops *.v_proj",
        f"taken from {b}",
    }


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"drop": ["nothing.*"]}, "drop: the pattern 'nothing.*' fits no module and no tensor"),
        ({"take": {"nothing.*": "A"}}, "take.nothing.*: the pattern 'nothing.*' fits"),
        ({"take": {"*": "elsewhere"}}, "take.*: elsewhere is not among the merged adapters"),
        ({"heads": ["*q_proj*"]}, "heads: the pattern '*q_proj*' fits no saved tensor"),
        ({"drop": ["*"]}, "nothing is left to merge"),
        ({"tokenizer": {"source": "union"}}, "`tokenizer` has no meaning for a merge of adapters"),
        ({"chat_template": "auto"}, "`chat_template` has no meaning"),
    ],
)
def test_keys_that_mean_nothing_are_refused_by_name(pair: tuple[Path, Path], keys: dict[str, Any], words: str) -> None:
    keys = json.loads(json.dumps(keys).replace('"A"', json.dumps(str(pair[0]))))
    assert words in refused("linear", *pair, **keys)


def test_slices_of_adapters_are_refused(pair: tuple[Path, Path]) -> None:
    sources = [{"model": str(folder), "layer_range": [0, 1]} for folder in pair]
    with pytest.raises(PlanError, match="adapters cannot be cut into slices"):
        plan({"merge_method": "linear", "slices": [{"sources": sources}]})


def test_problems_are_reported_together(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a", modules={Q: (12, 8), V: (6, 8)})
    b = write_lora(tmp_path / "b", modules={Q: (10, 8), V: (6, 8)}, rank=3)
    text = refused("linear", a, b, chat_template="auto", drop=["nothing"])
    assert text.startswith("3 problems:")
    text = refused("ties", a, saved(tmp_path / "c", rank=3), drop=["*layers.1*", "*layers.2*"], space="factors")
    assert "needs equal ranks" in text
    assert "`heads:" in text


# What the models are.


def test_adapters_among_full_models_name_their_base_and_the_spelling(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    full = write_model(tmp_path / "full")
    text = refused("linear", pair[0], full)
    assert f"models[0]: {pair[0]}: is a LoRA adapter of org/base, and {full} is none" in text
    assert f"'org/base+{pair[0]}'" in text


def test_what_is_for_adapters_is_refused_for_full_models(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a"), write_model(tmp_path / "b", 1)
    for keys in ({"output": "adapter"}, {"space": "core"}, {"rank": 3}):
        text = refused("linear", a, b, **keys)
        assert f"`{next(iter(keys))}` is for merges of adapters" in text
    assert "ties needs a base model" in refused("ties", a, b)
    call = {"adapters": [str(a), str(b)], "combination_type": "linear"}
    with pytest.raises(PlanError, match=r"`combination_type` is for merges of adapters"):
        plan(call)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"output": "lora"}, "output: 'lora' is not what a merge of adapters can give. Write adapter or model"),
        ({"space": "deltas"}, "Did you mean `delta`?"),
        ({"rank": 0}, "rank: 0 is not a rank. Write a whole number of at least 1, auto or full"),
        ({"rank": True}, "True is not a rank"),
        ({"rank": 2.5}, "2.5 is not a rank"),
        ({"output": "model", "space": "core"}, "`output: model` makes none"),
        ({"output": "model", "rank": 8}, "rank: `rank` says how the merged adapter is made"),
    ],
)
def test_bad_values(pair: tuple[Path, Path], keys: dict[str, Any], words: str) -> None:
    assert words in refused("linear", *pair, **keys)


def test_a_damaged_adapter_is_an_error_with_its_place(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (pair[1] / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"models\[1\]: .*adapter_model\.safetensors"):
        plan(adapters_recipe("linear", *pair))


def test_adapters_are_not_merged_in_stages(pair: tuple[Path, Path]) -> None:
    stage = {**adapters_recipe("linear", *pair), "name": "stage"}
    final = {"merge_method": "linear", "models": [{"model": "stage"}, {"model": str(pair[0])}]}
    with pytest.raises(PlanError, match="adapters cannot be merged in a recipe of several merges"):
        plan([stage, final])


def test_output_model_writes_every_adapter_with_its_base(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = map(str, pair)

    def rewritten(method: str, **keys: Any) -> Any:
        (recipe,) = load_recipes(adapters_recipe(method, *pair, output="model", **keys))
        return as_models(recipe, adapters_of([recipe]))

    found = rewritten("ties", take={"*v_proj*": a})
    assert [model.model for model in found.models] == [f"org/base+{a}", f"org/base+{b}"]
    assert (found.base_model, found.output, found.take) == ("org/base", None, {"*v_proj*": f"org/base+{a}"})
    named = rewritten("ties", base_model="./mine")
    assert (named.models[0].model, named.base_model) == (f"./mine+{a}", "./mine")
    assert rewritten("slerp", parameters={"t": 0.5}).base_model == f"org/base+{a}"
    assert rewritten("slerp", parameters={"t": 0.5}, base_model=b).base_model == f"org/base+{b}"
    write_lora(tmp_path / "b", base_model_name_or_path="org/other")
    with pytest.raises(PlanError, match=r"which base to merge into is not said.*org/base in .*org/other in"):
        rewritten("ties")


# The configuration of the output.


def test_targets_are_the_adapters_own_words_where_these_select_the_same(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a")
    assert planned("linear", a).config["target_modules"] == ["q_proj", "v_proj"]
    up = {f"model.layers.{n}.mlp.up_proj": SIZES["up_proj"] for n in range(3)}
    b = write_lora(tmp_path / "b", modules=up)
    assert planned("linear", a, b).config["target_modules"] == ["q_proj", "v_proj", "up_proj"]
    c = write_lora(tmp_path / "c", modules={Q: (12, 8)}, layers_to_transform=[0])
    found = planned("linear", a, c).config
    assert found["target_modules"] == MODULES
    assert found["layers_to_transform"] is None
    assert planned("linear", c).config["layers_to_transform"] == [0]
    dropped = planned("linear", a, drop=["*.0.*"]).config
    assert dropped["target_modules"] == MODULES[2:]
    regexp = write_lora(tmp_path / "d", target_modules=r".*\.[qv]_proj")
    assert planned("linear", regexp).config["target_modules"] == r".*\.[qv]_proj"
    assert planned("linear", a, regexp).config["target_modules"] == MODULES
    partial = write_lora(tmp_path / "e", modules={Q: (12, 8)})
    assert planned("linear", a, partial).config["target_modules"] == MODULES, "q_proj alone would select more for e"


def test_the_configuration_says_what_the_output_is(tmp_path: Path) -> None:
    a = write_lora(tmp_path / "a", use_rslora=True, lora_dropout=0.05, eva_config={"rho": 2}, init_lora_weights="eva")
    b = write_lora(tmp_path / "b", bias="all", more={"model.layers.0.self_attn.q_proj.base_layer.bias": torch.ones(12)})
    found = planned("linear", a, b, drop=["*bias"]).config
    assert (found["use_rslora"], found["init_lora_weights"], found["inference_mode"]) == (False, True, True)
    assert found["lora_dropout"] == 0.05
    assert "eva_config" not in found
    assert found["bias"] == "all"
    assert found["task_type"] == "CAUSAL_LM"


# Identity of plans, and what a merge will take.


@pytest.mark.parametrize(
    "change",
    [
        {"weight": [0.5, 0.25]},
        {"space": "core"},
        {"rank": 2},
        {"rank": "auto"},
        {"dtype": "float16"},
        {"accumulate": "float64"},
        {"drop": ["*.v_proj"]},
    ],
    ids=str,
)
def test_hash_changes_with_what_is_calculated(pair: tuple[Path, Path], change: dict[str, Any]) -> None:
    assert planned("linear", *pair, **change).hash != planned("linear", *pair).hash


def test_hash_knows_the_seed_of_random_methods_alone(pair: tuple[Path, Path]) -> None:
    keys = {"parameters": {"density": 0.5}}
    assert planned("dare_ties", *pair, seed=1, **keys).hash != planned("dare_ties", *pair, **keys).hash
    assert planned("ties", *pair, seed=1, **keys).hash == planned("ties", *pair, **keys).hash
    found = plan(adapters_recipe("dare_ties", *pair, **keys), seed=1)
    assert found.hash == planned("dare_ties", *pair, seed=1, **keys).hash
    assert planned("linear", *pair[::-1]).hash != planned("linear", *pair).hash


def test_memory_limits_make_threads_fewer(pair: tuple[Path, Path]) -> None:
    found = planned("linear", *pair, rank=4)
    assert fit_adapters(found, "cpu", 4, None) == 4
    assert fit_adapters(found, "cpu", 4, peak_bytes(found, 2)) == 2
    with pytest.raises(UserError, match=r"cannot work in 1\.0 MB.*The least it needs"):
        fit_adapters(found, "cpu", 4, 1_000_000)
    with pytest.raises(UserError, match="at least 1"):
        fit_adapters(found, "cpu", 0, None)
    with pytest.raises(UserError, match="unknown device"):
        fit_adapters(found, "tpu", 1, None)
    dense = planned("ties", *pair, parameters={"density": 0.5})
    assert peak_bytes(dense, 4) == peak_bytes(dense, 1) > peak_bytes(found, 1)


def test_the_command_folds_layers_and_names_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a", rank=2)
    saved(tmp_path / "b", rank=3, seed=1)
    recipe = adapters_recipe("ties", Path("a"), Path("b"), parameters={"density": 0.5, "weight": [0.0, 1.0]})
    write_recipe(tmp_path / "r.yml", recipe)
    lines = weld("plan", "r.yml").out.splitlines()
    assert lines[0] == "ties: 2 adapters to an adapter in space delta, up to 306 parameters"
    assert lines[1].split() == ["base", "org/base"]
    (row,) = [line for line in lines if line.startswith("model.layers.*.self_attn.q_proj")]
    assert row.split() == ["model.layers.*.self_attn.q_proj", "3", "12x8", "2+3", "3", "weight", "0..1"]
    assert any(line.startswith("classifier.weight") and "stored whole, linear" in line for line in lines)
    assert any("memory  about" in line for line in lines)
    every = weld("plan", "r.yml", "--all").out
    assert all(name in every for name in MODULES)
    record = json.loads(weld("plan", "r.yml", "--json").out)
    assert record["output"] == "adapter"
    assert len(record["modules"]) == 6
    assert record["forecast"]["read_bytes"] > 0
    assert record["fates"] == {"merged": 26}
