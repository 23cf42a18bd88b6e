"""Operators on the CPU, each against what it should give by another way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from flowlang.diagnostics import BadRequest, EngineError, StageFailed
from flowlang.plan.expression import Expression, compute
from flowlang.plan.graph import FIELD, Body, Live, Node
from flowlang.plan.onnx import Model, Port
from flowlang.plan.types import Image
from flowlang.runtime import host
from flowlang.runtime.frame import Frame, Placement, frame_of, run_framed, with_frame
from flowlang.runtime.host import work_of
from tests.nodes import image_node, made, run
from tests.pictures import good, write_tiff

Array: TypeAlias = NDArray[Any]
PROPERTY = settings(max_examples=100)
RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (40, 60, 3), np.uint8)
FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9),
    elements=st.floats(-200, 200, width=32),
)
SCORES = hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(0, 1, width=32))


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text("cat\ndog\ncow\n", "utf-8")
    return path


# Values


@PROPERTY
@given(FLOATS)
def test_sigmoid_is_the_logistic_function(values: Array) -> None:
    """To single precision, small values too, and without overflow."""
    got = run("sigmoid", values)
    exact = 1 / (1 + np.exp(-values.astype(np.float64)))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-44)
    assert got.dtype == np.float32


@PROPERTY
@given(FLOATS)
def test_l2_gives_unit_length_or_zero(values: Array) -> None:
    """Over the last axis, in the same direction."""
    got = run("l2", values)
    assert got.dtype == np.float32
    lengths = np.sqrt((values.astype(np.float64) ** 2).sum(-1))
    np.testing.assert_allclose(got * lengths[..., None], values, rtol=1e-5, atol=1e-5)
    units = np.sqrt((got.astype(np.float64) ** 2).sum(-1))
    np.testing.assert_allclose(units, np.where(lengths > 0, 1, 0), atol=1e-5)


def test_l2_stands_giants_and_half_floats() -> None:
    """Squares beyond the range of the values do not matter."""
    np.testing.assert_allclose(run("l2", np.asarray([3e38, 0], np.float32)), [1, 0])
    np.testing.assert_allclose(run("l2", np.asarray([300, 400], np.float16)), [0.6, 0.8])
    assert run("l2", np.zeros((2, 3), np.float32)).tolist() == [[0, 0, 0]] * 2


@PROPERTY
@given(FLOATS)
def test_argmax_is_the_first_of_the_greatest(values: Array) -> None:
    """A whole number of a vector, an array of them otherwise."""
    got = run("argmax", values)
    if values.ndim == 1:
        assert type(got) is int
        assert got == values.tolist().index(max(values.tolist()))
    else:
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, values.argmax(-1))


def test_argmax_passes_over_what_is_no_number() -> None:
    """NaN is the least, as for `best`."""
    assert run("argmax", np.asarray([np.nan, 2, np.inf, 1], np.float32)) == 2


@PROPERTY
@given(values=SCORES, least=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_labels_are_all_that_reach_the_least(names: Path, values: Array, least: float) -> None:
    """Greatest first, of equals the first first."""
    got = run("labels", values, names=names, min=least)
    wanted = sorted((i for i, v in enumerate(values) if v >= least), key=lambda i: -values[i])
    assert [label["index"] for label in got] == wanted
    assert [label["score"] for label in got] == [float(values[i]) for i in wanted]
    known = dict(enumerate(["cat", "dog", "cow"]))
    assert [label["label"] for label in got] == [known.get(i, str(i)) for i in wanted]


def test_labels_without_a_number_have_none() -> None:
    """NaN reaches nothing."""
    assert run("labels", np.asarray([np.nan, 0.9], np.float32)) == [
        {"index": 1, "label": "1", "score": pytest.approx(0.9)}
    ]


# Texts


@pytest.mark.parametrize("scored", [False, True])
def test_ctc_scores_what_it_kept(names: Path, scored: bool) -> None:
    """The mean of the first steps of the characters, neither blanks nor repeats."""
    best = [0, 1, 1, 0, 1, 3, 3, 0]
    values = [0.9, 0.5, 0.99, 0.9, 0.7, 0.6, 0.99, 0.9]
    steps = np.zeros((8, 4), np.float32)
    steps[range(8), best] = values
    got = run("ctc", steps, keys=names, scored=scored)
    if scored:
        assert got == {"text": "catcatcow", "score": pytest.approx((0.5 + 0.7 + 0.6) / 3)}
        assert type(got["score"]) is float
        assert run("ctc", steps[:1], keys=names, scored=True) == {"text": "", "score": 0.0}
        assert run("ctc", steps[:0], keys=names, scored=True) == {"text": "", "score": 0.0}
    else:
        assert got == "catcatcow"


def test_join_leaves_out_what_is_missing() -> None:
    """Texts that are null are no texts."""
    assert run("join", ["a", None, "b", ""]) == "ab"
    assert run("join", ["a", None, "b", ""], separator=", ") == "a, b, "
    assert run("join", [], separator=", ") == ""


# Lists

KEYS = st.one_of(st.none(), st.integers(-5, 5), st.sampled_from([0.5, float("nan")]))


@PROPERTY
@given(st.lists(KEYS, max_size=12), st.integers(1, 14))
def test_top_of_a_list_goes_by_its_key(keys: list[Any], k: int) -> None:
    """Greatest first, equals in their order, and those without a key last."""
    records = [{"at": i, "key": key} for i, key in enumerate(keys)]
    got = run("top", records, k=k, by=lambda record: record["key"])
    known = [r for r in records if r["key"] is not None and r["key"] == r["key"]]
    wanted = sorted(known, key=lambda r: (-r["key"], r["at"]))
    wanted += [r for r in records if r not in known]
    assert [r["at"] for r in got] == [r["at"] for r in wanted[:k]]


def test_top_goes_by_texts_and_by_values_of_the_flow() -> None:
    """A key may be anything with an order, and see what else arrives."""
    assert run("top", ["b", "c", "a"], k=2, by=lambda e: e) == ["c", "b"]
    assert run("top", [1, 5, 3], 4, k=2, by=lambda e, near: -abs(e - near)) == [5, 3]
    assert run("top", [0.5, 0.75], k=5) == [0.75, 0.5]


def test_filter_keeps_those_for_which_it_holds() -> None:
    """In order; the condition sees the further values too."""
    assert run("filter", [3, 1, 2], condition=lambda e: e > 1) == [3, 2]
    assert run("filter", [3, 1, 2], 2, condition=lambda e, least: e >= least) == [3, 2]
    assert run("filter", [], condition=lambda e: True) == []


def test_select_keeps_those_flagged() -> None:
    """One flag an element; any other number of them is an error."""
    assert run("select", ["a", "b", "c"], [True, False, True]) == ["a", "c"]
    with pytest.raises(StageFailed, match="select failed: ValueError"):
        run("select", ["a", "b"], [True])


def test_a_condition_that_fails_is_told_with_its_place() -> None:
    """What Python raises becomes a StageFailed with operator and place."""
    with pytest.raises(StageFailed, match=r"filter failed: TypeError: .*\(test.flow:1:1\)") as told:
        run("filter", [None], condition=lambda e: e > 1)
    assert told.value.stage == "filter"


# Images


def test_a_picture_over_the_limit_of_pixels_is_refused() -> None:
    """Its own pixels count, and those of its tiles, which a decoder makes whole."""
    decode = work_of(made("decode"), {"max_pixels": 10_000})
    for side, tile in ((100, 0), (96, 96), (96, 32), (16, 96)):
        layout = {"tile": (tile, tile)} if tile else {}
        assert decode(write_tiff(np.zeros((side, side), np.uint8), **layout)) is not None
    with pytest.raises(BadRequest, match="a picture of 100x101 pixels, and `max_pixels` is 10,000"):
        decode(write_tiff(np.zeros((101, 100), np.uint8), tile=(16, 16)))
    for side, tile, pixels in ((16, 112, "12,544"), (97, 32, "16,384")):
        with pytest.raises(BadRequest, match=f"in tiles of {pixels}, and `max_pixels` is 10,000"):
            decode(write_tiff(np.zeros((side, side), np.uint8), tile=(tile, tile)))


def test_the_size_of_an_image() -> None:
    """Height and width, as a record and one by one."""
    for image in (IMAGE, IMAGE[:, :, 0]):
        assert run("size", image) == {"height": 40, "width": 60}
        assert compute(made(FIELD, name="height"), [image]) == 40
        assert compute(made(FIELD, name="width"), [image]) == 60


@pytest.mark.parametrize(
    ("params", "height", "width"),
    [
        ({"size": 64}, 64, 64),
        ({"h": 45, "w": 60}, 45, 60),
        ({"w": 61}, 40, 61),
        ({"multiple": 32}, 64, 64),
        ({"multiple": 20}, 40, 60),
        ({"h": 41, "multiple": 32}, 64, 64),
    ],
)
@pytest.mark.parametrize("image", [IMAGE, IMAGE[:, :, 0]], ids=["colour", "gray"])
def test_padding_grows_right_and_down(
    image: Array, params: dict[str, Any], height: int, width: int
) -> None:
    """The image stays at the top left, and what is added has one level."""
    got = run("pad", image, **params)
    wanted = np.full((height, width, *image.shape[2:]), 114, np.uint8)
    wanted[:40, :60] = image
    np.testing.assert_array_equal(got, wanted)
    assert (run("pad", image, **params, fill=7)[40:, 60:] == 7).all()


def test_what_is_larger_cannot_be_padded() -> None:
    """An image that does not fit is a bad request, with both sizes."""
    with pytest.raises(BadRequest, match="an image of 40x60 is larger than 50x50"):
        run("pad", IMAGE, size=50)


def test_flip_and_rotate() -> None:
    """Clockwise, and left for right or top for bottom."""
    np.testing.assert_array_equal(run("flip", IMAGE), IMAGE[:, ::-1])
    np.testing.assert_array_equal(run("flip", IMAGE, axis="vertical"), IMAGE[::-1])
    np.testing.assert_array_equal(
        run("rotate", IMAGE, degrees=90), np.transpose(IMAGE[::-1], (1, 0, 2))
    )
    np.testing.assert_array_equal(run("rotate", IMAGE, degrees=180), IMAGE[::-1, ::-1])
    with pytest.raises(EngineError, match="90, 180 or 270"):
        work_of(made("rotate", degrees=100), {})


@pytest.mark.parametrize(
    ("shape", "params", "wanted"),
    [
        ((100, 200), {"size": 50, "fit": "shorter"}, (50, 100)),
        ((100, 200), {"size": 50, "fit": "least"}, (100, 200)),
        ((100, 200), {"size": 150, "fit": "least"}, (150, 300)),
        ((100, 200), {"size": 50, "fit": "shorter", "most": 80}, (40, 80)),
        ((100, 200), {"size": 50, "fit": "least", "most": 150}, (75, 150)),
        ((100, 200), {"size": 150, "fit": "least", "multiple": 32}, (160, 288)),
        ((736, 1300), {"size": 736, "fit": "least", "multiple": 32}, (736, 1312)),
        ((5, 400), {"size": 10, "fit": "least", "most": 64, "multiple": 32}, (32, 64)),
        ((100, 333), {"h": 48}, (48, 160)),
        ((100, 333), {"h": 48, "multiple": 32}, (64, 160)),
        ((100, 333), {"h": 48, "most": 100}, (30, 100)),
        ((100, 333), {"w": 111}, (33, 111)),
        ((1, 400), {"w": 4}, (1, 4)),
        ((501, 448), {"size": 224, "fit": "shorter"}, (251, 224)),
        ((192, 417), {"size": 224, "fit": "shorter"}, (224, 487)),
        ((200, 503), {"h": 100}, (100, 252)),
        ((200, 505), {"h": 100}, (100, 253)),
        ((80, 100), {"h": 80, "multiple": 32}, (64, 96)),
        ((100, 200), {"h": 48, "w": 320, "multiple": 100}, (48, 320)),
        ((100, 200), {"size": 64, "fit": "letterbox", "most": 10}, (64, 64)),
    ],
)
def test_sizes_that_the_picture_decides(
    shape: tuple[int, int], params: dict[str, Any], wanted: tuple[int, int]
) -> None:
    """`least` only grows, `most` bounds the longer side, and `multiple` rounds both.

    Halves of a pixel go up, and halves of a multiple to the even one.
    """
    image = np.zeros((*shape, 3), np.uint8)
    assert run("resize", image, **params).shape == (*wanted, 3)


def test_a_resize_that_would_explode_is_refused() -> None:
    """A picture of one row made higher would be wider than memory: it is the request's fault."""
    with pytest.raises(BadRequest, match="an image of 1x60000 would become one of 224x13440000"):
        run("resize", np.zeros((1, 60000), np.uint8), h=224)
    with pytest.raises(BadRequest, match="pixels"):
        run("resize", np.zeros((1, 60000), np.uint8), size=224, fit="least")


