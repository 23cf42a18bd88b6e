"""Frames: where images lie in the picture they were decoded from, held against the pixels."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import flowlang
from flowlang.diagnostics import BadRequest, InternalError
from flowlang.plan.graph import Node
from flowlang.plan.ops import OPS
from flowlang.plan.rules import Mismatch
from flowlang.plan.types import Image as Kind
from flowlang.plan.types import Type
from flowlang.runtime.frame import (
    Frame,
    frame_of,
    inverse,
    moved,
    product,
    quad_matrix,
    run_framed,
    through,
    with_frame,
)
from flowlang.runtime.host import work_of
from tests.nodes import image_node, made
from tests.pictures import encode, good

Array: TypeAlias = NDArray[Any]
PROPERTY = settings(max_examples=150)
FILL, INSIDE = 114, 200


def ramp(height: int, width: int) -> Array:
    """An image whose levels tell each pixel's place: column, row, and that it is of the picture."""
    image = np.full((height, width, 3), INSIDE, np.uint8)
    image[:, :, 0] = np.arange(width)
    image[:, :, 1] = np.arange(height)[:, None]
    return image


def centres(height: int, width: int) -> Array:
    """Of all pixels, row by row, the middles: N x 2, x and y."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], 1)


def reaches(nodes: Sequence[Node], frames: Sequence[Frame]) -> list[float]:
    """In pixels of each image on the way, how far a pixel of the last one looks around itself."""
    found = [0.0]
    for node, before, after in reversed(list(zip(nodes, frames, frames[1:], strict=False))):
        if node.op != "resize":
            found.append(found[-1])
            continue
        corners = before.from_decoded(after.to_decoded([[0, 0], [1, 1]]))
        found.append(found[-1] * float(abs(corners[1] - corners[0]).max()) + 1)
    return found[::-1]


def check_places(nodes: Sequence[Node], picture: Array, image: Array, frame: Frame) -> int:
    """Each pixel of the image shows what the picture has where the frame says the pixel lies.

    Gives the number of pixels looked at: those that see no border on the way, where the samples at
    the edge repeat. Every resize rounds to whole levels, OpenCV's twice on the way.
    """
    height, width = picture.shape[:2]
    assert image.shape[:2] == (frame.height, frame.width)
    assert (frame.decoded_height, frame.decoded_width) == (height, width)
    places = frame.to_decoded(centres(frame.height, frame.width))
    frames = [through(nodes[:count], picture) for count in range(len(nodes) + 1)]
    shown = image.reshape(-1, 3).astype(float)
    looks = reaches(nodes, frames)
    beyond = looks[0] + 1
    outside = ((places < -beyond) | (places > (width + beyond, height + beyond))).any(1)
    assert (shown[outside] == FILL).all()
    inside = ((places > beyond) & (places < (width - beyond, height - beyond))).all(1)
    for between, reach in zip(frames, looks, strict=True):
        there = between.from_decoded(places)
        limits = (between.width - reach, between.height - reach)
        inside &= ((there >= reach) & (there <= limits)).all(1)
    assert (shown[inside, 2] == INSIDE).all()
    apart = shown[inside, :2] - (places[inside] - 0.5)
    resizes = sum(node.op == "resize" for node in nodes)
    assert abs(apart).max(initial=0) <= 0.8 * resizes
    if len(apart) > 100:
        assert abs(apart.mean(0)).max() <= 0.55 * resizes  # halves are rounded up
    return int(inside.sum())


SIDES = st.integers(20, 250)
STEPS = st.one_of(
    st.builds(lambda n, f: ("resize", {"size": n, "fit": f}), st.integers(30, 260),
              st.sampled_from(["stretch", "shorter", "least", "letterbox", "pad"])),
    st.builds(lambda h, w, f: ("resize", {"h": h, "w": w, "fit": f}), st.integers(30, 260),
              st.integers(30, 260), st.sampled_from(["stretch", "letterbox", "pad"])),
    st.builds(lambda n, m, k, t: ("resize", {n: m, "multiple": k, "most": t}),
              st.sampled_from(["h", "w"]), st.integers(30, 260), st.sampled_from([None, 8, 32]),
              st.sampled_from([None, 60, 300])),
    st.builds(lambda n, f, m, k: ("resize", {"size": n, "fit": f, "most": m, "multiple": k}),
              st.integers(30, 260), st.sampled_from(["shorter", "least"]), st.integers(60, 300),
              st.sampled_from([None, 32])),
    st.builds(lambda n: ("crop", {"size": n}), st.integers(10, 60)),
    st.builds(lambda n: ("crop", {"h": n}), st.integers(10, 60)),
    st.builds(lambda n: ("pad", {"multiple": n}), st.sampled_from([8, 32, 100])),
    st.builds(lambda n: ("pad", {"w": n}), st.integers(60, 400)),
    st.builds(lambda a: ("flip", {"axis": a}), st.sampled_from(["horizontal", "vertical"])),
    st.builds(lambda d: ("rotate", {"degrees": d}), st.sampled_from([90, 180, 270])),
)  # fmt: skip


def nodes_of(steps: Sequence[tuple[str, dict[str, Any]]]) -> list[Node]:
    return [image_node(op, **params) for op, params in steps]


def worked(nodes: Sequence[Node], value: Any) -> Any:
    """What the operators make of an item, one by one and without a word of frames."""
    for node in nodes:
        value = work_of(node, {})(value)
    return value


@PROPERTY
@example(height=37, width=53, steps=[("rotate", {"degrees": 90}), ("crop", {"h": 11})])
@example(height=64, width=249, steps=[("resize", {"size": 64, "fit": "letterbox"})])
@given(height=SIDES, width=SIDES, steps=st.lists(STEPS, min_size=1, max_size=4))
def test_a_frame_tells_where_each_pixel_came_from(
    height: int, width: int, steps: list[tuple[str, dict[str, Any]]]
) -> None:
    """Whatever is done to a picture, its pixels lie where the frame says, fills beside it."""
    nodes, picture = nodes_of(steps), ramp(height, width)
    try:
        result = worked(nodes, picture)
    except BadRequest:
        with pytest.raises(BadRequest):
            through(nodes, picture)
        return
    assume(min(result.shape[:2]) >= 4 and result.size < 3_000_000)
    check_places(nodes, picture, result, through(nodes, picture))


def typed(steps: Sequence[tuple[str, dict[str, Any]]]) -> tuple[int | None, int | None]:
    """Height and width that the type has after the operators, None for those that may vary."""
    kind: Type = Kind("bgr")
    for op, params in steps:
        kind = OPS[op].rule(kind, made(op, **params).params)
    assert isinstance(kind, Kind)
    return kind.height, kind.width


@PROPERTY
@given(height=SIDES, width=SIDES, steps=st.lists(STEPS, min_size=1, max_size=3))
def test_a_side_that_a_type_names_is_that_of_each_picture(
    height: int, width: int, steps: list[tuple[str, dict[str, Any]]]
) -> None:
    """What a model is promised by the check is what arrives at it."""
    try:
        sides = typed(steps)
        shape = worked(nodes_of(steps), ramp(height, width)).shape
    except (Mismatch, BadRequest):
        return
    assert all(wanted in (None, got) for wanted, got in zip(sides, shape, strict=False))


@pytest.mark.parametrize(
    ("params", "sides"),
    [
        ({"h": 32, "multiple": 32}, (32, None)),
        ({"w": 50, "multiple": 32}, (None, 64)),
        ({"h": 32, "multiple": 32, "most": 640}, (32, None)),
        ({"h": 64, "multiple": 32, "most": 640}, (None, None)),
        ({"h": 32, "most": 640}, (None, None)),
    ],
)
def test_a_side_is_known_where_all_pictures_have_it(
    params: dict[str, Any], sides: tuple[int | None, int | None]
) -> None:
    """Of lines as high as a recogniser takes the height is known, though steps bound the width."""
    assert typed([("resize", params)]) == sides


@pytest.mark.parametrize("height", [180, 250])
@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("fit", ["letterbox", "pad", "stretch", "shorter", "least"])
def test_pixels_are_where_a_chain_puts_them(height: int, degrees: int, fit: str) -> None:
    """A chain of everything, with most of its pixels in sight."""
    nodes = nodes_of([("rotate", {"degrees": degrees}), ("resize", {"size": 160, "fit": fit}),
                      ("flip", {"axis": "horizontal"}), ("crop", {"w": 130}),
                      ("pad", {"multiple": 32}), ("flip", {"axis": "vertical"})])  # fmt: skip
    picture = ramp(height, 211)
    result = worked(nodes, picture)
    assert check_places(nodes, picture, result, through(nodes, picture)) > 5000


@PROPERTY
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    steps=st.lists(STEPS, min_size=1, max_size=3),
)
def test_a_frame_knows_sizes_without_the_pixels(
    height: int, width: int, steps: list[tuple[str, dict[str, Any]]]
) -> None:
    """Height and width through a chain are those that the operators really give."""
    nodes, picture = nodes_of(steps), np.zeros((height, width, 3), np.uint8)
    try:
        frame = through(nodes, picture)
    except BadRequest:
        return
    assume(frame.height * frame.width < 2_000_000)
    assert worked(nodes, picture).shape[:2] == (frame.height, frame.width)


@pytest.mark.parametrize("name", good())
def test_a_picture_file_is_framed_by_its_header(name: str) -> None:
    """Of every good file, also those stored on their side, the frame has the upright size."""
    data = good()[name].data
    chain = [image_node("decode"), image_node("rgb")]
    frame = through(chain, data)
    assert frame == Frame.of(*worked(chain, data).shape[:2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_framed_as_it_is_decoded(orientation: int) -> None:
    """Behind every EXIF orientation the pixels lie where the frame says."""
    upright = ramp(61, 97)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(upright[:, :, ::-1]).save(out, "PNG", exif=exif)
    nodes = nodes_of([("decode", {}), ("resize", {"size": 80, "fit": "letterbox"}),
                      ("flip", {"axis": "vertical"})])  # fmt: skip
    picture = worked(nodes[:1], out.getvalue())
    moved_about = ramp(*picture.shape[:2])
    result = worked(nodes[1:], moved_about)
    assert check_places(nodes[1:], moved_about, result, through(nodes, out.getvalue())) > 1000


@pytest.mark.parametrize(
    ("fit", "left", "top"), [("letterbox", 0, 140), ("pad", 0, 0)], ids=["letterbox", "pad"]
)
def test_a_letterbox_is_undone_to_the_pixel(fit: str, left: int, top: int) -> None:
    """1280x720 in 640x640 is half as large, with 140 rows above and below where it is centred."""
    frame = through([image_node("resize", size=640, fit=fit)], np.zeros((720, 1280, 3), np.uint8))
    corners = [[left, top], [left + 640, top + 360], [left + 320, top + 180]]
    np.testing.assert_allclose(frame.to_decoded(corners), [[0, 0], [1280, 720], [640, 360]])


@PROPERTY
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), size=st.integers(32, 1280))
def test_a_letterbox_covers_the_whole_picture(height: int, width: int, size: int) -> None:
    """The picture's corners lie at whole pixels in a letterbox, touching two of its edges."""
    frame = through(
        [image_node("resize", size=size, fit="letterbox")],
        np.broadcast_to(np.uint8(0), (height, width, 3)),
    )
    (left, top), (right, bottom) = frame.from_decoded([[0, 0], [width, height]])
    for edge in (left, top, right, bottom):
        assert edge == pytest.approx(round(edge), abs=1e-6)
    assert (left == pytest.approx(0, abs=1e-6) and right == pytest.approx(size)) or (
        top == pytest.approx(0, abs=1e-6) and bottom == pytest.approx(size)
    )
    # Both scales are the same but for the rounding of a side to whole pixels.
    scale = min(size / width, size / height)
    assert right - left == pytest.approx(max(1, width * scale), abs=0.5 + 1e-6)
    assert bottom - top == pytest.approx(max(1, height * scale), abs=0.5 + 1e-6)


