"""What a detector's head gives, as boxes in the coordinates of the decoded picture.

Layer 3, arrays and numbers: it knows no nodes and no settings. Coordinates are x to the right and y
down with the edge of the first pixel at 0; a box is left, top, right, bottom. Outputs are those of
one picture. Where a value is not finite, its box is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.diagnostics import StageFailed
from flowlang.runtime.frame import Frame
from flowlang.runtime.text_boxes import on_page
from flowlang.runtime.vision import suppress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

Size: TypeAlias = tuple[int, int]  # height and width of what the model looks at

FARTHEST = 1e6  # pixels from the picture: what lies beyond is no box, and would cost precision
YOLOX_STRIDES = (8, 16, 32)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Boxes N x 4 in pixels of the model's input, float64; their scores and their classes."""

    boxes: Array
    scores: Array
    classes: Array

    def at(self, places: Array) -> Found:
        return Found(self.boxes[places], self.scores[places], self.classes[places])


def find(
    head: str, output: Any, conf: float, size: Size | None, names: Sequence[str] | None
) -> Found:
    """The boxes of a head whose score is at least `conf`, before any is suppressed.

    `output` is an array, or arrays by name; `size` that of the model's input, where it is known.
    Raises StageFailed for an output that is not of this head.
    """
    import numpy as np

    count = len(names) if names is not None else None
    with np.errstate(all="ignore"):
        if head == "ssd":
            return ssd(output, conf, size, count)
        values = _largest(output, head).astype(np.float32, copy=False)
        if head == "yolov5":
            return yolov5(values, conf)
        if head == "yolov8":
            return yolov8(values, conf, count)
        return yolox(values, conf, size)


def _largest(output: Any, head: str) -> Array:
    """The output itself; of several, the largest with two axes. Axes of length 1 before are cut."""
    given = output if isinstance(output, Mapping) else {"output": output}
    arrays = [a for a in map(_unwrapped, given.values()) if a.ndim == 2]
    if not arrays:
        raise StageFailed(f"boxes({head}) needs an output with two axes; {_shapes(given)}")
    return max(arrays, key=lambda a: int(a.size))


def _unwrapped(values: Any) -> Array:
    import numpy as np

    array: Array = np.asarray(values)
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    return array


def _shapes(given: Mapping[str, Any]) -> str:
    said = ", ".join(f"`{n}` {'x'.join(map(str, a.shape)) or '1'}" for n, a in given.items())
    return f"the model gives {said}"


def yolov5(rows: Array, conf: float) -> Found:
    """Rows of cx, cy, w, h in pixels, objectness, and a probability a class: N x (5 + classes).

    A score is objectness times the probability of the best class. The layout is that of the
    exported Detect layer of ultralytics/yolov5 (models/yolo.py), of YOLOv6 and v7 too.
    """
    _check_columns(rows, "yolov5")
    return _of_rows(rows, conf, lambda sure: rows[sure, :4])


def _check_columns(rows: Array, head: str) -> None:
    if rows.shape[1] < 6:
        raise StageFailed(
            f"boxes({head}) needs rows of 4 numbers, objectness and a class or more; "
            f"{_shapes({'output': rows})}"
        )


def _of_rows(rows: Array, conf: float, middles: Callable[[Array], Array]) -> Found:
    """Rows whose score is at least `conf`; `middles` gives cx, cy, w, h of those at some places."""
    import numpy as np

    sure = np.flatnonzero(rows[:, 4] >= conf)  # no score is above its objectness
    shares = rows[sure, 5:]
    classes = shares.argmax(1)
    scores = shares[np.arange(len(sure)), classes] * rows[sure, 4]
    good = np.flatnonzero(scores >= conf)
    return _checked(_corners(middles(sure[good])), scores[good], classes[good])


def yolov8(values: Array, conf: float, count: int | None = None) -> Found:
    """(4 + classes) x N: cx, cy, w, h in pixels and a probability a class, without objectness.

    That of ultralytics/ultralytics (nn/modules/head.py, Detect), YOLOv8 to 11. Exports with the
    axes changed are told by the axis as long as 4 and the names, `count`; without names, by the
    shorter axis being that of the classes.
    """
    import numpy as np

    sides = values.shape
    is_turned = sides[0] > sides[1]
    if count is not None and (sides[0] == 4 + count) != (sides[1] == 4 + count):
        is_turned = sides[1] == 4 + count
    values = values.T if is_turned else values
    if len(values) < 5:
        raise StageFailed(
            "boxes(yolov8) needs 4 numbers and a class or more for each place; "
            f"{_shapes({'output': values})}"
        )
    scores = values[4:].max(0)
    sure = np.flatnonzero(scores >= conf)
    classes = values[4:, sure].argmax(0)
    return _checked(_corners(values[:4, sure].T), scores[sure], classes)


