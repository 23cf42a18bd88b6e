"""Connections: what is sent over one, as bytes, and what it must not do to others or to itself."""

from __future__ import annotations

import contextlib
import gzip
import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.processes import peak_bytes
from tests.serve.server import KINDS, Raw, Server, head, running, serving, wait_until, write

FLOWS = """
export flow echo = pass
export flow held = trt("identity.onnx", batch=1..64, wait=60s)
export flow slow = trt("identity.onnx", batch=1..64, wait=500ms)
"""
UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
GET = "GET /health/live HTTP/1.1\r\nHost: test\r\n"
CHUNKED = "POST /flows/echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n"
NUMBERS = b"[1, 2, 3]"


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from examples import models

    folder = tmp_path_factory.mktemp("connections")
    models.identity(folder / "identity.onnx", ("N", 3))
    return write(folder / "all.flow", FLOWS)


@pytest.fixture(scope="module", params=KINDS)
def server(flow: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(flow.parent, str(flow), *request.param) as server:
        yield server.wait_ready()


def bodies(connection: Raw, count: int) -> list[bytes]:
    """The bodies of the next answers, all of them good."""
    answers = [connection.answer() for _ in range(count)]
    assert [status for status, _, _ in answers] == [200] * count
    return [body for _, _, body in answers]


def apart(connection: Raw, *parts: bytes | str) -> None:
    """Send in packets of their own."""
    for part in parts:
        connection.send(part)
        time.sleep(0.05)


# An upgrade that is offered


def test_a_request_that_offers_an_upgrade_is_served_as_it_stands(server: Server) -> None:
    """Its body is its body, in the same packet, in later ones or in chunks, and so is the next."""
    with server.connect() as connection:
        offering = head("/flows/echo", 5, *UPGRADE)
        connection.send(offering, b"hello")
        connection.send(offering, b"world", head("/flows/echo", 2), b"on", offering, b"again")
        assert bodies(connection, 4) == [b"hello", b"world", b"on", b"again"]
        apart(connection, offering, b"he", b"llo")
        apart(connection, offering[:-20], offering[-20:], b"world")
        assert bodies(connection, 2) == [b"hello", b"world"]
        chunked = CHUNKED + "\r\n".join((*UPGRADE, "", ""))
        connection.send(chunked, b"3\r\nabc\r\n0\r\n\r\n", chunked, b"1\r\n")
        apart(connection, b"d\r\n", b"2\r\nef\r\n0\r\n\r\n")
        assert bodies(connection, 2) == [b"abc", b"def"]
        get = GET + "\r\n".join((*UPGRADE, "", ""))
        connection.send(get, get, head("/flows/echo", 3), b"end")
        assert bodies(connection, 3)[2] == b"end"


def test_many_offers_at_once_are_all_declined(server: Server) -> None:
    """Also where thousands of them come together, and where each is the last of its connection."""
    offering = head("/flows/echo", 1, *UPGRADE) + "x"
    with server.connect() as connection:
        connection.send(offering * 1000)
        assert bodies(connection, 1000) == [b"x"] * 1000
    with server.connect() as connection:
        last = ("Connection: close, Upgrade", "Upgrade: websocket")
        connection.send(head("/flows/echo", 5, *last), b"hello")
        assert bodies(connection, 1) == [b"hello"]
        connection.wait_closed()


def test_a_body_behind_an_offer_is_no_request(server: Server) -> None:
    """What looks like a request, and is the body of one that offered an upgrade, is a body."""
    inner = (GET + "\r\n").encode()
    with server.connect() as connection:
        apart(connection, head("/flows/echo", len(inner), *UPGRADE), inner)
        assert bodies(connection, 1) == [inner]
        connection.post("/flows/echo", b"next")
        assert bodies(connection, 1) == [b"next"]


@pytest.mark.parametrize("path", ["elsewhere:443", "/flows/echo"])
def test_a_tunnel_is_refused(server: Server, path: str) -> None:
    """CONNECT is no request of this server, and what follows it is not looked at."""
    with server.connect() as connection:
        connection.send(f"CONNECT {path} HTTP/1.1\r\nHost: test\r\n\r\n", GET, "\r\n")
        assert connection.answer()[0] == 400
        assert connection.rest() == b""


# Heads


def test_a_head_is_measured_alone(server: Server) -> None:
    """The end of a body in the same packet does not count for the head of the next request."""
    body = b"x" * 100_000
    whole = head("/flows/echo", len(body)).encode() + body
    with server.connect() as connection:
        connection.send(whole, whole[:10])
        assert bodies(connection, 1) == [body]
        apart(connection, whole[10:30], whole[30:-7])
        connection.send(whole[-7:], whole[:30])
        connection.send(whole[30:])
        assert bodies(connection, 2) == [body, body]


@pytest.mark.parametrize("size", [70_000, 100_000, 200_000, 1_000_000])
@pytest.mark.parametrize("many", [False, True])
def test_a_head_too_large_is_refused(server: Server, size: int, many: bool) -> None:
    """Whether it comes in one packet or in several, with its end or without."""
    lines = "X-Many: x\r\n" * (size // 11) if many else f"X-Long: {'x' * size}\r\n"
    for sent in (GET + lines + "\r\n", GET + lines):
        with server.connect() as connection:
            try:
                connection.send(sent)
            except (BrokenPipeError, ConnectionResetError):  # it was refused long before its end
                continue
            if size < 200_000:
                assert connection.answer()[::2] == (400, b"Request headers are too large.")
            connection.wait_closed()
    with server.connect() as connection:
        connection.send(GET, "X-Long: ", "x" * 60_000, "\r\n\r\n")
        assert connection.answer()[0] == 200


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["POST /flows/echo HTTP/1.1"], 400),
        (["POST /flows/echo HTTP/1.1", "Host: a", "Host: a"], 400),
        (["POST /flows/echo HTTP/1.0", "Host: a", "Host: b"], 400),
        (["POST /flows/echo HTTP/1.1", "Host:"], 200),
        (["POST /flows/echo HTTP/1.0"], 200),
    ],
)
def test_a_request_has_one_host(server: Server, lines: list[str], status: int) -> None:
    """RFC 9112, 3.2. Before HTTP/1.1 there need be none."""
    with server.connect() as connection:
        connection.send("\r\n".join([*lines, "Content-Length: 1", "", "x"]))
        assert connection.answer()[0] == status


