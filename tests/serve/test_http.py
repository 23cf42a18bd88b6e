"""Flows over HTTP: what goes in, what comes out, and many at once."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import flowlang
from flowlang.diagnostics import FlowError
from flowlang.serve import asgi
from flowlang.serve.corked import MAX_CORKED_BYTES, Corked
from tests.pictures import bad, photographs
from tests.serve.asking import NUMBERS, PICTURES, ask_application, error_of
from tests.serve.server import PATIENCE_S, Server, head, serving, write


def test_a_picture_is_answered_with_its_classes(server: Server) -> None:
    """A picture posted to a classifier comes back as JSON: three named classes, greatest first."""
    response = server.client.post("/flows/classify", content=PICTURES[0])
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    found = response.json()
    assert [set(label) for label in found] == [{"index", "label", "score"}] * 3
    scores = [label["score"] for label in found]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] <= scores[0] < 1


def test_the_wire_gives_what_python_gives(server: Server, folder: Path) -> None:
    """Over HTTP a flow answers exactly what it answers in Python, a record of arrays included."""
    over_http = server.client.post("/flows/two", content=PICTURES[0]).json()
    with flowlang.load(folder / "all.flow") as app:
        in_python = app["two"](PICTURES[0])
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


def test_what_json_cannot_hold_is_null(server: Server) -> None:
    """NaN and the infinities never make an answer that is no JSON."""
    response = server.client.post("/flows/same", content=b"[NaN, 1.5, -Infinity]")
    assert response.content == b"[null,1.5,null]"


def test_the_only_flow_is_served_at_the_root(folder: Path, echo: Path) -> None:
    """With one flow `POST /` calls it; with several it says which there are."""
    with flowlang.load(echo) as app:
        assert ask_application(asgi(app), "POST", "/", content=b"abc").content == b"abc"
    with flowlang.load(folder / "all.flow") as app:
        response = ask_application(asgi(app), "POST", "/", content=b"abc")
    assert response.status_code == 404
    assert "/flows/classify, /flows/two" in error_of(response)["message"]


def test_two_flows_of_one_name_are_refused(echo: Path) -> None:
    """No flow hides another behind the same path."""
    with pytest.raises(FlowError, match="flow named `main`: give one another name, `flow NAME"):
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


@pytest.mark.parametrize("given", ["7f3c", "x" * 128, "a b~!"])
def test_a_requests_id_comes_back(server: Server, given: str) -> None:
    """A client's id is repeated in the header and in errors."""
    headers = {"X-Request-Id": given}
    assert server.client.get("/flows", headers=headers).headers["x-request-id"] == given
    response = server.client.post("/flows/classify", content=b"?", headers=headers)
    assert error_of(response)["request_id"] == given


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


@pytest.mark.parametrize("headers", [(), ("X-Priority: 1",)])
def test_who_hangs_up_is_not_worked_for(server: Server, headers: tuple[str, ...]) -> None:
    """A request whose client is gone leaves the queue, long before its batch would have run."""
    connections = [server.connect() for _ in range(10)]
    for connection in connections:
        connection.post("/flows/held", b"[1, 2, 3]", *headers)
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
