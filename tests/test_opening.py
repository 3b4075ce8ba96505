"""Opening models on this machine: which files count, what is refused, and what the message says."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weldment.checkpoint.contents import side_files
from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.opening import open_checkpoint
from weldment.errors import CheckpointError, HubError

SHARED = Path(__file__).parents[2] / "shared"
W = {"w": torch.ones(2, 3)}


def model(root: Path, files: Mapping[str, Any]) -> Path:
    """A folder: tensors are saved by the suffix of their file, dicts and lists as JSON, text as it is."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(content, path)
        elif name.endswith((".bin", ".pt", ".pth")):
            torch.save(content, path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    root.mkdir(exist_ok=True)
    return root


def opened(root: Path, files: Mapping[str, Any]) -> Checkpoint:
    return open_checkpoint(str(model(root, files)))


def index_of(**weight_map: str) -> dict[str, Any]:
    return {"metadata": {"total_size": 0}, "weight_map": weight_map}


def assert_same_tensors(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """Read every tensor from where its entry says it lies."""
    assert set(checkpoint.tensors) == set(expected)
    for name, entry in checkpoint.tensors.items():
        assert entry.file in checkpoint.weight_files
        assert entry.file.path is not None
        raw = bytearray(entry.file.path.read_bytes()[entry.offset : entry.offset + entry.nbytes])
        assert torch.equal(torch.frombuffer(raw, dtype=expected[name].dtype).view(entry.shape), expected[name])


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    files = {"model.safetensors": W, "config.json": {"model_type": "gpt2"}, "tokenizer.json": {}}
    checkpoint = opened(tmp_path / "m", files)
    assert_same_tensors(checkpoint, W)
    assert (checkpoint.reference, checkpoint.root) == (str(tmp_path / "m"), tmp_path / "m")
    assert checkpoint.config == {"model_type": "gpt2"}
    assert checkpoint.side_files == ("config.json", "tokenizer.json")
    assert checkpoint.is_local
    assert (checkpoint.repo, checkpoint.revision) == (None, None)
    (file,) = checkpoint.weight_files
    stat = (tmp_path / "m/model.safetensors").stat()
    assert (file.name, file.size, file.stamp) == ("model.safetensors", stat.st_size, (stat.st_size, stat.st_mtime_ns))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    parts = {SHARDS[0]: {"a": torch.ones(2)}, SHARDS[1]: {"b": torch.zeros(3)}}
    expected = {"a": torch.ones(2), "b": torch.zeros(3)}
    indexed = opened(tmp_path / "i", {**parts, INDEX: index_of(a=SHARDS[0], b=SHARDS[1])})
    assert_same_tensors(indexed, expected)
    assert indexed.side_files == ()
    assert_same_tensors(opened(tmp_path / "n", parts), expected)


def test_files_that_the_index_does_not_name_are_not_the_model(tmp_path: Path) -> None:
    files = {SHARDS[0]: {"a": torch.ones(2)}, "consolidated.safetensors": W, INDEX: index_of(a=SHARDS[0])}
    assert_same_tensors(opened(tmp_path / "m", files), {"a": torch.ones(2)})
    files = {"model.safetensors": W, "consolidated.safetensors": {"layers.w": torch.ones(1)}}
    assert_same_tensors(opened(tmp_path / "n", files), W)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({SHARDS[0]: W, INDEX: index_of(w=SHARDS[0], v=SHARDS[1])}, f"{INDEX}: names 1 of 2 shards.*{SHARDS[1]}"),
        ({SHARDS[0]: W, SHARDS[1]: {"v": torch.ones(1)}, INDEX: index_of(w=SHARDS[1], v=SHARDS[1])},
         f"{INDEX}: tensor 'w' should be in {SHARDS[1]}, but is in none of the shards"),
        ({SHARDS[0]: W, SHARDS[1]: {"v": torch.ones(1)}, INDEX: index_of(w=SHARDS[1], v=SHARDS[0])},
         f"tensor 'w' should be in {SHARDS[1]}, but is in {SHARDS[0]}"),
        ({SHARDS[0]: W, SHARDS[1]: W}, f"{SHARDS[1]}: tensor 'w' is in {SHARDS[0]} too"),
        ({SHARDS[0]: W}, "1 of 2 shards of model are missing: number 2"),
        ({INDEX: {"weight_map": {}}, "model.safetensors": W}, "its weight_map is empty"),
        ({INDEX: [], "model.safetensors": W}, "no weight_map"),
        ({INDEX: {"weight_map": {"w": 1}}, "model.safetensors": W}, "no weight_map"),
        ({INDEX: "{", "model.safetensors": W}, f"{INDEX}: is not valid JSON"),
        ({"x.safetensors.index.json": {}, "y.safetensors.index.json": {}}, "several index files"),
        ({INDEX: index_of(w="../w.safetensors")}, "names 1 of 1 shards that are not there"),
        ({"config.json": "{", "model.safetensors": W}, "config.json: is not valid JSON"),
        ({"config.json": [], "model.safetensors": W}, "config.json: is not a JSON object"),
        ({"model.safetensors": {}}, "hold no tensors"),
        ({"one.pt": W, "two.pt": W}, "two.pt: tensor 'w' is in one.pt too"),
    ],
)  # fmt: skip
def test_an_inconsistent_folder_is_refused(tmp_path: Path, files: Mapping[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        opened(tmp_path / "m", files)
    assert caught.value.fix
    assert str(tmp_path / "m") in str(caught.value)


def test_shards_may_count_from_zero(tmp_path: Path) -> None:
    files = {f"model-0000{i}-of-00002.safetensors": {f"w{i}": torch.ones(1)} for i in range(2)}
    assert set(opened(tmp_path / "m", files).tensors) == {"w0", "w1"}


def test_safetensors_win_over_torch_files(tmp_path: Path) -> None:
    other = {"w": torch.zeros(2, 3)}
    assert_same_tensors(opened(tmp_path / "m", {"model.safetensors": W, "pytorch_model.bin": other}), W)


def test_a_folder_of_torch_files(tmp_path: Path) -> None:
    training = {
        "training_args.bin": {},
        "optimizer.pt": {"s": torch.ones(1)},
        "scheduler.pt": {},
        "rng_state_0.pth": {},
    }
    checkpoint = opened(tmp_path / "m", {"pytorch_model.bin": W, **training})
    assert_same_tensors(checkpoint, W)
    assert checkpoint.side_files == ()
    shards = {"pytorch_model-00001-of-00002.bin": W, "pytorch_model-00002-of-00002.bin": {"v": torch.ones(4)}}
    index = index_of(w="pytorch_model-00001-of-00002.bin", v="pytorch_model-00002-of-00002.bin")
    sharded = opened(tmp_path / "s", {**shards, "pytorch_model.bin.index.json": index})
    assert_same_tensors(sharded, {**W, "v": torch.ones(4)})


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth", "weights.bin", "a@b.safetensors"])
def test_a_single_file(tmp_path: Path, name: str) -> None:
    root = model(tmp_path / "m", {name: W, "other.txt": "x", "config.json": {"a": 1}})
    checkpoint = open_checkpoint(str(root / name))
    assert_same_tensors(checkpoint, W)
    assert (checkpoint.root, checkpoint.config, checkpoint.side_files) == (root, {}, ())


def test_what_exists_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for reference in ("org/name", "org/name@main", "org/a+b", "~/home-model"):
        monkeypatch.setenv("HOME", str(tmp_path))
        model(tmp_path / reference.removeprefix("~/"), {"model.safetensors": W})
        assert open_checkpoint(reference).tensors.keys() == W.keys()


SIDE = (
    "config.json",
    "tokenizer.json",
    "spiece.model",
    "chat_template.jinja",
    "modeling_x.py",
    "1_Pooling/config.json",
)
NOT_SIDE = (
    "model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "q4.gguf",
    "onnx/model.onnx", "original/consolidated.00.pth", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    ".gitattributes", ".git/config", ".cache/huggingface/x", "checkpoint-500/config.json", "runs/jan/events",
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json",
    "__pycache__/x.pyc", "README.md", "weldment.json", "heads/sst2/config.json", "adapter_config.json",
    "adapter_model.safetensors", "2_Dense/model.safetensors",
)  # fmt: skip


def test_side_files_are_what_is_neither_weights_nor_leftovers() -> None:
    assert side_files((*SIDE, *NOT_SIDE)) == tuple(sorted(SIDE))


def test_weights_of_sentence_transformers_modules_are_side_files(tmp_path: Path) -> None:
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    files = {
        "model.safetensors": W, "modules.json": modules, "1_Pooling/config.json": {},
        "2_Dense/model.safetensors": {"linear": torch.ones(2)}, "3_Other/model.safetensors": W,
        "README.md": "card", "checkpoint-5/model.safetensors": W,
    }  # fmt: skip
    checkpoint = opened(tmp_path / "m", files)
    assert_same_tensors(checkpoint, W)
    assert checkpoint.side_files == ("1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json")


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "is empty"),
        ({"config.json": {}}, "has no weights.*Name the folder that holds model.safetensors"),
        ({"training_args.bin": {}}, "has no weights"),
        ({"checkpoint-9/model.safetensors": W}, "has no weights.*Name its sub-folder checkpoint-9"),
        ({"m-q4.gguf": "GGUF", "config.json": {}}, "cannot be merged: GGUF"),
        ({"tf_model.h5": "h", "flax_model.msgpack": "f"}, "cannot be merged: Flax, TensorFlow"),
    ],
)
def test_a_folder_without_weights_is_refused(tmp_path: Path, files: Mapping[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/m.*: .*{text}"):
        opened(tmp_path / "m", files)


def test_an_adapter_is_refused_with_its_base_and_spelling(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    root = model(tmp_path / "a", {"adapter_config.json": config, "adapter_model.safetensors": W})
    for reference in (root, root / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=rf"LORA adapter of org/base.*with its base: 'org/base\+{root}'"):
            open_checkpoint(str(reference))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq"}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "brand-new"}, "brand-new"),
        ({"bits": 4}, "an unknown method"),
    ],
)
def test_a_quantised_config_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    for number, config in enumerate(
        ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}})
    ):
        with pytest.raises(CheckpointError, match=f"config.json: the model is quantised with {name}.*unquantised"):
            opened(tmp_path / str(number), {"config.json": config, "model.safetensors": W})


