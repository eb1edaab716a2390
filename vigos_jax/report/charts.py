"""Line charts as SVG geometry: scales, ticks, lines with gaps, stacked areas. `page.html.j2` draws what is laid out.

Numbers that are missing or not finite leave a gap. Everything is in the units of the drawing, WIDTH x HEIGHT, y down.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 340, 222
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 22, 32  # margins, for the numbers at the axes and what they count
MAX_POINTS = 300  # of a line; more are averaged over equal stretches
SMOOTH_FROM = 30  # points from which a moving mean is drawn over the pale line

Color = tuple[int, int, int]
Point = tuple[float, float | None]


@dataclasses.dataclass(frozen=True)
class Line:
    """A named line; points are (x, y) by ascending x, y None where there is none.

    Attributes:
      has_noise: whether to draw a band of two standard errors either side of the moving mean, from its points.
    """

    name: str
    points: Sequence[Point]
    color: Color
    has_noise: bool = False


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened at x: a vertical line in every chart that shows it."""

    x: float
    color: Color
    text: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over a common x, which is a step.

    Attributes:
      unit: of y, at its axis.
      reading: how to read the chart, a line below it.
      stacked: areas on top of each other; all lines then have the same x.
      top: largest y shown, what lies above is cut off; None for all.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    reading: str = ""
    note: str = ""
    stacked: bool = False
    marks: Sequence[Mark] = ()
    top: float | None = None

    kind = "chart"

    @property
    def summary(self) -> str:
        """The chart in words, for screen readers."""
        ends = []
        for line in self.lines:
            there = [(x, y) for x, y in line.points if _is_number(y)]
            if there:
                (first, start), (last, end) = there[0], there[-1]
                ends.append(
                    f"{line.name} {number_of(start)} at step {number(first)}, {number_of(end)} at {number(last)}"
                )
        return f"{self.title}, {self.unit}: {'; '.join(ends)}"

    def drawing(self) -> "Drawing":
        """Lays the chart out."""
        lines = [dataclasses.replace(line, points=thin(line.points)) for line in self.lines]
        if self.stacked:
            lines = _stack(lines)
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points if y is not None and math.isfinite(y)]
        left, right = (min(xs), max(xs)) if xs else (0.0, 1.0)
        right = max(right, left + 1)
        low, high = (min(0.0, *ys), self.top or max(ys)) if ys else (0.0, 1.0)
        y_ticks = ticks(low, high if high > low else low + 1.0)
        low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
        across, up = (WIDTH - LEFT - RIGHT) / (right - left), (HEIGHT - TOP - BOTTOM) / (high - low)

        def place(x: float, y: float | None) -> tuple[float, float]:
            if y is None:
                raise ValueError("a gap has no place")
            # Clamped: points far above the top are cut off anyway, and the coordinates stay short.
            return LEFT + (x - left) * across, HEIGHT - BOTTOM - (min(y, 2 * high - low) - low) * up

        shapes = []
        floor: list[Point] = [(x, 0.0) for x, _ in lines[0].points] if lines else []
        for line in lines:
            if self.stacked:
                outline = [*line.points, *reversed(floor)]
                shapes.append(Shape(line.color, _path([outline], place), is_area=True))
                floor = list(line.points)
                continue
            means = smooth(line.points) if len(line.points) >= SMOOTH_FROM else None
            if means is not None and line.has_noise:
                outlines = (_path([outline], place) for outline in _outlines(means))
                shapes += [Shape(line.color, path, is_area=True, is_pale=True) for path in outlines]
            shapes.append(Shape(line.color, _path(_runs(line.points), place), is_pale=means is not None))
            if means is not None:
                shapes.append(Shape(line.color, _path(_runs([(m.x, m.mean) for m in means]), place)))
            elif len(line.points) == 1 and _is_number(line.points[0][1]):  # a line of one point is not seen
                x, y = place(*line.points[0])
                shapes.append(Shape(line.color, f"M{x - 2:.1f},{y:.1f}h4"))
        return Drawing(
            x_ticks=[(place(x, low)[0], number(x)) for x in ticks(left, right, whole=True) if left <= x <= right],
            y_ticks=[(place(left, y)[1], number(y)) for y in y_ticks],
            shapes=shapes,
            marks=[(place(m.x, low)[0], css(m.color), m.text) for m in self.marks if left <= m.x <= right],
            columns=_columns(self.lines, self.marks, place),
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """A line or an area: an SVG path."""

    color: Color
    path: str
    is_pale: bool = False
    is_area: bool = False

    @property
    def css(self) -> str:
        """The color as a style sheet writes it."""
        return css(self.color)

    @property
    def css_class(self) -> str:
        """What `page.html.j2` styles it by."""
        return ("area" if self.is_area else "line") + (" pale" if self.is_pale else "")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Ticks as (place, text), marks as (x, color, text), and columns (x, width, text) that tell the numbers there."""

    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    shapes: Sequence[Shape]
    marks: Sequence[tuple[float, str, str]]
    columns: Sequence[tuple[float, float, str]]


def css(color: Color) -> str:
    """A color as a style sheet writes it."""
    return "#" + "".join(f"{min(max(int(c), 0), 255):02x}" for c in color)


def number(x: float) -> str:
    """Three or four digits, for the labels of an axis."""
    if x and not 1e-3 <= abs(x) < 1e6:
        return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{x:.4g}" if abs(x) < 1e4 else f"{x:,.0f}"


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers from at or below `low` to at or above `high`."""
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    step = max(1.0, float(round(step))) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: means over equal stretches of points, at their last x."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [(part[-1][0], _mean(part)) for part in parts]


class Smoothed(NamedTuple):
    """A moving mean at x, None without numbers near x, and its two-standard-error band, None with fewer than two."""

    x: float
    mean: float | None
    band: tuple[float, float] | None


def smooth(points: Sequence[Point]) -> list[Smoothed]:
    """The mean of each point and its neighbours, a twentieth of the line in all."""
    reach = max(1, len(points) // 40)
    near = (points[max(0, i - reach) : i + reach + 1] for i in range(len(points)))
    return [Smoothed(x, _mean(part), _band(part)) for (x, _), part in zip(points, near, strict=True)]


def _mean(points: Sequence[Point]) -> float | None:
    values = _numbers(points)
    return sum(values) / len(values) if values else None


def _band(points: Sequence[Point]) -> tuple[float, float] | None:
    values = _numbers(points)
    if len(values) < 2:
        return None
    mean, half = statistics.fmean(values), 2 * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _numbers(points: Sequence[Point]) -> list[float]:
    return [y for _, y in points if y is not None and math.isfinite(y)]


def _outlines(means: Sequence[Smoothed]) -> list[list[Point]]:
    """Around the bands of the means, one for each stretch that has them."""
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for x, _, band in means:
        if band is None:
            stretches.append([])
        else:
            stretches[-1].append((x, *band))
    return [[*((x, high) for x, _, high in s), *((x, low) for x, low, _ in reversed(s))] for s in stretches if s]


def _is_number(y: float | None) -> bool:
    return y is not None and math.isfinite(y)


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """The points between gaps."""
    groups = itertools.groupby(points, key=lambda p: _is_number(p[1]))
    return [list(group) for is_there, group in groups if is_there]


def _path(runs: Sequence[Sequence[Point]], place) -> str:
    parts = []
    for run in runs:
        places = [place(*p) for p in run]
        parts.append("M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places))
    return "".join(parts)


def _stack(lines: Sequence[Line]) -> list[Line]:
    out: list[Line] = []
    below: list[float] = []
    for line in lines:
        own = [y if y is not None and math.isfinite(y) else 0.0 for _, y in line.points]
        below = [y + z for y, z in zip(own, below, strict=True)] if below else own
        out.append(dataclasses.replace(line, points=[(x, y) for (x, _), y in zip(line.points, below, strict=True)]))
    return out


def _columns(lines: Sequence[Line], marks: Sequence[Mark], place) -> list[tuple[float, float, str]]:
    """For each x that is shown, a stripe around it with the numbers of all lines there, and what happened in it."""
    by_x: dict[float, list[str]] = {}
    for line in lines:
        for x, y in thin(line.points):
            by_x.setdefault(x, []).append(f"{line.name} {number_of(y)}")
    xs = sorted(by_x)
    out = []
    for i, x in enumerate(xs):
        low = (xs[i - 1] + x) / 2 if i else x
        high = (xs[i + 1] + x) / 2 if i + 1 < len(xs) else x
        start, end = place(low, 0.0)[0], place(high, 0.0)[0]
        happened = [mark.text for mark in marks if low < mark.x <= high or mark.x == x]
        out.append((start, max(end - start, 1.0), "\n".join([f"step {number(x)}", *by_x[x], *happened])))
    return out


def number_of(y: float | None) -> str:
    """A value as a table shows it; "-" where there is none."""
    return f"{y:.4g}" if _is_number(y) else "-"