@PROPERTY
@given(
    whole=st.integers(1, 300), length=st.integers(1, 120), overlap=st.integers(0, 119),
    is_high=st.booleans(),
)  # fmt: skip
def test_pieces_cover_an_image(whole: int, length: int, overlap: int, is_high: bool) -> None:
    """All are as long as asked, in order, overlap by no less than asked, and leave nothing out."""
    overlap = min(overlap, length - 1)
    line = np.arange(whole, dtype=np.uint16)
    image = np.tile(line[:, None] if is_high else line, (1, 7) if is_high else (7, 1))
    side = {"h" if is_high else "w": length}
    pieces = [np.asarray(p) for p in run("cut", image, overlap=overlap, **side)]
    spans = [(int(p.min()), int(p.max()) + 1) for p in pieces]
    assert all(p.shape[1 if is_high else 0] == 7 for p in pieces)
    assert spans[0][0] == 0
    assert spans[-1][1] == whole
    if whole <= length:
        assert spans == [(0, whole)]
        return
    assert all(end - start == length for start, end in spans)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(spans)]
    assert all(step == length - overlap for step in steps[:-1])
    assert 0 < steps[-1] <= length - overlap


def test_pieces_know_where_they_lie() -> None:
    """Each has a frame, on from that of the image; one that is not cut keeps its own."""
    frame = Frame.of(400, 600).placed(Placement.whole(40, 60))
    first, second, third = run("cut", with_frame(IMAGE, frame), w=25, overlap=5)
    assert [frame_of(p).to_decoded([[0, 0]]).tolist() for p in (first, second, third)] == [
        [[0, 0]], [[200, 0]], [[350, 0]]
    ]  # fmt: skip
    np.testing.assert_array_equal(third, IMAGE[:, 35:])
    (whole,) = run("cut", with_frame(IMAGE, frame), h=64)
    assert frame_of(whole) == frame
    with pytest.raises(EngineError, match="pieces of 10 pixels cannot overlap by 10"):
        work_of(made("cut", h=10, overlap=10), {})


