"""From recipe to output folder: inputs of every kind, files beside the weights, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models import ARCHITECTURES, State
from weldment import CheckpointError, MergeError, NonFiniteError, OutputError, UserError, merge, plan, verify
from weldment.checkpoint import staging
from weldment.engine.progress import Amount, Silent


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_recipe(tmp_path: Path) -> dict[str, Any]:
    base, *experts = (models.save_decoder(tmp_path / f"m{seed}", seed=seed, rows=3000) for seed in range(3))
    return models.recipe("dare_ties", *experts, base=base, parameters={"density": 0.4, "weight": 0.5})


def test_two_runs_write_the_same_bytes_whatever_the_threads_and_the_folder(tmp_path: Path) -> None:
    recipe = random_recipe(tmp_path)
    merge(recipe, tmp_path / "one", threads=1, shard_size=20_000)
    merge(recipe, tmp_path / "two", threads=3, shard_size=20_000, max_memory=290_000_000)
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    assert {"weldment.json", "README.md", "config.json", "model.safetensors.index.json"} <= first.keys()
    assert verify(tmp_path / "one").tensors == len(models.read_state(tmp_path / "one"))


def test_another_seed_writes_other_bytes(tmp_path: Path) -> None:
    recipe = random_recipe(tmp_path)
    merge(recipe, tmp_path / "one")
    merge(recipe, tmp_path / "two", seed=1)
    assert contents(tmp_path / "one")["model.safetensors"] != contents(tmp_path / "two")["model.safetensors"]


def test_shards_load_in_transformers(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    family = models.save_family(architecture, tmp_path)
    merge(models.recipe("linear", *family.experts), tmp_path / "out", shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    models.loaded(architecture, tmp_path / "out")
    models.assert_same(models.read_state(tmp_path / "out"), models.average(*map(models.read_state, family.experts)))


def save_sharded(folder: Path, state: State) -> Path:
    names = sorted(state)
    groups = names[::2], names[1::2]
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    folder.mkdir()
    for file, group in zip(files, groups, strict=True):
        models.save_file({name: state[name] for name in group}, folder / file)
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    models.save_state(folder / "x", {})
    (folder / "model.safetensors.index.json").write_text(models.json.dumps({"weight_map": weight_map}))
    return folder


def save_pickle(folder: Path, state: State) -> Path:
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


KINDS: dict[str, Callable[[Path, State], Path]] = {
    "folder": models.save_state,
    "shards": save_sharded,
    "bin": save_pickle,
    "single file": lambda path, state: models.save_state(path, state) / "model.safetensors",
    "single bin": lambda path, state: save_pickle(path, state) / "pytorch_model.bin",
}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_kind_give_the_same_output(kind: str, tmp_path: Path) -> None:
    states = [models.decoder_state(seed=seed) for seed in (0, 1)]
    inputs = [KINDS[kind](tmp_path / str(number), state) for number, state in enumerate(states)]
    merge(models.recipe("linear", *inputs), tmp_path / "out")
    models.assert_same(models.read_state(tmp_path / "out"), models.average(*states))


def test_dtypes_may_be_mixed_and_the_first_model_decides(tmp_path: Path) -> None:
    states = [models.decoder_state(seed=seed) for seed in (0, 1, 2)]
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    inputs = []
    for number, (state, dtype) in enumerate(zip(states, kinds, strict=True)):
        stored = {name: tensor.to(dtype) for name, tensor in state.items()}
        inputs.append(models.save_state(tmp_path / str(number), stored))
    merge(models.recipe("linear", *inputs), tmp_path / "out")
    read = [{name: tensor.double() for name, tensor in models.read_state(path).items()} for path in inputs]
    expected = {name: tensor.bfloat16() for name, tensor in models.average(*read).items()}
    for name, tensor in models.read_state(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, expected[name], rtol=2**-8, atol=0)


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32), ("float64", torch.float64)],
)
def test_output_has_the_dtype_of_the_recipe(key: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    inputs = [models.save_decoder(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    merge(models.recipe("linear", *inputs, **{key: name}), tmp_path / "out")
    assert {tensor.dtype for tensor in models.read_state(tmp_path / "out").values()} == {dtype}
    assert models.read_config(tmp_path / "out")["dtype"] == name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_copies_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also of float64, which would lose digits on its way through float32, and of NaN's payload and minus zero."""
    values = torch.randn(1000, dtype=torch.float64).to(dtype)
    values[:2] = torch.tensor([-0.0, torch.finfo(dtype).tiny])
    model = models.save_state(tmp_path / "a", {"x.weight": values, "y.weight": values.clone()})
    merge(models.recipe("passthrough", model), tmp_path / "out")
    found = models.read_state(tmp_path / "out")["x.weight"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))


