"""Requests with parameters: in the query, in parts of a form, and what is wrong with either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flowlang.diagnostics import Source, Span
from flowlang.plan import graph
from flowlang.plan.graph import Node, Parameter, Site
from flowlang.plan.types import STR
from flowlang.serve.form import MAX_PARTS, ParameterReader
from tests.pictures import photographs
from tests.serve.server import KINDS, Server, serving, write

PICTURES = photographs(3)
OPS = '''
from typing import Annotated, Any
import numpy as np

def show(item: bytes, *, k: int, scale: float = 1.0, name: str = "-", sure: bool = False,
         tags: Any = None, more: Any = None, where: Any = None) -> str:
    """Everything it is told, as text."""
    return repr((len(item), k, scale, name, sure, tags, more and len(more), where))

Both = Annotated[dict, "{ one: bytes, other: bytes?, note: str?, at: list<int>? }"]

def both(item: Both, *, k: int) -> str:
    return repr((item["one"], item["other"], item["note"], item["at"], k))

def side(image: np.ndarray) -> int:
    return image.shape[1]
'''
FLOWS = """
use "ops.py" as ops
export flow show(
  k: int = 2, scale: float = 1, name: str = "none", sure: bool = false, tags: list<str>?,
  more: bytes?, where: path?,
): bytes -> str =
  ops.show(k=k, scale=scale, name=name, sure=sure, tags=tags, more=more, where=where)
export flow needs(k: int): bytes -> int = k
export flow side(least: int = 0) = decode -> { side: ops.side, least: least }
  -> if .side < .least then (.side / (.least - .least)) else (.side / 1)
export flow twin(other: bytes): bytes -> list<int> {
  return [(in -> decode -> .width), (other -> decode -> .width)]
}
export flow pair: { a: int, b: int } -> int = .a - .b
export flow both(k: int = 1): { one: bytes, other: bytes?, note: str?, at: list<int>? } -> str =
  ops.both(k=k)
export flow clash(one: int): { one: bytes, item: bytes } -> int = one
export flow echo = pass
export flow named(item: int = 1, self: int = 1): bytes -> int = item * 10 + self
"""


@pytest.fixture(scope="module", params=KINDS)
def server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("forms")
    write(folder / "ops.py", OPS)
    flows = write(folder / "forms.flow", FLOWS)
    with serving(folder, *request.param, str(flows)) as server:
        yield server.wait_ready()


def shown(response: httpx.Response) -> tuple[Any, ...]:
    """What `ops.show` was told."""
    assert response.status_code == 200, response.text
    told: tuple[Any, ...] = eval(response.json())
    return told


def refusal(response: httpx.Response) -> str:
    """Why a request was refused. Its answer is JSON with a code, and no traceback."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "bad-request"
    assert "Traceback" not in response.text
    message: str = error["message"]
    return message


# Query strings


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("", (3, 2, 1.0, "none", False, None, None, None)),
        ("?", (3, 2, 1.0, "none", False, None, None, None)),
        ("?k=5", (3, 5, 1.0, "none", False, None, None, None)),
        ("?scale=0.5&sure=true", (3, 2, 0.5, "none", True, None, None, None)),
        ("?scale=3", (3, 2, 3.0, "none", False, None, None, None)),
        ("?k=-1&scale=1e3", (3, -1, 1000.0, "none", False, None, None, None)),
        ("?name=a%20b+c", (3, 2, 1.0, "a b c", False, None, None, None)),
        ("?name=", (3, 2, 1.0, "", False, None, None, None)),
        ("?name=%C3%A9%26%3D", (3, 2, 1.0, "\u00e9&=", False, None, None, None)),
        ("?name=3", (3, 2, 1.0, "3", False, None, None, None)),
        ("?name=true", (3, 2, 1.0, "true", False, None, None, None)),
        ('?tags=["a","b"]', (3, 2, 1.0, "none", False, ["a", "b"], None, None)),
        ("?tags=null", (3, 2, 1.0, "none", False, None, None, None)),
        ("?more=abcd", (3, 2, 1.0, "none", False, None, 4, None)),
        ("?where=a/b.txt", (3, 2, 1.0, "none", False, None, None, "a/b.txt")),
    ],
)
def test_a_query_brings_parameters(server: Server, query: str, told: tuple[Any, ...]) -> None:
    """Texts as they are, anything else as JSON; what is not given has its default, or is null."""
    assert shown(server.client.post(f"/flows/show{query}", content=b"abc")) == told


