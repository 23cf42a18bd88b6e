"""Traces of a running server, as a collector gets them, for clients of all kinds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
import thriftpy2.rpc
import tritonclient.grpc as triton

from examples import models
from tests.serve.collector import ERROR, Collector, Span, collecting
from tests.serve.idl import IDL
from tests.serve.processes import kill, processes
from tests.serve.server import (
    KINDS,
    Server,
    free_port,
    refused,
    serving,
    wait_until,
    write,
)

SERVER, INTERNAL = 2, 1  # kinds of spans
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}  # milliseconds until spans are sent

OPERATORS = """
import time

def first(data: bytes) -> bytes:
    return data + b"1"

def second(data: bytes) -> bytes:
    return data + b"2"

def fail(data: bytes) -> bytes:
    raise RuntimeError("it broke")

def slow(data: bytes) -> bytes:
    time.sleep(0.5)
    return data
"""
FLOWS = """
use "ops.py" as ops
export flow echo = pass
export flow chain = ops.first -> ops.second
export flow same = trt("identity.onnx")
export flow held = trt("identity.onnx", batch=4..4, wait=60s)
export flow each: list<tensor<f32, 3>> -> list<tensor<f32, 3>> =
  map(trt("identity.onnx", batch=1..8))
export flow fail = ops.fail
export flow slow = ops.slow
export flow picture = decode
"""


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    models.identity(folder / "identity.onnx", ("N", 3))
    write(folder / "ops.py", OPERATORS)
    return write(folder / "all.flow", FLOWS)


@contextmanager
def traced(flow: Path, url: str, *arguments: str, **environment: str) -> Iterator[Server]:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **SOON, **environment}
    options = (str(flow), "--device", "cpu", "--otel", *arguments)
    with serving(flow.parent, *options, environment=settings) as server:
        yield server.wait_ready()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module", params=KINDS)
def server(flow: Path, collector: Collector, request: pytest.FixtureRequest) -> Iterator[Server]:
    faces = ("--grpc-port", "0", "--thrift-port", "0", "--thrift-flow", "picture")
    logs = ("--log-format=json", "--log-level=info")
    with traced(flow, collector.url, *request.param, *faces, *logs) as server:
        yield server


@pytest.fixture(autouse=True)
def _without_those_before(request: pytest.FixtureRequest) -> None:
    if "collector" in request.fixturenames:
        request.getfixturevalue("collector").spans.clear()


def _only(spans: list[Span], name: str, kind: int = INTERNAL) -> Span:
    (found,) = (span for span in spans if (span.name, span.kind) == (name, kind))
    return found


def _with_items(collector: Collector, count: int) -> list[Span]:
    """The spans of one request, once they tell of so many items.

    Beside each of a stage there is one of a batch; those of several processes come in any order.
    """

    def are_there() -> bool:
        items = [s.attributes.get("flowlang.items", 0) for s in collector.spans]
        whole = 1 + 2 * sum(map(bool, items))
        return sum(items) == count and len(items) == whole

    wait_until(are_there)
    return list(collector.spans)


def test_a_request_goes_on_with_the_trace_of_its_client(
    server: Server, collector: Collector
) -> None:
    """Its span is a server's, below the client's, and has the id that the answer brings.

    What the client says of the trace to others that it knows is said of every span.
    """
    headers = {"traceparent": SAMPLED, "tracestate": "shop=1", "x-request-id": "r-1"}
    answer = server.client.post("/flows/echo", content=b"x", headers=headers)
    spans = collector.wait_for(3)
    assert {(span.trace_id, span.state) for span in spans} == {(TRACE, "shop=1")}
    span = _only(spans, "echo", SERVER)
    assert (span.trace_id, span.parent_id) == (TRACE, PARENT)
    assert span.attributes["flowlang.flow"] == "echo"
    assert span.attributes["flowlang.request_id"] == answer.headers["x-request-id"] == "r-1"
    assert span.attributes["http.request.method"] == "POST"
    assert span.attributes["url.path"] == "/flows/echo"
    assert span.attributes["http.response.status_code"] == 200
    assert span.resource["service.name"] == "flowlang"
    assert "error.type" not in span.attributes


@pytest.mark.parametrize("headers", [{}, {"traceparent": "00-nonsense-01"}])
def test_without_a_trace_of_its_client_it_has_its_own(
    server: Server, collector: Collector, headers: dict[str, str]
) -> None:
    """A header that is none is as good as no header."""
    answer = server.client.post("/flows/echo", content=b"x", headers=headers)
    span = _only(collector.wait_for(3), "echo", SERVER)
    assert span.parent_id == ""
    assert span.trace_id != TRACE
    assert span.attributes["flowlang.request_id"] == answer.headers["x-request-id"]


def test_what_its_client_does_not_follow_is_not_followed(
    server: Server, collector: Collector
) -> None:
    """Unless the sampler says otherwise; the log names the trace all the same."""
    headers = {"traceparent": UNSAMPLED}
    for path in ("/flows/picture", "/v2/models/picture/infer"):
        answer = server.client.post(path, content=b"nothing", headers=headers)
        assert answer.status_code == 400
        assert _line_of(server, answer)["trace_id"] == TRACE
    server.client.post("/flows/echo", content=b"x")
    spans = collector.wait_for(3)
    assert len(spans) == 3
    assert TRACE not in {span.trace_id for span in spans}


def test_stages_are_below_the_request_and_in_its_time(server: Server, collector: Collector) -> None:
    """Each stage that a request goes through has a span, with its wait and its batch."""
    assert server.client.post("/flows/chain", content=b"x").content == b"x12"
    spans = collector.wait_for(5)
    request = _only(spans, "chain", SERVER)
    names = {span.attributes["flowlang.stage"] for span in spans if span is not request}
    assert len(names) == 2
    for name in names:
        stage, batch = _only(spans, name), _only(spans, f"{name} batch")
        assert stage.trace_id == batch.trace_id == request.trace_id
        assert stage.parent_id == batch.parent_id == request.span_id
        assert batch.links == {stage.span_id}
        assert stage.links == {batch.span_id}
        assert stage.attributes["flowlang.batch_size"] == stage.attributes["flowlang.items"] == 1
        waited_ns = stage.attributes["flowlang.wait_s"] * 1e9
        assert batch.start_ns - stage.start_ns == pytest.approx(waited_ns, abs=1e6)
        assert request.start_ns < stage.start_ns <= batch.start_ns < batch.end_ns == stage.end_ns
        assert batch.attributes["flowlang.instance"] == 0


def test_a_batch_is_linked_with_all_its_requests(server: Server, collector: Collector) -> None:
    """Four requests of four traces make one batch, and each of them leads to it."""

    def ask(number: int) -> int:
        with httpx.Client(base_url=server.url, timeout=30.0) as client:
            return client.post("/flows/held", content=f"[{number}, 0, 0]").status_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [200] * 4
    spans = collector.wait_for(9)
    batch = _only(spans, "held batch")
    stages = [span for span in spans if (span.name, span.kind) == ("held", INTERNAL)]
    assert batch.attributes["flowlang.batch_size"] == 4
    assert batch.links == {stage.span_id for stage in stages}
    assert len({stage.trace_id for stage in stages}) == 4
    assert batch.trace_id in {stage.trace_id for stage in stages}
    for stage in stages:
        assert stage.links == {batch.span_id}
        assert stage.attributes["flowlang.batch_size"] == 4


def test_elements_of_one_request_share_the_span_of_their_batch(
    server: Server, collector: Collector
) -> None:
    """A `map` over many elements has a span for each batch of them, and not for each element."""
    body = json.dumps([[1, 2, 3]] * 16)
    assert len(server.client.post("/flows/each", content=body).json()) == 16
    spans = _with_items(collector, 16)
    request = _only(spans, "each", SERVER)
    assert {span.parent_id for span in spans if span is not request} == {request.span_id}
    assert len(spans) < 1 + 2 * 16


def test_items_of_one_form_share_the_span_of_their_batch(
    server: Server, collector: Collector
) -> None:
    """They are one request, however they came to the flows."""
    files = [("file", (f"{number}.json", b"[1, 2, 3]")) for number in range(4)]
    assert len(server.client.post("/flows/held", files=files).json()["results"]) == 4
    spans = collector.wait_for(3)
    assert len(spans) == 3
    stage, batch = _only(spans, "held"), _only(spans, "held batch")
    assert stage.parent_id == batch.parent_id == _only(spans, "held", SERVER).span_id
    assert stage.attributes["flowlang.items"] == stage.attributes["flowlang.batch_size"] == 4
    assert batch.links == {stage.span_id}


def test_an_error_of_the_client_is_no_failure(server: Server, collector: Collector) -> None:
    """The span tells its code, and is not marked as an error of the server."""
    answer = server.client.post("/flows/picture", content=b"nothing")
    span = _only(collector.wait_for(3), "picture", SERVER)
    assert answer.status_code == span.attributes["http.response.status_code"] == 400
    assert span.attributes["error.type"] == "bad-request"
    assert span.status != ERROR


def test_a_failing_stage_is_marked_where_it_failed(server: Server, collector: Collector) -> None:
    """The request, its stage and the batch are errors, with the reason that clients do not get."""
    assert server.client.post("/flows/fail", content=b"x").status_code == 500
    spans = collector.wait_for(3)
    assert len(spans) == 3
    for span in spans:
        assert span.status == ERROR
        assert span.attributes["error.type"] == "stage-failed"
        assert "RuntimeError: it broke" in span.message


def test_a_deadline_that_passes_is_an_error(server: Server, collector: Collector) -> None:
    """The request ends at its deadline; what was worked on for it follows."""
    headers = {"x-deadline-ms": "50"}
    assert server.client.post("/flows/slow", content=b"x", headers=headers).status_code == 504
    spans = collector.wait_for(3)
    span = _only(spans, "slow", SERVER)
    assert (span.status, span.attributes["error.type"]) == (ERROR, "deadline-exceeded")
    stage = next(s for s in spans if "flowlang.items" in s.attributes)
    assert stage.end_ns > span.end_ns


def test_who_hangs_up_is_told_as_cancelled(server: Server, collector: Collector) -> None:
    """There is a span of a request that nobody waits for any more."""
    headers = {"x-request-id": "gave up"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/flows/slow", content=b"x", headers=headers, timeout=0.2)
    span = _only(collector.wait_for(3), "slow", SERVER)
    assert span.attributes["error.type"] == "cancelled"
    assert span.attributes["flowlang.request_id"] == "gave up"
    assert "http.response.status_code" not in span.attributes


def test_the_protocol_over_http_has_one_trace_for_all_items(
    server: Server, collector: Collector
) -> None:
    """The request's id is that of its message, in the answer's header and in the trace."""
    tensor = {"name": "input", "datatype": "FP32", "shape": [2, 3], "data": [0] * 6}
    body = {"id": "of the message", "inputs": [tensor]}
    headers = {"traceparent": SAMPLED}
    answer = server.client.post("/v2/models/same/infer", json=body, headers=headers)
    assert answer.headers["x-request-id"] == answer.json()["id"] == "of the message"
    spans = _with_items(collector, 2)
    span = _only(spans, "same", SERVER)
    assert span.parent_id == PARENT
    assert span.attributes["flowlang.request_id"] == "of the message"
    assert span.attributes["url.path"] == "/v2/models/same/infer"
    assert {s.trace_id for s in spans} == {TRACE}
    assert {s.parent_id for s in spans if s is not span} == {span.span_id}


def test_a_failing_stage_is_marked_for_the_protocol_too(
    server: Server, collector: Collector
) -> None:
    """As for a call: with the reason, of which the client is told less, and the log as much."""
    tensor = {"name": "input", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    answer = server.client.post("/v2/models/fail/infer", json={"inputs": [tensor]})
    assert answer.status_code == 500
    assert "it broke" not in answer.text
    spans = collector.wait_for(3)
    assert len(spans) == 3
    for span in spans:
        assert (span.status, span.attributes["error.type"]) == (ERROR, "stage-failed")
        assert "RuntimeError: it broke" in span.message
    line = _line_of(server, answer)
    assert line["trace_id"] == spans[0].trace_id
    assert _only(spans, "fail", SERVER).message.endswith(f"({line['place']})")


def test_a_header_comes_before_the_messages_id(server: Server, collector: Collector) -> None:
    """Of two ids, the one that whoever stands between knows is the request's."""
    headers = {"x-request-id": "of the header"}
    answer = server.client.post("/v2/models/nothing/infer", json={"id": "own"}, headers=headers)
    assert answer.headers["x-request-id"] == "of the header"
    (span,) = collector.wait_for(1)
    assert span.attributes["flowlang.request_id"] == "of the header"
    assert (span.name, span.attributes["error.type"]) == ("unknown", "not-found")


