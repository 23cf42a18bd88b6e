"""Operators in Python at work: what they are given, what they give, and what they cannot spoil."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import pytest

import flowlang
from flowlang.runtime.stage import MAX_ABANDONED
from tests.pictures import photographs
from tests.waiting import LONG_S, eventually

HEAD = """
from __future__ import annotations
import asyncio, dataclasses, sys, threading, time
from typing import Annotated, Any, ClassVar, NamedTuple, TypedDict
import numpy as np
import flowlang
from flowlang import batched
"""

Load: TypeAlias = Callable[..., flowlang.App]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Starts a flow that uses a file of operators as `p`."""
    apps: list[flowlang.App] = []

    def start(python: str, flow: str, **options: Any) -> flowlang.App:
        (tmp_path / "p.py").write_text(HEAD + python, "utf-8")
        path = tmp_path / "app.flow"
        path.write_text(f'use "p.py" as p\n{flow}\n', "utf-8")
        apps.append(flowlang.load(path, device="cpu", **options))
        return apps[-1]

    yield start
    for app in apps:
        app.close(1.0)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[ModuleType]:
    """A module that the operators of a test import too: `seen`, and a gate that stands open.

    Whatever a test has shut it for goes on at its end.
    """
    name = f"shared_{tmp_path.name}_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(
        "import threading\nseen = []\ngate = threading.Event()\ngate.set()\n"
        "entered = threading.Semaphore(0)\n"
    )
    sys.path.append(str(tmp_path))
    try:
        module = import_module(name)
    finally:
        sys.path.remove(str(tmp_path))
    yield module
    module.gate.set()


def error_of(future: Future[Any] | Callable[[], Any]) -> Exception:
    """What a call fails with."""
    with pytest.raises(flowlang.RequestError) as caught:
        future.result(LONG_S) if isinstance(future, Future) else future()
    return caught.value


# What they are given, and give


def test_an_operator_is_called_for_each_item(load: Load) -> None:
    """An item in, a result out; a flow of nothing but Python is one."""
    app = load("def f(x: int) -> int: return x + 1", "export flow a = p.f -> p.f")
    assert app(3) == 5
    assert list(app.map(range(50))) == list(range(2, 52))


def test_an_argument_may_be_called_function(load: Load) -> None:
    """No name of an argument is taken by anything else."""
    app = load(
        "def f(x: int, *, function: str) -> str: return f'{x} {function}'",
        'export flow a = p.f(function="b")',
    )
    assert app(3) == "3 b"


def test_null_of_any_type_is_passed_over(load: Load) -> None:
    """What says nothing of its type may be null too."""
    app = load("def f(x: int) -> Any: return x or None", "export flow a: int -> int = p.f ?? 7")
    assert list(app.map([0, 3])) == [7, 3]


ARGUMENTS = """
def f(x: int, scale: float = 1.0, sure: bool = False, *, mode: str = "a",
      items: list[int] = [1], free: Any = None) -> str:
    return f"{x} {scale} {sure} {mode} {items} {free}"
"""


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("f", "7 1.0 False a [1] None"),
        ("f(2, true)", "7 2 True a [1] None"),
        ('f(50%, sure, mode="b")', "7 0.5 True b [1] None"),
        ('f(items=[1, 2], free="x")', "7 1.0 False a [1, 2] x"),
        ("f(k)", "7 5 False a [1] None"),
        ("f(scale=k / 2, free=in)", "7 2.5 False a [1] 7"),
        ('f(free={ a: k, b: [in, 1] }, mode="b")', "7 1.0 False b [1] {'a': 5, 'b': [7, 1]}"),
    ],
)
def test_arguments_arrive_as_they_are_written(load: Load, call: str, answer: str) -> None:
    """Fixed ones, those of requests, and Python's own defaults for the rest."""
    app = load(ARGUMENTS, f"export flow a(k: int = 5): int -> str {{ return in -> p.{call} }}")
    assert app(7) == answer
    assert app(7, k=5) == answer


def test_several_parameters_are_the_fields_of_a_record(load: Load) -> None:
    """In whatever order the record has them, with arguments besides."""
    app = load(
        "def f(a: int, b: int, *, k: int = 1) -> int: return (a - b) * k\n"
        "@batched\ndef g(a: list[int], b: list[int], *, k: int = 1) -> list[int]:\n"
        "    return [(x - y) * k for x, y in zip(a, b)]\n",
        "export flow a = p.f(k=3)\nexport flow b: { b: int, a: int } -> int = p.g(k=3)",
    )
    assert app["a"]({"a": 5, "b": 3}) == app["b"]({"a": 5, "b": 3}) == 6


