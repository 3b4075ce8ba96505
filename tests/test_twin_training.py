"""Routers made from task folders: chosen on validation, calibrated, saved with what is known; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import weldment
from classifiers import WORDS, save_classifier, write_task
from twin_bundles import Expert, make_bundle, random_expert
from weldment.errors import CheckpointError, TaskError, UserError
from weldment.twin.bundle import ExpertPart, read_bundle
from weldment.twin.fitting import Sample, best_temperature, class_means, threshold_of, train_mlp
from weldment.twin.router import Router, RouterConfig, load_router, save_router, thinned
from weldment.twin.training import RouterSettings, make_router

NAMES = ("low", "high")


def task(folder: Path, words: tuple[str, ...], sizes: dict[str, int]) -> Path:
    """Sentences of some words alone."""
    for split, count in sizes.items():
        chance = torch.Generator().manual_seed(count)
        places = torch.randint(len(words), (count, 6), generator=chance).tolist()
        rows = [{"text": " ".join(words[place] for place in row), "label": 0} for row in places]
        write_task(folder, rows, ["yes", "no"], split)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    save_classifier(folder / "classifier").base_model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "classifier" / name).rename(folder / name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Texts of the first words, and of the last ones; `test` is no file that could be read."""
    folder = tmp_path_factory.mktemp("tasks")
    sizes = {"train": 120, "validation": 30}
    found = {"low": task(folder / "low", WORDS[:30], sizes), "high": task(folder / "high", WORDS[-30:], sizes)}
    for place in found.values():
        (place / "test.jsonl").write_text("not JSON", encoding="utf-8")
    return {name: str(place) for name, place in found.items()}


def parts(*names: str) -> list[ExpertPart]:
    return [ExpertPart(name, name, None, None, None, None, None, 1, None) for name in names]


@pytest.mark.parametrize("kind", ["mlp", "centroid"])
def test_a_router_tells_texts_apart_and_says_how_well(shared: Path, data: Any, tmp_path: Path, kind: str) -> None:
    settings = RouterSettings(kind=kind, data=data, width=16)
    report = make_router(shared, parts(*NAMES), settings, tmp_path)
    assert report.accuracy is not None
    assert report.accuracy > 0.8
    assert report.confusion is not None
    assert [sum(row) for row in report.confusion] == [30, 30]
    assert report.train == {"low": 120, "high": 120}
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["accuracy"] == report.accuracy
    assert content["data"]["low"]["train_sha256"] != content["data"]["high"]["train_sha256"]
    assert load_router(tmp_path, NAMES).config.confusion == report.confusion


def test_the_same_seed_gives_the_same_bytes(shared: Path, data: Any, tmp_path: Path) -> None:
    settings = RouterSettings(data=data, width=8, epochs=3)
    for name, threads in (("one", 1), ("two", 2)):
        torch.set_num_threads(threads)
        make_router(shared, parts(*NAMES), settings, tmp_path / name)
    for file in ("config.json", "router.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    make_router(shared, parts(*NAMES), replace(settings, seed=1), tmp_path / "other")
    assert (tmp_path / "one" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_inputs_unlike_the_data_fall_back_to_the_shared_model(shared: Path, data: Any, tmp_path: Path) -> None:
    make_router(shared, parts(*NAMES), RouterSettings(kind="centroid", data=data), tmp_path)
    router = load_router(tmp_path, NAMES)
    width = router.config.hidden_size or 0
    like = router.tensor("centres") @ torch.linalg.inv(router.tensor("whitening")).T
    near = router.route(2, like, torch.device("cpu"))
    assert near.fallback.tolist() == [0.0, 0.0]
    assert near.weights.argmax(1).tolist() == [0, 1]
    far = router.route(1, 50.0 * torch.ones(1, width), torch.device("cpu"))
    assert float(far.fallback) > 0.99
    assert float(far.weights.sum()) == pytest.approx(1.0 - float(far.fallback), abs=1e-6)
    never = router.altered(threshold=None).route(1, 50.0 * torch.ones(1, width), torch.device("cpu"))
    assert float(never.weights.sum()) == pytest.approx(1.0)


def test_a_temperature_is_the_one_that_data_were_drawn_with() -> None:
    chance = torch.Generator().manual_seed(0)
    scores = 3.0 * torch.randn(20000, 4, generator=chance)
    drawn = torch.multinomial((scores / 2.5).softmax(1), 1, generator=chance)[:, 0]
    assert best_temperature(scores, drawn) == pytest.approx(2.5, rel=0.05)
    assert best_temperature(100.0 * scores, drawn) == pytest.approx(250.0, rel=0.05)


def test_distances_are_those_of_mahalanobis() -> None:
    chance = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=chance)
    features = torch.randn(4000, 5, generator=chance) @ mixing.T
    experts = torch.arange(4000) % 2
    features[experts == 1] += 4.0
    state = class_means(Sample(features, experts), 2)
    router = Router(RouterConfig("centroid", NAMES, 5), state)
    inverse = torch.linalg.inv(mixing @ mixing.T)
    apart = features[:3] - features[experts == 0].mean(0)
    expected = torch.einsum("ni,ij,nj->n", apart, inverse, apart)
    torch.testing.assert_close(router.distances(features[:3])[:, 0], expected, rtol=0.2, atol=0.2)
    assert threshold_of(features, state, 0.01) > threshold_of(features, state, 0.5)


def test_training_ends_with_the_best_state_on_validation() -> None:
    chance = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=chance)
    experts = (features[:, 0] > 0).long()
    noise = Sample(torch.randn(40, 6, generator=chance), torch.arange(40) % 2)
    states = [train_mlp(Sample(features, experts), noise, 2, width=8, epochs=n, seed=0) for n in (40, 50)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # nothing to be learnt of noise


def test_thin_weights() -> None:
    given = torch.tensor([[0.6, 0.3, 0.095, 0.005]])
    torch.testing.assert_close(thinned(given, None, 0.01), torch.tensor([[0.6, 0.3, 0.095, 0.0]]) / 0.995)
    torch.testing.assert_close(thinned(given, 2, 0.0), torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]))
    torch.testing.assert_close(thinned(given, None, 0.0), given)


