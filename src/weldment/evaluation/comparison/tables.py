"""A comparison as tables: for a terminal, in Markdown, and as comma-separated values."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weldment.evaluation.comparison.rows import AVERAGE, Comparison, Row
from weldment.evaluation.scores import Score

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"
"""In cells without a number."""

MADE_BY = "<!-- weld compare -->"
"""The first line of our Markdown."""

CSV_HEADER = (
    *("model", "kind", "task", "metric", "score", "low", "high"),
    *("percent", "percent_low", "percent_high", "percent_spread", "mark"),
    *("bytes", "merge_seconds", "evaluation_seconds"),
)


@dataclass(frozen=True)
class Cell:
    """A text, and what it is among the merges of its column: "best", "near" or nothing."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        header: of each column; a second line says the unit.
        breaks: numbers of the rows before which another kind of rows begins.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    breaks: tuple[int, ...] = ()


def grids(comparison: Comparison) -> tuple[Grid, ...]:
    """The table of scores, and that of percents of the experts' where there are experts."""
    tables = [_grid(comparison, relative=False)]
    if any(comparison.relative(row) for row in comparison.rows):
        tables.append(_grid(comparison, relative=True))
    return tuple(tables)


def _grid(comparison: Comparison, *, relative: bool) -> Grid:
    of = comparison.relative if relative else comparison.absolute
    marks = comparison.marks(relative=relative)
    columns = (*comparison.tasks, AVERAGE)
    more = ("95 % interval",) if relative else ("size\nMB", "merging\ns", "scoring\ns")
    spread = relative and any(row.runs for row in comparison.rows)
    header = ("", *(_head(comparison, column, relative) for column in columns), *more, *(("seeds",) if spread else ()))
    rows: list[tuple[Cell, ...]] = []
    for row in comparison.rows:
        scores = of(row)
        cells = [_cell(row, column, scores, marks, relative) for column in columns]
        rest = [_interval(scores.get(AVERAGE))] if relative else _costs(row)
        rest += [_spread(comparison, row)] if spread else []
        rows.append((Cell(row.name), *cells, *map(Cell, rest)))
    title = "Percent of each task's expert" if relative else f"Scores on the {comparison.split} examples"
    return Grid(title, header, tuple(rows), _breaks(comparison.rows))


def _head(comparison: Comparison, column: str, relative: bool) -> str:
    if relative or column == AVERAGE:
        return column
    return f"{column}\n{short_metric(comparison.metrics[column])}"


def short_metric(metric: str) -> str:
    """A metric's name for narrow columns."""
    return {"matthews_correlation": "matthews", "matthews_corrcoef": "matthews", "perplexity": "perplexity ↓"}.get(
        metric, metric
    )


def _cell(row: Row, column: str, scores: dict[str, Score], marks: dict[tuple[str, str], str], relative: bool) -> Cell:
    if column not in scores:
        return Cell(NOTHING)
    return Cell(shown(scores[column].value, relative=relative), marks.get((row.name, column), ""))


def shown(value: float, *, relative: bool) -> str:
    """A score: percents with one digit after the point, others with three."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:.1f}" if relative or abs(value) >= 10 else f"{value:.3f}"


def _interval(score: Score | None) -> str:
    if score is None:
        return NOTHING
    low, high = score.interval
    return f"{shown(low, relative=True)} to {shown(high, relative=True)}"


def _costs(row: Row) -> list[str]:
    return [f"{row.nbytes / 1e6:.1f}", f"{row.seconds:.1f}", f"{row.evaluation_seconds:.1f}"]


def _spread(comparison: Comparison, row: Row) -> str:
    found = comparison.spread(row).get(AVERAGE)
    return NOTHING if found is None else f"± {found:.1f} ({len(row.runs)})"


def _breaks(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(place for place in range(1, len(rows)) if rows[place].kind != rows[place - 1].kind)


LEGEND = "the best merge of a column; ≈ no different from it by more than noise (95 %)"


def as_text(comparison: Comparison, *, color: bool = False) -> str:
    """Both tables with their notes, as lines for a terminal.

    Args:
        color: with bold and dim text.
    """
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=color, color_system="standard" if color else None, width=_WIDEST)
    for grid in grids(comparison):
        console.print(_rich(grid))
    lines = [f"* {LEGEND}", *(f"note: {note}" for note in comparison.notes)]
    text = "\n".join([*out.getvalue().splitlines(), *lines])
    return "\n".join(line.rstrip() for line in text.splitlines())


_WIDEST = 1000
"""Columns of text: no table is cut, whatever the terminal."""

_SIGNS = {"best": "*", "near": "≈", "": " "}


def _rich(grid: Grid) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for place, name in enumerate(grid.header):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=True)
    for number, row in enumerate(grid.rows):
        if number in grid.breaks:
            table.add_section()
        signed = any(cell.mark for cell in row)
        texts = [Text(cell.text + _SIGNS[cell.mark], style="bold" if cell.mark == "best" else "") for cell in row[1:]]
        table.add_row(Text(row[0].text, style="" if signed else "dim"), *texts)
    return table


def as_markdown(comparison: Comparison) -> str:
    """Both tables with their notes."""
    parts = [MADE_BY, "# Comparison", about(comparison)]
    for grid in grids(comparison):
        parts += [f"## {grid.title}", "\n".join(_markdown(grid))]
    parts.append(f"**Bold**: {LEGEND}.")
    if comparison.notes:
        parts.append("\n".join(f"- {note}" for note in comparison.notes))
    return "\n\n".join(parts) + "\n"


def _markdown(grid: Grid) -> Iterator[str]:
    yield _line(name.replace("\n", ", ") for name in grid.header)
    yield _line("---:" if place else "---" for place in range(len(grid.header)))
    for row in grid.rows:
        yield _line(_marked(cell) for cell in row)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _marked(cell: Cell) -> str:
    return {"best": f"**{cell.text}**", "near": f"{cell.text} ≈", "": cell.text}[cell.mark]


def about(comparison: Comparison) -> str:
    """One sentence on what was scored."""
    sizes = ", ".join(f"{task} {comparison.examples[task]}" for task in comparison.tasks)
    first = "the first examples" if comparison.limit is not None else "all examples"
    return (
        f"Scored on {first} of the {comparison.split} split: {sizes}. Intervals are 95 %, from resampled examples; "
        "differences are judged on the same resamples."
    )


def as_csv(comparison: Comparison) -> str:
    """A line for each model and task, and for each model's average."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    marks, percents = comparison.marks(relative=False), comparison.marks(relative=True)
    for row in comparison.rows:
        absolute, relative, spread = comparison.absolute(row), comparison.relative(row), comparison.spread(row)
        costs = (row.nbytes, f"{row.seconds:.3f}", f"{row.evaluation_seconds:.3f}")
        for column in (*comparison.tasks, AVERAGE):
            mark = (marks if column in absolute else percents).get((row.name, column), "")
            numbers = (*_numbers(absolute.get(column)), *_numbers(relative.get(column)), spread.get(column, ""))
            writer.writerow([row.name, row.kind, column, comparison.metrics.get(column, ""), *numbers, mark, *costs])
    return out.getvalue()


def _numbers(score: Score | None) -> tuple[object, ...]:
    return ("", "", "") if score is None else (score.value, *score.interval)
