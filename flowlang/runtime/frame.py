"""Where an image lies in the picture it was decoded from, through all that was done to it.

Layer 3, numbers only: it never looks at pixels. Coordinates are continuous, x to the right and y
down, the edge of the first pixel at 0 and its centre at 0.5, so that scaling is multiplication.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.diagnostics import BadRequest, InternalError
from flowlang.plan import graph
from flowlang.plan.graph import Node
from flowlang.plan.physical import MAX_PIXELS
from flowlang.plan.rules import free_size, nearest, sides_of
from flowlang.runtime.exif import upright_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

Params: TypeAlias = Mapping[str, Any]
Matrix: TypeAlias = tuple[float, float, float, float, float, float, float, float, float]
Point: TypeAlias = tuple[float, float]

IDENTITY: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def product(a: Matrix, b: Matrix) -> Matrix:
    """The homography that is `b` and then `a`."""
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = a
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = b
    return (
        a0 * b0 + a1 * b3 + a2 * b6, a0 * b1 + a1 * b4 + a2 * b7, a0 * b2 + a1 * b5 + a2 * b8,
        a3 * b0 + a4 * b3 + a5 * b6, a3 * b1 + a4 * b4 + a5 * b7, a3 * b2 + a4 * b5 + a5 * b8,
        a6 * b0 + a7 * b3 + a8 * b6, a6 * b1 + a7 * b4 + a8 * b7, a6 * b2 + a7 * b5 + a8 * b8,
    )  # fmt: skip


def inverse(m: Matrix) -> Matrix:
    """The homography back. Raises ZeroDivisionError where there is none."""
    a, b, c, d, e, f, g, h, i = m
    down = 1 / (a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))
    return (
        (e * i - f * h) * down, (c * h - b * i) * down, (b * f - c * e) * down,
        (f * g - d * i) * down, (a * i - c * g) * down, (c * d - a * f) * down,
        (d * h - e * g) * down, (b * g - a * h) * down, (a * e - b * d) * down,
    )  # fmt: skip


def moved(points: Any, matrix: Matrix) -> Array:
    """N x 2 points through a homography, float64; those it sends to infinity are not finite."""
    import numpy as np

    given = np.asarray(points, np.float64).reshape(-1, 2)
    full = np.asarray(matrix, np.float64).reshape(3, 3)
    out: Array = given @ full[:2, :2].T + full[:2, 2]
    if matrix[6] == 0 == matrix[7]:
        return out if matrix[8] == 1 else out / matrix[8]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(out / (given @ full[2, :2] + full[2, 2])[:, None])


def quad_matrix(quad: Sequence[Point], height: float, width: float) -> Matrix:
    """The homography from a rectangle of height x width to a quad, corners clockwise.

    After Heckbert, "Fundamentals of Texture Mapping and Image Warping", 1989, 2.2.3. Raises
    ZeroDivisionError where three corners lie on a line.
    """
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = quad
    dx1, dx2, sx = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, sy = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    turn = dx1 * dy2 - dx2 * dy1
    g = (sx * dy2 - dx2 * sy) / turn
    h = (dx1 * sy - sx * dy1) / turn
    unit = (
        x1 - x0 + g * x1, x3 - x0 + h * x3, x0,
        y1 - y0 + g * y1, y3 - y0 + h * y3, y0,
        g, h, 1.0,
    )  # fmt: skip
    return product(unit, (1 / width, 0.0, 0.0, 0.0, 1 / height, 0.0, 0.0, 0.0, 1.0))


@dataclass(frozen=True, slots=True)
class Placement:
    """What a resize does: the image scaled to inner_height x inner_width, at left and top of one
    of height x width.
    """

    inner_height: int
    inner_width: int
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def whole(cls, height: int, width: int) -> Placement:
        return cls(height, width, 0, 0, height, width)


@dataclass(frozen=True, slots=True)
class Frame:
    """An image's height and width, and where it lies in the decoded picture.

    `matrix` is the 3x3 homography, row by row, from this image's coordinates to the picture's.
    """

    matrix: Matrix
    height: int
    width: int
    decoded_height: int
    decoded_width: int

    @classmethod
    def of(cls, height: int, width: int) -> Frame:
        """That of a picture as it was decoded."""
        return cls(IDENTITY, height, width, height, width)

    @property
    def is_whole(self) -> bool:
        """Whether it is the decoded picture itself, as far as coordinates can tell."""
        size, decoded = (self.height, self.width), (self.decoded_height, self.decoded_width)
        return size == decoded and self.matrix == IDENTITY

    @property
    def is_straight(self) -> bool:
        """Whether upright rectangles of the picture are upright here, also turned by quarters."""
        a, b, _, d, e, _, g, h, _ = self.matrix
        return g == h == 0 and (b == d == 0 or a == e == 0)

    def warped(self, matrix: Matrix, height: int, width: int) -> Frame:
        """That of a new image, given the way from its coordinates to those of this one."""
        whole = product(self.matrix, matrix)
        return Frame(whole, height, width, self.decoded_height, self.decoded_width)

    def placed(self, place: Placement) -> Frame:
        """That of the image resized, letterboxed or padded."""
        across, down = self.width / place.inner_width, self.height / place.inner_height
        matrix = (across, 0.0, -place.left * across, 0.0, down, -place.top * down, 0.0, 0.0, 1.0)
        return self.warped(matrix, place.height, place.width)

    def padded(self, height: int, width: int) -> Frame:
        """That of the image with more room at its right and bottom."""
        return self.warped(IDENTITY, height, width)

    def cropped(self, top: int, left: int, height: int, width: int) -> Frame:
        matrix = (1.0, 0.0, float(left), 0.0, 1.0, float(top), 0.0, 0.0, 1.0)
        return self.warped(matrix, height, width)

    def flipped(self, axis: str) -> Frame:
        """That of the image with left for right (`horizontal`) or top for bottom (`vertical`)."""
        if axis == "horizontal":
            matrix = (-1.0, 0.0, float(self.width), 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
        else:
            matrix = (1.0, 0.0, 0.0, 0.0, -1.0, float(self.height), 0.0, 0.0, 1.0)
        return self.warped(matrix, self.height, self.width)

    def rotated(self, degrees: int) -> Frame:
        """That of the image turned clockwise by 90, 180 or 270 degrees."""
        high, wide = float(self.height), float(self.width)
        if degrees == 180:
            matrix = (-1.0, 0.0, wide, 0.0, -1.0, high, 0.0, 0.0, 1.0)
            return self.warped(matrix, self.height, self.width)
        if degrees == 90:
            matrix = (0.0, 1.0, 0.0, -1.0, 0.0, high, 0.0, 0.0, 1.0)
        else:
            matrix = (0.0, -1.0, wide, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
        return self.warped(matrix, self.width, self.height)

    def to_decoded(self, points: Any) -> Array:
        """N x 2 points of this image in the decoded picture, float64."""
        return moved(points, self.matrix)

    def from_decoded(self, points: Any) -> Array:
        """N x 2 points of the decoded picture in this image, float64."""
        return moved(points, inverse(self.matrix))


# Images that carry their frame


@functools.cache
def _framed() -> type[Any]:
    import numpy as np

    class Framed(np.ndarray[Any, Any]):
        """An image that knows its frame; views and results of arithmetic do not have it."""

        frame: Frame | None = None

    return Framed


def with_frame(array: Array, frame: Frame) -> Array:
    """The same pixels as an image that carries a frame."""
    framed: Any = array.view(_framed())
    framed.frame = frame
    return framed  # type: ignore[no-any-return]


def frame_of(array: Array) -> Frame:
    """The frame an image carries; where it carries none, it is as it was decoded."""
    frame: Frame | None = getattr(array, "frame", None)
    return Frame.of(*array.shape[:2]) if frame is None else frame


def without_frames(value: Any) -> Any:
    """A value for who knows no frames: its images are plain arrays of the same pixels."""
    if isinstance(value, dict):
        return {name: without_frames(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_frames(part) for part in value]
    if getattr(value, "frame", None) is None:
        return value
    import numpy as np

    return value.view(np.ndarray)


# What the operators do to sizes


def inner_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a picture of rows x columns made to fit inside height x width."""
    to, of = (height, rows) if height * columns < width * rows else (width, columns)
    return nearest(rows * to, of), nearest(columns * to, of)


