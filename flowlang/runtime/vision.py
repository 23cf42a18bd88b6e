"""What OpenCV does for the operators: bytes and arrays in, arrays out.

Layer 3, and the only file importing cv2. It knows arrays and numbers: no nodes, no settings, no
frames. Images are height x width x 3 (height x width for gray); blue, green, red as decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.diagnostics import BadRequest
from flowlang.runtime.picture import Picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

END_OF_JPEG = b"\xff\xd9"  # without it OpenCV gives nothing at all of a truncated file


def silence() -> None:
    """Keep OpenCV from writing to stderr: a bad picture is told to its sender."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode_picture(data: bytes) -> Array:
    """A picture file as an upright 8-bit image of three channels. Raises BadRequest."""
    import cv2
    import numpy as np

    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise BadRequest(f"not a picture that can be decoded ({error.err})") from None
    if image is None:
        raise BadRequest("not a picture that can be decoded")
    return image


def as_bmp(data: bytes, picture: Picture | None = None) -> bytes:
    """A picture file as an uncompressed one of the same pixels, upright. Raises BadRequest."""
    import cv2

    if picture is not None and not picture.is_complete and picture.format == "jpeg":
        data += END_OF_JPEG
    return cv2.imencode(".bmp", decode_picture(data))[1].tobytes()


