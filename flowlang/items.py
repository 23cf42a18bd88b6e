"""Items at the door: what a flow is given, held against its type, and answers as plain values.

Layer 4, shared by the faces.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowlang.diagnostics import BadRequest
from flowlang.plan.expression import known_value
from flowlang.plan.graph import FlowPlan
from flowlang.plan.ties import Side, differing, placed, ties_of
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
    without_null,
)
from flowlang.runtime.conform import PLACES, PLAIN


def acceptor(kind: Type) -> Callable[[Any], Any]:
    """What checks an item at the door, before anything waits for it. It raises BadRequest."""
    if kind == BYTES:
        return accept_bytes
    if isinstance(kind, Scalar) and kind.name in PLAIN:
        return lambda item: _accept_plain(item, kind)
    if isinstance(kind, Scalar) and kind.name in PLACES:
        return lambda item: _accept_place(item, kind)
    if isinstance(kind, (Image, Tensor)):
        return lambda item: _accept_array(item, kind)
    if isinstance(kind, Optional):
        inner = acceptor(without_null(kind))
        return lambda item: None if item is None else inner(item)
    if isinstance(kind, ListOf):
        return _list_acceptor(kind)
    if isinstance(kind, Record):
        return _record_acceptor(kind)
    return lambda item: item


def flow_acceptor(plan: FlowPlan) -> Callable[[Any], Any]:
    """What checks the item of a flow at the door; with what comes beside it, Arguments do."""
    accept, ties = acceptor(plan.input.type), Ties(plan)
    if plan.parameters or not ties:
        return accept

    def accept_tied(item: Any) -> Any:
        found = accept(item)
        ties.check((found,))
        return found

    return accept_tied


class Ties:
    """Holds the lengths of what a request brings against each other, where a model ties them."""

    def __init__(self, plan: FlowPlan) -> None:
        self._all = ties_of(plan)
        self._names = ("the item", *(f"`{p.name}`" for p in plan.parameters))

    def __bool__(self) -> bool:
        return bool(self._all)

    def check(self, values: Sequence[Any]) -> None:
        """The item, and behind it the parameters. Raises BadRequest."""
        for tie in self._all:
            lengths = [self._length(side, values) for side in tie.sides]
            if (wanted := differing(tie.symbol, lengths)) is not None:
                raise BadRequest(f"this flow takes {wanted}")

    def _length(self, side: Side, values: Sequence[Any]) -> tuple[int, str]:
        value, name = values[side.slot], self._names[side.slot]
        for field in side.fields:
            value = value[field]
        if side.fields:
            name = f"`{'.'.join(side.fields)}`"
        return value.shape[side.axis], placed(name, side.axis, value.ndim)


def _list_acceptor(kind: ListOf) -> Callable[[Any], Any]:
    inner = acceptor(kind.item)
    usual = set(PLAIN.get(kind.item.name, ())) if isinstance(kind.item, Scalar) else set()

    def accept(item: Any) -> list[Any]:
        if isinstance(item, (str, bytes, Mapping)) or not isinstance(item, Sequence):
            raise BadRequest(f"this flow takes {kind}, not {called(item)}")
        if set(map(type, item)) <= usual:  # one by one, millions would take seconds
            with contextlib.suppress(OverflowError):
                return list(map(float, item)) if float in usual else list(item)
        found: list[Any] = []
        try:
            for part in item:
                found.append(inner(part))  # noqa: PERF401  (how many there are tells the place)
        except BadRequest as error:
            raise BadRequest(f"element {len(found)}: {error.message}") from None
        return found

    return accept


def _record_acceptor(kind: Record) -> Callable[[Any], Any]:
    fields = {name: acceptor(part) for name, part in kind.fields}
    needed = [name for name, part in kind.fields if not isinstance(part, Optional)]
    wanted = f"this flow takes a record with the fields {', '.join(fields)}"

    def accept(item: Any) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            raise BadRequest(f"{wanted}, not {called(item)}")
        for name in needed:
            if name not in item:
                raise BadRequest(f"{wanted}, and `{name}` is missing")
        for name in item:
            if name not in fields:
                raise BadRequest(f"{wanted}, and none named `{name}`")
        found = {}
        for name, check in fields.items():
            try:
                found[name] = check(item.get(name))
            except BadRequest as error:
                raise BadRequest(f"`{name}`: {error.message}") from None
        return found

    return accept


def called(item: Any) -> str:
    """What an item is, in words of the language where it has one for it."""
    if item is None:
        return "null"
    if isinstance(item, Mapping):
        return "a record"
    if isinstance(item, (list, tuple)):
        return "a list"
    if hasattr(item, "dtype"):
        return f"an array of {item.dtype}"
    return type(item).__name__


def accept_bytes(item: Any) -> Any:
    """The item as bytes. Raises BadRequest where it is none."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, (bytearray, memoryview)):
        return bytes(item)
    hint = "; read the file first" if isinstance(item, (str, os.PathLike)) else ""
    raise BadRequest(f"this flow takes bytes, not {called(item)}{hint}")


