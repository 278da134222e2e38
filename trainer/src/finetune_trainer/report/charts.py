"""Line charts as inline SVG: no script, no font, no colour of its own but the page's CSS classes.

page.py calls draw_chart with the points of training's logs. Text in a chart stays readable when a phone shows it at
three quarters of its size. Pure functions of their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 36
_MOST_POINTS = 400
"""A longer line is drawn by the lowest and the highest value of each of half as many parts, so that no peak is lost."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve. `style` is the page's CSS class for it, `dots` draws a mark at each point."""

    name: str
    points: Points
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x` with what happened there; `style` is its CSS class."""

    x: float
    name: str
    style: str


def draw_chart(title: str, unit: str, lines: Sequence[Line], marks: Sequence[Mark] = (), *, zero: bool = False) -> str:
    """The chart of `lines` over steps as an SVG element; empty where no line has a point. `zero` begins y at 0.

    Points that are no finite numbers are left out.
    """
    drawn = [Line(line.name, _finite(line.points), line.style, line.dots) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return Markup("")
    xs = [x for line in drawn for x, _ in line.points] + [mark.x for mark in marks]
    ys = [y for line in drawn for _, y in line.points]
    x_axis, y_axis = _Axis.over(xs, _LEFT, WIDTH - _RIGHT), _Axis.over(ys, HEIGHT - _BOTTOM, _TOP, zero=zero)
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, _spoken(title, unit, drawn)
        )
    ]
    for tick in y_axis.ticks(4):
        at = y_axis.place(tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, WIDTH - _RIGHT, at, at)
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
                _LEFT - 7, round(at + 4.5, 1), format_number(tick)
            )
        )
    for tick in x_axis.ticks(5, whole=True):
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                x_axis.place(tick), HEIGHT - _BOTTOM + 18, format_number(tick)
            )
        )
    parts.append(
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM, HEIGHT - _BOTTOM
        )
    )
    for mark in marks:
        at = x_axis.place(mark.x)
        parts.append(
            Markup('<line class="mark {}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}</title></line>').format(
                mark.style, at, at, _TOP, HEIGHT - _BOTTOM, mark.name
            )
        )
    for line in drawn:
        parts.append(_curve(line, x_axis, y_axis))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def format_number(value: float) -> str:
    """Four significant digits at most, without an exponent where people would not write one."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` drawn from `begin` to `end` in the SVG's units."""

    low: float
    high: float
    begin: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float, *, zero: bool = False) -> _Axis:
        low, high = min(values), max(values)
        low = min(low, 0.0) if zero else low
        if low == high:
            pad = abs(low) * 0.05 or 1.0
            low, high = low - pad, high + pad
        elif begin > end:  # y: room above, and below where it does not begin at zero
            pad = (high - low) * 0.06
            low, high = (low if zero else low - pad), high + pad
        return cls(low, high, begin, end)

    def place(self, value: float) -> float:
        return round(self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin), 2)

    def ticks(self, most: int, *, whole: bool = False) -> list[float]:
        """Round numbers inside the axis, `most` at most."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
        step = max(1.0, math.ceil(step)) if whole else step
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step) - first + 1
        return [round((first + number) * step, 12) for number in range(count)]


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _curve(line: Line, x_axis: _Axis, y_axis: _Axis) -> Markup:
    shown = _thinned(line.points)
    path = " ".join(f"{x_axis.place(x)},{y_axis.place(y)}" for x, y in shown)
    parts = [Markup('<polyline class="{}" points="{}"/>').format(line.style, path)] if len(shown) > 1 else []
    if line.dots or len(shown) == 1:
        for x, y in shown:
            parts.append(
                Markup('<circle class="{}" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>').format(
                    line.style,
                    x_axis.place(x),
                    y_axis.place(y),
                    f"step {format_number(x)}: {line.name} {format_number(y)}",
                )
            )
    return Markup("").join(parts)


def _thinned(points: Points) -> Points:
    if len(points) <= _MOST_POINTS:
        return points
    parts = _MOST_POINTS // 2
    shown: list[tuple[float, float]] = []
    for number in range(parts):
        part = points[number * len(points) // parts : (number + 1) * len(points) // parts]
        low, high = min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])
        shown += sorted({low, high})
    return [*shown, points[-1]] if shown[-1] != points[-1] else shown


def _spoken(title: str, unit: str, lines: Sequence[Line]) -> str:
    """The chart in a sentence for who cannot see it."""
    said = [
        f"{line.name} from {format_number(line.points[0][1])} to {format_number(line.points[-1][1])}" for line in lines
    ]
    return f"{title} ({unit}) over steps: {', '.join(said)}"