def test_a_query_may_hold_raw_text() -> None:
    """What a client forgot to escape is read as UTF-8, as everybody sends it."""
    place = Span(Source("test.flow", "name"), 0, 4)
    node = Node(graph.INPUT, {}, (), STR, place, Site("show", place))
    reader = ParameterReader([Parameter(node, "name", STR)])
    assert reader.of_query("name=\u00e9 1".encode()) == {"name": "\u00e9 1"}
    assert reader.of_query(b"name=\xff") == {"name": "\ufffd"}


@pytest.mark.parametrize(
    ("flow", "query", "words"),
    [
        ("show", "?k=x", "`k` is int, not `x`"),
        ("show", "?k=", "`k` is int, not ``"),
        ("show", "?k=0.5", "`k`: this flow takes int, not float"),
        ("show", "?k=true", "`k`: this flow takes int, not bool"),
        ("show", '?k="3"', "`k`: this flow takes int, not str"),
        ("show", "?k=[1]", "`k`: this flow takes int, not a list"),
        ("show", "?k=" + "9" * 5000, "`k` is int, not `" + "9" * 40 + "`"),
        ("show", "?k=" + "[" * 5000, "`k` is int, not `" + "[" * 40 + "`"),
        ("show", "?k=%FF%FE", "`k` is int, not"),
        ("show", "?sure=1", "`sure`: this flow takes bool, not int"),
        ("show", "?sure=True", "`sure` is bool, not `True`"),
        ("show", "?scale=" + "9" * 400, "`scale`: this flow takes float, and this number is too"),
        ("show", "?tags=a", "`tags` is list<str>, not `a`"),
        ("show", "?tags=[1]", "`tags`: element 0: this flow takes str, not int"),
        ("show", "?k=1&k=2", "`k` is given twice"),
        ("show", "?q=1", "this flow has no parameter `q`; it has `k`, `scale`"),
        ("show", "?deadline_s=1", "this flow has no parameter `deadline_s`; it has"),
        ("show", "?item=1&self=2", "this flow has no parameter `item`; it has"),
        ("echo", "?k=1", "this flow has no parameter `k`; it has none"),
        ("needs", "", "this flow needs its parameter `k`"),
    ],
)
def test_a_query_that_does_not_fit(server: Server, flow: str, query: str, words: str) -> None:
    """The parameter is named with what it should be; nothing of it reaches the flow."""
    assert words in refusal(server.client.post(f"/flows/{flow}{query}", content=b"abc"))


def test_parameters_may_be_named_as_python_names_its_own(server: Server) -> None:
    """`item` and `self` are what a method takes first."""
    assert server.client.post("/flows/named?item=2&self=3", content=b"").json() == 23
    parts = {"item": (None, b"4"), "it": ("it", b"")}
    assert server.client.post("/flows/named", files=parts).json() == 41


def test_parameters_and_the_item_are_apart(server: Server) -> None:
    """The body is the item alone, whatever the query says, and may be JSON as ever."""
    response = server.client.post("/flows/needs?k=7", content=b"k=8")
    assert response.json() == 7
    assert server.client.post("/flows/pair", json={"a": 5, "b": 3}).json() == 2


# Forms


def test_a_form_brings_the_item_and_its_parameters(server: Server) -> None:
    """Parts named like parameters are those; the other one is the item, whatever its name."""
    for name in ("file", "picture", "k2"):
        response = server.client.post(
            "/flows/show",
            files={name: ("a.bin", b"abcdef")},
            data={"k": "5", "name": "a & b", "scale": "0.5", "sure": "true", "tags": '["x"]'},
        )
        assert shown(response) == (6, 5, 0.5, "a & b", True, ["x"], None, None)


