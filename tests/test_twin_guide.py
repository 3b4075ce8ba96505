"""The guide's examples in Python run, as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from classifiers import save_classifier
from models import ARCHITECTURES
from twin_bundles import make_bundle, random_expert


def test_the_examples_in_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = save_classifier(tmp_path / "shared").base_model
    experts = {}
    for seed, (name, labels) in enumerate({"sst2": ("negative", "positive"), "trec": ("who", "what", "why")}.items()):
        whole = save_classifier(tmp_path / name, labels=labels, seed=seed)
        experts[name] = expert = random_expert(shared, seed, skip=("pooler",))  # pyright: ignore[reportArgumentType]
        expert.head = {key: tensor for key, tensor in whole.state_dict().items() if key.startswith("classifier")}
        expert.head_config = whole.config.to_dict() | {"architectures": [type(whole).__name__]}
    make_bundle(tmp_path / "out", shared, experts)  # pyright: ignore[reportArgumentType]
    writer = ARCHITECTURES["llama"].build()
    make_bundle(tmp_path / "writer", writer, {n: random_expert(writer, s) for s, n in enumerate(("code", "law"))})
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs/guide-twin.md").read_text(encoding="utf-8")
    section = text.split("## Using a bundle in Python")[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    exec(compile(code, "guide-twin.md", "exec"), {})
    assert re.search(r"'label': '(sst2/(negative|positive)|trec/(who|what|why))'", capsys.readouterr().out)
