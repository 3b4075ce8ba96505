"""The demo runs from start to end without a network, and what it shows is what it measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import weldment

DEMO = Path(__file__).parents[1] / "examples" / "digits" / "demo.py"
NOWHERE = "http://127.0.0.1:9"
MERGES = sorted(path.stem for path in (DEMO.parent / "recipes").glob("*.yml"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick run of the demo wrote, with its standard output in `stdout.txt`."""
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn (the extra `demo`)")
    folder = tmp_path_factory.mktemp("demo") / "demo_output"
    settings = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100", "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE}
    command = [sys.executable, str(DEMO), "--quick", "--out", str(folder)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]


def test_every_recipe_has_a_row(rows: list[dict[str, Any]]) -> None:
    assert [row["kind"] for row in rows] == ["base", *["expert"] * 4, *["merge"] * 5]
    assert sorted(row["name"] for row in rows if row["kind"] == "merge") == MERGES


def test_experts_beat_chance_and_the_base_in_their_own_task(rows: list[dict[str, Any]]) -> None:
    base = rows[0]["accuracy"]
    for row in rows:
        if row["kind"] == "expert":
            own = row["accuracy"][row["name"]]
            # Guessing gets a half, a tenth for the digit; 0.6 holds for the larger class of any task.
            assert own > max(0.62, base[row["name"]]), row["name"]


def test_merges_are_verified_models_with_every_head(out: Path) -> None:
    for method in MERGES:
        folder = out / "merged" / method
        assert weldment.verify(folder).tensors == 6 + 4 * 2
        assert len(list((folder / "heads").glob("*.safetensors"))) == 4


def test_page_and_table_show_what_was_measured(out: Path, rows: list[dict[str, Any]]) -> None:
    page = (out / "index.html").read_text(encoding="utf-8")
    table = (out / "stdout.txt").read_text(encoding="utf-8")
    for row in rows:
        mean = f"{100 * sum(row['accuracy'].values()) / 4:.1f}"
        for value in [*(f"{100 * value:.1f}" for value in row["accuracy"].values()), mean]:
            assert value in table
            assert f"<b>{value}</b>" in page


def test_page_needs_nothing_else(out: Path) -> None:
    page = (out / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


def test_the_mean_stands_first_where_a_narrow_screen_shows_it(out: Path, rows: list[dict[str, Any]]) -> None:
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<th>backbone</th><th>mean</th>" in page
    shown = [float(value) for value in re.findall(r"<tr class=[^>]*><th>.*?</th><td[^>]*>.*?<b>([\d.]+)</b>", page)]
    assert shown == [round(100 * sum(row["accuracy"].values()) / 4, 1) for row in rows]
