"""Heads of detectors: boxes written down as each head would give them come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from flowlang.diagnostics import StageFailed
from flowlang.runtime import boxes
from flowlang.runtime.boxes import Found, find
from flowlang.runtime.frame import Frame, Placement, through
from flowlang.runtime.vision import suppress
from tests.nodes import image_node

Array: TypeAlias = NDArray[Any]
PROPERTY = settings(max_examples=80)

HEIGHT, WIDTH = 96, 160
CELLS = [(8, 12, 20), (16, 6, 10), (32, 3, 5)]  # stride, rows, columns
ROWS = sum(down * across for _, down, across in CELLS)
CLASSES = 4
NAMES = ["cat", "dog", "cow", "hen"]


class Scene:
    """Boxes at different rows of an output, each with a class and a score; noise in the others."""

    def __init__(self, seed: int, count: int = 9) -> None:
        random = np.random.default_rng(seed)
        self.random = random
        self.rows = random.choice(ROWS, count, replace=False)
        low = random.uniform(0, (WIDTH - 30, HEIGHT - 30), (count, 2))
        size = random.uniform(4, 29, (count, 2))
        self.boxes = np.concatenate([low, low + size], 1)
        self.classes = random.integers(0, CLASSES, count)
        self.scores = random.uniform(0.5, 0.99, count)

    def middles(self) -> Array:
        """cx, cy, w, h in pixels."""
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        return np.concatenate([(low + high) / 2, high - low], 1)

    def shares(self, scores: Array) -> Array:
        """A row a box: its score at its class, less everywhere else."""
        shares = self.random.uniform(0, 0.4, (len(scores), CLASSES))
        shares[np.arange(len(scores)), self.classes] = scores
        return shares

    def check(self, found: Found) -> None:
        """All boxes are there, and nothing else."""
        order, wanted = np.argsort(-found.scores), np.argsort(-self.scores)
        np.testing.assert_allclose(found.scores[order], self.scores[wanted], atol=1e-3)
        assert found.classes[order].tolist() == self.classes[wanted].tolist()
        for one, other in zip(found.boxes[order], self.boxes[wanted], strict=True):
            assert overlap(one, other) > 0.99


def overlap(one: Array, other: Array) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod(np.clip(high - low, 0, None)))
    return shared / float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


def as_yolov5(scene: Scene) -> Array:
    """Rows of cx, cy, w, h, objectness and classes, most with next to no objectness."""
    rows = scene.random.uniform(0, 1, (ROWS, 5 + CLASSES))
    rows[:, :4] *= 100
    rows[:, 4] *= 0.2
    rows[scene.rows, :4] = scene.middles()
    rows[scene.rows, 4] = objectness = scene.random.uniform(scene.scores, 1)
    rows[scene.rows, 5:] = scene.shares(scene.scores / objectness)
    return rows.astype(np.float32)


def as_yolov8(scene: Scene) -> Array:
    """Columns of cx, cy, w, h and classes."""
    columns = scene.random.uniform(0, 0.2, (4 + CLASSES, ROWS))
    columns[:4] *= 500
    columns[:4, scene.rows] = scene.middles().T
    columns[4:, scene.rows] = scene.shares(scene.scores).T
    return columns.astype(np.float32)


def as_yolox(scene: Scene) -> Array:
    """As yolov5, but places and sizes as the network has them, by the cell of each row."""
    rows = as_yolov5(scene)
    rows[:, :4] = scene.random.normal(0, 0.7, (ROWS, 4))
    strides = np.concatenate([np.full(down * across, s) for s, down, across in CELLS])
    corners = np.concatenate(
        [np.stack(np.meshgrid(range(w), range(h)), -1).reshape(-1, 2) for _, h, w in CELLS]
    )
    middles, at = scene.middles(), scene.rows
    rows[at, :2] = middles[:, :2] / strides[at, None] - corners[at]
    rows[at, 2:4] = np.log(middles[:, 2:] / strides[at, None])
    return rows


def as_decoded_yolox(scene: Scene) -> Array:
    """As yolox, exported with its decoding: every row in pixels, near its cell."""
    rows = as_yolov5(scene)
    strides = np.concatenate([np.full(down * across, s) for s, down, across in CELLS])[:, None]
    corners = np.concatenate(
        [np.stack(np.meshgrid(range(w), range(h)), -1).reshape(-1, 2) for _, h, w in CELLS]
    )
    rows[:, :2] = (corners + scene.random.normal(0.5, 0.5, (ROWS, 2))) * strides
    rows[:, 2:4] = np.exp(scene.random.normal(0, 0.5, (ROWS, 2))) * strides
    rows[scene.rows, :4] = scene.middles()
    return rows


HEADS: dict[str, tuple[str, Callable[[Scene], Array]]] = {
    "yolov5": ("yolov5", as_yolov5),
    "yolov8": ("yolov8", as_yolov8),
    "yolov8-turned": ("yolov8", lambda scene: as_yolov8(scene).T),
    "yolox": ("yolox", as_yolox),
    "yolox-decoded": ("yolox", as_decoded_yolox),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seed", range(12))
def test_what_a_head_was_made_of_comes_back(name: str, seed: int) -> None:
    """Every box with its class and score, and none of the noise."""
    head, write = HEADS[name]
    scene = Scene(seed)
    scene.check(find(head, write(scene), 0.45, (HEIGHT, WIDTH), NAMES))


@pytest.mark.parametrize("name", HEADS)
def test_outputs_may_be_half_floats_or_one_of_several(name: str) -> None:
    """fp16 models give the same to their precision; of several outputs the large one counts."""
    head, write = HEADS[name]
    scene = Scene(3)
    output = write(scene)
    several = {"protos": np.zeros((32, 8, 8)), "output0": output[None], "few": np.zeros((3, 9))}
    scene.check(find(head, several, 0.45, (HEIGHT, WIDTH), NAMES))
    half = find(head, output.astype(np.float16), 0.45, (HEIGHT, WIDTH), NAMES)
    whole = find(head, output, 0.45, (HEIGHT, WIDTH), NAMES)
    np.testing.assert_allclose(half.boxes, whole.boxes, atol=0.3)
    np.testing.assert_allclose(half.scores, whole.scores, atol=2e-3)


def test_the_names_tell_the_axes_of_a_square_output() -> None:
    """Eight places of four classes: which axis is which only the names can say."""
    values = np.zeros((9, 8), np.float32)  # as many places as numbers, plus one
    values[2] = [30, 40, 10, 20, 0, 0.9, 0, 0]
    found = find("yolov8", values, 0.5, (96, 96), NAMES)
    assert found.boxes.tolist() == [[25, 30, 35, 50]]
    assert found.classes.tolist() == [1]
    unnamed = find("yolov8", np.ascontiguousarray(values.T), 0.5, (96, 96), None)
    assert unnamed.boxes.tolist() == [[25, 30, 35, 50]]


@pytest.mark.parametrize("size", [(96, 160), None])
def test_a_grid_that_does_not_fit_is_told(size: tuple[int, int] | None) -> None:
    """Rows that are no cells of the input are an error with the numbers, not wrong boxes."""
    rows = np.ones((ROWS + 3, 9), np.float32)
    with pytest.raises(StageFailed, match=f"the model gives {ROWS + 3}"):
        find("yolox", rows, 0.3, size, None)


def test_a_square_grid_needs_no_size() -> None:
    """Without a chain, as many rows as a square input has cells are taken for such."""
    cells = 21 * 13 * 13
    rows = np.zeros((cells, 6), np.float32)
    rows[52 * 3 + 5] = [0.5, 0.5, np.log(2), np.log(4), 1, 1]
    found = find("yolox", rows, 0.5, None, None)
    assert found.boxes.round(4).tolist() == [[36, 12, 52, 44]]


@pytest.mark.parametrize(
    ("head", "shape", "message"),
    [
        ("yolov5", (100, 5), "rows of 4 numbers, objectness and a class"),
        ("yolox", (100, 5), "rows of 4 numbers, objectness and a class"),
        ("yolov8", (4, 100), "4 numbers and a class"),
        ("yolov5", (100,), r"needs an output with two axes; the model gives `output` 100"),
        ("yolov8", (3, 8, 8), "the model gives `output` 3x8x8"),
        ("ssd", (100, 7), "needs boxes N x 4 with scores"),
    ],
)
def test_an_output_of_another_head_is_told(head: str, shape: Any, message: str) -> None:
    """What cannot be read is an error that says what was wanted and what there is."""
    with pytest.raises(StageFailed, match=message):
        find(head, np.zeros(shape, np.float32), 0.3, (96, 96), None)


# Single Shot Detectors


def boxes_of(scene: Scene) -> Array:
    """As many boxes as rows, small ones where the scene has none."""
    given = scene.random.uniform(0, 60, (ROWS, 4))
    given[:, 2:] = given[:, :2] + 5
    given[scene.rows] = scene.boxes
    return given


def scores_of(scene: Scene, background: bool) -> Array:
    """A row of scores a box, with shares of the background in front where wanted."""
    scores = scene.random.uniform(0, 0.01, (ROWS, CLASSES))
    scores[scene.rows, scene.classes] = scene.scores
    if not background:
        return scores
    scores[scene.rows] *= scene.scores[:, None] / scores[scene.rows].sum(1, keepdims=True)
    scene.scores = scores[scene.rows, scene.classes]
    return np.concatenate([1 - scores.sum(1, keepdims=True), scores], 1)


SIDES = np.asarray([WIDTH, HEIGHT, WIDTH, HEIGHT])
SSD: dict[str, Callable[[Scene], dict[str, Array]]] = {
    "pixels": lambda s: {"boxes": boxes_of(s), "scores": scores_of(s, False)},
    "shares": lambda s: {"boxes": boxes_of(s) / SIDES, "scores": scores_of(s, False)},
    "background": lambda s: {"scores": scores_of(s, True), "boxes": boxes_of(s) / SIDES},
    "wrapped": lambda s: {"loc": boxes_of(s)[None], "cls_prob": scores_of(s, True)[None]},
    "unnamed": lambda s: {"442": scores_of(s, True), "443": boxes_of(s)},
    "tensorflow": lambda s: {
        "detection_boxes": (boxes_of(s) / SIDES)[:, [1, 0, 3, 2]],
        "detection_scores": scores_of(s, False).max(1),
        "detection_classes": scores_of(s, False).argmax(1).astype(np.float32),
        "num_detections": np.asarray(ROWS, np.float32),
    },
    "labels": lambda s: {
        "bboxes": boxes_of(s) / SIDES,
        "labels": scores_of(s, False).argmax(1),
        "scores": scores_of(s, False).max(1),
    },
    "unnamed labels": lambda s: {
        "a": boxes_of(s),
        "b": scores_of(s, False).argmax(1).astype(np.float32),
        "c": scores_of(s, False).max(1)[:, None],
    },
}


@pytest.mark.parametrize("name", SSD)
@pytest.mark.parametrize("seed", range(6))
def test_ssd_outputs_are_told_by_name_and_shape(name: str, seed: int) -> None:
    """Boxes, scores and classes are found, their units and the background too."""
    scene = Scene(seed)
    outputs = {n: values.astype(np.float32) for n, values in SSD[name](scene).items()}
    scene.check(find("ssd", outputs, 0.45, (HEIGHT, WIDTH), NAMES))


def test_a_background_is_known_without_names() -> None:
    """Rows that sum to 1 have one, and classes keep the model's numbers."""
    scores = np.asarray([[0.9, 0.06, 0.04], [0.1, 0.2, 0.7], [0.98, 0.01, 0.01]], np.float32)
    given = np.asarray([[0, 0, 50, 50]] * 3, np.float32)
    found = find("ssd", {"boxes": given, "scores": scores}, 0.5, (96, 96), None)
    assert found.classes.tolist() == [2]
    assert boxes.name_of(2, ["background", "face", "mask"]) == "mask"
    named = find("ssd", {"boxes": given, "scores": scores}, 0.5, (96, 96), ["face", "mask"])
    assert named.classes.tolist() == [1]
    listed = find("ssd", {"boxes": given, "scores": scores}, 0.5, (96, 96), ["none", "a", "b"])
    assert listed.classes.tolist() == [2]


