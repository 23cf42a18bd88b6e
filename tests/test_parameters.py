"""Parameters of flows in Python and on the command line: what is taken, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowlang
from examples import models
from tests.pictures import photographs

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60
FLOW = """
type where = { x: int, y: float? }
flow least(k: int) = filter(pass >= k)
export flow pick(k: int = 2, by: float = 1, sure: bool = false, name: str = "a"):
  list<int> -> { k: int, by: float, sure: bool, name: str, kept: list<int> } =
  { k, by, sure, name, kept: least(k) }
export flow needs(a: int, b: list<where>, c: bytes?): int -> { s: int, n: list<int>, c: bytes? } =
  { s: pass + a, n: (b -> map(.x)), c }
export flow rank(k: int): tensor<f32, 4> -> list<label> = trt("net.onnx") -> top(k)
export flow plain = trt("net.onnx")
export flow part(box: box, picture: image<rgb>): int -> size = box -> crop(picture) -> size
export flow alone(k: int = 3): bytes -> int = k
"""
APP = """
export flow look(least: int = 100, name: str = "none", scale: float = 1) = decode
  -> { name, wide: .width > least, width: .width * scale }
"""
PAIR = """
export flow f(other: bytes): bytes -> bool = (decode -> .width) == (other -> decode -> .width)
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flowlang.App]:
    folder = tmp_path_factory.mktemp("parameters")
    models.identity(folder / "net.onnx", ("N", 4))
    (folder / "app.flow").write_text(FLOW)
    with flowlang.load(folder / "app.flow", device="cpu") as app:
        yield app


def refusal(flow: flowlang.Flow, item: Any, **parameters: Any) -> str:
    with pytest.raises(flowlang.BadRequest) as caught:
        flow(item, **parameters)
    return caught.value.message


# In Python


def test_parameters_are_given_by_name(app: flowlang.App) -> None:
    """Those not given have their defaults, which are of their types too."""
    pick = app["pick"]
    assert pick([1, 2, 3]) == {"k": 2, "by": 1.0, "sure": False, "name": "a", "kept": [2, 3]}
    assert type(pick([])["by"]) is float
    answer = pick([1, 2, 3], k=3, by=2, sure=True, name="b")
    assert answer == {"k": 3, "by": 2.0, "sure": True, "name": "b", "kept": [3]}
    assert type(answer["by"]) is float
    assert pick([1, 2, 3], k=np.int64(3), by=np.float32(0.5), sure=np.bool_(1))["kept"] == [3]


def test_every_way_to_call_takes_parameters(app: flowlang.App) -> None:
    """Blocking, as a future, of many items, and in a coroutine."""
    pick = app["pick"]
    assert pick.submit([1, 2], k=2).result(PATIENCE_S)["kept"] == [2]
    assert [a["kept"] for a in pick.map([[1, 2], [3]], k=2)] == [[2], [3]]
    assert asyncio.run(pick.acall([1, 2], k=2))["kept"] == [2]
    assert asyncio.run(app["alone"].acall(b"")) == 3


def test_what_is_said_about_a_request_is_held_against_its_meaning(app: flowlang.App) -> None:
    """A word that means nothing is refused, and not taken for the other of two."""
    alone: Any = app["alone"]
    with pytest.raises(flowlang.BadRequest, match='`errors` is "raise" or "return", not \'skip\''):
        list(alone.map([b""], errors="skip"))
    with pytest.raises(flowlang.BadRequest, match="`map` takes many items, and this bytes is one"):
        list(alone.map(b"picture"))
    assert "not 'high'" in refusal(alone, b"", priority="high")


@pytest.mark.parametrize("name", ["item", "self", "app"])
def test_parameters_may_be_named_as_python_names_its_own(name: str, tmp_path: Path) -> None:
    """`item` and `self` are what a method takes first, and are taken by place alone."""
    path = tmp_path / "app.flow"
    path.write_text(f"export flow f({name}: int = 1): bytes -> int = {name}\n")
    given: Any = {name: 2}
    with flowlang.load(path, device="cpu") as app:
        for face in (app, app["f"]):
            assert face(b"", **given) == face.submit(b"", **given).result(PATIENCE_S) == 2
            assert list(face.map([b""], **given)) == [2]
            assert asyncio.run(face.acall(b"", **given)) == 2
        assert asyncio.run(app["f"].atimed(b"", **given))[0] == 2