def memory_of(image: Array) -> int:
    """Bytes that an image keeps alive."""
    while isinstance(image.base, np.ndarray):
        image = image.base
    return image.nbytes


def test_a_small_part_does_not_keep_its_picture_alive() -> None:
    """What is far smaller is copied, however many crops it took; the rest stays a view."""
    picture = RANDOM.integers(0, 256, (400, 600, 3), np.uint8)
    box = [10.0, 20.0, 110.0, 90.0]
    small = [
        run("crop", picture, size=16),
        run("crop_box", box, picture),
        run("cut", picture, h=50)[1],
    ]
    for part in small:
        assert memory_of(part) == part.nbytes
    np.testing.assert_array_equal(small[0], picture[192:208, 292:308])
    np.testing.assert_array_equal(small[1], picture[20:90, 10:110])
    large = run("crop", picture, size=300)
    assert memory_of(large) == picture.nbytes
    assert memory_of(run("crop", large, size=200)) == 200 * 200 * 3


# What lies in a box or a quad


def test_a_box_is_cut_out_along_its_edges() -> None:
    """To the nearest pixel, clipped to the image, at least one pixel each way."""
    for box, wanted in (
        ([10, 5, 30, 25], IMAGE[5:25, 10:30]),
        ([9.6, 5.4, 30.4, 24.6], IMAGE[5:25, 10:30]),
        ([-20, -5, 30, 1000], IMAGE[:40, :30]),
        ([10.2, 5.2, 10.3, 5.3], IMAGE[5:6, 10:11]),
        ([59.9, 39.9, 90, 90], IMAGE[39:, 59:]),
        ([-1e300, -3, 1e300, 0.1], IMAGE[:1]),
    ):
        got = run("crop_box", box, IMAGE)
        np.testing.assert_array_equal(got, wanted)
        assert got.shape[:2] == (frame_of(got).height, frame_of(got).width)
    gray = run("crop_box", (10, 5, 30, 25), IMAGE[:, :, 0])
    np.testing.assert_array_equal(gray, IMAGE[5:25, 10:30, 0])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ([60, 0, 80, 10], "does not touch the image"),
        ([-9, 0, 0, 10], "does not touch the image"),
        ([10, 10, 10, 20], "a box of no area"),
        ([30, 10, 10, 20], "a box of no area"),
        ([0, 0, float("nan"), 5], "neither a box"),
        ([1, 2, 3], "neither a box"),
        (None, "neither a box"),
        ("what", "neither a box"),
        ([[0, 0], [1, 0], [1, 1]], "neither a box"),
        ([10**400, 0, 1, 1], "neither a box"),
        ([[0, 0], [10, 10], [10, 0], [0, 10]], "not the corners of a quad"),
        ([[0, 0], [10, 0], [20, 0], [0, 10]], "not the corners of a quad"),
        ([[5, 5]] * 4, "not the corners of a quad"),
        ([[100, 0], [110, 0], [110, 10], [100, 10]], "does not touch the image"),
        ([[-1e5, -1e5], [1e5, -1e5], [1e5, 1e5], [-1e5, 1e5]], "far out of the image"),
    ],
)
def test_a_place_that_is_none_is_a_bad_request(place: Any, message: str) -> None:
    """Requests may bring places of their own; each refusal says `crop` and why."""
    with pytest.raises(BadRequest, match=f"crop failed: .*{message}"):
        run("crop_box", place, IMAGE)


