"""`flowlang serve --ingest`: what dies with what, and what nobody notices."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import tritonclient.grpc as triton

from tests.serve.asking import bytes_by_grpc
from tests.serve.processes import kill, memory_bytes, processes, wait_gone
from tests.serve.server import (
    PATIENCE_S,
    Raw,
    Server,
    free_port,
    running,
    serving,
    wait_until,
    write,
    write_flows,
)

OPERATORS = """
import ctypes, time

from flowlang import BadRequest

class Word(str):
    pass

class NotFunny(BadRequest):
    code = "not-funny"
    http_status = 422

def judge(joke: bytes) -> bytes:
    raise NotFunny("that joke is old")

def slow(seconds: bytes) -> bytes:
    time.sleep(float(seconds))
    return seconds

def hold(seconds: bytes) -> bytes:
    ctypes.PyDLL(None).sleep(int(seconds))  # with the lock of the interpreter
    return seconds

def word(data: bytes) -> str:
    return Word(data.decode()) if data.startswith(b"odd") else data.decode()
"""
FLOWS = """
use "operators.py" as ops
export flow echo = pass
export flow slow = ops.slow
export flow hold = ops.hold
export flow word = ops.word
export flow judge = ops.judge
schedule { echo(queue=1000) }
"""
HOLDING = FLOWS + 'export flow held = trt("identity.onnx", batch=1..64, wait=60s)\n'
TOKEN = "the-token-of-both"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
TENSOR = {"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
INFERENCE = json.dumps({"inputs": [TENSOR]}).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flows")
    write_flows(folder)
    write(folder / "operators.py", OPERATORS)
    write(folder / "light.flow", FLOWS)
    write(folder / "holding.flow", HOLDING)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server that the tests leave whole, if not with the same processes."""
    with ingesting(folder, file="holding.flow") as server:
        yield server


@contextmanager
def ingesting(folder: Path, *options: str, file: str = "light.flow") -> Iterator[Server]:
    command = ("--ingest", "2", "--device", "cpu", *options, str(folder / file))
    with serving(folder, *command) as server:
        yield server.wait_ready()


def wait_serving(server: Server) -> None:
    """Wait until every front lets requests in: the kernel picks one for each connection."""

    def is_ready() -> bool:
        with server.connect() as connection:
            connection.send("GET /health/ready HTTP/1.1\r\nHost: test\r\n\r\n")
            return connection.answer()[0] == 200

    wait_until(lambda: all(is_ready() for _ in range(12)))


def spread(server: Server, fronts: tuple[int, ...]) -> dict[int, list[Raw]]:
    """Connections by the front that has them, some to each. It is the kernel that chooses."""
    made = [server.connect() for _ in range(24)]
    for connection in made:
        connection.post("/flows/echo", b"")  # once it is answered, a front has it
        assert connection.answer()[0] == 200
    by_port = {connection.socket.getsockname()[1]: connection for connection in made}
    found: dict[int, list[Raw]] = {}
    for pid in fronts:
        others = [c.raddr.port for c in psutil.Process(pid).net_connections("tcp") if c.raddr]
        found[pid] = [by_port[port] for port in others if port in by_port]
    assert all(found.values()), "the kernel gave all connections to one front"
    return found


def close(found: dict[int, list[Raw]]) -> None:
    for connections in found.values():
        for connection in connections:
            connection.close()


@contextmanager
def asking(server: Server, clients: int = 6) -> Iterator[Counter[str]]:
    """Clients that go on asking meanwhile. What they were told is counted, by its code."""
    told: Counter[str] = Counter()
    stop = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
            while not stop.is_set():
                body = f"{number} {time.monotonic_ns()}".encode()
                try:
                    response = client.post("/flows/echo", content=body)
                except httpx.TransportError as error:
                    told[type(error).__name__] += 1
                    continue
                if response.status_code == 200:
                    told["right" if response.content == body else "wrong"] += 1
                else:
                    told[response.json()["error"]["code"]] += 1

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(ask, number) for number in range(clients)]
        try:
            yield told
        finally:
            stop.set()
        for one in asked:
            one.result()


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
    wait_until(lambda: _inside(server, "held") == 10)
    for connection in connections[:7]:
        connection.close()
    wait_until(lambda: _inside(server, "held") == 3)
    for connection in connections[7:]:
        connection.close()
    wait_until(lambda: _inside(server, "held") == 0)


