"""Quads of lines of text, on maps whose geometry is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from flowlang.runtime.text_boxes import (
    clockwise,
    offset,
    offset_distance,
    on_page,
    reading_order,
    text_quads,
)
from flowlang.runtime.vision import rectangle_around

Map = NDArray[np.float32]

ANGLES = st.floats(-44, 44)
# Of a block of 100 x 20 of ones: the rectangle holds a row and a column more, of zeros.
SURE = 100 * 20 / (101 * 21)


def blank(height: int = 200, width: int = 300) -> Map:
    return np.zeros((height, width), np.float32)


def with_blocks(*blocks: tuple[int, int, int, int], level: float = 1.0) -> Map:
    """A map with blocks of one level: left, top, right, bottom."""
    levels = blank()
    for left, top, right, bottom in blocks:
        levels[top:bottom, left:right] = level
    return levels


def corners_of(x: float, y: float, w: float, h: float, degrees: float) -> NDArray[np.float32]:
    """A rectangle about its middle, clockwise from the top left."""
    across = np.asarray([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
    down = np.asarray([-across[1], across[0]])
    steps = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    points = [(x, y) + across * w / 2 * i + down * h / 2 * j for i, j in steps]
    return np.asarray(points, np.float32)


def drawn(corners: NDArray[np.float32], height: int = 400, width: int = 500) -> Map:
    """A map of the pixels whose middles lie in a polygon, its corners clockwise."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.ones((height, width), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        inside &= (x1 - x0) * (y - y0) >= (y1 - y0) * (x - x0)
    return inside.astype(np.float32)


def sides(quad: NDArray[Any]) -> tuple[float, float]:
    return float(np.hypot(*(quad[1] - quad[0]))), float(np.hypot(*(quad[3] - quad[0])))


def test_an_upright_block_grows_by_area_times_unclip_over_perimeter() -> None:
    """A block of 100 x 20 grows by 100 * 20 * 1.6 / 240 = 13.3 pixels, rounded, on every side."""
    [(quad, score)] = text_quads(with_blocks((60, 80, 160, 100)))
    assert quad.dtype == np.float32
    assert quad.tolist() == [[47, 67], [173, 67], [173, 113], [47, 113]]
    assert score == pytest.approx(SURE)


def test_unclip_says_how_far_a_quad_grows() -> None:
    """With 0 a quad is the block itself."""
    [(quad, _)] = text_quads(with_blocks((60, 80, 160, 100)), unclip=0)
    assert quad.tolist() == [[60, 80], [160, 80], [160, 100], [60, 100]]


def test_an_undilated_patch_ends_in_the_middles_of_its_last_pixels() -> None:
    """An outline leads through middles, so it is a pixel less wide and high than the patch."""
    levels = with_blocks((60, 80, 160, 100))
    [(quad, _)] = text_quads(levels, unclip=0, dilate=False)
    assert quad.tolist() == [[60, 80], [159, 80], [159, 99], [60, 99]]


@given(st.floats(200, 300), st.floats(180, 220), st.floats(40, 160), st.floats(8, 36), ANGLES)
def test_a_slanted_line_is_found_where_it_is(
    x: float, y: float, w: float, h: float, degrees: float
) -> None:
    """Middle, sides and corners of a turned rectangle come back but for pixels."""
    [(core, score)] = text_quads(drawn(corners_of(x, y, w, h, degrees)), unclip=0)
    assert abs(core.mean(0) - (x, y)).max() <= 1.5
    assert sides(core) == pytest.approx((w, h), abs=4)
    assert 0.6 < score <= 1
    [(quad, _)] = text_quads(drawn(corners_of(x, y, w, h, degrees)))
    distance = offset_distance(sides(core), 1.6)
    grown = corners_of(x, y, w + 2 * distance, h + 2 * distance, degrees)
    assert np.hypot(*(quad - grown).T).max() <= 4


@given(
    st.floats(400, 600), st.floats(400, 600), st.floats(12, 300), st.floats(8, 60), ANGLES,
    st.floats(1, 40),
)  # fmt: skip
def test_the_least_rectangle_around_a_rounded_offset_is_the_rectangle_grown(
    x: float, y: float, w: float, h: float, degrees: float, distance: float
) -> None:
    """Its middle stays, and its sides get longer by twice the distance, but for whole pixels."""
    corners = corners_of(x, y, w, h, degrees)
    around, _ = rectangle_around(offset(corners, distance))
    assert abs(around.mean(0) - (x, y)).max() <= 1.5
    found, wanted = sorted(sides(clockwise(around))), sorted((w + 2 * distance, h + 2 * distance))
    assert found == pytest.approx(wanted, abs=3)


@given(ANGLES, st.floats(1, 30))
def test_an_offset_does_not_depend_on_where_the_corners_start(
    degrees: float, distance: float
) -> None:
    """The same points come from any corner first, and from either way around."""
    corners = corners_of(100, 80, 90, 20, degrees)
    points = set(map(tuple, offset(corners, distance).tolist()))
    for turned in (np.roll(corners, 1, 0), np.roll(corners, 2, 0), corners[::-1]):
        others = set(map(tuple, offset(turned, distance).tolist()))
        assert all(min(math.dist(p, q) for q in points) <= 1.5 for p in others)


def test_a_score_is_the_mean_of_the_core() -> None:
    """What is around a line does not dim it, and what is in it does."""
    levels = with_blocks((60, 80, 160, 100), level=0.8)
    levels[80:100, 60:110] = 0.6
    [(_, score)] = text_quads(levels)
    assert score == pytest.approx(0.7 * SURE)


