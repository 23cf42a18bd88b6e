"""Tensors of the Open Inference Protocol, version 2: their datatypes, as bytes and as JSON.

Layer 4. Knows neither flows nor connections. A tensor is held to its shape before anything of that
size is made, so that what a client claims costs nothing.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.diagnostics import BadRequest
from flowlang.runtime.results import top_places

if TYPE_CHECKING:
    import numpy as np

Values: TypeAlias = "list[bytes] | np.ndarray[Any, Any]"

BYTES = "BYTES"
# The protocol's datatypes by numpy's names. Values are little-endian on the wire.
NUMPY: Mapping[str, str] = {
    "BOOL": "bool", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
DATATYPE: Mapping[str, str] = {
    "bool": "BOOL", "u8": "UINT8", "u16": "UINT16", "i8": "INT8", "i16": "INT16", "i32": "INT32",
    "i64": "INT64", "f16": "FP16", "f32": "FP32", "f64": "FP64",
}  # fmt: skip
MAX_RANK = 32  # numpy's, before its version 2
MAX_SIDE = 2**63 - 1
MAX_EMPTY = 1 << 22  # of the sides of a tensor without values, but for those of 0, the product
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor: `values` in row-major order, a list of bytes for BYTES, else a flat array."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Values


def check_datatype(place: str, datatype: object) -> str:
    """A datatype that can be read. Raises BadRequest."""
    if not isinstance(datatype, str) or (datatype != BYTES and datatype not in NUMPY):
        shown = f"`{datatype}`" if isinstance(datatype, str) else "what is given"
        raise BadRequest(f"{place}.datatype: {shown} is none of {', '.join(NUMPY)}, {BYTES}")
    return datatype


def check_shape(place: str, shape: object) -> tuple[int, ...]:
    """A shape as a tuple. Raises BadRequest for what is none."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) > MAX_RANK:
        raise BadRequest(f"{place}.shape: a list of at most {MAX_RANK} numbers is wanted")
    for side in shape:
        if not isinstance(side, int) or isinstance(side, bool) or not 0 <= side <= MAX_SIDE:
            ends = f"none is below 0 or above {MAX_SIDE}"
            raise BadRequest(f"{place}.shape: its numbers are whole, and {ends}")
    # Values pay for other shapes. These have none, and yet rows that somebody may make lists of.
    if 0 in shape and math.prod(side for side in shape if side) > MAX_EMPTY:
        raise BadRequest(f"{place}.shape: {list(shape)} is too large for what holds no values")
    return tuple(shape)


def from_raw(place: str, datatype: str, shape: tuple[int, ...], raw: bytes | memoryview) -> Values:
    """Values out of the bytes of a tensor. Raises BadRequest where those are not of its shape."""
    import numpy as np

    count = math.prod(shape)
    if datatype == BYTES:
        return _split(place, shape, count, raw)
    dtype = np.dtype(NUMPY[datatype])
    if len(raw) != count * dtype.itemsize:
        wanted = f"{datatype} of shape {list(shape)} takes {count * dtype.itemsize:,} bytes"
        raise BadRequest(f"{place}: {wanted}, and there are {len(raw):,}")
    if datatype == "BOOL":  # any byte but 0 is true, and numpy holds 1 only
        return np.frombuffer(raw, np.uint8).astype(np.bool_)
    # Copied: the bytes lie where they happen to in the body, which models do not take.
    return np.array(np.frombuffer(raw, dtype), dtype.newbyteorder("="))


def _split(place: str, shape: tuple[int, ...], count: int, raw: bytes | memoryview) -> list[bytes]:
    """The elements of a BYTES tensor, each behind its length in four bytes."""
    found: list[bytes] = []
    at, end = 0, len(raw)
    if count * _LENGTH.size > end:
        raise BadRequest(f"{place}: {BYTES} of shape {list(shape)} needs more than {end:,} bytes")
    for index in range(count):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(raw, at)[0] if start <= end else end + 1
        if at > end:
            raise BadRequest(f"{place}: element {index} reaches beyond the {end:,} bytes given")
        found.append(bytes(raw[start:at]))
    if at != end:
        raise BadRequest(f"{place}: {end - at:,} bytes are left behind its {count} elements")
    return found


def from_list(place: str, datatype: str, shape: tuple[int, ...], given: object) -> Values:
    """Values out of JSON: a list, flat or nested as the shape is. Raises BadRequest."""
    if not isinstance(given, list):
        raise BadRequest(f"{place}: a list is wanted")
    flat = _flat(place, shape, given)
    return _texts(place, flat) if datatype == BYTES else _numbers(place, datatype, flat)


