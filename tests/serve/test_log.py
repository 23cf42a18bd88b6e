"""What a server writes to stderr: lines for people or for programs, and one for each request."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import psutil
import pytest
import tritonclient.grpc as triton
from thriftpy2.protocol import TBinaryProtocolFactory, TMultiplexedProtocolFactory
from thriftpy2.rpc import client_context
from thriftpy2.thrift import TApplicationException
from tritonclient.utils import InferenceServerException

from flowlang.serve.launch import Outlet
from flowlang.serve.log import JsonFormatter
from tests.serve.asking import bytes_by_grpc
from tests.serve.collector import collecting
from tests.serve.idl import IDL
from tests.serve.processes import processes
from tests.serve.server import KINDS, ROOT, Raw, Server, refused, serving, wait_until, write

OPERATORS = """
from typing import NamedTuple

class Label(NamedTuple):
    label: str
    score: float

def label(data: bytes) -> Label:
    return Label(data.decode(), 1.0)

def fail(data: bytes) -> bytes:
    raise RuntimeError("it broke")

def slow(data: bytes) -> bytes:
    import time
    time.sleep(0.5)
    return data
"""
FLOWS = """
use "ops.py" as ops
export flow echo = pass
export flow fail = ops.fail
export flow slow = ops.slow
export flow picture = decode
export flow label = ops.label
"""
FACES = ("--grpc-port", "0", "--thrift-port", "0", "--thrift-flow", "label")
SERVICE = "/inference.GRPCInferenceService"
INFER, STREAM = f"{SERVICE}/ModelInfer", f"{SERVICE}/ModelStreamInfer"
SERVER_SPAN = 2  # SpanKind of OpenTelemetry's protocol


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logged")
    write(folder / "ops.py", OPERATORS)
    return write(folder / "all.flow", FLOWS)


@contextmanager
def logged(flow: Path, *options: str) -> Iterator[Server]:
    with serving(flow.parent, str(flow), "--device", "cpu", *options) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def server(flow: Path) -> Iterator[Server]:
    with logged(flow, "--log-format=json", "--log-level=info") as server:
        yield server


def lines_of(server: Server, **wanted: Any) -> list[dict[str, Any]]:
    """The lines it wrote that have these values. Every line is an object.

    The last one counts once its end is there: it may be written just now.
    """
    told = [json.loads(line) for line in server.errors.rpartition("\n")[0].splitlines()]
    return [line for line in told if wanted.items() <= line.items()]


def test_a_line_says_when_how_bad_where_and_what(server: Server) -> None:
    """What every line has: its time in RFC 3339, its level, its logger, its message."""
    server.client.post("/flows/picture", content=b"x", headers={"x-request-id": "r-1"})
    (line,) = lines_of(server, request_id="r-1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert (line["level"], line["logger"]) == ("info", "flowlang.serve")
    assert line["message"].startswith("request r-1 of flow `picture`: decode failed")


def test_a_request_without_a_result_has_fields_of_its_own(server: Server) -> None:
    """The same id as in the answer, and what the message says for people."""
    answer = server.client.post("/flows/picture", content=b"x")
    (line,) = lines_of(server, request_id=answer.headers["x-request-id"])
    assert (line["flow"], line["code"], line["stage"]) == ("picture", "bad-request", "decode")
    assert line["place"].endswith("all.flow:6:23")
    assert "trace_id" not in line


def test_an_exception_is_one_line(server: Server) -> None:
    """The lane's line has the traceback and its place, the request's its id and what failed."""
    server.client.post("/flows/fail", content=b"x", headers={"x-request-id": "r-2"})
    (line,) = lines_of(server, request_id="r-2")
    assert (line["level"], line["code"]) == ("warning", "stage-failed")
    (lane,) = lines_of(server, logger="flowlang.python")
    assert (lane["level"], lane["stage"]) == ("error", "ops.fail")
    assert lane["exception"].startswith("Traceback")
    assert lane["exception"].endswith("RuntimeError: it broke")
    assert lane["place"] == line["place"]


def test_the_protocol_over_http_logs_the_id_of_the_answer(server: Server) -> None:
    """A message's own id is the one of its line, as it is of the answer."""
    body = {"id": "of the message", "inputs": []}
    answer = server.client.post("/v2/models/echo/infer", json=body)
    assert answer.headers["x-request-id"] == "of the message"
    (line,) = lines_of(server, request_id="of the message")
    assert (line["flow"], line["code"]) == ("echo", "bad-request")


