"""The CPU implementation of every operator: the reference for all others.

Layer 3, and the only file importing cv2. Images are numpy arrays of height x width x 3 (height x
width for gray), 8-bit levels; an image of undecided colour is blue, green, red, as OpenCV decodes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.diagnostics import BadRequest, RequestError, StageFailed
from flowlang.plan import graph
from flowlang.plan.graph import Node
from flowlang.plan.ops import shorter_side
from flowlang.plan.physical import MAX_BYTES, MAX_PIXELS
from flowlang.plan.rewrite import levels_of
from flowlang.plan.types import Image
from flowlang.runtime.picture import Picture, UnreadablePicture, is_plain_jpeg, read_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

Work: TypeAlias = Callable[[Any], Any]


def work_of(node: Node, settings: Mapping[str, Any]) -> Work:
    """What an operator does to one item.

    The function raises RequestError for an item it cannot work on, with the operator and its place.
    """
    inner = _MAKERS[node.op](node, settings)
    name, place = node.op, str(node.span)

    def work(value: Any) -> Any:
        try:
            return inner(value)
        except RequestError as error:
            error.message = f"{name} failed: {error.message}"
            error.stage, error.place = name, place
            raise
        except Exception as error:
            message = f"{name} failed: {type(error).__name__}: {error}"
            raise StageFailed(message, stage=name, place=place) from error

    return work


def _decode(node: Node, settings: Mapping[str, Any]) -> Work:
    import cv2
    import numpy as np

    # A bad picture is told to its sender, not to stderr.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    max_bytes = settings.get("max_bytes", MAX_BYTES)
    max_pixels = settings.get("max_pixels", MAX_PIXELS)
    allows_truncated = node.params["truncated"] == "allow"

    def work(data: bytes) -> Array:
        if len(data) > max_bytes or not is_plain_jpeg(data, max_pixels):
            picture = check_picture(data, max_bytes, max_pixels, allows_truncated)
            if not picture.is_complete and picture.format == "jpeg":
                data += b"\xff\xd9"  # without an end marker OpenCV gives nothing at all
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error as error:
            raise BadRequest(f"not a picture that can be decoded ({error.err})") from None
        if image is None:
            raise BadRequest("not a picture that can be decoded")
        return image

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
    if not picture.is_complete and not allows_truncated:
        raise BadRequest("the file ends before its picture is complete (truncated)")
    return picture


def as_bmp(data: bytes, picture: Picture | None = None) -> bytes:
    """A picture file as an uncompressed one of the same pixels, upright. Raises BadRequest."""
    import cv2
    import numpy as np

    if picture is not None and not picture.is_complete and picture.format == "jpeg":
        data += b"\xff\xd9"
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise BadRequest("not a picture that can be decoded")
    return cv2.imencode(".bmp", image)[1].tobytes()


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


def _resize(node: Node, settings: Mapping[str, Any]) -> Work:
    import cv2
    import numpy as np

    params = node.params
    size, h, w, fit = params["size"], params["h"], params["w"], params["fit"]
    height, width = (size, size) if size is not None else (h, w)
    scale_to = (
        _antialiased
        if params["antialias"]
        else functools.partial(cv2.resize, interpolation=cv2.INTER_LINEAR)
    )

    def stretch(image: Array) -> Array:
        rows, columns = image.shape[:2]
        to_h = height if height is not None else max(1, round(rows * width / columns))
        to_w = width if width is not None else max(1, round(columns * height / rows))
        return scale_to(image, (to_w, to_h))

    def shorter(image: Array) -> Array:
        rows, columns = image.shape[:2]
        to_h, to_w = shorter_side(rows, columns, height)
        return scale_to(image, (to_w, to_h))

    def inside(image: Array) -> Array:
        rows, columns = image.shape[:2]
        to_h, to_w = inner_size(rows, columns, height, width)
        small = scale_to(image, (to_w, to_h))
        out = np.full((height, width, *image.shape[2:]), params["fill"], np.uint8)
        top = (height - to_h) // 2 if fit == "letterbox" else 0
        left = (width - to_w) // 2 if fit == "letterbox" else 0
        out[top : top + to_h, left : left + to_w] = small
        return out

    return {"stretch": stretch, "shorter": shorter, "letterbox": inside, "pad": inside}[fit]


def inner_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a picture of rows x columns made to fit inside height x width."""
    scale = min(height / rows, width / columns)
    return min(height, max(1, round(rows * scale))), min(width, max(1, round(columns * scale)))


@functools.lru_cache(maxsize=64)
def _triangle(length: int, to: int) -> Array:
    """Weights of the triangular filter that makes `length` samples `to`, one row a result.

    It is as wide as the step where it shrinks, and plain linear interpolation where it grows. Past
    an edge the sample at the edge repeats, as it does in plain linear interpolation.
    """
    import numpy as np

    step = length / to
    support = max(1.0, step)
    beyond = math.ceil(support)
    centres = (np.arange(to) + 0.5) * step
    places = np.arange(-beyond, length + beyond) + 0.5
    weights = np.clip(1 - abs(places[None] - centres[:, None]) / support, 0, None)
    weights /= weights.sum(1, keepdims=True)
    inside = weights[:, beyond : beyond + length].copy()
    inside[:, 0] += weights[:, :beyond].sum(1)
    inside[:, -1] += weights[:, beyond + length :].sum(1)
    return np.asarray(inside, np.float32)