def test_data_problems_come_together(shared: Path, data: Any, tmp_path: Path) -> None:
    bare = task(tmp_path / "bare", WORDS, {"train": 20})
    given = {"hihg": data["high"], "low": str(bare)}
    with pytest.raises(TaskError) as caught:
        make_router(shared, parts("low", "high"), RouterSettings(data=given), tmp_path / "out")
    assert "router.data.hihg: there is no expert 'hihg'. The experts are low, high" in str(caught.value)
    assert "there is no data for high" in str(caught.value)
    assert "the task has no validation split" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_few_examples_and_an_empty_split_are_refused(shared: Path, data: Any, tmp_path: Path) -> None:
    few = task(tmp_path / "few", WORDS, {"train": 3, "validation": 9})
    empty = task(tmp_path / "empty", WORDS, {"train": 0, "validation": 9})
    settings = RouterSettings(data={"low": str(few), "high": str(empty)})
    with pytest.raises(TaskError) as caught:
        make_router(shared, parts(*NAMES), settings, tmp_path / "out")
    assert "router.data.low: the train split has 3 examples. Give at least 8" in str(caught.value)
    assert "has no examples" in str(caught.value)


def test_a_shared_model_without_a_tokenizer_is_refused(data: Any, tmp_path: Path) -> None:
    save_classifier(tmp_path / "shared")
    for path in (tmp_path / "shared").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(TaskError, match="the shared model: has no tokenizer"):
        make_router(tmp_path / "shared", parts(*NAMES), RouterSettings(data=data), tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "neural"}, "there is no router of the kind 'neural'. The kinds are mlp, centroid"),
        ({"kind": "uniform", "top_k": 3}, "top_k is 3. Give 1 to 2"),
        ({"kind": "uniform", "temperature": -1.0}, "the temperature is -1.0"),
        ({"kind": "fixed", "expert": "middle"}, "there is no expert 'middle'. The experts are low, high"),
        ({"examples": 2}, "router.examples is 2"),
        ({"layers": "all"}, "router.layers is 'all'"),
        ({"fallback_share": 1.0}, r"router.fallback_share is 1.0"),
    ],
)
def test_settings_are_checked(shared: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_router(shared, parts(*NAMES), RouterSettings(**keys), tmp_path)


def test_a_router_for_other_experts_is_refused(tmp_path: Path) -> None:
    save_router(Router(RouterConfig("uniform", NAMES), {}), tmp_path)
    with pytest.raises(CheckpointError, match="was made for the experts low, high, and the bundle has high, low"):
        load_router(tmp_path, ("high", "low"))
    (tmp_path / "config.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="the router cannot be read"):
        load_router(tmp_path, NAMES)
    (tmp_path / "config.json").write_text('{"format": 9}')
    with pytest.raises(CheckpointError, match="the router is of format 9"):
        load_router(tmp_path, NAMES)


def test_an_arrow_router_follows_the_directions_of_factors(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "classifier").base_model
    experts = {name: random_expert(model, seed, vectors=False, skip=("pooler",)) for seed, name in enumerate(NAMES)}
    folder = make_bundle(tmp_path / "bundle", model, experts)
    make_router(folder, read_bundle(folder, check=False).experts, RouterSettings(kind="arrow"), tmp_path / "router")
    router = load_router(tmp_path / "router", NAMES)
    name = "encoder.layer.0.attention.self.query"
    first = torch.linalg.svd(experts["low"].factors[name][1] @ experts["low"].factors[name][0]).Vh[0]
    assert abs(float(router.tensor(name)[0] @ first)) == pytest.approx(1.0, abs=1e-4)
    twin: Any = weldment.TwinModel.from_pretrained(folder, check=False)
    twin.twin.router = router
    routing = twin.route(torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    alone = twin.route(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(routing.weights[:1], alone.weights, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(2))


def test_an_arrow_router_needs_modules_that_all_change(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "classifier").base_model
    folder = make_bundle(tmp_path / "bundle", model, {"low": random_expert(model, 0), "high": Expert(changes={})})
    with pytest.raises(CheckpointError, match="an arrow router needs modules that all experts change"):
        make_router(folder, read_bundle(folder, check=False).experts, RouterSettings(kind="arrow"), tmp_path / "router")
