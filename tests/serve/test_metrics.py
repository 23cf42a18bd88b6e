"""What a server counts, read as Prometheus reads it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from examples import models
from flowlang.runtime.metrics import Histogram
from tests.pictures import photographs
from tests.serve.certificates import make_pair
from tests.serve.server import KINDS, Server, refused, serving, write_flows

PICTURE = photographs(1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and `all.flow`."""
    folder = tmp_path_factory.mktemp("metrics")
    write_flows(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(folder, *request.param, str(folder / "all.flow"), "--device", "cpu") as server:
        yield server.wait_ready()


def counted(server: Server, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    text = server.client.get("/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_requests_are_counted_by_outcome(server: Server) -> None:
    """Each request is one more of its flow and outcome, and one more latency."""
    server.client.post("/flows/classify", content=PICTURE)
    before = counted(server, "flowlang_request_seconds_count", flow="classify")
    for content in (PICTURE, PICTURE, b"no picture"):
        server.client.post("/flows/classify", content=content)
    assert counted(server, "flowlang_requests_total", flow="classify", code="bad-request") == 1
    assert counted(server, "flowlang_requests_total", flow="classify", code="ok") == before + 2
    after = counted(server, "flowlang_request_seconds_count", flow="classify")
    assert after == before + 3
    assert counted(server, "flowlang_requests_inside", flow="classify") == 0


def test_a_late_request_is_counted_as_late(server: Server) -> None:
    """A deadline that passes is an outcome of its own, and the latency is at least the deadline."""
    held = {"flow": "held"}
    server.client.post("/flows/held", json=[1, 2, 3], headers={"X-Deadline-Ms": "60"})
    assert counted(server, "flowlang_requests_total", code="deadline-exceeded", **held) == 1
    assert counted(server, "flowlang_request_seconds_sum", **held) >= 0.06


def test_stages_tell_their_batches_and_their_work(server: Server) -> None:
    """Batches, their sizes, how long they waited and how long instances worked add up."""
    for _ in range(3):
        server.client.post("/flows/classify", content=PICTURE)
    stage = "1 classify"
    batches = counted(server, "flowlang_stage_batch_size_count", stage=stage)
    assert batches >= 3
    assert counted(server, "flowlang_stage_batch_size_sum", stage=stage) >= batches
    assert counted(server, "flowlang_stage_wait_seconds_count", stage=stage) == batches
    assert counted(server, "flowlang_stage_busy_seconds_total", stage=stage) > 0
    assert counted(server, "flowlang_stage_instances", stage=stage) >= 1
    assert counted(server, "flowlang_ready") == 1


def test_metrics_have_a_port_of_their_own(folder: Path) -> None:
    """Who scrapes there needs no token, and finds nothing but /metrics, the same as elsewhere."""
    options = ["--metrics-port", "0", "--device", "cpu"]
    token = {"FLOWLANG_TOKEN": "secret"}
    with serving(folder, str(folder / "all.flow"), *options, environment=token) as server:
        server.wait_ready()
        (url,) = [url for url in server.urls if url.endswith("/metrics")]
        there = httpx.get(url)
        assert server.client.get("/metrics").status_code == 401
        elsewhere = server.client.get("/metrics", headers={"Authorization": "Bearer secret"})
        assert there.text == elsewhere.text
        assert "flowlang_ready 1.0" in there.text
        assert there.headers["content-type"] == elsewhere.headers["content-type"]
        head = httpx.head(url)
        assert (head.status_code, head.content) == (200, b"")
        base = url.removesuffix("/metrics")
        for method, path, status in (
            ("POST", "/metrics", 405),
            ("GET", "/", 404),
            ("GET", "/flows", 404),
            ("POST", "/flows/echo", 404),
            ("GET", "/health/live", 404),
            ("GET", "/v2/health/live", 404),
        ):
            response = httpx.request(method, base + path)
            assert response.status_code == status
            assert response.json()["error"]["code"] in ("wrong-method", "not-found")
        server.signal()
        assert server.wait() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)


def test_metrics_are_told_over_tls(folder: Path) -> None:
    """With a certificate their port speaks TLS as the others do."""
    pair = make_pair(folder, "server")
    trust = ssl.create_default_context(cafile=str(pair.cert))
    options = [*pair.options, "--metrics-port", "0"]
    with serving(folder, str(folder / "all.flow"), *options, trust=trust) as server:
        (url,) = [url for url in server.urls if url.endswith("/metrics")]
        assert url.startswith("https://")
        assert httpx.get(url, verify=trust).status_code == 200


def test_a_metrics_port_in_use_is_told(folder: Path) -> None:
    """A port for metrics that another has ends the server with a sentence."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, told = refused("--metrics-port", str(port), str(folder / "all.flow"))
    assert (status, len(told.splitlines())) == (1, 1)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in told


def test_files_that_share_a_model_share_its_stage(tmp_path: Path) -> None:
    """Of two files that ask one model, the metrics have one stage, at work for both."""
    models.identity(tmp_path / "net.onnx", ("N", 3))
    for name in ("one", "other"):
        (tmp_path / f"{name}.flow").write_text(f'export flow {name} = trt("net.onnx")\n')
    files = [str(tmp_path / f"{name}.flow") for name in ("one", "other")]
    with serving(tmp_path, *files, "--device", "cpu") as server:
        server.wait_ready()
        for name in ("one", "other"):
            assert server.client.post(f"/flows/{name}", json=[1, 2, 3]).json() == [1, 2, 3]
            assert counted(server, "flowlang_requests_total", flow=name, code="ok") == 1
        assert counted(server, "flowlang_stage_batch_size_sum") == 2
        assert counted(server, "flowlang_stage_batch_size_sum", stage="1 net") == 2


def test_a_histogram_counts_a_value_up_to_its_bound() -> None:
    """A value on a bound belongs to it, and what is above all bounds is counted too."""
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(value)
    histogram.add(2.5, times=2)
    assert histogram.counts == [2, 2, 3]
    assert histogram.sum == 19.0
    assert histogram.total == 7
