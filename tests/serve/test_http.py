"""The server: real processes, real clients, and what must not be lost on the way."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import flowlang
from flowlang.diagnostics import FlowError
from flowlang.serve import asgi
from flowlang.serve.answer import _count_values
from flowlang.serve.corked import MAX_CORKED_BYTES, Corked
from flowlang.serve.routes import Service
from tests.pictures import bad, photographs
from tests.serve.faces import write_types
from tests.serve.server import (
    KINDS,
    PATIENCE_S,
    Server,
    head,
    running,
    serving,
    wait_until,
    write,
)

PICTURE = photographs(1)[0]
NUMBERS = [1.0, 2.0, 3.0]
FRONTS = [pytest.param(0, id="one-process"), pytest.param(2, id="ingest")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, `all.flow` and `types.flow`."""
    folder = tmp_path_factory.mktemp("flows")
    write_types(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of all flows, shared by the tests that leave it as it was."""
    files = (str(folder / "all.flow"), str(folder / "types.flow"))
    with serving(folder, *files, *request.param) as server:
        yield server.wait_ready()


@pytest.fixture
def echo(folder: Path) -> Path:
    """A file with one flow, which answers what it is sent."""
    return write(folder / "echo.flow", "pass\n")


def _error(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"code", "message", "stage", "flow", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def _load_later(path: Path, gate: Path, **options: Any) -> list[str]:
    """A program that serves a file, and loads it only once the file `gate` is there."""
    code = f"""
import os, sys, time, flowlang
from flowlang.serve import serve
def load():
    while not os.path.exists({str(gate)!r}):
        time.sleep(0.01)
    return flowlang.load({str(path)!r})
sys.exit(serve(load, "127.0.0.1", 0, **{options!r}))
"""
    return ["-c", code]


# Answers


def test_a_picture_is_answered_with_its_classes(server: Server) -> None:
    """A picture posted to a classifier comes back as JSON: three named classes, greatest first."""
    response = server.client.post("/flows/classify", content=PICTURE)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    found = response.json()
    assert [set(label) for label in found] == [{"index", "label", "score"}] * 3
    scores = [label["score"] for label in found]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] <= scores[0] < 1


def test_the_wire_gives_what_python_gives(server: Server, folder: Path) -> None:
    """Over HTTP a flow answers exactly what it answers in Python, a record of arrays included."""
    over_http = server.client.post("/flows/two", content=PICTURE).json()
    with flowlang.load(folder / "all.flow") as app:
        in_python = app["two"](PICTURE)
    assert over_http == {name: value.tolist() for name, value in in_python.items()}
    assert {name: len(value) for name, value in over_http.items()} == {
        "scores": 10,
        "embedding": 16,
    }


@pytest.mark.parametrize("size", [0, 1, 65_000, 5_000_000])
def test_bytes_come_back_as_they_are(server: Server, size: int) -> None:
    """A result of bytes is the body itself, whether it came in one piece or in many."""
    sent = np.random.default_rng(size).bytes(size)
    response = server.client.post("/flows/echo", content=sent)
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.content == sent


def test_a_chunked_body_is_put_together(server: Server) -> None:
    """A body of unknown length arrives whole and in order."""
    pieces = [bytes([number]) * 40_000 for number in range(20)]
    response = server.client.post("/flows/echo", content=iter(pieces))
    assert response.content == b"".join(pieces)


def test_json_goes_in_where_a_flow_takes_numbers(server: Server) -> None:
    """Tensors and records of them are given as JSON."""
    assert server.client.post("/flows/same", json=NUMBERS).json() == NUMBERS
    image = np.zeros((3, 64, 64)).tolist()
    response = server.client.post("/flows/pair", json={"image": image, "features": [0.5] * 8})
    assert response.status_code == 200
    assert len(response.json()) == 10


@pytest.mark.parametrize(
    ("flow", "given", "answer"),
    [
        ("levels", [1, 2.0, 255], [1, 2, 255]),
        ("total", [1, 2.5, 10**20], 10**20 + 3.5),
        ("total", [], 0),
    ],
)
def test_numbers_go_in_as_they_are(server: Server, flow: str, given: Any, answer: Any) -> None:
    """Whole numbers may be written with a point, and numbers with a point without one."""
    assert server.client.post(f"/flows/{flow}", json=given).json() == answer


@pytest.mark.parametrize(
    ("flow", "given", "answer"),
    [
        ("parts", ["aGk=", "", "aG8="], b"hi++ho"),
        ("parts", [], b""),
        ("hinted", {"data": "aGk=", "hint": "aG8="}, b"hi?ho"),
        ("hinted", {"data": "aGk=", "hint": None}, b"hi?none"),
        ("hinted", {"data": "aGk="}, b"hi?none"),
    ],
)
def test_bytes_inside_json_are_in_base64(
    server: Server, flow: str, given: Any, answer: bytes
) -> None:
    """In lists, in records, and where they may be missing."""
    assert server.client.post(f"/flows/{flow}", json=given).content == answer


@pytest.mark.parametrize("flow", ["parts", "hinted"])
def test_who_sends_a_picture_where_json_is_meant_is_told_of_base64(
    server: Server, flow: str
) -> None:
    """That the body is no text is no help to somebody who sends what is none."""
    reply = server.client.post(f"/flows/{flow}", content=b"\xff\xd8\xff")
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.endswith(" with bytes in base64: the body is not UTF-8")


def test_json_has_a_largest_size(server: Server) -> None:
    """More of it than Python has room for is 413, whatever the largest body is."""
    response = server.client.post("/flows/total", content=b"[" + b"[]," * 6_000_000 + b"[]]")
    assert (response.status_code, _error(response)["code"]) == (413, "too-large")
    assert "JSON larger than 16,777,216 bytes" in _error(response)["message"]


@pytest.mark.parametrize("path", ["/flows/total", "/v2/models/total/infer"])
def test_json_has_a_largest_number_of_values(server: Server, path: str) -> None:
    """So many are made of their text at once that others wait for it; what strings hold is none."""
    is_flow = path.startswith("/flows")
    tensor = '{"inputs":[{"name":"input","datatype":"BYTES","shape":[1],"data":["%s"]}]}'

    def sent(numbers: str) -> httpx.Response:
        return server.client.post(path, content=numbers if is_flow else tensor % numbers)

    assert sent("[" + "1," * ((1 << 18) - 2) + "1]").status_code == 200
    for many in ("[" + "1," * (1 << 18) + "1]", "[" + "[]," * (1 << 17) + "1]"):
        response = sent(many)
        told = response.json()["error"]
        told = told["message"] if is_flow else told
        assert (response.status_code, "more than 262,144 values" in told) == (413, True)


def test_values_are_counted_over_a_whole_request(server: Server) -> None:
    """Items of a form and elements of a tensor share what there may be."""
    half = b"[" + b"1," * (1 << 17) + b"1]"
    items = [("item", (None, half))] * 2
    assert server.client.post("/flows/total", files=items[:1]).json() == (1 << 17) + 1
    assert server.client.post("/flows/total", files=items).status_code == 413
    tensor = {"name": "input", "datatype": "BYTES", "shape": [2], "data": [half.decode()] * 2}
    response = server.client.post("/v2/models/total/infer", json={"inputs": [tensor]})
    assert response.status_code == 413


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_is_utf_8(server: Server, coding: str) -> None:
    """Whatever Python guesses: what strings hold is told from values by its bytes."""
    text = '["\u2201"' + ",1" * (1 << 19) + "]"
    response = server.client.post("/flows/total", content=text.encode(coding))
    assert response.status_code in (400, 413)
    response = server.client.post("/flows/total", content="[1, 2]".encode(coding))
    assert response.status_code == 400
    assert server.client.post("/flows/total", content="[1, 2]".encode("utf-8-sig")).json() == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (b"[1, 2]", 2),
        (b'{"a": [1, {"b": 2}], "c": "xy"}', 5),
        (b'["' + b"," * (1 << 19) + b'"]', 1),
        (b'["' + rb"\",[" * (1 << 19) + b'", 2]', 2),
        (b'["' + rb"\\" * 9 + b'"' + b",1" * (1 << 19) + b"]", (1 << 19) + 1),
        (b'["' + b"," * (1 << 19), 1),
        (b'"",' * (1 << 20), 1 << 20),
    ],
)
def test_what_a_string_holds_is_no_value(text: bytes, count: int) -> None:
    """Where there are many marks of values, those inside strings are left out, escapes or not."""
    assert _count_values(text) == count


def test_what_json_cannot_hold_is_null(server: Server) -> None:
    """NaN and the infinities never make an answer that is no JSON."""
    response = server.client.post("/flows/same", content=b"[NaN, 1.5, -Infinity]")
    assert response.content == b"[null,1.5,null]"


def test_the_only_flow_is_served_at_the_root(folder: Path, echo: Path) -> None:
    """With one flow `POST /` calls it; with several it says which there are."""
    with flowlang.load(echo) as app:
        assert _ask(asgi(app), "/", b"abc").content == b"abc"
    with flowlang.load(folder / "all.flow") as app:
        response = _ask(asgi(app), "/", b"abc")
    assert response.status_code == 404
    assert "/flows/classify, /flows/two" in _error(response)["message"]


def _ask(application: Any, path: str, body: bytes | AsyncIterator[bytes]) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=body)

    return asyncio.run(ask())


def test_two_flows_of_one_name_are_refused(echo: Path) -> None:
    """No flow hides another behind the same path."""
    with pytest.raises(FlowError, match="both serve a flow named `main`"):
        flowlang.load(echo, echo)


def test_the_flows_are_listed(server: Server) -> None:
    """`GET /flows` gives each flow's name, types, documentation and path."""
    listed = server.client.get("/flows").json()["flows"]
    assert listed[0] == {
        "name": "classify",
        "doc": "Three best classes of one picture.",
        "input": "bytes",
        "output": "list<label>",
        "path": "/flows/classify",
        "takes": "bytes",
        "fields": [],
        "parameters": [],
    }
    assert next(flow["fields"] for flow in listed if flow["name"] == "hinted") == [
        {"name": "data", "type": "bytes", "required": True},
        {"name": "hint", "type": "bytes?", "required": False},
    ]
    takes = {flow["name"]: flow["takes"] for flow in listed}
    assert {name: takes[name] for name in ("two", "echo", "same", "pair", "parts", "hinted")} == {
        "two": "bytes",
        "echo": "bytes",
        "same": "json",
        "pair": "json",
        "parts": "json",
        "hinted": "json",
    }


# Refusals


@pytest.mark.parametrize("name", ["empty", "text", "jpeg-half", "jpeg-30000x30000"])
def test_a_bad_picture_is_the_senders_fault(server: Server, name: str) -> None:
    """A file that is no sound picture gives 400 with the stage that refused it, and no place."""
    response = server.client.post("/flows/classify", content=bad()[name].data)
    assert response.status_code == 400
    error = _error(response)
    assert (error["code"], error["stage"], error["flow"]) == ("bad-request", "decode", "classify")
    assert bad()[name].word in error["message"]
    assert ".flow" not in response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/flows/same", b"\xff\xd8\xff"),
        ("/flows/same", b"[1, 2"),
        ("/flows/same", b"[" * 100_000),
        ("/flows/same", b"[1, 2]"),
        ("/flows/same", b'["one", "two", "three"]'),
        ("/flows/same", b"[[1], [2, 3], []]"),
        ("/flows/same", b"{}"),
        ("/flows/same", b"[1e400, 2, 3"),
        ("/flows/same", b"[1e300, 2, 3]"),
        ("/flows/same", b'["1", null, true]'),
        ("/flows/same", b"[1, 2, true]"),
        ("/flows/same", b"[true, true, true]"),
        ("/flows/levels", b'["5", true, 3]'),
        ("/flows/levels", b"[1.7, 2, 3]"),
        ("/flows/levels", b"[256, 2, 3]"),
        ("/flows/levels", b"[null, 2, 3]"),
        ("/flows/parts", b'["aGk=", "no base64"]'),
        ("/flows/parts", b'["aGk=", null]'),
        ("/flows/parts", b'"aGk="'),
        ("/flows/hinted", b'{"data": "aGk=", "hint": "?"}'),
        ("/flows/hinted", b'{"data": null}'),
        ("/flows/total", b"[1, true]"),
        ("/flows/total", b'[1, "2"]'),
        ("/flows/total", b"[1%s]" % (b"0" * 400)),
        ("/flows/pair", b"[]"),
        ("/flows/pair", b'{"image": 1}'),
    ],
)
def test_json_that_does_not_fit_is_refused(server: Server, path: str, body: bytes) -> None:
    """A body that is not JSON, or not of the flow's type, gives 400."""
    response = server.client.post(path, content=body)
    assert (response.status_code, _error(response)["code"]) == (400, "bad-request")


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("POST", "/flows/nothing", 404, "not-found", None),
        ("GET", "/elsewhere", 404, "not-found", None),
        ("GET", "/flows/classify/", 404, "not-found", None),
        ("GET", "/flows/classify", 405, "wrong-method", "POST"),
        ("DELETE", "/flows/classify", 405, "wrong-method", "POST"),
        ("PUT", "/", 405, "wrong-method", "GET, HEAD, POST"),
        ("POST", "/flows", 405, "wrong-method", "GET, HEAD"),
        ("POST", "/health/ready", 405, "wrong-method", "GET, HEAD"),
    ],
)
def test_wrong_paths_and_methods(
    server: Server, method: str, path: str, status: int, code: str, allow: str | None
) -> None:
    """An unknown path gives 404 with the flows there are, a wrong method 405 with the right."""
    response = server.client.request(method, path)
    assert (response.status_code, _error(response)["code"]) == (status, code)
    assert response.headers.get("allow") == allow
    if status == 404:
        assert "/flows/classify" in _error(response)["message"]


