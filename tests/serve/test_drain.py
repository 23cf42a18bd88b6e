"""A server that stops: it says so first with `--drain-delay`, and answers what it has."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton

from flowlang.serve.proto import read_protocol
from tests.serve.server import (
    KINDS,
    PATIENCE_S,
    Server,
    free_port,
    refused,
    running,
    serving,
    wait_until,
    write,
)

OPERATORS = """
import time

def slow(seconds: bytes) -> bytes:
    time.sleep(float(seconds))
    return seconds
"""
FLOWS = """
use "operators.py" as ops
export flow echo = pass
export flow slow = ops.slow
schedule { echo(queue=1000) }
"""
TENSOR = {"name": "input", "datatype": "BYTES", "shape": [1, 1], "data": ["x"]}
INFERENCE = json.dumps({"inputs": [TENSOR]}).encode()
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # as messages of gRPC's health service


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    write(tmp_path / "operators.py", OPERATORS)
    return write(tmp_path / "all.flow", FLOWS)


@contextmanager
def draining(flow: Path, delay_s: float, *options: str) -> Iterator[Server]:
    command = ("--device", "cpu", "--drain-delay", str(delay_s), *options, str(flow))
    with serving(flow.parent, *command) as server:
        yield server.wait_ready()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_not_ready_and_answers_as_ever(flow: Path, kind: tuple[str, ...]) -> None:
    """All health checks say no at once; all protocols let in until the time is over."""
    grpc_port = free_port()
    with (
        draining(flow, 3.0, "--grpc-port", str(grpc_port), *kind) as server,
        triton.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client,
        grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        watching = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=PATIENCE_S)
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert (next(watching), check(b"")) == (SERVING, SERVING)
        began_s = time.monotonic()
        server.signal()
        assert (next(watching), check(b"")) == (NOT_SERVING, NOT_SERVING)
        watching.cancel()
        assert not client.is_server_ready()
        for _ in range(8):  # whichever front has the connection
            with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as other:
                ready = other.get("/health/ready")
                assert (ready.status_code, ready.json()["status"]) == (503, "draining")
                assert other.get("/v2/health/ready").status_code == 503
                assert other.get("/health/live").status_code == 200
                answer = other.post("/flows/echo", content=b"x")
                assert (answer.status_code, answer.content) == (200, b"x")
                assert answer.headers["connection"] == "close"
                assert other.post("/v2/models/echo/infer", content=INFERENCE).status_code == 200
        assert "flowlang_ready 0.0" in server.client.get("/metrics").text
        sent = triton.InferInput("input", [1], "BYTES")
        sent.set_data_from_numpy(np.array([b"x"], object))
        assert client.infer("echo", [sent]).as_numpy("output").tolist() == [b"x"]
        late = pool.submit(server.client.post, "/flows/slow", content=b"3")
        assert time.monotonic() - began_s < 2.9, "the machine is too slow for this test"
        assert late.result().content == b"3"
        assert server.wait() == 0
        assert 3 < time.monotonic() - began_s < 10
        assert server.errors == ""


@pytest.mark.parametrize("kind", KINDS)
def test_clients_that_heed_the_health_check_lose_nothing(flow: Path, kind: tuple[str, ...]) -> None:
    """A balancer that looks every 0.2 s has sent its requests elsewhere before any is refused."""
    with draining(flow, 1.5, *kind) as server:
        is_ready = threading.Event()
        is_ready.set()
        told: Counter[object] = Counter()

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
                while is_ready.is_set():
                    try:
                        told[client.post("/flows/echo", content=b"x").status_code] += 1
                    except httpx.TransportError as error:
                        told[type(error).__name__] += 1

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            time.sleep(0.5)
            server.signal()
            while server.client.get("/health/ready").status_code == 200:
                time.sleep(0.2)
            is_ready.clear()
            for one in asked:
                one.result()
        assert server.wait() == 0
    assert set(told) == {200}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_signal_ends_the_delay_and_all_else(flow: Path, kind: tuple[str, ...]) -> None:
    """Status 1, as later."""
    with draining(flow, 60.0, *kind) as server:
        server.signal()
        time.sleep(0.5)
        assert server.process.poll() is None
        assert server.client.post("/flows/echo", content=b"x").content == b"x"
        server.signal()
        assert server.wait() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_who_was_never_ready_has_nothing_to_wait_for(
    flow: Path, tmp_path: Path, kind: tuple[str, ...]
) -> None:
    """Stopped while its flows load it ends at once."""
    write(tmp_path / "operators.py", f"{OPERATORS}\ntime.sleep(1.5)\n")
    command = ("--device", "cpu", "--drain-delay", "60", *kind, str(flow))
    with serving(tmp_path, *command) as server:
        began_s = time.monotonic()
        server.signal()
        assert server.wait() == 0
        assert time.monotonic() - began_s < 10


@pytest.mark.parametrize("fronts", [0, 2])
def test_an_answer_that_nobody_takes_is_none(tmp_path: Path, fronts: int) -> None:
    """Its client is waited for, as long as for any; then it is cut off, and the status is 1."""
    echo = write(tmp_path / "echo.flow", "pass\n")
    code = f"""
