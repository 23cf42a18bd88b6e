"""OpenCV behind the operators, held against numpy alone."""

from __future__ import annotations

import tracemalloc
from typing import Any, TypeAlias

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from flowlang.diagnostics import BadRequest
from flowlang.runtime import vision
from flowlang.runtime.picture import read_picture
from tests.pictures import bad, good

Array: TypeAlias = NDArray[Any]
PROPERTY = settings(max_examples=100)
IMAGE = np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)


@pytest.mark.parametrize("name", good())
def test_a_bitmap_has_the_pixels_of_its_picture(name: str) -> None:
    """Decoded and as a bitmap, a picture is the same, upright and in three channels."""
    data = good()[name].data
    image = vision.decode_picture(data)
    assert image.shape == good()[name].rgb.shape
    again = vision.decode_picture(vision.as_bmp(data, read_picture(data)))
    np.testing.assert_array_equal(again, image)


def test_a_truncated_jpeg_becomes_a_bitmap_of_what_there_is() -> None:
    """With the header at hand, a missing end marker is made up for."""
    data = bad()["jpeg-half"].data
    image = vision.decode_picture(vision.as_bmp(data, read_picture(data)))
    assert image.shape == (375, 500, 3)


def test_what_is_no_picture_cannot_be_decoded() -> None:
    """It is the request that is bad."""
    for work in (vision.decode_picture, vision.as_bmp):
        for data in (b"no picture", b"\xff\xd8\xff\xe0" + bytes(40)):
            with pytest.raises(BadRequest, match="not a picture that can be decoded"):
                work(data)


def test_sample_pictures_are_always_the_same() -> None:
    """They are whole JPEGs of one size, no two alike."""
    first, again = vision.sample_pictures(3), vision.sample_pictures(3)
    assert first == again
    assert len(set(first)) == 3
    assert {(p.width, p.height, p.is_complete) for p in map(read_picture, first)} == {
        (500, 375, True)
    }


def test_flips_and_turns_are_those_of_numpy() -> None:
    """Horizontal changes left and right; degrees go clockwise."""
    for image in (IMAGE, IMAGE[:, :, 0], IMAGE[2:9, 3:11]):
        np.testing.assert_array_equal(vision.flip(image, "horizontal"), image[:, ::-1])
        np.testing.assert_array_equal(vision.flip(image, "vertical"), image[::-1])
        for degrees in (90, 180, 270):
            wanted = np.rot90(image, -degrees // 90)
            np.testing.assert_array_equal(vision.rotate(image, degrees), wanted)


def test_colours_change_places() -> None:
    """Channels are reordered, or weighed into one."""
    np.testing.assert_array_equal(vision.recolour("bgr", "rgb")(IMAGE), IMAGE[:, :, ::-1])
    np.testing.assert_array_equal(vision.recolour("rgb", "bgr")(IMAGE), IMAGE[:, :, ::-1])
    assert vision.recolour("bgr", "bgr")(IMAGE) is IMAGE
    exact = IMAGE @ np.asarray([0.114, 0.587, 0.299])
    assert abs(vision.recolour("bgr", "gray")(IMAGE) - exact).max() <= 0.51
    assert abs(vision.recolour("rgb", "gray")(IMAGE[:, :, ::-1].copy()) - exact).max() <= 0.51


def test_levels_go_through_a_table_each() -> None:
    """Each channel has its own, and the result is of planes."""
    tables = [np.arange(256, dtype=np.float32) * k for k in (1, 2, 3)]
    planes = vision.planes_by_table(IMAGE, tables)
    np.testing.assert_array_equal(
        planes, (IMAGE * np.asarray([1, 2, 3], np.float32)).transpose(2, 0, 1)
    )
    (plane,) = vision.planes_by_table(IMAGE[:, :, 1], tables[1:2])
    np.testing.assert_array_equal(plane, IMAGE[:, :, 1] * np.float32(2))


def linear(image: Array, height: int, width: int) -> Array:
    """Bilinear with half-pixel centres, by its definition, in doubles."""
    rows, columns = image.shape[:2]
    y = np.clip((np.arange(height) + 0.5) * rows / height - 0.5, 0, rows - 1)
    x = np.clip((np.arange(width) + 0.5) * columns / width - 0.5, 0, columns - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    below, right = np.minimum(top + 1, rows - 1), np.minimum(left + 1, columns - 1)
    v, h = (y - top)[:, None, None], (x - left)[None, :, None]
    upper = image[top][:, left] * (1 - h) + image[top][:, right] * h
    lower = image[below][:, left] * (1 - h) + image[below][:, right] * h
    return np.asarray(upper * (1 - v) + lower * v)


@PROPERTY
@given(st.integers(1, 60), st.integers(1, 60))
def test_resizing_is_bilinear(height: int, width: int) -> None:
    """Within a level of the definition, whatever the size."""
    got = vision.resize_linear(IMAGE, height, width)
    assert got.shape == (height, width, 3)
    assert abs(got - linear(IMAGE.astype(float), height, width)).max() <= 1.01


def test_antialiased_shrinking_keeps_the_mean() -> None:
    """Shrunk to a half, each pixel is a weighed mean of four by four; a flat image stays flat."""
    flat = np.full((24, 36, 3), 77, np.uint8)
    assert (vision.resize_antialiased(flat, 7, 5) == 77).all()
    wave = np.tile(np.asarray([0, 200], np.uint8), (20, 20))
    assert set(vision.resize_antialiased(wave, 10, 10)[1:-1, 1:-1].ravel()) == {100}
    assert vision.resize_linear(wave[:, ::2], 20, 20).max() == 0


def triangle(length: int, to: int) -> Array:
    """The filter of antialiased resizing by its definition, one row of weights a result."""
    step = length / to
    support = max(1.0, step)
    places = np.arange(-length - 2, 2 * length + 2)
    weights = 1 - abs(places + 0.5 - (np.arange(to)[:, None] + 0.5) * step) / support
    weights = np.clip(weights, 0, None)
    weights /= weights.sum(1, keepdims=True)
    out = np.zeros((to, length))
    np.add.at(out.T, np.clip(places, 0, length - 1), weights.T)
    return out


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60))
def test_antialiased_resizing_weighs_by_a_triangle(
    rows: int, columns: int, height: int, width: int
) -> None:
    """Rounded, the mean of the definition, whichever side shrinks and whichever grows."""
    image = np.random.default_rng(rows * columns).integers(0, 256, (rows, columns, 3), np.uint8)
    got = vision.resize_antialiased(image, height, width)
    wanted = np.einsum("hr,wc,rcx->hwx", triangle(rows, height), triangle(columns, width), image)
    assert got.shape == (height, width, 3)
    assert abs(got - wanted).max() <= 0.51
    gray = vision.resize_antialiased(image[:, :, 1], height, width)
    assert abs(gray - wanted[:, :, 1]).max() <= 0.51


