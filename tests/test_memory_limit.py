"""`--max-memory`: the memory of a real merge, all its processes together, stays below the limit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from folders import weld, write_model
from resident import proportional_bytes
from weldment.engine.pools import can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="memory is read from /proc")

MODELS = 12
RECIPE = "\n".join(
    [
        "merge_method: della",
        "base_model: m0",
        "models:",
        *(f"  - model: m{number}" for number in range(1, MODELS)),
        "parameters: {density: 0.5, epsilon: 0.2}",
        "accumulate: float64",
    ]
)
MERGE = """
import sys
from weldment.cli import main
from weldment.engine import memory
memory.FORK_ELEMENTS = 0
main(sys.argv[1:])
"""


def peak(folder: Path, *options: str) -> int:
    """The most memory a merge takes."""
    command = [sys.executable, "-c", MERGE, "merge", "r.yml", "out", "--overwrite", "--threads", "6", *options]
    merge = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    most = 0
    while merge.poll() is None:
        most = max(most, proportional_bytes(merge.pid))
        time.sleep(0.04)
    assert merge.returncode == 0
    return most


def test_the_limit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(MODELS):
        write_model(tmp_path / f"m{seed}", seed, layers=2, vocabulary=16000, hidden=512)
    (tmp_path / "r.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    free = peak(tmp_path)
    limit = 330_000_000
    assert free > limit, "the test needs a merge that wants more"
    assert peak(tmp_path, "--max-memory", f"{limit}") <= limit
    refused = weld("merge", "r.yml", "out", "--overwrite", "--max-memory", "1KB")
    assert refused.code == 2
    assert "The least it needs is" in refused.err