def sample_pictures(count: int) -> list[bytes]:
    """Made-up photographs (JPEG, 500x375, 4:2:0) to measure decoders with, always the same."""
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        image = sum(
            cv2.resize(random.normal(0, scale, (375 // cell, 500 // cell, 3)), (500, 375))
            for cell, scale in ((1, 12.0), (4, 14.0), (16, 20.0), (64, 30.0))
        )
        levels = np.clip(image + 128, 0, 255).astype(np.uint8)
        found.append(cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes())
    return found


def resize_linear(image: Array, height: int, width: int) -> Array:
    """Another size, bilinear with half-pixel centres and no antialias."""
    import cv2

    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_antialiased(image: Array, height: int, width: int) -> Array:
    """Another size, each pixel the mean of those under a triangle as wide as the step."""
    import numpy as np

    rows, columns = image.shape[:2]
    # Rows come first, as memory has them; but what grows comes after what shrinks, so that what
    # stands between the two is no larger than the image or the result.
    if height > rows and width < columns:
        across = _filter_rows(np.swapaxes(image, 0, 1), width)
        both = _filter_rows(np.swapaxes(across, 0, 1), height)
    else:
        down = _filter_rows(image, height)
        both = np.swapaxes(_filter_rows(np.swapaxes(down, 0, 1), width), 0, 1)
    return np.clip(np.rint(both), 0, 255).astype(np.uint8)


def _filter_rows(image: Array, length: int) -> Array:
    """The image of `length` rows, float32, each the weighed mean of those near its place."""
    import numpy as np

    flat = image.reshape(len(image), -1)
    out = np.empty((length, flat.shape[1]), np.float32)
    for mean, first, weights in zip(out, *_triangles(len(flat), length), strict=True):
        near = flat[first : first + len(weights)].astype(np.float32, copy=False)
        np.dot(weights[: len(near)], near, out=mean)
    return out.reshape(length, *image.shape[1:])


def _triangles(length: int, to: int) -> tuple[Array, Array]:
    """The triangular filter that makes `length` samples `to`: for each, the first sample that
    counts, and the weights of those from there on.

    It is as wide as the step where it shrinks, and plain linear interpolation where it grows. Past
    an edge the sample at the edge repeats, as it does in plain linear interpolation.
    """
    import numpy as np

    step = length / to
    support = max(1.0, step)
    centres = (np.arange(to)[:, None] + 0.5) * step
    firsts = np.floor(centres - support).astype(np.int64)
    places = firsts + np.arange(math.ceil(2 * support) + 1)
    weights = np.clip(1 - abs(places + 0.5 - centres) / support, 0, None)
    weights /= weights.sum(1, keepdims=True)
    places = np.clip(places, 0, length - 1)
    starts = places[:, :1].copy()
    # Each weight goes to its place's column; those past an edge meet at the edge's.
    places += np.arange(to)[:, None] * places.shape[1] - starts
    inside = np.bincount(places.ravel(), weights.ravel(), weights.size)
    return starts[:, 0], inside.reshape(weights.shape).astype(np.float32)


def recolour(start: str, end: str) -> Callable[[Array], Array]:
    """What makes an image of one order of channels another: `rgb`, `bgr`, `gray`."""
    import cv2

    codes = {
        ("bgr", "rgb"): cv2.COLOR_BGR2RGB,
        ("rgb", "bgr"): cv2.COLOR_RGB2BGR,
        ("bgr", "gray"): cv2.COLOR_BGR2GRAY,
        ("rgb", "gray"): cv2.COLOR_RGB2GRAY,
    }
    code = codes.get((start, end))
    return (lambda image: image) if code is None else (lambda image: cv2.cvtColor(image, code))


def planes_by_table(image: Array, tables: Sequence[Array], out: Array | None = None) -> Array:
    """The channels of an 8-bit image, each through a table of 256 floats: channels x h x w, f32.

    `out` is memory of that shape and dtype, if there is any.
    """
    import cv2
    import numpy as np

    planes = cv2.split(image) if image.ndim == 3 else [image]
    if out is None:
        out = np.empty((len(tables), *image.shape[:2]), np.float32)
    for plane, table, target in zip(planes, tables, out, strict=True):
        cv2.LUT(plane, table, dst=target)
    return out


def flip(image: Array, axis: str) -> Array:
    """Left for right (`horizontal`) or top for bottom (`vertical`)."""
    import cv2

    return cv2.flip(image, 1 if axis == "horizontal" else 0)


def rotate(image: Array, degrees: int) -> Array:
    """A quarter turn clockwise, a half, or three quarters: 90, 180, 270."""
    import cv2

    turns = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}
    return cv2.rotate(image, turns[degrees])


def warp(image: Array, matrix: Array, height: int, width: int) -> Array:
    """The image seen through a homography: cubic, its border repeated outward.

    `matrix` is 3x3 and leads from coordinates of the result to those of the image, both with the
    centre of the first pixel at 0.5; OpenCV has it at 0.
    """
    import cv2
    import numpy as np

    half = np.asarray([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    back = np.asarray([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(
        image, back @ matrix @ half, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )


def suppress(boxes: Array, scores: Array, labels: Array, iou: float) -> Array:
    """Indices of the boxes kept, greatest score first: of those of one label that overlap by more
    than `iou`, the one with the greatest score.

    `boxes` is N x 4, left, top, right, bottom, all finite; scores are above -1.
    """
    import cv2
    import numpy as np

    if not len(boxes):
        return np.zeros(0, np.int64)
    corners = np.asarray(boxes, np.float64)
    # OpenCV keeps labels apart by moving each beyond the greatest coordinate: none may be negative.
    places = corners[:, :2] - corners[:, :2].min(0)
    sized = np.concatenate([places, corners[:, 2:] - corners[:, :2]], 1)
    kept = cv2.dnn.NMSBoxesBatched(sized.tolist(), scores.tolist(), labels.tolist(), -1.0, iou)
    return np.asarray(kept, np.int64).reshape(-1)


def grow(mask: Array) -> Array:
    """A mask one pixel larger to the right and below."""
    import cv2
    import numpy as np

    return cv2.dilate(mask, np.ones((2, 2), np.uint8))


def outlines(mask: Array) -> Iterator[Array]:
    """The outlines of the patches of a mask and of the holes in them, each N x 2 int32, x and y.

    They run through the middles of pixels, the first one's being 0.
    """
    import cv2

    found, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return (outline.reshape(-1, 2) for outline in found)


def rectangle_around(points: Array) -> tuple[Array, tuple[float, float]]:
    """The least rectangle around points, at any angle: its corners in order, 4 x 2 float32, and
    the lengths of its sides.
    """
    import cv2
    import numpy as np

    middle, (width, height), angle = cv2.minAreaRect(points)
    return np.asarray(cv2.boxPoints((middle, (width, height), angle))), (width, height)


def mean_inside(values: Array, corners: Array) -> float:
    """The mean of the values, float32 of height x width, in a polygon; 0 where it holds none."""
    import cv2
    import numpy as np

    height, width = values.shape
    (left, top), (right, bottom) = np.floor(corners.min(0)), np.ceil(corners.max(0))
    left, right = (int(min(max(x, 0), width - 1)) for x in (left, right))
    top, bottom = (int(min(max(y, 0), height - 1)) for y in (top, bottom))
    mask = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
    cv2.fillPoly(mask, [(corners - (left, top)).astype(np.int32)], 1)
    return float(cv2.mean(values[top : bottom + 1, left : right + 1], mask)[0])