def _antialiased(image: Array, size: tuple[int, int]) -> Array:
    import numpy as np

    width, height = size
    rows = np.tensordot(_triangle(image.shape[0], height), image.astype(np.float32), axes=1)
    both = np.tensordot(_triangle(image.shape[1], width), rows, axes=([1], [1]))
    return np.clip(np.rint(np.swapaxes(both, 0, 1)), 0, 255).astype(np.uint8)


def _colour(node: Node, settings: Mapping[str, Any]) -> Work:
    import cv2

    given = node.inputs[0].type
    start = (given.colour if isinstance(given, Image) else None) or "bgr"
    codes = {
        ("bgr", "rgb"): cv2.COLOR_BGR2RGB,
        ("rgb", "bgr"): cv2.COLOR_RGB2BGR,
        ("bgr", "gray"): cv2.COLOR_BGR2GRAY,
        ("rgb", "gray"): cv2.COLOR_RGB2GRAY,
    }
    code = codes.get((start, node.op))
    return (lambda image: image) if code is None else (lambda image: cv2.cvtColor(image, code))


def _crop(node: Node, settings: Mapping[str, Any]) -> Work:
    params = node.params
    size = params["size"]
    height, width = (size, size) if size is not None else (params["h"], params["w"])

    def work(image: Array) -> Array:
        rows, columns = image.shape[:2]
        h, w = height or rows, width or columns
        if rows < h or columns < w:
            raise BadRequest(f"an image of {rows}x{columns} has no centre of {h}x{w}")
        top, left = (rows - h) // 2, (columns - w) // 2
        return image[top : top + h, left : left + w]

    return work


def _normalize(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    mean, std = (np.asarray(v, np.float32) for v in levels_of(node))

    def work(image: Array) -> Array:
        return (image.astype(np.float32) - mean) / std

    return work


def _pack(node: Node, settings: Mapping[str, Any]) -> Work:
    """An image to a model's input: layout, dtype, and levels normalized on the way."""
    import cv2
    import numpy as np

    params = node.params
    dtype = {"u8": np.uint8, "f16": np.float16, "f32": np.float32}[params["dtype"]]
    is_chw = params["layout"] == "chw"

    if params["mean"] is None:

        def plain(image: Array) -> Array:
            image = image if image.ndim == 3 else image[:, :, None]
            return np.ascontiguousarray(image.transpose(2, 0, 1) if is_chw else image, dtype)

        return plain
    levels = np.arange(256, dtype=np.float32)
    tables = [
        ((levels - np.float32(m)) / np.float32(s)).astype(np.float32)
        for m, s in zip(params["mean"], params["std"], strict=True)
    ]

    def normalized(image: Array) -> Array:
        planes = cv2.split(image) if image.ndim == 3 else [image]
        out = np.empty((len(tables), *image.shape[:2]), np.float32)
        for plane, table, target in zip(planes, tables, out, strict=True):
            cv2.LUT(plane, table, dst=target)
        if not is_chw:
            out = np.ascontiguousarray(out.transpose(1, 2, 0))
        return out.astype(dtype, copy=False)

    return normalized


def _softmax(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    def work(values: Array) -> Array:
        values = np.exp(values.astype(np.float32) - values.max(-1, keepdims=True))
        shares: Array = values / values.sum(-1, keepdims=True)
        return shares

    return work


def read_lines(path: Path | None) -> list[str] | None:
    """The lines of a text file of names, without their line ends.

    Only line feeds end a line: a recogniser's characters include the other separators of Unicode.
    """
    if path is None:
        return None
    text = path.read_bytes().decode("utf-8-sig")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _label(index: int, score: float, names: list[str] | None) -> dict[str, Any]:
    named = names is not None and index < len(names)
    return {
        "index": index,
        "label": names[index] if named and names else str(index),
        "score": score,
    }


def _top(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    names = read_lines(node.params["names"])
    k = node.params["k"]

    def work(values: Array) -> list[dict[str, Any]]:
        # A model gone wrong may give NaN: it counts as the least. Of equals the first comes first.
        ranked = np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        count = min(k, len(values))
        if not count:
            return []
        least = np.partition(ranked, len(ranked) - count)[len(ranked) - count]
        found = np.flatnonzero(ranked >= least)
        order = found[np.argsort(-ranked[found], kind="stable")][:count]
        return [_label(i, float(values[i]), names) for i in order.tolist()]

    return work


def _best(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    names = read_lines(node.params["names"])

    def work(values: Array) -> dict[str, Any]:
        index = int(np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf).argmax())
        return _label(index, float(values[index]), names)

    return work


def _ctc(node: Node, settings: Mapping[str, Any]) -> Work:
    keys = ["", *(read_lines(node.params["keys"]) or ())]

    def work(steps: Array) -> str:
        if steps.shape[-1] > len(keys):
            raise StageFailed(
                f"the model knows {steps.shape[-1]} classes and `keys` names {len(keys) - 1}"
            )
        best = steps.argmax(-1)
        changed = [int(b) for i, b in enumerate(best) if i == 0 or b != best[i - 1]]
        return "".join(keys[b] for b in changed)

    return work


def _pass(node: Node, settings: Mapping[str, Any]) -> Work:
    return lambda value: value


_MAKERS: dict[str, Callable[[Node, Mapping[str, Any]], Work]] = {
    "decode": _decode,
    "resize": _resize,
    "rgb": _colour,
    "bgr": _colour,
    "gray": _colour,
    "crop": _crop,
    "normalize": _normalize,
    graph.PACK: _pack,
    "softmax": _softmax,
    "top": _top,
    "best": _best,
    "ctc": _ctc,
    "pass": _pass,
}