@PROPERTY
@given(
    height=SIDES,
    width=SIDES,
    steps=st.lists(STEPS, max_size=4),
    points=st.lists(st.tuples(st.floats(-50, 300), st.floats(-50, 300)), min_size=1, max_size=5),
)
def test_the_way_back_undoes_the_way_there(
    height: int, width: int, steps: list[Any], points: list[tuple[float, float]]
) -> None:
    """`from_decoded` and `to_decoded` undo each other."""
    try:
        frame = through(nodes_of(steps), np.zeros((height, width, 3), np.uint8))
    except BadRequest:
        return
    np.testing.assert_allclose(frame.to_decoded(frame.from_decoded(points)), points, atol=1e-6)


QUADS = st.tuples(*[st.tuples(st.floats(-8, 8), st.floats(-8, 8))] * 4)


@PROPERTY
@given(nudges=QUADS, height=st.floats(1, 200), width=st.floats(1, 200))
def test_a_quad_has_the_corners_of_its_rectangle(
    nudges: Sequence[tuple[float, float]], height: float, width: float
) -> None:
    """The homography of a quad takes a rectangle's corners to the quad's, and its inverse back."""
    square = [(10.0, 20.0), (60.0, 20.0), (60.0, 60.0), (10.0, 60.0)]
    quad = [(x + a, y + b) for (x, y), (a, b) in zip(square, nudges, strict=True)]
    matrix = quad_matrix(quad, height, width)
    rectangle = [(0, 0), (width, 0), (width, height), (0, height)]
    np.testing.assert_allclose(moved(rectangle, matrix), quad, atol=1e-6)
    np.testing.assert_allclose(moved(quad, inverse(matrix)), rectangle, atol=1e-5)
    wanted = cv2.getPerspectiveTransform(
        np.asarray(rectangle, np.float32), np.asarray(quad, np.float32)
    )
    inner = [(width / 3, height / 2), (width / 5, height / 7)]
    np.testing.assert_allclose(
        moved(inner, matrix), cv2.perspectiveTransform(np.asarray([inner]), wanted)[0], atol=1e-2
    )


