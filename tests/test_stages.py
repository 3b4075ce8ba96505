"""Merges that build on each other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from weldment import MergeError, PlanError, merge, plan
from weldment.engine.progress import Amount, Silent


def stage(name: str, method: str, *inputs: Path | str, **keys: Any) -> dict[str, Any]:
    return {"name": name, **models.recipe(method, *map(Path, inputs), **keys)}


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    return [models.save_decoder(tmp_path / f"m{seed}", layers=3, seed=seed) for seed in range(4)]


def by_hand(documents: list[dict[str, Any]], folder: Path) -> Path:
    """Run each merge on its own; later ones read the earlier ones' outputs."""
    made: dict[str, Path] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return str(made.get(value, value)) if isinstance(value, str) else value

    out = folder
    for number, document in enumerate(copy.deepcopy(documents)):
        name = document.pop("name", None)
        out = folder / str(number)
        merge(replaced(document), out)
        if name is not None:
            made[name] = out
    return out


def check(documents: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The staged merge equals the merges done one by one, and leaves nothing beside its output."""
    before = {path.name for path in tmp_path.iterdir()}
    merge(documents, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} - before == {"out"}
    assert not [path for path in (tmp_path / "out").iterdir() if path.name == "stages"]
    expected = by_hand(documents, tmp_path / "by hand")
    models.assert_same(models.read_state(tmp_path / "out"), models.read_state(expected), exact=True)
    assert models.read_config(tmp_path / "out") == models.read_config(expected)
    return tmp_path / "out"


def test_later_merge_uses_an_earlier_one_as_a_model(four: list[Path], tmp_path: Path) -> None:
    check([stage("soup", "linear", *four[:2]), models.recipe("linear", Path("soup"), four[2])], tmp_path)


def test_later_merge_uses_an_earlier_one_as_its_base(four: list[Path], tmp_path: Path) -> None:
    final = models.recipe("ties", *four[2:], base=Path("soup"), parameters={"density": 0.5, "weight": 0.5})
    check([stage("soup", "linear", *four[:2]), final], tmp_path)


def test_merges_in_a_chain_and_an_earlier_one_that_two_others_use(four: list[Path], tmp_path: Path) -> None:
    documents = [
        stage("soup", "linear", *four[:2]),
        stage("left", "slerp", "soup", four[2], base_model="soup", parameters={"t": 0.3}),
        stage("right", "task_arithmetic", four[3], base_model="soup"),
        models.recipe("linear", Path("left"), Path("right")),
    ]
    check(documents, tmp_path)
    assert [inner.recipe.name for inner in plan(documents).stages] == ["soup", "left", "right"]


def test_earlier_merge_converts_and_so_does_not_carry_more_than_its_dtype(four: list[Path], tmp_path: Path) -> None:
    documents = [stage("soup", "linear", *four[:2], dtype="bfloat16"), models.recipe("linear", Path("soup"), four[2])]
    out = check(documents, tmp_path)
    assert models.read_state(out)["model.norm.weight"].dtype == torch.bfloat16


def test_only_what_a_later_merge_reads_is_made(four: list[Path], tmp_path: Path) -> None:
    pieces = [{"sources": [{"model": model, "layer_range": [0, 1]}]} for model in ("soup", str(four[2]))]
    documents = [stage("soup", "linear", *four[:2]), {"merge_method": "passthrough", "slices": pieces}]
    check(documents, tmp_path)
    planned = plan(documents)
    (soup,) = planned.stages
    wanted = {name for name in models.read_state(four[0]) if "layers.0." in name or "embed" in name}
    assert {job.name for job in soup.jobs} == wanted
    assert soup.write_bytes < planned.write_bytes
    assert {slot.name for slot in soup.layout.slots} == wanted
    fates = {(entry.model, entry.tensor): entry for entry in soup.ledger}
    assert len(fates) == len(soup.ledger) == 2 * len(models.read_state(four[0]))
    unread = fates[str(four[0]), "model.norm.weight"]
    assert (unread.fate, unread.detail) == ("dropped", "no later merge reads what it goes into")
    assert fates[str(four[0]), "model.embed_tokens.weight"].fate == "merged"


def test_what_an_unread_merge_needs_is_not_made_either(four: list[Path]) -> None:
    pieces = [{"sources": [{"model": model, "layer_range": [0, 1]}]} for model in ("two", str(four[3]))]
    documents = [
        stage("one", "linear", *four[:2]),
        stage("two", "linear", "one", four[2]),
        {"merge_method": "passthrough", "slices": pieces},
    ]
    one, two = plan(documents).stages
    assert {job.name for job in one.jobs} == {job.name for job in two.jobs}
    assert not any("layers.1." in job.name for job in one.jobs)


def test_untied_earlier_merge(four: list[Path], tmp_path: Path) -> None:
    models.save_decoder(four[1], layers=3, tied=False, seed=1)
    documents = [stage("soup", "linear", *four[:2]), models.recipe("linear", Path("soup"), four[2])]
    out = check(documents, tmp_path)
    assert "lm_head.weight" in models.read_state(out)


def test_earlier_merge_of_slices_has_the_depth_of_its_slices(four: list[Path], tmp_path: Path) -> None:
    piece = {"sources": [{"model": str(four[0]), "layer_range": [0, 2]}]}
    documents = [
        {"name": "short", "merge_method": "passthrough", "slices": [piece]},
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "short", "layer_range": [0, 2]}]}, piece]},
    ]
    out = check(documents, tmp_path)
    assert models.read_config(out)["num_hidden_layers"] == 4
    with pytest.raises(PlanError, match="goes beyond the 2 layers of short"):
        plan(
            [
                documents[0],
                {"merge_method": "passthrough", "slices": [{"sources": [{"model": "short", "layer_range": [0, 3]}]}]},
            ]
        )


def test_heads_of_earlier_merges_are_kept_in_the_final_output(tmp_path: Path) -> None:
    state = models.decoder_state()
    folders = [
        models.save_state(
            tmp_path / name, {**state, "score.weight": torch.full((rows, 4), float(rows))}, {"rows": rows}
        )
        for rows, name in enumerate(("a", "b", "c"), 1)
    ]
    documents = [
        stage("soup", "linear", *folders[:2], heads=["score.*"]),
        models.recipe("linear", Path("soup"), folders[2], heads=["score.*"]),
    ]
    merge(documents, tmp_path / "out")
    for rows, name in enumerate("abc", 1):
        head = models.load_file(tmp_path / "out" / "heads" / f"{name}.safetensors")
        assert head["score.weight"].tolist() == [[float(rows)] * 4] * rows
        assert (tmp_path / "out" / "heads" / f"{name}.json").is_file()
    (soup,) = plan(documents).stages
    assert ("score.weight", "head") in {(entry.tensor, entry.fate) for entry in soup.ledger}


def test_head_of_an_expert_of_two_merges_is_kept_once(tmp_path: Path) -> None:
    state = models.decoder_state()
    folders = [
        models.save_state(tmp_path / name, {**state, "score.weight": torch.ones(1, 4)}) for name in ("a", "b", "c")
    ]
    documents = [
        stage("one", "linear", *folders[:2], heads=["score.*"]),
        stage("two", "linear", *folders[1:], heads=["score.*"]),
        models.recipe("linear", Path("one"), Path("two")),
    ]
    merge(documents, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "heads").iterdir()) == [f"{n}.safetensors" for n in "abc"]


def test_head_of_a_merge_that_a_later_one_keeps(tmp_path: Path) -> None:
    state = models.decoder_state()
    folders = [
        models.save_state(tmp_path / name, {**state, "score.weight": torch.full((1, 4), value)})
        for name, value in (("a", 1.0), ("b", 3.0), ("c", 9.0))
    ]
    documents = [
        stage("soup", "linear", *folders[:2]),
        stage("more", "linear", "soup", folders[2], heads=["score.*"]),
        models.recipe("linear", Path("more"), folders[2], drop=["score.*"]),
    ]
    merge(documents, tmp_path / "out")
    assert models.load_file(tmp_path / "out" / "heads" / "soup.safetensors")["score.weight"].tolist() == [[2.0] * 4]


def test_side_files_and_tokenizer_pass_through_an_earlier_merge(tmp_path: Path) -> None:
    words = [
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": unknown}})
        for unknown in ("a", "b")
    ]
    files = {"generation_config.json": "{}", "tokenizer.json": words[0]}
    config = models.decoder_config()
    first = models.save_state(tmp_path / "a", models.decoder_state(), config, **files)
    second = models.save_state(tmp_path / "b", models.decoder_state(seed=1), config, **{"tokenizer.json": words[1]})
    soup = stage("soup", "linear", first, second, tokenizer_source=str(second))
    merge([soup, models.recipe("linear", Path("soup"), first)], tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == "{}"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == words[1]


def test_notes_of_earlier_merges_are_told(four: list[Path]) -> None:
    soup = stage("soup", "linear", *four[:2], parameters={"int8_mask": True})
    notes = plan([soup, models.recipe("linear", Path("soup"), four[2])]).notes
    assert [note.partition(":")[0] for note in notes] == ["soup"]


def test_seed_of_a_call_replaces_those_of_all_merges(four: list[Path]) -> None:
    parameters = {"density": 0.5}
    soup = stage("soup", "dare_linear", four[1], base_model=str(four[0]), parameters=parameters, seed=3)
    documents = [soup, models.recipe("dare_linear", Path("soup"), base=four[2], parameters=parameters, seed=4)]
    planned = plan(documents, seed=9)
    assert [planned.recipe.seed, planned.stages[0].recipe.seed] == [9, 9]
    assert [plan(documents).recipe.seed, plan(documents).stages[0].recipe.seed] == [4, 3]


class StoppedError(MergeError):
    pass


class StopAfter(Silent):
    """Stops the merge after some tensors."""

    def __init__(self, count: int) -> None:
        self.left = count

    def advance(self, tensor: str, amount: Amount) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoppedError("stopped")


@pytest.mark.parametrize("count", [0, 1, 7, 15, 20])
def test_staged_merge_that_was_stopped_goes_on_to_the_same_bytes(count: int, four: list[Path], tmp_path: Path) -> None:
    documents = [stage("soup", "linear", *four[:2]), models.recipe("linear", Path("soup"), four[2])]
    with pytest.raises(StoppedError):
        merge(documents, tmp_path / "out", threads=1, progress=StopAfter(count))
    assert not (tmp_path / "out").exists()
    merge(documents, tmp_path / "out")
    merge(documents, tmp_path / "again")
    for path in sorted((tmp_path / "again").iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "out.partial").exists()