@pytest.mark.parametrize("given", ["7f3c", "x" * 128, "a b~!"])
def test_a_requests_id_comes_back(server: Server, given: str) -> None:
    """A client's id is repeated in the header and in errors."""
    headers = {"X-Request-Id": given}
    assert server.client.get("/flows", headers=headers).headers["x-request-id"] == given
    response = server.client.post("/flows/classify", content=b"?", headers=headers)
    assert _error(response)["request_id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "caf\xe9"])
def test_an_id_is_made_where_none_can_be_repeated(server: Server, given: str | None) -> None:
    """Without an id, or with one too long or not ASCII, each request gets an id of its own."""
    headers = {} if given is None else {b"X-Request-Id": given.encode("latin-1")}
    made = {
        server.client.post("/flows/echo", content=b"?", headers=headers).headers["x-request-id"]
        for _ in range(3)
    }
    assert len(made) == 3
    assert all(id_.isascii() and id_.isalnum() and id_ != given for id_ in made)


@pytest.mark.parametrize("given", ["", "soon", "-5", "0", "0.0", "1e3", "nan", "1_000", "9" * 10])
def test_a_malformed_deadline_is_refused(server: Server, given: str) -> None:
    """X-Deadline-Ms is a number of milliseconds above 0, or the request is refused."""
    response = server.client.post("/flows/echo", content=b"", headers={"X-Deadline-Ms": given})
    assert (response.status_code, _error(response)["code"]) == (400, "bad-request")


def test_a_deadline_is_kept(server: Server) -> None:
    """A request that cannot be answered by its deadline gives 504, and leaves nothing inside."""
    response = server.client.post("/flows/held", json=NUMBERS, headers={"X-Deadline-Ms": "30.5"})
    assert (response.status_code, _error(response)["code"]) == (504, "deadline-exceeded")
    server.wait_inside(0)


def test_a_compressed_body_is_refused(server: Server) -> None:
    """A Content-Encoding is not mistaken for the picture itself."""
    response = server.client.post(
        "/flows/classify", content=PICTURE, headers={"Content-Encoding": "gzip"}
    )
    assert (response.status_code, _error(response)["code"]) == (415, "unsupported-encoding")


def test_a_declared_body_too_large_is_refused_unread(server: Server) -> None:
    """A Content-Length over the limit gives 413 before any of the body is sent."""
    with server.connect() as connection:
        connection.send(head("/flows/echo", 10**12))
        assert connection.error() == (413, "too-large")


def test_a_chunked_body_too_large_is_cut(server: Server) -> None:
    """A body that grows over the limit gives 413, and the connection is closed."""
    with server.connect() as connection:
        connection.send(
            "POST /flows/echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            for _ in range(40):
                connection.send(chunk)
            while True:
                connection.send(b"1\r\nx\r\n")
                time.sleep(0.01)
        assert connection.error() == (413, "too-large")


def test_a_body_that_stalls_is_cut(echo: Path) -> None:
    """A body that is not all there in time gives 408 and closes the connection."""

    async def stalling() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.Event().wait()

    service = Service(body_s=0.05)
    with flowlang.load(echo) as app:
        service.let_in(app)
        response = _ask(service, "/", stalling())
    assert (response.status_code, _error(response)["code"]) == (408, "body-timeout")
    assert response.headers["connection"] == "close"
    assert service.under_way == 0


def test_the_largest_picture_is_let_in(server: Server) -> None:
    """32 MiB, the largest picture a flow decodes, pass the door."""
    largest = bytes(32 << 20)
    response = server.client.post("/flows/classify", content=largest)
    assert (response.status_code, _error(response)["stage"]) == (400, "decode")


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\1\2\3 nothing like HTTP\r\n\r\n",
        b"POST /flows/echo HTTP/1.1\r\nHost: t\r\nContent-Length: ten\r\n\r\n",
        b"POST /flows/echo HTTP/1.1\r\nHost: t\r\nContent-Length: -1\r\n\r\n",
        b"POST /flows/echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: t\r\nX-Long: " + b"x" * 100_000,
        b"GET / HTTP/1.1\r\nHost: t\r\n" + b"X-Many: x\r\n" * 10_000,
    ],
    ids=["no-http", "length-word", "length-negative", "bad-chunk", "long-header", "many-headers"],
)
def test_nonsense_closes_its_connection_only(server: Server, sent: bytes) -> None:
    """Malformed HTTP ends its connection, and the server goes on."""
    with server.connect() as connection:
        connection.send(sent)
        connection.wait_closed()
    assert server.client.post("/flows/echo", content=b"on").content == b"on"


