"""Line charts as inline SVG: small, scalable, colored by the page's style sheet (light and dark)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 76, 12, 12, 40
# More points than the chart is wide in pixels only make the file larger.
MOST_POINTS = 400
COLORS = 8


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order; `color` 0..7 is a color of the style sheet, `dashed` a broken line."""

    name: str
    points: Sequence[tuple[float, Any]]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Scale:
    """An axis: values `low` .. `high` on pixels `start` .. `end`, in powers of ten when `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, here = (math.log10(v) for v in (self.low, self.high, value)) if self.log else self._plain(value)
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def _plain(self, value: float) -> tuple[float, float, float]:
        return self.low, self.high, value

    def ticks(self) -> list[float]:
        """Return the values to mark: powers of ten (with 2 and 5 where there are few), or about five round numbers.

        A logarithmic axis that spans less than a factor of about two gets round numbers too.
        """
        found = _log_ticks(self.low, self.high) if self.log else []
        return found if len(found) > 1 else _round_ticks(self.low, self.high)


def _round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [step * (first + i) for i in range(math.floor(high / step + 1e-9) - first + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    every = max(1, len(powers) // 6)
    values = [factor * 10.0**power for power in powers[::every] for factor in factors]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def number(value: float) -> str:
    """Write a number for an axis or a legend: 0.002, 35, 12k, 1.5M, 2e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if letter == "k" else size
            return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most about `most` points, means of equal groups of neighbors, so that no peak is picked by chance."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def usable(points: Sequence[tuple[float, float | None]], log: bool = False) -> tuple[tuple[float, float], ...]:
    """Return the points that can be drawn: finite, and positive on a logarithmic axis."""
    return tuple((float(x), float(y)) for x, y in points if y is not None and math.isfinite(y) and (y > 0 or not log))


def _range(values: Sequence[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.1, high * 1.1) if low < high else (low / 2, high * 2)
    low = min(low, 0.0) if from_zero else low
    gap = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - gap), high + gap


def line_chart(title: str, series: Sequence[Series], *, y: str = "", log: bool = False, from_zero: bool = False) -> str:
    """Return a chart as HTML: a figure with its SVG and legend; empty when no series has a point.

    Args:
        title: what is shown.
        series: lines over the steps; those without points are left out.
        y: name of the vertical axis.
        log: draw y in powers of ten.
        from_zero: let y begin at zero.
    """
    drawn = [Series(s.name, tuple(thin(usable(s.points, log))), s.color, s.dashed) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs, ys = [p[0] for s in drawn for p in s.points], [p[1] for s in drawn for p in s.points]
    low, high = min(xs), max(xs)
    across = Scale(low - 1, high + 1, LEFT, WIDTH - RIGHT) if low == high else Scale(low, high, LEFT, WIDTH - RIGHT)
    up = Scale(*_range(ys, log, from_zero), HEIGHT - BOTTOM, TOP, log)
    body = [*_axes(across, up, y), *(_line(s, across, up) for s in drawn)]
    label = escape(f"{title}: " + "; ".join(f"{s.name} ends at {number(s.points[-1][1])}" for s in drawn))
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}{_legend(drawn)}</figure>'


def _axes(across: Scale, up: Scale, y: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in up.ticks():
        here = f"{up(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{here}" y2="{here}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{here}" dy=".32em" text-anchor="end">{number(value)}</text>'
        )
    for value in across.ticks():
        here = f"{across(value):.1f}"
        parts.append(f'<line class="grid" x1="{here}" x2="{here}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick x" x="{here}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<text class="name x" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="name" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    return parts


def _line(series: Series, across: Scale, up: Scale) -> str:
    kind = f"line c{series.color % COLORS}" + (" dashed" if series.dashed else "")
    points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in series.points)
    if len(series.points) == 1:
        cx, cy = points.split(",")
        return f'<circle class="dot c{series.color % COLORS}" cx="{cx}" cy="{cy}" r="3.5"/>'
    return f'<polyline class="{kind}" points="{points}"/>'


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li><span class="key c{s.color % COLORS}{" dashed" if s.dashed else ""}"></span>{escape(s.name)} '
        f"<b>{number(s.points[-1][1])}</b></li>"
        for s in series
    )
    return f'<ul class="legend">{items}</ul>'