def test_an_id_that_no_header_can_bring_is_not_the_requests(server: Server) -> None:
    """Half a character, or one that ends a line, stays in the message."""
    for own in ("\ud800", "a\nb", "é"):
        body = json.dumps({"id": own, "inputs": []})
        answer = server.client.post("/v2/models/echo/infer", content=body)
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
        assert lines_of(server, request_id=answer.headers["x-request-id"])


def test_parts_of_a_form_are_told_one_by_one(server: Server) -> None:
    """Two files that are no pictures have two lines of one request."""
    files = [("file", ("a.jpg", b"x")), ("file", ("b.jpg", b"y"))]
    answer = server.client.post("/flows/picture", files=files)
    lines = lines_of(server, request_id=answer.headers["x-request-id"])
    assert [line["code"] for line in lines] == ["bad-request"] * 2
    assert {line["flow"] for line in lines} == {"picture"}


def test_a_reload_that_fails_is_a_line(tmp_path: Path) -> None:
    """The reason is all of one message, with its lines."""
    path = write(tmp_path / "my.flow", "pass\n")
    with logged(path, "--log-format=json", "--watch") as server:
        write(path, "pass -> nothing\n")
        wait_until(lambda: "kept as it was" in server.errors)
        (line,) = lines_of(server)
        assert line["level"] == "warning"
        assert "`nothing`" in line["message"]


def test_what_is_wrong_before_it_serves_is_a_line(tmp_path: Path) -> None:
    """A flow that does not check, and a port that is taken, are told as the rest is."""
    path = write(tmp_path / "my.flow", "nothing\n")
    status, told = refused(str(path), "--log-format=json")
    assert status == 1
    (line,) = (json.loads(text) for text in told.splitlines())
    assert line["level"] == "error"
    assert "`nothing`" in line["message"]
    write(path, "pass\n")
    with logged(path) as server:
        status, told = refused(str(path), "--log-format=json", "--metrics-port", str(server.port))
        assert status == 1
        assert "cannot listen" in json.loads(told)["message"]


PROGRAM = """
import logging, threading, warnings
from flowlang.serve.log import write_log

write_log("json", "warning")
logging.getLogger("uvicorn.error").error("of uvicorn")
logging.getLogger("flowlang").info("not loud enough")
warnings.warn("of a library")
thread = threading.Thread(target=lambda: 1 / 0, name="other")
thread.start()
thread.join()
raise ValueError("the end\\nof it")
"""


def test_lines_of_others_are_of_the_same_kind() -> None:
    """What uvicorn, warnings, threads and Python itself have to say is JSON as well."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["error", "warning", "critical", "critical"]
    assert (lines[0]["logger"], lines[0]["message"]) == ("uvicorn.error", "of uvicorn")
    assert "of a library" in lines[1]["message"]
    assert "other" in lines[2]["message"]
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert lines[3]["exception"].endswith("ValueError: the end\nof it")


def test_values_that_json_does_not_know_are_text() -> None:
    """No line is lost for what is in it."""
    record = logging.makeLogRecord({"msg": "half \ud800", "status": Path("x"), "flow": None})
    told = json.loads(JsonFormatter().format(record))
    assert told["message"] == "half \ud800"
    assert told["status"] == "x"
    assert "flow" not in told


def test_text_is_the_sentence_alone(flow: Path) -> None:
    """By default what needs somebody's attention is written, and mistakes of clients are not."""
    with logged(flow) as server:
        server.client.post("/flows/picture", content=b"x")
        server.client.get("/nothing")
        assert server.errors == ""
        server.client.post("/flows/fail", content=b"x", headers={"x-request-id": "r-3"})
        last = server.errors.splitlines()[-1]
        assert last.startswith("request r-3 of flow `fail`: `ops.fail` failed: RuntimeError")


