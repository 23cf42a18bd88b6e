"""Items at the door: what a flow is given, held against its type, and answers as plain values.

Layer 4, shared by the faces.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from flowlang.diagnostics import BadRequest
from flowlang.plan.types import Image, Record, Scalar, Shape, Tensor, Type

_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
}


def acceptor(kind: Type) -> Callable[[Any], Any]:
    """What checks an item at the door, before anything waits for it. It raises BadRequest."""
    if isinstance(kind, Scalar) and kind.name == "bytes":
        return _accept_bytes
    if isinstance(kind, Scalar) and kind.name in _PLAIN:
        return lambda item: _accept_plain(item, kind)
    if isinstance(kind, (Image, Tensor)):
        return lambda item: _accept_array(item, kind)
    if isinstance(kind, Record):
        fields = {name: acceptor(part) for name, part in kind.fields}

        def accept_record(item: Any) -> dict[str, Any]:
            if not isinstance(item, Mapping) or set(item) != set(fields):
                raise BadRequest(f"this flow takes a mapping with the keys {', '.join(fields)}")
            return {name: accept(item[name]) for name, accept in fields.items()}

        return accept_record
    return lambda item: item


def _accept_bytes(item: Any) -> Any:
    if isinstance(item, bytes):
        return item
    if isinstance(item, (bytearray, memoryview)):
        return bytes(item)
    hint = "; read the file first" if isinstance(item, (str, os.PathLike)) else ""
    raise BadRequest(f"this flow takes bytes, not {type(item).__name__}{hint}")


def _accept_plain(item: Any, kind: Scalar) -> Any:
    # To Python True is a number; to whoever sends it, it is not.
    if isinstance(item, _PLAIN[kind.name]) and isinstance(item, bool) == (kind.name == "bool"):
        return item
    raise BadRequest(f"this flow takes {kind}, not {type(item).__name__}")


def _accept_array(item: Any, kind: Image | Tensor) -> Any:
    import numpy as np

    from flowlang.runtime.ort import numpy_dtype

    dtype = numpy_dtype(kind.dtype)
    array = item
    if not isinstance(item, np.ndarray):
        try:
            given = np.asarray(item)
            array = given.astype(dtype)
        except (ValueError, TypeError, OverflowError):
            raise BadRequest(f"this flow takes {kind}, not {type(item).__name__}") from None
        changed = array.dtype.kind in "biu" and not np.array_equal(array, given)
        if changed or given.dtype.kind not in "biuf":
            raise BadRequest(f"this flow takes {kind}, and these values are not of its kind")
    if str(array.dtype) != dtype:
        raise BadRequest(f"this flow takes {kind}, not an array of {array.dtype}")
    _check_shape(array.shape, kind)
    return array


def _check_shape(shape: tuple[int, ...], kind: Image | Tensor) -> None:
    if isinstance(kind, Image):
        sides = (kind.height, kind.width)
        wanted: Shape | None = sides if kind.colour == "gray" else (*sides, 3)
    else:
        wanted = kind.shape
    if wanted is not None and (
        len(wanted) != len(shape)
        or any(w not in (None, s) for w, s in zip(wanted, shape, strict=True))
    ):
        raise BadRequest(f"this flow takes {kind}, not an array of shape {shape}")


def plain(value: Any) -> Any:
    """An answer as plain values, ready for JSON: arrays as nested lists, bytes in base64."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        import base64

        return base64.b64encode(value).decode()
    return value.tolist() if hasattr(value, "tolist") else value
