"""Values held against types: what is let through, what becomes of it, and what is refused."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlang.items import acceptor
from flowlang.plan.types import (
    ANY_ARRAY,
    BOOL,
    BYTES,
    FLOAT,
    INT,
    STR,
    UNKNOWN,
    Image,
    ListOf,
    Optional,
    Record,
    Scalar,
    Tensor,
    Type,
)
from flowlang.runtime.conform import NotOfType, conforming


class Point(NamedTuple):
    x: float
    y: float | None = None


@dataclasses.dataclass
class Shape:
    points: Any
    name: str = ""

    @property
    def size(self) -> int:
        return len(self.points)


class Odd:
    """What no type of the language is."""


POINT = Record((("x", FLOAT), ("y", Optional(FLOAT))), "Point")
SHAPE = Record((("points", ListOf(POINT)), ("name", STR)), "Shape")
GOOD: dict[str, tuple[Type, Any, Any]] = {
    "int": (INT, 3, 3),
    "numpy's int": (INT, np.int16(3), 3),
    "array of one int": (INT, np.asarray(3), 3),
    "float": (FLOAT, 0.5, 0.5),
    "int for float": (FLOAT, 3, 3.0),
    "numpy's float": (FLOAT, np.float32(0.5), 0.5),
    "str": (STR, "a", "a"),
    "numpy's str": (STR, np.str_("a"), "a"),
    "bool": (BOOL, True, True),
    "numpy's bool": (BOOL, np.bool_(True), True),
    "bytes": (BYTES, b"a", b"a"),
    "bytearray": (BYTES, bytearray(b"a"), b"a"),
    "memoryview": (BYTES, memoryview(b"a"), b"a"),
    "null": (Optional(INT), None, None),
    "not null": (Optional(FLOAT), 3, 3.0),
    "null in null": (ListOf(Optional(ListOf(INT))), [None, [1]], [None, [1]]),
    "list": (ListOf(INT), [1, np.int64(2)], [1, 2]),
    "empty list": (ListOf(INT), [], []),
    "tuple": (ListOf(FLOAT), (1, 0.5), [1.0, 0.5]),
    "range": (ListOf(INT), range(3), [0, 1, 2]),
    "deque": (ListOf(INT), deque([1]), [1]),
    "array as a list": (ListOf(ListOf(FLOAT)), np.eye(2), [[1.0, 0.0], [0.0, 1.0]]),
    "list of arrays": (ListOf(Tensor("f32", (2,))), [[1, 2]], [[1.0, 2.0]]),
    "dict": (POINT, {"y": 2, "x": 1}, {"x": 1.0, "y": 2.0}),
    "dict without what may be null": (POINT, {"x": 1}, {"x": 1.0, "y": None}),
    "other mapping": (POINT, MappingProxyType(OrderedDict(x=1)), {"x": 1.0, "y": None}),
    "named tuple": (POINT, Point(1), {"x": 1.0, "y": None}),
    "dataclass": (SHAPE, Shape([Point(1, 2)]), {"points": [{"x": 1.0, "y": 2.0}], "name": ""}),
    "path": (Scalar("path"), "a/b", "a/b"),
    "duration": (Scalar("duration"), 2, 2.0),
    "box": (Scalar("box"), (1, 2, 3, 4), [1.0, 2.0, 3.0, 4.0]),
    "quad": (Scalar("quad"), np.eye(4, 2), [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
    "whatever": (UNKNOWN, b"a", b"a"),
    "numpy's whatever": (UNKNOWN, np.int8(3), 3),
}
BAD: dict[str, tuple[Type, Any, str]] = {
    "float for int": (INT, 3.0, "a float is not int"),
    "bool for int": (INT, True, "a bool is not int"),
    "numpy's bool for int": (INT, np.bool_(True), "a bool is not int"),
    "bool for float": (FLOAT, False, "a bool is not float"),
    "int for bool": (BOOL, 1, "an int is not bool"),
    "str for bytes": (BYTES, "a", "a str is not bytes"),
    "bytes for str": (STR, b"a", "a bytes is not str"),
    "null": (INT, None, "None is not int"),
    "null for a record": (POINT, None, "None is not Point"),
    "null for a list": (ListOf(INT), None, "None is not list<int>"),
    "str for a list": (ListOf(STR), "ab", "a str is not list<str>"),
    "dict for a list": (ListOf(STR), {"a": 1}, "a dict is not list<str>"),
    "set for a list": (ListOf(INT), {1}, "a set is not list<int>"),
    "generator for a list": (ListOf(INT), (i for i in (1,)), "a generator is not list<int>"),
    "number for a list": (ListOf(INT), np.int64(3), "is not list<int>"),
    "element": (ListOf(INT), [1, None, "x"], "element 1: None is not int"),
    "element deep inside": (
        ListOf(SHAPE),
        [Shape([]), Shape([Point(1), Point("x")])],  # type: ignore[arg-type]
        "element 1: `points`: element 1: `x`: a str is not float",
    ),
    "missing field": (POINT, {"y": 1}, "it has the fields y, not x, y"),
    "other field": (POINT, {"x": 1, "z": 1}, "it has the fields x, z, not x, y"),
    "field that is no name": (POINT, {"x": 1, 3: 1}, "it has the fields x, 3, not x, y"),
    "class for a record": (POINT, Point, "a type is not Point"),
    "list for a record": (POINT, [1, 2], "a list is not Point"),
    "three numbers for a box": (Scalar("box"), [1, 2, 3], "a list is not box: left, top, right"),
    "text for a box": (Scalar("box"), "abcd", "a str is not box"),
    "points of three": (Scalar("quad"), np.zeros((4, 3)), "a ndarray is not quad: four points"),
    "ragged points": (Scalar("quad"), [[1, 2], [3]], "a list is not quad"),
    "object": (POINT, Odd(), "a Odd is not Point"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_of_its_type_is_made_plain(name: str) -> None:
    """A value comes out as flows hold it: Python's own types, dicts in the order of their type."""
    kind, value, wanted = GOOD[name]
    got = conforming(kind)(value)
    plain = [g.tolist() if isinstance(g, np.ndarray) else g for g in got] if isinstance(
        got, list) else got  # fmt: skip
    assert plain == wanted
    assert type(plain) is type(wanted)
    if isinstance(wanted, dict):
        assert list(got) == list(wanted)


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_of_its_type_is_refused(name: str) -> None:
    """The message leads to the part that is wrong, and says what it is."""
    kind, value, words = BAD[name]
    with pytest.raises(NotOfType) as caught:
        conforming(kind)(value)
    assert words in str(caught.value)


