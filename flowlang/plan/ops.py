"""The operator table: what each operator is called, takes, gives and may be told.

Layer 2. No implementation: the typing rules stand here, the work is done in `flowlang.runtime`.
A new operator is a row here and a function in `flowlang/runtime/host.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from flowlang.plan.types import (
    BYTES,
    LABEL,
    STR,
    UNKNOWN,
    Image,
    ListOf,
    Tensor,
    Type,
    Unknown,
    sized,
)

Params: TypeAlias = Mapping[str, Any]


class Mismatch(Exception):
    """The arriving item does not fit; `wants` says in words what would."""

    def __init__(self, wants: str) -> None:
        super().__init__(wants)
        self.wants = wants


@dataclass(frozen=True, slots=True)
class Param:
    """An algorithm argument.

    `kind` is one of int, number, str, file, word, flag, numbers, model. A word or flag is written
    bare; `is_named` keeps a parameter out of the positions.
    """

    name: str
    kind: str
    doc: str
    default: Any = None
    words: tuple[str, ...] = ()
    is_named: bool = False
    is_required: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """A row of the table.

    `takes` is the type an item has where nothing else says so (at the head of a flow); `rule`
    gives the type of the result or raises Mismatch; `kind` tells the planner where it can run:
    `image` operators fuse into regions, `model` is an engine, `host` runs on the CPU behind one.
    """

    name: str
    doc: str
    kind: str
    takes: Type
    rule: Callable[[Type, Params], Type]
    params: tuple[Param, ...] = ()
    settings: tuple[str, ...] = ()
    tolerance: str = "exact"
    keeps_size: bool = field(default=False)

    def param(self, name: str) -> Param | None:
        return next((p for p in self.params if p.name == name), None)

    def param_of_word(self, word: str) -> Param | None:
        return next(
            (p for p in self.params if word in p.words or (p.kind == "flag" and p.name == word)),
            None,
        )

    @property
    def words(self) -> list[str]:
        return [
            w for p in self.params for w in (p.words or ((p.name,) if p.kind == "flag" else ()))
        ]


def _image(given: Type) -> Image:
    if not isinstance(given, Image):
        raise Mismatch("an image")
    return given


def _u8_image(given: Type, op: str) -> Image:
    image = _image(given)
    if image.dtype != "u8":
        raise Mismatch(f"an image of 8-bit levels: put `{op}` before `normalize`")
    return image


def _tensor(given: Type, rank: int | None = None) -> Tensor:
    if isinstance(given, Unknown):
        return Tensor("f32", None)
    if not isinstance(given, Tensor) or not given.dtype.startswith("f"):
        raise Mismatch(
            "tensor<f32>" if rank is None else "tensor<f32, " + "x".join("?" * rank) + ">"
        )
    if rank is not None and given.shape is not None and len(given.shape) != rank:
        raise Mismatch("tensor<f32, " + "x".join("?" * rank) + ">")
    return given


def _decode(given: Type, params: Params) -> Type:
    if given not in (BYTES, UNKNOWN):
        raise Mismatch("bytes")
    return Image()


def _resize(given: Type, params: Params) -> Type:
    image = _u8_image(given, "resize")
    size, h, w = params["size"], params["h"], params["w"]
    if size is None and (h is None or w is None):  # one side named: the other follows
        return sized(image, h, w)
    h, w = (size, size) if size is not None else (h, w)
    if params["fit"] != "shorter":
        return sized(image, h, w)
    if not image.is_sized:
        return sized(image, None, None)
    return sized(image, *shorter_side(image.height or 1, image.width or 1, h))


def shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of a picture whose shorter side is made `side`, the other following."""
    scale = side / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _crop(given: Type, params: Params) -> Type:
    size, h, w = params["size"], params["h"], params["w"]
    h, w = (size, size) if size is not None else (h, w)
    image = _image(given)
    return sized(image, h or image.height, w or image.width)


def _colour(colour: str) -> Callable[[Type, Params], Type]:
    def rule(given: Type, params: Params) -> Type:
        image = _u8_image(given, colour)
        if image.colour == "gray" and colour != "gray":
            raise Mismatch("an image that still has its colours")
        return replace(image, colour=colour)

    return rule


def _normalize(given: Type, params: Params) -> Type:
    image = _u8_image(given, "normalize")
    if image.colour is None:
        raise Mismatch("an image of decided colour: put `rgb`, `bgr` or `gray` before it")
    if image.channels == 1 and any(len(params[n] or ()) > 1 for n in ("mean", "std")):
        raise Mismatch("an image of three channels, as `mean` or `std` has three numbers")
    return replace(image, dtype="f32")


def _softmax(given: Type, params: Params) -> Type:
    return replace(_tensor(given), dtype="f32")


def _top(given: Type, params: Params) -> Type:
    _tensor(given, 1)
    return ListOf(LABEL)


def _best(given: Type, params: Params) -> Type:
    _tensor(given, 1)
    return LABEL


def _ctc(given: Type, params: Params) -> Type:
    _tensor(given, 2)
    return STR


def _trt(given: Type, params: Params) -> Type:
    raise NotImplementedError("the checker types models: see flowlang.plan.model")


