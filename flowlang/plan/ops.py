"""The operator table: what each operator is called, takes, gives and may be told.

Layer 2. No implementation: the work is done in `flowlang.runtime`. A new operator is a row here, a
rule in `flowlang/plan/rules.py` and a function in `flowlang/runtime/host.py`, or for what models
give in `flowlang/runtime/results.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from flowlang.plan import rules
from flowlang.plan.types import (
    BYTES,
    STR,
    UNKNOWN,
    Image,
    ListOf,
    Tensor,
    Type,
)

Params: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Param:
    """An algorithm argument.

    `kind` is one of int, number, str, file, word, flag, numbers, model; or `value` (a value of the
    flow), `condition`, `key` (an expression on each element) and `stage` (run on each element). A
    word or flag is written bare; `is_named` keeps a parameter out of the positions. One that
    `is_live` may be another value with each request. A `value` of a Python operator is of a
    `type`.
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
    is_live: bool = False
    type: Type = UNKNOWN

    @property
    def is_body(self) -> bool:
        return self.kind in ("condition", "key", "stage")


@dataclass(frozen=True, slots=True)
class Op:
    """A row of the table.

    `takes` is the type an item has where nothing else says so (at the head of a flow); `rule`
    gives the type of the result or raises Mismatch; `kind` tells the planner where it can run:
    `image` operators fuse into regions, `model` is an engine, `host` runs on the CPU behind one,
    `map` runs a stage of the flow on each element.
    """

    name: str
    doc: str
    kind: str
    takes: Type
    rule: Callable[[Type, Params], Type]
    params: tuple[Param, ...] = ()
    settings: tuple[str, ...] = ()
    tolerance: str = "exact"
    keeps_size: bool = False
    function: Any = None  # of a Python operator: see flowlang.plan.signature

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
BOTH = (Param("size", "int", "both sides in pixels", low=1, high=16384), *SIDES[1:])
LEVELS = (
    Param("mean", "numbers", "per channel, in levels 0..255", is_named=True),
    Param("std", "numbers", "per channel, in levels 0..255", is_named=True),
)
NAMES = Param("names", "file", "a text file with one name a line", is_named=True)
MODEL_SETTINGS = ("batch", "wait", "timeout", "gpu", "graphs", "workspace")