@pytest.mark.parametrize(
    ("coding", "status"), [("gzip, chunked", 501), ("gzip", 501), ("chunked, gzip", 400)]
)
def test_a_transfer_coding_that_is_not_known_is_refused(
    server: Server, coding: str, status: int
) -> None:
    """A body in another coding than chunked is not mistaken for the body itself."""
    with server.connect() as connection:
        connection.send(CHUNKED.replace("chunked", coding), "\r\n1\r\nx\r\n0\r\n\r\n")
        assert connection.answer()[0] == status
        connection.wait_closed()


def test_trailers_are_dropped(server: Server) -> None:
    """Fields behind a body change none of those in front of it."""
    body, trailer = "1\r\na\r\n", "0\r\nX-Request-Id: other\r\nX-Deadline-Ms: none\r\n\r\n"
    with server.connect() as connection:
        for parts in ([body + trailer], ["", body, trailer], [body, trailer]):
            apart(connection, CHUNKED + "X-Request-Id: mine\r\n\r\n" + parts[0], *parts[1:])
            status, headers, _ = connection.answer()
            assert (status, headers["x-request-id"]) == (200, "mine")


@pytest.mark.parametrize("path", ["/flows/echo", "/nothing"])
def test_a_trailer_too_large_is_refused(server: Server, path: str) -> None:
    """It ends its connection, also where its request has been answered, and keeps no memory."""
    with server.connect() as connection:
        connection.send(CHUNKED.replace("/flows/echo", path), "\r\n0\r\nX-Long: ")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            for _ in range(100):
                connection.send(b"x" * 1_000_000)
    with server.connect() as connection:
        connection.send(CHUNKED, "\r\n2\r\n")
        apart(connection, b"ab\r\n30d40\r\n", b"x" * 100_000, b"x" * 100_000, b"\r\n0\r\n\r\n")
        assert bodies(connection, 1) == [b"ab" + b"x" * 200_000]


def test_leave_is_not_given_to_who_cannot_understand_it(server: Server) -> None:
    """HTTP/1.0 has no interim answers (RFC 9110, 10.1.1)."""
    with server.connect() as connection:
        connection.send(head("/flows/echo", 1, "Expect: 100-continue").replace("1.1", "1.0"))
        time.sleep(0.2)
        connection.send(b"x")
        assert connection.answer()[::2] == (200, b"x")