def _accept_plain(item: Any, kind: Scalar) -> Any:
    found: Any = item.item() if getattr(item, "shape", None) == () else item  # numpy's number
    # To Python True is a number; to whoever sends it, it is not.
    wanted = PLAIN[kind.name]
    is_kind = isinstance(found, wanted) and isinstance(found, bool) == (kind.name == "bool")
    if not is_kind:
        raise BadRequest(f"this flow takes {kind}, not {called(item)}")
    try:
        return float(found) if float in wanted else found
    except OverflowError:
        raise BadRequest(f"this flow takes {kind}, and this number is too large") from None


def _accept_place(item: Any, kind: Scalar) -> Any:
    import numpy as np

    shape, words = PLACES[kind.name]
    try:
        given = np.asarray(item)
    except ValueError:  # lists of different lengths
        given = np.empty(0)
    is_place = given.shape == shape and given.dtype.kind in "iuf" and not _has_truth(item)
    if not is_place or not np.isfinite(given).all():
        shown = "null" if item is None else reprlib.repr(item)
        raise BadRequest(f"this flow takes {kind} ({words}), not {shown}")
    return given.tolist()


def _accept_array(item: Any, kind: Image | Tensor) -> Any:
    import numpy as np

    if kind == ANY_ARRAY:
        return _any_array(item)
    if item is None:
        raise BadRequest(f"this flow takes {kind}, not null")
    dtype = numpy_dtype(kind.dtype)
    array = item
    if not isinstance(item, np.ndarray):
        try:
            given = np.asarray(item)
            with np.errstate(over="ignore", invalid="ignore"):
                array = given.astype(dtype)
        except (ValueError, TypeError, OverflowError):
            raise BadRequest(f"this flow takes {kind}, not {called(item)}") from None
        is_whole = array.dtype.kind in "biu"
        changed = given.dtype.kind in "biuf" and not (
            np.array_equal(array, given) if is_whole else (np.isinf(array) == np.isinf(given)).all()
        )
        is_mixed = dtype != "bool" and _has_truth(item)  # numpy makes 1 of True
        if changed or is_mixed or given.dtype.kind not in "biuf":
            raise BadRequest(f"this flow takes {kind}, and these values are not of its kind")
    if str(array.dtype) != dtype:
        raise BadRequest(f"this flow takes {kind}, not an array of {array.dtype}")
    _check_shape(array.shape, kind)
    return array


def _has_truth(item: Any) -> bool:
    """Whether there is a True or a False in lists as deep as each other."""
    level, kinds = [item], {type(item)}
    while level and kinds <= {list, tuple}:
        level = list(itertools.chain.from_iterable(level))
        kinds = set(map(type, level))
    return bool in kinds


def _any_array(item: Any) -> Any:
    import numpy as np

    try:
        array = np.asarray(item)
    except ValueError:  # lists of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise BadRequest(f"this flow takes an array of numbers, not {called(item)}")
    return array


def _check_shape(shape: tuple[int, ...], kind: Image | Tensor) -> None:
    if not shape_fits(shape, kind.shape):
        raise BadRequest(f"this flow takes {kind}, not an array of shape {shape}")
    if isinstance(kind, Image) and 0 in shape:
        raise BadRequest(f"this flow takes {kind}, and one of shape {shape} has no pixels")


class Arguments:
    """The values a request brings for the parameters of its flow, checked at the door."""

    def __init__(self, plan: FlowPlan) -> None:
        parameters = plan.parameters
        self._ties = Ties(plan)
        self._accept = {p.name: acceptor(p.type) for p in parameters}
        self._defaults: dict[str, Any] = {
            p.name: None for p in parameters if isinstance(p.type, Optional)
        }
        self._defaults |= {
            p.name: known_value(p.default) for p in parameters if p.default is not None
        }

    def beside(self, item: Any, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """The item, and behind it the parameters in order. Raises BadRequest."""
        unknown = given.keys() - self._accept.keys()
        if unknown:
            known = ", ".join(f"`{n}`" for n in self._accept) or "none"
            raise BadRequest(f"this flow has no parameter `{min(unknown)}`; it has {known}")
        found = []
        for name, accept in self._accept.items():
            if name not in given and name not in self._defaults:
                raise BadRequest(f"this flow needs its parameter `{name}`")
            try:
                found.append(accept(given[name]) if name in given else self._defaults[name])
            except BadRequest as error:
                raise BadRequest(f"`{name}`: {error.message}") from None
        self._ties.check((item, *found))
        return (item, *found)


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
