"""The CPU implementation of every operator: the reference for all others.

Layer 3. Operators on images stand here, those on what models give in `flowlang.runtime.results`;
OpenCV is behind `flowlang.runtime.vision`. Images are numpy arrays of height x width x 3 (height x
width for gray), 8-bit levels; an image of undecided colour is blue, green, red, as OpenCV decodes.
"""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from flowlang.diagnostics import BadRequest, EngineError, RequestError, StageFailed
from flowlang.plan import graph
from flowlang.plan.expression import Expression, failure
from flowlang.plan.graph import Live, Node
from flowlang.plan.ops import OPS, Param
from flowlang.plan.physical import MAX_BYTES, MAX_PIXELS
from flowlang.plan.rewrite import levels_of
from flowlang.plan.types import Image
from flowlang.runtime import results, row_ops, vision
from flowlang.runtime.frame import (
    Frame,
    crop_place,
    frame_of,
    pad_size,
    product,
    quad_matrix,
    resize_placement,
    with_frame,
)
from flowlang.runtime.picture import Picture, UnreadablePicture, plain_jpeg_size, read_picture
from flowlang.runtime.results import lines_of
from flowlang.runtime.row_ops import RowWork

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

Work: TypeAlias = results.Work

MAX_WORKS = 64  # kept for values that requests bring
UPRIGHT = 1.5  # taller than this for its width, a line of text runs downwards
LONGEST = 16384  # side of what is cut out of a quad
FAR_SMALLER = 4  # times, from which on a part of an image is copied


def work_of(node: Node, settings: Mapping[str, Any]) -> Work:
    """What an operator does to one item, given the values of the node's further inputs too.

    The function raises RequestError for an item it cannot work on, with the operator and its place.
    """
    lives = _lives(node)
    inner = _live_work(node, settings, lives) if lives else _MAKERS[node.op](node, settings)
    name, place = "crop" if node.op == graph.CUT_OUT else node.op, str(node.span)

    def work(value: Any, *extras: Any) -> Any:
        try:
            return inner(value, *extras)
        except RequestError as error:
            error.message = f"{name} failed: {error.message}"
            error.stage, error.place = name, place
            raise
        except Exception as error:
            message = f"{name} failed: {failure(error)}"
            raise StageFailed(message, stage=name, place=place) from error

    return work


def row_work_of(node: Node) -> RowWork | None:
    """What an operator does to all rows of a batch; None where each needs work of its own."""
    make = row_ops.MAKERS.get(node.op)
    if make is None or _lives(node) or node.params.get("by") is not None:
        return None
    return make(node)


# Parameters that requests bring


def _lives(node: Node) -> list[tuple[Param, int]]:
    """The parameters known only with a request, each with the index of the input that has it.

    A parameter that is a value of the flow (the image of `crop`) is an item like any other.
    """
    op = OPS.get(node.op)
    rows = [(op.param(n), v) for n, v in node.params.items() if isinstance(v, Live)] if op else []
    return [(p, v.index) for p, v in rows if p is not None and p.kind != "value"]


def _live_work(node: Node, settings: Mapping[str, Any], lives: Sequence[tuple[Param, int]]) -> Work:
    """One inner work for each tuple of values, made when it first comes and kept for a while."""
    make = _MAKERS[node.op]
    # Files are read now: later they may be gone, and a request is not the time to read them.
    known = {n: lines_of(v) if isinstance(v, Path) else v for n, v in node.params.items()}
    others = _others(node, lives)
    # Who sends a value knows it by the name that the flow has for it.
    named = [(param, index, node.inputs[index].params.get("called")) for param, index in lives]

    @functools.lru_cache(maxsize=MAX_WORKS)
    def work_with(values: tuple[Any, ...]) -> Work:
        live = {param.name: value for (param, _), value in zip(lives, values, strict=True)}
        return make(replace(node, params={**known, **live}), settings)

    def work(value: Any, *extras: Any) -> Any:
        values = tuple(_checked(p, extras[index - 1], called) for p, index, called in named)
        return work_with(values)(value, *(extras[index - 1] for index in others))

    return work


def _others(node: Node, lives: Sequence[tuple[Param, int]]) -> list[int]:
    """The inputs that a work gets besides its item, where some are its parameters.

    An expression takes the values it uses, which may be those of parameters too.
    """
    for value in node.params.values():
        if isinstance(value, Expression):
            return [index for _, index in value.body.captures]
    taken = {0, *(index for _, index in lives)}
    return [index for index in range(len(node.inputs)) if index not in taken]