# Answers in their turn


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0garbage\r\n\r\n",
        b"POST /flows/echo HTTP/1.1\r\n\r\n",
        CHUNKED.encode() + b"\r\n1\r\nx\r\nzz\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: test\r\n\r\n",
    ],
    ids=["no-http", "no-host", "bad-chunk", "tunnel"],
)
def test_who_is_malformed_waits_for_its_turn(server: Server, garbage: bytes) -> None:
    """Requests that came before what is no request are answered first."""
    with server.connect() as connection:
        connection.post("/flows/slow", NUMBERS)
        connection.send(head("/flows/echo", 4), b"next", garbage, garbage)
        time.sleep(0.1)
        connection.send(garbage)
        assert [json.loads(connection.answer()[2]), connection.answer()[2]] == [[1, 2, 3], b"next"]
        assert connection.answer()[0] == 400
        assert connection.rest() == b""


def test_a_broken_body_of_an_answered_request_ends_its_connection(server: Server) -> None:
    """It is not answered a second time."""
    with server.connect() as connection:
        connection.send(CHUNKED.replace("/flows/echo", "/nothing"), "\r\n1\r\n")
        assert connection.answer()[0] == 404
        connection.send("xy\r\n")
        connection.wait_closed()


def test_who_hangs_up_with_more_to_ask_is_noticed(server: Server) -> None:
    """Requests behind the one that is worked on do not hide that their client is gone."""
    early, late = server.connect(), server.connect()
    for connection in (early, late):
        connection.post("/flows/held", NUMBERS)
    early.post("/flows/echo", b"x")
    server.wait_inside(2)
    time.sleep(0.3)
    for _ in range(3):
        late.post("/flows/echo", b"x")
    early.close()
    late.close()
    server.wait_inside(0)


# Silence


def impatient(flow: Path, body_s: float = 60.0) -> list[str]:
    """A program that serves, waits for its clients no longer than a test can, and holds less."""
    code = f"""
import functools, sys, flowlang
from flowlang.serve import http
from flowlang.serve import body
http.KEEP_ALIVE_S, http.HEAD_S, body.MAX_UNDER_WAY_BYTES = 1.0, 1.5, 40 << 20
http.Service = functools.partial(http.Service, body_s={body_s})
sys.exit(http.serve(lambda: flowlang.load({str(flow)!r}), "127.0.0.1", 0, grace_s=4.0))
"""
    return ["-c", code]


@pytest.mark.parametrize(
    ("path", "status", "sent"),
    [
        ("/nothing", 404, 0),
        ("/nothing", 404, 3),
        ("/nothing", 404, 10),
        ("/flows", 405, 3),
    ],
)
def test_silence_behind_an_answer_ends_a_connection(
    flow: Path, path: str, status: int, sent: int
) -> None:
    """Also where the body came after its answer, or has come in part."""
    with running(flow.parent, *impatient(flow)) as server, server.wait_ready().connect() as to:
        to.send(head(path, 10))
        assert to.answer()[0] == status
        to.send(b"x" * sent)
        start_s = time.monotonic()
        to.wait_closed()
        assert 0.5 < time.monotonic() - start_s < 3


def test_a_head_has_its_time(flow: Path) -> None:
    """A head that comes byte by byte is cut off, and one that takes a while is not."""
    with running(flow.parent, *impatient(flow)) as server:
        server.wait_ready()
        with server.connect() as connection:
            apart(connection, *GET[:10], GET[10:], "\r\n")
            assert connection.answer()[0] == 200
            time.sleep(0.6)
            apart(connection, *head("/flows/echo", 0)[:10], head("/flows/echo", 0)[10:])
            assert connection.answer()[0] == 200
            connection.send(GET)
            start_s = time.monotonic()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
                while time.monotonic() < start_s + 10:
                    connection.send("X")
                    time.sleep(0.1)
            assert 1 < time.monotonic() - start_s < 3


@pytest.mark.parametrize("sent", [b"", b"x"])
@pytest.mark.parametrize("leave", [(), ("Expect: 100-continue",)])
def test_a_body_that_never_comes_is_cut(flow: Path, sent: bytes, leave: tuple[str, ...]) -> None:
    """Whether some of it came or none, 408 comes in time, and the connection is closed."""
    with running(flow.parent, *impatient(flow, body_s=0.5)) as server:
        server.wait_ready()
        for path in ("/flows/echo", "/v2/models/echo/infer"):
            with server.connect() as connection:
                connection.send(head(path, 100, *leave), sent)
                if leave:
                    leave_given = connection.socket.recv(25)
                    assert leave_given == b"HTTP/1.1 100 Continue\r\n\r\n"
                status, headers, _ = connection.answer()
                assert (status, headers["connection"]) == (408, "close")
        server.wait_inside(0)


