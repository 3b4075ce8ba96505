"""Bundles from build to use: killed builds, `weld verify`, shards, 16 bits, tied heads."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import weldment
from folders import tree, weld
from models import ARCHITECTURES, perturbed
from weldment.planning.stages import plan_merges
from weldment.twin.build import build
from weldment.twin.bundle import read_bundle

TWIN: dict[str, Any] = {"exclusive": {"density": 1.0}, "exclude": [], "router": {"kind": "uniform"}}


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, **how: Any) -> dict[str, Any]:
    """A base and two experts of one architecture; their recipe."""
    torch.manual_seed(0)
    base = ARCHITECTURES[name].build().to(dtype)
    base.save_pretrained(folder / "base", **how)
    for seed, expert in enumerate(("chat", "code"), 1):
        model = ARCHITECTURES[name].build().to(dtype)
        model.load_state_dict(perturbed(base.state_dict(), seed))
        model.tie_weights()
        model.save_pretrained(folder / expert, **how)
    models = [str(folder / expert) for expert in ("chat", "code")]
    return {"base_model": str(folder / "base"), "models": models, "twin": TWIN}


def differs(folder: Path, out: Path, name: str, dtype: torch.dtype = torch.float32) -> float:
    """How far the experts' logits in the bundle are from their own, at most."""
    twin: Any = weldment.TwinModel.from_pretrained(out, dtype=dtype)
    kind = type(ARCHITECTURES[name].build()).__name__
    inputs = ARCHITECTURES[name].inputs()
    apart = 0.0
    with torch.no_grad():
        for expert in ("chat", "code"):
            own = getattr(transformers, kind).from_pretrained(folder / expert, dtype=dtype).eval()
            found = twin(**inputs, experts=expert).logits
            apart = max(apart, float((found - own(**inputs).logits).abs().max()))
    return apart


def test_the_tied_head_of_a_masked_language_model_is_the_experts(tmp_path: Path) -> None:
    recipe = save(tmp_path, "bert")
    build(recipe, tmp_path / "out")
    assert differs(tmp_path, tmp_path / "out", "bert") < 1e-4


def test_a_sharded_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(plan_merges, shard_bytes=20_000)
    monkeypatch.setattr("weldment.twin.plan.plan_merges", small)
    build(save(tmp_path, "llama"), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert weldment.verify(tmp_path / "out").problems == ()
    assert differs(tmp_path, tmp_path / "out", "llama") < 1e-4


def test_a_bundle_of_16_bits(tmp_path: Path) -> None:
    """Factors are rounded to 8 bits of precision, and so is what is calculated with them."""
    build(save(tmp_path, "llama", torch.bfloat16), tmp_path / "out")
    assert differs(tmp_path, tmp_path / "out", "llama", torch.bfloat16) < 0.05


def test_verify_reads_the_experts_files(tmp_path: Path) -> None:
    build(save(tmp_path, "bert"), tmp_path / "out")
    assert weldment.verify(tmp_path / "out").problems == ()
    assert weld("verify", str(tmp_path / "out")).code == 0
    path = tmp_path / "out" / "experts" / "chat" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (tmp_path / "out" / "router" / "config.json").unlink()
    with pytest.raises(weldment.VerificationError) as caught:
        weldment.verify(tmp_path / "out")
    assert "chat/adapter_model.safetensors was altered" in str(caught.value)
    assert "router/config.json is missing" in str(caught.value)


KILLED = """
import sys
import weldment.twin.build as building
from processes import die
building.compress = lambda *_: die()
building.build(sys.argv[1], sys.argv[2], overwrite=True)
"""


def test_a_build_killed_by_the_system_is_begun_anew(tmp_path: Path) -> None:
    recipe = save(tmp_path, "bert")
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    build(recipe, tmp_path / "out")
    before = tree(tmp_path / "out")
    places = os.pathsep.join(str(place) for place in (Path(__file__).parent, *sys.path))
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": places}, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert tree(tmp_path / "out") == before
    assert (tmp_path / "out.partial").exists()
    build({**recipe, "twin": {**TWIN, "exclusive": {"rank": 1}}}, tmp_path / "out", overwrite=True)
    assert read_bundle(tmp_path / "out").exclusive["rank"] == 1
    assert not (tmp_path / "out.partial").exists()