def test_float64_is_exact_to_float64_if_asked(tmp_path: Path) -> None:
    states = [{"x.weight": torch.randn(500, dtype=torch.float64)} for _ in range(3)]
    inputs = [models.save_state(tmp_path / str(number), state) for number, state in enumerate(states)]
    merge(models.recipe("linear", *inputs, accumulate="float64"), tmp_path / "out")
    expected = sum(state["x.weight"] for state in states) / 3
    torch.testing.assert_close(models.read_state(tmp_path / "out")["x.weight"], expected, rtol=1e-15, atol=0)


SIDE_FILES = {
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "vocab.txt": "a",
    "chat_template.jinja": "{{ x }}",
    "generation_config.json": "{}",
    "preprocessor_config.json": "{}",
    "LICENSE": "terms",
    "modeling_own.py": "x = 1",
    "modules.json": '[{"path": "1_Pooling"}, {"path": "2_Dense"}]',
}
LEFT_BEHIND = {"training_args.bin": "x", "trainer_state.json": "{}", "optimizer.pt": "x", "README.md": "about the base"}


def save_with_files(path: Path, seed: int, mark: str) -> Path:
    files = {name: text if name == "modules.json" else text + mark for name, text in SIDE_FILES.items()}
    models.save_state(path, models.decoder_state(seed=seed), models.decoder_config(), **files, **LEFT_BEHIND)
    for folder in ("1_Pooling", "2_Dense"):
        (path / folder).mkdir()
        (path / folder / "config.json").write_text(mark)
    (path / "2_Dense" / "model.safetensors").write_bytes(mark.encode())
    (path / "checkpoint-5").mkdir()
    (path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    return path


def test_files_beside_the_weights_come_from_the_base(tmp_path: Path) -> None:
    base, one, two = (save_with_files(tmp_path / str(seed), seed, f" {seed}") for seed in range(3))
    result = merge(models.recipe("ties", one, two, base=base), tmp_path / "out")
    found = contents(tmp_path / "out")
    extra = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    own = {"model.safetensors", "config.json", "README.md", "weldment.json"}
    assert found.keys() == SIDE_FILES.keys() | extra | own
    for name in (SIDE_FILES.keys() - {"modules.json"}) | extra:
        assert found[name].endswith(b" 0"), name
    assert b"about the base" not in found["README.md"]
    assert f"2_Dense/model.safetensors is copied from {base}, not merged" in result.plan.notes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -5}, r"seed \(--seed\) is -5. A seed is a whole number from 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, "A seed is"),
        ({"seed": 1.5}, "A seed is"),
        ({"seed": True}, "A seed is"),
        ({"shard_size": 0}, r"shard_size \(--shard-size\) is 0. Give bytes as a number, such as 2_000_000_000"),
        ({"shard_size": -1}, "Give bytes"),
        ({"shard_size": None}, "Give bytes"),
        ({"shard_size": "5GB"}, "is '5GB'. Give bytes"),
        ({"max_memory": "2GB"}, r"max_memory \(--max-memory\) is '2GB'. Give bytes"),
        ({"max_memory": float("nan")}, "Give bytes"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    recipe = models.recipe("linear", *(models.save_decoder(tmp_path / name) for name in "ab"))
    with pytest.raises(UserError, match=words):
        merge(recipe, tmp_path / "out", **options)
    if "max_memory" not in options:
        with pytest.raises(UserError, match=words):
            plan(recipe, **options)


def test_tokenizer_comes_from_the_model_that_gives_the_embeddings(tmp_path: Path) -> None:
    base, one, two = (save_with_files(tmp_path / str(seed), seed, f" {seed}") for seed in range(3))
    (base / "added_tokens.json").write_text("of the base")
    merge(models.recipe("ties", one, two, base=base, take={"*.embed_tokens.weight": str(one)}), tmp_path / "out")
    found = contents(tmp_path / "out")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "chat_template.jinja",
    ):
        assert found[name].endswith(b" 1"), name
    assert found["generation_config.json"].endswith(b" 0")
    assert found["preprocessor_config.json"].endswith(b" 0")
    assert "added_tokens.json" not in found


def save_three(tmp_path: Path) -> list[Path]:
    return [models.save_decoder(tmp_path / f"m{seed}", seed=seed) for seed in range(3)]