@pytest.mark.parametrize("leave", [(), ("Expect: 100-continue",)])
def test_a_stop_does_not_wait_for_a_body_that_never_comes(
    flow: Path, leave: tuple[str, ...]
) -> None:
    """It is told so, and the server ends as ever."""
    with running(flow.parent, *impatient(flow)) as server:
        server.wait_ready()
        with server.connect() as connection:
            connection.send(head("/flows/echo", 100, *leave))
            if leave:
                connection.socket.recv(25)
            server.wait_inside(1)
            server.signal()
            assert connection.error() == (503, "draining")
        assert server.wait() == 0
        assert server.errors == ""


# Bodies


@pytest.mark.parametrize("path", ["/flows/echo", "/v2/models/echo/infer"])
@pytest.mark.parametrize("sent", [b"", b"xy"])
def test_a_deadline_begins_with_the_request(server: Server, path: str, sent: bytes) -> None:
    """A body that is not there by the deadline gets 504 then."""
    raw = "Inference-Header-Content-Length: 0"
    with server.connect() as connection:
        start_s = time.monotonic()
        connection.send(head(path, 3, "X-Deadline-Ms: 300", raw), sent)
        status, headers, _ = connection.answer()
        assert (status, headers["connection"]) == (504, "close")
        assert 0.2 < time.monotonic() - start_s < 3
    with server.connect() as connection:
        apart(connection, head(path, 3, "X-Deadline-Ms: 20000", raw), b"a", b"bc")
        assert connection.answer()[0] == 200


@pytest.mark.parametrize("path", ["/flows/held", "/v2/models/held/infer"])
def test_a_deadline_is_of_the_whole_request(server: Server, path: str) -> None:
    """What the body took of it is not there for the flow any more."""
    body = NUMBERS
    if path != "/flows/held":
        asked = {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
        body = json.dumps({"inputs": [asked]}).encode()
    with server.connect() as connection:
        start_s = time.monotonic()
        connection.send(head(path, len(body), "X-Deadline-Ms: 1500"), body[:5])
        time.sleep(1)
        connection.send(body[5:])
        assert connection.answer()[0] == 504
        assert 1.4 < time.monotonic() - start_s < 2.4


def test_lines_of_one_name_are_one_list(server: Server) -> None:
    """A body in two codings is not taken for one in the last of them."""
    packed = gzip.compress(b"abc")
    raw, two = "Inference-Header-Content-Length: 0", ("Content-Encoding: gzip", "Content-Encoding:")
    with server.connect() as connection:
        for path in ("/flows/echo", "/v2/models/echo/infer"):
            for last in ("identity", "gzip"):
                connection.post(path, packed, raw, two[0], f"{two[1]} {last}")
                assert connection.answer()[0] == 415
        connection.post("/flows/echo", b"x", "X-Deadline-Ms: 5", "X-Deadline-Ms: 7")
        assert connection.error() == (400, "bad-request")


def test_bodies_on_their_way_are_bounded(flow: Path) -> None:
    """Those that are too many together get 429; what has come of them is forgotten."""
    half = bytes(15 << 20)
    with running(flow.parent, *impatient(flow)) as server:
        server.wait_ready()
        connections = [server.connect() for _ in range(2)]
        for number, connection in enumerate(connections, 1):
            connection.send(head("/flows/echo", 2 * len(half)), half)
            server.wait_inside(number)
        with server.connect() as third:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                third.send(head("/flows/echo", 2 * len(half)), half)
            server.wait_inside(2)
            with contextlib.suppress(ConnectionResetError):
                status, headers, _ = third.answer()
                assert (status, headers["retry-after"]) == (429, "1")
        connections[1].close()
        server.wait_inside(1)
        connections[0].send(half)
        assert bodies(connections[0], 1) == [half + half]
        connections[0].close()
        whole = half + half
        assert server.client.post("/flows/echo", content=whole).content == whole


def test_who_takes_no_answers_is_read_no_further(server: Server) -> None:
    """What is sent ahead is kept as bytes: as requests it takes fifty times the room."""
    requests = f"{GET}\r\n".encode() * 1000
    before = peak_bytes(server)
    with server.connect() as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = 0
        while sent < 8 << 20 and select.select([], [connection.socket], [], 0.5)[1]:
            sent += connection.socket.send(requests[sent % len(requests) :], socket.MSG_DONTWAIT)
        assert peak_bytes(server) - before < 150 << 20
        bodies(connection, 200)
    wait_until(lambda: server.health()["requests"] == 0)
