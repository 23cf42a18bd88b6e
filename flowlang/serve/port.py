"""The types of a flow as tensors: which ones they are, items out of them, and answers into them.

Layer 4. A tensor's first dimension counts items; a type says what follows it. Bytes, texts, numbers
and arrays are tensors as they are, a record is one tensor a field, and what is no tensor, such as
a list of records, is JSON in a tensor of BYTES. Knows neither requests nor connections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from flowlang.diagnostics import BadRequest
from flowlang.items import plain
from flowlang.plan import types
from flowlang.plan.types import Image, Optional, Record, Scalar, Shape, Type, without_null
from flowlang.serve.answer import reader_of, to_json
from flowlang.serve.tensor import BYTES, DATATYPE, NUMPY, Tensor

Form: TypeAlias = Literal["bytes", "text", "number", "array", "json", "any"]

_SCALARS: Mapping[str, tuple[str, Shape, Form]] = {
    "bytes": (BYTES, (), "bytes"),
    "str": (BYTES, (), "text"),
    "path": (BYTES, (), "text"),
    "int": ("INT64", (), "number"),
    "float": ("FP64", (), "number"),
    "duration": ("FP64", (), "number"),
    "bool": ("BOOL", (), "number"),
    "box": ("FP32", (4,), "array"),
    "quad": ("FP32", (4, 2), "array"),
}


@dataclass(frozen=True, slots=True)
class Port:
    """One tensor of a flow: `shape` is that of an item, None where its rank is not known."""

    name: str
    datatype: str
    shape: Shape | None
    form: Form
    kind: Type
    is_optional: bool = False

    @property
    def wire_shape(self) -> list[int]:
        """The shape with the items in front; -1 is any length."""
        return [-1, *(-1 if side is None else side for side in self.shape or ())]

    @property
    def most_classes(self) -> float | None:
        """How many numbers an item may have, to be told as classes; None where it has none."""
        if self.form not in ("number", "array") or self.datatype == "BOOL":
            return None
        sides = (None,) if self.shape is None else self.shape
        return math.prod(math.inf if side is None else side for side in sides)

    def json_of(self, tensor: Tensor) -> list[bytes]:
        """What is JSON of a tensor that is this one: it is bounded over a whole request."""
        values = tensor.values
        return values if self.form == "json" and isinstance(values, list) else []

    def rows(self, place: str, tensor: Tensor) -> list[Any]:
        """What each item has of a tensor that has been checked, its JSON too. Raises BadRequest."""
        values = tensor.values
        if not isinstance(values, list):
            if self.form == "number":
                return list(values.tolist())
            array = values.reshape(tensor.shape)
            return list(array.tolist() if isinstance(self.kind, Scalar) else array)
        if self.form == "text":
            return [_text(place, index, value) for index, value in enumerate(values)]
        read = reader_of(self.kind)
        if read is None:
            return list(values)
        return [_read(read, place, index, value) for index, value in enumerate(values)]

    def check(self, place: str, datatype: str, shape: tuple[int, ...]) -> None:
        """Raises BadRequest where no tensor of this datatype and shape is this one."""
        if datatype != self.datatype:
            wanted = f"`{self.name}` is {self.datatype}, not {datatype}"
            raise BadRequest(f"{place}.datatype: {wanted}")
        given = shape[1:]
        if shape and (
            self.shape is None
            # One value an item may have dimensions of length one, as Triton's clients send them.
            or (not self.shape and all(side == 1 for side in given))
            or (
                len(self.shape) == len(given)
                and all(w in (None, g) for w, g in zip(self.shape, given, strict=True))
            )
        ):
            return
        wanted = f"`{self.name}` is of shape {self.wire_shape}, the number of items in front"
        raise BadRequest(f"{place}.shape: {wanted}; {list(shape)} is not")

    def column(self, values: Sequence[Any]) -> Tensor:
        """The tensor of what all items give. Raises BadRequest where their arrays differ."""
        if self.datatype == BYTES:
            texts = [_TEXTS[self.form](value) for value in values]
            return Tensor(self.name, BYTES, (len(texts),), texts)
        import numpy as np

        dtype = np.dtype(NUMPY[self.datatype]).newbyteorder("=")
        try:  # numpy lets arrays wrap around, but not Python's numbers
            wanted = dtype if self.form == "number" else None
            arrays = [np.asarray(value, wanted) for value in values]
        except OverflowError:
            raise BadRequest(
                f"`{self.name}`: a number that {self.datatype} cannot hold, but JSON can: "
                f"ask for it below /flows"
            ) from None
        if len({array.shape for array in arrays}) > 1:
            raise BadRequest(
                f"the items give `{self.name}` in different shapes, which one tensor "
                f"cannot hold: send them in requests of their own"
            )
        stacked = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
        with np.errstate(over="ignore"):
            flat = stacked.astype(dtype, copy=False).ravel()
        return Tensor(self.name, self.datatype, stacked.shape, flat)


def _text(place: str, index: int, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{place}: element {index} is not UTF-8") from None


def _read(read: Callable[[bytes], Any], place: str, index: int, value: bytes) -> Any:
    try:
        return read(value)
    except BadRequest as error:
        raise BadRequest(f"{place}: element {index}: {error.message}") from None


def _any(value: Any) -> bytes:
    """A value of a type that is known only now."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    return value.encode("utf-8", "replace") if isinstance(value, str) else _json(value)