def test_requests_keep_their_own_parameters(app: flowlang.App) -> None:
    """Many at once, each with another value, share a model and no values."""
    rank, item = app["rank"], np.arange(4, dtype=np.float32)
    futures = [(k, rank.submit(item, k=k)) for k in [1, 2, 3, 4] * 25]
    assert all(len(f.result(PATIENCE_S)) == k for k, f in futures)


def test_values_of_every_type(app: flowlang.App) -> None:
    """Lists of records, bytes, boxes and images; what may be null need not be given."""
    needs = app["needs"]
    assert needs(1, a=2, b=[]) == {"s": 3, "n": [], "c": None}
    where = [{"x": 1}, {"x": 2, "y": 0.5}]
    assert needs(1, a=2, b=where, c=b"c") == {"s": 3, "n": [1, 2], "c": b"c"}
    picture = np.zeros((20, 30, 3), np.uint8)
    assert app["part"](0, box=[2, 2, 10, 8], picture=picture) == {"height": 6, "width": 8}
    assert app["part"](0, box=(2, 2, 10, 8), picture=picture.tolist())["height"] == 6


@pytest.mark.parametrize(
    ("flow", "item", "parameters", "words"),
    [
        ("pick", [1], {"k": "3"}, "`k`: this flow takes int, not str"),
        ("pick", [1], {"k": 3.0}, "`k`: this flow takes int, not float"),
        ("pick", [1], {"k": True}, "`k`: this flow takes int, not bool"),
        ("pick", [1], {"k": None}, "`k`: this flow takes int, not null"),
        ("pick", [1], {"sure": 1}, "`sure`: this flow takes bool, not int"),
        ("pick", [1], {"by": "1"}, "`by`: this flow takes float, not str"),
        ("pick", [1], {"name": b"a"}, "`name`: this flow takes str, not bytes"),
        ("pick", [1], {"q": 1}, "no parameter `q`; it has `k`, `by`, `sure`, `name`"),
        ("pick", ["a"], {"k": 1}, "this flow takes int, not str"),
        ("pick", [1, "a"], {}, "element 1: this flow takes int, not str"),
        (
            "needs",
            1,
            {"a": 1, "b": [{"x": None}]},
            "`b`: element 0: `x`: this flow takes int, not null",
        ),
        ("needs", 1, {"a": 1, "b": [{"x": 1, "z": 2}]}, "fields x, y, and none named `z`"),
        ("needs", 1, {"a": 1, "b": [3]}, "a record with the fields x, y, not int"),
        ("plain", np.zeros(4, np.float32), {"k": 1}, "no parameter `k`; it has none"),
        ("rank", np.zeros(4, np.float32), {}, "this flow needs its parameter `k`"),
        ("rank", np.zeros(4, np.float32), {"k": 0}, "`k` must be a whole number from 1 to"),
        ("needs", 1, {"a": 1}, "this flow needs its parameter `b`"),
        (
            "needs",
            1,
            {"a": 1, "b": [{"y": 1}]},
            "`b`: element 0: this flow takes a record with the fields x, y, and `x` is missing",
        ),
        ("needs", 1, {"a": 1, "b": {"x": 1}}, "`b`: this flow takes list<where>, not a record"),
        ("needs", 1, {"a": 1, "b": [], "c": "c"}, "`c`: this flow takes bytes, not str"),
        ("part", 0, {"box": [1, 2, 3, 4], "picture": 3}, "`picture`: this flow takes image<rgb"),
        ("part", 0, {"box": [1, 2], "picture": np.zeros((4, 4, 3), np.uint8)}, "`box`: this"),
    ],
)
def test_what_does_not_fit_is_refused(
    app: flowlang.App, flow: str, item: Any, parameters: dict[str, Any], words: str
) -> None:
    """With the parameter's name and what it should be, before anything waits for it."""
    assert words in refusal(app[flow], item, **parameters)


