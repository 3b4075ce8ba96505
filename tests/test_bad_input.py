"""What a user can do wrong: exit code 2, one message with cause, place and fix, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import Result, mounted, tree, weld, write_model, write_recipe

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 0.5, "density": 0.5}},
        {"model": "b", "parameters": {"weight": 0.5, "density": 0.5}},
    ],
    "dtype": "bfloat16",
}
LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "a",
    "models": [{"model": "b"}],
    "parameters": {"t": 0.5},
}


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models `base`, `a` and `b` in the working folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


def merge(recipe: Any, *options: object, out: str = "out") -> Result:
    path = recipe if isinstance(recipe, Path) else write_recipe(Path("r.yml"), recipe)
    return weld("merge", path, out, *options)


def refused(result: Result, *words: str, out: str = "out") -> None:
    """Exit code 2; one message that has all the words; neither OUT nor OUT.partial."""
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err
    assert not Path(f"{out}.partial").exists()
    assert not Path(out).exists()


def one_slice(*sources: tuple[str, list[int]], method: str = "slerp") -> dict[str, Any]:
    listed = [{"model": model, "layer_range": layers} for model, layers in sources]
    parameters = {"t": 0.5} if method == "slerp" else {}
    base = {"base_model": sources[0][0]} if method == "slerp" else {}
    return {"merge_method": method, "slices": [{"sources": listed}], "parameters": parameters, **base}


RECIPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "unknown key": (
        {**TIES, "parametres": {}},
        ("no key `parametres`", "r.yml: parametres", "Did you mean `parameters`?"),
    ),
    "unknown method": (
        {**TIES, "merge_method": "tise"},
        ("no method 'tise'", "r.yml: merge_method", "Did you mean `ties`?"),
    ),
    "unknown parameter": (
        {**TIES, "parameters": {"densty": 0.5}},
        ("no parameter `densty`", "r.yml: parameters.densty", "Did you mean `density`?"),
    ),
    "unknown dtype": (
        {**TIES, "dtype": "bfloat61"},
        ("'bfloat61'", "r.yml: dtype", "Did you mean `bfloat16`?"),
    ),
    "density 3": (
        {**TIES, "models": [{"model": "a", "parameters": {"density": 3}}, {"model": "b"}]},
        ("`density` must be in (0, 1], not 3", "r.yml: models[0].parameters.density"),
    ),
    "epsilon too large": (
        {**TIES, "merge_method": "della", "parameters": {"epsilon": 0.5, "density": 0.4}},
        ("density 0.5 with epsilon 0.5", "r.yml", "epsilon must be below 0.5"),
    ),
    "weight a word": (
        {**LINEAR, "parameters": {"weight": "heavy"}},
        ("`weight` must be a number, not 'heavy'", "r.yml: parameters.weight"),
    ),
    "gradient without values": (
        {**LINEAR, "parameters": {"weight": []}},
        ("the list of values is empty", "r.yml: parameters.weight"),
    ),
    "layer_range beyond the model": (
        one_slice(("a", [0, 9]), ("b", [0, 9])),
        ("[0, 9] goes beyond the 2 layers of a", "r.yml: slices[0].sources[0].layer_range", "end is 2"),
    ),
    "layer_range empty": (
        one_slice(("a", [2, 2]), ("b", [0, 2])),
        ("[2, 2] is empty", "r.yml: slices[0].sources[0].layer_range"),
    ),
    "slices of unequal length": (
        one_slice(("a", [0, 2]), ("b", [0, 1])),
        ("have 2, 1 layers", "r.yml: slices[0].sources", "equally many"),
    ),
    "base missing": (
        {key: value for key, value in TIES.items() if key != "base_model"},
        ("ties needs a base model", "r.yml", "Add `base_model:`"),
    ),
    "one model where two are needed": (
        {**SLERP, "models": [{"model": "a"}]},
        ("slerp merges 2 models", "here is 1", "r.yml: models"),
    ),
    "a number": ("42\n", ("a recipe is a mapping", "r.yml")),
    "a list": ("- a\n- b\n", ("a recipe is a mapping", "r.yml")),
    "nothing": ("", ("the recipe is empty", "r.yml")),
    "not YAML": ("merge_method: [ties\n", ("not valid YAML", "r.yml, line")),
    "duplicate key": ("merge_method: ties\nmerge_method: linear\n", ("'merge_method' is given twice", "line 2")),
    "bomb": (
        "a: &a [1,2,3,4,5,6,7,8,9]\n"
        + "".join(f"{n}: &{n} [{', '.join(['*' + m] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
        ("r.yml, line", "more than 30000 values"),
    ),
    "nothing left to merge": (
        {**LINEAR, "drop": ["*"]},
        ("no tensor is left", "r.yml", "`drop`"),
    ),
}


@pytest.mark.parametrize(("recipe", "words"), RECIPES.values(), ids=RECIPES)
def test_recipe(recipe: Any, words: tuple[str, ...]) -> None:
    refused(merge(recipe), *words)


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, *, size: int | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - start) // 4 if size is None else size], "data_offsets": [start, end]}


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


class _Runs:
    """Unpickled by a careless reader, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it-ran",)