def yolox(rows: Array, conf: float, size: Size | None) -> Found:
    """Rows as yolov5 has them, one a cell of the grids of strides 8, 16 and 32: N x (5 + classes).

    Models of Megvii-BaseDetection/YOLOX are exported without `decode_in_inference`: cx and cy are
    then offsets from a cell's corner and w and h logarithms, all in strides (yolox/models/
    yolo_head.py, decode_outputs). Exports that have them in pixels are told by their centres, which
    lie at their cells; as offsets they would be hundreds of cells.
    """
    _check_columns(rows, "yolox")
    levels = _levels(len(rows), size)
    if _is_decoded(rows, levels):
        return _of_rows(rows, conf, lambda sure: rows[sure, :4])
    return _of_rows(rows, conf, lambda sure: _decoded(rows, sure, levels))


Levels: TypeAlias = tuple[tuple[int, int, int], ...]


def _levels(count: int, size: Size | None) -> Levels:
    """Of each grid: the row it starts at, its stride, and its cells from left to right."""
    if size is None:  # 21 cells for each square of 32 pixels; a square input, if it is one
        length = 32 * round((count / 21) ** 0.5)
        size = (length, length)
    start, levels = 0, []
    for stride in YOLOX_STRIDES:
        down, across = (-(-side // stride) for side in size)
        levels.append((start, stride, across))
        start += down * across
    if start != count:
        raise StageFailed(
            f"boxes(yolox) needs a row for each cell of strides 8, 16 and 32: {start} for an input "
            f"of {size[0]}x{size[1]}, and the model gives {count}"
        )
    return tuple(levels)


def _cells(places: Array, levels: Levels) -> tuple[Array, Array]:
    """Of rows at some places: the corner of each one's cell, x and y in strides, and its stride."""
    import numpy as np

    starts, strides, across = (np.asarray(column) for column in zip(*levels, strict=True))
    level = np.searchsorted(starts, places, side="right") - 1
    down, right = np.divmod(places - starts[level], across[level])
    return np.stack([right, down], 1).astype(np.float64), strides[level][:, None]


def _is_decoded(rows: Array, levels: Levels) -> bool:
    """Whether centres are pixels of the picture rather than offsets, seen at a few hundred rows."""
    import numpy as np

    places = np.unique(np.linspace(0, len(rows) - 1, 256).astype(np.int64))
    corners, strides = _cells(places, levels)
    centres = rows[places, :2].astype(np.float64)
    as_pixels = abs(centres / strides - corners).max(1)
    as_offsets = abs(centres).max(1)
    is_known = np.isfinite(as_offsets)
    if not is_known.any():
        return False
    return bool(np.median(as_pixels[is_known]) < np.median(as_offsets[is_known]))


def _decoded(rows: Array, places: Array, levels: Levels) -> Array:
    import numpy as np

    corners, strides = _cells(places, levels)
    given = rows[places, :4].astype(np.float64)
    return np.concatenate([(given[:, :2] + corners) * strides, np.exp(given[:, 2:]) * strides], 1)


def ssd(outputs: Any, conf: float, size: Size | None, count: int | None = None) -> Found:
    """Outputs by name: boxes N x 4, scores N x classes, or scores N and classes N.

    Found by their names (`box` or `loc`; `score`, `conf` or `prob`; `label` or `class`), else by
    their shapes. Boxes are left, top, right, bottom; top, left, bottom, right in `detection_boxes`,
    as TensorFlow's Object Detection API has them (exporter docs). They are taken for shares of the
    picture where no box that counts reaches beyond 2. Of scores N x classes class 0 is the
    background (Liu et al., "SSD", 2016) where there is one class more than names, whose first is
    then class 1; and where every row sums to 1, as only with a background it can.
    """
    import numpy as np

    given = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    where, boxes, scores, labels = _ssd_arrays(given)
    if labels is None and scores.ndim == 2:
        wide = scores.shape[1]
        first = 1 if wide > 1 and (wide - 1 == count or _sums_to_one(scores)) else 0
        shares = scores[:, first:]
        best = shares.argmax(1)
        scores = shares[np.arange(len(shares)), best]
        classes = best + (0 if wide - 1 == count else first)
    else:
        scores = scores.reshape(-1)
        classes = np.zeros(len(scores), np.int64) if labels is None else labels.reshape(-1)
        classes = np.where(np.isfinite(classes), classes, -1).astype(np.int64)
    sure = np.flatnonzero(scores >= conf)
    corners = boxes[sure].astype(np.float64)
    if "detection_boxes" in where:
        corners = corners[:, [1, 0, 3, 2]]
    if size is not None and abs(corners[np.isfinite(corners)]).max(initial=0) <= 2:
        corners = corners * (size[1], size[0], size[1], size[0])
    return _checked(corners, scores[sure], classes[sure])


_SCORE_WORDS = ("score", "conf", "prob")


def _ssd_arrays(given: Mapping[str, Any]) -> tuple[str, Array, Array, Array | None]:
    """The name of the boxes, the boxes, the scores, and the classes where they are apart."""
    arrays = {name: _unwrapped(values) for name, values in given.items()}
    square = {n: a for n, a in arrays.items() if a.ndim == 2 and a.shape[1] == 4}
    free = [n for n in square if _named({n: square[n]}, _SCORE_WORDS) is None]
    where = _named(square, ("box", "loc")) or next(iter(free), None)
    if where is not None:
        boxes = square[where]
        rest = {
            n: _column(a)
            for n, a in arrays.items()
            if n != where and a.ndim and a.shape[0] == len(boxes)
        }
        scored = _named(rest, _SCORE_WORDS)
        rest_of = {n: a for n, a in rest.items() if n != scored and a.ndim == 1}
        labelled = _named(rest_of, ("label", "class")) or _whole(rest_of, rest)
        scored = scored or next((n for n in rest if n != labelled), None)
        if scored is not None:
            labels = rest[labelled] if labelled and rest[scored].ndim == 1 else None
            return where, boxes, rest[scored], labels
    raise StageFailed(
        "boxes(ssd) needs boxes N x 4 with scores N x classes, or scores N and classes N; "
        f"{_shapes(given)}"
    )


def _named(arrays: Mapping[str, Array], words: Sequence[str]) -> str | None:
    return next((n for n in arrays if any(w in n.lower() for w in words)), None)


def _column(values: Array) -> Array:
    """N x 1 as N."""
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def _whole(arrays: Mapping[str, Array], rest: Mapping[str, Array]) -> str | None:
    """The one of several that holds whole numbers."""
    import numpy as np

    if len(rest) < 2:
        return None
    return next((n for n, a in arrays.items() if np.array_equal(a, np.rint(a))), None)


def _sums_to_one(scores: Array) -> bool:
    """Whether rows are shares of one whole, seen at a few hundred of them."""
    import numpy as np

    rows = scores[:: max(1, len(scores) // 256)]
    return bool(len(rows) and np.all(abs(rows.astype(np.float32).sum(1) - 1) < 0.01))


def _corners(middles: Array) -> Array:
    """cx, cy, w, h as left, top, right, bottom, float64."""
    import numpy as np

    given = middles.astype(np.float64)
    half = given[:, 2:] / 2
    return np.concatenate([given[:, :2] - half, given[:, :2] + half], 1)


def _checked(boxes: Array, scores: Array, classes: Array) -> Found:
    """Without boxes that are no boxes: not finite, of no area, or out of this world."""
    import numpy as np

    is_box = (abs(boxes) <= FARTHEST).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    good = np.flatnonzero(is_box & np.isfinite(scores))
    return Found(boxes[good], scores[good].astype(np.float32), classes[good])


def suppress_overlaps(found: Found, iou: float, most: int) -> Found:
    """Of boxes of one class that overlap by more than `iou` the best, greatest score first.

    Boxes with greater scores decide, so the first `most` are the same however many come after: the
    walk, whose cost grows with the square of what it keeps, ends where it has them.
    """
    import numpy as np

    order = np.argsort(-found.scores, kind="stable")
    tried = max(256, 2 * most)
    while True:
        found_first = found.at(order[:tried])
        kept = suppress(found_first.boxes, found_first.scores, found_first.classes, iou)
        if len(kept) >= most or tried >= len(order):
            return found_first.at(kept[:most])
        tried *= 4


def detections(
    found: Found, frame: Frame | None, names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Records of box, label and score, each box the least around its place in the decoded picture.

    Clipped to the picture; what lies outside is dropped. Without a frame boxes stay as they are.
    """
    import numpy as np

    if not len(found.boxes):
        return []
    boxes = found.boxes
    if frame is not None:
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        points = frame.to_decoded(corners).reshape(-1, 4, 2)
        size = (frame.decoded_width, frame.decoded_height)
        low, high = (np.clip(p, 0, size) for p in (points.min(1), points.max(1)))
        inside = np.flatnonzero((high > low).all(1))
        boxes, found = np.concatenate([low, high], 1)[inside], found.at(inside)
    return [
        {"box": box, "label": name_of(index, names), "score": score}
        for box, index, score in zip(
            boxes.tolist(), found.classes.tolist(), found.scores.tolist(), strict=True
        )
    ]


def name_of(index: int, names: Sequence[str] | None) -> str:
    """A class's line of the names, or its number."""
    return names[index] if names is not None and 0 <= index < len(names) else str(index)


def text_lines(
    quads: Sequence[tuple[Array, float]], size: Size, frame: Frame | None
) -> list[dict[str, Any]]:
    """Records of quad and score of quads in a map of `size`, which covers the model's input.

    In the decoded picture and clipped to it; without a frame, in pixels of the map.
    """
    import numpy as np

    if frame is None or not quads:
        return [{"quad": q.astype(np.float64).tolist(), "score": float(s)} for q, s in quads]
    scale = (frame.width / size[1], frame.height / size[0])
    points = np.concatenate([quad for quad, _ in quads]).astype(np.float64) * scale
    placed = frame.to_decoded(points).reshape(-1, 4, 2)
    carried = zip(placed, (score for _, score in quads), strict=True)
    return [
        {"quad": quad.tolist(), "score": float(score)}
        for quad, score in on_page(carried, frame.decoded_height, frame.decoded_width)
    ]


def probabilities(output: Any) -> Array:
    """The map of a text detector, height x width float32, from its output of any leading ones."""
    import numpy as np

    return np.ascontiguousarray(_largest(output, "db"), np.float32)