def _json(value: Any) -> bytes:
    return to_json(plain(value))


_TEXTS: Mapping[Form, Callable[[Any], bytes]] = {
    "bytes": bytes,
    "text": lambda value: str(value).encode("utf-8", "replace"),
    "json": _json,
    "any": _any,
}


def port_of(name: str, kind: Type, *, is_optional: bool = False) -> Port:
    """The tensor that holds values of a type."""
    datatype, shape, form = _spread(kind)
    return Port(name, datatype, shape, form, kind, is_optional)


def _spread(kind: Type) -> tuple[str, Shape | None, Form]:
    if isinstance(kind, Scalar):
        return _SCALARS[kind.name]
    if isinstance(kind, types.Tensor) and kind.dtype in DATATYPE:
        return DATATYPE[kind.dtype], kind.shape, "array"
    if isinstance(kind, Image):
        sides = (kind.height, kind.width)
        return DATATYPE[kind.dtype], sides if kind.colour == "gray" else (*sides, 3), "array"
    return BYTES, (), "any" if isinstance(kind, types.Unknown) else "json"


class Ports:
    """The tensors of a flow's items or answers: one a field for a record, else a single one."""

    def __init__(self, ports: Sequence[Port], *, is_record: bool) -> None:
        self.by_name = {port.name: port for port in ports}
        self.is_record = is_record

    @property
    def all(self) -> list[Port]:
        return list(self.by_name.values())

    @classmethod
    def of_input(cls, kind: Type, name: str) -> Ports:
        """What a flow takes. A field that may be missing is a tensor that may be."""
        kind = without_null(kind)
        if isinstance(kind, Record):
            ports = [
                port_of(field, without_null(part), is_optional=isinstance(part, Optional))
                for field, part in kind.fields
            ]
            return cls(ports, is_record=True)
        return cls([port_of(name, kind)], is_record=False)

    @classmethod
    def of_output(cls, kind: Type, name: str) -> Ports:
        """What a flow gives. What may be null is JSON, for it is no tensor then."""
        if isinstance(kind, Record):
            return cls([port_of(field, part) for field, part in kind.fields], is_record=True)
        return cls([port_of(name, kind)], is_record=False)

    def items(self, rows: Mapping[str, list[Any]], count: int) -> list[Any]:
        """Items, put together from what each of them has of every tensor."""
        if not self.is_record:
            return rows[next(iter(self.by_name))]
        return [{name: column[index] for name, column in rows.items()} for index in range(count)]

    def columns(self, answers: Sequence[Any], wanted: Iterable[str]) -> list[Tensor]:
        """The tensors of these names, of the answers of all items."""
        return [
            self.by_name[name].column(
                [answer.get(name) if self.is_record else answer for answer in answers]
            )
            for name in wanted
        ]