def test_the_level_says_what_is_written(flow: Path) -> None:
    """From `info` on there are the mistakes of clients, and from `error` on no request at all."""
    with logged(flow, "--log-level", "info") as server:
        server.client.post("/flows/picture", content=b"x", headers={"x-request-id": "r-4"})
        assert server.errors.startswith("request r-4 of flow `picture`: decode failed")
    with logged(flow, "--log-level", "error") as server:
        server.client.post("/flows/fail", content=b"x", headers={"x-request-id": "r-5"})
        assert "r-5" not in server.errors
        assert "`ops.fail` failed" in server.errors


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_refused_is_told_of_whatever_the_reason(flow: Path, kind: tuple[str, ...]) -> None:
    """A body that is not read, a path, a method, a model, a token: each has a line with its id."""
    token = write(flow.parent / "token", "of-the-server")
    token.chmod(0o600)
    options = ("--token-file", str(token), "--grpc-port", "0", "--log-level", "info")
    with (
        logged(flow, *kind, *options, "--log-format", "json") as server,
        channel_to(server) as channel,
    ):
        known = {"authorization": "Bearer of-the-server"}
        late = {"x-deadline-ms": "soon"}
        asked: list[tuple[str, str, dict[str, str], str, str | None]] = [
            ("POST", "/flows/echo", {}, "unauthorized", None),
            ("POST", "/flows/echo", known | late, "bad-request", "echo"),
            ("POST", "/v2/models/echo/infer", known | late, "bad-request", "echo"),
            ("POST", "/v2/models/none/infer", known | late, "bad-request", None),
            ("POST", "/v2/models/none/infer", known, "not-found", None),
            ("PUT", "/v2/models/echo/infer", known, "wrong-method", None),
            ("GET", "/flows/none", known, "not-found", None),
            ("DELETE", "/flows/echo", known, "wrong-method", None),
        ]
        for number, (method, path, headers, _, _) in enumerate(asked):
            headers = {**headers, "x-request-id": f"h-{number}"}
            server.client.request(method, path, content=b"x", headers=headers)
        for number, metadata in enumerate(((), tuple(known.items()))):
            given = (*metadata, ("x-request-id", f"g-{number}"))
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"{SERVICE}/ModelMetadata")(b"\x0a\x04none", metadata=given)
        wait_until(lambda: len(lines_of(server)) == len(asked) + 2)
        lines = lines_of(server, level="info", logger="flowlang.serve")
        told = sorted(picked(lines, "request_id", "code"))
        codes = [code for *_, code, _ in asked]
        assert told == [
            *(("g-0", "unauthorized"), ("g-1", "not-found")),
            *((f"h-{number}", code) for number, code in enumerate(codes)),
        ]
        flows = {line["request_id"]: line.get("flow") for line in lines}
        assert [flows[f"h-{number}"] for number in range(len(asked))] == [f for *_, f in asked]


def test_a_front_tells_of_what_its_engine_does_not_answer(flow: Path) -> None:
    """A deadline that passes while the engine is stopped has its line all the same."""
    with logged(flow, "--ingest", "2", "--log-level", "info") as server:
        body = b'{"inputs":[{"name":"input","datatype":"BYTES","shape":[1],"data":["x"]}]}'
        engine = psutil.Process(processes(server).engine)
        engine.suspend()
        try:
            headers = {"x-deadline-ms": "200", "x-request-id": "late"}
            answer = server.client.post("/v2/models/echo/infer", content=body, headers=headers)
        finally:
            engine.resume()
        assert answer.status_code == 504
        assert server.errors == "request late of flow `echo`: not answered by its deadline\n"


