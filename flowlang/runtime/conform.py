"""Values held against their types where foreign code made them, and made plain.

Layer 3. What an operator in Python gives is checked here: that it is of the type it was declared
with, so that a lie is told at its operator and not stages later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from flowlang.plan.types import (
    ANY_ARRAY,
    BYTES,
    Image,
    ListOf,
    Optional,
    Record,
    Scalar,
    Tensor,
    Type,
    numpy_dtype,
    shape_fits,
    shape_text,
)

Conform: TypeAlias = Callable[[Any], Any]

# What a plain scalar may be in Python. To Python True is a number too: whoever asks checks that.
PLAIN: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "path": (str,),
    "bool": (bool,),
    "duration": (float, int),
}
# Boxes and quads: the shape of their numbers, and what those are.
PLACES: Mapping[str, tuple[tuple[int, ...], str]] = {
    "box": ((4,), "left, top, right and bottom"),
    "quad": ((4, 2), "four points"),
}


class NotOfType(Exception):
    """A value is not of the type that was declared."""


def conforming(kind: Type) -> Conform:
    """What gives a value as flows hold it, and raises NotOfType where it is not of this type."""
    if isinstance(kind, Optional):
        inner = conforming(kind.item)
        return lambda value: None if value is None else inner(value)
    if isinstance(kind, ListOf):
        return _list(kind)
    if isinstance(kind, Record):
        return _record(kind)
    if isinstance(kind, (Tensor, Image)):
        return _array(kind)
    if kind == BYTES:
        return _bytes
    if isinstance(kind, Scalar) and kind.name in PLAIN:
        return _scalar(kind)
    if isinstance(kind, Scalar) and kind.name in PLACES:
        return _place(kind)
    return _plain


def building(kind: Type, names: Mapping[str, Any], classes: frozenset[str]) -> Conform | None:
    """What makes records of `classes`, which stand among `names`, out of those that flows hold.

    None where a type has none of them: its values are given as they are.
    """
    if isinstance(kind, Optional):
        inner = building(kind.item, names, classes)
        return _unless_null(inner) if inner else None
    if isinstance(kind, ListOf):
        inner = building(kind.item, names, classes)
        return _each(inner) if inner else None
    if not isinstance(kind, Record):
        return None
    parts = {name: building(part, names, classes) for name, part in kind.fields}
    made = names.get(kind.name or "") if kind.name in classes else None
    if made is None and not any(parts.values()):
        return None
    to = dict if made is None else made
    if dataclasses.is_dataclass(made):  # others it makes itself
        parts = {f.name: parts[f.name] for f in dataclasses.fields(made) if f.init}
    lax = kind.defaults if made is not None else frozenset()

    def build(value: Any) -> Any:
        found = {n: value.get(n) for n in parts}
        return to(
            **{
                n: b(found[n]) if b else found[n]
                for n, b in parts.items()
                if found[n] is not None or n not in lax
            }
        )

    return build


def _unless_null(build: Conform) -> Conform:
    return lambda value: None if value is None else build(value)


def _each(build: Conform) -> Conform:
    return lambda value: [build(part) for part in value]


def _plain(value: Any) -> Any:
    """A scalar of numpy as Python's own; anything else as it is."""
    return (
        value.item() if hasattr(value, "dtype") and getattr(value, "shape", None) == () else value
    )


def _bytes(value: Any) -> Any:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise NotOfType(f"{_called(value)} is not bytes")
    return bytes(value)


def _scalar(kind: Scalar) -> Conform:
    wanted = PLAIN[kind.name]
    to: Conform = float if float in wanted else lambda value: value

    def conform(value: Any) -> Any:
        found = _plain(value)
        if not isinstance(found, wanted) or isinstance(found, bool) != (kind.name == "bool"):
            raise NotOfType(f"{_called(found)} is not {kind}")
        return to(found)

    return conform


def _place(kind: Scalar) -> Conform:
    shape, words = PLACES[kind.name]

    def conform(value: Any) -> Any:
        import numpy as np

        try:
            numbers = np.asarray(value, np.float64)
        except (TypeError, ValueError, OverflowError):
            numbers = np.empty(0)
        if numbers.shape != shape:
            raise NotOfType(f"{_called(value)} is not {kind}: {words}")
        return numbers.tolist()

    return conform


def _list(kind: ListOf) -> Conform:
    inner = conforming(kind.item)

    def conform(value: Any) -> Any:
        parts: Any = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(parts, (str, bytes, Mapping)) or not isinstance(parts, Sequence):
            raise NotOfType(f"{_called(value)} is not {kind}")
        found = []
        for index, part in enumerate(parts):
            try:
                found.append(inner(part))
            except NotOfType as error:
                raise NotOfType(f"element {index}: {error}") from None
        return found

    return conform


def _record(kind: Record) -> Conform:
    inner = {name: conforming(part) for name, part in kind.fields}
    needed = {name for name, part in kind.fields if not isinstance(part, Optional)}

    def conform(value: Any) -> Any:
        fields = _fields(value)
        if fields is None:
            raise NotOfType(f"{_called(value)} is not {kind}")
        missing = needed - fields.keys()
        if missing or fields.keys() - inner.keys():
            raise NotOfType(
                f"it has the fields {', '.join(map(str, fields))}, not {', '.join(inner)}"
            )
        found = {}
        for name, check in inner.items():
            try:
                found[name] = check(fields.get(name))
            except NotOfType as error:
                raise NotOfType(f"`{name}`: {error}") from None
        return found

    return conform


def _fields(value: Any) -> Mapping[str, Any] | None:
    """A dict, dataclass or named tuple by its fields; None for anything else."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    is_tuple = isinstance(value, tuple) and hasattr(value, "_asdict")
    return value._asdict() if is_tuple else None


def _array(kind: Tensor | Image) -> Conform:
    def conform(value: Any) -> Any:
        import numpy as np

        array = np.asarray(value)
        if kind == ANY_ARRAY:
            return array
        dtype = numpy_dtype(kind.dtype)
        if array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise NotOfType(f"an array of {array.dtype} is not {kind}")
        if not shape_fits(array.shape, kind.shape):
            sides = f", which is {shape_text(kind.shape)}" if isinstance(kind, Image) else ""
            raise NotOfType(f"an array of shape {shape_text(array.shape)} is not {kind}{sides}")
        if isinstance(kind, Image) and not array.size:
            raise NotOfType(f"an array of shape {shape_text(array.shape)} is no image")
        return converted(array, dtype, kind)

    return conform


def converted(array: Any, dtype: Any, kind: Tensor | Image) -> Any:
    """An array with another data type. Raises NotOfType where its numbers have no place in it."""
    import numpy as np

    is_narrower = not np.can_cast(array.dtype, dtype)
    if is_narrower and np.issubdtype(dtype, np.integer) and array.size:
        limits = np.iinfo(dtype)
        for number in (int(array.min()), int(array.max())):
            if not limits.min <= number <= limits.max:
                raise NotOfType(f"an array with the number {number} is not {kind}")
    try:
        with np.errstate(over="raise"):
            return array.astype(dtype, copy=False)
    except FloatingPointError:
        raise NotOfType(f"an array with a number too large is not {kind}") from None


def _called(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeio' else 'a'} {name}"
