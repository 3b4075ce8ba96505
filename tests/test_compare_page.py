"""A comparison as text, Markdown, CSV and HTML: every number is there, and names that mean something to the format."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from weldment.errors import OutputError
from weldment.evaluation.comparison.charts import Bar, Scale, bar_chart, reach
from weldment.evaluation.comparison.page import as_page
from weldment.evaluation.comparison.rows import Comparison, Row
from weldment.evaluation.comparison.saving import check_folder, save
from weldment.evaluation.comparison.tables import as_csv, as_markdown, as_text
from weldment.evaluation.scores import Score

NASTY = "<b>|a&b"


def score(task: str, value: float, seed: int = 0, **keys: object) -> Score:
    samples = value + 0.02 * np.random.default_rng(seed).standard_normal(200)
    return Score(task, "accuracy", value, 50, samples, **keys)  # type: ignore[arg-type]


def scores(a: float, b: float, seed: int = 0) -> dict[str, Score]:
    return {"ta": score("ta", a, seed), "tb": score("tb", b, seed + 100)}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    runs = (scores(0.5, 0.5), scores(0.7, 0.5))
    rows = (
        Row("ta", "expert", scores(0.9, 0.2), 0.5, 2_000_000, 3.0),
        Row("tb", "expert", {"tb": score("tb", 0.8)}),
        Row("base", "base", scores(0.3, -0.1)),
        Row("plain average", "baseline", scores(0.5, 0.5, 1)),
        Row(NASTY, "merge", scores(0.8, 0.7, 2), 1.25, 3_000_000, 4.0),
        Row("near", "merge", scores(0.79, 0.4, 3)),
        Row("random", "merge", scores(0.6, 0.5, 4), runs=runs),
    )
    metrics = {"ta": "accuracy", "tb": "matthews_correlation"}
    return Comparison(("ta", "tb"), metrics, {"ta": 50, "tb": 50}, rows, {"ta": "ta", "tb": "tb"}, notes=("a <note>",))


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip(" |").startswith(name))


def test_the_text_marks_the_best_and_what_is_as_good(comparison: Comparison) -> None:
    absolute, percents = as_text(comparison).split("Percent of each task's expert")
    assert re.search(r"0\.800\* +0\.700\* +0\.750\* +3\.0 +1\.2 +4\.0$", line_of(absolute, NASTY))
    assert re.search(r"0\.790≈ +0\.400 +0\.595 ", line_of(absolute, "near"))
    assert re.search(r"88\.9\* +87\.5\* +88\.2\* ", line_of(percents, NASTY))
    assert re.search(r"± 11\.[0-9] \(2\)$|± 7\.9 \(2\)$", line_of(percents, "random"))
    assert re.search(r"tb +– +0\.800 +– ", line_of(absolute, "tb"))
    assert "note: a <note>" in percents


def test_the_text_is_bold_only_where_colours_are_wanted(comparison: Comparison) -> None:
    assert "\x1b[" not in as_text(comparison)
    assert re.search(r"\x1b\[1m *0\.800\*", as_text(comparison, color=True))


def test_no_table_of_many_tasks_is_cut() -> None:
    tasks = tuple(f"a_task_of_a_long_name_{number}" for number in range(12))
    row = Row("m", "merge", {task: score(task, 0.5) for task in tasks})
    found = as_text(Comparison(tasks, dict.fromkeys(tasks, "accuracy"), dict.fromkeys(tasks, 50), (row,)))
    assert all(task in found.splitlines()[2] for task in tasks)
    assert "Percent" not in found


def test_the_markdown_has_a_cell_for_each_column(comparison: Comparison) -> None:
    text = as_markdown(comparison)
    assert "| <b>\\|a&b | **0.800** | **0.700** | **0.750** | 3.0 | 1.2 | 4.0 |" in text
    assert "| near | 0.790 ≈ | 0.400 | 0.595 |" in text
    assert "ta 50, tb 50" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_the_csv_has_a_line_for_each_model_and_column(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert len(lines) == 7 * 3
    best = next(line for line in lines if line["model"] == NASTY and line["task"] == "ta")
    assert (float(best["score"]), best["mark"], best["bytes"], best["metric"]) == (0.8, "best", "3000000", "accuracy")
    assert float(best["percent"]) == pytest.approx(100 * 0.8 / 0.9)
    assert float(best["low"]) < 0.8 < float(best["high"])
    missing = next(line for line in lines if line["model"] == "tb" and line["task"] == "ta")
    assert (missing["score"], missing["percent"]) == ("", "")


class Balanced(HTMLParser):
    """Checks that elements close in order, and gathers them."""

    VOID = ("meta", "line", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(text: str) -> Balanced:
    page = Balanced()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_is_whole_and_needs_nothing_else(comparison: Comparison) -> None:
    text = as_page(comparison)
    page = parsed(text)
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not any({"src", "href", "onclick"} & set(attributes) for _, attributes in page.seen)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert NASTY in page.text
    assert "a <note>" in page.text
    assert f"{NASTY} reaches 88.2 % of the experts' scores" in page.text


def test_the_page_draws_every_model_but_the_experts(comparison: Comparison) -> None:
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", as_page(comparison), re.DOTALL)]
    assert [picture.get("aria-label") for picture in pictures][1:] == ["ta", "tb"]
    for picture in pictures:
        names = [found.text for found in picture.iter("text") if (found.get("class") or "").startswith("name")]
        assert names == ["base", "plain average", NASTY, "near", "random"]
        assert len(list(picture.iter("rect"))) == 5
        assert [found.get("class") for found in picture.iter("rect")].count("best") == 1


def test_the_heat_map_has_each_expert_on_each_task(comparison: Comparison) -> None:
    heat = re.search(r'<table class="heat">.*?</table>', as_page(comparison), re.DOTALL)
    assert heat
    shares = re.findall(r"--share:([\d.]+)%", heat[0])
    assert shares == ["100.0", "25.0", "100.0", "33.3", "0.0"]
    assert heat[0].count('class="empty"') == 1
    assert all(f">{value}</td>" in heat[0] for value in ("0.900", "0.200", "0.800", "0.300", "-0.100"))


def test_without_experts_the_page_has_scores_and_no_percents(comparison: Comparison) -> None:
    page = parsed(as_page(replace(comparison, experts={}, rows=comparison.rows[2:])))
    assert f"{NASTY} reaches 0.750 on average" in page.text
    assert "Percent of each task's expert" not in page.text
    assert ("table", {"class": "heat"}) not in page.seen


def test_without_an_average_the_page_says_how_many_models_there_are() -> None:
    rows = (Row("m", "merge", {"ta": score("ta", 12.0, higher_is_better=False)}),)
    page = parsed(as_page(Comparison(("ta",), {"ta": "perplexity"}, {"ta": 50}, rows)))
    assert "1 model on 1 task" in page.text


def test_bars_begin_at_zero_and_are_as_long_as_their_values() -> None:
    bars = [Bar("up", 50.0, 40.0, 60.0, "50"), Bar("down", -25.0, -30.0, -20.0, "-25")]
    scale = Scale(-50, 100, 100, 400)
    svg = ElementTree.fromstring(bar_chart(bars, (-50.0, 100.0), title="t", goal=100.0))
    up, down = svg.iter("rect")
    lengths = [float(rect.get("width") or 0) for rect in (up, down)]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.2)
    assert float(up.get("x") or 0) == pytest.approx(float(down.get("x") or 0) + lengths[1], abs=0.2)
    assert [scale.at(value) for value in (-50, 0, 100, 999, -999)] == [100, 200, 400, 400, 100]


@pytest.mark.parametrize(
    ("least", "most", "ticks"),
    [
        (0, 100, [0, 25, 50, 75, 100]),
        (-30, 110, [0, 50, 100]),
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 14, [0, 5, 10]),
        (-0.2, 0.1, [-0.2, -0.1, 0, 0.1]),
    ],
)
def test_ticks_are_round(least: float, most: float, ticks: list[float]) -> None:
    assert Scale(least, most, 0, 1).ticks == pytest.approx(ticks)


def test_the_picture_reaches_all_whiskers_or_cuts_long_ones() -> None:
    bars = [Bar("a", 50.0, -500.0, 90.0, "50")]
    assert reach(bars, 100.0) == (-100.0, 100.0)
    assert reach(bars, 100.0, 0.1) == (-10.0, 100.0)
    assert reach([Bar("zero", 0.0, 0.0, 0.0, "0")], None) == (0.0, 1.0)


def test_what_was_saved_may_be_replaced_and_only_that(comparison: Comparison, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    check_folder(out, overwrite=False)
    paths = save(comparison, out)
    assert sorted(out.iterdir()) == sorted(paths)
    check_folder(out, overwrite=False)
    record = json.loads((out / "comparison.json").read_text())
    assert record["rows"][4]["name"] == NASTY
    for path in paths:
        before = path.read_text()
        path.write_text("something else")
        with pytest.raises(OutputError, match=rf"{path.name}: is in the way"):
            check_folder(out, overwrite=False)
        check_folder(out, overwrite=True)
        path.write_text(before)


def test_a_number_that_is_none_is_no_number_in_json(comparison: Comparison, tmp_path: Path) -> None:
    odd = replace(score("ta", float("nan")), samples=np.full(3, np.nan))
    rows = (*comparison.rows, Row("odd", "merge", {"ta": odd, "tb": odd}))
    save(replace(comparison, rows=rows), tmp_path)
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["rows"][-1]["scores"]["ta"]["value"] is None
    assert replace(comparison, rows=rows[::-1]).best(relative=False)["ta"] == NASTY


def test_a_folder_that_cannot_be_written_is_an_error(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save(comparison, tmp_path / "file" / "out")