import sys, flowlang
from flowlang.serve import serve
load = lambda: flowlang.load({str(echo)!r}, device="cpu")
sys.exit(serve(load, "127.0.0.1", 0, grace_s=2.0, fronts={fronts}))
"""
    with running(tmp_path, "-c", code) as server, server.wait_ready().connect() as connection:
        with server.connect() as reading:
            for asking in (connection, reading):
                asking.post("/", bytes(30_000_000))
            began_s = time.monotonic()
            server.signal()
            time.sleep(0.5)
            assert len(reading.answer()[2]) == 30_000_000
        assert server.wait() == 1
        assert 1.8 < time.monotonic() - began_s < 6
        assert server.errors == "flowlang: not all was answered in 2 s\n"


@pytest.mark.parametrize("given", ["-1", "soon", "nan", "inf"])
def test_a_delay_is_a_number_of_seconds(flow: Path, given: str) -> None:
    """Nothing listens with another."""
    status, errors = refused("--drain-delay", given, str(flow))
    assert status == 2
    assert "--drain-delay" in errors


@contextmanager
def holding_back(port: int) -> Iterator[tuple[int, Event, Event]]:
    """A way to a port that begins to bring what comes from there, and the rest once it is told.

    Gives its own port, what says that it has begun, and what it is told by.
    """
    began, go_on = Event(), Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as opened:

        def bring(source: socket.socket, target: socket.socket, is_held: bool) -> None:
            came = 0
            with suppress(OSError):
                while piece := source.recv(65536):
                    target.sendall(piece)
                    came += len(piece)
                    if is_held and came > 200_000:
                        began.set()
                        go_on.wait(PATIENCE_S)
                target.shutdown(socket.SHUT_WR)

        def take() -> None:
            near = opened.enter_context(listener.accept()[0])
            far = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            for way in ((near, far, False), (far, near, True)):
                Thread(target=bring, args=way, daemon=True).start()

        Thread(target=take, daemon=True).start()
        try:
            yield listener.getsockname()[1], began, go_on
        finally:
            go_on.set()


def over_thrift(port: int, size: int) -> int:
    """How much of an answer of so many bytes comes."""
    name, picture = b"echo:process_image", bytes(size)
    call = b"\x80\x01\x00\x01" + struct.pack(">i", len(name)) + name + bytes(4)
    call += b"\x0c\x00\x01\x0b\x00\x01" + struct.pack(">i", len(picture)) + picture + bytes(2)
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        connection.sendall(call)
        return sum(map(len, iter(lambda: connection.recv(1 << 20), b""))) * 3 // 4


def over_grpc(port: int, size: int, *, is_stream: bool) -> int:
    """The same, or 0 where the call fails."""
    messages = read_protocol("inference.proto").messages
    tensor = {"name": "input", "datatype": "BYTES", "shape": [1]}
    request = messages["ModelInferRequest"](
        model_name="echo",
        inputs=[tensor],
        raw_input_contents=[struct.pack("<I", size) + bytes(size)],
    ).SerializeToString()
    options = [("grpc.max_receive_message_length", -1)]
    service = "/inference.GRPCInferenceService/"
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        if is_stream:
            return len(next(channel.stream_stream(f"{service}ModelStreamInfer")(iter([request]))))
        return len(channel.unary_unary(f"{service}ModelInfer")(request, timeout=PATIENCE_S))


@pytest.mark.parametrize(
    ("protocol", "ask"),
    [
        ("thrift", over_thrift),
        ("grpc", partial(over_grpc, is_stream=False)),
        ("grpc", partial(over_grpc, is_stream=True)),
    ],
    ids=["thrift", "grpc", "grpc-stream"],
)
def test_an_answer_on_its_way_comes_to_its_end(
    tmp_path: Path, protocol: str, ask: Callable[[int, int], int]
) -> None:
    """A client that takes a large answer slowly has all of it, before the server ends."""
    echo = write(tmp_path / "echo.flow", "export flow echo = pass\n")
    command = ("--device", "cpu", f"--{protocol}-port", "0", str(echo))
    with serving(tmp_path, *command) as server, ThreadPoolExecutor(1) as pool:
        server.wait_ready()
        port = server.port_of(protocol)
        with holding_back(port) as (way, began, go_on):
            asked = pool.submit(ask, way, 30_000_000)
            assert began.wait(PATIENCE_S)
            server.signal()
            wait_until(lambda: server.health()["status"] == "draining")
            time.sleep(0.5)
            assert server.process.poll() is None
            go_on.set()
            assert asked.result(PATIENCE_S) >= 30_000_000
        assert server.wait() == 0
