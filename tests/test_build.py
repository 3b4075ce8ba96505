"""Plans: what they say of every tensor, and when two are the same."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import models
from weldment import PlanError, merge, plan
from weldment.checkpoint.model import Checkpoint, TensorEntry, WeightFile
from weldment.planning.build import build_plan
from weldment.planning.plan import Plan
from weldment.planning.stages import plan_merges
from weldment.recipe import load_recipes


@pytest.fixture
def trio(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, one, two = (models.save_decoder(tmp_path / f"m{seed}", seed=seed) for seed in range(3))
    return base, one, two


def dare(trio: tuple[Path, Path, Path], **keys: Any) -> dict[str, Any]:
    base, *experts = trio
    return models.recipe("dare_ties", *experts, base=base, **{"parameters": {"density": 0.5, "weight": 0.5}, **keys})


def test_hash_is_that_of_the_same_recipe_on_the_same_models(trio: tuple[Path, Path, Path]) -> None:
    assert plan(dare(trio)).hash == plan(dare(trio)).hash
    assert len(plan(dare(trio)).hash) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"density": 0.5, "weight": 0.25}},
        {"parameters": {"density": 0.25, "weight": 0.5}},
        {"parameters": {"density": 0.5, "weight": 0.5, "lambda": 2.0}},
        {"parameters": {"density": 0.5, "weight": [0.5, 0.6]}},
        {"parameters": {"density": 0.5, "weight": [{"filter": "mlp", "value": 0.4}, {"value": 0.5}]}},
        {"merge_method": "dare_linear"},
        {"seed": 1},
        {"dtype": "float16"},
        {"accumulate": "float64"},
        {"drop": ["model.norm.weight"]},
    ],
    ids=str,
)
def test_hash_changes_with_what_is_calculated(change: dict[str, Any], trio: tuple[Path, Path, Path]) -> None:
    assert plan({**dare(trio), **change}).hash != plan(dare(trio)).hash


def test_hash_changes_with_the_layout_the_order_and_the_models(trio: tuple[Path, Path, Path]) -> None:
    first = plan(dare(trio))
    assert plan(dare(trio), shard_size=100).hash != first.hash
    assert plan(dare(trio), seed=5).hash != first.hash
    base, one, two = trio
    assert plan(dare((base, two, one))).hash != first.hash
    assert plan(dare((one, base, two))).hash != first.hash
    linear = models.recipe("linear", one, two)
    assert plan(linear).hash != plan(models.recipe("linear", two, one)).hash


def test_hash_does_not_depend_on_where_the_models_lie(
    trio: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dare((Path("m0"), Path("m1"), Path("m2")))
    monkeypatch.chdir(tmp_path)
    here = merge(recipe, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    for model in trio:
        shutil.move(model, tmp_path / "elsewhere" / model.name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = merge(recipe, tmp_path / "out2")
    assert there.plan.hash == here.plan.hash
    assert there.checksums == here.checksums


def test_spelling_of_a_recipe_does_not_matter(trio: tuple[Path, Path, Path]) -> None:
    recipe = dare(trio)
    per_model = [{**entry, "parameters": {"weight": 0.5, "density": 0.5}} for entry in recipe["models"]]
    assert plan({**recipe, "models": per_model, "parameters": {"int8_mask": True}}).hash == plan(recipe).hash


def test_random_keys_differ_for_models_and_tensors_and_for_a_model_that_is_listed_twice(
    trio: tuple[Path, Path, Path],
) -> None:
    base, one, _ = trio
    planned = plan(dare((base, one, one)))
    keys = [key for job in planned.jobs for key in job.keys]
    assert len(keys) == 2 * len(planned.jobs)
    assert len(set(keys)) == len(keys)


def test_random_masks_of_a_model_do_not_depend_on_its_place(trio: tuple[Path, Path, Path]) -> None:
    base, one, two = trio
    first, second = plan(dare((base, one, two))), plan(dare((base, two, one)))
    assert [job.keys for job in first.jobs] == [job.keys[::-1] for job in second.jobs]


def test_jobs_are_in_the_order_of_the_reference_files(trio: tuple[Path, Path, Path]) -> None:
    base, *_ = trio
    planned = plan(dare(trio))
    names = [job.name for job in planned.jobs]
    assert names == list(planned.models[str(base)].tensors)
    offsets = [job.base.offset for job in planned.jobs if job.base is not None]
    assert offsets == sorted(offsets)


def test_read_and_write_bytes(trio: tuple[Path, Path, Path]) -> None:
    planned = plan(dare(trio, dtype="bfloat16"))
    stored = sum(tensor.nbytes for tensor in models.read_state(trio[0]).values())
    assert planned.read_bytes == 3 * stored
    assert planned.write_bytes == planned.layout.files[0].size
    assert planned.write_bytes - len(planned.layout.files[0].header) == stored // 2
    assert planned.parameters_count == stored // 4


def test_record_of_every_job_is_plain_data(trio: tuple[Path, Path, Path]) -> None:
    for job in plan(dare(trio)).jobs:
        assert json.loads(json.dumps(job.record())) == json.loads(json.dumps(job.record(), default=str))
        assert [source[0] for source in job.record()["sources"]] == [str(path) for path in trio[1:]]


def test_shards_smaller_than_a_tensor_are_said(trio: tuple[Path, Path, Path]) -> None:
    assert any("larger than a shard" in note for note in plan(dare(trio), shard_size=100).notes)
    assert plan(dare(trio)).notes == ()


def test_planning_reads_no_weights_but_to_compare_heads(trio: tuple[Path, Path, Path]) -> None:
    """Headers are enough: the data of the files may be anything."""
    for model in trio:
        path = model / "model.safetensors"
        size = path.stat().st_size
        header = int.from_bytes(path.read_bytes()[:8], "little") + 8
        os.truncate(path, header)
        os.truncate(path, size)
    assert plan(dare(trio)).counts() == {"merged": 3 * len(models.read_state(trio[0]))}


def test_tokenizer_of_the_recipe(trio: tuple[Path, Path, Path]) -> None:
    base, one, _ = trio
    for model in trio:
        content = {"model": {"type": "BPE", "vocab": {"x": 0, "y": 1}, "merges": []}, "added_tokens": []}
        (model / "tokenizer.json").write_text(json.dumps(content))
    assert plan(dare(trio)).tokenizer.reference == str(base)
    assert plan(dare(trio, tokenizer_source="base")).tokenizer.reference == str(base)
    assert plan(dare(trio, tokenizer_source=str(one))).tokenizer.reference == str(one)
    assert plan(dare(trio, tokenizer_source="union")).tokenizer.reference == str(base)
    with pytest.raises(PlanError, match=r"tokenizer_source: elsewhere is not among the models"):
        plan(dare(trio, tokenizer_source="elsewhere"))
    with pytest.raises(PlanError, match=r"tokenizer\.source: elsewhere is not among the models"):
        plan(dare(trio, tokenizer={"source": "elsewhere"}))
    padded = plan(dare(trio, tokenizer={"source": "base", "pad_to_multiple_of": 100}))
    assert next(job.shape[0] for job in padded.jobs if job.name == "model.embed_tokens.weight") == 100
    assert padded.config["vocab_size"] == 100


NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.fc.weight",
    "model.layers.0.attn.bias",
    "model.layers.1.fc.weight",
    "model.norm.weight",
    "model.position_ids",
    "lm_head.weight",
    "classifier.weight",
    "bn.num_batches_tracked",
]
SHAPES = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4), "model.layers.0.attn.bias": (1, 1, 4, 4)}


def checkpoint(reference: str, names: list[str], prefix: str) -> Checkpoint:
    """A model that is on the Hub: its headers are known, its weights are not here."""
    file = WeightFile("model.safetensors", 1 << 20)
    dtypes = {"model.position_ids": "I64", "bn.num_batches_tracked": "I64"}
    tensors = {
        prefix + name: TensorEntry(
            prefix + name, dtypes.get(name, "F32"), SHAPES.get(name, (4,)), file, 8 + 512 * place
        )
        for place, name in enumerate(names)
    }
    return Checkpoint(reference, tensors, (file,), config={"model_type": "x", "num_hidden_layers": 2})


def check_ledger(planned: Plan) -> None:
    tensors = [(model, name) for model, opened in planned.models.items() for name in opened.tensors]
    assert sorted((entry.model, entry.tensor) for entry in planned.ledger) == sorted(tensors)
    assert sum(planned.counts().values()) == len(tensors)
    used = {(model, entry.name) for job in planned.jobs for model, entry in job.inputs}
    for entry in planned.ledger:
        assert (entry.fate != "dropped") == ((entry.model, entry.tensor) in used)
        assert entry.fate != "dropped" or entry.detail
    written = Counter(job.file for job in planned.jobs)
    assert sum(written.values()) == len(planned.layout.slots)


SUBSETS = st.lists(st.sampled_from(NAMES), min_size=5, unique=True)


@settings(max_examples=300)
@given(
    names=st.lists(SUBSETS, min_size=3, max_size=3),
    prefixes=st.lists(st.sampled_from(["", "wrapper."]), min_size=3, max_size=3),
    method=st.sampled_from(["linear", "ties", "slerp", "dare_linear"]),
    patterns=st.dictionaries(st.sampled_from(["drop", "heads", "take"]), st.sampled_from(NAMES), max_size=3),
)
def test_every_tensor_is_in_the_ledger_once_with_its_fate(
    names: list[list[str]], prefixes: list[str], method: str, patterns: dict[str, str]
) -> None:
    opened = {model: checkpoint(model, own, prefix) for model, own, prefix in zip("abc", names, prefixes, strict=True)}
    document: dict[str, Any] = {"merge_method": method, "base_model": "a", "parameters": {"t": 0.5}}
    document["models"] = [{"model": "b"}] if method == "slerp" else [{"model": "b"}, {"model": "c"}]
    document |= {key: {name: "b"} if key == "take" else [name] for key, name in patterns.items()}
    (recipe,) = load_recipes(document)
    try:
        planned = build_plan(recipe, {model: opened[model] for model in recipe.references()})
    except PlanError:
        # Misfits are the usual case: models that share too little are not what this is about.
        assume(False)
        return
    check_ledger(planned)


def test_ledger_of_stages_counts_every_tensor(trio: tuple[Path, Path, Path]) -> None:
    base, one, two = trio
    soup = {"name": "soup", **models.recipe("linear", one, two)}
    planned = plan([soup, models.recipe("ties", Path("soup"), base=base)])
    check_ledger(planned)
    check_ledger(planned.stages[0])


def test_order_of_the_models_mapping_does_not_matter(trio: tuple[Path, Path, Path]) -> None:
    recipes = load_recipes(dare(trio))
    opened = dict(plan(dare(trio)).models)
    items = list(opened.items())
    random.Random(0).shuffle(items)
    assert plan_merges(recipes, dict(items)).hash == plan_merges(recipes, opened).hash


def test_integers_are_copied_whatever_the_dtype_of_the_output(tmp_path: Path) -> None:
    state = {"a.w": torch.ones(2), "a.steps": torch.tensor([2**53 + 1])}
    folders = [models.save_state(tmp_path / name, state) for name in "ab"]
    merge(models.recipe("linear", *folders, dtype="float16"), tmp_path / "out")
    found = models.read_state(tmp_path / "out")
    assert found["a.steps"].tolist() == [2**53 + 1]
    assert found["a.w"].dtype == torch.float16