def test_nobody_can_write_lines_of_the_log(flow: Path) -> None:
    """What a client may say anywhere has no end of a line, and nothing that steers a terminal."""
    forged = "x\n\x1b[2J\x85é"
    with logged(flow, "--log-level", "info") as server:
        client = server.client
        client.post("/flows/echo", params={forged: 1}, content=b"x")
        client.post(f"/v2/models/{quote(forged)}/infer", content=b"x")
        tensor = {"name": forged, "datatype": "BYTES", "shape": [1], "data": ["x"]}
        client.post("/v2/models/echo/infer", json={"inputs": [tensor]})
        parts = [("a", (forged, b"x")), ("b", ("b", b"x"))]
        client.post("/flows/picture", files=parts)
        lines = server.errors.split("\n")
        assert [line.partition(" ")[0] for line in lines] == [*["request"] * 5, ""]
        assert all(line.isprintable() for line in lines)
        assert [r"x\n\x1b[2J\x85é" in line for line in lines[:3]] == [True] * 3


def test_the_access_log_has_a_line_for_each_request(flow: Path) -> None:
    """Whatever came over HTTP: what was asked, what was answered, and how long that took."""
    with logged(flow, "--access-log", "--log-format", "json") as server:
        client = server.client
        asked = [
            client.post("/flows/echo?k=secret", content=b"x"),
            client.post("/flows/picture", content=b"x"),
            client.get("/health/live"),
            client.get("/a%0Ab"),
        ]
        wait_until(lambda: len(lines_of(server)) == 4)
        lines = lines_of(server, level="info", logger="flowlang.access")
        assert [line["path"] for line in lines] == [
            *("/flows/echo", "/flows/picture", "/health/live", "/a%0Ab")
        ]
        for line, answer in zip(lines, asked, strict=True):
            assert line["method"] == answer.request.method
            assert line["status"] == answer.status_code
            assert line["request_id"] == answer.headers["x-request-id"]
            assert 0 < line["ms"] < 10_000
        assert "secret" not in server.errors


def test_who_hangs_up_is_in_the_access_log(flow: Path) -> None:
    """Nothing was answered: the status is that of a request given up by its client."""
    with logged(flow, "--access-log") as server:
        headers = {"x-request-id": "gave up"}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/flows/slow", content=b"x", headers=headers, timeout=0.2)
        wait_until(lambda: server.errors != "")
        assert re.fullmatch(r"POST /flows/slow 499 \d+\.\d{3} ms gave up\n", server.errors)


def test_the_access_log_as_text(flow: Path) -> None:
    """One line, whose last word is the request's id."""
    with logged(flow, "--access-log") as server:
        server.client.post("/flows/echo", content=b"x", headers={"x-request-id": "r-6"})
        wait_until(lambda: server.errors != "")
        assert re.fullmatch(r"POST /flows/echo 200 \d+\.\d{3} ms r-6\n", server.errors)


# The access log of the other protocols


@pytest.fixture(scope="module")
def telling(flow: Path) -> Iterator[Server]:
    """A server of all protocols that tells of each request."""
    with logged(flow, *FACES, "--access-log", "--log-format", "json") as server:
        yield server


def told_of(server: Server, count: int, ask: Callable[[], object]) -> list[dict[str, Any]]:
    """The lines, so many, that the access log has of what is asked, and no more of them."""
    before = len(lines_of(server, logger="flowlang.access"))
    ask()
    wait_until(lambda: len(lines_of(server, logger="flowlang.access")) >= before + count)
    time.sleep(0.1)
    lines = lines_of(server, logger="flowlang.access")[before:]
    assert len(lines) == count
    for line in lines:
        assert line["level"] == "info"
        assert 0 <= line["ms"] < 10_000
    return lines


def picked(lines: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(line.get(name) for name in names) for line in lines]


@contextmanager
def triton_of(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port_of('grpc')}") as client:
        yield client


@contextmanager
def channel_to(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port_of('grpc')}") as channel:
        yield channel


def thrift_of(server: Server, service: Any, flow: str = "") -> Any:
    """A client of a service; it names the flow as Thrift names services at one port."""
    protocol: Any = TBinaryProtocolFactory()  # type: ignore[no-untyped-call]
    if flow:
        protocol = TMultiplexedProtocolFactory(protocol, flow)
    port = server.port_of("thrift")
    return client_context(service, "127.0.0.1", port, proto_factory=protocol, socket_timeout=30_000)