RESULTS = """
class Dict(TypedDict):
    a: int
    b: str | None
class Tuple(NamedTuple):
    a: int
    b: float = 2
@dataclasses.dataclass
class Data:
    a: list[Tuple]
    b: Annotated[np.ndarray, "tensor<f32, 2>"]
def as_dict(x: int) -> Dict: return {"a": np.int32(x), "b": None}
def as_tuple(x: int) -> Tuple: return Tuple(x)
def as_data(x: int) -> Data: return Data([Tuple(x)], [x, 0])
def as_list(x: int) -> list[float]: return np.arange(3)
def as_bytes(x: int) -> bytes: return bytearray(b"x" * x)
def as_none(x: int) -> int | None: return None
def as_any(x: int) -> Any: return np.float64(x)
"""


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("as_dict", {"a": 2, "b": None}),
        ("as_tuple", {"a": 2, "b": 2.0}),
        ("as_data", {"a": [{"a": 2, "b": 2.0}], "b": [2, 0]}),
        ("as_list", [0.0, 1.0, 2.0]),
        ("as_bytes", b"xx"),
        ("as_none", None),
        ("as_any", 2.0),
    ],
)
def test_results_are_made_plain(load: Load, name: str, answer: Any) -> None:
    """Records of any kind become dicts, numpy's numbers Python's, and sequences lists."""
    got = load(RESULTS, f"export flow a = p.{name}")(2)
    if isinstance(got, dict) and isinstance(got["b"], np.ndarray):
        got = {**got, "b": got["b"].tolist()}
    assert got == answer
    assert type(got) is type(answer)


RECORDS = """
class Point(NamedTuple):
    x: int
    y: float = 0.5
@dataclasses.dataclass(frozen=True)
class Shape:
    points: list[Point]
    first: Point | None
    image: np.ndarray
    def __post_init__(self):
        if not self.points: raise flowlang.BadRequest("a shape has points")
@dataclasses.dataclass
class Sized:
    UNIT: ClassVar[str] = "px"
    side: int
    area: int = dataclasses.field(init=False)
    def __post_init__(self): self.area = self.side**2
class Loose(TypedDict):
    shape: Shape
def point(p: Point) -> float: return p.x + p.y
def shape(s: Shape) -> str: return f"{s.points} {s.first} {s.image.flags.writeable}"
def loose(s: Loose) -> str: return f"{type(s).__name__} {s['shape'].points[0].x}"
def two(a: Point, b: Point | None) -> str: return f"{a.x} {b}"
@batched
def many(shapes: list[Shape]) -> list[int]: return [s.points[0].x for s in shapes]
def make(x: int) -> Point: return Point(x, x)
def size(x: int) -> Sized: return Sized(x)
def sized(s: Sized) -> str: return f"{s.area} {s.UNIT}"
"""


def test_records_arrive_as_their_classes(load: Load) -> None:
    """Named tuples and dataclasses, also inside lists and others; a TypedDict is a dict."""
    app = load(
        RECORDS,
        "export flow point = p.point\nexport flow shape = p.shape\nexport flow loose = p.loose\n"
        "export flow two = p.two\nexport flow many = p.many\n"
        "export flow made = p.make -> p.point\nexport flow sized = p.size -> p.sized",
    )
    image = np.zeros((2, 2))
    shape = {"points": [{"x": 1, "y": 2.0}], "first": None, "image": image}
    assert app["point"]({"x": 1, "y": 2}) == 3.0
    assert app["shape"](shape) == "[Point(x=1, y=2.0)] None False"
    assert app["loose"]({"shape": shape}) == "dict 1"
    assert app["two"]({"a": {"x": 1, "y": 2}}) == "1 None"
    assert app["many"](shape) == 1
    assert app["made"](2) == 4.0
    assert app["sized"](3) == "9 px"
    for name in ("shape", "many"):
        with pytest.raises(flowlang.BadRequest, match="a shape has points"):
            app[name]({**shape, "points": []})


FILLED = """
class Point(NamedTuple):
    x: int
    y: float = 0.5
    note: str | None = "none"
@dataclasses.dataclass
class Job:
    name: str
    seen: list[int] = dataclasses.field(default_factory=list)
    at: Point = Point(7)
    area: int = dataclasses.field(init=False)
    def __post_init__(self): self.area = 3
def point(p: Point) -> str: return f"{p.x} {p.y} {p.note}"
def job(j: Job) -> str:
    j.seen.append(1)
    return f"{j.name} {j.seen} {j.at.x} {j.area}"
@batched
def jobs(js: list[Job]) -> list[str]: return [job(j) for j in js]
def make(x: int) -> Point: return Point(x, note=None)
def told(x: int, *, at: Point) -> str: return point(at)
"""