def from_field(
    place: str, datatype: str, shape: tuple[int, ...], given: Collection[Any], held: str
) -> np.ndarray[Any, Any]:
    """Numbers out of a field of numbers that are of the datatype `held`. Raises BadRequest."""
    import numpy as np

    check_count(place, shape, len(given))
    values = np.fromiter(given, NUMPY[held], len(given))
    if held != datatype and len(given):
        _check_range(place, datatype, values.min(), values.max())
    return values.astype(np.dtype(NUMPY[datatype]).newbyteorder("="), copy=False)


def check_count(place: str, shape: tuple[int, ...], count: int) -> None:
    """Raises BadRequest where a shape holds another number of values."""
    if count != math.prod(shape):
        wanted = f"shape {list(shape)} holds {math.prod(shape):,} values"
        raise BadRequest(f"{place}: {wanted}, and there are {count:,}")


def _flat(place: str, shape: tuple[int, ...], given: list[Any]) -> list[Any]:
    """The values of a list, flat or nested as the shape is. Raises BadRequest.

    Lengths are looked at first: a message can hold millions of values that no shape asks for.
    """
    if not given or type(given[0]) is not list:
        check_count(place, shape, len(given))
        return given
    level, depth = [given], 0
    while level and type(level[0]) is list:
        if set(map(type, level)) != {list}:
            raise BadRequest(f"{place}: the lists in it are not all as deep")
        wanted = shape[depth] if depth < len(shape) else None
        if wrong := set(map(len, level)) - {wanted}:
            there = f"a list of {min(wrong):,} at depth {depth + 1}"
            raise BadRequest(f"{place}: {there} is not of shape {list(shape)}")
        level, depth = list(itertools.chain.from_iterable(level)), depth + 1
    check_count(place, shape, len(level))
    return level


def _texts(place: str, given: list[Any]) -> list[bytes]:
    if not set(map(type, given)) <= {str}:
        raise BadRequest(f"{place}: {BYTES} in JSON are strings")
    try:
        return [text.encode() for text in given]
    except UnicodeEncodeError:
        raise BadRequest(f"{place}: a string in it is no text (a lone surrogate)") from None


_KINDS: Mapping[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}


def _numbers(place: str, datatype: str, given: list[Any]) -> np.ndarray[Any, Any]:
    import numpy as np

    dtype = np.dtype(NUMPY[datatype]).newbyteorder("=")
    if not set(map(type, given)) <= _KINDS[dtype.kind]:
        raise BadRequest(f"{place}: not all of it is {datatype}")
    if dtype.kind != "f":
        if dtype.kind != "b" and given:
            _check_range(place, datatype, min(given), max(given))
        return np.array(given, dtype)
    try:
        wide = np.array(given, np.float64)
    except OverflowError:  # a whole number beyond any float
        raise _out_of_range(place, datatype) from None
    with np.errstate(over="ignore"):
        values = wide.astype(dtype, copy=False)
    if not (np.isfinite(values) == np.isfinite(wide)).all():
        raise _out_of_range(place, datatype)
    return values


def _check_range(place: str, datatype: str, lowest: int, highest: int) -> None:
    """Raises BadRequest where whole numbers reach beyond a datatype."""
    import numpy as np

    bounds = np.iinfo(NUMPY[datatype])
    if lowest < bounds.min or highest > bounds.max:
        raise _out_of_range(place, datatype)


def _out_of_range(place: str, datatype: str) -> BadRequest:
    return BadRequest(f"{place}: not all of it lies in the range of {datatype}")


def classes_of(tensor: Tensor, count: int) -> Tensor:
    """The greatest numbers of each item, at most so many, as texts: `0.75:3` is the one at 3.

    Values have no more digits than tell them apart. Tensors know no names, which could follow.
    """
    import numpy as np

    rows = np.asarray(tensor.values).reshape(tensor.shape[0], -1)
    texts = []
    for row in rows:
        places = top_places(row, count)
        pairs = zip(row[places], places.tolist(), strict=True)
        texts += [f"{value!s}:{place}".encode() for value, place in pairs]
    return Tensor(tensor.name, BYTES, (len(rows), min(count, rows.shape[1])), texts)


def to_raw(tensor: Tensor) -> bytes:
    """The values as the bytes that go over the wire."""
    values = tensor.values
    if isinstance(values, list):
        return b"".join(part for text in values for part in (_LENGTH.pack(len(text)), text))
    return values.astype(NUMPY[tensor.datatype], copy=False).tobytes()


def to_list(tensor: Tensor) -> list[Any]:
    """The values as a flat list for JSON. Raises BadRequest for bytes that are no text."""
    values = tensor.values
    if not isinstance(values, list):
        found: list[Any] = values.tolist()
        return found
    try:
        return [text.decode() for text in values]
    except UnicodeDecodeError:
        raise BadRequest(
            f"`{tensor.name}` holds bytes that are no text, which JSON cannot carry: "
            f"ask for it with the parameter `binary_data`"
        ) from None