def test_homographies_follow_each_other() -> None:
    """A product is its second factor first."""
    shift = (1.0, 0.0, 5.0, 0.0, 1.0, 7.0, 0.0, 0.0, 1.0)
    double = (2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 1.0)
    assert moved([[1, 1]], product(double, shift)).tolist() == [[12, 16]]
    assert moved([[1, 1]], product(shift, double)).tolist() == [[7, 9]]


def test_an_operator_that_moves_pixels_unforeseen_is_our_fault() -> None:
    """A chain with an operator whose geometry is unknown is an InternalError, not a wrong box."""
    with pytest.raises(InternalError, match="softmax"):
        through([made("softmax")], np.zeros((4, 4, 3), np.uint8))


# Images that carry a frame


def test_an_image_carries_its_frame_and_its_views_do_not() -> None:
    """Slices, copies and arithmetic lose the frame rather than keep one that is wrong."""
    image = np.zeros((20, 30, 3), np.uint8)
    assert frame_of(image) == Frame.of(20, 30)
    frame = Frame.of(50, 60).cropped(3, 4, 20, 30)
    framed = with_frame(image, frame)
    assert frame_of(framed) == frame
    assert np.shares_memory(framed, image)
    for other in (framed[2:8], framed.copy(), framed + 1, framed.view(), framed.T[0],
                  copy.deepcopy(framed), np.asarray(framed)):  # fmt: skip
        assert frame_of(other) == Frame.of(*other.shape[:2])
    assert frame_of(framed) == frame
    assert frame_of(image) == Frame.of(20, 30)