@pytest.mark.parametrize(
    ("tensor", "dtype", "name"),
    [
        ("q_proj.qweight", torch.int32, "GPTQ or AWQ"),
        ("q_proj.g_idx", torch.int32, "GPTQ"),
        ("q_proj.weight.absmax", torch.uint8, "bitsandbytes"),
        ("q_proj.weight.quant_state.bitsandbytes__nf4", torch.uint8, "bitsandbytes"),
        ("q_proj.SCB", torch.float32, "bitsandbytes"),
        ("q_proj.weight", torch.float8_e4m3fn, "FP8"),
    ],
)
def test_quantised_tensors_are_refused_by_name(tmp_path: Path, tensor: str, dtype: torch.dtype, name: str) -> None:
    root = model(tmp_path / "m", {"model.safetensors": {tensor: torch.ones(4).to(dtype)}})
    for reference in (root, root / "model.safetensors"):
        with pytest.raises(CheckpointError, match=rf"quantised with {name} \(tensor '{tensor}'\).*unquantised"):
            open_checkpoint(str(reference))


def test_integer_buffers_are_not_quantised_weights(tmp_path: Path) -> None:
    tensors = {
        "embeddings.position_ids": torch.arange(4),
        "bn.num_batches_tracked": torch.tensor(1),
        "x.scales": torch.ones(2),
    }
    assert_same_tensors(opened(tmp_path / "m", {"model.safetensors": tensors}), tensors)