# Whatever a model gives


ODD_FLOATS = st.one_of(
    st.floats(0, 1, width=32), st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, 0.9])
)


@PROPERTY
@pytest.mark.parametrize("head", ["yolov5", "yolov8", "yolox", "ssd"])
@given(data=st.data())
def test_numbers_gone_wrong_crash_nothing(head: str, data: st.DataObject) -> None:
    """NaN, infinities and giants give boxes that are finite and inside the picture, or none."""
    shape = {"yolov8": (6, 21), "ssd": (21, 4)}.get(head, (21, 7))
    output: Any = data.draw(hnp.arrays(np.float32, shape, elements=ODD_FLOATS))
    if head == "ssd":
        scores = data.draw(hnp.arrays(np.float32, (21, 3), elements=ODD_FLOATS))
        output = {"boxes": output, "scores": scores}
    found = boxes.suppress_overlaps(find(head, output, 0.3, (32, 32), None), 0.45, 300)
    for record in boxes.detections(found, Frame.of(50, 70).placed(Placement.whole(32, 32)), None):
        left, top, right, bottom = record["box"]
        assert 0 <= left < right <= 70
        assert 0 <= top < bottom <= 50
        assert 0.3 <= record["score"] < np.inf


def test_only_what_is_sure_counts() -> None:
    """A score must reach `conf`; a score is objectness times class."""
    rows = np.asarray([[50, 50, 10, 10, 0.9, 0.5], [50, 50, 10, 10, 0.5, 0.9],
                       [20, 20, 10, 10, 0.9, 0.9]], np.float32)  # fmt: skip
    for conf, count in ((0.0, 3), (0.45, 3), (0.4501, 1), (0.8, 1), (0.82, 0)):
        assert len(find("yolov5", rows, conf, None, None).scores) == count