def test_requests_on_one_connection_are_answered_in_order(server: Server) -> None:
    """Requests sent before their predecessors are answered come back in the order sent."""
    with server.connect() as connection:
        for number in range(20):
            connection.post("/flows/echo", b"%d" % number)
        assert [connection.answer()[2] for _ in range(20)] == [b"%d" % n for n in range(20)]


class Written:
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.parts.append(data)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True


def test_a_head_is_written_with_its_body() -> None:
    """An answer takes one write; a head without a body is written at the end or at the close."""
    transport = Written()
    corked = Corked(transport)  # type: ignore[arg-type]
    corked.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    corked.write(b"HTTP/1.1 200 OK\r\n\r\n")
    corked.write(b"body")
    corked.write(b"the second chunk")
    corked.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    corked.flush()
    corked.flush()
    large = bytes(MAX_CORKED_BYTES + 1)
    corked.write(b"HTTP/1.1 200 OK\r\n\r\n")
    corked.write(large)
    corked.write(b"HTTP/1.1 500 Internal Server Error\r\n\r\n")
    corked.close()
    assert transport.parts == [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nbody",
        b"the second chunk",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        large,
        b"HTTP/1.1 500 Internal Server Error\r\n\r\n",
    ]
    assert transport.is_closed


def test_a_client_that_waits_for_leave_gets_it(server: Server) -> None:
    """`Expect: 100-continue` is granted where the body will be read, and refused by its length."""
    with server.connect() as connection:
        connection.send(head("/flows/echo", 3, "Expect: 100-continue"))
        assert connection.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.send(b"yes")
        assert connection.answer()[2] == b"yes"
    with server.connect() as connection:
        connection.send(head("/flows/echo", 10**9, "Expect: 100-continue"))
        assert connection.error() == (413, "too-large")


