"""A collector of traces, as OpenTelemetry has them: OTLP over HTTP, in protobuf."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serve.server import wait_until

ERROR = 2  # StatusCode of the protocol


@dataclass(frozen=True)
class Span:
    """A span as it was sent."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    links: frozenset[str]  # ids of spans
    status: int
    message: str
    resource: Mapping[str, Any]
    state: str  # of the trace, as its client gave it


class Collector:
    """Takes what is sent to `url`. `delay_s` is how long it lets a sender wait."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.spans: list[Span] = []
        self.is_leaving = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers["content-encoding"] == "gzip":
                    body = gzip.decompress(body)
                collector.is_leaving.wait(delay_s)
                collector.spans += spans_of(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def wait_for(self, count: int) -> list[Span]:
        """The spans that have come, once there are so many."""
        wait_until(lambda: len(self.spans) >= count)
        return list(self.spans)


@contextmanager
def collecting(delay_s: float = 0.0) -> Iterator[Collector]:
    collector = Collector(delay_s)
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        collector.is_leaving.set()
        collector.server.shutdown()
        thread.join()
        collector.server.server_close()


def spans_of(message: Any) -> Iterator[Span]:
    for sent in message.resource_spans:
        resource = _values(sent.resource.attributes)
        for scope in sent.scope_spans:
            for span in scope.spans:
                yield Span(
                    span.name,
                    span.kind,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _values(span.attributes),
                    frozenset(link.span_id.hex() for link in span.links),
                    span.status.code,
                    span.status.message,
                    resource,
                    span.trace_state,
                )


def _values(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}