# What is left of them


def as_found(*rows: tuple[float, float, float, float, float, int]) -> Found:
    given = np.asarray(rows, float)
    return Found(given[:, :4], given[:, 4].astype(np.float32), given[:, 5].astype(int))


def test_overlaps_of_one_class_go() -> None:
    """The best of a heap stays, its neighbours of other classes too, greatest score first."""
    found = as_found((0, 0, 10, 10, 0.6, 0), (1, 0, 11, 10, 0.9, 0), (1, 1, 11, 11, 0.7, 1),
                     (40, 40, 50, 50, 0.8, 0), (0, 0, 10, 30, 0.5, 0))  # fmt: skip
    kept = boxes.suppress_overlaps(found, 0.45, 10)
    assert kept.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5])
    assert boxes.suppress_overlaps(found, 0.45, 2).scores.tolist() == pytest.approx([0.9, 0.8])
    assert boxes.suppress_overlaps(found, 0.2, 10).scores.tolist() == pytest.approx([0.9, 0.8, 0.7])


@pytest.mark.parametrize("most", [1, 5, 40, 300, 5000])
def test_suppression_in_parts_is_that_of_the_whole(most: int) -> None:
    """Thousands of candidates, taken a few at a time, leave the same boxes as all at once."""
    random = np.random.default_rng(5)
    low = random.uniform(0, 300, (3000, 2))
    given = np.concatenate([low, low + random.uniform(10, 60, (3000, 2))], 1)
    found = Found(given, random.random(3000).astype(np.float32), random.integers(0, 3, 3000))
    everything = suppress(found.boxes, found.scores, found.classes, 0.3)
    kept = boxes.suppress_overlaps(found, 0.3, most)
    np.testing.assert_array_equal(kept.boxes, found.boxes[everything[:most]])


