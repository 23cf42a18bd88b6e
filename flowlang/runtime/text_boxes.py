"""Lines of text in a map of probabilities: what Differentiable Binarization leaves to be done.

Layer 3. Arrays in, arrays out: it knows no nodes, no settings and no frames. After Liao et al.,
"Real-time Scene Text Detection with Differentiable Binarization", 2020; the numbers that the paper
leaves open, and what is done in whole pixels, are as the PP-OCR models are run everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.runtime.vision import grow, mean_inside, outlines, rectangle_around

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]
    Found: TypeAlias = tuple[Array, float]

THINNEST = 3.0  # a patch less high than this many pixels is not text
MARGIN = 2.0  # what its offset must at least add
SAME_ROW = 10.0  # lines whose tops are closer than this many pixels stand side by side
SAGITTA = 0.25  # how far a chord of a rounded corner may lie from its arc


def text_quads(
    probabilities: Array,
    *,
    threshold: float = 0.3,
    conf: float = 0.5,
    unclip: float = 1.6,
    most: int = 1000,
    dilate: bool = True,
    row: float = SAME_ROW,
) -> list[Found]:
    """The quads of the lines in a map of height x width, each with its score, in reading order.

    A quad is 4 x 2 float32, x and y, clockwise from the top left, in pixels of the map: the edge of
    the first pixel is 0, that of the last the width or the height, beyond which a quad may reach.
    A score is the mean probability in the line's core, `conf` to 1. `most` bounds the patches
    looked at; `row` is as in `reading_order`. Values that are not finite count as no text.
    """
    import numpy as np

    is_known = np.isfinite(probabilities)
    if not is_known.all():
        probabilities = np.where(is_known, probabilities, np.float32(0))
    mask = (probabilities > threshold).view(np.uint8)
    found: list[Found] = []
    # An outline runs through the middles of pixels, and is a pixel less wide than what it holds.
    for outline in islice(outlines(grow(mask) if dilate else mask), most):
        corners, sides = rectangle_around(outline)
        if min(sides) < THINNEST:
            continue
        score = mean_inside(probabilities, corners)
        if score < conf:
            continue
        corners, sides = rectangle_around(offset(corners, offset_distance(sides, unclip)))
        if min(sides) >= THINNEST + MARGIN:
            found.append((clockwise(corners), score))
    order = reading_order([quad for quad, _ in found], row)
    return [found[index] for index in order]


def on_page(found: Iterable[Found], height: int, width: int) -> list[Found]:
    """Quads that were carried over to a page of height x width, as they are cut out of it.

    They are in whole pixels and on the page, without those that came out too thin, and again in
    reading order: rows are told apart by the page's pixels.
    """
    import numpy as np

    last = np.asarray([width - 1, height - 1], np.float32)
    kept = []
    for quad, score in found:
        placed = clockwise(np.clip(np.rint(quad), 0, last))
        sides = (placed[1] - placed[0], placed[3] - placed[0])
        if all(int(np.hypot(*side)) > THINNEST for side in sides):
            kept.append((placed, score))
    return [kept[index] for index in reading_order([quad for quad, _ in kept])]


def offset_distance(sides: tuple[float, float], unclip: float) -> float:
    """How far a rectangle's edges move outward: area times `unclip`, over the perimeter.

    The network is trained on lines shrunk by such a distance; this undoes it.
    """
    width, height = sides
    return width * height * unclip / (2 * (width + height))


def offset(corners: Array, distance: float) -> Array:
    """The outline of a rectangle grown by a distance, its corners rounded: N x 2 int32.

    The least rectangle around it has the old middle and angle, and sides longer by 2d: growing by d
    makes any shape wider by 2d in every direction. A frame turned by t against the rectangle of
    w x h is thus (w c + h s + 2d) x (w s + h c + 2d), c and s being |cos t| and |sin t|. As
    (w c + h s)(w s + h c) = w h + (w^2 + h^2) c s, and the sum of both is (w + h)(c + s), its area
    is least where c s = 0.

    That rectangle could be had without the arcs, but for the pixels: corners are cut down to whole
    ones, and points of the outline are rounded to them, which moves the quads of slanted lines by
    a pixel or two. Those with which the models are run everywhere have moved so.
    """
    import numpy as np

    whole = [(math.trunc(x), math.trunc(y)) for x, y in corners.tolist()]
    ahead = whole[1:] + whole[:1]
    # An edge's normal points out where corners follow each other clockwise, y being down.
    normals = [
        math.atan2(x - to_x, to_y - y) for (x, y), (to_x, to_y) in zip(whole, ahead, strict=True)
    ]
    turns = [
        math.remainder(normal - before, 2 * math.pi)
        for normal, before in zip(normals, normals[-1:] + normals[:-1], strict=True)
    ]
    if sum(turns) < 0:
        return offset(corners[::-1], distance)
    step = 2 * math.acos(1 - SAGITTA / max(distance, 4 * SAGITTA))
    points = [
        point
        for corner, normal, turn in zip(whole, normals, turns, strict=True)
        for point in _arc(corner, distance, normal - turn, turn, step)
    ]
    return np.asarray(points, np.int32)


def _arc(
    middle: tuple[int, int], radius: float, start: float, turn: float, step: float
) -> list[tuple[int, int]]:
    """Points on a circle, from an angle on through a turn, both ends among them."""
    count = max(1, round(abs(turn) / step))
    angles = [start + step * index for index in range(count)] + [start + turn]
    x, y = middle
    return [
        (_nearest(x + radius * math.cos(a)), _nearest(y + radius * math.sin(a))) for a in angles
    ]


def _nearest(value: float) -> int:
    """The nearest whole number; of two the one farther from 0."""
    return int(value + math.copysign(0.5, value))


def clockwise(corners: Array) -> Array:
    """The corners of a quad clockwise from the top left: the upper of the two leftmost."""
    import numpy as np

    left_to_right = sorted(corners.tolist())
    left, right = (
        sorted(side, key=lambda c: float(c[1])) for side in (left_to_right[:2], left_to_right[2:])
    )
    return np.asarray([left[0], right[0], right[1], left[1]], np.float32)


def reading_order(quads: Sequence[Array], row: float = SAME_ROW) -> list[int]:
    """Indices of quads from top to bottom, those of a row from left to right.

    What counts is the top left corner. From the top down, a quad less than `row` below the one
    before it stands in the same row.
    """
    rows: list[list[int]] = []
    before = 0.0
    for index in sorted(range(len(quads)), key=lambda i: float(quads[i][0][1])):
        top = float(quads[index][0][1])
        if not rows or top - before >= row:
            rows.append([])
        rows[-1].append(index)
        before = top
    return [i for members in rows for i in sorted(members, key=lambda i: float(quads[i][0][0]))]
