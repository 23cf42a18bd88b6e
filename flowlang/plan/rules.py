"""Typing rules: what each operator gives for what arrives, or why it cannot take it.

Layer 2. One function a rule, named like its operator; the table in `flowlang.plan.ops` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from flowlang.plan.graph import Live
from flowlang.plan.types import (
    BYTES,
    DETECTION,
    INT,
    LABEL,
    READING,
    SIZE,
    STR,
    TEXTLINE,
    UNKNOWN,
    Image,
    ListOf,
    Record,
    Scalar,
    Tensor,
    Type,
    Unknown,
    optional,
    shape_text,
    sized,
    without_null,
)

Params: TypeAlias = Mapping[str, Any]


class Mismatch(Exception):
    """The arriving item does not fit; `wants` says in words what would."""

    def __init__(self, wants: str) -> None:
        super().__init__(wants)
        self.wants = wants


def image_of(given: Type) -> Image:
    if isinstance(given, Unknown):
        return Image()
    if not isinstance(given, Image):
        raise Mismatch("an image")
    return given


def u8_image(given: Type, op: str) -> Image:
    image = image_of(given)
    if image.dtype != "u8":
        raise Mismatch(f"an image of 8-bit levels: put `{op}` before `normalize`")
    return image


def tensor_of(given: Type, rank: int | None = None) -> Tensor:
    if isinstance(given, Unknown):
        return Tensor("f32", None)
    if not isinstance(given, Tensor) or not given.dtype.startswith("f"):
        raise Mismatch(
            "tensor<f32>" if rank is None else "tensor<f32, " + "x".join("?" * rank) + ">"
        )
    if rank is not None and given.shape is not None and len(given.shape) != rank:
        raise Mismatch("tensor<f32, " + "x".join("?" * rank) + ">")
    return given


def decode(given: Type, params: Params) -> Type:
    if given not in (BYTES, UNKNOWN):
        raise Mismatch("bytes")
    return Image()


def resize(given: Type, params: Params) -> Type:
    image = u8_image(given, "resize")
    size, h, w = params["size"], params["h"], params["w"]
    if size is None and (h is None or w is None):  # one side named: the other follows
        return sized(image, *(_named_side(side, params) for side in (h, w)))
    h, w = sides_of(params)
    if params["fit"] not in ("shorter", "least"):
        return sized(image, h, w)
    if params["fit"] == "least" or not image.is_sized or params["multiple"] or params["most"]:
        return sized(image, None, None)
    return sized(image, *free_size(image.height or 1, image.width or 1, params))


def sides_of(params: Params) -> tuple[Any, Any]:
    """Height and width that an operator is told, by `size` or each by itself: None where not."""
    size = params["size"]
    return (size, size) if size is not None else (params["h"], params["w"])


def _named_side(side: int | None, params: Params) -> int | None:
    """What a side becomes that may be named where the other is not; None where pictures differ."""
    most, step = params["most"], params["multiple"]
    if side is None or step is None:
        return side if most is None else None
    steps = max(1, round(side / step))
    return steps * step if most is None or steps == 1 else None  # one step is the least there is


def free_size(rows: int, columns: int, params: Params) -> tuple[int, int]:
    """Height and width that `resize` makes of rows x columns, where their ratio decides a side."""
    fit, size, h, w = params["fit"], params["size"], params["h"], params["w"]
    most, step = params.get("most"), params.get("multiple")
    if fit in ("shorter", "least"):
        of = min(rows, columns)
        to = max(size, of) if fit == "least" else size
    else:
        to, of = (h, rows) if h is not None else (w, columns)
    longest = max(rows, columns)
    if most is not None and longest * to > most * of:
        to, of = most, longest
    if step is None:
        return nearest(rows * to, of), nearest(columns * to, of)
    # Halves go to the even multiple, as where text detectors were trained.
    high, wide = (max(1, round(side * to / of / step)) * step for side in (rows, columns))
    return high, wide


def nearest(number: int, of: int) -> int:
    """The whole number of at least 1 that is nearest to number / of, halves rounded up.

    It is what DALI does, and Python's `round` is not.
    """
    return max(1, (2 * number + of) // (2 * of))


def crop(given: Type, params: Params) -> Type:
    if isinstance(params["image"], Live):
        return cut_out(given, params)
    h, w = sides_of(params)
    image = image_of(given)
    if any(a and b and a > b for a, b in ((h, image.height), (w, image.width))):
        raise Mismatch(f"an image of at least {shape_text((h, w))}")
    return sized(image, h or image.height, w or image.width)


def cut_out(given: Type, params: Params) -> Type:
    """`.box -> crop(img)`: the image's own type is put in by the checker, which has it."""
    if not isinstance(given, Unknown) and given not in (Scalar("box"), Scalar("quad")):
        raise Mismatch("a box or a quad")
    return Image()


