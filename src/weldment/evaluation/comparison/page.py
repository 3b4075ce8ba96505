"""A comparison as one page of HTML that needs nothing else: bars, the experts on each other's tasks, and the tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from html import escape

from weldment.evaluation.comparison.charts import Bar, bar_chart, reach
from weldment.evaluation.comparison.rows import AVERAGE, Comparison, Row
from weldment.evaluation.comparison.style import STYLE
from weldment.evaluation.comparison.tables import LEGEND, NOTHING, Cell, Grid, about, grids, short_metric, shown
from weldment.evaluation.scores import Score

MADE_BY = '<meta name="generator" content="weld compare">'
"""By which our own pages are known."""

_SIGNS = {"best": "", "near": '<span class="near">≈</span>', "": ""}


def as_page(comparison: Comparison, sections: Iterable[str] = ()) -> str:
    """The page.

    Args:
        sections: HTML that stands between the pictures and the tables.
    """
    relative = any(comparison.relative(row) for row in comparison.rows)
    body = [
        "<header>",
        f"<h1>{escape(_headline(comparison, relative))}</h1>",
        f"<p>{escape(about(comparison))}</p>",
        "</header>",
        *_average(comparison, relative),
        *_tasks(comparison, relative),
        *(_heat_map(comparison) if relative and _has_others(comparison) else ()),
        *sections,
        *(part for grid in grids(comparison) for part in _table(grid)),
        *_notes(comparison),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            MADE_BY,
            f"<title>{escape(_headline(comparison, relative))}</title>",
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _drawn(comparison: Comparison) -> list[Row]:
    """The rows of the bars: all but the experts."""
    return [row for row in comparison.rows if row.kind != "expert"]


def _columns(comparison: Comparison, relative: bool) -> dict[str, dict[str, Score]]:
    of = comparison.relative if relative else comparison.absolute
    return {row.name: of(row) for row in _drawn(comparison)}


def _headline(comparison: Comparison, relative: bool) -> str:
    best = comparison.best(relative=relative).get(AVERAGE)
    if best is None:
        return f"{_count(len(_drawn(comparison)), 'model')} on {_count(len(comparison.tasks), 'task')}"
    value = _columns(comparison, relative)[best][AVERAGE].value
    if relative:
        return f"{best} reaches {shown(value, relative=True)} % of the experts' scores"
    return f"{best} reaches {shown(value, relative=False)} on average"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _average(comparison: Comparison, relative: bool) -> Iterator[str]:
    bars = _bars(comparison, AVERAGE, relative)
    if not bars:
        return
    goal = 100.0 if relative else None
    what = "Average over the tasks, in percent of each task's expert" if relative else "Average over the tasks"
    yield f"<section>\n<h2>{what}</h2>"
    if relative:
        yield '<p class="key"><span class="goal-key"></span>the experts, each on its own task</p>'
    yield bar_chart(bars, reach(bars, goal), title=what, goal=goal, width=920)
    yield "</section>"


def _tasks(comparison: Comparison, relative: bool) -> Iterator[str]:
    """A small picture for each task; percents have one scale for all of them."""
    pictures = {task: _bars(comparison, task, relative) for task in comparison.tasks}
    pictures = {task: bars for task, bars in pictures.items() if bars}
    if not pictures:
        return
    goal = 100.0 if relative else None
    everything = [bar for bars in pictures.values() for bar in bars]
    yield f"<section>\n<h2>Each task{', in percent of its expert' if relative else ''}</h2>"
    yield '<div class="pictures">'
    for task, bars in pictures.items():
        ends = reach(everything if relative else bars, goal, 0.15)
        yield f'<figure>\n<figcaption>{escape(task)} <span class="unit">{escape(_metric(comparison, task))}</span>'
        yield f"</figcaption>\n{bar_chart(bars, ends, title=task, goal=goal, width=420)}\n</figure>"
    yield "</div>\n</section>"


def _metric(comparison: Comparison, task: str) -> str:
    return f"{short_metric(comparison.metrics[task])}, n = {comparison.examples[task]}"


def _bars(comparison: Comparison, column: str, relative: bool) -> list[Bar]:
    marks = comparison.marks(relative=relative)
    table = _columns(comparison, relative)
    bars: list[Bar] = []
    for row in _drawn(comparison):
        score = table[row.name].get(column)
        if score is None or not math.isfinite(score.value):
            continue
        mark = marks.get((row.name, column), "")
        look = "best" if mark == "best" else "merge" if row.kind == "merge" else "plain"
        text = shown(score.value, relative=relative)
        bars.append(Bar(row.name, score.value, *score.interval, text, look, "≈" if mark == "near" else ""))
    return bars


def _has_others(comparison: Comparison) -> bool:
    """Whether experts were scored on other tasks than their own."""
    own = {(name, task) for task, name in comparison.experts.items()}
    return any((row.name, task) not in own for row in comparison.rows if row.kind == "expert" for task in row.scores)


def _heat_map(comparison: Comparison) -> Iterator[str]:
    """Experts and the base by tasks: the score, and by colour how much of the task's expert that is."""
    rows = [row for row in comparison.rows if row.kind in ("expert", "base")]
    yield "<section>\n<h2>The experts on each other's tasks</h2>"
    yield '<p class="key">0 % <span class="ramp"></span> 100 % of the task\'s expert</p>'
    yield '<div class="scroll"><table class="heat">\n<thead><tr><th></th>'
    yield "".join(f'<th scope="col">{escape(task)}</th>' for task in comparison.tasks) + "</tr></thead>\n<tbody>"
    for row in rows:
        relative = comparison.relative(row)
        cells = "".join(_heat_cell(row, task, relative) for task in comparison.tasks)
        yield f'<tr><th scope="row">{escape(row.name)}</th>{cells}</tr>'
    yield "</tbody></table></div>\n</section>"