def test_a_parameter_may_be_a_file(server: Server) -> None:
    """Two pictures, the one the item and the other a parameter, in either order."""
    import cv2
    import numpy as np

    small = cv2.imencode(".png", np.zeros((8, 20, 3), np.uint8))[1].tobytes()
    for files in (
        [("other", ("b.png", small)), ("picture", ("a.jpg", PICTURES[0]))],
        [("picture", ("a.jpg", PICTURES[0])), ("other", ("b.png", small))],
    ):
        assert server.client.post("/flows/twin", files=files).json() == [500, 20]
    response = server.client.post("/flows/show", files={"item": b"abc", "more": b"12345"})
    assert shown(response)[6] == 5


def test_query_and_form_together(server: Server) -> None:
    """What the query says counts beside what the form says."""
    response = server.client.post(
        "/flows/show?k=5&name=a", files={"f": b"abc"}, data={"sure": "true"}
    )
    assert shown(response) == (3, 5, 1.0, "a", True, None, None, None)


def test_several_pictures_in_a_form(server: Server) -> None:
    """Each is answered by itself, in order and by its file's name, with the same parameters."""
    files = [("f", (f"{i}.jpg", picture)) for i, picture in enumerate(PICTURES)]
    files.insert(1, ("f", ("bad.jpg", b"no picture")))
    response = server.client.post("/flows/side?least=10", files=files)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [r["name"] for r in results] == ["0.jpg", "bad.jpg", "1.jpg", "2.jpg"]
    assert [r.get("result") for r in results] == [500.0, None, 500.0, 500.0]
    assert results[1]["error"]["code"] == "bad-request"
    assert "decode failed" in results[1]["error"]["message"]
    response = server.client.post("/flows/side", files=files, data={"least": "1000"})
    codes = [r["error"]["code"] for r in response.json()["results"]]
    assert codes == ["stage-failed", "bad-request", "stage-failed", "stage-failed"]


def test_parts_without_a_file_are_items_too(server: Server) -> None:
    """A part's own name tells it where it has no file's; beside parameters that is `item`."""
    response = server.client.post(
        "/flows/pair", files={"x": (None, b'{"a": 1, "b": 2}'), "y": (None, b'{"a": 2, "b": 1}')}
    )
    assert [(r["name"], r["result"]) for r in response.json()["results"]] == [("x", -1), ("y", 1)]
    items = [("item", (None, b"12")), ("item", (None, b"123")), ("k", (None, b"5"))]
    results = server.client.post("/flows/show", files=items).json()["results"]
    assert [eval(r["result"])[:2] for r in results] == [(2, 5), (3, 5)]
    items = [("item_", (None, b"1")), ("item_", (None, b"")), ("item", (None, b"4"))]
    results = server.client.post("/flows/named", files=items).json()["results"]
    assert [r["result"] for r in results] == [41, 41]


@pytest.mark.parametrize(
    ("flow", "files", "words"),
    [
        (
            "side",
            {"a": ("a.png", b""), "leest": (None, b"9")},
            "no parameter `leest`; it has `least`",
        ),
        ("side", {"a": (None, b""), "leest": (None, b"9")}, "no parameter `a`; it has `least`"),
        ("echo", {"k": (None, b"5"), "a": ("a", b"")}, "no parameter `k`; it has none"),
        ("side", {"leest": (None, b"9"), "item": (None, b"")}, "or named `item`"),
    ],
)
def test_a_misspelt_parameter_is_no_item(
    server: Server, flow: str, files: dict[str, tuple[str | None, bytes]], words: str
) -> None:
    """It has no file's name, and stands beside what is the item: nothing is done without it."""
    assert words in refusal(server.client.post(f"/flows/{flow}", files=files))