def _grpc_input(rows: int) -> Any:
    given = triton.InferInput("input", [rows, 3], "FP32")
    given.set_data_from_numpy(np.zeros((rows, 3), np.float32))
    return given


def test_a_call_over_grpc_is_traced(server: Server, collector: Collector) -> None:
    """`traceparent` comes in the metadata, and the id goes back behind the answer."""
    with triton.InferenceServerClient(f"127.0.0.1:{server.port_of('grpc')}") as client:
        client.infer("same", [_grpc_input(1)], request_id="g-1", headers={"traceparent": SAMPLED})
    span = _only(collector.wait_for(3), "same", SERVER)
    assert (span.trace_id, span.parent_id) == (TRACE, PARENT)
    assert span.attributes["flowlang.request_id"] == "g-1"
    assert span.attributes["rpc.system"] == "grpc"
    assert {s.trace_id for s in collector.spans} == {TRACE}


def test_an_error_over_grpc_has_its_code_and_its_id(server: Server, collector: Collector) -> None:
    """Where the client gives no id, the server's is in the trace and behind the answer."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port_of('grpc')}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        name = b"\n\x04same"
        with pytest.raises(grpc.RpcError) as caught:
            call(name)
        told = dict(caught.value.trailing_metadata())
    (span,) = collector.wait_for(1)
    assert (span.name, span.attributes["error.type"]) == ("same", "bad-request")
    assert span.attributes["flowlang.request_id"] == told["x-request-id"]


def test_a_stream_has_a_trace_for_each_of_its_requests(
    server: Server, collector: Collector
) -> None:
    """Requests of one stream are told apart by the ids of their messages."""
    answers: list[Any] = []
    with triton.InferenceServerClient(f"127.0.0.1:{server.port_of('grpc')}") as client:
        client.start_stream(lambda result, error: answers.append(error or result))
        for number in range(3):
            client.async_stream_infer("same", [_grpc_input(1)], request_id=f"s-{number}")
        wait_until(lambda: len(answers) == 3)
        client.stop_stream()
    spans = [span for span in collector.wait_for(7) if span.kind == SERVER]
    assert {span.attributes["flowlang.request_id"] for span in spans} == {"s-0", "s-1", "s-2"}
    assert len({span.trace_id for span in spans}) == 3


def test_a_call_over_thrift_is_traced(server: Server, collector: Collector) -> None:
    """It has a trace of its own, for Thrift brings none; its id is the client's."""
    client = thriftpy2.rpc.make_client(
        IDL.ImageProcessingService, "127.0.0.1", server.port_of("thrift"), timeout=30_000
    )
    told = client.process_image(IDL.ProcessRequest(image_data=b"nothing"))
    client.close()
    assert not told.success
    span = _only(collector.wait_for(3), "picture", SERVER)
    assert span.attributes["error.type"] == "bad-request"
    assert span.attributes["rpc.system"] == "thrift"
    assert re.fullmatch("[0-9a-f]{16}", span.attributes["flowlang.request_id"])