@pytest.mark.parametrize(
    "reference", ["", "./absent", "/absent/model", "../a/b", "a/b/c", "org/name@", "x.safetensors", "or g/name", "a\0b"]
)
def test_what_is_neither_here_nor_a_name_on_the_hub(reference: str) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file or folder.*org/name@revision"):
        open_checkpoint(reference)


def test_a_misspelt_path_suggests_its_neighbour(tmp_path: Path) -> None:
    model(tmp_path / "expert-math", {"model.safetensors": W})
    with pytest.raises(CheckpointError, match=f"Did you mean {tmp_path}/expert-math"):
        open_checkpoint(str(tmp_path / "expert-meth"))


def test_a_misspelt_name_beside_a_local_model_is_not_asked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    model(tmp_path / "models" / "chat", {"model.safetensors": W})
    with pytest.raises(CheckpointError, match=r"no file or folder 'models/chta'. Did you mean models/chat\?") as caught:
        open_checkpoint("models/chta")
    assert str(caught.value).endswith("For a model of this name on the Hub, write models/chta@main")


def test_what_has_no_neighbour_is_asked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model(tmp_path / "models" / "chat", {"model.safetensors": W})
    with pytest.raises(HubError, match=r"^models/poetry: there is no 'poetry' in the folder models, and is not compl"):
        open_checkpoint("models/poetry")
    with pytest.raises(HubError, match=r"^models/chta@main: is not complete in the cache"):
        open_checkpoint("models/chta@main")


