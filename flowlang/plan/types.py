"""The types of items: images, tensors, lists, records, and the plain ones.

Layer 2. Types describe one item; a batch never appears in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

SCALARS = ("bytes", "str", "int", "float", "bool", "path", "duration", "box", "quad")
COLOURS = ("rgb", "bgr", "gray")
_NUMPY = {
    "u8": "uint8", "i8": "int8", "u16": "uint16", "i16": "int16", "i32": "int32", "i64": "int64",
    "f16": "float16", "f32": "float32", "f64": "float64", "bool": "bool",
}  # fmt: skip
DTYPES = tuple(_NUMPY)
MAX_PARTS = 1000
MAX_DEPTH = 64

Shape: TypeAlias = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Scalar:
    """A plain value. `frame` tells which decoded picture a box or quad lies in, where known."""

    name: str
    frame: object = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Image:
    """Height x width x channels. `colour` None is undecided, a side None is of any length.

    `frame` tells which decoded picture it is a part of, where that is known.
    """

    colour: str | None = None
    dtype: str = "u8"
    height: int | None = None
    width: int | None = None
    frame: object = field(default=None, compare=False, repr=False)

    @property
    def channels(self) -> int | None:
        return None if self.colour is None else 1 if self.colour == "gray" else 3

    @property
    def shape(self) -> Shape:
        """That of its array, which has three channels until its colour is decided."""
        sides = (self.height, self.width)
        return sides if self.colour == "gray" else (*sides, 3)

    @property
    def is_sized(self) -> bool:
        return self.height is not None and self.width is not None

    def __str__(self) -> str:
        sides = f", {shape_text((self.height, self.width))}" if self.height or self.width else ""
        return f"image<{self.colour or 'undecided'}, {self.dtype}, hwc{sides}>"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array; a dimension None is of any length, a shape None of any rank."""

    dtype: str
    shape: Shape | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"tensor<{self.dtype}>"
        return f"tensor<{self.dtype}, {shape_text(self.shape)}>" if self.shape else self.dtype


@dataclass(frozen=True, slots=True)
class ListOf:
    item: Type

    def __str__(self) -> str:
        return f"list<{self.item}>"


@dataclass(frozen=True, slots=True)
class Record:
    """Named fields in order; `name` is how the type was introduced, if it was.

    `defaults` are the fields, never null themselves, that a class in Python fills in where they are
    missing.
    """

    fields: tuple[tuple[str, Type], ...]
    name: str | None = field(default=None, compare=False)
    defaults: frozenset[str] = field(default=frozenset(), compare=False)

    def get(self, name: str) -> Type | None:
        return dict(self.fields).get(name)

    def __str__(self) -> str:
        if self.name:
            return self.name
        return "{ " + ", ".join(f"{n}: {t}" for n, t in self.fields) + " }"


@dataclass(frozen=True, slots=True)
class Optional:
    item: Type

    def __str__(self) -> str:
        return f"{self.item}?"


@dataclass(frozen=True, slots=True)
class Unknown:
    """The type of something already complained about: it fits everything and says no more."""

    def __str__(self) -> str:
        return "unknown"


Type: TypeAlias = Scalar | Image | Tensor | ListOf | Record | Optional | Unknown

BYTES = Scalar("bytes")
STR = Scalar("str")
INT = Scalar("int")
FLOAT = Scalar("float")
BOOL = Scalar("bool")
UNKNOWN = Unknown()
ANY_ARRAY = Tensor("any", None)  # what a Python operator takes that says no more
LABEL = Record((("index", INT), ("label", STR), ("score", FLOAT)), "label")
SIZE = Record((("height", INT), ("width", INT)), "size")
DETECTION = Record((("box", Scalar("box")), ("label", STR), ("score", FLOAT)), "detection")
TEXTLINE = Record((("quad", Scalar("quad")), ("score", FLOAT)), "textline")
READING = Record((("text", STR), ("score", FLOAT)), "reading")
NAMED: dict[str, Type] = {
    **{s: Scalar(s) for s in SCALARS},
    **{str(r): r for r in (LABEL, SIZE, DETECTION, TEXTLINE, READING)},
}


def numpy_dtype(name: str) -> str:
    """numpy's name of one of our dtypes."""
    return _NUMPY[name]


def shape_text(shape: Iterable[int | None]) -> str:
    return "x".join("?" if side is None else str(side) for side in shape)


