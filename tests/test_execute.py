"""NaN and infinity in outputs, and interrupts, through real runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import weldment
from weldment import NonFiniteError


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def linear(*models: str, **more: Any) -> dict[str, Any]:
    return {"models": [{"model": model} for model in models], "merge_method": "linear", **more}


@pytest.mark.parametrize(
    ("scale", "recipe"),
    [
        (1e5, {"dtype": "float16"}),
        (3.4e38, {"dtype": "bfloat16"}),
        (1.0, {"dtype": "float32", "accumulate": "float64", "parameters": {"weight": 1e39, "normalize": False}}),
    ],
    ids=["float16", "bfloat16", "float64 to float32"],
)
def test_rounding_that_overflows_is_an_error(tmp_path: Path, scale: float, recipe: dict[str, Any]) -> None:
    model = write(tmp_path / "a", {"big": torch.full((4, 3), scale), "small": torch.ones(3)})
    with pytest.raises(NonFiniteError, match=r"big \(12\).*too large weights, or a dtype too narrow"):
        weldment.merge(linear(model, **recipe), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_largest_finite_values_pass(tmp_path: Path) -> None:
    """Values that round to the largest finite number are no overflow."""
    model = write(tmp_path / "a", {"x": torch.tensor([65519.0, -65519.0])})
    weldment.merge(linear(model, dtype="float16"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["x"].tolist() == [65504.0, -65504.0]


def test_guilty_input_is_named(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    good = write(tmp_path / "good", {"x": torch.ones(3), "y": torch.ones(3)})
    bad = write(tmp_path / "bad", {"x": torch.tensor([1.0, float("nan"), 1.0]), "y": torch.ones(3)})
    with pytest.raises(NonFiniteError, match=r"1 tensor of the result \(elements\): x \(1\).*in the weights of .*bad;"):
        weldment.merge(linear(good, bad), tmp_path / "out")
    assert torch.get_num_threads() == threads
    weldment.merge(linear(good, bad), tmp_path / "out", allow_nonfinite=True)
    assert torch.isnan(load_file(tmp_path / "out" / "model.safetensors")["x"][1])


def listen() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_from_the_keyboard(tmp_path: Path) -> None:
    """A real process with real threads: exit 130, and the rerun gives the bytes of an uninterrupted run."""
    draw = torch.Generator().manual_seed(0)
    models = [
        write(tmp_path / name, {f"layers.{n}.w": torch.randn(1500, 1500, generator=draw) for n in range(12)})
        for name in ("base", "a", "b")
    ]
    recipe = {**linear(*models[1:]), "merge_method": "della", "base_model": models[0]}
    recipe["parameters"] = {"density": 0.5, "epsilon": 0.2}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "weldment", "merge", "r.yml", "out", "--threads", "2"]
    # A shell starts its background jobs with SIGINT ignored, and children inherit that.
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    journal = tmp_path / "out.partial" / "journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=True)
    assert "resuming" in again.stderr
    weldment.merge(tmp_path / "r.yml", tmp_path / "whole")
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert first.read_bytes() == second.read_bytes()