# Many at once


def test_one_bad_picture_spoils_no_other(server: Server) -> None:
    """Of eight pictures at once, one of them corrupt, the seven others are answered as ever."""
    pictures = [*photographs(7), bad()["jpeg-half"].data]
    alone = [server.client.post("/flows/classify", content=p).json() for p in pictures[:7]]

    def ask(picture: bytes) -> httpx.Response:
        return httpx.post(f"{server.url}/flows/classify", content=picture, timeout=PATIENCE_S)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, pictures))
    assert [r.status_code for r in together] == [200] * 7 + [400]
    for response, expected in zip(together, alone, strict=False):
        assert [x["label"] for x in response.json()] == [x["label"] for x in expected]


def test_a_thousand_requests_at_once(server: Server) -> None:
    """A thousand requests, all inside at the same time, each get their own answer.

    The flow answers none of them before the last has come: its batch is a thousand.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    async def ask_fifty(first: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
            bodies = ([first + n, 0.5, -n] for n in range(50))
            asked = (client.post("/flows/thousand", json=body) for body in bodies)
            return await asyncio.gather(*asked)

    async def ask_all() -> list[httpx.Response]:
        fifties = await asyncio.gather(*(ask_fifty(first) for first in range(0, 1000, 50)))
        return [response for fifty in fifties for response in fifty]

    responses = asyncio.run(ask_all())
    assert Counter(r.status_code for r in responses) == {200: 1000}
    assert [r.json() for r in responses] == [[n, 0.5, -(n % 50)] for n in range(1000)]


def test_a_full_queue_says_so_at_once(folder: Path) -> None:
    """What finds the queue full gets 429 and when to come again; the rest is answered."""
    flow = write(
        folder / "narrow.flow",
        "export flow main = decode -> resize(64) -> rgb -> normalize(imagenet)"
        ' -> trt("classifier.onnx") x1 -> best\n'
        "schedule { main(queue=1) }\n",
    )
    large = photographs(1, 3000, 2000)[0]
    with serving(folder, str(flow)) as server:
        server.wait_ready()
        connections = [server.connect() for _ in range(30)]
        for connection in connections:
            connection.send(head("/", len(large)), large[:-1])
        for connection in connections:
            connection.send(large[-1:])
        answers = [connection.answer() for connection in connections]
        for connection in connections:
            connection.close()
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) == {200, 429}
    for status, headers, body in answers:
        if status == 429:
            assert headers["retry-after"] == "1"
            assert json.loads(body)["error"]["code"] == "overloaded"


def test_who_hangs_up_is_not_worked_for(server: Server) -> None:
    """A request whose client is gone leaves the queue, long before its batch would have run."""
    connections = [server.connect() for _ in range(10)]
    for connection in connections:
        connection.post("/flows/held", b"[1, 2, 3]")
    server.wait_inside(10)
    for connection in connections[:7]:
        connection.close()
    server.wait_inside(3)
    for connection in connections[7:]:
        connection.close()
    server.wait_inside(0)


def test_who_hangs_up_while_sending_leaves_nothing(server: Server) -> None:
    """A body that is never finished is dropped with its connection."""
    with server.connect() as connection:
        connection.send(head("/flows/echo", 1000), b"x" * 10)
        server.wait_inside(1)
    server.wait_inside(0)


# Failures inside


def test_a_clients_error_holds_nothing_of_the_inside(folder: Path) -> None:
    """A stage that fails gives 500 with its name; the reason and the place are in the log."""
    _write_reshape(folder / "reshape.onnx")
    flow = write(folder / "reshape.flow", 'trt("reshape.onnx")\n')
    with serving(folder, str(flow)) as server:
        server.wait_ready()
        assert server.client.post("/", json=[1, 2, 3, 4]).json() == [[1, 2], [3, 4]]
        response = server.client.post("/", json=[1, 2, 3], headers={"X-Request-Id": "look-here"})
        assert response.status_code == 500
        error = _error(response)
        assert (error["code"], error["flow"]) == ("stage-failed", "main")
        assert error["message"] == f"stage `{error['stage']}` failed"
        assert str(folder) not in response.text
        told = server.errors
    assert "look-here" in told
    assert "reshape.flow:1:1" in told


def _write_reshape(path: Path) -> None:
    """A model that takes any vector, and fails on all but those of four."""
    to = helper.make_tensor("to", TensorProto.INT64, [3], [-1, 2, 2])
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["data", "to"], ["result"])],
        "reshape",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", "L"])],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, ["N", 2, 2])],
        [to],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[opset]), path)


def test_an_unforeseen_exception_is_an_internal_error(folder: Path, echo: Path) -> None:
    """A result that cannot be sent gives 500 without a word of why; the log has the traceback."""
    code = f"""
