"""Calls that have come in one piece: they skip ASGI, and nobody can tell."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import flowlang
from flowlang.serve.routes import Service
from flowlang.serve.token import Token
from tests.pictures import bad, photographs
from tests.serve.faces import write_types
from tests.serve.server import KINDS, Raw, Server, head, serving, wait_until, write

Headers = list[tuple[bytes, bytes]]

PICTURE = photographs(1)[0]
NEEDS = """
use "needs.py" as ops
export flow needs(count: int): bytes -> str = ops.needs(count=count)
"""
NEEDS_OPERATORS = """
def needs(data: bytes, *, count: int) -> str:
    return str(count)
"""
# What Python has of a connection, but for what it would find as garbage.
LEAN_OPERATORS = """
import gc
import time

gc.disable()
NAMES = ("_Protocol", "RequestResponseCycle", "DirectCall", "BadRequest")

def there(data: bytes) -> list[int]:
    gc.disable()
    found = [type(thing).__name__ for thing in gc.get_objects()]
    return [found.count(name) for name in NAMES]

def slow(data: bytes) -> bytes:
    time.sleep(0.2)
    return data
"""
LEAN = """
use "lean.py" as ops
export flow there: bytes -> list<int> = ops.there
export flow slow: bytes -> bytes = ops.slow
export flow number: float -> float = pass
export flow echo = pass
"""
CALLS = {
    "picture": ("/flows/classes", PICTURE),
    "no-picture": ("/flows/classes", bad()["jpeg-half"].data),
    "empty": ("/flows/classes", b""),
    "number": ("/flows/double", b"21"),
    "no-number": ("/flows/double", b"twenty-one"),
    "no-json": ("/flows/double", b"\xff"),
    "too-much-json": ("/flows/total", b"[" + b"1," * (1 << 18) + b"1]"),
    "not-finite": ("/flows/half", b"1e308"),
    "text": ("/flows/shout", '"na und: größer"'.encode()),
    "bytes": ("/flows/slow", b"as they are"),
    "failure": ("/flows/fail", b"x"),
    "parameter-missing": ("/flows/needs", b"x"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("direct")
    write_types(folder)
    write(folder / "needs.py", NEEDS_OPERATORS)
    write(folder / "needs.flow", NEEDS)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Server]:
    files = [str(folder / name) for name in ("types.flow", "needs.flow")]
    with serving(folder, *files, *request.param) as server:
        yield server.wait_ready()


@pytest.mark.parametrize("name", CALLS)
def test_both_ways_give_one_answer(server: Server, name: str) -> None:
    """A header that says nothing sends a call through ASGI: that changes nothing of its answer."""
    path, body = CALLS[name]
    with server.connect() as connection:
        answers = []
        for more in ((), ("X-Priority: 0",)):
            connection.post(path, body, "X-Request-Id: one", *more)
            status, headers, told = connection.answer()
            headers.pop("date")
            answers.append((status, list(headers.items()), told))
    assert answers[0] == answers[1]
    assert dict(answers[0][1])["x-request-id"] == "one"


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that collects no garbage."""
    folder = tmp_path_factory.mktemp("lean")
    write(folder / "lean.py", LEAN_OPERATORS)
    with serving(folder, str(write(folder / "lean.flow", LEAN))) as server:
        yield server.wait_ready()


def there(server: Server) -> list[int]:
    with server.connect() as connection:
        connection.post("/flows/there", b"")
        status, _, counts = connection.answer()
    assert status == 200
    found: list[int] = json.loads(counts)
    return found


@pytest.mark.parametrize(
    ("path", "status"), [("/flows/echo", 200), ("/flows/number", 400), ("/flows/slow", None)]
)
def test_nothing_is_left_of_a_connection(lean: Server, path: str, status: int | None) -> None:
    """Not even as garbage, which would be a body each: answered, refused, or hung up on."""
    before = there(lean)
    for _ in range(10):
        with lean.connect() as connection:
            connection.post(path, b"x")
            if status is None:
                lean.wait_inside(1)
            else:
                assert connection.answer()[0] == status
    lean.wait_inside(0)
    wait_until(lambda: max(map(int.__sub__, there(lean), before)) < 5)


def test_a_connection_that_waits_holds_no_body(lean: Server) -> None:
    """It may wait for a minute, and thousands of others beside it."""
    body = bytes(40_000)
    with contextlib.ExitStack() as stack:
        before = psutil.Process(lean.process.pid).memory_info().rss
        for _ in range(800):
            connection = stack.enter_context(lean.connect())
            connection.post("/flows/echo", body)
            assert connection.answer()[0] == 200
        after = psutil.Process(lean.process.pid).memory_info().rss
    assert after - before < 400 * len(body)


def flood(connection: Raw, requests: bytes) -> None:
    """Send far more than the kernel keeps. Raises TimeoutError once a part of it is not taken."""
    for _ in range(400):
        connection.send(requests)


@pytest.mark.parametrize("more", [(), ("X-Priority: 0",)])
def test_no_more_is_read_ahead_than_a_packet(lean: Server, more: tuple[str, ...]) -> None:
    """However fast a client sends, and though it takes its answers, each way."""
    requests = (head("/flows/slow", 1, *more) + "x").encode() * 1000
    with lean.connect() as connection:
        connection.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            flood(connection, requests)


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
def test_who_wants_no_more_is_hung_up_on(server: Server, protocol: str) -> None:
    """Both ways: with `Connection: close`, and by a protocol that knows nothing else."""
    close = "" if protocol == "HTTP/1.0" else "Connection: close\r\n"
    answers = []
    for more in ("", "X-Priority: 0\r\n"):
        with server.connect() as connection:
            connection.send(
                f"POST /flows/double {protocol}\r\nHost: test\r\n{close}{more}"
                "Content-Length: 2\r\nX-Request-Id: one\r\n\r\n21"
            )
            answer = connection.rest()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nconnection: close\r\n" in answer
        assert answer.endswith(b"\r\n\r\n42")
        answers.append([line for line in answer.split(b"\r\n") if not line.startswith(b"date:")])
    assert answers[0] == answers[1]