def _pickle() -> None:
    Path("a/model.safetensors").unlink()
    with Path("a/pytorch_model.bin").open("wb") as file:
        torch.save({"model.norm.weight": torch.zeros(8), "x": _Runs()}, file, pickle_protocol=2)


def _old_pickle() -> None:
    Path("a/model.safetensors").unlink()
    Path("a/pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": _Runs()}))


def _adapter() -> None:
    shutil.rmtree("a")
    Path("a").mkdir()
    Path("a/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}))
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 8)}, "a/adapter_model.safetensors")


def _index_without_shard() -> None:
    weight_map = dict.fromkeys(load_file("a/model.safetensors"), "model-00001-of-00002.safetensors")
    Path("a/model.safetensors").rename("a/model-00001-of-00002.safetensors")
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    Path("a/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _emptied() -> None:
    shutil.rmtree("a")
    Path("a").mkdir()


def _written(content: bytes) -> Callable[[], object]:
    return lambda: Path("a/model.safetensors").write_bytes(content)


def _quantised(**settings: Any) -> Callable[[], object]:
    return lambda: write_model(Path("a"), 1, config={"quantization_config": settings})


def _gpt2() -> None:
    tensors = load_file("a/model.safetensors").items()
    renamed = {name.replace("model.layers", "h").replace("model", "wte"): tensor for name, tensor in tensors}
    save_file(renamed, "a/model.safetensors")
    Path("a/config.json").write_text(json.dumps({"model_type": "gpt2"}))


def _fp8() -> None:
    tensors = load_file("a/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, "a/model.safetensors")


MODELS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "absent": (lambda: shutil.rmtree("a"), ("'./a'", "r.yml: models[0]", "Name an existing folder")),
    "empty": (_emptied, ("is empty", "r.yml: models[0]: a", "Name a folder that holds a model")),
    "without weights": (
        lambda: Path("a/model.safetensors").unlink(),
        ("has no weights", "r.yml: models[0]: a", "holds model.safetensors"),
    ),
    "index names a missing shard": (
        _index_without_shard,
        ("model-00002-of-00002.safetensors", "a/model.safetensors.index.json", "Download or copy"),
    ),
    "config is not JSON": (
        lambda: Path("a/config.json").write_text("{"),
        ("is not valid JSON", "a/config.json", "Repair the file"),
    ),
    "truncated": (lambda: shorten(Path("a/model.safetensors")), ("truncated", "a/model.safetensors", "download")),
    "no bytes": (_written(b""), ("only 0 bytes", "a/model.safetensors", "download")),
    "header length": (_written(b"\xff" * 16), ("its header would have", "a/model.safetensors", "Check that")),
    "header beyond the file": (_written(b"\x40" + b"\0" * 15), ("truncated", "a/model.safetensors", "download")),
    "header not JSON": (_written(b"\x04" + b"\0" * 7 + b"{{{{"), ("not JSON", "a/model.safetensors", "download")),
    "offsets": (
        _written(header({"x": entry(0, 8, size=3)}, b"\0" * 8)),
        ("8 bytes do not hold F32 of shape [3]", "a/model.safetensors: tensor 'x'", "download"),
    ),
    "overlapping tensors": (
        _written(header({"x": entry(0, 8), "y": entry(4, 12)}, b"\0" * 12)),
        ("overlap those of 'x'", "a/model.safetensors: tensor 'y'", "download"),
    ),
    "trailing bytes": (
        _written(header({"x": entry(0, 8)}, b"\0" * 12)),
        ("4 bytes after the last tensor", "a/model.safetensors", "download"),
    ),
    "Git LFS pointer": (
        _written(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        ("Git LFS pointer", "a/model.safetensors", "`git lfs pull`"),
    ),
    "pickle that runs code": (_pickle, ("posix.mkdir", "a/pytorch_model.bin")),
    "old pickle that runs code": (_old_pickle, ("a/pytorch_model.bin",)),
    "adapter": (_adapter, ("LORA adapter of org/base", "'org/base+a'", "r.yml: models[0]: a")),
    "bitsandbytes": (
        _quantised(load_in_4bit=True),
        ("quantised with bitsandbytes", "a/config.json", "Use the unquantised model"),
    ),
    "GPTQ": (_quantised(quant_method="gptq"), ("quantised with GPTQ", "a/config.json", "Use the unquantised model")),
    "AWQ": (_quantised(quant_method="awq"), ("quantised with AWQ", "a/config.json", "Use the unquantised model")),
    "FP8": (_fp8, ("quantised with FP8", "'model.layers.0.mlp.up_proj.weight'", "r.yml: models[0]: a", "Use the unq")),
    "other architecture": (
        _gpt2,
        ("models of different architecture", "a is gpt2", "base is llama", "r.yml", "Only models with the same"),
    ),
    "other number of layers": (
        lambda: write_model(Path("a"), 1, layers=3),
        ("different numbers of layers", "model.layers has 3 in ./a and 2 in ./base", "r.yml", "`slices`"),
    ),
    "other vocabulary": (
        lambda: write_model(Path("a"), 1, vocabulary=17),
        ("different vocabularies", "[17, 8] in ./a, [16, 8] in ./b and ./base", "r.yml", "`take:"),
    ),
    "other width": (
        lambda: write_model(Path("a"), 1, hidden=4),
        ("models of different size", "[16, 4] in ./a", "r.yml", "Only models with the same tensors"),
    ),
}


@pytest.mark.parametrize(("spoil", "words"), MODELS.values(), ids=MODELS)
def test_model(spoil: Callable[[], object], words: tuple[str, ...]) -> None:
    spoil()
    recipe = {**TIES, "base_model": "./base", "models": [{"model": "./a"}, {"model": "./b"}]}
    refused(merge(recipe), *words)
    assert not Path("it-ran").exists()


def test_output_is_an_input() -> None:
    before = tree(Path("a"))
    for options in ((), ("--overwrite",)):
        result = merge(LINEAR, *options, out="a")
        assert (result.code, result.out) == (2, "")
        assert "a: the output is also an input (a)" in result.err
        assert "fix: Choose another" in result.err
    assert tree(Path("a")) == before
    assert not Path("a.partial").exists()


def test_output_holds_an_input(tmp_path: Path) -> None:
    write_model(Path("models/c"), 3)
    recipe = {**LINEAR, "models": [{"model": "a"}, {"model": "models/c"}]}
    result = merge(recipe, "--overwrite", out="models")
    assert (result.code, "an input (models/c) lies inside the output folder" in result.err) == (2, True)
    assert Path("models/c/model.safetensors").exists()


def test_output_lies_inside_an_input() -> None:
    refused(merge(LINEAR, out="a/out"), "the output lies inside an input (a)", out="a/out")


def test_output_holds_the_recipe() -> None:
    write_recipe(Path("a/r.yml"), {**LINEAR, "models": [{"model": "b"}, {"model": "base"}]})
    result = merge(Path("a/r.yml"), "--overwrite", out="a")
    assert (result.code, "the recipe lies inside the output folder" in result.err) == (2, True)
    assert Path("a/r.yml").exists()


def test_output_is_not_empty() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").touch()
    result = merge(LINEAR)
    assert result.code == 2
    assert "out: the output folder is not empty" in result.err
    assert "--overwrite" in result.err
    assert not Path("out.partial").exists()


def test_overwrite_spares_what_is_no_model() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").touch()
    result = merge(LINEAR, "--overwrite")
    assert result.code == 2
    assert "out: the output folder holds other things than a model" in result.err
    assert Path("out/thesis.tex").exists()


def test_a_folder_of_the_users_stands_where_the_work_is_done() -> None:
    Path("out.partial").mkdir()
    Path("out.partial/thesis.tex").touch()
    result = merge(LINEAR)
    assert (result.code, Path("out").exists()) == (2, False)
    assert "out.partial: the merge needs this path" in result.err
    assert Path("out.partial/thesis.tex").exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("r.yml", ("r.yml: the output is a file, not a folder", "Choose another path")),
        ("r.yml/out", ("r.yml: a part of the output's path is a file", "Choose another path")),
        ("/proc/nowhere/out", ("/proc/nowhere", "cannot be written", "Choose another folder")),
        (f"{'x' * 250}", ("File name too long", "Choose another folder")),
        ("/proc", ("/proc: the output is a mount point", "/proc/merged")),
    ],
    ids=["a file", "below a file", "not writable", "long name", "a mount point"],
)
def test_output_that_cannot_be_written(out: str, words: tuple[str, ...]) -> None:
    result = merge(LINEAR, out=out)
    assert (result.code, result.out) == (2, "")
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission() -> None:
    Path("locked").mkdir(mode=0o500)
    refused(merge(LINEAR, out="locked/out"), "no permission to write here", out="locked/out")