@pytest.mark.parametrize(
    ("flow", "item", "answer"),
    [
        ("a = p.point", {"x": 1}, "1 0.5 None"),
        ("a = p.point", {"x": 1, "y": None}, "1 0.5 None"),
        ("a = p.point", {"x": 1, "y": 2, "note": "n"}, "1 2.0 n"),
        ("a = p.job", {"name": "a"}, "a [1] 7 3"),
        ("a = p.job", {"name": "a", "seen": [5], "at": {"x": 2}, "area": 9}, "a [5, 1] 2 3"),
        ("a = p.jobs", {"name": "a"}, "a [1] 7 3"),
        ("a = p.told(at={ x: 4 })", 1, "4 0.5 None"),
        ("a: int -> str = { x: pass } -> p.point", 1, "1 0.5 None"),
        ("a: list<p.Point> -> list<str> = map(p.point)", [{"x": 1}], ["1 0.5 None"]),
        ("a: { of: p.Point } -> str = .of -> p.point", {"of": {"x": 1}}, "1 0.5 None"),
        ("a = as p.Point -> p.point", {"x": 1}, "1 0.5 None"),
        ("a: p.Point -> p.Point = pass", {"x": 1}, {"x": 1, "y": None, "note": None}),
        ("a: p.Point -> float = .y ?? 0.25", {"x": 1}, 0.25),
        ("a = p.make -> .y + 1", 1, 1.5),
        ("a: int -> p.Point = p.make -> as p.Point", 2, {"x": 2, "y": 0.5, "note": None}),
        ("a = p.make -> part\nflow part: p.Point -> float = .y + 1", 1, 1.5),
        ("a = p.make -> part(at={ x: 3 })\nflow part(at: p.Point): p.Point -> int = at.x", 1, 3),
    ],
)
def test_defaults_of_fields(load: Load, flow: str, item: Any, answer: object) -> None:
    """What is missing where a record is given has the default of its class, made anew each time.

    A field that may be None is that. What an operator gives lacks nothing.
    """
    app = load(FILLED, f"export flow {flow}")
    assert app(item) == answer
    assert app(item) == answer


def test_parameters_lack_fields_with_defaults(load: Load) -> None:
    """A record that comes as a parameter of a request is like one that comes as the item."""
    app = load(FILLED, "export flow a(at: p.Point): int -> str = at -> p.point")
    assert app(1, at={"x": 2}) == "2 0.5 None"
    with pytest.raises(flowlang.BadRequest, match="`x` is missing"):
        app(1, at={"y": 2.0})


TOLD = """
class Point(NamedTuple):
    x: int
    y: float = 0.5
@dataclasses.dataclass
class Shape:
    points: list[Point]
    first: Point | None
class Loose(TypedDict):
    a: float
    b: int | None
def shape(x: int, *, of: Shape) -> str: return f"{x} {of.points} {of.first}"
def point(x: int, *, at: Point | None = None) -> str: return f"{x} {at}"
def points(x: int, *, at: list[Point] = []) -> str: return f"{x} {at}"
def loose(x: int, *, at: Loose) -> str: return f"{x} {at}"
@batched
def many(xs: list[int], *, of: Shape) -> list[str]: return [f"{x} {of.first}" for x in xs]
def make(x: int) -> Point: return Point(x)
"""


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("shape(of=shape)", "7 [Point(x=1, y=2.0)] Point(x=3, y=4.0)"),
        ("many(of=shape)", "7 Point(x=3, y=4.0)"),
        ("shape(of={ points: [] })", "7 [] None"),
        ("point(at={ x: 1, y: 2 })", "7 Point(x=1, y=2.0)"),
        ("point(at=in -> p.make)", "7 Point(x=7, y=0.5)"),
        ("point", "7 None"),
        ("points(at=[{ x: 1, y: 2 }, { x: 3, y }])", "7 [Point(x=1, y=2.0), Point(x=3, y=0.25)]"),
        ("points(at=([]))", "7 []"),
        ("loose(at={ a: 1 })", "7 {'a': 1.0, 'b': None}"),
    ],
)
def test_arguments_arrive_as_their_classes(load: Load, call: str, answer: str) -> None:
    """Like items do, whether they come with the request or are written out."""
    app = load(
        TOLD,
        f"param y = 0.25\nexport flow a(shape: p.Shape): int -> str {{ return in -> p.{call} }}",
    )
    shape = {"points": [{"x": 1, "y": 2}], "first": {"x": 3, "y": 4}}
    assert app(7, shape=shape) == answer


def test_arguments_are_a_calls_own(load: Load) -> None:
    """Lists can be changed, and the next call sees nothing of it; arrays cannot be written to."""
    app = load(
        "def add(x: int, *, to: list[int]) -> list[int]:\n    to.append(x)\n    return to\n"
        "@batched\ndef each(xs: list[int], *, to: list[int]) -> list[int]:\n"
        "    to.append(xs[0])\n    return [len(to) for x in xs]\n"
        "def clear(image: np.ndarray, *, other: np.ndarray) -> float:\n"
        "    other[:] = 0\n    return 0.0\n",
        "export flow add = p.add(to=[1])\nexport flow each = p.each(to=[1])\n"
        "export flow clear: image<rgb> -> float { return in -> p.clear(other=in) }",
    )
    assert [app["add"](i) for i in (2, 3)] == [[1, 2], [1, 3]]
    assert [app["each"](i) for i in (2, 3)] == [2, 2]
    error = error_of(lambda: app["clear"](np.ones((2, 2, 3), np.uint8)))
    assert "write to a copy of it)" in str(error)