def _inside(server: Server, flow: str) -> int:
    """How many requests of a flow the engine has."""
    metrics = server.client.get("/metrics").text
    found = re.search(f'^flowlang_requests_inside{{flow="{flow}"}} (.+)', metrics, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def _late(server: Server) -> int:
    """How many requests of all flows were late."""
    return _counted(server, "deadline-exceeded")


def _counted(server: Server, code: str) -> int:
    """How many requests of all flows had this outcome."""
    metrics = server.client.get("/metrics").text
    found = re.findall(f'^flowlang_requests_total{{code="{code}",.*}} (.+)', metrics, re.MULTILINE)
    return int(sum(map(float, found)))


# A front that is killed


def test_a_killed_front_takes_its_own_connections_with_it(server: Server) -> None:
    """The others go on, requests through the other front are answered, and it is replaced."""
    before = processes(server)
    victim, other = before.fronts
    found = spread(server, before.fronts)
    kill(victim)
    for connection in found[victim]:
        connection.wait_closed()
    for connection in found[other]:
        connection.post("/flows/echo", b"still here")
        assert connection.answer()[2] == b"still here"
    after = processes(server)
    assert after.engine == before.engine
    assert other in after.fronts
    assert victim not in after.fronts
    assert "front" in server.errors
    close(found)


def test_who_waits_for_a_killed_front_is_served_by_the_next(server: Server) -> None:
    """Connections that the kernel has taken for it are not lost with it."""
    before = processes(server)
    for front in before.fronts:
        psutil.Process(front).suspend()
    connections = [server.connect() for _ in range(12)]
    for connection in connections:
        connection.post("/flows/echo", b"patience")
    for front in before.fronts:
        kill(front)
    assert [connection.answer()[2] for connection in connections] == [b"patience"] * 12
    for connection in connections:
        connection.close()
    assert not {*before.fronts} & {*processes(server).fronts}


def test_a_front_that_cannot_be_started_is_started_later(folder: Path) -> None:
    """Where the machine has no room for a process just then, the others go on, and it is told."""
    with ingesting(folder) as server:
        before = processes(server)
        watching = server.process.pid
        limits = resource.prlimit(watching, resource.RLIMIT_NOFILE)
        resource.prlimit(watching, resource.RLIMIT_NOFILE, (3, limits[1]))
        kill(before.fronts[0])
        wait_until(lambda: "front 0 cannot be started: Too many open files" in server.errors)
        with ExitStack() as opened:  # some are left to the kernel, which waits for the next front
            connections = [opened.enter_context(server.connect()) for _ in range(12)]
            for connection in connections:
                connection.post("/flows/echo", b"patience")
            resource.prlimit(watching, resource.RLIMIT_NOFILE, limits)
            assert [c.answer()[2] for c in connections] == [b"patience"] * 12
        after = processes(server)
        assert (after.engine, before.fronts[1] in after.fronts) == (before.engine, True)
        assert "Traceback" not in server.errors


def test_an_engine_without_file_descriptors_takes_fronts_later(folder: Path) -> None:
    """It looks for one every second, and not at full speed."""
    with ingesting(folder) as server:
        before = processes(server)
        limits = resource.prlimit(before.engine, resource.RLIMIT_NOFILE)
        resource.prlimit(before.engine, resource.RLIMIT_NOFILE, (3, limits[1]))
        began_s = time.monotonic()
        kill(before.fronts[0])
        told = "a connection cannot be taken: Too many open files"
        wait_until(lambda: told in server.errors)
        time.sleep(0.5)
        assert server.errors.count(told) <= time.monotonic() - began_s + 1
        resource.prlimit(before.engine, resource.RLIMIT_NOFILE, limits)
        wait_serving(server)
        assert processes(server).engine == before.engine


def test_a_front_that_has_no_memory_for_the_engine_says_so(folder: Path) -> None:
    """Once, where the server would be loading without a word."""
    code = f"""
import resource, sys, flowlang
from flowlang.serve import serve
resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 20, 50 << 20))
load = lambda: flowlang.load({str(folder / "light.flow")!r}, device="cpu")
sys.exit(serve(load, "127.0.0.1", 0, fronts=1))
"""
    with running(folder, "-c", code) as server:
        told = "flowlang: no way to the engine: File too large\n"
        wait_until(lambda: server.errors == told)
        assert server.health()["status"] == "loading"
        assert server.errors == told


# An engine that is killed


def test_a_killed_engine_is_started_again(server: Server) -> None:
    """Who waited for it gets 503, it is not ready meanwhile, and the fronts stay."""
    before = processes(server)
    connections = [server.connect() for _ in range(12)]
    for connection in connections:
        connection.post("/flows/held", b"[1, 2, 3]")
    asked = server.connect()
    asked.post("/v2/models/held/infer", INFERENCE)
    wait_until(lambda: _inside(server, "held") == 13)
    supervisor = psutil.Process(server.process.pid)
    supervisor.suspend()  # so that there is no other engine yet
    kill(before.engine)
    for connection in connections:
        status, headers, body = connection.answer()
        assert (status, json.loads(body)["error"]["code"]) == (503, "restarting")
        assert headers["retry-after"] == "1"
        connection.close()
    status, headers, body = asked.answer()
    assert (status, headers["retry-after"]) == (503, "1")
    assert "started again" in json.loads(body)["error"]
    asked.close()
    assert server.client.get("/health/ready").status_code == 503
    assert server.client.get("/v2/health/ready").status_code == 503
    assert server.client.get("/health/live").status_code == 200
    refused = server.client.post("/flows/echo", content=b"x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    assert server.client.get("/flows").status_code == 503
    assert server.client.get("/").status_code == 200
    supervisor.resume()
    wait_serving(server)
    assert server.client.post("/flows/echo", content=b"again").content == b"again"
    after = processes(server)
    assert after.engine != before.engine
    assert set(after.fronts) == set(before.fronts)


def test_fronts_outlive_many_engines(folder: Path) -> None:
    """Killed six times under load: every answer is right or says so, and no front grows."""
    with ingesting(folder) as server:
        before = processes(server)
        sizes: list[int] = []
        with asking(server, 3) as told:
            for _ in range(6):
                right = told["right"]
                kill(processes(server).engine)
                wait_serving(server)
                wait_until(lambda right=right: told["right"] > right + 50)  # type: ignore[misc]
                sizes.append(sum(map(memory_bytes, before.fronts)))
        assert set(told) <= {"right", "restarting", "loading"}
        assert set(processes(server).fronts) == set(before.fronts)
        assert max(sizes[3:]) < max(sizes[:3]) + (8 << 20)
        server.signal()
        assert server.wait() == 0


def test_a_restarted_engine_serves_what_the_file_says_now(tmp_path: Path) -> None:
    """With --watch a version that had taken over is not undone."""
    flow = write(tmp_path / "tell.flow", "export flow first = pass\n")
    with serving(tmp_path, "--ingest", "2", "--watch", "--device", "cpu", str(flow)) as server:
        server.wait_ready()
        write(flow, "export flow second = pass\n")
        server.line("reloaded: second")
        kill(processes(server).engine)
        server.line("loading, on ")
        server.line("serving second on ")
        assert server.client.post("/flows/second", content=b"x").content == b"x"
        assert server.client.post("/flows/first", content=b"x").status_code == 404


# An engine that is stopped, or held up


@contextmanager
def stopped(engine: int) -> Iterator[None]:
    """A process that the kernel lets do nothing meanwhile."""
    process = psutil.Process(engine)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@pytest.mark.parametrize(
    ("path", "body"), [("/flows/echo", b"x"), ("/v2/models/held/infer", INFERENCE)]
)
def test_a_deadline_is_kept_without_the_engine(server: Server, path: str, body: bytes) -> None:
    """Stopped, it looks at none; and once it goes on it works for nobody who has been told."""
    headers = {"X-Deadline-Ms": "300"}
    before = _late(server)
    with stopped(processes(server).engine):
        began_s = time.monotonic()
        late = server.client.post(path, content=body, headers=headers)
        assert 0.3 <= time.monotonic() - began_s < 2
    assert late.status_code == 504
    assert "not answered by its deadline" in late.text
    assert server.client.post("/flows/echo", content=b"on").content == b"on"
    assert _inside(server, "held") == 0
    wait_until(lambda: _late(server) == before + 1)


def test_a_deadline_is_kept_while_an_operator_holds_the_interpreter(folder: Path) -> None:
    """No thread of the engine runs meanwhile, that of its deadlines included."""
    with ingesting(folder) as server, ThreadPoolExecutor(1) as pool:
        holding = pool.submit(server.client.post, "/flows/hold", content=b"4")
        server.wait_inside(1)
        began_s = time.monotonic()
        late = httpx.post(f"{server.url}/flows/echo", headers={"X-Deadline-Ms": "300"})
        assert time.monotonic() - began_s < 2
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline-exceeded")
        assert holding.result().content == b"4"
        assert server.client.post("/flows/echo", content=b"on").content == b"on"


def test_who_has_an_engine_that_reads_nothing_is_not_ready(server: Server) -> None:
    """After a few seconds, in both protocols; and it is again once the engine goes on."""

    def ready() -> tuple[int, str, int]:
        health = server.client.get("/health/ready")
        return (
            health.status_code,
            health.json()["status"],
            server.client.get("/v2/health/ready").status_code,
        )

    assert ready() == (200, "ready", 200)
    with stopped(processes(server).engine):
        began_s = time.monotonic()
        wait_until(lambda: ready() == (503, "stalled", 503))
        assert 2 < time.monotonic() - began_s < 8
        assert server.client.get("/health/live").status_code == 200
    wait_until(lambda: ready() == (200, "ready", 200))


def test_what_an_engine_does_not_read_is_refused(folder: Path) -> None:
    """Once the ring and a little more are full; those that were taken are answered in the end."""
    with ingesting(folder, "--ingest", "1") as server, ExitStack() as opened:
        found = processes(server, fronts=1)
        connections = [opened.enter_context(server.connect()) for _ in range(300)]
        before = memory_bytes(found.fronts[0])
        with stopped(found.engine):
            for number, connection in enumerate(connections):
                connection.post("/flows/echo", bytes([number % 256]) * 1_000_000)
            last = connections[-1].socket  # refused at once, as soon as the front has read it
            wait_until(lambda: bool(select.select([last], [], [], 0)[0]))
            wait_until(lambda: server.health()["requests"] < 120)
            grown = memory_bytes(found.fronts[0]) - before
        answers = [connection.answer() for connection in connections]
        assert server.client.post("/flows/echo", content=b"on").content == b"on"
        counts = Counter(status for status, _, _ in answers)
        wait_until(lambda: _counted(server, "overloaded") == counts[429])
    assert set(counts) == {200, 429}
    assert 60 < counts[200] < 120
    for number, (status, headers, body) in enumerate(answers):
        if status == 200:
            assert body == bytes([number % 256]) * 1_000_000
        else:
            assert (headers["retry-after"], json.loads(body)["error"]["code"]) == (
                "1",
                "overloaded",
            )
    assert grown < 450 << 20


# Ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_is_one_signal(folder: Path, number: signal.Signals) -> None:
    """As systemd stops a service, and Ctrl-C a terminal's programs: nothing is lost."""
    with ingesting(folder) as server:
        found = processes(server)
        with ThreadPoolExecutor(16) as pool:
            bodies = [b"0.3", b"0.30", b"0.300"]
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
        folders = {
            Path(connected.laddr).parent
            for connected in psutil.Process(found.engine).net_connections("unix")
            if connected.laddr
        }
        assert all(folder.exists() for folder in folders)
        server.process.kill()
        assert asked.result() == b"0.5"
        wait_gone(*found.all)
        assert not any(folder.exists() for folder in folders)


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
        wait_until(lambda: _inside(server, "slow") == 1)
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


def test_an_engine_that_keeps_ending_is_no_hindrance(folder: Path) -> None:
    """While it is paused for, a front is started again at once, and a signal ends all."""
    gate = folder / "gate-ends"
    code = f"""
import os, signal, sys, flowlang
from flowlang.serve import serve
def load():
    if os.path.exists({str(gate)!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    return flowlang.load({str(write(folder / "echo.flow", "pass"))!r}, device="cpu")
sys.exit(serve(load, "127.0.0.1", 0, fronts=2))
"""
    with running(folder, "-c", code) as server:
        server.wait_ready()
        before = processes(server)
        gate.touch()
        kill(before.engine)
        wait_until(lambda: server.errors.count("it is started again") >= 5)
        kill(before.fronts[0])
        wait_until(lambda: server.health()["status"] == "loading")
        server.signal()
        began_s = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - began_s < 3