def test_a_box_is_in_coordinates_of_the_decoded_picture() -> None:
    """In an image made smaller, mirrored and turned, the same box shows the same thing."""
    data = good()["png-rgb"].data
    chain = [image_node("decode"), image_node("resize", h=332, w=484), image_node("flip"),
             image_node("rotate", degrees=90)]  # fmt: skip
    works = [work_of(n, {}) for n in chain]
    plain = run_framed(works[:1], chain[:1], data)
    moved = run_framed(works, chain, data)
    box = [20, 10, 60, 50]
    here, there = run("crop_box", box, plain), run("crop_box", box, moved)
    assert there.shape == (160, 160, 3)
    upright = np.rot90(there, 1)[:, ::-1]
    again = run("resize", np.ascontiguousarray(upright), size=40, antialias=True)
    # Enlarged by four and averaged again: what is lost is sharpness, not place.
    assert abs(again.astype(int) - here).mean() < 6
    shifted = abs(again[:, 1:].astype(int) - here[:, :-1]).mean()
    assert shifted > 2 * abs(again.astype(int) - here).mean()
    for part in (here, there):
        low, high = frame_of(part).to_decoded([[0, 0], [part.shape[1], part.shape[0]]])
        assert sorted([low[0], high[0]]) == pytest.approx([20, 60])
        assert sorted([low[1], high[1]]) == pytest.approx([10, 50])