def pad(given: Type, params: Params) -> Type:
    image = u8_image(given, "pad")
    h, w = sides_of(params)
    sides = (h or image.height, w or image.width)
    step = params["multiple"]
    if step is not None:
        sides = tuple(None if s is None else -(-s // step) * step for s in sides)  # type: ignore[assignment]
    if any(a and b and a < b for a, b in zip(sides, (image.height, image.width), strict=True)):
        raise Mismatch(f"an image of at most {shape_text(sides)}")
    return sized(image, *sides)


def flip(given: Type, params: Params) -> Type:
    return u8_image(given, "flip")


def rotate(given: Type, params: Params) -> Type:
    image = u8_image(given, "rotate")
    return image if params["degrees"] == 180 else sized(image, image.width, image.height)


def cut(given: Type, params: Params) -> Type:
    image = u8_image(given, "cut")
    return ListOf(sized(image, None, None))


def size(given: Type, params: Params) -> Type:
    image_of(given)
    return SIZE


def colour(colour: str) -> Callable[[Type, Params], Type]:
    def rule(given: Type, params: Params) -> Type:
        image = u8_image(given, colour)
        if image.colour == "gray" and colour != "gray":
            raise Mismatch("an image that still has its colours")
        return replace(image, colour=colour)

    return rule


def normalize(given: Type, params: Params) -> Type:
    image = u8_image(given, "normalize")
    if image.colour is None:
        raise Mismatch("an image of decided colour: put `rgb`, `bgr` or `gray` before it")
    if image.channels == 1 and any(len(params[n] or ()) > 1 for n in ("mean", "std")):
        raise Mismatch("an image of three channels, as `mean` or `std` has three numbers")
    return replace(image, dtype="f32")


def floats(given: Type, params: Params) -> Type:
    return replace(tensor_of(given), dtype="f32")


def argmax(given: Type, params: Params) -> Type:
    shape = tensor_of(given).shape
    if shape is None or len(shape) == 1:
        return INT
    return Tensor("i64", shape[:-1])


def labels(given: Type, params: Params) -> Type:
    tensor_of(given, 1)
    return ListOf(LABEL)


def top(given: Type, params: Params) -> Type:
    if isinstance(given, ListOf):
        return given
    if isinstance(given, Unknown) and params["by"] is not None:
        return UNKNOWN
    tensor_of(given, 1)
    return ListOf(LABEL)


def best(given: Type, params: Params) -> Type:
    tensor_of(given, 1)
    return LABEL


def list_of(given: Type) -> ListOf:
    if isinstance(given, Unknown):
        return ListOf(UNKNOWN)
    if not isinstance(given, ListOf):
        raise Mismatch("a list")
    return given


def map_list(given: Type, params: Params) -> Type:
    list_of(given)
    result: Type = params["stage"].output.type
    return ListOf(optional(result) if params["on_error"] == "null" else result)


def filter_list(given: Type, params: Params) -> Type:
    return list_of(given)


def join(given: Type, params: Params) -> Type:
    if without_null(list_of(given).item) not in (STR, UNKNOWN):
        raise Mismatch("list<str>")
    return STR


def ctc(given: Type, params: Params) -> Type:
    tensor_of(given, 2)
    return READING if params["scored"] else STR


# What a head of a detector gives for one picture, by the rank of its tensor.
_HEAD_RANKS = {"yolov5": 2, "yolov8": 2, "yolox": 2}


def boxes(given: Type, params: Params) -> Type:
    head = params["head"]
    if head == "ssd":
        if not isinstance(given, (Record, Unknown)):
            raise Mismatch("a record of boxes and scores")
    elif head == "db":
        tensor = tensor_of(given)
        if tensor.shape is not None and len(tensor.shape) not in (2, 3):
            raise Mismatch("tensor<f32, 1x?x?>")
        return ListOf(TEXTLINE)
    else:
        rows, columns = tensor_of(given, _HEAD_RANKS[head]).shape or (None, None)
        if head != "yolov8" and rows and columns and rows < columns:
            # No detector has more classes than places: this is read wrongly, without an error.
            raise Mismatch("a row for each place; a column for each is `yolov8`")
    return ListOf(DETECTION)


def trt(given: Type, params: Params) -> Type:
    raise NotImplementedError("the checker types models: see flowlang.plan.model")
