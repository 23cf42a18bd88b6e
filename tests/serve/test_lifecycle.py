"""A server from its start to its end: what must not be lost on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import flowlang
from tests.serve.asking import NUMBERS, error_of
from tests.serve.server import (
    KINDS,
    PATIENCE_S,
    ROOT,
    Raw,
    free_port,
    head,
    running,
    serving,
    wait_until,
    write,
)

FRONTS = [pytest.param(0, id="one-process"), pytest.param(2, id="ingest")]


def load_later(path: Path, gate: Path, **options: Any) -> list[str]:
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


@pytest.mark.parametrize("fronts", FRONTS)
def test_it_lives_before_it_is_ready(folder: Path, echo: Path, fronts: int) -> None:
    """While flows load it is live and not ready, refuses calls, and then it is ready."""
    gate = folder / f"gate-1-{fronts}"
    with running(folder, *load_later(echo, gate, fronts=fronts)) as server:
        assert server.client.get("/health/live").json() == {"status": "live"}
        ready = server.client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        for path in ("/", "/flows/main"):
            call = server.client.post(path, content=b"x")
            assert (call.status_code, error_of(call)["code"]) == (503, "loading")
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
    with running(folder, *load_later(wrong, folder / "gate-2", fronts=fronts)) as server:
        assert server.wait() == 1
        assert server.errors.count("there is no operator or flow named `resise`") == 1
        assert "Traceback" not in server.errors


def test_a_port_in_use_is_told(folder: Path, echo: Path) -> None:
    """A port that another has gives a sentence and status 1."""
    from flowlang.serve.http import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve(lambda: flowlang.load(echo), "127.0.0.1", taken.getsockname()[1]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_before_it_listens_is_heard(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """While files are checked, too: the first process of a container would not hear it."""
    flow = tmp_path / "slow.flow"
    os.mkfifo(flow)
    program = [sys.executable, "-m", "flowlang", "serve", "--port", "0", *kind, str(flow)]
    written: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # nobody reads it yet
            written.append(os.open(flow, os.O_WRONLY | os.O_NONBLOCK))
        return bool(written)

    def is_stopped() -> bool:
        # Again, for CPython 3.10 does not look for signals between opening a file and reading it.
        process.send_signal(signal.SIGTERM)
        return process.poll() is not None

    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            wait_until(is_read)
            wait_until(is_stopped)
            assert process.returncode == 0
            assert process.stdout is not None
            assert process.stdout.read() == b""
        finally:
            process.kill()
            os.close(*written)


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
        assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
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
                        assert error_of(response)["code"] == "draining"
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
        folder, *load_later(echo, folder / "gate-3", grace_s=4.0, fronts=fronts)
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
        folder, *load_later(flow, folder / "gate-4", grace_s=0.3, fronts=fronts)
    ) as server:
        server.wait_ready()
        with server.connect() as connection:
            connection.post("/", b"[1, 2, 3]")
            server.wait_inside(1)
            server.signal(signal.SIGINT)
            assert connection.error() == (503, "draining")
        assert server.wait() == 1
        assert "not all was answered in 0.3 s" in server.errors


@contextmanager
def unread(
    flow: Path, output: str, *options: str
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A server of one flow, and a client of it, where nobody takes what it says and logs."""
    port = free_port()
    options = ("--port", str(port), "--access-log", "--device", "cpu", *options)
    program = [sys.executable, "-m", "flowlang", "serve", *options, str(flow)]
    if output == "closed":
        program = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *program]
    read, written = os.pipe()
    if output == "gone":
        os.close(read)
    elif output == "stalled":
        os.set_blocking(written, False)
        with suppress(BlockingIOError):
            while True:
                os.write(written, b"all that there is room for\n")
        os.set_blocking(written, True)
    else:
        os.close(read)
        os.close(written)
        written = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen(program, cwd=ROOT, stdout=written, stderr=written)
    os.close(written)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            wait_until(lambda: flows_of(client) != [])
            yield process, client
    finally:
        process.kill()
        process.wait()
        if output == "stalled":
            os.close(read)


def flows_of(client: httpx.Client) -> list[str]:
    """The names of the flows there are; none before it listens."""
    try:
        return [flow["name"] for flow in client.get("/flows").json().get("flows", ())]
    except httpx.TransportError:
        return []


OUTPUTS = ["gone", "full", "closed", "stalled"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_serves_where_nobody_reads_what_it_says(
    tmp_path: Path, kind: tuple[str, ...], output: str
) -> None:
    """It goes on to reload what changes, and a stop has the status that it always has."""
    flow = write(tmp_path / "a.flow", "export flow one = pass\n")
    with unread(flow, output, *kind, "--watch") as (process, client):
        for name in ("two", "three"):
            write(flow, f"export flow {name} = pass\n")
            wait_until(partial(lambda name: flows_of(client) == [name], name))
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_signal_is_heard_where_nobody_reads(
    tmp_path: Path, kind: tuple[str, ...], output: str
) -> None:
    """Nor does it wait for what nobody takes."""
    flow = write(tmp_path / "a.flow", "export flow one = pass\n")
    with unread(flow, output, *kind) as (process, client), Raw(client.base_url.port or 0) as half:
        half.send(head("/flows/one", 2), b"x")
        wait_until(lambda: client.get("/health/ready").json()["requests"] == 1)
        process.terminate()
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        process.terminate()
        assert process.wait(PATIENCE_S) == 1


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
