"""Tensors of the Open Inference Protocol, version 2: their datatypes, as bytes and as JSON.

Layer 4. Knows neither flows nor connections. A tensor is held to its shape before anything of that
size is made, so that what a client claims costs nothing.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.diagnostics import BadRequest

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
        if not isinstance(side, int) or isinstance(side, bool) or side < 0:
            raise BadRequest(f"{place}.shape: its numbers are whole, and none is below 0")
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
    values = _texts(place, given) if datatype == BYTES else _numbers(place, datatype, shape, given)
    check_count(place, shape, len(values))
    return values


def check_count(place: str, shape: tuple[int, ...], count: int) -> None:
    """Raises BadRequest where a shape holds another number of values."""
    if count != math.prod(shape):
        wanted = f"shape {list(shape)} holds {math.prod(shape):,} values"
        raise BadRequest(f"{place}: {wanted}, and there are {count:,}")


def _texts(place: str, given: list[Any]) -> list[bytes]:
    while given and isinstance(given[0], list):
        if not all(isinstance(part, list) for part in given):
            raise BadRequest(f"{place}: the lists in it are not all as deep")
        given = list(itertools.chain.from_iterable(given))
    if not all(isinstance(text, str) for text in given):
        raise BadRequest(f"{place}: {BYTES} in JSON are strings")
    try:
        return [text.encode() for text in given]
    except UnicodeEncodeError:
        raise BadRequest(f"{place}: a string in it is no text (a lone surrogate)") from None


def _numbers(
    place: str, datatype: str, shape: tuple[int, ...], given: list[Any]
) -> np.ndarray[Any, Any]:
    import numpy as np

    dtype = np.dtype(NUMPY[datatype]).newbyteorder("=")
    is_whole = dtype.kind in "iu"
    try:
        # As objects, whole numbers stay what they are: numpy makes floats of some large ones.
        array = np.array(given, object if is_whole else None)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise BadRequest(f"{place}: these are no numbers of one shape") from None
    flat = array.ravel()
    kinds = "b" if datatype == "BOOL" else "fiu"
    is_kind = all(type(v) is int for v in flat) if is_whole else array.dtype.kind in kinds
    if not is_kind and flat.size:
        raise BadRequest(f"{place}: not all of it is {datatype}")
    if array.ndim > 1 and array.shape != shape:
        raise BadRequest(f"{place}: a list of shape {list(array.shape)}, not {list(shape)}")
    if is_whole:
        bounds = np.iinfo(dtype)
        fits = all(bounds.min <= v <= bounds.max for v in flat)
    else:
        with np.errstate(over="ignore"):
            fits = bool((np.isfinite(flat.astype(dtype)) == np.isfinite(flat)).all())
    if not fits:
        raise BadRequest(f"{place}: not all of it lies in the range of {datatype}")
    return flat.astype(dtype)


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