def test_a_record_comes_in_a_part_for_each_field(server: Server) -> None:
    """Bytes and texts as they are, others as JSON; with or without a file's name, in any order."""
    one = {"one": ("1.jpg", PICTURES[0])}
    response = server.client.post("/flows/both", files=one)
    assert eval(response.json()) == (PICTURES[0], None, None, None, 1)
    texts = {"at": (None, b"[1, 2]"), "k": (None, b"5"), "note": (None, b"[1]")}
    files: Any = {**texts, "other": b"\r\n", **one}
    response = server.client.post("/flows/both", files=files)
    assert eval(response.json()) == (PICTURES[0], b"\r\n", "[1]", [1, 2], 5)
    response = server.client.post("/flows/pair", files={"a": (None, b"5"), "b": (None, b"3")})
    assert response.json() == 2


def test_a_field_named_as_a_parameter_is_that(server: Server) -> None:
    """Such a record comes as JSON alone; a part with it is named otherwise than its fields."""
    item = json.dumps({"one": "YWI=", "item": "YWI="})
    parts = {"one": (None, b"7"), "item_": (None, item.encode())}
    assert server.client.post("/flows/clash", files=parts).json() == 7
    parts = {"one": (None, b"7"), "item": (None, b"abc")}
    assert "`one` is missing" in refusal(server.client.post("/flows/clash", files=parts))


@pytest.mark.parametrize(
    ("flow", "parts", "words"),
    [
        ("both", [("other", b"")], "`one` is missing"),
        ("both", [("one", b""), ("one", b"")], "`one` is given twice"),
        ("both", [("one", b""), ("uno", b"")], "has no field `uno`"),
        ("both", [("one", b""), ("item", b'{"one": ""}')], "has no field `item`"),
        ("both", [("one", b""), ("at", b"1, 2")], "`at` is list<int>, not `1, 2`"),
        ("both", [("one", b""), ("at", b"[1.5]")], "`at`: element 0"),
        ("pair", [("a", b"5"), ("b", b"x")], "`b` is int, not `x`"),
    ],
)
def test_fields_that_do_not_fit(
    server: Server, flow: str, parts: list[tuple[str, bytes]], words: str
) -> None:
    """The field is named with what it should be."""
    files = [(name, (None, content)) for name, content in parts]
    assert words in refusal(server.client.post(f"/flows/{flow}", files=files))


def test_a_part_may_hold_anything(server: Server) -> None:
    """Nothing inside a part is looked at: not boundaries that are none, line ends or nulls."""
    content = b'\r\n--x\r\nContent-Disposition: form-data; name="k"\r\n\r\n9\r\n--x--\r\n\0\xff'
    response = server.client.post("/flows/echo", files={"f": ("a", content)})
    assert response.content == content
    assert server.client.post("/flows/echo", files={"f": ("a", b"")}).content == b""
    large = bytes(range(256)) * 20_000
    assert server.client.post("/flows/echo", files={"f": ("a", large)}).content == large


FORM = "multipart/form-data; boundary=x"
ITEM = b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\nabc\r\n'
K = b'--x\r\nContent-Disposition: form-data; name="k"\r\n\r\n5\r\n'


