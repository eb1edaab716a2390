"""Charts: round ticks, gaps where numbers are missing, means where there are too many, areas that add up."""

import math
import re

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
    assert smooth([(0, 0.0), (1, None), (2, 3.0)]) == [(0, 0.0), (1, 1.5), (2, 3.0)]


def test_nothing_at_all_can_be_drawn():
    for lines in ([], [Line("a", [], RED)], [Line("a", [(3, None)], RED)], [Line("a", [(3, 0.0)], RED)]):
        Chart("c", lines, marks=[Mark(3, RED, "m")]).drawing()


def test_what_lies_above_the_top_is_cut_off():
    d = Chart("c", [Line("a", [(0, 1.0), (1, 1e9)], RED)], top=1.0).drawing()
    assert d.y_ticks[-1][1] == "1" and places(d.shapes[0].path)[1][1] >= TOP - HEIGHT