class Direct:
    """A service, and what is begun of it directly."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.told: list[tuple[int, dict[bytes, bytes], bytes]] = []

    def begin(self, body: bytes, headers: Headers | None = None, **changes: Any) -> Any:
        headers = [(b"host", b"test"), *(headers or ())]
        scope = {"method": "POST", "path": "/flows/double", "query_string": b"", **changes}
        return self.service.begin_call(
            {**scope, "headers": headers},
            body,
            lambda status, lines, body: self.told.append((status, dict(lines), body)),
        )

    async def settled(self) -> None:
        while self.service.under_way:
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[flowlang.App]:
    with flowlang.load(folder / "types.flow", device="cpu") as app:
        yield app


def test_a_call_is_begun_and_answered(app: flowlang.App) -> None:
    """It is inside from its beginning until it is answered, once."""

    async def ask() -> Direct:
        direct = Direct(Service())
        direct.service.let_in(app)
        assert direct.begin(b"4", [(b"content-type", b"text/plain"), (b"x-request-id", b"me")])
        assert (direct.service.under_way, direct.told) == (1, [])
        await direct.settled()
        return direct

    ((status, headers, body),) = asyncio.run(ask()).told
    assert (status, headers[b"x-request-id"], body) == (200, b"me", b"8")


def test_what_is_refused_at_once_is_answered_a_turn_later(app: flowlang.App) -> None:
    """Or thousands of them behind one another, of one packet, would be one call inside another."""

    async def ask() -> Direct:
        direct = Direct(Service())
        direct.service.let_in(app)
        assert direct.begin(b"no number")
        assert (direct.service.under_way, direct.told) == (1, [])
        await direct.settled()
        return direct

    ((status, _, body),) = asyncio.run(ask()).told
    assert (status, b"bad-request" in body) == (400, True)


@pytest.mark.parametrize("body", [b"4", b"no number"])
def test_who_hangs_up_is_told_nothing(app: flowlang.App, body: bytes) -> None:
    """Whether the flow is at work or has refused already; the request is not inside any more."""

    async def ask() -> Direct:
        direct = Direct(Service())
        direct.service.let_in(app)
        call = direct.begin(body)
        call.give_up()
        assert direct.service.under_way == 0
        call.give_up()
        await asyncio.sleep(0.05)
        return direct

    direct = asyncio.run(ask())
    assert (direct.told, direct.service.under_way) == ([], 0)


@pytest.mark.parametrize(
    ("headers", "changes"),
    [
        ([], {"method": "GET"}),
        ([], {"path": "/flows/none"}),
        ([], {"path": "/v2/models/double/infer"}),
        ([], {"query_string": b"k=1"}),
        ([(b"x-deadline-ms", b"5")], {}),
        ([(b"x-priority", b"1")], {}),
        ([(b"content-encoding", b"gzip")], {}),
        ([(b"transfer-encoding", b"chunked")], {}),
        ([(b"content-length", b"2000000")], {}),
        ([(b"content-type", b"multipart/form-data; boundary=x")], {}),
        ([(b"accept", b"a"), (b"accept", b"b")], {}),
        ([(b"authorization", b"Bearer wrong")], {}),
    ],
)
def test_what_asks_for_more_goes_the_other_way(
    app: flowlang.App, headers: Headers, changes: dict[str, Any]
) -> None:
    """Only what needs nothing but an answer to its body is begun."""
    direct = Direct(Service(max_body_bytes=1 << 20, token=Token(b"right")))
    direct.service.let_in(app)
    rights = [(b"authorization", b"Bearer right")]
    given = headers if (b"authorization", b"Bearer wrong") in headers else [*rights, *headers]
    assert direct.begin(b"4", given, **changes) is None
    assert direct.service.under_way == 0

    async def ask() -> None:
        assert direct.begin(b"4", rights)
        await direct.settled()

    asyncio.run(ask())
    assert [status for status, _, _ in direct.told] == [200]


def test_none_is_begun_once_the_server_stops(app: flowlang.App) -> None:
    """Who is refused is told by the way that all refusals go."""
    direct = Direct(Service())
    direct.service.let_in(app)
    direct.service.refuse()
    assert direct.begin(b"4") is None


def test_a_call_goes_on_with_the_flow_that_has_taken_over(folder: Path) -> None:
    """Its answer is the new one's, though the old one was closed with the call inside."""

    async def ask() -> Direct:
        direct = Direct(Service())
        old = flowlang.load(folder / "types.flow", device="cpu")
        with flowlang.load(folder / "types.flow", device="cpu") as new:
            direct.service.let_in(old)
            assert direct.begin(b"slow", path="/flows/slow")
            assert direct.begin(b"slower", path="/flows/slow")
            direct.service.let_in(new)
            await asyncio.to_thread(old.close, 0.0)
            await direct.settled()
        return direct

    told = asyncio.run(ask()).told
    assert sorted((status, body) for status, _, body in told) == [(200, b"slow"), (200, b"slower")]