def test_other_files_are_refused(tmp_path: Path) -> None:
    root = model(tmp_path / "m", {"notes.txt": "x", "m.gguf": "GGUF"})
    with pytest.raises(CheckpointError, match=r"notes.txt: is not a file of weights.*\.safetensors"):
        open_checkpoint(str(root / "notes.txt"))
    with pytest.raises(CheckpointError, match=r"m.gguf: is a GGUF file"):
        open_checkpoint(str(root / "m.gguf"))


def test_an_error_names_the_place_in_the_recipe(tmp_path: Path) -> None:
    root = model(tmp_path / "m", {"model.safetensors": W})
    (root / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(root), where="models[1].model")
    assert caught.value.where == f"models[1].model: {root / 'model.safetensors'}"
    with pytest.raises(CheckpointError, match=r"^models\[1\].model: there is no file"):
        open_checkpoint("./absent", where="models[1].model")


def test_a_dangling_link_is_no_file(tmp_path: Path) -> None:
    root = model(tmp_path / "m", {"model.safetensors": W})
    (root / "tokenizer.json").symlink_to("nowhere")
    assert opened(root, {}).side_files == ()
    (root / "model.safetensors").unlink()
    (root / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is empty"):
        open_checkpoint(str(root))


def test_the_digest_comes_from_the_name_of_a_cached_blob(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    cache = model(tmp_path / "models--org--name", {f"blobs/{digest}.safetensors": W, "snapshots/c/config.json": {}})
    (cache / f"blobs/{digest}.safetensors").rename(cache / "blobs" / digest)
    (cache / "snapshots/c/model.safetensors").symlink_to(f"../../blobs/{digest}")
    (file,) = open_checkpoint(str(cache / "snapshots/c")).weight_files
    assert file.sha256 == digest


def test_headers_of_large_models_open_in_no_time(tmp_path: Path) -> None:
    """Three models of the size of Llama 8B, 291 tensors in 4 shards each, as sparse files."""
    for number in range(3):
        llama(tmp_path / str(number))
    open_checkpoint(str(tmp_path / "0"))
    start = time.process_time()
    checkpoints = [open_checkpoint(str(tmp_path / str(number))) for number in range(3)]
    elapsed = time.process_time() - start
    assert all(len(checkpoint.tensors) == 291 for checkpoint in checkpoints)
    assert sum(file.size for file in checkpoints[0].weight_files) > 15e9
    assert elapsed < 0.3


def llama(root: Path) -> None:
    """Files of the layout of Llama 3 8B that take no space."""
    layer = {"self_attn.q_proj": [4096, 4096], "self_attn.k_proj": [1024, 4096], "self_attn.v_proj": [1024, 4096],
             "self_attn.o_proj": [4096, 4096], "mlp.gate_proj": [14336, 4096], "mlp.up_proj": [14336, 4096],
             "mlp.down_proj": [4096, 14336], "input_layernorm": [4096], "post_attention_layernorm": [4096]}  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in layer.items()}
    shapes |= {
        "model.embed_tokens.weight": [128256, 4096],
        "lm_head.weight": [128256, 4096],
        "model.norm.weight": [4096],
    }
    root.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(4):
        file = f"model-0000{shard + 1}-of-00004.safetensors"
        part = {name: shape for number, (name, shape) in enumerate(shapes.items()) if number % 4 == shard}
        weight_map |= dict.fromkeys(part, file)
        sparse_safetensors(root / file, part)
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def sparse_safetensors(path: Path, shapes: Mapping[str, list[int]]) -> None:
    content: dict[str, Any] = {}
    reached = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * 2
        content[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [reached, reached + size]}
        reached += size
    raw = json.dumps(content).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + reached)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared reference models")
def test_the_reference_models_open() -> None:
    for name in ("base", "e0", "e1", "e2"):
        checkpoint = open_checkpoint(str(SHARED / "golden" / name))
        expected: dict[str, torch.Tensor] = {}
        for file in checkpoint.weight_files:
            expected |= load_file(SHARED / "golden" / name / file.name)
        assert_same_tensors(checkpoint, expected)