def test_a_refused_item_of_many_is_its_own_answer(app: flowlang.App) -> None:
    """`map` gives a refusal in an item's place, and refuses parameters once for each."""
    answers = list(app["pick"].map([[1], ["x"], [3]], errors="return", k=2))
    assert [isinstance(a, flowlang.BadRequest) for a in answers] == [False, True, False]
    answers = list(app["pick"].map([[1], [2]], errors="return", k="2"))
    assert [isinstance(a, flowlang.BadRequest) for a in answers] == [True, True]


def test_flows_tell_their_parameters(app: flowlang.App) -> None:
    """Names, types and defaults, for those who make forms of them."""
    told = [(p.name, str(p.type), p.default is not None) for p in app["pick"].parameters]
    assert told == [
        ("k", "int", True), ("by", "float", True), ("sure", "bool", True), ("name", "str", True),
    ]  # fmt: skip
    assert app["plain"].parameters == ()


def test_a_flow_of_one_stage_may_have_parameters(tmp_path: Path) -> None:
    """Parameters that nothing uses are checked and left behind, with a deadline too."""
    models.identity(tmp_path / "net.onnx", ("N", 4))
    (tmp_path / "app.flow").write_text('export flow f(k: int = 2) = trt("net.onnx", batch=1..4)')
    with flowlang.load(tmp_path / "app.flow", device="cpu") as app:
        items = [np.full(4, i, np.float32) for i in range(8)]
        for given in ({}, {"k": 3}, {"k": 3, "deadline_s": 30.0}):
            answers = list(app.map(items, **given))
            assert all(np.array_equal(a, b) for a, b in zip(answers, items, strict=True))
        assert "takes int" in refusal(app.flow(), items[0], k="3")


# On the command line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.flow").write_text(APP)
    (tmp_path / "pair.flow").write_text(PAIR)
    for number, picture in enumerate(photographs(2)):
        (tmp_path / f"{number}.jpg").write_bytes(picture)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowlang", "run", "--device", "cpu", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_S,
        check=False,
    )


def test_the_command_line_brings_parameters(folder: Path) -> None:
    """`--param NAME=VALUE` holds for all pictures; the rest have their defaults."""
    done = run(folder, "--json", "app.flow", "0.jpg", "1.jpg")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line)["result"] for line in done.stdout.splitlines()]
    assert results == [{"name": "none", "wide": True, "width": 500.0}] * 2
    options = ("--param", "least=501", "--param", "name=a=b c", "--param", "scale=0.5")
    done = run(folder, "--json", *options, "app.flow", "0.jpg")
    assert json.loads(done.stdout)["result"] == {"name": "a=b c", "wide": False, "width": 250.0}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("least=x", "`least` is int, not `x`"),
        ("most=3", "this flow has no parameter `most`; it has `least`, `name`, `scale`"),
        ("least", "it takes NAME=VALUE, not 'least'"),
    ],
)
def test_wrong_parameters_are_wrong_use(folder: Path, value: str, words: str) -> None:
    """They are told before any picture is looked at, with status 2."""
    done = run(folder, "--param", value, "app.flow", "0.jpg")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stdout == ""


def test_what_a_flow_refuses_is_told_for_each_picture(folder: Path) -> None:
    """A parameter that is missing, or of a wrong kind, fails every picture, with status 1."""
    done = run(folder, "--json", "pair.flow", "0.jpg", "1.jpg")
    assert done.returncode == 1
    messages = [json.loads(line)["error"]["message"] for line in done.stdout.splitlines()]
    assert messages == ["this flow needs its parameter `other`"] * 2
    done = run(folder, "--json", "--param", "least=0.5", "app.flow", "0.jpg")
    assert done.returncode == 1
    assert "`least`: this flow takes int, not float" in done.stdout