def test_pictures_pass_through(load: Load) -> None:
    """An image reaches Python as an array, and an array is an image to what follows."""
    app = load(
        "def invert(image: 'image') -> Annotated[np.ndarray, 'image<rgb>']:\n"
        "    return 255 - image\n"
        "def mean(image: np.ndarray) -> float: return float(image.mean())\n",
        "export flow a: image<rgb> -> { before: float, after: float, side: int } =\n"
        "  { before: p.mean, seen: p.invert -> resize(4) }\n"
        "  -> { before: .before, after: .seen -> p.mean, side: .seen -> .width }",
    )
    assert app(np.full((8, 8, 3), 55, np.uint8)) == {"before": 55.0, "after": 200.0, "side": 4}


def test_who_writes_into_an_item_is_told_to_copy_it(load: Load) -> None:
    """numpy says that it cannot be written, and not why."""
    app = load(
        "def clear(image: np.ndarray) -> float:\n    image[:] = 0\n    return 0.0\n",
        "export flow a: image<rgb> -> float = p.clear",
    )
    error = error_of(lambda: app(np.ones((2, 2, 3), np.uint8)))
    assert "read-only (arrays are shared between the branches" in str(error)
    assert "write to a copy of it)" in str(error)


# Batches


def test_items_of_different_requests_share_a_call(load: Load, shared: ModuleType) -> None:
    """What has gathered while a call was under way is one batch, bounded by `batch`."""
    app = load(
        f"import {shared.__name__} as shared\n@batched\ndef f(xs: list[int]) -> list[int]:\n"
        "    shared.entered.release()\n    shared.gate.wait(20)\n"
        "    shared.seen.append(len(xs))\n    return [x * 2 for x in xs]\n",
        "export flow a = p.f(batch=1..8)",
    )
    shared.gate.clear()
    futures = [app.submit(0)]
    assert shared.entered.acquire(timeout=LONG_S)
    futures += [app.submit(i) for i in range(1, 20)]
    shared.gate.set()
    assert [f.result(LONG_S) for f in futures] == [i * 2 for i in range(20)]
    assert shared.seen[0] == 1
    assert sorted(shared.seen[1:]) == [3, 8, 8]


def test_items_told_the_same_share_a_call(load: Load, shared: ModuleType) -> None:
    """A call has one value for each argument, so a batch is one call for each."""
    app = load(
        f"import {shared.__name__} as shared\n@batched\n"
        "def f(xs: list[int], *, k: int) -> list[str]:\n"
        "    shared.entered.release()\n    shared.gate.wait(20)\n"
        "    shared.seen.append((k, len(xs)))\n    return [f'{x}{k}' for x in xs]\n",
        "export flow a(k: int): int -> str = p.f(k=k)",
    )
    shared.gate.clear()
    futures = [app.submit(0, k=9)]
    assert shared.entered.acquire(timeout=LONG_S)
    futures += [app.submit(i, k=i % 3) for i in range(1, 13)]
    shared.gate.set()
    wanted = ["09", *(f"{i}{i % 3}" for i in range(1, 13))]
    assert [f.result(LONG_S) for f in futures] == wanted
    assert sorted(shared.seen[1:]) == [(0, 4), (1, 4), (2, 4)]