TABLE: tuple[Op, ...] = (
    Op(
        "decode",
        "a picture file (JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000, PNM) as upright 8-bit image",
        "image",
        BYTES,
        rules.decode,
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
        tolerance="JPEG: 6 levels (mean 0.7); lossless formats: exact",
    ),
    Op(
        "resize",
        "another size, bilinear with half-pixel centres and no antialias",
        "image",
        Image(),
        rules.resize,
        (
            *SIDES,
            Param(
                "fit",
                "word",
                "how the picture fills the size: stretch it, make its shorter side fit (shorter), "
                "or be no less (least), or keep its shape and fill the rest (letterbox: centred, "
                "pad: at the top left)",
                "stretch",
                ("stretch", "shorter", "least", "letterbox", "pad"),
                is_named=True,
            ),
            Param(
                "multiple",
                "int",
                "make both sides multiples of it, where the picture decides one or both",
                is_named=True,
                low=1,
                high=4096,
            ),
            Param(
                "most",
                "int",
                "longest that a side may become, where the picture decides it",
                is_named=True,
                low=1,
                high=16384,
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
        rules.colour("rgb"),
        keeps_size=True,
    ),
    Op(
        "bgr",
        "channels in the order blue, green, red",
        "image",
        Image(),
        rules.colour("bgr"),
        keeps_size=True,
    ),
    Op(
        "gray",
        "one channel: 0.299 red + 0.587 green + 0.114 blue",
        "image",
        Image(),
        rules.colour("gray"),
        tolerance="1 level",
        keeps_size=True,
    ),
    Op(
        "crop",
        "the centre of the image (where it is smaller, it is an error); or of a box or quad, what "
        "`crop(img)` finds there in an image: a quad is straightened",
        "image",
        Image(),
        rules.crop,
        (
            Param("image", "value", "the image that the arriving box or quad lies in"),
            *BOTH,
            Param("upright", "flag", "turn what is taller than wide by half, for text", False),
        ),
        tolerance="centre and boxes: exact; quads: 3 levels",
    ),
    Op(
        "pad",
        "more room at the right and the bottom; where the image is larger, it is an error",
        "image",
        Image(),
        rules.pad,
        (
            *BOTH,
            Param("multiple", "int", "to the next multiple of it", is_named=True, low=1, high=4096),
            Param("fill", "int", "level of the added rest", 114, is_named=True, low=0, high=255),
        ),
    ),
    Op(
        "flip",
        "mirrored",
        "image",
        Image(),
        rules.flip,
        (
            Param(
                "axis",
                "word",
                "horizontal: left and right change places",
                "horizontal",
                ("horizontal", "vertical"),
            ),
        ),
        keeps_size=True,
    ),
    Op(
        "rotate",
        "turned clockwise",
        "image",
        Image(),
        rules.rotate,
        (Param("degrees", "int", "90, 180 or 270", is_required=True),),
    ),
    Op(
        "cut",
        "the pieces of an image along one side, in order",
        "host",
        Image(),
        rules.cut,
        (
            Param("h", "int", "height of a piece", is_named=True, low=1, high=16384),
            Param("w", "int", "width of a piece", is_named=True, low=1, high=16384),
            Param(
                "overlap",
                "int",
                "pixels that a piece shares with the next",
                0,
                is_named=True,
                low=0,
                high=16383,
            ),
        ),
    ),
    Op("size", "height and width of an image", "host", Image(), rules.size),
    Op(
        "normalize",
        "levels to floats: (level - mean) / std for each channel",
        "image",
        Image("rgb"),
        rules.normalize,
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
        rules.trt,
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
        rules.floats,
    ),
    Op("sigmoid", "each value to between 0 and 1", "host", Tensor("f32", None), rules.floats),
    Op("l2", "made of length 1, over the last axis", "host", Tensor("f32", None), rules.floats),
    Op(
        "argmax",
        "index of the greatest value, over the last axis",
        "host",
        Tensor("f32", None),
        rules.argmax,
    ),
    Op(
        "labels",
        "every class whose value is at least `min`, greatest first",
        "host",
        Tensor("f32", (None,)),
        rules.labels,
        (
            NAMES,
            Param(
                "min", "number", "least value", 0.5, is_named=True, low=-1e9, high=1e9, is_live=True
            ),
        ),
    ),
    Op(
        "top",
        "the k greatest values with their indices and names, or of a list those greatest by a key",
        "host",
        Tensor("f32", (None,)),
        rules.top,
        (
            Param("k", "int", "how many", is_required=True, low=1, high=100_000, is_live=True),
            Param("by", "key", "of a list: what to go by, `by=.score`", is_named=True),
            NAMES,
        ),
    ),
    Op(
        "best",
        "the greatest value with its index and name",
        "host",
        Tensor("f32", (None,)),
        rules.best,
        (NAMES,),
    ),
    Op(
        "ctc",
        "text of a recogniser: the best class of each step, repeats and blanks (class 0) dropped",
        "host",
        Tensor("f32", (None, None)),
        rules.ctc,
        (
            Param(
                "keys",
                "file",
                "a text file with one character a line, classes from 1",
                is_required=True,
            ),
            Param("scored", "flag", "give the mean value of its steps with the text", False),
        ),
    ),
    Op(
        "boxes",
        "what a detector found, in coordinates of the decoded picture, best first",
        "host",
        UNKNOWN,
        rules.boxes,
        (
            Param(
                "head",
                "word",
                "how the detector gives its findings; db: text, as quads in reading order",
                None,
                ("yolov5", "yolov8", "yolox", "ssd", "db"),
                is_required=True,
            ),
            Param(
                "conf",
                "number",
                "least score (0.25; db: 0.5)",
                None,
                is_named=True,
                low=0,
                high=1,
                is_live=True,
            ),
            Param(
                "iou",
                "number",
                "overlap from which one of two boxes of a class goes",
                0.45,
                is_named=True,
                low=0,
                high=1,
            ),
            Param(
                "max",
                "int",
                "most that are kept (256; db: 1000)",
                None,
                is_named=True,
                low=1,
                high=100_000,
            ),
            Param(
                "threshold",
                "number",
                "db: level from which a pixel is text",
                0.3,
                is_named=True,
                low=0,
                high=1,
            ),
            Param(
                "unclip",
                "number",
                "db: how far a quad is grown",
                1.6,
                is_named=True,
                low=0,
                high=10,
            ),
            NAMES,
        ),
        tolerance="half a pixel",
    ),
    Op(
        "map",
        "a stage run on each element of a list; elements of all requests share batches",
        "map",
        UNKNOWN,
        rules.map_list,
        (
            Param("stage", "stage", "what is run on each element", is_required=True),
            Param(
                "max",
                "int",
                "most elements; a list with more fails",
                256,
                is_named=True,
                low=1,
                high=100_000,
            ),
            Param(
                "on_error",
                "word",
                "an element that fails: fails all, is dropped, is null",
                "fail",
                ("fail", "drop", "null"),
                is_named=True,
            ),
        ),
    ),
    Op(
        "filter",
        "the elements of a list for which a condition holds",
        "host",
        UNKNOWN,
        rules.filter_list,
        (Param("condition", "condition", "true for those to keep", is_required=True),),
    ),
    Op(
        "join",
        "a list of texts as one",
        "host",
        ListOf(STR),
        rules.join,
        (Param("separator", "str", "what stands between them", ""),),
    ),
    Op("pass", "the item itself", "host", UNKNOWN, lambda given, params: given, keeps_size=True),
)

OPS: Mapping[str, Op] = {op.name: op for op in TABLE}

PRESETS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "unit": ((0.0,), (255.0,)),
    "signed": ((127.5,), (127.5,)),
}
