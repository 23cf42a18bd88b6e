"""What is asked first is not always answered first: priorities of requests and of flows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http

import flowlang
from flowlang.diagnostics import BadRequest
from tests.serve.server import KINDS, PATIENCE_S, Server, free_port, serving, wait_until

FLOWS = """
use "turns.py" as turns
flow turn = turns.turn
export flow normal = turn
export flow last = turn
schedule { last(priority=low) }
"""
# One instance, which says how many calls came before each. A path keeps it busy until it is there.
TURNS = """
import itertools, os, time

turns = itertools.count()

def turn(item: bytes) -> int:
    while item.startswith(b"/") and not os.path.exists(item):
        time.sleep(0.01)
    return next(turns)
"""
Ask = Callable[[], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    (folder / "turns.flow").write_text(FLOWS)
    (folder / "turns.py").write_text(TURNS)
    return folder


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module", params=KINDS)
def server(folder: Path, grpc_port: int, request: pytest.FixtureRequest) -> Iterator[Server]:
    options = ["--device", "cpu", "--grpc-port", str(grpc_port)]
    with serving(folder, *request.param, str(folder / "turns.flow"), *options) as server:
        yield server.wait_ready()


def told(server: Server, name: str) -> int:
    """A metric of the operator's stage."""
    lines = server.client.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}{{")]
    return int(float(line.rpartition(" ")[2]))


def order(server: Server, folder: Path, asks: list[Ask]) -> list[int]:
    """In which order requests are served that were made one after the other, all of them waiting.

    Gives the number of each in the order of their turns.
    """
    gate = folder / f"gate-{time.monotonic_ns()}"
    turns: dict[int, int] = {}

    def ask(number: int, ask: Ask) -> None:
        turns[number] = int(ask())

    def post_gate() -> Any:
        return server.client.post("/flows/normal", content=str(gate).encode()).json()

    threads = [threading.Thread(target=ask, args=(-1, post_gate))]
    before = told(server, "flowlang_stage_batch_size_count")
    threads[0].start()
    wait_until(lambda: told(server, "flowlang_stage_batch_size_count") == before + 1)
    for number, each in enumerate(asks):
        threads.append(threading.Thread(target=ask, args=(number, each)))
        threads[-1].start()
        wait_until(lambda number=number: told(server, "flowlang_stage_waiting") == number + 1)  # type: ignore[misc]
    gate.touch()
    for thread in threads:
        thread.join(PATIENCE_S)
    return sorted(set(turns) - {-1}, key=lambda number: turns[number])


def test_the_header_says_who_is_served_first(server: Server, folder: Path) -> None:
    """Of what waits, the lowest X-Priority is first, equals as they came, and 2 where none is."""

    def post(flow: str = "normal", **headers: str) -> Ask:
        return lambda: server.client.post(f"/flows/{flow}", content=b"x", headers=headers).json()

    asks = [
        post(),
        post(**{"X-Priority": "3"}),
        post(**{"X-Priority": "0"}),
        post(**{"X-Priority": "1"}),
        post(**{"X-Priority": "700"}),
        post(**{"X-Priority": "1"}),
        post(**{"X-Priority": "2"}),
        post("last"),
        post("last", **{"X-Priority": "1"}),
    ]
    assert order(server, folder, asks) == [3, 5, 8, 0, 2, 6, 1, 7, 4]


def test_tritons_clients_say_who_is_served_first(
    server: Server, folder: Path, grpc_port: int
) -> None:
    """The protocol's parameter `priority` does, over HTTP and over gRPC."""

    def infer(triton: Any, port: int, priority: int) -> Ask:
        def ask() -> Any:
            sent = triton.InferInput("input", [1], "BYTES")
            sent.set_data_from_numpy(np.array([b"x"], object))
            with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
                return client.infer("normal", [sent], priority=priority).as_numpy("output")[0]

        return ask

    def raw(priority: str) -> Ask:
        headers = {"Inference-Header-Content-Length": "0", "X-Priority": priority}

        def ask() -> Any:
            path = "/v2/models/normal/infer"
            response = server.client.post(path, content=b"x", headers=headers)
            start = int(response.headers["Inference-Header-Content-Length"])
            return int.from_bytes(response.content[start:], "little")

        return ask

    asks = [
        infer(over_grpc, grpc_port, 0),
        infer(over_http, server.port, 3),
        infer(over_grpc, grpc_port, 1),
        infer(over_http, server.port, 1),
        infer(over_grpc, grpc_port, 3),
        raw("1"),
    ]
    assert order(server, folder, asks) == [2, 3, 5, 0, 1, 4]


@pytest.mark.parametrize("given", ["-1", "high", "1.5", "", "9" * 10])
def test_a_priority_is_a_whole_number(server: Server, given: str) -> None:
    """Anything else is refused, and says what is wanted."""
    response = server.client.post("/flows/normal", content=b"x", headers={"X-Priority": given})
    assert response.status_code == 400
    assert "X-Priority is a whole number" in response.json()["error"]["message"]


@pytest.mark.parametrize("given", [-1, "1", 1.5, True, []])
def test_the_parameter_is_a_whole_number(server: Server, given: Any) -> None:
    """Triton's parameter is refused in the same way."""
    tensor = {"name": "input", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    body = {"inputs": [tensor], "parameters": {"priority": given}}
    response = server.client.post("/v2/models/normal/infer", json=body)
    assert response.status_code == 400
    assert "parameters.priority: a whole number" in response.json()["error"]


def test_python_says_who_is_served_first(folder: Path) -> None:
    """Every way to call a flow takes a priority."""
    gate = folder / "gate-python"
    with flowlang.load(folder / "turns.flow", device="cpu") as app:
        flow = app["normal"]
        held = flow.submit(bytes(gate))
        wait_until(lambda: bool(not app.scheduler.stages[0].batcher.waiting))
        low = flow.submit(b"x", priority=3)
        normal = flow.submit(b"x")
        high = [flow.submit(b"x", priority=1), *[flow.submit(b"x", priority=1)]]
        gate.touch()
        found = [f.result(PATIENCE_S) for f in (held, *high, normal, low)]
        assert found == sorted(found)
        assert flow(b"x", priority=1) == found[-1] + 1
        assert list(flow.map([b"x"] * 2, priority=2)) == [found[-1] + 2, found[-1] + 3]
        with pytest.raises(BadRequest, match="a priority is 1 or more"):
            flow(b"x", priority=-1)