_KINDS: Mapping[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "number": (Real, "a number"),
    "str": (str, "a text"),
    "word": (str, "a word"),
    "flag": (bool, "true or false"),
}


def _checked(param: Param, value: Any, called: str | None) -> Any:
    """A value that a request brings, as the parameter's kind. Raises BadRequest."""
    kind, wanted = _KINDS.get(param.kind, (tuple, "fixed in the flow"))
    low, high = param.low, param.high
    is_kind = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if param.words:
        is_kind, wanted = value in param.words, "one of " + ", ".join(param.words)
    elif low is not None and high is not None:
        wanted = f"{wanted} from {low:g} to {high:g}"
    elif low is not None or high is not None:
        wanted += f" of at least {low:g}" if low is not None else f" of at most {high:g}"
    too_low = is_kind and low is not None and not value >= low  # `not`, for NaN is neither
    too_high = is_kind and high is not None and not value <= high
    if not is_kind or too_low or too_high:
        own = f"`{param.name}`"
        which = "" if called in (None, own) else f"{called} "
        raise BadRequest(f"{own} must be {wanted}, and {which}is {reprlib.repr(value)}")
    return int(value) if kind is Integral else float(value) if kind is Real else value


# Pictures to images


def _decode(node: Node, settings: Mapping[str, Any]) -> Work:
    vision.silence()
    max_bytes = settings.get("max_bytes", MAX_BYTES)
    max_pixels = settings.get("max_pixels", MAX_PIXELS)
    allows_truncated = node.params["truncated"] == "allow"

    def work(data: bytes) -> Array:
        if len(data) > max_bytes or plain_jpeg_size(data, max_pixels) is None:
            picture = check_picture(data, max_bytes, max_pixels, allows_truncated)
            if not picture.is_complete and picture.format == "jpeg":
                data += vision.END_OF_JPEG
        return vision.decode_picture(data)

    return work


def check_picture(
    data: bytes, max_bytes: int, max_pixels: int, allows_truncated: bool = False
) -> Picture:
    """The header of a picture file. Raises BadRequest where it must not reach a decoder."""
    if len(data) > max_bytes:
        raise BadRequest(f"a file of {len(data):,} bytes, and `max_bytes` is {max_bytes:,}")
    try:
        picture = read_picture(data)
    except UnreadablePicture as error:
        raise BadRequest(str(error)) from None
    if picture.width * picture.height > max_pixels:
        raise BadRequest(
            f"a picture of {picture.width}x{picture.height} pixels, and `max_pixels` is "
            f"{max_pixels:,}"
        )
    if picture.tile_pixels > max_pixels:
        raise BadRequest(
            f"a picture of {picture.width}x{picture.height} pixels in tiles of "
            f"{picture.tile_pixels:,}, and `max_pixels` is {max_pixels:,}"
        )
    if not picture.is_complete and not allows_truncated:
        raise BadRequest("the file ends before its picture is complete (truncated)")
    return picture


# Images to images