def smooth(height: int, width: int) -> Array:
    """An image that changes slowly, so that interpolation cannot matter much."""
    y, x = np.mgrid[:height, :width] + 0.5
    planes = [128 + 100 * np.sin(x / 17) * np.cos(y / 23), x * 255 / width, y * 255 / height]
    return np.stack(planes, 2).astype(np.uint8)


def shade(image: Array, points: Array) -> Array:
    """The levels of an image at continuous places, bilinear."""
    at = np.clip(points - 0.5, 0, np.asarray(image.shape[1::-1]) - 1.001)
    x, y = np.floor(at).astype(int).T
    (u, v) = (at - np.floor(at)).T[:, :, None]
    rows = image.astype(float)
    upper = rows[y, x] * (1 - u) + rows[y, x + 1] * u
    lower = rows[y + 1, x] * (1 - u) + rows[y + 1, x + 1] * u
    return np.asarray(upper * (1 - v) + lower * v)


QUAD = [[40.0, 30.0], [120.0, 50.0], [110.0, 85.0], [35.0, 70.0]]


@pytest.mark.parametrize("channels", [3, 1])
def test_a_quad_is_straightened(channels: int) -> None:
    """As long as the longer of its opposite sides; each pixel shows what lies at its place."""
    image = smooth(120, 160)
    image = image if channels == 3 else image[:, :, 0]
    got = run("crop_box", QUAD, image)
    corners = np.asarray(QUAD)
    assert got.shape[:2] == (round(np.hypot(5, 40)), round(np.hypot(80, 20)))
    frame = frame_of(got)
    rows, columns = got.shape[:2]
    rectangle = [[0, 0], [columns, 0], [columns, rows], [0, rows]]
    np.testing.assert_allclose(frame.to_decoded(rectangle), corners, atol=1e-6)
    y, x = np.mgrid[:rows, :columns] + 0.5
    places = frame.to_decoded(np.stack([x.ravel(), y.ravel()], 1))
    wanted = shade(image.reshape(120, 160, -1), places)
    assert abs(got.reshape(-1, channels).astype(float) - wanted).max() <= 2.5


