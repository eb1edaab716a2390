"""Charts: round ticks, gaps where numbers are missing, means where there are too many, areas that add up."""

import itertools
import math
import random
import re
import statistics

import numpy as np
import pytest

from vigos_jax.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Line,
    Mark,
    number,
    smooth,
    thin,
    ticks,
)
from vigos_jax.report.page import PALETTE

RED, BLUE = (200, 0, 0), (0, 0, 200)


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.13, [0, 0.05, 0.1, 0.15]),
        (-3, 7, [-5, -2.5, 0, 2.5, 5, 7.5]),
        (0, 9500, [0, 2500, 5000, 7500, 10000]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_steps_have_whole_ticks():
    assert ticks(1, 3, whole=True) == [1, 2, 3]


@pytest.mark.parametrize("x, text", [(0, "0"), (0.25, "0.25"), (1500, "1500"), (25000, "25,000"), (1e-5, "1e-5")])
def test_numbers_at_an_axis(x, text):
    assert number(x) == text


def test_the_corners_of_a_chart():
    d = Chart("c", [Line("a", [(0, 0.0), (10, 1.0)], RED)]).drawing()
    assert places(d.shapes[0].path) == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]
    assert d.shapes[0].css == "#c80000" and [text for _, text in d.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert [text for _, _, text in d.columns] == ["step 0\na 0", "step 10\na 1"]


def test_what_is_no_number_is_a_gap():
    points = [(1, 1.0), (2, None), (3, 1.0), (4, math.nan), (5, 1.0), (6, math.inf)]
    path = Chart("c", [Line("a", points, RED)]).drawing().shapes[0].path
    assert path.count("M") == 3 and "nan" not in path and "inf" not in path


def test_the_band_is_two_standard_errors_around_the_moving_mean():
    rng = random.Random(0)
    ys = [rng.random() for _ in range(80)]
    line = Line("a", list(enumerate(ys)), RED, has_noise=True)
    band, pale, mean = Chart("c", [line]).drawing().shapes
    assert (band.css_class, pale.css_class, mean.css_class) == ("area pale", "line pale", "line")
    upper, lower = places(band.path)[:80], places(band.path)[:79:-1]
    middle = places(mean.path)
    unit = places(pale.path)[0][1] - (HEIGHT - BOTTOM)  # of the first point, in pixels: negative, as y points down
    for i in (0, 1, 40, 79):
        near = ys[max(0, i - 2) : i + 3]
        half = 2 * statistics.stdev(near) / math.sqrt(len(near)) * -unit / ys[0]
        assert upper[i][1] == pytest.approx(middle[i][1] - half, abs=0.2)
        assert lower[i][1] == pytest.approx(middle[i][1] + half, abs=0.2)
    plain = Chart("c", [Line("a", line.points, RED)]).drawing().shapes
    assert [shape.css_class for shape in plain] == ["line pale", "line"]


def test_a_gap_parts_the_band():
    points = [(i, None if 30 <= i < 40 else float(i % 3)) for i in range(80)]
    shapes = Chart("c", [Line("a", points, RED, has_noise=True)]).drawing().shapes
    assert [shape.css_class for shape in shapes] == ["area pale", "area pale", "line pale", "line"]


# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.072175), (0.0193339, 0.119192, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)


def linear(color) -> np.ndarray:
    c = np.asarray(color) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def cie_lab(rgb: np.ndarray) -> np.ndarray:
    f = (np.asarray(XYZ) @ rgb.clip(0, 1)) / WHITE
    x, y, z = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def closest(colors, kind: str) -> float:
    seen = [cie_lab(np.asarray(BLINDNESS[kind]) @ linear(c)) for c in colors]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colors_are_told_apart(kind):
    """The distance of CIE 1976; 2.3 is just noticeable. A blue and a violet would not do."""
    assert closest(PALETTE, kind) > 15
    if kind == "deuteranopia":
        assert closest(((47, 106, 200), (130, 80, 180)), kind) < 15


def test_colors_are_seen_on_white():
    """At least 3 to 1, as WCAG 2.1 asks of graphics."""
    luminance = [float(np.asarray(XYZ[1]) @ linear(color)) for color in PALETTE]
    assert min(1.05 / (0.05 + y) for y in luminance) > 3


def test_stacked_areas_add_up():
    lines = [Line("a", [(0, 1.0), (1, 1.0)], RED), Line("b", [(0, 2.0), (1, None)], BLUE)]
    lower, upper = (places(s.path) for s in Chart("c", lines, stacked=True).drawing().shapes)
    floor = HEIGHT - BOTTOM
    assert [y for _, y in lower[2:]] == [floor, floor]
    assert upper[0][1] == pytest.approx(floor - 3 * (floor - lower[0][1]), abs=0.3)
    assert upper[1][1] == lower[1][1]  # None adds nothing
    assert upper[2:] == [lower[1], lower[0]]  # it stands on the other


def test_many_points_become_means():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100 and few[0] == (9.0, 0.5) and few[-1] == (999.0, 0.5)
    assert thin(points[:50], 100) == points[:50]
    assert [s[:2] for s in smooth([(0, 0.0), (1, None), (2, 3.0)])] == [(0, 0.0), (1, 1.5), (2, 3.0)]


def test_nothing_at_all_can_be_drawn():
    for lines in ([], [Line("a", [], RED)], [Line("a", [(3, None)], RED)], [Line("a", [(3, 0.0)], RED)]):
        Chart("c", lines, marks=[Mark(3, RED, "m")]).drawing()


def test_what_lies_above_the_top_is_cut_off():
    d = Chart("c", [Line("a", [(0, 1.0), (1, 1e9)], RED)], top=1.0).drawing()
    assert d.y_ticks[-1][1] == "1" and places(d.shapes[0].path)[1][1] >= TOP - HEIGHT