def test_lines_of_the_log_have_the_trace_of_their_request(
    server: Server, collector: Collector
) -> None:
    """Who has found a line finds its trace, by the trace and by the request's id."""
    answer = server.client.post("/flows/picture", content=b"nothing")
    span = _only(collector.wait_for(3), "picture", SERVER)
    assert _line_of(server, answer)["trace_id"] == span.trace_id
    assert span.attributes["flowlang.request_id"] == answer.headers["x-request-id"]


def _line_of(server: Server, answer: httpx.Response) -> dict[str, Any]:
    """The line of the log that tells of a request."""
    lines = [json.loads(line) for line in server.errors.splitlines()]
    found: dict[str, Any]
    (found,) = (x for x in lines if x.get("request_id") == answer.headers["x-request-id"])
    return found


def test_what_is_no_request_of_a_flow_has_no_trace(server: Server, collector: Collector) -> None:
    """Health checks, metrics and pages are not followed."""
    for path in ("/health/ready", "/metrics", "/", "/flows", "/v2/models/same"):
        assert server.client.get(path).status_code == 200
    server.client.post("/flows/echo", content=b"x")
    assert len(collector.wait_for(3)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_is_respected(flow: Path, kind: tuple[str, ...]) -> None:
    """Where the client decides, only what it follows is followed, the batch it shared with others
    too.
    """
    environment = {"OTEL_TRACES_SAMPLER": "parentbased_always_off", "OTEL_SERVICE_NAME": "mine"}
    with collecting() as collector, traced(flow, collector.url, *kind, **environment) as server:

        def ask(parent: str) -> int:
            headers = {"traceparent": parent} if parent else {}
            with httpx.Client(base_url=server.url, timeout=30.0, headers=headers) as client:
                return client.post("/flows/held", content="[1, 2, 3]").status_code

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, ["", UNSAMPLED, SAMPLED, ""])) == [200] * 4
        server.signal()
        assert server.wait() == 0
        spans = collector.spans
        assert len(spans) == 3
        assert {(span.trace_id, span.resource["service.name"]) for span in spans} == {
            (TRACE, "mine")
        }
        batch, stage = _only(spans, "held batch"), _only(spans, "held")
        assert batch.attributes["flowlang.batch_size"] == 4
        assert batch.links == {stage.span_id}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_sends_what_is_left(flow: Path, kind: tuple[str, ...]) -> None:
    """Spans of the last requests are not lost."""
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "60000"}
    with collecting() as collector, traced(flow, collector.url, *kind, **environment) as server:
        server.client.post("/flows/echo", content=b"x")
        assert not collector.spans
        server.signal()
        assert server.wait() == 0
        assert len(collector.spans) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_flows_that_were_loaded_again_are_traced(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """What has taken over is followed as what was there before."""
    path = write(tmp_path / "my.flow", "export flow before = pass\n")
    with collecting() as collector, traced(path, collector.url, "--watch", *kind) as server:
        write(path, "export flow behind = pass\n")
        wait_until(lambda: server.client.post("/flows/behind", content=b"x").status_code == 200)
        spans = collector.wait_for(3)
        assert _only(spans, "behind").parent_id == _only(spans, "behind", SERVER).span_id


@pytest.mark.parametrize(
    ("is_gone", "kind"), [(True, ()), (False, ("--ingest", "2"))], ids=["gone", "slow-ingest"]
)
def test_a_collector_that_takes_nothing_holds_up_nobody(
    flow: Path, is_gone: bool, kind: tuple[str, ...]
) -> None:
    """Requests are answered as ever, and the stop loses its spans rather than the time."""
    with collecting(delay_s=60.0) as collector:
        url = f"http://127.0.0.1:{free_port()}" if is_gone else collector.url
        few = {"OTEL_BSP_MAX_QUEUE_SIZE": "128", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "64"}
        with traced(flow, url, *kind, **few) as server:
            for _ in range(300):  # more spans than the queue of the SDK takes
                start_s = time.monotonic()
                assert server.client.post("/flows/echo", content=b"x").status_code == 200
                assert time.monotonic() - start_s < 2.0
            server.signal()
            start_s = time.monotonic()
            assert server.wait() == 0
            assert time.monotonic() - start_s < 10.0
            assert "Traceback" not in server.errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "is 'zipkin'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "is 'grpc'"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0", "is '0'"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "is 'many'"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100", "is less: 100"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1", "-1"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "-1", "-1"),
    ],
)
def test_what_the_variables_cannot_have_is_told(
    flow: Path, name: str, value: str, words: str, kind: tuple[str, ...]
) -> None:
    """Nothing is served rather than without the traces that somebody waits for. It is told once."""
    status, told = refused(str(flow), "--otel", *kind, environment={name: value})
    assert (status, len(told.splitlines())) == (1, 1)
    assert name in told
    assert words in told


