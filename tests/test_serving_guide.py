"""The guide to serving: its Python and JSON are answered by a real server, its tables name real options and fields."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("openai", reason="the client of OpenAI is not installed")

from serving_bundles import save_reader, save_writer, served
from test_docs import DOCS, blocks
from weldment.cli.twin import serve
from weldment.serving.engine import Engine
from weldment.serving.wire import ClassifyRequest

GUIDE = DOCS / "guide-serving.md"


def test_the_python_talks_to_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = blocks(GUIDE, "python")
    with served(Engine(save_writer(tmp_path / "twin"))) as server:
        exec(compile(text.replace("http://127.0.0.1:8000", server.url), str(GUIDE), "exec"), {"__name__": "page"})
    assert "'weights': {'prose': 0.5, 'verse': 0.5}" in capsys.readouterr().out


def test_the_json_is_classified(tmp_path: Path) -> None:
    (text,) = blocks(GUIDE, "json")
    with served(Engine(save_reader(tmp_path))) as server:
        found = server.post("/v1/classify", **json.loads(text)).json()
    assert [set(result) for result in found["results"]] == [
        {"index", "head", "label", "scores", "expert", "routing"}
    ] * 2


def test_tables_name_what_there_is() -> None:
    page = GUIDE.read_text(encoding="utf-8")
    options = {f"--{name.replace('_', '-')}" for name in serve.command.__annotations__}
    assert set(re.findall(r"`(--[\w-]+)`", page)) <= options
    fields = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert set(fields) == set(ClassifyRequest.model_fields)