F32, U8 = np.float32, np.uint8
ARRAYS: tuple[tuple[Type, Any, Any], ...] = (
    (Tensor("f32", (2,)), np.zeros(2, F32), F32),
    (Tensor("f32", (2,)), np.zeros(2), F32),  # a wider float is narrowed
    (Tensor("f32", (2,)), [1, 2], F32),
    (Tensor("f32", (None, 2)), np.zeros((5, 2), np.float16), F32),
    (Tensor("f32", None), np.zeros((5, 2, 3), int), F32),
    (Tensor("f32", ()), 3, F32),
    (Tensor("i64", (2,)), np.zeros(2, np.int32), np.int64),
    (Tensor("u8", (2,)), np.zeros(2, U8), U8),
    (Tensor("bool", (2,)), np.zeros(2, bool), np.bool_),
    (Image(), np.zeros((4, 5, 3), U8), U8),
    (Image("gray"), np.zeros((4, 5), U8), U8),
    (Image("rgb", "f32"), np.zeros((4, 5, 3)), F32),
    (Image("rgb", "u8", 4, None), np.zeros((4, 5, 3), U8), U8),
    (ANY_ARRAY, np.zeros((4, 5), np.complex128), np.complex128),
    (ANY_ARRAY, [[1, 2]], np.int64),
)
NO_ARRAYS: tuple[tuple[Type, Any, str], ...] = (
    (Tensor("f32", (2,)), np.zeros(3, F32), "an array of shape 3 is not tensor<f32, 2>"),
    (Tensor("f32", (2,)), np.zeros((2, 1), F32), "an array of shape 2x1 is not tensor<f32, 2>"),
    (Tensor("f32", ()), [1], "an array of shape 1 is not f32"),
    (Tensor("i64", (2,)), np.zeros(2), "an array of float64 is not tensor<i64, 2>"),
    (Tensor("u8", (2,)), np.zeros(2, int) - 1, "an array of int64 is not tensor<u8, 2>"),
    (Tensor("f32", None), ["a"], "is not tensor<f32>"),
    (Tensor("f32", None), None, "an array of object is not tensor<f32>"),
    (Tensor("f32", None), np.zeros(2, complex), "an array of complex128 is not tensor<f32>"),
    (Image(), np.zeros((4, 5), U8), "an array of shape 4x5 is not image<undecided, u8, hwc>"),
    (Image(), np.zeros((4, 5, 4), U8), "an array of shape 4x5x4 is not image<undecided"),
    (Image("gray"), np.zeros((4, 5, 1), U8), "an array of shape 4x5x1 is not image<gray"),
    (Image("rgb"), np.zeros((4, 5, 3)), "an array of float64 is not image<rgb, u8, hwc>"),
    (Image("rgb", "u8", 4, 4), np.zeros((4, 5, 3), U8), "an array of shape 4x5x3 is not image<rgb"),
)