def test_items_told_other_arrays_do_not_share_a_call(load: Load) -> None:
    """Each is told its own; one that all of a list are told may be one call's."""
    app = load(
        "class Pair(TypedDict):\n    x: int\n    row: np.ndarray\n"
        "def row(x: int) -> Annotated[np.ndarray, 'tensor<i64, ?>']: return np.arange(x + 1)\n"
        "@batched\ndef f(pairs: list[Pair], *, of: np.ndarray) -> list[int]:\n"
        "    return [int(of.sum()) for p in pairs]\n"
        "@batched\ndef g(xs: list[int], *, of: np.ndarray) -> list[int]:\n"
        "    return [x + len(of) for x in xs]\n",
        "export flow own: list<int> -> list<int> =\n"
        "  map({ x: pass, row: p.row } -> p.f(of=.row))\n"
        "export flow shared: list<int> -> list<int> {\n"
        "  let row = 9 -> p.row\n  return in -> map(p.g(of=row))\n}",
    )
    assert app["own"](list(range(30))) == [n * (n + 1) // 2 for n in range(30)]
    assert app["shared"](list(range(30))) == list(range(10, 40))


def test_a_bad_item_fails_alone(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """In a batch, in a list and beside others; the rest is answered in its order."""
    app = load(
        "def f(x: int) -> float: return 6 / x\n"
        "@batched\ndef g(xs: list[int]) -> list[float]: return [6 / x for x in xs]\n",
        "export flow one = p.f\nexport flow many = p.g\n"
        "export flow dropped: list<int> -> list<float> = map(p.g, on_error=drop)\n"
        "export flow null: list<int> -> list<float?> = map(p.f, on_error=null)",
    )
    for name in ("one", "many"):
        answers = list(app[name].map([1, 0, 3, 0, 2], errors="return"))
        assert [a for a in answers if not isinstance(a, Exception)] == [6.0, 2.0, 3.0]
        assert [isinstance(a, flowlang.StageFailed) for a in answers] == [0, 1, 0, 1, 0]
    assert app["dropped"]([1, 0, 3, 0, 2]) == [6.0, 2.0, 3.0]
    assert app["null"]([1, 0, 3, 0, 2]) == [6.0, None, 2.0, None, 3.0]


def test_a_batch_that_loses_count_is_told(load: Load) -> None:
    """A batched operator gives as many results as it got items, or fails all of them."""
    app = load(
        "@batched\ndef f(xs: list[int]) -> list[int]: return [1, 2, 3]\n"
        "@batched\ndef g(xs: list[int]) -> list[int]: return 3\n"
        "@batched\ndef h(xs: list[int]) -> list[int]: yield from (x + 1 for x in xs)\n",
        "export flow a = p.f\nexport flow b = p.g\nexport flow c = p.h",
    )
    assert "1 items gave 3 results" in str(error_of(lambda: app["a"](1)))
    assert "`p.g` failed: TypeError" in str(error_of(lambda: app["b"](1)))
    assert list(app["c"].map(range(5))) == [1, 2, 3, 4, 5]


# Failures


def test_the_traceback_is_for_the_log(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """A client is told what failed and where in the flow; the log says why, line by line."""
    app = load(
        "def inner(x: int) -> int:\n    raise ValueError('no good')\n"
        "def f(x: int) -> int:\n    return inner(x)\n",
        "export flow a = p.f",
    )
    with caplog.at_level(logging.ERROR, "flowlang.python"):
        error = error_of(lambda: app(1))
    assert isinstance(error, flowlang.StageFailed)
    assert error.stage == "p.f"
    assert error.place is not None
    assert error.place.endswith("app.flow:2:17")
    assert str(error).startswith("`p.f` failed: ValueError: no good (")
    assert "Traceback" not in str(error)
    (record,) = caplog.records
    assert "`p.f` failed" in record.getMessage()
    assert record.exc_info is not None
    assert "return inner(x)" in caplog.text
    assert "raise ValueError('no good')" in caplog.text


def test_an_exception_without_words_is_told_by_its_kind(load: Load) -> None:
    """As those are that Python itself raises to end things."""
    app = load("def f(x: int) -> int: raise KeyError", "export flow a = p.f")
    assert str(error_of(lambda: app(1))).startswith("`p.f` failed: KeyError (")


def test_an_operator_may_tell_the_client_why(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """A BadRequest reaches who asked as it is, with the place; nothing is logged."""
    app = load(
        "@batched\ndef f(xs: list[int]) -> list[int]:\n"
        "    for x in xs:\n        if x < 0: raise flowlang.BadRequest(f'{x} is below 0')\n"
        "    return xs\n",
        "export flow a = p.f\nexport flow b: int -> int = p.f ?? 0",
    )
    answers = list(app["a"].map([1, -2, 3, -4], errors="return"))
    assert [isinstance(a, flowlang.BadRequest) for a in answers] == [False, True, False, True]
    assert [a.message for a in answers[1::2]] == ["-2 is below 0", "-4 is below 0"]
    assert {a.stage for a in answers[1::2]} == {"p.f"}
    assert not caplog.records
    assert [app["b"](i) for i in (3, -3)] == [3, 0]


LIES: dict[str, tuple[str, str]] = {
    "int": ("'3'", "a str is not int"),
    "str": ("None", "None is not str"),
    "float": ("True", "a bool is not float"),
    "bytes": ("'x'", "a str is not bytes"),
    "list[int]": ("[1, 'x']", "element 1: a str is not int"),
    "Found": ("{'a': 1}", "it has the fields a, not a, b"),
    "list[Found]": ("[{'a': 1, 'b': 'x'}]", "element 0: `b`: a str is not int"),
    "Vector": ("np.zeros(3)", "an array of shape 3 is not tensor<f32, 4>"),
    "'tensor<i32>'": (
        "np.array([1, 3_000_000_000])",
        "with the number 3000000000 is not tensor<i32>",
    ),
    "'tensor<i8>'": ("np.array([-129, 0], np.int16)", "with the number -129 is not tensor<i8>"),
    "'tensor<f16>'": ("np.array([70_000])", "a number too large is not tensor<f16>"),
    "'tensor<f32>'": ("np.array([1.0, 1e39])", "a number too large is not tensor<f32>"),
    "'tensor<i64>'": ("np.zeros(3)", "an array of float64 is not tensor<i64>"),
    "'image<rgb>'": ("np.zeros((4, 4), np.uint8)", "is not image<rgb, u8, hwc>, which is ?x?x3"),
    "'image<gray>'": ("np.zeros((4, 4, 1), np.uint8)", "shape 4x4x1 is not image<gray, u8, hwc>"),
}


@pytest.mark.parametrize("annotation", LIES)
def test_a_lie_is_told_at_its_operator(load: Load, annotation: str) -> None:
    """What is not of its declared type fails there, and what follows never sees it."""
    expression, words = LIES[annotation]
    app = load(
        "class Found(TypedDict):\n    a: int\n    b: int\n"
        'Vector = Annotated[np.ndarray, "tensor<f32, 4>"]\n'
        f"def f(x: int) -> {annotation}: return {expression}\n"
        f"@batched\ndef g(xs: list[int]) -> list[{annotation}]: return [{expression}] * len(xs)\n",
        "export flow a = p.f\nexport flow b = p.g",
    )
    for name in ("a", "b"):
        message = str(error_of(lambda name=name: app[name](1)))  # type: ignore[misc]
        assert "is declared to give" in message
        assert words in message


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "way",
    [
        "sys.exit(3)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "raise asyncio.CancelledError",
        "threading.Thread(None).x",
    ],
)
def test_an_operator_cannot_end_its_lane(load: Load, way: str, batched: bool) -> None:
    """`sys.exit` and the like fail the item; the next one is answered."""
    text = f"def f(x: int) -> int:\n    if x == 0: {way}\n    return x\n"
    if batched:
        text = f"@batched\ndef f(x: list[int]) -> list[int]:\n    if 0 in x: {way}\n    return x\n"
    app = load(text, "export flow a = p.f")
    lanes = [lane.ident for lane in app._lanes]
    assert isinstance(error_of(app.submit(0)), flowlang.StageFailed)
    assert app(1) == 1
    assert [lane.ident for lane in app._lanes if lane.is_alive()] == lanes


def test_an_operator_gets_what_nobody_else_holds_when_asked_twice(load: Load) -> None:
    """A value that two branches use is worked on by both, in whatever order."""
    app = load(
        "def f(x: list[int]) -> int: return sum(x)\ndef g(x: list[int]) -> int: return len(x)\n",
        "export flow a: list<int> -> { s: int, n: int } = { s: p.f, n: p.g }",
    )
    assert app([1, 2, 3]) == {"s": 6, "n": 3}


# Files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise ValueError('broken')", "`p.py` cannot be imported: ValueError: broken"),
        ("import a_module_that_is_not_there", "`p.py` cannot be imported: ModuleNotFoundError"),
        ("sys.exit(3)", "`p.py` cannot be imported: SystemExit: 3"),
        ("del f", "`p.py` was run and has no function `f`"),
        ("f = 3", "`p.py` was run and has no function `f`"),
        ("@", None),
    ],
)
def test_a_file_that_cannot_be_run(load: Load, text: str, words: str | None) -> None:
    """Loading fails with the file's name and the reason, and leaves no thread behind."""
    before = threading.active_count()
    kind = flowlang.EngineError if words is not None else flowlang.CompileError
    with pytest.raises(kind) as caught:
        load(f"def f(x: int) -> int: return x\n{text}\n", "export flow a = p.f")
    assert (words or "this is no Python") in str(caught.value)
    assert eventually(lambda: threading.active_count() <= before)


def test_a_file_is_run_once(load: Load, shared: ModuleType, tmp_path: Path) -> None:
    """However many operators, instances and apps use it; and again once it has changed."""
    text = (
        f"import {shared.__name__} as shared\nshared.seen.append('run')\ncalls = []\n"
        "def f(x: int) -> int:\n    calls.append(x)\n    return len(calls)\n"
        "def g(x: int) -> int:\n    calls.append(x)\n    return len(calls)\n"
    )
    flow = "export flow a = p.f x3\nexport flow b = p.g x2"
    first = load(text, flow)
    assert (first["a"](0), first["b"](0)) == (1, 2)
    assert shared.seen == ["run"]
    path = tmp_path / "again.flow"
    path.write_text('use "p.py" as p\nexport flow a = p.f\n')
    with flowlang.load(path, device="cpu") as second:
        assert second(0) == 3
    assert shared.seen == ["run"]
    changed = load(text + "# changed\n", flow)
    assert changed["a"](0) == 1
    assert shared.seen == ["run", "run"]


def test_a_file_that_fails_is_run_once(
    load: Load, shared: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """However many operators it has: what it did before it failed may have taken long."""
    text = (
        f"import {shared.__name__} as shared\nshared.seen.append('run')\n"
        "def f(x: int) -> int: return x\ndef g(x: int) -> int: return x\n"
        "raise ValueError('broken')\n"
    )
    with pytest.raises(flowlang.EngineError, match="ValueError: broken"):
        load(text, "export flow a = p.f x2 -> p.g")
    assert shared.seen == ["run"]
    assert [r.getMessage() for r in caplog.records] == ["`p.py` cannot be imported"]


def test_a_file_finds_those_beside_it(load: Load, tmp_path: Path) -> None:
    """Operators may import their own modules, and dataclasses find their own."""
    name = f"beside_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text("def twice(x):\n    return 2 * x\n")
    app = load(f"from {name} import twice\ndef f(x: int) -> int: return twice(x)\n",
               "export flow a = p.f")  # fmt: skip
    assert app(4) == 8


# Time


def test_instances_work_at_the_same_time(load: Load) -> None:
    """`x2` are two threads in the operator, and without it there is one."""
    app = load(
        "both = threading.Barrier(2)\nalone = threading.Lock()\n"
        "def f(x: int) -> int:\n    both.wait(20)\n    return x\n"
        "def g(x: int) -> bool:\n    free = alone.acquire(blocking=False)\n    time.sleep(0.005)\n"
        "    if free: alone.release()\n    return free\n",
        "export flow two = p.f x2\nexport flow one = p.g",
    )
    assert list(app["two"].map(range(6), deadline_s=LONG_S)) == list(range(6))
    assert all(app["one"].map(range(20), deadline_s=LONG_S))


STUCK = """
import {} as shared
def f(x: int) -> int:
    if x < 0:
        shared.entered.release()
        shared.gate.wait(60)
    return x
"""


def lanes() -> list[str]:
    """The threads of the operator, those among them that are left to themselves."""
    return [t.name for t in threading.enumerate() if t.name.startswith("flowlang-p.f")]


def test_a_call_that_never_comes_back_is_answered(
    load: Load, shared: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """At its timeout its request fails, a new lane takes over, and the others go on."""
    app = load(STUCK.format(shared.__name__), "export flow a = p.f(timeout=200ms)\n"
               "export flow b: int -> int = p.f(timeout=200ms) ?? 7")  # fmt: skip
    shared.gate.clear()
    with caplog.at_level(logging.ERROR, "flowlang"):
        start_s = time.monotonic()
        stuck = app["a"].submit(-1)
        assert shared.entered.acquire(timeout=LONG_S)
        assert isinstance(error_of(stuck), flowlang.DeadlineExceeded)
        assert 0.15 < time.monotonic() - start_s < 5
        assert list(app["a"].map(range(20), deadline_s=LONG_S)) == list(range(20))
    assert "a call does not come back, and is left to itself" in caplog.text
    assert app["b"](-1) == 7
    assert [app["b"](i) for i in range(5)] == list(range(5))
    start_s = time.monotonic()
    assert app.close(5.0)
    assert time.monotonic() - start_s < 5


@pytest.mark.parametrize("end", ["deadline", "cancel"])
def test_a_stuck_call_that_nobody_waits_for_loses_its_lane(
    load: Load, shared: ModuleType, end: str
) -> None:
    """However its request came to its end, a new lane takes over at the timeout of its stage."""
    app = load(STUCK.format(shared.__name__), "export flow a = p.f(timeout=300ms)")
    shared.gate.clear()
    stuck = app.submit(-1, deadline_s=0.1 if end == "deadline" else None)
    assert shared.entered.acquire(timeout=LONG_S)
    if end == "cancel":
        assert stuck.cancel()
    else:
        assert isinstance(error_of(stuck), flowlang.DeadlineExceeded)
    time.sleep(0.4)
    assert list(app.map(range(5), deadline_s=LONG_S)) == list(range(5))


def test_a_lane_is_replaced_though_its_file_has_changed(
    load: Load, shared: ModuleType, tmp_path: Path
) -> None:
    """The operators of a running app are those it was loaded with."""
    app = load(STUCK.format(shared.__name__), "export flow a = p.f(timeout=100ms)")
    shared.gate.clear()
    for change in ("def f(x: int) -> int: return -x\n", None):
        if change is not None:
            (tmp_path / "p.py").write_text(change)
        else:
            (tmp_path / "p.py").unlink()
        assert isinstance(error_of(app.submit(-1)), flowlang.DeadlineExceeded)
        assert list(app.map(range(5), deadline_s=LONG_S)) == list(range(5))


def test_a_lane_is_replaced_as_soon_as_it_can_be(
    load: Load,
    shared: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While no other instance can be made what comes in is answered, and the log says why."""
    app = load(STUCK.format(shared.__name__), "export flow a = p.f(timeout=300ms)")
    shared.gate.clear()

    def broken(*_: Any) -> None:
        raise flowlang.EngineError("no memory")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "flowlang"):
        patch.setattr("flowlang.runtime.python.PythonInstance", broken)
        assert isinstance(error_of(app.submit(-1)), flowlang.DeadlineExceeded)
        time.sleep(0.1)
        assert "an instance was lost: no memory" in str(error_of(app.submit(1)))
    assert "no new instance of stage `p.f` yet: no memory" in caplog.text
    assert eventually(lambda: app.submit(1).exception() is None)


def test_a_late_result_is_nobodys(load: Load, shared: ModuleType) -> None:
    """What comes back after its timeout answers nothing, and its thread ends."""
    app = load(STUCK.format(shared.__name__), "export flow a = p.f(timeout=100ms)")
    shared.gate.clear()
    assert isinstance(error_of(app.submit(-1)), flowlang.DeadlineExceeded)
    assert app(1) == 1
    shared.gate.set()
    assert list(app.map(range(10))) == list(range(10))
    assert eventually(lambda: len(lanes()) == 1)


def test_many_stuck_calls_are_bounded(load: Load, shared: ModuleType) -> None:
    """After so many that never came back a stage takes no more threads: its requests time out."""
    app = load(STUCK.format(shared.__name__), "export flow a = p.f(timeout=50ms)")
    shared.gate.clear()
    futures = [app.submit(-1) for _ in range(MAX_ABANDONED + 3)]
    done, left = wait(futures, LONG_S)
    assert not left
    assert {type(f.exception()) for f in done} == {flowlang.DeadlineExceeded}
    assert len(lanes()) <= MAX_ABANDONED + 1


def test_a_deadline_leaves_the_call_alone(load: Load, shared: ModuleType) -> None:
    """Who gives up waiting takes no lane away: the call goes on, and then the next one's."""
    app = load(STUCK.format(shared.__name__), "export flow a = p.f")
    shared.gate.clear()
    future = app.submit(-1, deadline_s=0.1)
    assert shared.entered.acquire(timeout=LONG_S)
    assert isinstance(error_of(future), flowlang.DeadlineExceeded)
    assert len(lanes()) == 1
    shared.gate.set()
    assert app(1) == 1


def test_what_an_operator_writes_into_is_not_anothers(load: Load) -> None:
    """An array that other branches hold too cannot be written to, and the writer is told."""
    app = load(
        "def spoil(image: np.ndarray) -> float:\n    image[:] = 0\n    return 0.0\n"
        "def mean(image: np.ndarray) -> float:\n    return float(image.mean())\n",
        """export flow f {
          let picture = in -> decode
          return { spoilt: picture -> (p.spoil ?? 1.0), mean: picture -> p.mean }
        }""",
    )
    answer = app(photographs(1)[0])
    assert answer["spoilt"] == 1.0
    assert answer["mean"] > 1


def test_a_list_that_an_operator_changes_is_not_anothers(load: Load) -> None:
    """Arrays in lists cannot be written to either, and each operator has a list of its own."""
    app = load(
        """def parts(x: int) -> list[Annotated[np.ndarray, "tensor<f32, 2>"]]:
    return [np.ones(2, np.float32) for _ in range(x)]
def spoil(parts: list[Annotated[np.ndarray, "tensor<f32, 2>"]]) -> float:
    parts.append(parts[0])
    parts[0][:] = 99
    return 0.0
def total(parts: list[Annotated[np.ndarray, "tensor<f32, 2>"]]) -> float:
    time.sleep(0.1)
    return float(sum(part.sum() for part in parts))
""",
        """export flow f: int -> { spoilt: float, total: float } {
          let parts = in -> p.parts
          return { spoilt: parts -> (p.spoil ?? 1.0), total: parts -> p.total }
        }""",
    )
    assert app(2) == {"spoilt": 1.0, "total": 4.0}


def test_a_call_that_waited_long_keeps_its_lane(load: Load) -> None:
    """What ran out of time in the queue is no reason to give up the call that has just begun."""
    app = load(
        "inside = []\nmost = [0]\n"
        "def slow(item: bytes) -> int:\n    inside.append(1)\n"
        "    most[0] = max(most[0], len(inside))\n"
        "    time.sleep(0.3)\n    inside.pop()\n    return most[0]\n",
        "export flow f = p.slow\nschedule { f(timeout=1s) }",
    )
    for _ in range(2):
        futures = [app.submit(b"x") for _ in range(5)]
        wait(futures, LONG_S)
    assert app(b"x") == 1