def describe(kind: Type) -> str:
    """A type in words, to follow `gives`."""
    if isinstance(kind, Image):
        if kind.is_sized:
            size = f"of {shape_text((kind.height, kind.width))}"
        else:
            size = "of any size"
        if kind.colour is None:
            return f"an image {size}, colour undecided"
        article = "a" if kind.colour in ("bgr", "gray") else "an"
        scaled = ", normalized" if kind.dtype != "u8" else ""
        return f"{article} {kind.colour} image {size}{scaled}"
    return str(kind)


def fits(given: Type, wanted: Type) -> bool:
    """Whether every value of `given` is one of `wanted`."""
    if isinstance(given, Unknown) or isinstance(wanted, Unknown) or given == wanted:
        return True
    if isinstance(wanted, Optional):
        return fits(given.item if isinstance(given, Optional) else given, wanted.item)
    if wanted == ANY_ARRAY:
        return isinstance(given, (Tensor, Image))
    if isinstance(given, Image) and isinstance(wanted, Image):
        return (
            given.dtype == wanted.dtype
            and wanted.colour in (None, given.colour)
            and wanted.height in (None, given.height)
            and wanted.width in (None, given.width)
        )
    if isinstance(given, Tensor) and isinstance(wanted, Tensor):
        return given.dtype == wanted.dtype and shape_fits(given.shape, wanted.shape)
    if isinstance(given, ListOf) and isinstance(wanted, ListOf):
        return fits(given.item, wanted.item)
    if isinstance(given, Record) and isinstance(wanted, Record):
        have = dict(given.fields)
        return all(wanted.get(n) is not None for n in have) and all(
            fits(have[n], w) if n in have else isinstance(w, Optional) for n, w in wanted.fields
        )
    return (given, wanted) in ((INT, FLOAT), (STR, Scalar("path")))


def is_vague(kind: Type) -> bool:
    """Whether a type leaves something open: it is unknown, or holds what is."""
    if isinstance(kind, Record):
        return any(is_vague(part) for _, part in kind.fields)
    if isinstance(kind, (ListOf, Optional)):
        return is_vague(kind.item)
    return isinstance(kind, Unknown)


def is_writable(kind: Type) -> bool:
    """Whether a type can be written in any file as it is printed: no name of a file's own."""
    if isinstance(kind, Record):
        return kind.name in NAMED or (
            kind.name is None and all(is_writable(part) for _, part in kind.fields)
        )
    if isinstance(kind, (ListOf, Optional)):
        return is_writable(kind.item)
    return not isinstance(kind, Unknown) and kind != ANY_ARRAY


def without_null(kind: Type) -> Type:
    return kind.item if isinstance(kind, Optional) else kind


def optional(kind: Type) -> Type:
    return kind if isinstance(kind, (Optional, Unknown)) else Optional(kind)


def taken(kind: Type) -> Type:
    """A type as that of what is given to something: fields with defaults may be left out."""
    if isinstance(kind, Record):
        fields = ((n, taken(part)) for n, part in kind.fields)
        lax = tuple((n, optional(part) if n in kind.defaults else part) for n, part in fields)
        return replace(kind, fields=lax)
    if isinstance(kind, ListOf):
        return ListOf(taken(kind.item))
    return Optional(taken(kind.item)) if isinstance(kind, Optional) else kind


def as_said(said: Type, given: Type) -> Type:
    """A type that was written for a value; where that lacks fields with defaults, they may."""
    lax = taken(said)
    return lax if fits(given, lax) and not fits(given, said) else said


def in_frame(kind: Type, frame: object) -> Type:
    """The same type, its boxes and quads known to lie in a decoded picture."""
    if isinstance(kind, Scalar) and kind.name in ("box", "quad"):
        return replace(kind, frame=frame)
    if isinstance(kind, ListOf):
        return ListOf(in_frame(kind.item, frame))
    if isinstance(kind, Record):
        return Record(tuple((n, in_frame(t, frame)) for n, t in kind.fields), kind.name)
    return kind


def images_in_frame(kind: Type, frame: object) -> Type:
    """The same type, its images known to be a picture by themselves."""
    if isinstance(kind, Image):
        return replace(kind, frame=frame)
    if isinstance(kind, ListOf):
        return ListOf(images_in_frame(kind.item, frame))
    if isinstance(kind, Optional):
        return Optional(images_in_frame(kind.item, frame))
    if isinstance(kind, Record):
        return Record(tuple((n, images_in_frame(t, frame)) for n, t in kind.fields), kind.name)
    return kind


