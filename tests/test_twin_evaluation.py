"""`weld twin eval`: every row is what the model answers when it is asked in that way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from classifiers import save_classifier, texts
from twin_bundles import Expert, make_bundle, random_expert
from weldment.cli import app
from weldment.errors import CheckpointError, TaskError, UserError
from weldment.evaluation.comparison.rows import AVERAGE
from weldment.evaluation.evaluate import evaluate
from weldment.evaluation.states import ModelState
from weldment.twin.cutting import Cutter, Level, levels
from weldment.twin.evaluation import evaluate_twin
from weldment.twin.model import TwinModel
from weldment.twin.router import Router, RouterConfig

LABELS = {"mood": ("bad", "good"), "topic": ("sport", "art", "war"), "stars": ("LABEL_0",)}
COUNT = 40


def save_task(folder: Path, name: str, seed: int) -> None:
    """Examples with random answers."""
    chance = np.random.default_rng(seed)
    labels = LABELS[name]
    regression = len(labels) == 1
    described = {
        "name": name,
        "metric": "pearson" if regression else "accuracy",
        "labels": None if regression else list(labels),
    }
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(described), encoding="utf-8")
    rows = [
        {"text": text, "label": round(float(chance.normal()), 3) if regression else int(chance.integers(len(labels)))}
        for text in texts(COUNT, longest=9)
    ]
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts as models, their tasks, and the bundle of them, which is exact: `bundle`, of a router that mixes."""
    folder = tmp_path_factory.mktemp("twin_eval")
    wholes = {n: save_classifier(folder / "m" / n, labels=v, seed=s) for s, (n, v) in enumerate(LABELS.items())}
    shared: Any = copy.deepcopy(wholes["mood"].base_model)
    experts: dict[str, Expert] = {}
    for seed, (name, whole) in enumerate(wholes.items()):
        experts[name] = expert = random_expert(shared, seed, rank=4, skip=("pooler",), scale=0.2)
        expert.head = {key: t for key, t in whole.state_dict().items() if not key.startswith("bert.")}
        expert.head_config = whole.config.to_dict() | {"architectures": [type(whole).__name__]}
        whole.base_model.load_state_dict(expert.whole(shared))
        whole.save_pretrained(folder / "m" / name)
        save_task(folder / "tasks" / name, name, seed)
    fixed = Router(RouterConfig("fixed", tuple(LABELS), expert="topic"), {})
    make_bundle(folder / "bundle", shared, experts, fixed)
    make_bundle(folder / "mixed", shared, experts)
    for name in ("bundle", "mixed"):
        described = json.loads((folder / name / "twin.json").read_text(encoding="utf-8"))
        for record in described["experts"]:
            record["reference"] = str(folder / "m" / record["name"])
        (folder / name / "twin.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def tasks(place: Path) -> list[str]:
    return [str(place / "tasks" / name) for name in LABELS]


@pytest.fixture(scope="module")
def found(place: Path) -> Any:
    return evaluate_twin(place / "bundle", tasks(place), sweep=levels("2,100%"))


def values(found: Any, row: str) -> dict[str, float]:
    return {task: score.value for task, score in found.row(row).scores.items()}


def test_an_exact_bundle_with_an_oracle_is_the_experts(found: Any) -> None:
    for name in LABELS:
        assert values(found, name).keys() == {name}
        assert values(found, "oracle")[name] == pytest.approx(values(found, name)[name], abs=1e-4)
    assert found.relative(found.row("oracle"))[AVERAGE].value == pytest.approx(100.0, abs=0.1)


def test_the_shared_row_is_the_shared_model_with_each_task_s_head(place: Path, found: Any) -> None:
    from weldment.evaluation.states import load_state

    shared = load_state(place / "bundle")
    state = ModelState("shared", shared.tensors, shared.config, shared.folder)
    heads = {name: str(place / "m" / name) for name in LABELS}
    expected = evaluate(state, tasks(place), heads=heads)
    assert values(found, "shared") == pytest.approx({name: score.value for name, score in expected.items()}, abs=1e-4)


def test_who_is_always_routed_to_the_same_expert_is_right_on_its_task_alone(found: Any) -> None:
    assert found.routes == {task: {"mood": 0, "topic": COUNT, "stars": 0} for task in LABELS}
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.row("routed head").scores["topic"].value == found.row("oracle").scores["topic"].value
    assert found.row("routed head").scores["mood"].value == 0.0
    assert found.row("routed head").scores["stars"].value == 0.0
    assert values(found, "routed") == values(found, "top 1")
    assert any("33.3 %" in note for note in found.notes)


def test_a_mixing_router_differs_from_its_first_choice(place: Path) -> None:
    mixed = evaluate_twin(place / "mixed", tasks(place))
    model: Any = TwinModel.from_pretrained(place / "mixed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "mixed")
    inputs = tokenizer(list(texts(COUNT, longest=9)), padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        chosen = model(**inputs, expert_weights=torch.full((3,), 1 / 3), task="topic").logits.argmax(1)
    lines = (place / "tasks" / "topic" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    labels = torch.tensor([json.loads(line)["label"] for line in lines])
    assert mixed.row("routed").scores["topic"].value == pytest.approx(float((chosen == labels).float().mean()))


def test_a_sweep_cuts_and_leaves_the_model_as_it_was(found: Any) -> None:
    whole, cut = found.row("routed, 100 %"), found.row("routed, rank 2")
    assert values(found, "routed, 100 %") == pytest.approx(values(found, "routed"), abs=1e-3)
    assert cut.nbytes < whole.nbytes == found.row("routed").nbytes
    assert found.sweep == ("routed, rank 2", "routed, 100 %")
    assert any("routed, 100 %: the bundle keeps no more" in note for note in found.notes)


def test_cut_factors_are_the_best_of_their_rank(place: Path) -> None:
    model: Any = TwinModel.from_pretrained(place / "bundle")
    layer = next(m for m in model.modules() if type(m).__name__ == "ExclusiveMatrix" and len(m.spans) == 3)
    start, end = layer.spans[1]
    whole = (layer.b[start:end].T @ layer.a[start:end]).double()
    u, s, v = torch.linalg.svd(whole)
    before = layer.a
    with Cutter(model, [Level(rank=2)]).cut(Level(rank=2)):
        start, end = layer.spans[1]
        assert end - start == 2
        torch.testing.assert_close(
            (layer.b[start:end].T @ layer.a[start:end]).double(), (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5
        )
    assert layer.a is before


def test_levels_are_ranks_and_percents() -> None:
    assert levels("4, 2%,100%,4") == (Level(rank=4), Level(share=0.02), Level(share=1.0))
    assert Level(share=0.02).count(384, 1536) == 8
    assert Level(share=0.001).count(384, 1536) == 1
    assert Level(rank=500).count(384, 1536) == 384


@pytest.mark.parametrize("given", ["0", "0%", "101%", "-3", "a", "", "1.5", "nan%"])
def test_other_levels_are_refused(given: str) -> None:
    with pytest.raises(UserError, match="is no rank of at least 1"):
        levels(given)


def test_bfloat16_gives_nearly_the_same(place: Path, found: Any) -> None:
    rough = evaluate_twin(place / "bundle", tasks(place)[:2], dtype="bfloat16")
    for name in ("mood", "topic"):
        assert rough.row("oracle").scores[name].value == pytest.approx(found.row("oracle").scores[name].value, abs=0.1)
    assert rough.row("oracle").nbytes < found.row("oracle").nbytes


def test_experts_that_are_gone_are_replaced_by_their_parts(place: Path, tmp_path: Path) -> None:
    import shutil

    bundle = shutil.copytree(place / "bundle", tmp_path / "bundle")
    text = (bundle / "twin.json").read_text(encoding="utf-8").replace(str(place / "m"), str(tmp_path / "gone"))
    (bundle / "twin.json").write_text(text, encoding="utf-8")
    found = evaluate_twin(bundle, tasks(place)[:1])
    assert [row.name for row in found.rows] == ["shared", "oracle", "routed", "top 1", "routed head"]
    assert found.relative(found.row("oracle"))[AVERAGE].value == 100.0
    assert any("as the bundle has them" in note for note in found.notes)


def test_originals_may_be_said(place: Path, tmp_path: Path) -> None:
    import shutil

    bundle = shutil.copytree(place / "bundle", tmp_path / "bundle")
    text = (bundle / "twin.json").read_text(encoding="utf-8").replace(f"{place / 'm'}/", "")
    (bundle / "twin.json").write_text(text, encoding="utf-8")
    gone = evaluate_twin(bundle, tasks(place)[:1])
    assert any("the expert 'mood' is not here" in note for note in gone.notes)
    found = evaluate_twin(bundle, tasks(place)[:1], originals={"mood": str(place / "m" / "mood")})
    assert found.rows[0].kind == "expert"
    with pytest.raises(UserError, match="there is no expert 'other'"):
        evaluate_twin(bundle, tasks(place)[:1], originals={"other": "here"})
    with pytest.raises(CheckpointError):
        evaluate_twin(bundle, tasks(place)[:1], originals={"mood": str(tmp_path / "gone")})


def test_a_task_without_an_expert_or_with_another_s_is_refused(place: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(place / "tasks" / "mood", tmp_path / "other")
    described = json.loads((other / "task.json").read_text(encoding="utf-8"))
    (other / "task.json").write_text(json.dumps({**described, "name": "other"}), encoding="utf-8")
    with pytest.raises(TaskError, match="no expert 'other'"):
        evaluate_twin(place / "bundle", [other])
    with pytest.raises(TaskError, match="has 3 outputs, and the task takes 2"):
        evaluate_twin(place / "bundle", [other], experts={"other": "topic"})
    with pytest.raises(TaskError, match="there is no task 'nothing'"):
        evaluate_twin(place / "bundle", [other], experts={"nothing": "topic"})
    found = evaluate_twin(place / "bundle", [other], experts={"other": "mood"}, limit=8)
    assert found.row("mood").scores["other"].examples == 8


def test_texts_that_are_generated_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("w1 w2 w3", encoding="utf-8")
    with pytest.raises(TaskError, match="only classification and regression"):
        evaluate_twin(place / "bundle", [f"perplexity:{tmp_path / 'some.txt'}"])


def test_the_command_prints_tables_and_saves_a_page_with_the_curve(place: Path, tmp_path: Path) -> None:
    call = ["twin", "eval", str(place / "bundle"), "--sweep", "1,2,4", "--out", str(tmp_path / "out"), "--limit", "20"]
    call += [part for task in tasks(place)[:2] for part in ("--task", task)]
    ran = CliRunner().invoke(app, call)
    assert ran.exit_code == 0, ran.output
    assert "routed head" in ran.output
    assert "routed to" in ran.output
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert 'class="curve"' in page
    assert page.count('class="dot"') == 4
    assert "Whom the router chooses first" in page
    assert "on each other" not in page
    record = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert record["router"]["confusion"]["mood"] == {"mood": 0, "topic": 20, "stars": 0}
    assert record["sweep"] == ["routed, rank 1", "routed, rank 2", "routed, rank 4"]
    sizes = [row["nbytes"] for row in record["rows"] if row["name"] in record["sweep"]]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
