"""What the page of a Twin model's evaluation has besides that of a comparison: the sweep, and the router's choices."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from weldment.evaluation.comparison.charts import Point, curve_chart
from weldment.evaluation.comparison.rows import AVERAGE, Row
from weldment.evaluation.scores import Score
from weldment.twin.evaluation import ROUTED, TwinComparison


def sections(comparison: TwinComparison) -> Iterator[str]:
    """HTML for `page.as_page`."""
    if comparison.sweep:
        yield from _curve(comparison)
    yield from _routes(comparison)


def curve(comparison: TwinComparison) -> str:
    """The sweep as SVG: the average over bytes, beside the bundle as it is."""
    points = [_point(comparison, comparison.row(name)) for name in (*comparison.sweep, ROUTED)]
    return curve_chart(points, title="Average by size of the model", goal=100.0)


def _point(comparison: TwinComparison, row: Row) -> Point:
    found: Score = comparison.relative(row)[AVERAGE]
    label = row.name.removeprefix(f"{ROUTED}, ") if row.name != ROUTED else "bundle"
    return Point(label, row.nbytes, found.value, *found.interval, f"{row.nbytes / 1e6:.0f} MB")


def _curve(comparison: TwinComparison) -> Iterator[str]:
    yield "<section>\n<h2>Fewer singular values: average in percent of the experts, by size</h2>"
    yield curve(comparison)
    yield "</section>"


def _routes(comparison: TwinComparison) -> Iterator[str]:
    experts = list(next(iter(comparison.routes.values())))
    yield f"<section>\n<h2>Whom the router chooses first: {100 * comparison.accuracy:.1f} % right</h2>"
    yield '<div class="scroll"><table class="heat">\n<thead><tr><th></th>'
    yield "".join(f'<th scope="col">{escape(name)}</th>' for name in experts) + "</tr></thead>\n<tbody>"
    for task, row in comparison.routes.items():
        cells = "".join(_cell(count, sum(row.values())) for count in row.values())
        yield f'<tr><th scope="row">{escape(task)}</th>{cells}</tr>'
    yield "</tbody></table></div>\n</section>"


def _cell(count: int, total: int) -> str:
    share = 100.0 * count / max(total, 1)
    look = "strong" if share > 72 else "middle" if share > 45 else "weak"
    return f'<td class="{look}" style="--share:{share:.1f}%">{count}</td>'


def routes_text(comparison: TwinComparison) -> list[str]:
    """The same counts as lines for a terminal: tasks by experts."""
    from weldment.cli.console import columns

    experts = list(next(iter(comparison.routes.values())))
    rows = [("routed to", *experts)]
    rows += [(task, *(str(count) for count in row.values())) for task, row in comparison.routes.items()]
    return list(columns(rows, 200, right=tuple(range(1, len(experts) + 1))))