def is_undecided(kind: Type) -> bool:
    """Whether a type is an image whose order of colours is open, or holds one."""
    if isinstance(kind, Record):
        return any(is_undecided(part) for _, part in kind.fields)
    if isinstance(kind, (ListOf, Optional)):
        return is_undecided(kind.item)
    return isinstance(kind, Image) and kind.colour is None


def may_hold_images(kind: Type) -> bool:
    """Whether values of a type may be images, or have some in them."""
    if isinstance(kind, Record):
        return any(may_hold_images(part) for _, part in kind.fields)
    if isinstance(kind, (ListOf, Optional)):
        return may_hold_images(kind.item)
    return isinstance(kind, (Image, Unknown)) or kind == ANY_ARRAY


def unify(one: Type, other: Type) -> Type | None:
    """The narrowest type that holds every value of both, or None where there is none.

    Records may differ by fields, which become optional.
    """
    if isinstance(one, Unknown) or isinstance(other, Unknown):
        return UNKNOWN
    if one == other:
        return _in_both_frames(one, other)
    if isinstance(one, Optional) or isinstance(other, Optional):
        inner = unify(without_null(one), without_null(other))
        return None if inner is None else optional(inner)
    if isinstance(one, Record) and isinstance(other, Record):
        return _unify_records(one, other)
    if isinstance(one, ListOf) and isinstance(other, ListOf):
        if isinstance(one.item, Unknown):  # the empty list is of any type
            return other
        inner = one.item if isinstance(other.item, Unknown) else unify(one.item, other.item)
        return None if inner is None else ListOf(inner)
    if isinstance(one, Image) and isinstance(other, Image):
        if (one.colour, one.dtype) != (other.colour, other.dtype):
            return None
        frame = one.frame if one.frame == other.frame else None
        height = one.height if one.height == other.height else None
        width = one.width if one.width == other.width else None
        return Image(one.colour, one.dtype, height, width, frame)
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype:
        return Tensor(one.dtype, _unify_shapes(one.shape, other.shape))
    return FLOAT if {one, other} == {INT, FLOAT} else None


def _in_both_frames(one: Type, other: Type) -> Type:
    """The first of two equal types, in no frame where they lie in different ones."""
    if isinstance(one, (Scalar, Image)) and isinstance(other, (Scalar, Image)):
        return one if one.frame == other.frame else replace(one, frame=None)
    if isinstance(one, Optional) and isinstance(other, Optional):
        return Optional(_in_both_frames(one.item, other.item))
    if isinstance(one, ListOf) and isinstance(other, ListOf):
        return ListOf(_in_both_frames(one.item, other.item))
    if isinstance(one, Record) and isinstance(other, Record):
        pairs = zip(one.fields, other.fields, strict=True)
        fields = tuple((n, _in_both_frames(a, b)) for (n, a), (_, b) in pairs)
        return Record(fields, one.name)
    return one


def _unify_records(one: Record, other: Record) -> Type | None:
    fields: dict[str, Type] = {}
    for name in dict.fromkeys(n for r in (one, other) for n, _ in r.fields):
        a, b = one.get(name), other.get(name)
        if a is None or b is None:
            fields[name] = optional(a or b or UNKNOWN)
            continue
        kind = unify(a, b)
        if kind is None:
            return None
        fields[name] = kind
    return Record(tuple(fields.items()))


def _unify_shapes(one: Shape | None, other: Shape | None) -> Shape | None:
    if one is None or other is None or len(one) != len(other):
        return None
    return tuple(a if a == b else None for a, b in zip(one, other, strict=True))


def shape_fits(given: Shape | None, wanted: Shape | None) -> bool:
    """Whether every shape that is `given` is one of those `wanted`."""
    if wanted is None:
        return True
    if given is None or len(given) != len(wanted):
        return False
    return all(w is None or w == g for g, w in zip(given, wanted, strict=True))


def why_vast(kind: Type) -> str | None:
    """`too-large` or `too-deep`, for a type of more parts or levels than anyone means."""
    parts = 0
    stack = [(kind, 0)]
    while stack:
        part, depth = stack.pop()
        parts += 1
        if parts > MAX_PARTS or depth > MAX_DEPTH:
            return "too-deep" if depth > MAX_DEPTH else "too-large"
        if isinstance(part, Record):
            stack += [(t, depth + 1) for _, t in part.fields]
        elif isinstance(part, (ListOf, Optional)):
            stack.append((part.item, depth + 1))
    return None


def sized(image: Image, height: int | None, width: int | None) -> Image:
    """The same image with other sides."""
    return replace(image, height=height, width=width)