def _heat_cell(row: Row, task: str, relative: Mapping[str, Score]) -> str:
    if task not in row.scores:
        return f'<td class="empty">{NOTHING}</td>'
    score = shown(row.scores[task].value, relative=False)
    percent = relative[task].value if task in relative else math.nan
    if not math.isfinite(percent):
        return f"<td>{score}</td>"
    share = min(max(percent, 0.0), 100.0)
    look = "strong" if share > _STRONG else "middle" if share > _MIDDLE else "weak"
    return f'<td class="{look}" style="--share:{share:.1f}%" title="{percent:.1f} %">{score}</td>'


_MIDDLE, _STRONG = 45, 72
"""Percents from which letters on the colour must change theirs, on dark screens and on light ones."""


def _table(grid: Grid) -> Iterator[str]:
    yield f'<section>\n<h2>{escape(grid.title)}</h2>\n<div class="scroll"><table class="numbers">\n<thead><tr>'
    for name in grid.header:
        head, _, unit = name.partition("\n")
        yield (
            f'<th scope="col">{escape(head)}' + (f'<span class="unit">{escape(unit)}</span>' if unit else "") + "</th>"
        )
    yield "</tr></thead>\n<tbody>"
    for number, (name, *cells) in enumerate(grid.rows):
        first = ' class="first"' if number in grid.breaks else ""
        yield f'<tr{first}><th scope="row">{escape(name.text)}</th>{"".join(map(_cell, cells))}</tr>'
    yield "</tbody></table></div>\n</section>"


def _cell(cell: Cell) -> str:
    look = ' class="best"' if cell.mark == "best" else ""
    return f"<td{look}>{escape(cell.text)}{_SIGNS[cell.mark]}</td>"


def _notes(comparison: Comparison) -> Iterator[str]:
    yield f"<section>\n<p><b>Bold</b>: {escape(LEGEND)}.</p>"
    if comparison.notes:
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in comparison.notes)}</ul>"
    yield "</section>"