def call_of(name: bytes, fields: bytes = b"", kind: int = 1) -> bytes:
    """A message of Thrift, whatever its name."""
    head = struct.pack(">Hxbi", 0x8001, kind, len(name))
    return head + name + struct.pack(">i", 7) + fields + b"\x00"


def picture_of(data: bytes) -> bytes:
    """The arguments of process_image."""
    return b"\x0c\x00\x01\x0b\x00\x01" + struct.pack(">i", len(data)) + data + b"\x00"


def test_each_call_over_grpc_is_in_the_access_log(telling: Server) -> None:
    """The method's full name, the number of its status, and the id that the answer has."""
    with triton_of(telling) as client:
        asked: list[tuple[Callable[..., Any], int, str]] = [
            (partial(client.infer, "echo", bytes_by_grpc(b"a secret")), 0, "ModelInfer"),
            (partial(client.infer, "picture", bytes_by_grpc(b"x")), 3, "ModelInfer"),
            (partial(client.infer, "nothing", bytes_by_grpc(b"x")), 5, "ModelInfer"),
            (partial(client.infer, "fail", bytes_by_grpc(b"x")), 13, "ModelInfer"),
            (client.is_server_live, 0, "ServerLive"),
            (partial(client.get_model_metadata, "echo"), 0, "ModelMetadata"),
            (partial(client.get_model_config, "nothing"), 5, "ModelConfig"),
            (partial(client.load_model, "echo"), 12, "RepositoryModelLoad"),
        ]

        def ask() -> None:
            for number, (call, status, _) in enumerate(asked):
                try:
                    call(headers={"x-request-id": f"g-{number}"})
                except InferenceServerException:
                    assert status

        lines = told_of(telling, len(asked), ask)
    assert picked(lines, "method", "path", "status", "request_id") == [
        ("gRPC", f"{SERVICE}/{name}", status, f"g-{number}")
        for number, (_, status, name) in enumerate(asked)
    ]
    assert lines[2]["message"].startswith(f"gRPC {INFER} NOT_FOUND ")
    assert "secret" not in telling.errors


def test_an_inference_has_its_own_id_in_the_access_log(telling: Server) -> None:
    """That of its message, or a new one; what is no inference has one only if it brought it."""
    with triton_of(telling) as client:
        ask = partial(client.infer, "echo", bytes_by_grpc(b"x"))
        (own,) = told_of(telling, 1, partial(ask, request_id="own", headers={"x-request-id": "g"}))
        (new,) = told_of(telling, 1, ask)
        (none,) = told_of(telling, 1, client.is_server_ready)
        wrong = partial(client.is_server_ready, headers={"x-request-id": "a" * 200})
        (unsound,) = told_of(telling, 1, wrong)
    assert own["request_id"] == "own"
    assert re.fullmatch("[0-9a-f]{16}", new["request_id"])
    assert "request_id" not in none
    assert "request_id" not in unsound


def test_who_hangs_up_over_grpc_is_in_the_access_log(telling: Server) -> None:
    """Such a call is CANCELLED, whether it had waited for its answer or watched for changes."""
    with triton_of(telling) as client:

        def give_up() -> None:
            sent = bytes_by_grpc(b"x")
            call = client.async_infer("slow", sent, lambda result, error: None, request_id="gone")
            time.sleep(0.2)
            call.cancel()

        (line,) = told_of(telling, 1, give_up)
    assert picked([line], "path", "status", "request_id") == [(INFER, 1, "gone")]
    assert line["ms"] > 50
    with channel_to(telling) as channel:

        def watch() -> None:
            call = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
            next(call)
            call.cancel()

        (line,) = told_of(telling, 1, watch)
    assert picked([line], "path", "status") == [("/grpc.health.v1.Health/Watch", 1)]


