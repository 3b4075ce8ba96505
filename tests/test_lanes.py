"""Copies to and from a device that go on in the background, on a stand-in that does them as late as it may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from folders import tree, write_model
from weldment import merge
from weldment.engine import run
from weldment.engine.lanes import Lane, Mark


class LateLane:
    """A lane in main memory that notices what a real one would punish.

    A buffer that is sent must not change until a mark was waited for. What is fetched arrives when
    a mark is waited for; until then the buffer holds NaN.
    """

    waits = True

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, Tensor]] = []
        self._fetched: list[Callable[[], object]] = []

    def send(self, numbers: Tensor, device: Tensor) -> None:
        device.copy_(numbers)  # operations on the device come after it
        self._sent.append((numbers, numbers.clone()))

    def fetch(self, device: Tensor, numbers: Tensor) -> None:
        result = device.clone()
        numbers.fill_(float("nan"))
        self._fetched.append(lambda: numbers.copy_(result))

    def mark(self) -> Mark:
        return self

    def wait(self) -> None:
        if not self.waits:
            return
        for numbers, then in self._sent:
            assert torch.equal(_bits(numbers), _bits(then)), "the buffer was filled again before it was sent"
        for deliver in self._fetched:
            deliver()
        self._sent.clear()
        self._fetched.clear()


class Careless(LateLane):
    """A lane whose marks do not wait."""

    waits = False


def _bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


METHODS = {
    "linear": {},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "sce": {"select_topk": 0.3},
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, model in enumerate(("base", "a", "b")):
        write_model(tmp_path / model, seed, layers=2, vocabulary=3000, hidden=256)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(method: str, out: str) -> dict[str, bytes]:
    recipe = {"merge_method": method, "models": [{"model": "a"}, {"model": "b"}], "parameters": METHODS[method]}
    if method != "linear":
        recipe["base_model"] = "base"
    merge(recipe, out, threads=2, allow_nonfinite=True)
    return tree(Path(out))


def use(monkeypatch: pytest.MonkeyPatch, lane: Callable[[], Lane]) -> None:
    monkeypatch.setattr(run, "lane_for", lambda device: lane())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_overtaken(models: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    expected = merged(method, "plain")
    use(monkeypatch, LateLane)
    assert merged(method, "late") == expected


def test_the_stand_in_notices(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merged("linear", "plain")
    use(monkeypatch, Careless)
    assert merged("linear", "careless") != expected


def test_a_buffer_filled_too_early_is_noticed() -> None:
    lane = LateLane()
    numbers = torch.ones(3)
    lane.send(numbers, torch.empty(3))
    numbers.zero_()
    with pytest.raises(AssertionError, match="filled again"):
        lane.mark().wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_the_same_to_float32_rounding(models: Path, method: str) -> None:
    from safetensors.torch import load_file

    recipe = {"merge_method": method, "models": [{"model": "a"}, {"model": "b"}], "parameters": METHODS[method]}
    if method != "linear":
        recipe["base_model"] = "base"
    merge(recipe, "cpu")
    merge(recipe, "gpu", device="cuda")
    expected = load_file("cpu/model.safetensors")
    for name, tensor in load_file("gpu/model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])
