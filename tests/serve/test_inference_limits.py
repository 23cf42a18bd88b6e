"""The Open Inference Protocol over HTTP under way: deadlines, full queues, clients that hang up."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import flowlang
from flowlang.serve.routes import Service
from tests.serve.asking import ask_application, infer, one_row
from tests.serve.server import PATIENCE_S, Server


@pytest.mark.parametrize("by", ["parameter", "header"])
def test_a_deadline_is_kept(server: Server, by: str) -> None:
    """The parameter `timeout` (microseconds) and the header both give 504 in time."""
    body = {"inputs": [one_row()]} | ({"parameters": {"timeout": 50_000}} if by != "header" else {})
    headers = {"X-Deadline-Ms": "50"} if by == "header" else {}
    start_s = time.monotonic()
    response = server.client.post("/v2/models/held/infer", json=body, headers=headers)
    assert response.status_code == 504
    assert 0.05 <= time.monotonic() - start_s < 5
    server.wait_inside(0)


def test_a_timeout_of_centuries_is_one(server: Server) -> None:
    """The most that a client can say is granted, and those behind it keep their deadlines."""
    body = {"inputs": [one_row()], "parameters": {"timeout": 2**64 - 1}}
    assert server.client.post("/v2/models/same/infer", json=body).status_code == 200
    test_a_deadline_is_kept(server, "header")


def test_a_full_queue_and_too_many_items(server: Server) -> None:
    """More items than a flow may hold are 400; where others fill it, 429 with Retry-After."""
    limit = server.client.get("/v2/models/narrow/config").json()["max_batch_size"]

    def post(count: int) -> httpx.Response:
        tensor = one_row(shape=[count], datatype="BYTES", data=["x"] * count)
        return server.client.post("/v2/models/narrow/infer", json={"inputs": [tensor]})

    over = post(limit + 1)
    assert over.status_code == 400
    assert f"a request has 1 to {limit}" in over.json()["error"]
    with ThreadPoolExecutor(2) as pool:
        answers = [*pool.map(post, [limit, limit])]
    assert sorted(a.status_code for a in answers) == [200, 429]
    full = next(a for a in answers if a.status_code == 429)
    assert full.headers["retry-after"] == "1"


def test_who_hangs_up_is_left_out_of_the_batch(server: Server) -> None:
    """A batch of 64 waits for its last item: one whose client is gone is not counted."""
    body = json.dumps({"inputs": [one_row()]}).encode()
    with server.connect() as connection:
        connection.post("/v2/models/held/infer", body)
        server.wait_inside(1)
    server.wait_inside(0)
    many = one_row(shape=[63, 3], data=[0] * 189)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(infer, server, "held", inputs=[many])
        server.wait_inside(1)
        time.sleep(0.3)
        assert not first.done()
        assert infer(server, "held").status_code == 200
        assert first.result(PATIENCE_S).status_code == 200


def test_loading_and_draining(folder: Path) -> None:
    """Before the flows are loaded and once the server stops, it is live, not ready, and says so."""
    service = Service()

    def get(path: str, **body: Any) -> httpx.Response:
        return ask_application(service, "POST" if body else "GET", path, **body)

    def states() -> list[int]:
        paths = ("health/live", "health/ready", "models/double/ready", "models/double")
        found = [get(f"/v2/{path}").status_code for path in paths]
        return [*found, get("/v2/models/double/infer", json={}).status_code]

    assert states() == [200, 503, 503, 503, 503]
    with flowlang.load(folder / "types.flow") as app:
        service.let_in(app)
        assert states() == [200, 200, 200, 200, 400]
        service.refuse()
        assert states() == [200, 503, 503, 200, 503]