@pytest.mark.parametrize("number", range(len(ARRAYS)))
def test_arrays_are_of_their_dtype(number: int) -> None:
    """Arrays of the same kind of numbers are cast, and their shape is held against the type."""
    kind, value, dtype = ARRAYS[number]
    got = conforming(kind)(value)
    assert got.dtype == dtype
    assert got.shape == np.shape(value)


@pytest.mark.parametrize("number", range(len(NO_ARRAYS)))
def test_other_arrays_are_refused(number: int) -> None:
    """Numbers that would lose what they say, wrong shapes, and what is no array."""
    kind, value, words = NO_ARRAYS[number]
    with pytest.raises(NotOfType) as caught:
        conforming(kind)(value)
    assert words in str(caught.value)


def test_an_array_that_fits_is_not_copied() -> None:
    """What is right already goes on as it is."""
    array = np.zeros((4, 5, 3), U8)
    assert conforming(Image("rgb"))(array) is array


def kinds() -> st.SearchStrategy[Type]:
    plain = st.sampled_from([INT, FLOAT, STR, BOOL, BYTES])

    def grow(inner: st.SearchStrategy[Type]) -> st.SearchStrategy[Type]:
        fields = st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
        records = fields.map(lambda f: Record(tuple(f.items())))
        nullable = inner.filter(lambda kind: not isinstance(kind, Optional)).map(Optional)
        return inner.map(ListOf) | nullable | records

    return st.recursive(plain, grow, max_leaves=6)


def values(kind: Type) -> st.SearchStrategy[Any]:
    """Values of a type, as flows hold them."""
    if isinstance(kind, Optional):
        return st.none() | values(kind.item)
    if isinstance(kind, ListOf):
        return st.lists(values(kind.item), max_size=3)
    if isinstance(kind, Record):
        return st.fixed_dictionaries({n: values(k) for n, k in kind.fields})
    plain: dict[Type, st.SearchStrategy[Any]] = {
        INT: st.integers(), FLOAT: st.floats(allow_nan=False), STR: st.text(), BOOL: st.booleans(),
        BYTES: st.binary(),
    }  # fmt: skip
    return plain[kind]


@given(data=st.data())
def test_what_flows_hold_conforms_as_it_is(data: st.DataObject) -> None:
    """Values of a type are left alone, behind an operator and at the door."""
    kind = data.draw(kinds())
    value = data.draw(values(kind))
    for check in (conforming(kind), acceptor(kind)):
        got = check(value)
        assert got == value
        assert is_of(got, kind)


@given(data=st.data())
def test_no_value_is_of_a_type_that_it_is_not(data: st.DataObject) -> None:
    """A value of one type is refused by another, unless it is one of that too."""
    kind, other = data.draw(kinds()), data.draw(kinds())
    value = data.draw(values(kind))
    try:
        got = conforming(other)(value)
    except NotOfType:
        return
    assert is_of(got, other)


def is_of(value: Any, kind: Type) -> bool:
    """Whether a value is one of a type, told as plainly as possible."""
    if isinstance(kind, Optional):
        return value is None or is_of(value, kind.item)
    if isinstance(kind, ListOf):
        return type(value) is list and all(is_of(v, kind.item) for v in value)
    if isinstance(kind, Record):
        return list(value) == [n for n, _ in kind.fields] and all(
            is_of(value[n], k) for n, k in kind.fields
        )
    plain: dict[Type, type] = {INT: int, FLOAT: float, STR: str, BOOL: bool, BYTES: bytes}
    return type(value) is plain[kind]


def test_an_endless_generator_is_not_waited_for() -> None:
    """A list is a sequence: what may never end is refused unread."""

    def forever() -> Iterator[int]:
        while True:
            yield 1

    with pytest.raises(NotOfType, match="a generator is not list<int>"):
        conforming(ListOf(INT))(forever())