def test_what_is_no_message_over_grpc_is_in_the_access_log(telling: Server) -> None:
    """Nor is it lost where gRPC itself turns it away, being too large, or of an unknown method."""

    def ask(name: str, body: bytes) -> None:
        with channel_to(telling) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(name)(body, metadata=(("x-request-id", "m"),))

    for name, body, status in (
        (INFER, b"\xff\xff\xff", 3),
        (f"{SERVICE}/ModelStatistics", b"\xff\xff\xff", 3),
        (INFER, bytes(40 << 20), 1),
        ("/what/is this", b"", 12),
    ):
        lines = told_of(telling, 1, partial(ask, name, body))
        assert picked(lines, "path", "status", "request_id") == [(name, status, "m")]


def test_a_stream_has_a_line_for_each_request_and_one_of_its_own(telling: Server) -> None:
    """Each request with its id and what it would have been told alone; at the end the stream."""
    answers: list[Any] = []
    with triton_of(telling) as client:

        def ask() -> None:
            client.start_stream(lambda result, error: answers.append(error))
            for number, model in enumerate(("echo", "nothing", "picture", "echo")):
                client.async_stream_infer(model, bytes_by_grpc(b"x"), request_id=f"s-{number}")
            wait_until(lambda: len(answers) == 4)
            client.stop_stream()

        *lines, last = told_of(telling, 5, ask)
    assert sorted(picked(lines, "request_id", "status")) == [
        *(("s-0", 0), ("s-1", 5), ("s-2", 3), ("s-3", 0))
    ]
    assert {line["path"] for line in (*lines, last)} == {STREAM}
    assert picked([last], "status", "request_id") == [(0, None)]
    assert last["ms"] > max(line["ms"] for line in lines)


def test_a_stream_that_breaks_off_is_told_with_its_requests(telling: Server) -> None:
    """A client that leaves gives up what it waits for; a message that is none ends the stream."""
    with triton_of(telling) as client:

        def leave() -> None:
            client.start_stream(lambda result, error: None)
            client.async_stream_infer("slow", bytes_by_grpc(b"x"), request_id="left")
            time.sleep(0.2)
            client.stop_stream(cancel_requests=True)

        lines = told_of(telling, 2, leave)
    assert {*picked(lines, "status", "request_id")} == {(1, "left"), (1, None)}
    with channel_to(telling) as channel:

        def send() -> None:
            with pytest.raises(grpc.RpcError):
                list(channel.stream_stream(STREAM)(iter([b"\xff\xff\xff"])))

        lines = told_of(telling, 1, send)
    assert picked(lines, "path", "status") == [(STREAM, 3)]


def test_who_has_no_token_is_in_the_access_log(flow: Path) -> None:
    """Turned away over HTTP and gRPC, with what was asked for and never the token."""
    token = write(flow.parent / "token", "of-the-server")
    token.chmod(0o600)
    options = ("--token-file", str(token), "--grpc-port", "0", "--access-log")
    with (
        logged(flow, *options, "--log-format", "json") as server,
        channel_to(server) as channel,
        triton_of(server) as client,
    ):

        def ask() -> None:
            server.client.post("/flows/echo", headers={"authorization": "Bearer guessed"})
            for name in (INFER, f"{SERVICE}/Nothing"):
                with pytest.raises(grpc.RpcError):
                    channel.unary_unary(name)(b"", metadata=(("authorization", "Bearer guessed"),))
            with pytest.raises(grpc.RpcError):
                list(channel.stream_stream(STREAM)(iter([b"x"])))

        lines = told_of(server, 4, ask)
        assert picked(lines, "path", "status") == [
            *(("/flows/echo", 401), (INFER, 16), (f"{SERVICE}/Nothing", 16), (STREAM, 16))
        ]
        headers = {"authorization": "Bearer of-the-server"}
        right = partial(client.infer, "echo", bytes_by_grpc(b"x"), headers=headers)
        assert picked(told_of(server, 1, right), "status") == [(0,)]
        assert "guessed" not in server.errors
        assert "of-the-server" not in server.errors