def test_a_missing_package_is_named(flow: Path) -> None:
    """Without the extra, the option says which one to install."""
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; from flowlang.cli import main; "
        f"main(['serve', '--otel', {str(flow)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'flowlang[otel]'" in done.stderr
    assert "Traceback" not in done.stderr


# With --ingest

PLACES = {  # spans tell which process has made them
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "process",
    "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=mine",
}


def test_a_trace_leads_from_a_front_to_the_engine(flow: Path) -> None:
    """Each makes the spans of what it does; who watches over them has no thread for that."""
    with (
        collecting() as collector,
        traced(flow, collector.url, "--ingest", "2", **PLACES) as server,
    ):
        found = processes(server)
        assert psutil.Process(server.process.pid).num_threads() == 1
        for _ in range(8):  # so that each front has some
            httpx.post(f"{server.url}/flows/echo", content=b"x")
        spans = collector.wait_for(8 * 3)
        for span in spans:
            places = found.fronts if span.kind == SERVER else (found.engine,)
            assert span.resource["process.pid"] in places
            assert span.resource["service.instance.id"] == "mine"
        for request in (span for span in spans if span.kind == SERVER):
            below = [span for span in spans if span.parent_id == request.span_id]
            assert sorted(span.name for span in below) == ["echo", "echo batch"]
            assert {span.trace_id for span in below} == {request.trace_id}