def test_what_is_less_sure_than_conf_is_no_line() -> None:
    """`conf` is about the mean, `threshold` about each pixel."""
    levels = with_blocks((60, 80, 160, 100), level=0.45)
    assert text_quads(levels) == []
    assert len(text_quads(levels, conf=0.4)) == 1
    assert text_quads(levels, conf=0.4, threshold=0.5) == []


def test_specks_are_no_lines() -> None:
    """What is fewer than three pixels high is dropped, however sure it is."""
    assert text_quads(with_blocks((60, 80, 160, 82))) == []
    assert len(text_quads(with_blocks((60, 80, 160, 83)))) == 1


def test_most_bounds_the_patches_looked_at() -> None:
    """A map full of patches costs no more than that."""
    blocks = [(x, y, x + 12, y + 5) for x in range(10, 280, 30) for y in range(10, 180, 30)]
    assert len(text_quads(with_blocks(*blocks))) == len(blocks)
    assert len(text_quads(with_blocks(*blocks), most=7)) == 7


def test_lines_come_in_reading_order() -> None:
    """Rows from the top, each from the left, also where its lines are not quite level."""
    blocks = ((150, 22, 250, 40), (20, 28, 120, 46), (20, 90, 120, 108), (150, 84, 250, 102))
    lefts = [quad[0, 0] for quad, _ in text_quads(with_blocks(*blocks), unclip=0)]
    tops = [quad[0, 1] for quad, _ in text_quads(with_blocks(*blocks), unclip=0)]
    assert (lefts, tops) == ([20, 150, 20, 150], [28, 22, 90, 84])
    tight = [quad[0, 1] for quad, _ in text_quads(with_blocks(*blocks), unclip=0, row=1)]
    assert tight == [22, 28, 84, 90]


def test_a_row_goes_on_as_long_as_its_lines_follow_closely() -> None:
    """Each line is held against the one before it, so a slanted row stays one row."""
    slanted = [corners_of(300 - 60 * k, 50 + 8 * k, 40, 10, 0) for k in range(5)]
    assert reading_order(slanted) == [4, 3, 2, 1, 0]
    assert reading_order(slanted, row=8) == [0, 1, 2, 3, 4]


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(0, 500)), max_size=30), st.floats(0.5, 50))
def test_reading_order_loses_no_line(places: list[tuple[float, float]], row: float) -> None:
    """Every quad comes once, and none stands a row or more above one that comes earlier."""
    quads = [corners_of(x, y, 40, 10, 0) for x, y in places]
    order = reading_order(quads, row)
    assert sorted(order) == list(range(len(quads)))
    tops = [float(quads[i][0, 1]) for i in order]
    starts = [b for a, b in itertools.pairwise(sorted(tops)) if b - a >= row]
    for start in starts:
        above = [top < start for top in tops]
        assert above == sorted(above, reverse=True)


@given(ANGLES, st.permutations(range(4)))
def test_corners_come_clockwise_from_the_top_left(degrees: float, order: list[int]) -> None:
    """In whatever order they were found."""
    corners = corners_of(100, 80, 90, 20, degrees)
    assert clockwise(corners[order]).tolist() == corners.tolist()


def test_a_map_of_nothing_and_a_map_of_text_alone() -> None:
    """Neither is special; a quad may reach beyond the map."""
    assert text_quads(blank()) == []
    assert text_quads(np.ones((1, 1), np.float32)) == []
    [(quad, score)] = text_quads(np.ones((60, 90), np.float32))
    assert quad.min() < 0
    assert quad[2].tolist() > [90, 60]
    assert score == pytest.approx(1)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
        fill=st.sampled_from([0, 0.9, float("nan"), float("inf")]).map(np.float32),
    )
)
def test_a_model_gone_wrong_crashes_nothing(levels: Map) -> None:
    """Whatever the map holds, quads and scores are finite."""
    for quad, score in text_quads(levels):
        assert np.isfinite(quad).all()
        assert math.isfinite(score)


def test_what_is_not_finite_is_no_text() -> None:
    """The rest of the map is read as ever."""
    levels = with_blocks((60, 80, 160, 100))
    expected = text_quads(levels)[0][0].tolist()
    levels[:40] = np.nan
    levels[150:] = np.inf
    [(quad, score)] = text_quads(levels)
    assert quad.tolist() == expected
    assert score == pytest.approx(SURE)


def test_on_a_page_quads_are_in_whole_pixels_of_it() -> None:
    """A pixel beyond the page is none of its pixels, and what is thin there is dropped."""
    wide = np.asarray([[-3.4, 5.5], [120, 4.4], [120.2, 30.6], [-3, 31]], np.float32)
    thin = np.asarray([[10, 40], [90, 40], [90, 43.4], [10, 43]], np.float32)
    outside = wide + np.float32(500)
    [(quad, score)] = on_page([(outside, 0.6), (thin, 0.9), (wide, 0.8)], 60, 100)
    assert quad.tolist() == [[0, 6], [99, 4], [99, 31], [0, 31]]
    assert score == 0.8


def test_on_a_page_rows_are_told_apart_by_its_own_pixels() -> None:
    """Lines 12 pixels apart in the map are 6 apart on a page half as large: one row."""
    right, left = corners_of(200, 40, 60, 16, 0), corners_of(60, 52, 60, 16, 0)
    assert reading_order([right, left]) == [0, 1]
    found = on_page([(right / 2, 0.7), (left / 2, 0.9)], 100, 150)
    assert [score for _, score in found] == [0.9, 0.7]
