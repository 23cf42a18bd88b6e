"""`flowlang serve --ingest`: how it begins and ends, and that nobody notices it meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import tritonclient.grpc as triton

from tests.serve.asking import bytes_by_grpc
from tests.serve.ingesting import INFERENCE, ingesting, inside
from tests.serve.processes import processes, wait_gone
from tests.serve.server import (
    PATIENCE_S,
    Server,
    free_port,
    running,
    serving,
    wait_until,
    write,
)

TOKEN = "the-token-of-both"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}


# Beginning


def test_it_says_serving_once_all_fronts_let_requests_in(folder: Path) -> None:
    """Whoever connects after that is let in, whichever front has the connection."""
    with ingesting(folder) as server:
        connections = [server.connect() for _ in range(60)]
        for number, connection in enumerate(connections):
            connection.post("/flows/echo", b"%d" % number)
        answers = [connection.answer() for connection in connections]
        for connection in connections:
            connection.close()
    assert {status for status, _, _ in answers} == {200}


def test_flows_that_cannot_begin_leave_no_process(folder: Path) -> None:
    """An engine whose model cannot be loaded ends all with status 1, and its error once."""
    broken = folder / "broken.onnx"
    whole = (folder / "identity.onnx").read_bytes()
    broken.write_bytes(whole.replace(b"Identity", b"Idenxity"))
    flow = write(folder / "broken.flow", 'trt("broken.onnx")\n')
    with serving(folder, "--ingest", "2", "--device", "cpu", str(flow)) as server:
        children = [child.pid for child in psutil.Process(server.process.pid).children()]
        assert server.wait() == 1
        assert server.errors.count("flowlang: ") == 1
        assert "Idenxity" in server.errors
        assert "Traceback" not in server.errors
    wait_gone(*children)


def test_an_engine_ended_before_it_began_is_told(folder: Path) -> None:
    """Where it has no words of its own, such as when memory is out, the supervisor says how."""
    code = """
import os, signal, sys
from flowlang.serve import serve
def load():
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(serve(load, "127.0.0.1", 0, fronts=2))
"""
    with running(folder, "-c", code) as server:
        assert server.wait() == 1
        assert server.errors == "flowlang: the engine was ended by signal 9\n"


def test_only_the_engine_asks_about_gpus(folder: Path) -> None:
    """CUDA, once it has been asked anything, is of no use to the processes forked after that."""
    asked = folder / "asked"
    code = f"""
import os, pathlib
from flowlang.runtime import machine
found = machine.this_machine
def this_machine(device):
    with pathlib.Path({str(asked)!r}).open("a") as file:
        print(os.getpid(), file=file)
    return found(device)
machine.this_machine = this_machine
from flowlang.cli import main
main(["serve", "--ingest", "2", "--port", "0", {str(folder / "light.flow")!r}])
"""
    with running(folder, "-c", code) as server:
        server.wait_ready()
        assert set(map(int, asked.read_text().split())) == {processes(server).engine}


@pytest.mark.parametrize("is_writable", [False, True])
def test_it_needs_no_place_for_temporary_files(
    folder: Path, tmp_path: Path, is_writable: bool
) -> None:
    """Nor one whose path is short enough for a socket's; and nothing is left where it goes."""
    place = tmp_path / ("x" * 90)
    place.mkdir()
    code = f"""
import tempfile
tempfile.tempdir = {str(place) if is_writable else "/proc"!r}
from flowlang.cli import main
main(["serve", "--ingest", "2", "--port", "0", {str(folder / "light.flow")!r}])
"""
    with running(folder, "-c", code) as server:
        path = _socket_of(server.wait_ready())
        assert path.is_relative_to("/dev/shm")
        assert server.client.post("/flows/echo", content=b"x").content == b"x"
        server.signal()
        assert server.wait() == 0
        assert not path.parent.exists()


def test_what_it_needs_does_not_grow_old(folder: Path) -> None:
    """Or whoever tidies up the folder of temporary files would take the socket away."""
    code = f"""
from flowlang.serve import supervisor
supervisor.TOUCH_S = 0.05
from flowlang.cli import main
main(["serve", "--ingest", "2", "--port", "0", {str(folder / "light.flow")!r}])
"""
    with running(folder, "-c", code) as server:
        path = _socket_of(server.wait_ready())
        for old in (path, path.parent):
            os.utime(old, (0, 0))
            wait_until(partial(_is_young, old))
        server.signal()
        assert server.wait() == 0


def _is_young(path: Path) -> bool:
    return path.stat().st_mtime > 0


def _socket_of(server: Server) -> Path:
    """Where the engine listens to the fronts."""
    sockets = psutil.Process(processes(server).engine).net_connections("unix")
    (path,) = {Path(connected.laddr) for connected in sockets if connected.laddr}
    return path


def test_a_port_in_use_is_told(folder: Path, server: Server) -> None:
    """A port that another has is not shared with it, even if that shares it among its own."""
    command = [sys.executable, "-m", "flowlang", "serve", "--ingest", "2", "--port"]
    file = str(folder / "light.flow")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], server.port):
            done = subprocess.run(
                [*command, str(port), file], capture_output=True, text=True, timeout=PATIENCE_S
            )
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith(f"flowlang: cannot listen on 127.0.0.1:{port}: ")
            assert done.stderr.count("\n") == 1