def test_processes_that_were_killed_are_traced_again(flow: Path) -> None:
    """Who waited for the engine has an error in his trace, and who comes later all spans of it."""
    with (
        collecting() as collector,
        traced(flow, collector.url, "--ingest", "2") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        before = processes(server)
        waiting = pool.submit(
            httpx.post, f"{server.url}/flows/held", content="[1, 2, 3]", timeout=30.0
        )
        server.wait_inside(1)
        kill(before.engine)
        assert waiting.result().status_code == 503
        (span,) = collector.wait_for(1)
        assert (span.name, span.kind, span.status) == ("held", SERVER, ERROR)
        assert span.attributes["error.type"] == "restarting"
        for front in before.fronts:
            kill(front)
        server.line("loading, on ")
        server.wait_ready()
        assert not {*before.all} & {*processes(server).all}
        collector.spans.clear()
        served: list[bool] = []

        def is_served() -> bool:
            """By every front: the kernel picks one for each connection."""
            asked = (httpx.post(f"{server.url}/flows/echo", content=b"x") for _ in range(8))
            served.extend(answer.status_code == 200 for answer in asked)
            return all(served[-8:])

        wait_until(is_served)
        spans = collector.wait_for(3 * sum(served))
        requests = {span.span_id for span in spans if span.kind == SERVER}
        assert len(requests) == sum(served)
        assert {span.parent_id for span in spans if span.kind == INTERNAL} == requests
        server.signal()
        assert server.wait() == 0