def test_each_call_over_thrift_is_in_the_access_log(telling: Server) -> None:
    """The method as it was asked for, and whether the answer was a result or an exception."""

    def ask() -> None:
        with thrift_of(telling, IDL.InferenceService) as client:
            client.ping()
            assert client.infer_batch(IDL.InferenceParams(uuid="t-1", data=b"cat")).label == "cat"
            with pytest.raises(TApplicationException):
                client.infer_batch(IDL.InferenceParams(uuid="t-2", data=b"\xff"))
        with thrift_of(telling, IDL.ImageProcessingService, "picture") as client:
            assert not client.process_image(IDL.ProcessRequest(image_data=b"x")).success
            with pytest.raises(TApplicationException):
                client.process_image(IDL.ProcessRequest())

    lines = told_of(telling, 5, ask)
    assert picked(lines, "method", "path", "status") == [
        ("Thrift", "ping", 2),
        ("Thrift", "infer_batch", 2),
        ("Thrift", "infer_batch", 3),
        ("Thrift", "picture:process_image", 2),
        ("Thrift", "picture:process_image", 3),
    ]
    assert picked(lines[:3], "request_id") == [(None,), ("t-1",), ("t-2",)]
    assert re.fullmatch("[0-9a-f]{16}", lines[3]["request_id"])
    assert [line["message"].split()[2] for line in lines[1:3]] == ["REPLY", "EXCEPTION"]


def test_who_hangs_up_over_thrift_is_in_the_access_log(telling: Server) -> None:
    """Nothing was answered, so that there is no status; nor where no answer is waited for."""

    def leave() -> None:
        with Raw(telling.port_of("thrift")) as connection:
            connection.send(call_of(b"slow:process_image", picture_of(b"x")))
            time.sleep(0.2)

    (line,) = told_of(telling, 1, leave)
    assert picked([line], "path", "status") == [("slow:process_image", None)]
    assert len(line["request_id"]) == 16
    assert line["ms"] > 50

    def tell() -> None:
        with Raw(telling.port_of("thrift")) as connection:
            connection.send(call_of(b"echo:process_image", picture_of(b"x"), kind=4))
            connection.send(call_of(b"ping"))
            assert connection.socket.recv(1) == b"\x80"

    lines = told_of(telling, 2, tell)
    assert picked(lines, "path", "status") == [("echo:process_image", None), ("ping", 2)]


def test_what_is_no_call_over_thrift_is_in_the_access_log(telling: Server) -> None:
    """An unknown method, arguments that are none, and bytes that are no message at all."""

    def send(sent: bytes) -> None:
        with Raw(telling.port_of("thrift")) as connection:
            connection.send(sent)
            connection.socket.recv(1)

    for sent, path, status in (
        (call_of(b"infer"), "infer", 3),
        (call_of("a\nb \u2028".encode()), "a\\nb \\u2028", 3),
        (call_of(b"a" * 5000), "a" * 1000, 3),
        (call_of(b"infer_batch"), "infer_batch", 3),
        (call_of(b"ping", kind=2), "ping", 3),
        (call_of(b"\xff\xfe"), None, None),
        (b"GET / HTTP/1.1\r\nHost: test\r\n\r\n", None, None),
        (b"\x80\x01\x00\x01\x7f\xff\xff\xff", None, None),
    ):
        lines = told_of(telling, 1, partial(send, sent))
        assert picked(lines, "method", "path", "status") == [("Thrift", path, status)]


def test_the_access_log_of_the_others_as_text(flow: Path) -> None:
    """The same words in the same order; a status is told by its name."""
    with logged(flow, *FACES, "--access-log") as server:
        with triton_of(server) as client:
            client.infer("echo", bytes_by_grpc(b"x"), request_id="r-7")
        with thrift_of(server, IDL.InferenceService) as thrift:
            thrift.ping()
        with Raw(server.port_of("thrift")) as connection:
            connection.send(b"GET / HTTP/1.1\r\n\r\n")
            connection.wait_closed()
        wait_until(lambda: server.errors.count("\n") == 3)
        none, pinged, called = sorted(server.errors.splitlines(), key=len)
    assert re.fullmatch(rf"gRPC {INFER} OK \d+\.\d{{3}} ms r-7", called)
    assert re.fullmatch(r"Thrift ping REPLY \d+\.\d{3} ms -", pinged)
    assert re.fullmatch(r"Thrift - - \d+\.\d{3} ms -", none)