def test_a_disk_that_is_too_small(small_disk: Path) -> None:
    write_model(Path("a"), 1, vocabulary=100_000)
    write_model(Path("b"), 2, vocabulary=100_000)
    refused(merge(LINEAR, out=f"{small_disk}/out"), "not enough disk space", "Free some space", out=f"{small_disk}/out")
    assert not any(small_disk.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threads", "0"), ("--threads", "at least 1")),
        (("--threads", "two"), ("--threads", "valid integer")),
        (("--max-memory", "1KB"), ("--max-memory", "cannot work in", "least it needs is")),
        (("--max-memory", "lots"), ("--max-memory: 'lots' is not a size", "Write it like")),
        (("--max-memory", "0"), ("--max-memory: '0' is not a size", "Write it like")),
        (("--shard-size", "-5"), ("--shard-size",)),
        (("--device", "tpu"), ("--device: unknown device 'tpu'", "Use cpu, cuda, mps or auto")),
        (("--set", "parameters.weight"), ("--set", "no `=`", "Write it as path=value")),
        (("--set", "models[7].model=a"), ("--set", "models", "Indices are 0 to 1")),
        (("--set", "modles=a"), ("no key `modles`", "Did you mean `models`?")),
        (("--sed", "1"), ("--sed",)),
    ],
)
def test_option(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = merge(LINEAR, *options)
    assert (result.code, result.out) == (2, "")
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there() -> None:
    refused(merge(LINEAR, "--device", "cuda"), "--device: there is no cuda device", "Use --device cpu")


def test_the_least_memory_that_is_named_works() -> None:
    result = merge(LINEAR, "--max-memory", "1KB")
    least = result.err.rpartition("needs is ")[2].split()
    assert merge(LINEAR, "--max-memory", "".join(least)).code == 0


def test_a_shard_smaller_than_a_tensor_holds_it_alone() -> None:
    result = merge(LINEAR, "--shard-size", "300B")
    assert result.code == 0
    assert "note: 4 tensors are larger than a shard should be and will be alone in a file" in result.err
    files = json.loads(Path("out/model.safetensors.index.json").read_text())["weight_map"]
    name = files["model.layers.0.mlp.up_proj.weight"]
    assert [tensor for tensor, file in files.items() if file == name] == ["model.layers.0.mlp.up_proj.weight"]


def test_recipe_that_is_not_there() -> None:
    refused(weld("merge", "nowhere.yml", "out"), "nowhere.yml: there is no such file", "Check the path")
    refused(weld("merge", "a", "out"), "a: this is a folder", "Name the YAML file in it")


def test_all_problems_are_reported_at_once() -> None:
    recipe = {
        **TIES,
        "dtype": "int4",
        "parameters": {"lamda": 1},
        "models": [{"model": "a", "parameters": {"density": 0}}],
    }
    refused(
        merge(recipe), "3 problems", "r.yml: dtype", "r.yml: parameters.lamda", "r.yml: models[0].parameters.density"
    )


def test_a_buffer_that_differs_is_refused_when_it_is_read() -> None:
    """The one error of the user's that only the data show."""
    for name, value in (("a", 1), ("b", 2)):
        tensors = load_file(f"{name}/model.safetensors")
        save_file({**tensors, "steps": torch.tensor([value])}, f"{name}/model.safetensors")
    refused(merge(LINEAR), "steps", "different", "take")


def test_debug_shows_a_traceback() -> None:
    from weldment.errors import RecipeError

    with pytest.raises(RecipeError):
        merge({**TIES, "dtype": "int4"}, "--debug")