def resize_placement(rows: int, columns: int, params: Params) -> Placement:
    """What `resize` does to an image of rows x columns. Raises BadRequest."""
    fit = params["fit"]
    height, width = sides_of(params)
    if has_free_size(params):
        to_h, to_w = free_size(rows, columns, params)
        if to_h * to_w > MAX_PIXELS:
            raise BadRequest(
                f"an image of {rows}x{columns} would become one of {to_h}x{to_w}, of more than "
                f"{MAX_PIXELS:,} pixels"
            )
        return Placement.whole(to_h, to_w)
    if fit == "letterbox" or fit == "pad":
        to_h, to_w = inner_size(rows, columns, height, width)
        is_centred = fit == "letterbox"
        top, left = ((height - to_h) // 2, (width - to_w) // 2) if is_centred else (0, 0)
        return Placement(to_h, to_w, top, left, height, width)
    return Placement.whole(height, width)


def has_free_size(params: Params) -> bool:
    """Whether the shape of a picture decides what size `resize` makes of it."""
    return params["fit"] in ("shorter", "least") or None in sides_of(params)


def crop_place(rows: int, columns: int, params: Params) -> tuple[int, int, int, int]:
    """Top, left, height and width of what the centre `crop` cuts out. Raises BadRequest."""
    height, width = sides_of(params)
    h, w = height or rows, width or columns
    if rows < h or columns < w:
        raise BadRequest(f"an image of {rows}x{columns} has no centre of {h}x{w}")
    return (rows - h) // 2, (columns - w) // 2, h, w


def pad_size(rows: int, columns: int, params: Params) -> tuple[int, int]:
    """Height and width that `pad` makes of rows x columns. Raises BadRequest."""
    (height, width), step = sides_of(params), params["multiple"] or 1
    h, w = (math.ceil(side / step) * step for side in (height or rows, width or columns))
    if rows > h or columns > w:
        raise BadRequest(f"an image of {rows}x{columns} is larger than {h}x{w}")
    return h, w


def _resize(params: Params, frame: Frame) -> Frame:
    return frame.placed(resize_placement(frame.height, frame.width, params))


def _crop(params: Params, frame: Frame) -> Frame:
    return frame.cropped(*crop_place(frame.height, frame.width, params))


def _pad(params: Params, frame: Frame) -> Frame:
    return frame.padded(*pad_size(frame.height, frame.width, params))


def _keep(params: Params, frame: Frame) -> Frame:
    return frame


_STEPS: Mapping[str, Callable[[Params, Frame], Frame]] = {
    "decode": _keep,
    "resize": _resize,
    "rgb": _keep,
    "bgr": _keep,
    "gray": _keep,
    "crop": _crop,
    "pad": _pad,
    "flip": lambda params, frame: frame.flipped(params["axis"]),
    "rotate": lambda params, frame: frame.rotated(params["degrees"]),
    "normalize": _keep,
    "pass": _keep,
    graph.PACK: _keep,
}


def through(nodes: Sequence[Node], source: Any) -> Frame:
    """The frame of what a chain of image operators makes of a source, without touching pixels.

    The source is a picture file, or an image with its own frame. Raises BadRequest as the operators
    would.
    """
    is_file = isinstance(source, (bytes, bytearray, memoryview))
    frame = Frame.of(*upright_size(bytes(source))) if is_file else frame_of(source)
    for node in nodes:
        frame = framed_by(node, frame)
    return frame


def framed_by(node: Node, frame: Frame) -> Frame:
    """The frame of what an image operator makes of an image with this one. Raises BadRequest."""
    step = _STEPS.get(node.op)
    if step is None:
        raise InternalError(f"`{node.op}` stands between a picture and a model")
    return step(node.params, frame)


def run_framed(
    works: Sequence[Callable[..., Any]],
    nodes: Sequence[Node],
    value: Any,
    extras: Sequence[Sequence[Any]] = (),
) -> Any:
    """What a chain of image operators makes of an item, an image with its frame.

    `works` are those of the nodes, and `extras`, where given, the further values each one takes.
    Operators that tell frames themselves (`crop_box`, `cut`) may stand anywhere in the chain, and
    what is no image in the end is given as it is.
    """
    import numpy as np

    frame = frame_of(value) if isinstance(value, np.ndarray) else None
    for index, (work, node) in enumerate(zip(works, nodes, strict=True)):
        value = work(value, *extras[index]) if extras else work(value)
        step = _STEPS.get(node.op)
        if step is not None and frame is not None:
            frame = step(node.params, frame)
        else:
            frame = frame_of(value) if isinstance(value, np.ndarray) else None
    is_packed = any(node.op == graph.PACK for node in nodes)
    if frame is None or is_packed or frame.is_whole:
        return value
    return with_frame(value, frame)
