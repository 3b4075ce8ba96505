"""Adapters on the Hub, through huggingface_hub itself, against a Hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save
from torch import Tensor

import weldment
from adapter_folders import BASE, CONFIG, Q, assert_close, draw, tensors
from hub_server import Client, HubServer, running_hub
from weldment.adapters.opening import find_adapter, open_adapter, open_model
from weldment.errors import CheckpointError, HubError


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


def add_repos(hub: HubServer) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """`org/base` on a branch and `org/lora` with two revisions; their tensors."""
    hub.requests.clear()
    weights = draw({name: (shape[0], 1000) if len(shape) == 2 else shape for name, shape in BASE.items()}, 0)
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": save(weights), "README.md": b"#"}
    hub.add("org/base", files)
    hub.add("org/base", files, branch="next")
    adapters = [draw({f"{Q}.lora_A.weight": (2, 1000), f"{Q}.lora_B.weight": (6, 2)}, seed) for seed in (1, 2)]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    for branch, own in zip(("main", "second"), adapters, strict=True):
        stored = {f"base_model.model.{name}": value for name, value in own.items()}
        files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(stored)}
        hub.add("org/lora", {**files, "adapter_model.bin": b"x", "optimizer.pt": b"x"}, branch=branch)
    return weights, adapters


def planned(reference: str) -> bool:
    """Whether all that a plan needs is on this machine."""
    found = weldment.plan({"models": [{"model": reference}], "merge_method": "linear"})
    assert isinstance(found, weldment.Plan)
    return found.is_local


def merged(reference: str, out: Path) -> None:
    weldment.merge({"models": [{"model": reference}], "merge_method": "linear"}, out)


def test_a_base_and_adapters_on_the_hub(hub: HubServer, client: Client, offline: Client, tmp_path: Path) -> None:
    """Planned with the adapters and the headers of the base; merged; offline again from what is in the cache."""
    weights, adapters = add_repos(hub)
    reference = "org/base@next+org/lora+org/lora@second"
    assert client(planned, reference) is False
    large = sum(request.sent for request in hub.seen("/cdn/"))
    sizes = [
        len(hub.repos["org/lora"].files[commit]["adapter_model.safetensors"]) for commit in hub.repos["org/lora"].files
    ]
    assert sum(sizes) < large < sum(sizes) + (1 << 16) + 1
    assert not hub.seen("optimizer.pt")
    assert not hub.seen("adapter_model.bin")
    client(merged, reference, tmp_path / "out")
    expected = dict(weights)
    expected[f"{Q}.weight"] = weights[f"{Q}.weight"].double() + sum(
        2 * own[f"{Q}.lora_B.weight"].double() @ own[f"{Q}.lora_A.weight"].double() for own in adapters
    )
    assert_close(tensors(tmp_path / "out"), expected)
    hub.requests.clear()
    assert offline(planned, reference) is True
    offline(merged, reference, tmp_path / "offline")
    assert_close(tensors(tmp_path / "offline"), tensors(tmp_path / "out"), 0.0)
    assert not hub.requests


def test_an_adapter_on_the_hub_alone(hub: HubServer, client: Client, offline: Client) -> None:
    add_repos(hub)
    found = client(find_adapter, "org/lora@second")
    assert (found.repo, found.revision, found.folder.endswith(found.revision)) == (
        "org/lora",
        hub.repos["org/lora"].commits["second"],
        True,
    )
    assert client(find_adapter, "org/base") is None
    assert client(find_adapter, "org/missing") is None
    for reader in (client, offline):
        with pytest.raises(CheckpointError, match=r"LORA adapter of org/base, .*'org/base\+org/lora@second'"):
            reader(open_model, "org/lora@second")
        with pytest.raises(CheckpointError, match="there is no adapter 'org/base@next'"):
            reader(open_adapter, "org/base@next")
    with pytest.raises(HubError, match="no such model on the Hub"):
        client(open_model, "org/base+org/missing")
    with pytest.raises(HubError, match="not in the cache"):
        offline(open_model, "org/base@next+org/missing")