def _resize(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    params = node.params
    scale_to = vision.resize_antialiased if params["antialias"] else vision.resize_linear
    fills = params["fit"] in ("letterbox", "pad")

    def work(image: Array) -> Array:
        rows, columns = image.shape[:2]
        place = resize_placement(rows, columns, params)
        small = scale_to(image, place.inner_height, place.inner_width)
        if not fills:
            return small
        return _surrounded(
            small, place.top, place.left, place.height, place.width, params["fill"], np.uint8
        )

    return work


def _surrounded(
    image: Array, top: int, left: int, height: int, width: int, fill: int, dtype: Any
) -> Array:
    """The image inside a larger one that is filled with a level."""
    import numpy as np

    out = np.full((height, width, *image.shape[2:]), fill, dtype)
    out[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out


def _colour(node: Node, settings: Mapping[str, Any]) -> Work:
    given = node.inputs[0].type
    start = (given.colour if isinstance(given, Image) else None) or "bgr"
    return vision.recolour(start, node.op)


def _crop(node: Node, settings: Mapping[str, Any]) -> Work:
    params = node.params

    def work(image: Array) -> Array:
        rows, columns = image.shape[:2]
        top, left, height, width = crop_place(rows, columns, params)
        return _part(image, slice(top, top + height), slice(left, left + width))

    return work


def _part(image: Array, rows: slice, columns: slice) -> Array:
    """What lies there in an image: a view, or a copy of what is far smaller than the memory that
    a view would keep.
    """
    import numpy as np

    part = image[rows, columns]
    owner = image
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return part.copy() if part.nbytes * FAR_SMALLER < owner.nbytes else part


def _pad(node: Node, settings: Mapping[str, Any]) -> Work:
    params = node.params

    def work(image: Array) -> Array:
        rows, columns = image.shape[:2]
        height, width = pad_size(rows, columns, params)
        return _surrounded(image, 0, 0, height, width, params["fill"], image.dtype)

    return work


def _flip(node: Node, settings: Mapping[str, Any]) -> Work:
    axis = node.params["axis"]
    return lambda image: vision.flip(image, axis)


def _rotate(node: Node, settings: Mapping[str, Any]) -> Work:
    degrees = node.params["degrees"]
    if degrees not in (90, 180, 270):
        raise EngineError(f"`rotate` turns by 90, 180 or 270 degrees ({node.span})")
    return lambda image: vision.rotate(image, degrees)


def _cut(node: Node, settings: Mapping[str, Any]) -> Work:
    high, wide, overlap = node.params["h"], node.params["w"], node.params["overlap"]
    length = high if high is not None else wide
    if not 0 <= overlap < length:
        raise EngineError(f"pieces of {length} pixels cannot overlap by {overlap} ({node.span})")

    def work(image: Array) -> list[Array]:
        frame = frame_of(image)
        rows, columns = image.shape[:2]
        whole = rows if high is not None else columns
        if whole <= length:
            return [image]
        last = whole - length
        starts = [*range(0, last, length - overlap), last]
        if high is not None:
            parts = [
                (slice(s, s + length), slice(None), frame.cropped(s, 0, length, columns))
                for s in starts
            ]
        else:
            parts = [
                (slice(None), slice(s, s + length), frame.cropped(0, s, rows, length))
                for s in starts
            ]
        return [with_frame(_part(image, down, across), place) for down, across, place in parts]

    return work


# Parts of images, by where they lie in the decoded picture


def _crop_box(node: Node, settings: Mapping[str, Any]) -> Work:
    """What lies in a box or a quad: `crop(img)`."""
    turns = node.params.get("upright", False)

    def work(place: Any, image: Array) -> Array:
        frame = frame_of(image)
        corners, is_box = _corners_of(place)
        inside = frame.from_decoded(corners)
        if is_box and frame.is_straight:
            return _cut_box(image, frame, inside)
        return _cut_quad(image, frame, inside, turns and not is_box)

    return work


def _corners_of(place: Any) -> tuple[Array, bool]:
    """The corners of a box or a quad, clockwise from the top left, and whether it is a box."""
    import numpy as np

    try:
        numbers = np.asarray(place, np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.empty(0)
    if numbers.shape not in ((4,), (4, 2)) or not np.isfinite(numbers).all():
        raise BadRequest(
            "neither a box [left, top, right, bottom] nor a quad of four points [x, y]: "
            f"{reprlib.repr(place)}"
        )
    if numbers.ndim == 2:
        return numbers, False
    if not (numbers[2:] > numbers[:2]).all():
        raise BadRequest(f"a box of no area: {reprlib.repr(place)}")
    return numbers[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2), True


def _cut_box(image: Array, frame: Frame, corners: Array) -> Array:
    """The pixels between the edges next to those of an upright rectangle, at least one each way."""
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    first_row, last_row = _pixels(top, bottom, frame.height)
    first, last = _pixels(left, right, frame.width)
    part = _part(image, slice(first_row, last_row), slice(first, last))
    return with_frame(part, frame.cropped(first_row, first, last_row - first_row, last - first))


def _pixels(low: float, high: float, length: int) -> tuple[int, int]:
    low, high = max(low, 0.0), min(high, float(length))
    if not high > low:
        raise BadRequest("the box does not touch the image")
    first = min(math.floor(low + 0.5), length - 1)
    return first, max(math.floor(high + 0.5), first + 1)


def _cut_quad(image: Array, frame: Frame, corners: Array, turns: bool) -> Array:
    """A quad straightened to a rectangle as long as the longer of its opposite sides."""
    import numpy as np

    _check_quad(corners, frame)
    edges = np.hypot(*(np.roll(corners, -1, 0) - corners).T)
    width, height = float(max(edges[0], edges[2])), float(max(edges[1], edges[3]))
    if turns and height > UPRIGHT * width:
        corners, width, height = np.roll(corners, -1, 0), height, width
    if max(width, height) > min(LONGEST, 2 * math.hypot(frame.height, frame.width)):
        raise BadRequest(f"a quad of {height:.0f}x{width:.0f} reaches far out of the image")
    rows, columns = max(1, round(height)), max(1, round(width))
    matrix = quad_matrix(corners.tolist(), rows, columns)
    # Only what is looked at, with room for the cubic: OpenCV takes no image beyond 32767 pixels.
    left, top = (max(0, math.floor(v) - 3) for v in corners.min(0))
    right, bottom = (math.ceil(v) + 3 for v in corners.max(0))
    shifted = product((1.0, 0.0, -left, 0.0, 1.0, -top, 0.0, 0.0, 1.0), matrix)
    straight = vision.warp(
        image[top:bottom, left:right], np.reshape(shifted, (3, 3)), rows, columns
    )
    return with_frame(straight, frame.warped(matrix, rows, columns))


def _check_quad(corners: Array, frame: Frame) -> None:
    """Raises BadRequest for corners of no convex shape, and for one beside the image."""
    import numpy as np

    edges = np.roll(corners, -1, 0) - corners
    following = np.roll(edges, -1, 0)
    turns = edges[:, 0] * following[:, 1] - edges[:, 1] * following[:, 0]
    if not ((turns > 1e-6).all() or (turns < -1e-6).all()):
        raise BadRequest("the four points are not the corners of a quad, in order around it")
    if (corners.max(0) <= 0).any() or (corners.min(0) >= (frame.width, frame.height)).any():
        raise BadRequest("the quad does not touch the image")


def _size(node: Node, settings: Mapping[str, Any]) -> Work:
    return lambda image: {"height": int(image.shape[0]), "width": int(image.shape[1])}


# Images to what models take


def _normalize(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    mean, std = (np.asarray(v, np.float32) for v in levels_of(node))

    def work(image: Array) -> Array:
        return (image.astype(np.float32) - mean) / std

    return work


def _pack(node: Node, settings: Mapping[str, Any]) -> Work:
    """An image to a model's input: layout, dtype, and levels normalized on the way.

    Given memory of just that shape and dtype, the work puts it there and returns that memory.
    """
    import numpy as np

    params = node.params
    dtype = {"u8": np.uint8, "f16": np.float16, "f32": np.float32}[params["dtype"]]
    is_chw = params["layout"] == "chw"

    if params["mean"] is None:

        def plain(image: Array, room: Array | None = None) -> Array:
            image = image if image.ndim == 3 else image[:, :, None]
            packed = image.transpose(2, 0, 1) if is_chw else image
            if not _fits(room, packed.shape, dtype):
                return np.ascontiguousarray(packed, dtype)
            room[...] = packed
            return room

        return plain
    levels = np.arange(256, dtype=np.float32)
    tables = [
        ((levels - np.float32(m)) / np.float32(s)).astype(np.float32)
        for m, s in zip(params["mean"], params["std"], strict=True)
    ]

    def normalized(image: Array, room: Array | None = None) -> Array:
        if is_chw and _fits(room, (len(tables), *image.shape[:2]), np.float32):
            return vision.planes_by_table(image, tables, room)
        out = vision.planes_by_table(image, tables)
        if not is_chw:
            out = np.ascontiguousarray(out.transpose(1, 2, 0))
        return out.astype(dtype, copy=False)

    return normalized


def _fits(room: Array | None, shape: tuple[int, ...], dtype: Any) -> TypeGuard[Array]:
    return room is not None and room.shape == shape and room.dtype == dtype


def _pass(node: Node, settings: Mapping[str, Any]) -> Work:
    return lambda value: value


_MAKERS: dict[str, results.Maker] = {
    **results.MAKERS,
    "decode": _decode,
    "resize": _resize,
    "rgb": _colour,
    "bgr": _colour,
    "gray": _colour,
    "crop": _crop,
    "pad": _pad,
    "flip": _flip,
    "rotate": _rotate,
    "cut": _cut,
    graph.CUT_OUT: _crop_box,
    "size": _size,
    "normalize": _normalize,
    graph.PACK: _pack,
    "pass": _pass,
}