import sys, flowlang
from flowlang.runtime import host
from flowlang.serve import serve
host._MAKERS["pass"] = lambda node, settings: lambda value: object()
sys.exit(serve(lambda: flowlang.load({str(echo)!r}), "127.0.0.1", 0))
"""
    with running(folder, "-c", code) as server:
        server.wait_ready()
        response = server.client.post("/", content=b"x", headers={"X-Request-Id": "look-here"})
        assert response.status_code == 500
        assert _error(response)["message"] == "internal error"
        assert server.client.get("/health/ready").status_code == 200
        told = server.errors
    assert "look-here" in told
    assert "Traceback" in told


# Beginning


@pytest.mark.parametrize("fronts", FRONTS)
def test_it_lives_before_it_is_ready(folder: Path, echo: Path, fronts: int) -> None:
    """While flows load it is live and not ready, refuses calls, and then it is ready."""
    gate = folder / f"gate-1-{fronts}"
    with running(folder, *_load_later(echo, gate, fronts=fronts)) as server:
        assert server.client.get("/health/live").json() == {"status": "live"}
        ready = server.client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        for path in ("/", "/flows/main"):
            call = server.client.post(path, content=b"x")
            assert (call.status_code, _error(call)["code"]) == (503, "loading")
            assert call.headers["retry-after"] == "1"
        assert server.client.get("/flows").status_code == 503
        assert server.client.get("/").status_code == 200
        gate.touch()
        server.wait_ready()
        ready = server.client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "requests": 0})
        assert server.client.post("/", content=b"x").content == b"x"
        server.signal()
        assert server.wait() == 0


@pytest.mark.parametrize("fronts", FRONTS)
def test_flows_that_cannot_be_loaded_end_it(folder: Path, fronts: int) -> None:
    """A failed load is told on stderr, and the status is 1."""
    wrong = write(folder / "wrong.flow", "decode -> resise(224)\n")
    (folder / "gate-2").touch()
    with running(folder, *_load_later(wrong, folder / "gate-2", fronts=fronts)) as server:
        assert server.wait() == 1
        assert server.errors.count("there is no operator or flow named `resise`") == 1
        assert "Traceback" not in server.errors


def test_a_port_in_use_is_told(folder: Path, echo: Path) -> None:
    """A port that another has gives a sentence and status 1."""
    from flowlang.serve.http import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve(lambda: flowlang.load(echo), "127.0.0.1", taken.getsockname()[1]) == 1


# Stopping


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_loses_no_request(folder: Path, kind: tuple[str, ...]) -> None:
    """Stopped with forty requests inside, it refuses new ones, answers the forty, ends with 0."""
    flow = write(folder / "slow.flow", 'trt("identity.onnx", batch=1..64, wait=3s) x1\n')
    with serving(folder, str(flow), *kind) as server:
        server.wait_ready()
        connections = [server.connect() for _ in range(40)]
        for number, connection in enumerate(connections):
            connection.post("/", json.dumps([number, 0, 0]).encode())
        server.wait_inside(40)
        server.signal()
        wait_until(lambda: server.health()["status"] == "draining")
        ready = server.client.get("/health/ready")
        assert (ready.status_code, ready.json()["requests"]) == (503, 40)
        refused = server.client.post("/", json=NUMBERS)
        assert (refused.status_code, _error(refused)["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        assert server.client.get("/health/live").status_code == 200
        answers = [connection.answer() for connection in connections]
        for connection in connections:
            connection.close()
        assert server.wait() == 0
    assert [status for status, _, _ in answers] == [200] * 40
    assert [json.loads(body)[0] for _, _, body in answers] == list(range(40))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_under_load_breaks_no_connection(
    folder: Path, echo: Path, kind: tuple[str, ...]
) -> None:
    """Clients that never stop asking get answers, then refusals, and not one broken answer."""
    with serving(folder, str(echo), *kind) as server:
        server.wait_ready()
        url = server.url

        def ask_until_refused(number: int) -> None:
            seen = counts[number]
            body = bytes([number]) * 20_000
            with httpx.Client(timeout=PATIENCE_S) as client:
                while not seen["refused"]:
                    try:
                        response = client.post(url, content=body)
                    except httpx.ConnectError:
                        seen["refused"] += 1
                        continue
                    good = response.status_code == 200 and response.content == body
                    if response.status_code == 503:
                        assert _error(response)["code"] == "draining"
                        seen["refused"] += 1
                    else:
                        seen["good" if good else "broken"] += 1

        counts: list[Counter[str]] = [Counter() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask_until_refused, number) for number in range(8)]
            wait_until(lambda: all(seen["good"] > 20 for seen in counts))
            server.signal()
            for asked in asking:
                asked.result()
        assert server.wait() == 0
    assert [(seen["broken"], seen["refused"]) for seen in counts] == [(0, 1)] * 8


@pytest.mark.parametrize("fronts", FRONTS)
def test_a_stop_waits_for_uploads_but_not_for_ever(folder: Path, echo: Path, fronts: int) -> None:
    """A body on its way when the server stops is waited for; one that stalls is cut with 503."""
    (folder / "gate-3").touch()
    with running(
        folder, *_load_later(echo, folder / "gate-3", grace_s=4.0, fronts=fronts)
    ) as server:
        server.wait_ready()
        with server.connect() as goes_on, server.connect() as stalls:
            for connection in (goes_on, stalls):
                connection.send(head("/", 1000), b"x" * 10)
            server.wait_inside(2)
            server.signal()
            wait_until(lambda: server.health()["status"] == "draining")
            goes_on.send(b"x" * 990)
            assert goes_on.answer()[2] == b"x" * 1000
            assert stalls.error() == (503, "draining")
        assert server.wait() == 0


@pytest.mark.parametrize("fronts", FRONTS)
def test_what_outlasts_the_grace_is_answered_too(folder: Path, fronts: int) -> None:
    """A request not done in time gets 503 rather than a broken connection, and the status is 1."""
    flow = write(folder / "stuck.flow", 'trt("identity.onnx", batch=1..64, wait=60s)\n')
    (folder / "gate-4").touch()
    with running(
        folder, *_load_later(flow, folder / "gate-4", grace_s=0.3, fronts=fronts)
    ) as server:
        server.wait_ready()
        with server.connect() as connection:
            connection.post("/", b"[1, 2, 3]")
            server.wait_inside(1)
            server.signal(signal.SIGINT)
            assert connection.error() == (503, "draining")
        assert server.wait() == 1
        assert "not all was answered in 0.3 s" in server.errors


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_signal_ends_it_at_once(folder: Path, kind: tuple[str, ...]) -> None:
    """Whoever insists need not wait for the grace: status 1."""
    flow = write(folder / "stuck.flow", 'trt("identity.onnx", batch=1..64, wait=60s)\n')
    with serving(folder, str(flow), *kind) as server:
        server.wait_ready()
        with server.connect() as connection:
            connection.post("/", b"[1, 2, 3]")
            server.wait_inside(1)
            server.signal()
            wait_until(lambda: server.health()["status"] == "draining")
            assert server.process.poll() is None
            server.signal()
            assert server.wait() == 1


def test_a_stop_while_models_load_is_clean(folder: Path) -> None:
    """Stopped in the middle of building a model, in native code, it still ends with status 0."""
    begun = folder / "begun"
    code = f"""
import pathlib, sys, onnxruntime
from flowlang.serve import serve
def load():
    while True:
        onnxruntime.InferenceSession(
            {str(folder / "classifier.onnx")!r}, providers=["CPUExecutionProvider"]
        )
        pathlib.Path({str(begun)!r}).touch()
sys.exit(serve(load, "127.0.0.1", 0))
"""
    with running(folder, "-c", code) as server:
        assert server.health()["status"] == "loading"
        wait_until(begun.exists)
        server.signal()
        assert server.wait() == 0
        assert server.errors == ""