def test_a_quad_may_reach_beyond_the_image() -> None:
    """There the image's edge repeats, however far the quad begins outside."""
    image = smooth(50, 50)
    got = run("crop_box", [[-10, 10], [30, 10], [30, 30], [-10, 30]], image)
    assert got.shape == (20, 40, 3)
    np.testing.assert_array_equal(got[:, 12:], image[10:30, 2:30])
    np.testing.assert_array_equal(got[:, :10], np.repeat(image[10:30, :1], 10, 1))


def test_an_upright_quad_is_exact() -> None:
    """At whole pixels nothing is interpolated."""
    got = run("crop_box", [[10, 5], [30, 5], [30, 15], [10, 15]], IMAGE)
    np.testing.assert_array_equal(got, IMAGE[5:15, 10:30])


def test_tall_quads_are_laid_down_where_the_flow_says_so() -> None:
    """A line of text running downwards is turned counter-clockwise; boxes and others are not."""
    tall = [[10, 5], [20, 5], [20, 35], [10, 35]]
    straight = run("crop_box", tall, IMAGE)
    np.testing.assert_array_equal(straight, IMAGE[5:35, 10:20])
    laid = run("crop_box", tall, IMAGE, upright=True)
    np.testing.assert_array_equal(laid, np.rot90(IMAGE[5:35, 10:20]))
    np.testing.assert_allclose(frame_of(laid).to_decoded([[0, 0]]), [[20, 5]], atol=1e-9)
    square = [[10, 5], [20, 5], [20, 20], [10, 20]]
    np.testing.assert_array_equal(run("crop_box", square, IMAGE, upright=True), IMAGE[5:20, 10:20])
    np.testing.assert_array_equal(
        run("crop_box", [10, 5, 20, 35], IMAGE, upright=True), IMAGE[5:35, 10:20]
    )