# What the engine is asked


@pytest.fixture(scope="module")
def alike(folder: Path) -> Iterator[tuple[Server, Server]]:
    """A server of one process, and one of several, which do the same."""
    (token := write(folder / "token", TOKEN)).chmod(0o600)
    command = ("--device", "cpu", "--token-file", str(token), str(folder / "holding.flow"))
    with (
        serving(folder, *command) as alone,
        serving(folder, "--ingest", "2", *command) as together,
    ):
        yield alone.wait_ready(), together.wait_ready()


LOOKS = (
    *("/", "/docs", "/openapi.json", "/flows", "/flows/echo", "/flows/echo/plan.svg", "/nothing"),
    *("/flows/none/plan.svg", "/health/live", "/health/ready", "/v2", "/v2/health/live"),
    *("/v2/health/ready", "/v2/models/echo", "/v2/models/echo/ready", "/v2/models/echo/config"),
    *("/v2/models/echo/stats", "/v2/models/none", "/v2/models/echo/versions/2", "/v2/models/stats"),
    *("/v2/models/echo/infer", "/v2/nothing", "/v2/repository/index", "/flows/", "//"),
)
POSTS: tuple[tuple[str, bytes, dict[str, str]], ...] = (
    ("/flows/word", b"even", {}),
    ("/flows/word", b"odd", {"X-Priority": "1", "X-Deadline-Ms": "20000"}),
    ("/flows/word", b"\xff", {}),
    ("/flows/word?k=1", b"even", {}),
    ("/flows/word", b"even", {"X-Priority": "first"}),
    ("/flows/held", b"[1, 2]", {}),
    ("/flows/held", b"[1, 2, 3", {}),
    ("/flows/held", b"[1, 2, 3]", {"X-Deadline-Ms": "20"}),
    ("/flows/slow", b"soon", {}),
    ("/flows/judge", b"joke", {}),
    ("/flows/none", b"", {}),
    ("/", b"", {}),
    ("/metrics", b"", {}),
    ("/v2/models/held/infer", INFERENCE, {"X-Deadline-Ms": "20"}),
    ("/v2/models/held/infer", b"{}", {}),
    ("/v2/models/none/infer", INFERENCE, {}),
    ("/v2/models/slow/infer", INFERENCE, {}),
    ("/v2/models/held/load", b"", {}),
    ("/v2/repository/index", b"", {}),
    ("/v2/repository/models/held/load", b"", {}),
)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", LOOKS)
def test_what_is_looked_at_is_what_one_process_shows(
    alike: tuple[Server, Server], method: str, path: str
) -> None:
    """To the byte, with its headers, and for who has not the token too."""
    for headers in ({}, RIGHT):
        alone, together = (_seen(server, method, path, b"", headers) for server in alike)
        assert together == alone


@pytest.mark.parametrize(("path", "body", "headers"), POSTS)
def test_what_is_asked_is_answered_as_by_one_process(
    alike: tuple[Server, Server], path: str, body: bytes, headers: dict[str, str]
) -> None:
    """Results and errors are the same, to the byte."""
    asked = headers | RIGHT
    alone, together = (_seen(server, "POST", path, body, asked) for server in alike)
    assert together == alone


def _seen(
    server: Server, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, list[tuple[str, str]], bytes]:
    """All that a client sees of an answer, but for the time."""
    given = headers | {"X-Request-Id": "the-same"}
    response = server.client.request(method, path, content=body, headers=given)
    shown = [(name, value) for name, value in response.headers.items() if name != "date"]
    return response.status_code, shown, response.content


def test_bodies_that_no_ring_holds_come_back(server: Server) -> None:
    """More bytes at once than lie between the processes, there and back, all of them right."""
    bodies = [bytes([number]) * (12 << 20) for number in range(8)]

    def ask(body: bytes) -> httpx.Response:
        return httpx.post(f"{server.url}/flows/echo", content=body, timeout=PATIENCE_S)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, bodies))
    assert [answer.content == body for answer, body in zip(answers, bodies, strict=True)] == [
        True
    ] * 8


def test_an_answer_that_no_front_knows_is_told_as_json(server: Server) -> None:
    """A class of an operator's own stays with the engine; what it is as JSON does not."""
    with ThreadPoolExecutor(8) as pool:
        bodies = [b"odd", b"even"] * 8
        asked = [pool.submit(server.client.post, "/flows/word", content=body) for body in bodies]
        answers = [one.result() for one in asked]
    assert [answer.json() for answer in answers] == ["odd", "even"] * 8


def test_an_error_of_an_operators_own_is_told_as_it_is(server: Server) -> None:
    """No front knows its class, and yet it has its code, its status and its words."""
    response = server.client.post("/flows/judge", content=b"joke")
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["message"]) == ("not-funny", "that joke is old")
    assert error["stage"] == "ops.judge"
    assert "Traceback" not in server.errors