def ask_by_all(server: Server) -> None:
    server.client.post("/flows/echo", content=b"x")
    with triton_of(server) as client:
        client.infer("echo", bytes_by_grpc(b"x"))
    with thrift_of(server, IDL.InferenceService) as thrift:
        thrift.ping()


@pytest.mark.parametrize("kind", KINDS)
def test_all_processes_write_to_the_access_log(flow: Path, kind: tuple[str, ...]) -> None:
    """Fronts tell of what came over HTTP, and the engine of the rest."""
    with logged(flow, *FACES, *kind, "--access-log", "--log-format", "json") as server:
        lines = told_of(server, 3, partial(ask_by_all, server))
    assert {*picked(lines, "method", "path", "status")} == {
        ("POST", "/flows/echo", 200),
        ("gRPC", INFER, 0),
        ("Thrift", "ping", 2),
    }


def test_what_is_no_body_is_told_with_its_status(flow: Path) -> None:
    """Who was answered 400 in the middle of its body had not hung up."""
    with logged(flow, "--access-log") as server, server.connect() as connection:
        connection.send("POST /flows/echo HTTP/1.1\r\nHost: test\r\n")
        connection.send("Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert connection.answer()[0] == 400
        wait_until(lambda: "\n" in server.errors)
        assert server.errors.startswith("POST /flows/echo 400 ")


def test_without_the_option_there_is_no_access_log(flow: Path) -> None:
    """At no level is a request told of that was answered."""
    with logged(flow, *FACES, "--log-level", "info") as server:
        ask_by_all(server)
        time.sleep(0.2)
        assert server.errors == ""


def test_a_line_of_the_access_log_belongs_to_the_trace(flow: Path) -> None:
    """It has the id of its request's trace, and none where nothing was traced."""
    options = (*FACES, "--access-log", "--log-format", "json", "--otel")
    with collecting() as collector:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        files = (str(flow), "--device", "cpu", *options)
        with serving(flow.parent, *files, environment=settings) as server:
            server.wait_ready()

            def ask() -> None:
                answers: list[Any] = []
                with triton_of(server) as client:
                    client.infer("echo", bytes_by_grpc(b"x"), request_id="o-1")
                    client.start_stream(lambda result, error: answers.append(error))
                    client.async_stream_infer("echo", bytes_by_grpc(b"x"), request_id="o-2")
                    wait_until(lambda: len(answers) == 1)
                    client.stop_stream()
                    call = client.async_infer(
                        "slow", bytes_by_grpc(b"x"), lambda result, error: None, request_id="o-3"
                    )
                    time.sleep(0.2)
                    call.cancel()
                with Raw(server.port_of("thrift")) as connection:
                    both = call_of(b"echo:process_image", picture_of(b"x")) + call_of(b"ping")
                    connection.send(both)
                    while b"ping" not in connection.socket.recv(1000):
                        pass

            lines = told_of(server, 6, ask)

            def traces() -> dict[str, str]:
                requests = [span for span in collector.spans if span.kind == SERVER_SPAN]
                return {s.attributes["flowlang.request_id"]: s.trace_id for s in requests}

            wait_until(lambda: len(traces()) == 4)
    for line in lines:
        assert line.get("trace_id") == traces().get(line.get("request_id", ""))


def test_a_reader_that_goes_on_has_what_is_logged_from_then_on() -> None:
    """What came while it stood still is left out, and a line cut by that ends before the next."""
    read, written = os.pipe()
    with open(read, "rb", buffering=0) as reader, open(written, "w") as stream:
        outlet = Outlet(stream)
        fcntl.fcntl(written, fcntl.F_SETPIPE_SZ, 4 << 12)  # pages
        os.write(written, bytes(2 << 12))
        outlet.write("long" * 5000 + "\n")
        outlet.write("lost\n")
        assert reader.read(1 << 20) == bytes(2 << 12) + b"long" * 2048
        for word in ("one", "two"):
            outlet.write(f"{word}\n")
        assert reader.read(1 << 20) == b"\none\ntwo\n"