def test_a_box_in_a_straightened_part_is_straightened_with_it() -> None:
    """In a warped image a box of the picture is a quad, and is cut as one."""
    image = smooth(120, 160)
    part = run("crop_box", QUAD, image)
    inner = run("crop_box", [60, 50, 80, 62], part)
    places = frame_of(inner).to_decoded([[0, 0], [inner.shape[1], inner.shape[0]]])
    np.testing.assert_allclose(places, [[60, 50], [80, 62]], atol=1e-6)
    middle = inner[inner.shape[0] // 2, inner.shape[1] // 2].astype(float)
    assert abs(middle - image[56, 70]).max() <= 6


# Detectors, from picture to boxes

CHAIN = (
    image_node("decode"),
    image_node("resize", size=64, fit="letterbox"),
    image_node("rgb"),
    image_node("pack", layout="chw", dtype="f32", mean=None, std=None),
)


def detect(head: str, output: Any, *source: Any, **params: Any) -> Any:
    return run("boxes", output, *source, head=head, chain=CHAIN if source else None, **params)


def test_boxes_answer_in_the_decoded_picture(names: Path) -> None:
    """121x83 in 64: scaled by 64/121, with 10 rows above; the source is bytes."""
    rows = np.asarray([[32, 32, 64, 44, 0.9, 0.1, 1.0], [16, 21, 8, 11, 1, 0.8, 0.1],
                       [40, 40, 9, 9, 0.2, 1, 1]], np.float32)  # fmt: skip
    data = good()["jpeg-exif-6"].data
    got = detect("yolov5", rows, data, names=names)
    assert got == [
        {"box": pytest.approx([0, 0, 121, 83]), "label": "dog", "score": pytest.approx(0.9)},
        {
            "box": pytest.approx([12 * 121 / 64, 5.5 * 83 / 44, 20 * 121 / 64, 16.5 * 83 / 44]),
            "label": "cat",
            "score": pytest.approx(0.8),
        },
    ]
    assert len(detect("yolov5", rows, data, max=1)) == 1
    assert len(detect("yolov5", rows, data, conf=0.2)) == 3
    image = run_framed([work_of(CHAIN[0], {})], CHAIN[:1], data)
    later = run("boxes", rows, image, head="yolov5", chain=CHAIN[1:], names=names)
    assert later == got


def test_the_input_of_a_model_tells_its_size() -> None:
    """Where no chain is known, shares of the picture become pixels of the model's input."""
    model = Model(Path("m.onnx"), (Port("data", "f32", (1, 3, 64, 96)),), ())
    trt = made("trt", model=Path("m.onnx"))
    trt = Node("trt", {}, trt.inputs, trt.type, trt.span, trt.site, {}, model)
    node = made("boxes", inputs=[trt], head="ssd")
    output = {"boxes": np.asarray([[0.25, 0.5, 0.5, 0.75]]), "scores": np.asarray([[0.9, 0.1]])}
    (found,) = work_of(node, {})({**output, "scores": np.asarray([[0.9, 0.3]])})
    assert found["box"] == [24, 32, 48, 48]


def test_a_detector_that_gives_something_else_is_told() -> None:
    """The error names the operator, its place and what the model gave."""
    with pytest.raises(StageFailed, match=r"boxes failed: boxes\(yolov5\) needs .*10x5.*test.flow"):
        detect("yolov5", np.zeros((10, 5), np.float32))


def test_text_boxes_are_quads_in_the_decoded_picture() -> None:
    """The map of a text detector, found, grown and scaled back to the picture."""
    levels = np.zeros((1, 64, 64), np.float32)
    levels[0, 30:34, 20:40] = 0.9
    (line,) = run("boxes", levels, good()["png-rgb"].data, head="db", chain=CHAIN)
    assert 0.5 < line["score"] <= 0.9
    quad = np.asarray(line["quad"])
    assert quad.shape == (4, 2)
    scale = 121 / 64
    left, top = quad.min(0)
    right, bottom = quad.max(0)
    # Grown by area * 1.6 / perimeter, about 2.5 pixels of the map, each way.
    assert left == pytest.approx(17.5 * scale, abs=2.5)
    assert right == pytest.approx(42.5 * scale, abs=2.5)
    assert top == pytest.approx((27.5 - 10) * scale, abs=2.5)
    assert bottom == pytest.approx((36.5 - 10) * scale, abs=2.5)
    assert run("boxes", levels, good()["png-rgb"].data, head="db", chain=CHAIN, conf=0.95) == []


# Parameters that requests bring


def live(op: str, name: str, **params: Any) -> Callable[..., Any]:
    """The work of an operator with a live parameter, whose value is the second input."""
    return work_of(made(op, inputs=[made("input")] * 2, **{**params, name: Live(1)}), {})


def test_a_live_parameter_counts_per_item() -> None:
    """Each item is worked on with the value that comes with it."""
    top = live("top", "k")
    values = np.asarray([0.1, 0.9, 0.5], np.float32)
    for k in (1, 2, 3, 1):
        assert len(top(values, k)) == k
        assert len(top(values, np.int64(k))) == k
    labels = live("labels", "min")
    assert [len(labels(values, least)) for least in (0, 0.3, 0.95)] == [3, 2, 0]


def test_live_parameters_stand_beside_other_values() -> None:
    """Their inputs are taken out, the others arrive in order."""
    given = [made("input") for _ in range(4)]
    node = made("top", inputs=given, k=Live(2), by=lambda e, near, far: (e == near) - (e == far))
    work = work_of(node, {})
    assert work([1, 2, 3], 3, 2, 1) == [3, 2]
    assert work([1, 2, 3], 2, 1, 3) == [2]
    node = made("boxes", inputs=given[:3], head="yolov5", chain=CHAIN, conf=Live(2))
    rows = np.asarray([[32, 32, 20, 20, 0.5, 1]], np.float32)
    source = good()["png-rgb"].data
    assert len(work_of(node, {})(rows, source, 0.4)) == 1
    assert len(work_of(node, {})(rows, source, 0.6)) == 0


def test_an_expression_may_use_the_value_of_a_live_parameter() -> None:
    """`top(k, by=. * sign + k)` uses one input twice, and its values in an order of its own."""
    element, sign, k = made("input"), made("input"), made("input")
    scaled = made("binary", inputs=[element, sign], operator="*")
    key = made("binary", inputs=[scaled, k], operator="+")
    by = Expression(Body(element, ((sign, 2), (k, 1)), key), ". * sign + k")
    node = made("top", inputs=[made("input"), made("input"), made("input")], k=Live(1), by=by)
    assert work_of(node, {})([1, 3, 2], 2, 1) == [3, 2]
    assert work_of(node, {})([1, 3, 2], 1, -1) == [1]


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        ("top", "k", 0, "`k` must be a whole number from 1 to 100000, and is 0"),
        ("top", "k", 100_001, "and is 100001"),
        ("top", "k", 1.5, "`k` must be a whole number"),
        ("top", "k", True, "`k` must be a whole number from 1 to 100000, and is True"),
        ("top", "k", None, "and is None"),
        ("top", "k", "5" * 10_000, "and is '5555"),
        ("labels", "min", float("nan"), "`min` must be a number from -1e.09 to 1e.09, and is nan"),
        ("labels", "min", "high", "`min` must be a number"),
        ("join", "separator", 5, "`separator` must be a text, and is 5"),
        ("resize", "antialias", 1, "`antialias` must be true or false, and is 1"),
        ("resize", "fit", "round", "`fit` must be one of stretch, shorter, least"),
        ("resize", "size", -3, "`size` must be a whole number from 1 to 16384"),
        ("normalize", "mean", [1.0], "`mean` must be fixed in the flow"),
    ],
)
def test_a_live_value_out_of_range_is_a_bad_request(
    op: str, name: str, value: Any, message: str
) -> None:
    """The parameter, what it may be, and what it was; short, however long it was."""
    work = live(op, name)
    with pytest.raises(BadRequest, match=message) as told:
        work(np.zeros(3, np.float32), value)
    assert str(told.value).startswith(f"{op} failed: ")
    assert len(str(told.value)) < 200


