"""Bars with whiskers, and curves, as SVG; colours and fonts are those of the page around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_ROW = 26
_BAR = 14
_TOP = 6
_AXIS = 24
_CHARACTER = 6.7
"""Width of a letter of a label, about."""


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        low, high: ends of the whisker.
        text: the value as it is printed.
        look: class of the style sheet: "plain", "merge" or "best".
        sign: stands after the text.
    """

    label: str
    value: float
    low: float
    high: float
    text: str
    look: str = "plain"
    sign: str = ""


@dataclass(frozen=True)
class Scale:
    """From values to places on a line.

    Attributes:
        least, most: values at its ends.
        left, right: the places of these.
    """

    least: float
    most: float
    left: float
    right: float

    def at(self, value: float) -> float:
        """The place of a value; of those that lie outside, that of the end."""
        inside = min(max(value, self.least), self.most)
        return self.left + (inside - self.least) / (self.most - self.least) * (self.right - self.left)

    @property
    def ticks(self) -> list[float]:
        """About four round values."""
        step = _round_step((self.most - self.least) / 4)
        first, last = math.ceil(self.least / step - 1e-9), math.floor(self.most / step + 1e-9)
        return [place * step for place in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The least of 1, 2, 2.5 and 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least)


def reach(bars: Sequence[Bar], goal: float | None, widest: float | None = None) -> tuple[float, float]:
    """The values between which bars are drawn: those of all bars and whiskers, 0 and the goal.

    Args:
        goal: a value that is marked with a line.
        widest: whiskers longer than that are cut off at both ends of the range of the bars.
    """
    values = [0.0, *(bar.value for bar in bars), *([goal] if goal is not None else [])]
    least, most = min(values), max(values)
    margin = (most - least or 1.0) * (1.0 if widest is None else widest)
    lows, highs = [bar.low for bar in bars], [bar.high for bar in bars]
    return max(min(least, *lows), least - margin), min(max(most, *highs), most + margin) or 1.0


def bar_chart(
    bars: Sequence[Bar], ends: tuple[float, float], *, title: str, goal: float | None = None, width: int = 720
) -> str:
    """Bars below each other.

    Args:
        ends: values at the left and right end.
        title: for those who cannot see it.
        goal: a value that is marked with a line.
        width: of the picture, in pixels.
    """
    left = 14 + _CHARACTER * max(len(bar.label) for bar in bars)
    scale = Scale(*ends, left, width - 70)
    height = _TOP + _ROW * len(bars) + _AXIS
    bottom = height - _AXIS
    parts = [
        f'<svg class="bars" viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}">',
        *_axis(scale, bottom),
        *(part for place, bar in enumerate(bars) for part in _bar(bar, scale, _TOP + _ROW * place, width)),
        *_goal(scale, goal, bottom),
        "</svg>",
    ]
    return "\n".join(parts)


def _axis(scale: Scale, bottom: float) -> Iterator[str]:
    for tick in scale.ticks:
        x = scale.at(tick)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>'


def _bar(bar: Bar, scale: Scale, top: float, width: float) -> Iterator[str]:
    zero, end, middle = scale.at(0), scale.at(bar.value), top + _ROW / 2
    start, length = min(zero, end), abs(end - zero)
    low, high = scale.at(bar.low), scale.at(bar.high)
    yield f"<g><title>{escape(f'{bar.label}: {bar.text} ({bar.low:.4g} to {bar.high:.4g})')}</title>"
    yield _label(bar.label, f"name {bar.look}", scale.left - 10, middle)
    yield (
        f'<rect class="{bar.look}" x="{start:.1f}" y="{middle - _BAR / 2}" width="{max(length, 1):.1f}" '
        f'height="{_BAR}" rx="2"/>'
    )
    yield f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'
    for x in (low, high):
        yield f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{middle - 3.5}" y2="{middle + 3.5}"/>'
    yield _label(bar.text, f"value {bar.look}", width - 16, middle)
    yield _label(bar.sign, "tick", width - 2, middle) if bar.sign else ""
    yield "</g>"


def _label(text: str, look: str, x: float, middle: float) -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{middle + 4}" text-anchor="end">{escape(text)}</text>'


def _goal(scale: Scale, goal: float | None, bottom: float) -> Iterator[str]:
    if goal is not None:
        x = scale.at(goal)
        yield f'<line class="goal" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{bottom}"/>'


@dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes:
        x: above 0; drawn on a logarithmic scale.
        low, high: ends of the whisker.
        x_text: x as it is printed.
    """

    label: str
    x: float
    y: float
    low: float
    high: float
    x_text: str


def curve_chart(points: Sequence[Point], *, title: str, goal: float | None = None, width: int = 920) -> str:
    """Points from left to right, with the lines between them and whiskers.

    Args:
        points: one at least.
        title: for those who cannot see it.
        goal: a value that is marked with a line.
    """
    ordered = sorted(points, key=lambda point: point.x)
    x = Scale(math.log(ordered[0].x), max(math.log(ordered[-1].x), math.log(ordered[0].x) + 1e-6), 60, width - 60)
    values = [v for p in points for v in (p.low, p.high, p.y)] + ([goal] if goal is not None else [])
    margin = (max(values) - min(values) or 1.0) * 0.06
    y = Scale(min(values) - margin, max(values) + margin, _CURVE - 2 * _AXIS, _TOP)
    path = " ".join(f"{x.at(math.log(point.x)):.1f},{y.at(point.y):.1f}" for point in ordered)
    parts = [
        f'<svg class="bars" viewBox="0 0 {width} {_CURVE}" width="{width}" role="img" aria-label="{escape(title)}">',
        *_levels(y, width, goal),
        f'<polyline class="curve" points="{path}"/>',
        *(part for point in ordered for part in _point(point, x.at(math.log(point.x)), y)),
        "</svg>",
    ]
    return "\n".join(parts)


_CURVE = 300
"""Height of a curve's picture."""


def _levels(y: Scale, width: float, goal: float | None) -> Iterator[str]:
    for tick in y.ticks:
        yield f'<line class="grid" x1="50" x2="{width - 50}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}"/>'
        yield _label(f"{tick:g}", "tick", 42, y.at(tick))
    if goal is not None:
        yield f'<line class="goal" x1="50" x2="{width - 50}" y1="{y.at(goal):.1f}" y2="{y.at(goal):.1f}"/>'


def _point(point: Point, x: float, y: Scale) -> Iterator[str]:
    title = f"{point.label}: {point.y:.4g} ({point.low:.4g} to {point.high:.4g}), {point.x_text}"
    bottom = _CURVE - 2 * _AXIS
    yield f"<g><title>{escape(title)}</title>"
    yield f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y.at(point.low):.1f}" y2="{y.at(point.high):.1f}"/>'
    yield f'<circle class="dot" cx="{x:.1f}" cy="{y.at(point.y):.1f}" r="4"/>'
    for line, text in enumerate((point.label, point.x_text)):
        yield (
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16 * (line + 1)}" text-anchor="middle">{escape(text)}</text>'
        )
    yield "</g>"