def test_opencv_takes_a_framed_image() -> None:
    """It is an array like any other, whole or in part."""
    random = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    framed = with_frame(random, Frame.of(50, 60).cropped(3, 4, 20, 30))
    np.testing.assert_array_equal(cv2.resize(framed, (7, 9)), cv2.resize(random, (7, 9)))
    wanted = cv2.cvtColor(np.ascontiguousarray(random[3:, 5:]), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(cv2.cvtColor(framed[3:, 5:], cv2.COLOR_BGR2RGB), wanted)


def framed_by(nodes: Sequence[Node], value: Any, extras: Sequence[Any] = ()) -> Any:
    return run_framed([work_of(n, {}) for n in nodes], nodes, value, extras)


@PROPERTY
@given(
    height=SIDES, width=SIDES, first=st.lists(STEPS, max_size=3), then=st.lists(STEPS, max_size=2)
)
def test_frames_go_on_from_stage_to_stage(
    height: int, width: int, first: list[Any], then: list[Any]
) -> None:
    """A chain cut into two stages gives the same pixels in the same frame as in one."""
    picture = ramp(height, width)
    try:
        whole = framed_by(nodes_of([*first, *then]), picture)
    except BadRequest:
        return
    between = framed_by(nodes_of(first), picture)
    parts = framed_by(nodes_of(then), between)
    np.testing.assert_array_equal(parts, whole)
    for one, other in zip(frame_of(parts).matrix, frame_of(whole).matrix, strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-9)
    assert through(nodes_of(then), between) == frame_of(parts)


def test_a_decoded_picture_starts_a_frame() -> None:
    """From bytes the frame is that of the pixels, which are then at hand."""
    data = good()["jpeg-exif-6"].data
    image = framed_by(nodes_of([("decode", {}), ("crop", {"size": 40})]), data)
    assert frame_of(image).matrix[2] == (121 - 40) // 2
    assert frame_of(image).matrix[5] == (83 - 40) // 2
    plain = framed_by(nodes_of([("decode", {}), ("rgb", {})]), data)
    assert type(plain) is np.ndarray, "whole pictures need no frame"


def test_what_is_packed_carries_no_frame() -> None:
    """A model's input is no image any more."""
    pack = image_node("pack", layout="chw", dtype="f32", mean=None, std=None)
    packed = framed_by([image_node("crop", size=8), pack], ramp(20, 20))
    assert type(packed) is np.ndarray
    assert packed.shape == (3, 8, 8)


def test_a_chain_may_begin_with_a_box() -> None:
    """What is cut out of an image goes on in its frame."""
    after = nodes_of([("resize", {"size": 64}), ("flip", {"axis": "vertical"})])
    picture = ramp(120, 200)
    part = framed_by([made("crop_box"), *after], [40.0, 30.0, 72.0, 62.0], [(picture,), (), ()])
    np.testing.assert_allclose(frame_of(part).to_decoded([[0, 64], [64, 0]]), [[40, 30], [72, 62]])
    places = frame_of(part).to_decoded(centres(64, 64)).reshape(64, 64, 2)[1:-1, 1:-1]
    assert np.abs(np.asarray(part)[1:-1, 1:-1, :2] - (places - 0.5)).max() <= 0.8


# Images as others get them


def test_who_knows_no_frames_gets_plain_arrays(tmp_path: Path) -> None:
    """What leaves an app, alone or inside of something, and what operators in Python are given."""
    (tmp_path / "ops.py").write_text(
        "import numpy as np\n"
        "def kind(image: np.ndarray) -> str: return type(image).__name__\n"
        "def kinds(images: list[np.ndarray]) -> str:\n"
        "    return ' '.join(f'{type(i).__name__} {i.flags.writeable}' for i in images)\n"
    )
    (tmp_path / "app.flow").write_text(
        'use "ops.py" as ops\n'
        "flow small = decode -> rgb -> resize(8)\n"
        "export flow one = small\n"
        "export flow many = small -> { one: cut(h=4), two: { three: crop(4) } }\n"
        "export flow kind = small -> { one: ops.kind, all: cut(h=4) -> ops.kinds }\n"
    )
    picture = encode(Image.fromarray(ramp(37, 53)), "PNG")
    with flowlang.load(tmp_path / "app.flow", device="cpu") as app:
        many = app["many"](picture)
        images = [app["one"](picture), *many["one"], many["two"]["three"]]
        images += app["one"].map([picture])
        assert {type(image) for image in images} == {np.ndarray}
        assert np.array_equal(pickle.loads(pickle.dumps(images[0])), images[0])
        given = {"one": "ndarray", "all": "ndarray False ndarray False"}
        assert app["kind"](picture) == given
