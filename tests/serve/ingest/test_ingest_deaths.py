"""`flowlang serve --ingest` where a process dies or stands still: who notices, and for how long."""

from __future__ import annotations

import json
import resource
import select
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.asking import counted
from tests.serve.ingesting import INFERENCE, ingesting, inside
from tests.serve.processes import kill, memory_bytes, processes
from tests.serve.server import (
    PATIENCE_S,
    Raw,
    Server,
    running,
    serving,
    wait_until,
    write,
)


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
    wait_until(lambda: inside(server, "held") == 13)
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


def _late(server: Server) -> float:
    """How many requests of all flows were late."""
    return counted(server, "flowlang_requests_total", code="deadline-exceeded")


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
    assert inside(server, "held") == 0
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
        wait_until(
            lambda: counted(server, "flowlang_requests_total", code="overloaded") == counts[429]
        )
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