def test_works_for_live_values_are_kept_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, names: Path
) -> None:
    """The same values are worked on without being made ready again; of the rest 64 are kept."""
    made_with: list[int] = []
    maker = host._MAKERS["top"]

    def counted(node: Node, settings: Any) -> Any:
        made_with.append(node.params["k"])
        return maker(node, settings)

    monkeypatch.setitem(host._MAKERS, "top", counted)
    work = live("top", "k", names=names)
    values = np.zeros(5, np.float32)
    for k in [*range(1, 65), *range(1, 65)]:
        work(values, k)
    assert made_with == list(range(1, 65))
    work(values, 65)
    work(values, 65)
    work(values, 1)
    assert made_with[64:] == [65, 1]


def test_files_of_live_operators_are_read_when_they_are_made(tmp_path: Path) -> None:
    """A request neither waits for a file nor fails for one that has gone."""
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n")
    work = live("top", "k", names=path)
    path.unlink()
    assert work(np.asarray([0.1, 0.9]), 1)[0]["label"] == "dog"
    with pytest.raises(EngineError, match="No such file"):
        live("top", "k", names=path)


def test_the_image_of_a_crop_is_no_live_parameter() -> None:
    """`crop(img)` keeps its image as an input, whatever its parameters say."""
    inputs = [made("input"), made("input", gives=Image())]
    node = made("crop_box", inputs=inputs, image=Live(1), upright=False)
    np.testing.assert_array_equal(work_of(node, {})([1, 2, 3, 4], IMAGE), IMAGE[2:4, 1:3])


def test_every_row_of_the_table_has_a_work() -> None:
    """Operators that the language has and the CPU does not would fail when they are loaded."""
    from flowlang.plan.ops import OPS

    elsewhere = {"trt", "map"}  # models are run in batches, stages for elements by the scheduler
    assert {n for n in OPS if n not in elsewhere} <= set(host._MAKERS)