def test_boxes_come_back_through_a_letterbox() -> None:
    """1280x720 in 640: what lies at the picture's corners is clipped to them, fills are dropped."""
    frame = through([image_node("resize", size=640, fit="letterbox")], np.zeros((720, 1280, 3)))
    found = as_found((-5, 130, 100, 200, 0.9, 0), (300, 140, 640.4, 500, 0.8, 7),
                     (10, 10, 50, 139, 0.7, 1))  # fmt: skip
    assert boxes.detections(found, frame, NAMES) == [
        {"box": [0, 0, 200, 120], "label": "cat", "score": pytest.approx(0.9)},
        {"box": [600, 0, 1280, 720], "label": "7", "score": pytest.approx(0.8)},
    ]


def test_boxes_of_a_turned_picture_stand_upright() -> None:
    """A box in a picture turned for the model is a box of the decoded one."""
    chain = [image_node("rotate", degrees=90), image_node("flip", axis="horizontal")]
    frame = through(chain, np.zeros((100, 200, 3)))  # both change x and y
    (record,) = boxes.detections(as_found((10, 20, 40, 60, 0.9, 0)), frame, None)
    assert record["box"] == [20, 10, 60, 40]


def test_without_a_frame_boxes_stay_as_they_are() -> None:
    """Where nobody knows what the model saw, coordinates are those of its input."""
    (record,) = boxes.detections(as_found((-1, 2, 3, 4, 0.5, 1)), None, ["a", "b"])
    assert record == {"box": [-1, 2, 3, 4], "label": "b", "score": 0.5}
    assert boxes.detections(as_found((1, 2, 3, 4, 0.5, 0)).at(np.zeros(0, int)), None, None) == []


def test_results_are_plain_python() -> None:
    """Records hold floats, lists and texts, ready to be sent."""
    (record,) = boxes.detections(as_found((1, 2, 3, 4, 0.5, 0)), Frame.of(9, 9), None)
    assert [type(v) for v in record["box"]] == [float] * 4
    assert type(record["score"]) is float
    assert type(record["label"]) is str


def test_quads_are_scaled_from_their_map() -> None:
    """A map a quarter as large as the model's input covers the same picture."""
    frame = Frame.of(200, 400).placed(Placement.whole(160, 320))
    quad = np.asarray([[10, 5], [40, 5], [40, 12], [10, 12]], np.float32)
    (line,) = boxes.text_lines([(quad, 0.75)], (40, 80), frame)
    assert line == {"quad": [[50, 25], [200, 25], [200, 60], [50, 60]], "score": 0.75}
    (bare,) = boxes.text_lines([(quad, 0.75)], (40, 80), None)
    assert bare["quad"] == quad.tolist()