SIDES = (
    Param(
        "size",
        "int",
        "both sides in pixels, or the shorter one with fit=shorter",
        low=1,
        high=16384,
    ),
    Param("h", "int", "height in pixels", is_named=True, low=1, high=16384),
    Param("w", "int", "width in pixels", is_named=True, low=1, high=16384),
)
LEVELS = (
    Param("mean", "numbers", "per channel, in levels 0..255", is_named=True),
    Param("std", "numbers", "per channel, in levels 0..255", is_named=True),
)
NAMES = Param("names", "file", "a text file with one name a line", is_named=True)
MODEL_SETTINGS = ("batch", "wait", "timeout", "gpu", "graphs", "workspace")

TABLE: tuple[Op, ...] = (
    Op(
        "decode",
        "a picture file (JPEG, PNG, WebP, TIFF, BMP, GIF) as an upright 8-bit image",
        "image",
        BYTES,
        _decode,
        (
            Param("decoder", "word", "who decodes JPEG", "auto", ("auto", "nvjpeg", "libjpeg")),
            Param(
                "truncated",
                "word",
                "what to make of a file that ends too early",
                "fail",
                ("fail", "allow"),
                is_named=True,
            ),
        ),
        ("max_bytes", "max_pixels"),
        tolerance="JPEG: 3 levels (mean 0.5); lossless formats: exact",
    ),
    Op(
        "resize",
        "another size, bilinear with half-pixel centres and no antialias",
        "image",
        Image(),
        _resize,
        (
            *SIDES,
            Param(
                "fit",
                "word",
                "how the picture fills the size: stretch it, make its shorter side fit, or keep "
                "its shape and fill the rest (letterbox: centred, pad: at the top left)",
                "stretch",
                ("stretch", "shorter", "letterbox", "pad"),
                is_named=True,
            ),
            Param("fill", "int", "level of the filled rest", 114, is_named=True, low=0, high=255),
            Param("antialias", "flag", "smooth before shrinking", False, is_named=True),
        ),
        tolerance="1 level",
    ),
    Op(
        "rgb",
        "channels in the order red, green, blue",
        "image",
        Image(),
        _colour("rgb"),
        keeps_size=True,
    ),
    Op(
        "bgr",
        "channels in the order blue, green, red",
        "image",
        Image(),
        _colour("bgr"),
        keeps_size=True,
    ),
    Op(
        "gray",
        "one channel: 0.299 red + 0.587 green + 0.114 blue",
        "image",
        Image(),
        _colour("gray"),
        tolerance="1 level",
        keeps_size=True,
    ),
    Op(
        "crop",
        "the centre of the image; where it is smaller, it is an error",
        "image",
        Image(),
        _crop,
        SIDES,
    ),
    Op(
        "normalize",
        "levels to floats: (level - mean) / std for each channel",
        "image",
        Image("rgb"),
        _normalize,
        (
            Param(
                "preset",
                "word",
                "imagenet: torchvision's mean and std; unit: 0..1; signed: -1..1",
                None,
                ("imagenet", "unit", "signed"),
            ),
            *LEVELS,
        ),
        tolerance="1e-6 relative",
        keeps_size=True,
    ),
    Op(
        "trt",
        "a model: TensorRT on an NVIDIA GPU, ONNX Runtime on a CPU",
        "model",
        UNKNOWN,
        _trt,
        (
            Param("model", "model", "an ONNX file, beside the flow", is_required=True),
            Param(
                "precision",
                "word",
                "what the engine computes in",
                "fp32",
                ("fp32", "fp16", "int8"),
            ),
            *LEVELS,
        ),
        MODEL_SETTINGS,
        tolerance="fp16: 1e-2 relative",
    ),
    Op(
        "softmax",
        "values to shares that sum to 1, over the last axis",
        "host",
        Tensor("f32", None),
        _softmax,
    ),
    Op(
        "top",
        "the k greatest values with their indices and names, greatest first",
        "host",
        Tensor("f32", (None,)),
        _top,
        (Param("k", "int", "how many", is_required=True, low=1, high=100_000), NAMES),
    ),
    Op(
        "best",
        "the greatest value with its index and name",
        "host",
        Tensor("f32", (None,)),
        _best,
        (NAMES,),
    ),
    Op(
        "ctc",
        "text of a recogniser: the best class of each step, repeats and blanks (class 0) dropped",
        "host",
        Tensor("f32", (None, None)),
        _ctc,
        (
            Param(
                "keys",
                "file",
                "a text file with one character a line, classes from 1",
                is_required=True,
            ),
        ),
    ),
    Op("pass", "the item itself", "host", UNKNOWN, lambda given, params: given, keeps_size=True),
)

OPS: Mapping[str, Op] = {op.name: op for op in TABLE}

# Of the language, and not built yet: the checker says so at their place.
UNBUILT = frozenset(
    {
        *("map", "filter", "join", "cut", "boxes", "l2", "sigmoid", "argmax"),
        *("pad", "flip", "rotate", "labels", "size"),
    }
)

PRESETS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "unit": ((0.0,), (255.0,)),
    "signed": ((127.5,), (127.5,)),
}
