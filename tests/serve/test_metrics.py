"""What a server counts, read as Prometheus reads it."""

from __future__ import annotations

import gc
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import flowlang
from examples import models
from flowlang.runtime.metrics import FlowCounts, Histogram, StageCounts
from flowlang.serve.metrics import Counts, metrics_text
from tests.pictures import photographs
from tests.serve.asking import counted
from tests.serve.certificates import make_pair
from tests.serve.server import (
    KINDS,
    Server,
    head,
    refused,
    serving,
    wait_until,
    write_flows,
)

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


def test_each_item_of_a_request_is_counted(server: Server) -> None:
    """A form, or tensors of several items, count as often as there are items that a flow saw."""

    def counts(flow: str) -> list[float]:
        codes = ("ok", "bad-request", "cancelled")
        found = [counted(server, "flowlang_requests_total", flow=flow, code=c) for c in codes]
        return [*found, counted(server, "flowlang_request_seconds_count", flow=flow)]

    def added(flow: str, before: list[float]) -> list[float]:
        wait_until(lambda: counted(server, "flowlang_requests_inside", flow=flow) == 0)
        return [now - then for now, then in zip(counts(flow), before, strict=True)]

    before = counts("classify")
    parts = [
        ("file", (name, PICTURE[:size])) for name, size in (("a", None), ("b", 9), ("c", None))
    ]
    assert server.client.post("/flows/classify", files=parts).status_code == 200
    assert added("classify", before) == [2, 1, 0, 3]
    before = counts("same")
    several = {**TENSOR, "shape": [3, 3], "data": [1.0] * 9}
    assert server.client.post(INFER, json={"inputs": [several]}).status_code == 200
    assert added("same", before) == [3, 0, 0, 3]
    # Where one fails the other is given up, unless it was answered before that was known.
    before = counts("classify")
    texts = {"name": "input", "datatype": "BYTES", "shape": [2], "data": ["no picture", ""]}
    failing = server.client.post("/v2/models/classify/infer", json={"inputs": [texts]})
    assert failing.status_code == 400
    ok, bad, cancelled, all_told = added("classify", before)
    assert (ok, bad + cancelled, all_told) == (0, 2, 2)
    assert bad >= 1


INFER = "/v2/models/same/infer"
TENSOR = {"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}


def _sent(path: str = "/flows/same", body: Any = None, **headers: str) -> httpx.Request:
    content = body if isinstance(body, bytes) else json.dumps(body or [1, 2, 3]).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Request("POST", f"http://test{path}", content=content, headers=names)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (_sent(x_deadline_ms="soon"), "bad-request"),
        (_sent(x_priority="first"), "bad-request"),
        (_sent(body=b"[1, 2"), "bad-request"),
        (_sent(body=[1, 2]), "bad-request"),
        (_sent("/flows/same?k=3"), "bad-request"),
        (_sent(body=b"?", content_type="multipart/form-data; boundary=x"), "bad-request"),
        (_sent(body=b" " * (17 << 20)), "too-large"),
        (_sent(content_encoding="gzip"), "unsupported-encoding"),
        (_sent(INFER, b"{"), "bad-request"),
        (_sent(INFER, {"inputs": [TENSOR | {"shape": [3]}]}), "bad-request"),
        (_sent(INFER, {"inputs": [TENSOR], "parameters": {"k": 3}}), "bad-request"),
        (_sent(INFER, {"inputs": [TENSOR]}, x_deadline_ms="soon"), "bad-request"),
        (_sent(INFER, b"x", content_encoding="br"), "unsupported-encoding"),
        (_sent(INFER, {"inputs": [TENSOR]}), "ok"),
    ],
)
def test_each_request_is_counted_once(server: Server, request_: httpx.Request, code: str) -> None:
    """Whatever it is refused for, and whether its flow has seen it or not."""

    def counts() -> dict[str, float]:
        names = ("ok", "bad-request", "too-large", "unsupported-encoding")
        return {
            name: counted(server, "flowlang_requests_total", flow="same", code=name)
            for name in names
        }

    before = counts()
    path, headers = request_.url.raw_path.decode(), dict(request_.headers)
    headers.pop("host")
    response = server.client.post(path, content=request_.content, headers=headers)
    assert (response.status_code == 200) == (code == "ok")
    # A front tells the engine, which tells the metrics.
    wait_until(lambda: counts() == before | {code: before[code] + 1})