@pytest.mark.parametrize("shape", [(1, 1_000_000, 3), (1_000_000, 1)])
def test_a_long_thin_picture_is_shrunk_in_little_memory(shape: tuple[int, ...]) -> None:
    """A small file may hold such a picture, and a matrix of weights for all of it does not fit."""
    image = np.full(shape, 127, np.uint8)
    tracemalloc.start()
    try:
        small = vision.resize_antialiased(image, 224, 224)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert (small == 127).all()


def test_a_warp_that_only_shifts_moves_pixels() -> None:
    """Whole pixels move as they are, and the border repeats outward."""
    shift = np.asarray([[1, 0, 3], [0, 1, -2], [0, 0, 1]], float)
    got = vision.warp(IMAGE, shift, 13, 17)
    np.testing.assert_array_equal(got[2:, :14], IMAGE[:11, 3:])
    np.testing.assert_array_equal(got[0, :14], IMAGE[0, 3:])
    np.testing.assert_array_equal(got[2:, 16], IMAGE[:11, 16])


def test_a_warp_meets_coordinates_at_pixel_centres() -> None:
    """Twice as large, a ramp is where half-pixel centres put it; cubics bend it by a little."""
    ramp = np.tile(np.arange(0, 200, 10, dtype=np.float32), (20, 1))
    half = np.diag([0.5, 0.5, 1])
    got = vision.warp(ramp, half, 40, 40)
    wanted = ((np.arange(40) + 0.5) / 2 - 0.5) * 10
    np.testing.assert_allclose(got[20, 6:-6], wanted[6:-6], atol=0.5)  # a 20th of a pixel


def overlap(one: Array, other: Array) -> float:
    """Intersection over union of two boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod(np.clip(high - low, 0, None)))
    return shared / float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


def by_hand(boxes: Array, scores: Array, labels: Array, iou: float) -> list[int]:
    """Greedy suppression a class, by its definition."""
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        rivals = [k for k in kept if labels[k] == labels[index]]
        if all(overlap(boxes[k], boxes[index]) <= iou for k in rivals):
            kept.append(index)
    return kept


@PROPERTY
@given(
    places=hnp.arrays(np.int32, st.tuples(st.integers(0, 25), st.just(4)),
                      elements=st.integers(-60, 60)),
    seed=st.integers(0, 1000),
    iou=st.sampled_from([0.0, 0.3, 0.45, 0.7, 1.0]),
)  # fmt: skip
def test_suppression_is_greedy_and_by_class(places: Array, seed: int, iou: float) -> None:
    """The same boxes stay, in the same order, as by the definition; negative places are places."""
    random = np.random.default_rng(seed)
    sizes = abs(places[:, 2:]) + 1
    boxes = np.concatenate([places[:, :2], places[:, :2] + sizes], 1).astype(float)
    scores = random.permutation(len(boxes)).astype(np.float32) / 32
    labels = random.integers(0, 3, len(boxes))
    kept = vision.suppress(boxes, scores, labels, iou)
    assert kept.tolist() == by_hand(boxes, scores, labels, iou)


def test_boxes_of_different_classes_never_meet() -> None:
    """A class moved aside does not land on another, however far left its boxes begin."""
    boxes = np.asarray([[600, 600, 640, 640], [-41, -41, -1, -1]], float)
    for labels in ([0, 1], [1, 0], [0, 7]):
        kept = vision.suppress(boxes, np.asarray([0.9, 0.8]), np.asarray(labels), 0.1)
        assert kept.tolist() == [0, 1]


def test_opencv_is_told_to_be_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """Files that it would complain of on stderr are told to their senders alone."""
    vision.silence()
    png = bytearray(good()["png-rgb"].data)
    png[60:90] = bytes(30)
    with pytest.raises(BadRequest):
        vision.decode_picture(bytes(png[:70]))
    assert cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_SILENT
    assert "WARN" not in capfd.readouterr().err
