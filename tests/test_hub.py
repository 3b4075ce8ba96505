"""Models on the Hub, through huggingface_hub itself, against a Hub on this machine."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from hub_server import MEMBER, OUTSIDER, Client, HubServer, running_hub
from weldment.checkpoint.hub import FIRST_BYTES, download, fetch, open_repo
from weldment.checkpoint.model import Checkpoint
from weldment.checkpoint.opening import open_checkpoint
from weldment.engine.progress import Silent
from weldment.errors import CheckpointError, HubError, UserError

CONFIG = json.dumps({"model_type": "llama"}).encode()
TOKENIZER = b'{"version": "1.0"}'


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def client(hub: HubServer, home: Path) -> Iterator[Client]:
    client = Client(hub.endpoint, home)
    with client.pool:
        yield client


@pytest.fixture(scope="module")
def offline(hub: HubServer, home: Path) -> Iterator[Client]:
    client = Client(hub.endpoint, home, offline=True)
    with client.pool:
        yield client


@pytest.fixture(autouse=True)
def _fresh_record(hub: HubServer) -> None:
    hub.requests.clear()
    hub.failing = None


def weights(seed: int, *names: str, size: int = 1 << 18) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size // 256, 256, generator=generator).bfloat16() for name in names}


def sharded(seed: int = 0) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """A model of two shards of 1 MB each with the usual files, and its tensors."""
    parts = [weights(seed, "a.weight", "b.weight"), weights(seed + 1, "c.weight", "d.weight")]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {name: file for part, file in zip(parts, names, strict=True) for name in part}}
    files = {name: save(part, {"format": "pt"}) for name, part in zip(names, parts, strict=True)}
    files |= {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": CONFIG}
    files |= {"tokenizer.json": TOKENIZER, "README.md": b"# card", "tf_model.h5": b"h5", ".gitattributes": b"x"}
    return files, {**parts[0], **parts[1]}


def assert_describes(checkpoint: Checkpoint, files: Mapping[str, bytes], expected: Mapping[str, torch.Tensor]) -> None:
    """Every tensor is where the checkpoint says, bit by bit."""
    assert set(checkpoint.tensors) == set(expected)
    for name, entry in checkpoint.tensors.items():
        raw = bytearray(files[entry.file.name][entry.offset : entry.offset + entry.nbytes])
        assert torch.equal(torch.frombuffer(raw, dtype=torch.bfloat16).view(entry.shape), expected[name])


def test_opening_reads_headers_and_no_weights(hub: HubServer, client: Client, home: Path) -> None:
    files, expected = sharded()
    commit = hub.add("org/headers", files)
    checkpoint = client(open_repo, "org/headers")
    assert (checkpoint.repo, checkpoint.revision, checkpoint.root) == ("org/headers", commit, None)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.side_files == ("config.json", "tokenizer.json")
    assert not checkpoint.is_local
    assert [file.size for file in checkpoint.weight_files] == [len(files[f.name]) for f in checkpoint.weight_files]
    assert {f"/cdn/{file.sha256}" for file in checkpoint.weight_files} == {r.path for r in hub.seen("/cdn/")}
    assert_describes(checkpoint, files, expected)
    transfers = hub.seen("/cdn/", "GET")
    assert [request.status for request in transfers] == [206, 206]
    assert (
        sum(request.sent for request in transfers) == 2 * FIRST_BYTES < len(files["model-00001-of-00002.safetensors"])
    )
    assert not list(home.rglob("models--org--headers/**/*.safetensors"))


def test_a_long_header_takes_one_more_request_and_no_weights(hub: HubServer, client: Client) -> None:
    names = [f"model.layers.{layer}.{'x' * 80}.weight" for layer in range(600)]
    expected = {name: torch.full((512,), float(i)).bfloat16() for i, name in enumerate(names)}
    files = {"model.safetensors": save(expected)}
    hub.add("org/long", files)
    checkpoint = client(open_repo, "org/long")
    assert_describes(checkpoint, files, expected)
    first, second = hub.seen("/cdn/", "GET")
    data_start = min(entry.offset for entry in checkpoint.tensors.values())
    assert (first.sent, second.sent) == (FIRST_BYTES, data_start - FIRST_BYTES)


def test_a_file_smaller_than_the_first_request(hub: HubServer, client: Client) -> None:
    expected = {"w": torch.ones(4).bfloat16()}
    files = {"model.safetensors": save(expected)}
    hub.add("org/small", files)
    assert_describes(client(open_repo, "org/small"), files, expected)


def test_downloading_gives_paths_and_offline_mode_needs_nothing_else(
    hub: HubServer, client: Client, offline: Client
) -> None:
    files, expected = sharded(seed=7)
    commit = hub.add("org/whole", files)
    remote = client(open_repo, "org/whole")
    local = client(download, remote)
    assert local.is_local
    for name in (*(file.name for file in local.weight_files), *local.side_files):
        assert (local.root / name).read_bytes() == files[name]
    assert (local.root / "tokenizer.json").read_bytes() == TOKENIZER
    assert not (local.root / "tf_model.h5").exists()
    assert {n: (e.dtype, e.shape, e.offset) for n, e in local.tensors.items()} == {
        n: (e.dtype, e.shape, e.offset) for n, e in remote.tensors.items()
    }
    for file in local.weight_files:
        assert file.path.read_bytes() == files[file.name]
        assert file.stamp == (file.size, file.path.stat().st_mtime_ns)
    assert [f.sha256 for f in local.weight_files] == [f.sha256 for f in remote.weight_files]
    assert_describes(local, files, expected)

    hub.requests.clear()
    assert client(open_repo, "org/whole") == local
    assert not hub.seen("/cdn/")
    hub.requests.clear()
    assert offline(open_repo, "org/whole") == local
    pinned = offline(open_repo, "org/whole", commit)
    assert (pinned.revision, pinned.tensors) == (commit, local.tensors)
    assert not hub.requests


def test_offline_mode_without_the_weights_says_so(hub: HubServer, client: Client, offline: Client) -> None:
    files, _ = sharded(seed=3)
    hub.add("org/partial", files)
    client(open_repo, "org/partial")
    hub.requests.clear()
    for repo in ("org/partial", "org/never-seen"):
        with pytest.raises(HubError, match=r"is not complete in the cache.*Run once without HF_HUB_OFFLINE"):
            offline(open_repo, repo)
    assert not hub.requests


def test_files_in_the_cache_are_read_there(hub: HubServer, client: Client) -> None:
    """Weights that another program downloaded are not asked for again, even if side files are missing."""
    files, expected = sharded(seed=21)
    commit = hub.add("org/cached", files)
    for name in (name for name in files if name.endswith(".safetensors")):
        client(fetch, "org/cached", name, commit)
    hub.requests.clear()
    checkpoint = client(open_repo, "org/cached")
    assert_describes(checkpoint, files, expected)
    assert not hub.seen("/cdn/")
    assert checkpoint.root is None
    assert client(download, checkpoint).is_local


def test_a_new_commit_downloads_only_what_changed(hub: HubServer, client: Client) -> None:
    files, _ = sharded(seed=11)
    hub.add("org/changes", files)
    client(download, client(open_repo, "org/changes"))
    name = "model-00002-of-00002.safetensors"
    hub.add("org/changes", {**files, name: save(weights(99, "c.weight", "d.weight"))})
    changed = client(open_repo, "org/changes")
    hub.requests.clear()
    local = client(download, changed)
    assert load((local.root / name).read_bytes())["c.weight"].equal(weights(99, "c.weight")["c.weight"])
    assert sum(request.sent for request in hub.seen("/cdn/", "GET")) == changed.weight_files[1].size


def test_a_revision_is_pinned_to_its_commit(hub: HubServer, client: Client) -> None:
    old, new = (save(weights(seed, "w", size=256)) for seed in (1, 2))
    hub.add("org/two", {"model.safetensors": old}, branch="refs/pr/1")
    commit = hub.repos["org/two"].commits["refs/pr/1"]
    hub.add("org/two", {"model.safetensors": new})
    checkpoint = client(open_checkpoint, "org/two@refs/pr/1")
    assert (checkpoint.reference, checkpoint.revision) == ("org/two@refs/pr/1", commit)
    local = client(download, checkpoint)
    assert local.weight_files[0].path.read_bytes() == old


def test_an_unknown_revision_is_named(hub: HubServer, client: Client) -> None:
    hub.add("org/revisions", {"model.safetensors": save(weights(0, "w", size=256))})
    with pytest.raises(HubError, match=r"org/revisions@v9: .*no branch, tag or commit 'v9'"):
        client(open_checkpoint, "org/revisions@v9")


@pytest.mark.parametrize("token", [None, OUTSIDER])
def test_a_missing_model_is_neither_here_nor_there(client: Client, token: str | None) -> None:
    with pytest.raises(HubError, match=r"models\[0\].model: org/absent: there is no such folder here.*hf auth login"):
        client(open_with_place, "org/absent", token=token)


def open_with_place(reference: str) -> Checkpoint:
    return open_checkpoint(reference, where="models[0].model")


def test_a_gated_model_needs_access(hub: HubServer, client: Client) -> None:
    files, expected = sharded(seed=5)
    hub.add("org/gated", files, gated=True)
    for token in (None, OUTSIDER):
        with pytest.raises(HubError, match=rf"gated.*{hub.endpoint}/org/gated.*hf auth login"):
            client(open_repo, "org/gated", token=token)
    assert_describes(client(open_repo, "org/gated", token=MEMBER), files, expected)


def test_a_private_model_opens_for_its_members_and_the_token_stays_on_the_hub(hub: HubServer, client: Client) -> None:
    files, expected = sharded(seed=6)
    hub.add("org/private", files, private=True)
    with pytest.raises(HubError, match="no such model on the Hub that this account may see"):
        client(open_repo, "org/private", token=OUTSIDER)
    assert_describes(client(open_repo, "org/private", token=MEMBER), files, expected)
    assert {request.token for request in hub.seen("/org/private", "GET") if request.status < 400} == {MEMBER}
    assert {request.token for request in hub.seen("/cdn/")} == {None}


def test_a_wrong_token_is_told_apart_from_a_missing_model(hub: HubServer, client: Client) -> None:
    hub.add("org/open", {"model.safetensors": save(weights(0, "w", size=256))})
    with pytest.raises(HubError, match=r"refused the access token \(HTTP 401\).*hf auth login"):
        client(open_repo, "org/open", token="hf_expired")


@pytest.mark.parametrize(("status", "text"), [(500, r"error \(HTTP 500\)"), (429, "limits the rate")])
def test_failures_of_the_hub_are_explained(hub: HubServer, client: Client, status: int, text: str) -> None:
    hub.failing = status
    with pytest.raises(HubError, match=text):
        client(open_repo, "org/whatever")


def test_an_unreachable_hub_suggests_offline_mode(tmp_path: Path) -> None:
    client = Client("http://127.0.0.1:1", tmp_path)
    with client.pool, pytest.raises(HubError, match=r"cannot be reached at http://127.0.0.1:1.*HF_HUB_OFFLINE=1"):
        client(open_repo, "org/model")


def test_an_impossible_name_never_reaches_the_hub(hub: HubServer, client: Client) -> None:
    with pytest.raises(HubError, match="valid name of a model"):
        client(open_checkpoint, "org/two--dashes")
    assert not hub.requests


def test_a_repo_of_torch_files_is_downloaded_to_be_opened(hub: HubServer, client: Client) -> None:
    expected = weights(8, "w", "v", size=1024)
    buffer = io.BytesIO()
    torch.save(expected, buffer)
    files = {"pytorch_model.bin": buffer.getvalue(), "config.json": CONFIG, "vocab.txt": b"a"}
    hub.add("org/torch", files)
    checkpoint = client(open_repo, "org/torch")
    assert not checkpoint.is_local
    assert_describes(checkpoint, files, expected)
    local = client(download, checkpoint)
    assert local.is_local
    assert local.side_files == ("config.json", "vocab.txt")


def test_what_cannot_be_merged_is_refused_before_any_weights_are_read(hub: HubServer, client: Client) -> None:
    quantised = json.dumps({"quantization_config": {"quant_method": "gptq"}}).encode()
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}).encode()
    data = save(weights(0, "w", size=256))
    hub.add("org/gptq", {"config.json": quantised, "model.safetensors": data})
    hub.add("org/lora", {"adapter_config.json": adapter, "adapter_model.safetensors": data})
    hub.add("org/gguf", {"model-q4.gguf": b"GGUF"})
    for repo, text in (("gptq", "quantised with GPTQ"), ("lora", "LORA adapter of org/base"), ("gguf", "GGUF")):
        with pytest.raises(CheckpointError, match=text):
            client(open_repo, f"org/{repo}")
    assert not hub.seen("/cdn/")


def test_a_damaged_file_on_the_hub_is_named(hub: HubServer, client: Client) -> None:
    hub.add("org/damaged", {"model.safetensors": save(weights(0, "w", size=256))[:-1]})
    with pytest.raises(CheckpointError, match=r"org/damaged@\w{8}: model.safetensors: tensor 'w': .*truncated"):
        client(open_repo, "org/damaged")


class Listener(Silent):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def plan_and_merge(recipe: Mapping[str, object], out: Path) -> tuple[list[int], list[str], dict[str, object]]:
    """Bytes that the plan says must be downloaded, what is said of it, and the manifest of the merge."""
    import weldment

    planned = weldment.plan(recipe)
    missing = [file.size for model in planned.models.values() for file in model.weight_files if file.path is None]
    heard = Listener()
    weldment.merge(recipe, out, progress=heard)
    said = [text for text in heard.texts if text.startswith("downloading")]
    return missing, said, json.loads((out / "weldment.json").read_text())


def test_a_merge_of_hub_models(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """Planned from headers, downloaded, merged; commits and SHA-256 of the inputs are in the manifest."""
    first_files, first = sharded(10)
    second_files, second = sharded(20)
    commits = [hub.add("org/first", first_files), hub.add("org/second", second_files)]
    recipe = {"models": [{"model": "org/first"}, {"model": "org/second@main"}], "merge_method": "linear"}
    missing, said, manifest = client(plan_and_merge, recipe, tmp_path / "out")
    assert sorted(missing) == sorted(len(f[n]) for f in (first_files, second_files) for n in f if n.endswith("tensors"))
    assert said == ["downloading org/first, 2.1 MB", "downloading org/second@main, 2.1 MB"]
    merged = load((tmp_path / "out" / "model.safetensors").read_bytes())
    for name, tensor in first.items():
        expected = ((tensor.float() + second[name].float()) / 2).bfloat16()
        assert torch.equal(merged[name], expected)
    inputs = manifest["inputs"]
    assert isinstance(inputs, dict)
    assert [inputs[name]["revision"] for name in ("org/first", "org/second@main")] == commits
    assert all(len(file["sha256"]) == 64 for model in inputs.values() for file in model["files"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- org/first\n- org/second\nbase_model_relation: merge" in card
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == TOKENIZER


def test_a_bad_recipe_downloads_nothing(hub: HubServer, client: Client, home: Path, tmp_path: Path) -> None:
    """Models that do not fit together are found before any weights are asked for."""
    files, _ = sharded(30)
    other = {**files, "model-00002-of-00002.safetensors": save(weights(31, "c.weight", "d.weight", size=1 << 17))}
    hub.add("org/fits", files)
    hub.add("org/misfit", other)
    recipe = {"models": [{"model": "org/fits"}, {"model": "org/misfit"}], "merge_method": "linear"}
    with pytest.raises(UserError, match="shape"):
        client(plan_and_merge, recipe, tmp_path / "out")
    assert not list(home.rglob("models--org--misfit/**/*.safetensors"))
    assert not (tmp_path / "out").exists()