def test_a_body_that_is_too_large_is_counted(server: Server) -> None:
    """One that is refused unread is counted all the same, over both protocols."""
    for path in ("/flows/same", INFER):
        before = counted(server, "flowlang_requests_total", flow="same", code="too-large")
        with server.connect() as connection:
            connection.send(head(path, 10**12))
            assert connection.answer()[0] == 413
        wait_until(
            lambda before=before: (  # type: ignore[misc]
                counted(server, "flowlang_requests_total", flow="same", code="too-large")
                == before + 1
            )
        )


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/nothing", "not-found"),
        ("POST", "/flows/nothing", "not-found"),
        ("PUT", "/flows/same", "wrong-method"),
        ("DELETE", "/metrics", "wrong-method"),
        ("GET", "/v2/models/nothing", "not-found"),
        ("POST", "/v2/models/nothing/infer", "not-found"),
        ("POST", "/v2/models/same/versions/2/infer", "not-found"),
        ("GET", "/v2/models/same/infer", "wrong-method"),
        ("POST", "/v2/repository/models/same/load", "off"),
    ],
)
def test_what_is_of_no_flow_is_counted_when_refused(
    server: Server, method: str, path: str, code: str
) -> None:
    """Whatever was asked for: each is one more of its code, and none of any flow."""

    def counts() -> tuple[float, float, float]:
        return (
            counted(server, "flowlang_refusals_total", code=code),
            counted(server, "flowlang_refusals_total"),
            counted(server, "flowlang_requests_total"),
        )

    before = counts()
    assert server.client.request(method, path).status_code >= 400
    wait_until(lambda: counts() == (before[0] + 1, before[1] + 1, before[2]))


@pytest.mark.parametrize("path", ["/flows/same", INFER])
@pytest.mark.parametrize(
    ("sent", "code"), [(head("{}", 9) + "1", "cancelled"), (None, "bad-request")]
)
def test_a_body_that_breaks_off_is_counted(
    server: Server, path: str, sent: str | None, code: str
) -> None:
    """Where its client hangs up as cancelled, and where it turns into what is none as that."""
    chunked = "POST {} HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n"

    def count() -> float:
        return counted(server, "flowlang_requests_total", flow="same", code=code)

    before = count()
    with server.connect() as connection:
        connection.send((sent or chunked).format(path))
    wait_until(lambda: count() == before + 1)


def test_a_late_request_is_counted_as_late(server: Server) -> None:
    """A deadline that passes is an outcome of its own; its time counts from the body's end."""
    held = {"flow": "held"}
    server.client.post("/flows/held", json=[1, 2, 3], headers={"X-Deadline-Ms": "60"})
    assert counted(server, "flowlang_requests_total", code="deadline-exceeded", **held) == 1
    assert counted(server, "flowlang_request_seconds_sum", **held) >= 0.05


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
        assert server.client.get("/metrics").status_code == 401
        there = httpx.get(url)
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


def test_what_ended_flows_counted_is_one_sum(tmp_path: Path) -> None:
    """However often flows take over: no count is lost, and none is kept for each time."""

    def told(name: str) -> float:
        text = metrics_text(counts, "ready", {}).decode()
        families = text_string_to_metric_families(text)
        return sum(s.value for f in families for s in f.samples if s.name == name)

    def kept() -> int:
        gc.collect()
        gc.collect()  # what the first has finalized
        counts.total()
        return sum(isinstance(found, (FlowCounts, StageCounts)) for found in gc.get_objects())

    (tmp_path / "size.flow").write_text("flow tell = decode -> size\n")
    counts, most = Counts(), 0
    before = kept()
    for times in range(1, 11):
        with flowlang.load(tmp_path / "size.flow", device="cpu") as app:
            counts.follow(app)
            app(PICTURE)
            with pytest.raises(flowlang.BadRequest):
                app(b"no picture")
            assert told("flowlang_requests_total") == 2 * times
        assert told("flowlang_request_seconds_count") == 2 * times
        assert told("flowlang_stage_batch_size_sum") == 2 * times
        assert told("flowlang_stage_failures_total") == times
        assert told("flowlang_stage_wait_seconds_count") == 2 * times
        most = max(most, kept() - before)
    assert most < 10  # two of the app there is, of the sum, and of an app that is just ending