@pytest.mark.parametrize(
    ("kind", "body", "told"),
    [
        (FORM, ITEM + K + b"--x--\r\n", 5),
        (FORM, ITEM + K + b"--x--", 5),
        (FORM, K + ITEM + b"--x--\r\nafterwards", 5),
        (FORM, b"\r\n" + ITEM + b"--x--\r\n", 2),
        ('Multipart/Form-Data; boundary="x"', ITEM + b"--x--\r\n", 2),
        (FORM, ITEM.replace(b"name", b"NAME") + b"--x--\r\n", 2),
        (FORM, ITEM.replace(b"Content-Disposition", b"content-disposition") + b"--x--\r\n", 2),
        (FORM, b"--x\r\n\r\nabc\r\n--x--\r\n", 2),
        (FORM, b"--x\r\nContent-Type: a\r\n\r\nabc\r\n--x--\r\n", 2),
    ],
)
def test_forms_as_others_write_them(server: Server, kind: str, body: bytes, told: int) -> None:
    """Blanks, cases and missing headers that clients differ in."""
    response = server.client.post("/flows/show", content=body, headers={"content-type": kind})
    assert shown(response)[:2] == (3, told)


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("multipart/form-data", ITEM + b"--x--\r\n", "the form's Content-Type has no boundary"),
        ("multipart/form-data; boundary=", ITEM, "the form's Content-Type has no boundary"),
        (FORM, b"", "the form ends before its last boundary"),
        (FORM, ITEM, "the form ends before its last boundary"),
        (FORM, ITEM[:-8], "the form ends before its last boundary"),
        (FORM, b"not a form", "this is no form of the boundary it names"),
        (FORM, b"--y\r\n\r\nabc\r\n--y--\r\n", "this is no form of the boundary it names"),
        (FORM, b"--x\r\nno header\r\n\r\nabc\r\n--x--\r\n", "this is no form of the boundary"),
        (FORM, b"--x--\r\n", "the form"),
        (FORM, K + b"--x--\r\n", "the form has no part with the item besides k"),
        (FORM, ITEM + K + K + b"--x--\r\n", "`k` is given twice"),
        (FORM, ITEM + K.replace(b"5", b"x") + b"--x--\r\n", "`k` is int, not `x`"),
        (FORM, ITEM + K.replace(b"5", b"\xff") + b"--x--\r\n", "`k` is int, not"),
        (FORM, ITEM * (MAX_PARTS + 1) + b"--x--\r\n", f"a form has at most {MAX_PARTS} parts"),
    ],
)
def test_broken_forms(server: Server, kind: str, body: bytes, words: str) -> None:
    """Each is refused with what is wrong with it, and the connection serves on."""
    response = server.client.post("/flows/show", content=body, headers={"content-type": kind})
    assert words in refusal(response)
    assert shown(server.client.post("/flows/show", content=b"abc"))[0] == 3


def test_any_prefix_of_a_form_is_refused(server: Server) -> None:
    """A form cut off anywhere is no form: no half picture gets in."""
    whole = ITEM + K + b"--x--\r\n"
    headers = {"content-type": FORM}
    for length in range(len(whole) - 4):
        response = server.client.post("/flows/show", content=whole[:length], headers=headers)
        assert response.status_code == 400, whole[:length]


def test_forms_with_many_parts(server: Server) -> None:
    """As many as there may be, each answered; and parameters count among them."""
    body = K + ITEM * (MAX_PARTS - 1) + b"--x--\r\n"
    response = server.client.post("/flows/show", content=body, headers={"content-type": FORM})
    results = response.json()["results"]
    assert len(results) == MAX_PARTS - 1
    assert {eval(r["result"])[:2] for r in results} == {(3, 5)}


def test_parameters_are_listed(server: Server) -> None:
    """`/flows` tells the parameters of each flow, their types and defaults."""
    flows = {flow["name"]: flow for flow in server.client.get("/flows").json()["flows"]}
    assert [p["name"] for p in flows["needs"]["parameters"]] == ["k"]
    assert flows["echo"]["parameters"] == []
    shown = {p["name"]: p for p in flows["show"]["parameters"]}
    assert shown["k"]["type"] == "int"
    assert shown["tags"]["type"] == "list<str>?"


def test_nothing_went_wrong_inside(server: Server) -> None:
    """No request above has left a traceback of the server's own in its log."""
    assert "Traceback" not in server.errors.replace("`ops.show` failed", "")


def test_a_form_that_is_none_is_no_matter_of_the_operator(tmp_path: Path) -> None:
    """At the default level the log says nothing of it: it is its client's mistake."""
    with serving(tmp_path, str(write(tmp_path / "echo.flow", "pass"))) as quiet:
        quiet.wait_ready()
        kind = {"Content-Type": "multipart/form-data; boundary=y"}
        sent = b"--x\r\nnonsense\r\n"
        assert quiet.client.post("/", content=sent, headers=kind).status_code == 400
        assert quiet.errors == ""