def test_an_answer_that_cannot_be_sent_fails_alone(folder: Path) -> None:
    """It is an internal error, and those answered together with it are answered."""
    echo = write(folder / "echo.flow", "pass\n")
    code = f"""
import sys, flowlang
from flowlang.runtime import host
from flowlang.serve import serve
host._MAKERS["pass"] = lambda node, settings: lambda data: object() if data == b"odd" else data
sys.exit(serve(lambda: flowlang.load({str(echo)!r}), "127.0.0.1", 0, fronts=2))
"""
    with running(folder, "-c", code) as server, ThreadPoolExecutor(8) as pool:
        server.wait_ready()
        bodies = [b"odd", b"even"] * 16
        asked = [pool.submit(server.client.post, "/", content=body) for body in bodies]
        answers = [one.result() for one in asked]
        assert "Traceback" in server.errors
    assert [answer.status_code for answer in answers] == [500, 200] * 16
    assert answers[0].json()["error"]["message"] == "internal error"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/flows/held", b"[1, 2, 3]"), ("/v2/models/held/infer", INFERENCE)],
)
def test_who_hangs_up_is_cancelled_in_the_engine(server: Server, path: str, body: bytes) -> None:
    """Long before its batch is formed, whatever it was that was asked."""
    connections = [server.connect() for _ in range(10)]
    for connection in connections:
        connection.post(path, body)
    wait_until(lambda: inside(server, "held") == 10)
    for connection in connections[:7]:
        connection.close()
    wait_until(lambda: inside(server, "held") == 3)
    for connection in connections[7:]:
        connection.close()
    wait_until(lambda: inside(server, "held") == 0)


# Ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_is_one_signal(folder: Path, number: signal.Signals) -> None:
    """As systemd stops a service, and Ctrl-C a terminal's programs: nothing is lost."""
    with ingesting(folder) as server:
        found = processes(server)
        with ThreadPoolExecutor(16) as pool:
            bodies = [b"2", b"2.0", b"2.00"]  # so long that all are inside at once
            asked = [pool.submit(_ask_slowly, server, body) for body in bodies]
            server.wait_inside(3)
            for pid in (*found.all, server.process.pid):
                os.kill(pid, number)
            assert [one.result() for one in asked] == bodies
        assert server.wait() == 0
        assert server.errors == ""
    wait_gone(*found.all)


def _ask_slowly(server: Server, body: bytes) -> bytes:
    return httpx.post(f"{server.url}/flows/slow", content=body, timeout=PATIENCE_S).content


def test_a_second_signal_leaves_no_process(folder: Path) -> None:
    """It ends all of them at once, with status 1."""
    with ingesting(folder) as server, server.connect() as connection:
        found = processes(server)
        connection.post("/flows/slow", b"60")
        server.wait_inside(1)
        server.signal()
        wait_until(lambda: server.health()["status"] == "draining")
        server.signal()
        assert server.wait() == 1
    wait_gone(*found.all)


def test_without_its_supervisor_all_end(folder: Path) -> None:
    """They answer what they have, and leave neither a process nor a file."""
    with ingesting(folder) as server, ThreadPoolExecutor(1) as pool:
        found = processes(server)
        asked = pool.submit(_ask_slowly, server, b"0.5")
        server.wait_inside(1)
        place = _socket_of(server).parent
        assert place.exists()
        server.process.kill()
        assert asked.result() == b"0.5"
        wait_gone(*found.all)
        assert not place.exists()


def test_all_protocols_are_refused_at_once_and_answered_to_the_end(folder: Path) -> None:
    """While a front still answers, gRPC lets nothing in; while gRPC does, HTTP is not listened to.

    The end comes when both are done, and what they had let in is answered.
    """
    grpc_port = free_port()
    with (
        ingesting(folder, "--grpc-port", str(grpc_port)) as server,
        triton.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client,
        ThreadPoolExecutor(2) as pool,
    ):
        over_http = pool.submit(_ask_slowly, server, b"0.8")
        server.wait_inside(1)
        server.signal()
        wait_until(lambda: not _is_let_in(client))
        assert not over_http.done()
        assert over_http.result() == b"0.8"
        assert server.wait() == 0
    with (
        ingesting(folder, "--grpc-port", str(grpc_port)) as server,
        triton.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client,
        ThreadPoolExecutor(2) as pool,
    ):
        over_grpc: Future[triton.InferResult] = pool.submit(
            client.infer, "slow", bytes_by_grpc(b"0.8")
        )
        wait_until(lambda: inside(server, "slow") == 1)
        server.signal()
        wait_until(lambda: not _is_listening(server.port))
        assert not over_grpc.done()
        assert over_grpc.result().as_numpy("output").tolist() == [b"0.8"]
        assert server.wait() == 0


def _is_let_in(client: triton.InferenceServerClient) -> bool:
    try:
        client.infer("echo", bytes_by_grpc(b"x"))
    except triton.InferenceServerException as error:
        return bool(error.status() != "StatusCode.UNAVAILABLE")
    return True


def _is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
    except ConnectionRefusedError:
        return False
    return True
