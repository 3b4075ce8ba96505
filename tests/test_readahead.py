"""What is asked for before it is read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from weldment.engine import work as module
from weldment.engine.blocks import Range
from weldment.engine.readahead import ask_for
from weldment.engine.work import Worker


@dataclass
class Input:
    """Remembers what it was asked for."""

    asked: list[tuple[int, int]] = field(default_factory=list)

    def ask_for(self, start: int, stop: int) -> None:
        self.asked.append((start, stop))


@dataclass
class Tensor:
    numel: int
    inputs: list[Input] = field(default_factory=lambda: [Input(), Input()])


def test_every_element_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes of the tensors, all but the first elements are asked for a fixed distance before."""
    monkeypatch.setattr(module, "AHEAD", 70)
    works: list[Any] = [Tensor(numel) for numel in (100, 1, 0, 33, 64, 250, 5)]
    worker = Worker(torch.device("cpu"), torch.float32, works)
    for place, work in enumerate(works):
        for start in range(0, work.numel, 20):
            stop = min(start + 20, work.numel)
            worker.look_ahead(place, Range(start, stop, (stop - start,)))
    for place, work in enumerate(works):
        for source in work.inputs:
            found = [element for start, stop in source.asked for element in range(start, stop)]
            assert found == list(range(70 if place == 0 else 0, work.numel))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_only_what_is_not_cached_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    os.sync()
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, start, length, advice: asked.append((start, length)))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.pread(descriptor, 1 << 20, 0)
        ask_for(descriptor, 1000, 1 << 20)
        assert not asked
        monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)  # a system that cannot tell
        ask_for(descriptor, 1000, 300_000)
    finally:
        os.close(descriptor)
    assert asked[0][0] == 1000
    assert [start + length for start, length in asked[:-1]] == [start for start, _ in asked[1:]]
    assert sum(asked[-1]) == 300_000