def test_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    inputs = save_three(tmp_path)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="the output is also an input"):
            merge(models.recipe("linear", *inputs), inputs[1], overwrite=overwrite)
    with pytest.raises(OutputError, match=r"an input \(.*m0\) lies inside the output folder"):
        merge(models.recipe("linear", *inputs), tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(inputs[0])
    with pytest.raises(OutputError, match="the output is also an input"):
        merge(models.recipe("linear", *inputs), tmp_path / "link", overwrite=True)
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


def test_models_that_cannot_be_opened_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipe = models.recipe("linear", tmp_path / "empty", tmp_path / "absent.safetensors", *save_three(tmp_path))
    with pytest.raises(CheckpointError) as error:
        merge(recipe, tmp_path / "out")
    message = str(error.value)
    assert "2 problems" in message
    assert "models[0]" in message
    assert "models[1]" in message


def test_output_that_is_not_empty_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    recipe = models.recipe("linear", *save_three(tmp_path))
    old = contents(models.save_decoder(tmp_path / "out", layers=1))
    with pytest.raises(OutputError, match="not empty"):
        merge(recipe, tmp_path / "out")
    assert contents(tmp_path / "out") == old
    merge(recipe, tmp_path / "out", overwrite=True)
    assert models.read_config(tmp_path / "out")["num_hidden_layers"] == 2
    assert not list(tmp_path.glob("out*/old"))


class During(Silent):
    """Does something once while a merge runs."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action: Callable[[], object] | None = action

    def advance(self, tensor: str, amount: Amount) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


def test_input_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    inputs = save_three(tmp_path)
    changed = inputs[0] / "model.safetensors"
    with pytest.raises(CheckpointError, match="changed while it was merged"):
        merge(models.recipe("linear", *inputs), tmp_path / "out", progress=During(lambda: os.utime(changed, (1, 1))))
    assert not (tmp_path / "out").exists()


class StoppedError(MergeError):
    pass


def stop() -> None:
    raise StoppedError("stopped")


def test_stopped_merge_does_not_go_on_with_models_in_another_order(tmp_path: Path) -> None:
    """Equal shapes, equal files, other weights for each of them: what was written before must not count."""
    one, two, _ = save_three(tmp_path)
    said: list[str] = []

    class Listening(Silent):
        def message(self, text: str) -> None:
            said.append(text)

    def recipe(first: Path, second: Path) -> dict[str, Any]:
        entries = [
            {"model": str(first), "parameters": {"weight": 0.9}},
            {"model": str(second), "parameters": {"weight": 0.1}},
        ]
        return {"merge_method": "linear", "models": entries}

    with pytest.raises(StoppedError):
        merge(recipe(one, two), tmp_path / "out", threads=1, progress=During(stop))
    merge(recipe(two, one), tmp_path / "out", progress=Listening())
    assert any("belongs to another merge" in text for text in said)
    merge(recipe(two, one), tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weldment.writing.free_bytes", lambda path: 100)
    with pytest.raises(OutputError, match=r"not enough disk space"):
        merge(models.recipe("linear", *save_three(tmp_path)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2"]
    assert staging.free_bytes(tmp_path) > 100


def test_nonfinite_results_are_refused_by_name_or_reported(tmp_path: Path) -> None:
    state = models.decoder_state()
    state["model.norm.weight"][1] = float("nan")
    inputs = [models.save_state(tmp_path / "bad", state), models.save_decoder(tmp_path / "good", seed=1)]
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight \(1\)"):
        merge(models.recipe("linear", *inputs), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(models.recipe("linear", *inputs), tmp_path / "out", allow_nonfinite=True)
    assert models.read_state(tmp_path / "out")["model.norm.weight"].isnan().sum() == 1


def test_plan_writes_nothing(tmp_path: Path) -> None:
    inputs = save_three(tmp_path)
    before = contents(tmp_path)
    plan(models.recipe("linear", *inputs))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp", "model_stock", "passthrough"])
def test_empty_tensors_scalars_and_vectors(method: str, tmp_path: Path) -> None:
    shapes = {
        "a.empty": (0, 4),
        "a.scalar": (),
        "a.one": (1,),
        "a.column": (8, 1),
        "a.row": (1, 8),
        "a.many": (2, 3, 4),
    }
    inputs = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        inputs.append(models.save_state(tmp_path / str(seed), state))
    base = None if method in ("linear", "passthrough") else inputs[0]
    experts = inputs[1:] if method not in ("slerp", "passthrough") else inputs[1:2]
    parameters = {"t": 0.5} if method == "slerp" else {}
    merge(models.recipe(method, *experts, base=base, parameters=parameters), tmp_path / "out")
    assert {name: tuple(tensor.shape) for name, tensor in models.read_state(tmp_path / "out").items()} == shapes


def test_shards_of_heads_and_model_are_verified(tmp_path: Path) -> None:
    state = {**models.decoder_state(), "score.weight": torch.ones(1, 4)}
    inputs = [models.save_state(tmp_path / name, state) for name in "ab"]
    merge(models.recipe("linear", *inputs, heads=["score.*"]), tmp_path / "out", shard_size=200)
    assert verify(tmp_path / "out").tensors == len(state) + 1
    index = models.json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == models.decoder_state().keys()
