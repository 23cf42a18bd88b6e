"""Lists, choices, fallbacks and expressions run for real: what programs of people answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import flowlang
from examples import models
from tests.pictures import photographs
from tests.standins import write_model

E = "type e = { k: str, v: int, w: int? }\n"
EACH = E + "export flow f: list<e> -> "
ITEMS = [{"k": "a", "v": 1, "w": None}, {"k": "b", "v": 5, "w": 2}, {"k": "c", "v": 3, "w": 0}]
FIRST = ITEMS[0]
UNITS = [row.copy() for row in np.eye(4, dtype=np.float32)]
NET = 'flow net = trt("net.onnx", batch=1..4)\n'

Load: TypeAlias = Callable[[str], flowlang.App]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constructs")
    models.identity(folder / "net.onnx", ("N", 4))
    models.detector(folder / "det.onnx", side=64)
    return folder


@pytest.fixture
def load(folder: Path) -> Iterator[Load]:
    apps: list[flowlang.App] = []

    def start(text: str) -> flowlang.App:
        path = folder / "app.flow"
        path.write_text(text, "utf-8")
        apps.append(flowlang.load(path, device="cpu"))
        return apps[-1]

    yield start
    for app in apps:
        app.close()


PROGRAMS: dict[str, tuple[str, Any, Any]] = {
    "map": (EACH + "list<int> = map(.v * 2)", ITEMS, [2, 10, 6]),
    "map of nothing": (EACH + "list<int> = map(.v * 2)", [], []),
    "map in map": (
        "type o = { w: int, es: list<{ v: int }> }\n"
        "flow scaled(k: int) {\n  let outer = in\n"
        "  return in -> .es -> map({ v: .v, w: outer.w } -> .v * .w * k)\n}\n"
        "export flow f(k: int = 2): list<o> -> list<list<int>> = map(scaled(k))",
        [{"w": 3, "es": [{"v": 1}, {"v": 2}]}, {"w": 5, "es": []}], [[6, 12], []],
    ),
    "in captured in a map": (
        "export flow f: { k: int, xs: list<int> } -> list<int> {\n"
        "  return in -> .xs -> map(pass + in.k)\n}",
        {"k": 10, "xs": [1, 2]}, [11, 12],
    ),
    "dropped": (EACH + "list<float> = map(.v / (.v - 5), on_error=drop)", ITEMS, [-0.25, -1.5]),
    "null": (EACH + "list<float?> = map(.v / (.v - 5), on_error=null)", ITEMS, [-0.25, None, -1.5]),
    "filter": (EACH + "list<str> = filter(.v > 1 and not (.k == \"c\")) -> map(.k)", ITEMS, ["b"]),
    "filter of many": (
        "export flow f: list<int> -> list<int> = filter(pass > 397)", list(range(400)), [398, 399],
    ),
    "filter of many with operators": (
        "export flow f: list<tensor<f32, 4>> -> list<int> = filter(argmax > 2) -> map(argmax)",
        UNITS * 100, [3] * 100,
    ),
    "top": (EACH + "list<str> = top(2, by=.v) -> map(.k)", ITEMS, ["b", "c"]),
    "top by less": (EACH + "list<str> = top(2, by=-.v) -> map(.k)", ITEMS, ["a", "c"]),
    "top by what may be null": (EACH + "list<str> = top(9, by=.w) -> map(.k)", ITEMS,
                                ["b", "c", "a"]),
    "top by text": (EACH + "list<str> = top(2, by=.k) -> map(.k)", ITEMS, ["c", "b"]),
    "join": (EACH + "str = map(.k) -> join(\", \")", ITEMS, "a, b, c"),
    "if": (EACH + "list<str> = map(if .v > 2 then .k else \"small\")", ITEMS, ["small", "b", "c"]),
    "a way not taken is not run": (
        E + "export flow f: e -> float = if .v == 1 then 0.0 else (1 / (.v - 1))", FIRST, 0.0,
    ),
    "if in match in map": (
        EACH + 'list<str> = map(match .k { "a" | "b" => if .v > 2 then ("big") else "small",'
        ' else => "none" })',
        ITEMS, ["small", "big", "none"],
    ),
    "match of numbers": (
        EACH + "list<int> = map(match .v { 1 => 10, 5 => 50, else => 0 })", ITEMS, [10, 50, 0],
    ),
    "match of null": (
        EACH + "list<str> = map(match .w { 0 => \"zero\", else => \"other\" })",
        ITEMS, ["other", "other", "zero"],
    ),
    "match of truth": (
        "export flow f: list<bool> -> list<int> =\n"
        "  map({ a: pass } -> match .a { true => 1, false => 2, else => 3 })",
        [True, False], [1, 2],
    ),
    "match of conditions": (
        EACH + 'list<str> = map(match { .v > 4 => "big", .v > 2 | .w == 0 => "mid", else => .k })',
        ITEMS, ["a", "big", "mid"],
    ),
    "records of arms": (
        EACH + "list<{ k: str, v: int?, w: float? }> = map(match .k {"
        ' "a" => { k: .k, v: .v }, "b" => { k: .k, w: .v / 2 }, else => { k: .k } })',
        ITEMS,
        [{"k": "a", "v": 1, "w": None}, {"k": "b", "v": None, "w": 2.5},
         {"k": "c", "v": None, "w": None}],
    ),
    "lists of records of arms": (
        EACH + "list<{ xs: list<{ a: int?, b: int? }> }> ="
        " map(if .v > 2 then { xs: [{ a: .v }] } else { xs: [{ b: .v }] })",
        ITEMS[:2], [{"xs": [{"a": None, "b": 1}]}, {"xs": [{"a": 5, "b": None}]}],
    ),
    "top by a fallback": (
        EACH + "list<str> = top(2, by=(.w ?? .v)) -> map(.k)", ITEMS, ["b", "a"],
    ),
    "filter by a fallback": (
        EACH + "list<str> = filter((.v / (.v - 5) ?? 9.0) > .v) -> map(.k)", ITEMS, ["b"],
    ),
    "filter by a value in a fallback": (
        "export flow f: { k: int, es: list<{ w: int? }> } -> list<{ w: int? }> {\n"
        "  let least = in -> .k + 1\n"
        "  return in -> .es -> filter((.w ?? least) >= least)\n}",
        {"k": 2, "es": [{"w": 3}, {"w": None}, {"w": 2}]}, [{"w": 3}, {"w": None}],
    ),
    "lists as defaults": (
        "export flow f(x: list<int> = [1, 2], y: list<float> = [3], z: list<str> = []):\n"
        "  int -> { x: list<int>, y: list<float>, z: list<str> } = { x, y, z }",
        1, {"x": [1, 2], "y": [3.0], "z": []},
    ),
    "fallback of null": (EACH + "list<int> = map(.w ?? .v)", ITEMS, [1, 2, 0]),
    "fallback in a fallback": (
        E + "flow g: e -> int? = .w ?? .w\nexport flow f: list<e> -> list<int> = map(g ?? .v ?? 9)",
        ITEMS, [1, 2, 0],
    ),
    "fallback of a failure": (
        EACH + "list<float> = map(.v / (.v - 5) ?? .v / (.v - .v) ?? 0.5)",
        ITEMS, [-0.25, 0.5, -1.5],
    ),
    "fallback of everything": (E + "export flow f: e -> int? = .w ?? .w", FIRST, None),
    "null is not equal": (EACH + "list<bool> = map(.w == 0)", ITEMS, [False, False, True]),
    "null is null": (EACH + "list<bool> = map(.w != .w)", ITEMS, [False] * 3),
    "a field of null": (
        "export flow f: { a: { b: int }? } -> int = .a.b ?? 7", {"a": None}, 7,
    ),
    "numbers of one type": (
        E + "export flow f: e -> list<float> = [.v, 0.5, if .v > 3 then 1 else 1.5]",
        FIRST, [1.0, 0.5, 1.5],
    ),
    "a float for an int": ("export flow f: int -> float = pass", 3, 3.0),
    "explicit fields": (
        E + "export flow f: e -> { k: str, v: int, w: int? } = { v: .v + 1, ..., k: \"x\" }",
        FIRST, {"v": 2, "k": "x", "w": None},
    ),
    "a flow with three kinds of arguments": (
        E + "flow p(n: int) = { x: .v * n, n }\ntype r = { x: int, n: int }\n"
        "export flow f(k: int = 9): e -> { a: r, b: r, c: r } = { a: p(2), b: p(3), c: p(k) }",
        FIRST, {"a": {"x": 2, "n": 2}, "b": {"x": 3, "n": 3}, "c": {"x": 9, "n": 9}},
    ),
    "nothing but a number": ("export flow f: bytes -> int = 3", b"", 3),
    "nothing but a parameter": ("export flow f(k: int = 4): bytes -> int = k", b"", 4),
    "nothing but the item": ("export flow f: int -> int { return in }", 4, 4),
    "nothing but a list": ("export flow f: bytes -> list<int> = [1, 2]", b"", [1, 2]),
    "a param of the file": (
        'param version = "v1"\n'
        "export flow f: int -> { n: int, version: str } = { n: pass, version }",
        3, {"n": 3, "version": "v1"},
    ),
    "a list that may be missing": (
        "export flow f: list<int>? -> list<int> = (pass ?? []) -> map(pass + 1)", None, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_program_answers(load: Load, name: str) -> None:
    """Values come out as plain values of the declared types."""
    text, item, wanted = PROGRAMS[name]
    got = load(text)(item, deadline_s=20.0)
    assert got == wanted
    assert repr(got) == repr(wanted)


def test_arithmetic_fails_its_request_with_its_place(load: Load) -> None:
    """A division by zero is an error of the request, at its place in the flow."""
    app = load("export flow f: int -> float = (1 / pass) + (1 / (pass - 1))")
    assert app(2) == 1.5
    for item, place in ((0, ":1:32"), (1, ":1:45")):
        with pytest.raises(flowlang.StageFailed, match="division by zero") as caught:
            app(item)
        assert caught.value.place is not None
        assert caught.value.place.endswith(place)
        assert "`1 / " in caught.value.message
        assert caught.value.stage == "/"


def test_numbers_of_a_model_are_counted_with_like_others(load: Load, folder: Path) -> None:
    """They neither wrap nor keep their few bits, and are of the type that is told."""
    ports = [("x", "u8", ("N",))], [("y", "u8", ("N",))]
    write_model(folder / "level.onnx", *ports)
    app = load('export flow f = trt("level.onnx") -> [pass - 255, -pass, pass * 3]')
    answer = app(np.uint8(115))
    assert answer == [-140.0, -115.0, 345.0]
    assert {type(n) for n in answer} == {float}


def test_and_and_or_look_at_both_sides(load: Load) -> None:
    """Expressions are values, so a side that fails is a failure whatever the other says."""
    app = load("export flow f: int -> bool = pass > 1 or 1 / pass > 0")
    assert app(2) is True
    with pytest.raises(flowlang.StageFailed):
        app(0)


def test_elements_keep_their_order_through_models(load: Load) -> None:
    """Batches form over elements and requests, and each answer is its own in its order."""
    app = load(NET + "export flow f: list<tensor<f32, 4>> -> list<int> = map(net -> argmax)")
    requests = [[UNITS[(i + j) % 4] for j in range(i % 7)] for i in range(60)]
    wanted = [[(i + j) % 4 for j in range(i % 7)] for i in range(60)]
    assert list(app.map(requests)) == wanted


def test_conditions_may_ask_models(load: Load) -> None:
    """Stages in parentheses are operands, in conditions of filters and of choices."""
    app = load(
        NET + "export flow kept: list<tensor<f32, 4>> -> list<int> =\n"
        "  filter(argmax > 1 and (net -> argmax) < 3) -> map(argmax)\n"
        "export flow named: tensor<f32, 4> -> str =\n"
        '  if (net -> argmax) == 2 then "two" else match { (net -> best -> .index) > 2 => "three",'
        ' else => "few" }'
    )
    assert app["kept"](UNITS) == [2]
    assert [app["named"](unit) for unit in UNITS] == ["few", "few", "two", "three"]


def test_k_comes_with_the_request(load: Load) -> None:
    """`top` of a tensor and of a list takes its number, and its key, from parameters."""
    app = load(
        'export flow one(k: int = 2) = trt("net.onnx") -> top(k + 1)\n'
        "export flow two(k: int, m: int = 1): list<int> -> list<int> = top(k, by=pass * m)"
    )
    assert [len(app["one"](UNITS[0], k=k)) for k in (0, 1, 3, 9)] == [1, 2, 4, 4]
    assert app["two"]([1, 3, 2], k=2) == [3, 2]
    assert app["two"]([1, 3, 2], k=2, m=-1) == [1, 2]
    with pytest.raises(flowlang.BadRequest, match="`k` must be a whole number from 1"):
        app["one"](UNITS[0], k=-1)


DETECT = (
    'flow big = trt("det.onnx")\nflow small = trt("det.onnx", batch=1..2)\n'
    "flow seen = resize(64, fit=letterbox) -> rgb -> normalize(unit)\n"
    "export flow f = decode -> {} -> boxes(yolov8, conf=0.1)"
)


@pytest.mark.parametrize(
    "asked",
    [
        "seen -> (big ?? small)",
        "seen -> if true then small else big",
        "(seen -> big) ?? (seen -> small)",
        "if .width > 9 then (seen -> small) else (seen -> big)",
        "{ other: resize(64) -> rgb -> normalize(unit) -> big, it: seen -> small } -> .it",
    ],
)
def test_boxes_lie_in_the_picture_whatever_was_asked(load: Load, asked: str) -> None:
    """A choice of models in front of `boxes` changes no coordinate and no name."""
    picture = photographs(2)[1]
    plain = load(DETECT.replace("{}", "seen -> big"))(picture)
    assert plain
    assert max(found["box"][2] for found in plain) > 64
    assert load(DETECT.replace("{}", asked))(picture) == plain


def test_crops_of_what_python_gives(load: Load, folder: Path) -> None:
    """An image out of Python can be cut, and one that is made for each element too."""
    (folder / "p.py").write_text(
        "import numpy as np\n"
        "def lit(image: 'image') -> 'image<rgb>': return image[..., ::-1].copy()\n"
        "def find(image: 'image') -> 'list<box>': return [[1, 1, 5, 5], np.arange(1, 5) * 9.0]\n"
    )
    use = 'use "p.py" as p\n'
    for image, place in (("in -> decode -> p.lit", "img"), ("in -> decode", "img -> p.lit")):
        app = load(
            f"{use}export flow f {{\n  let img = {image}\n"
            f"  return img -> p.find -> map(crop({place}) -> size)\n}}"
        )
        sizes = app(photographs(1)[0])
        assert sizes == [{"height": 4, "width": 4}, {"height": 18, "width": 18}]


def test_long_lists_of_plain_values_take_no_time(load: Load) -> None:
    """What needs no stage is computed at once, be it a hundred thousand elements."""
    app = load("export flow f: list<int> -> list<int> = map(pass + 1, max=100000)")
    start_s = time.perf_counter()
    assert app(list(range(100_000)))[-1] == 100_000
    assert time.perf_counter() - start_s < 5


def test_a_list_that_is_too_long_says_so(load: Load) -> None:
    """The bound is 256 where none is written, and holds for plain values as for models."""
    app = load(
        NET + "export flow plain: list<int> -> list<int> = map(pass)\n"
        "export flow model: list<tensor<f32, 4>> -> list<tensor<f32, 4>> = map(net)\n"
        "export flow mended: list<int> -> list<int> = map(pass) ?? []"
    )
    assert len(app["plain"](list(range(256)))) == 256
    assert len(app["model"](UNITS * 64)) == 256
    for name, item in (("plain", list(range(257))), ("model", UNITS * 65)):
        with pytest.raises(flowlang.BadRequest, match="and `max` is 256"):
            app[name](item)
    assert app["mended"](list(range(257))) == []


def test_params_that_are_lists_are_values(load: Load) -> None:
    """Like other params, also where a flow is given them."""
    app = load(
        'param words = ["a", "b"]\nparam sizes = [1, 2.5]\n'
        'flow part(ws: list<str>) = ws -> join("-")\n'
        "export flow f(ks: list<float> = sizes): int -> { text: str, ks: list<float> } =\n"
        "  { text: part(words), ks }"
    )
    assert app(1) == {"text": "a-b", "ks": [1.0, 2.5]}
    assert app(1, ks=[3]) == {"text": "a-b", "ks": [3.0]}
