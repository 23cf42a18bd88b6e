"""Traces of requests for OpenTelemetry: a span for each, its stages below it, and their batches.

Layer 4, and the only file importing opentelemetry. Where spans go, and which requests have any, is
said by the OTEL_* variables. A span is made by the thread that knows of it and sent by one of the
SDK's own: a collector that is slow or gone costs spans, and no request anything.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanKind,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flowlang import __version__
from flowlang.diagnostics import Cancelled, FlowError, RequestError, StageFailed
from flowlang.runtime.observer import Worked
from flowlang.serve.answer import reason_of

CLOSE_S = 5.0  # at the end, for what is still to be sent
# What is possible is one of several things that the variables could ask for.
ONLY = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}
QUEUE, BATCH = "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"
# Numbers above 0, and what they are where nothing is said.
NUMBERS = {QUEUE: 2048, BATCH: 512, "OTEL_BSP_SCHEDULE_DELAY": 5000}

log = logging.getLogger("flowlang.serve")
_ROOT = Context()
_GONE = Cancelled("the client is gone")
_current: ContextVar[Span] = ContextVar("flowlang-span", default=INVALID_SPAN)


class Trace:
    """A request that is followed, until its `end`. As a context, whatever leaves it is its error.

    It stays the one of the task it began in: lines that are logged behind its end belong to it too.
    """

    __slots__ = ("_error", "_request_id", "_span", "_status")

    def __init__(self, span: Span, request_id: str = "") -> None:
        self._span = span
        self._request_id = request_id
        self._status: int | None = None
        self._error: BaseException | None = _GONE

    def answered(self, request_id: str, status: int, error: RequestError | None) -> None:
        """What was answered over HTTP; without this the client was gone before."""
        self._request_id, self._status, self._error = request_id, status, error

    def end(self) -> None:
        span = self._span
        if not span.is_recording():
            return
        span.set_attribute("flowlang.request_id", self._request_id)
        if self._status is not None:
            span.set_attribute("http.response.status_code", self._status)
        if self._error is not None:
            _fail(span, self._error)
            self._error = None  # or the error, through its traceback, might hold itself
        span.end()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_over = error is None or isinstance(error, Exception)  # and not a task cancelled
        self._error = error if is_over else _GONE
        self.end()


def _fail(span: Span, error: BaseException) -> None:
    """Say what a request, a stage or a batch failed with, as the log does."""
    reason = reason_of(error)
    told = reason if isinstance(reason, RequestError) else StageFailed(str(reason))
    span.set_attribute("error.type", told.code)
    if told.http_status >= 500:  # the others are the client's, and no fault of the server
        span.set_status(StatusCode.ERROR, str(told))


class Tracer:
    """Follows requests; also the observer of the flows that serve them.

    It is made once, and started in each process that has requests: the SDK sends by a thread, which
    would not outlive a fork, and names the process it is set up in.
    """

    _sending: BatchSpanProcessor
    _tracer: Any

    def __init__(self) -> None:
        """Raises FlowError, or ValueError of the SDK, where OTEL_* variables cannot be heeded."""
        check_variables(os.environ)
        self._exporter, self._limits = OTLPSpanExporter(), SpanLimits()
        self._parents = TraceContextTextMapPropagator()

    def start(self) -> None:
        """Begin in this process, before any request is followed in it."""
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "flowlang"}))
        provider = TracerProvider(
            resource=resource, span_limits=self._limits, shutdown_on_exit=False
        )
        self._sending = BatchSpanProcessor(self._exporter)
        provider.add_span_processor(self._sending)
        self._tracer = provider.get_tracer("flowlang", __version__)

    def begin(
        self,
        flow: str,
        parent: Mapping[str, str],
        attributes: Mapping[str, str],
        request_id: str = "",
    ) -> Trace:
        """Follow a request of this task, if the sampler wants it. `parent` are its headers."""
        try:
            context = self._parents.extract(parent, _ROOT) if parent else _ROOT
            told = {"flowlang.flow": flow, **attributes}
            span = self._tracer.start_span(flow, context, SpanKind.SERVER, told)
        except Exception:  # of a sampler that somebody brought
            log.exception("a request could not be traced")
            span = INVALID_SPAN
        _current.set(span)
        return Trace(span, request_id)

    def trace_id(self) -> str | None:
        """The trace of the request that is answered in this task; None where there is none."""
        found = _current.get().get_span_context().trace_id
        return f"{found:032x}" if found else None

    # Between processes

    def headers(self) -> dict[str, str]:
        """What another process goes on with the trace of this task by; empty where there is none.

        They are those of W3C's Trace Context, as they would be sent over HTTP.
        """
        found: dict[str, str] = {}
        self._parents.inject(found, set_span_in_context(_current.get(), _ROOT))
        return found

    @contextmanager
    def attached(self, headers: Mapping[str, str]) -> Iterator[None]:
        """What is done and begun in here belongs to a trace that another process has begun."""
        token = _current.set(get_current_span(self._parents.extract(headers, _ROOT)))
        try:
            yield
        finally:
            _current.reset(token)

    # As an observer

    def current(self) -> Span | None:
        """That of the request, wherever it is: in another process it does not record here."""
        span = _current.get()
        return span if span.get_span_context().trace_flags.sampled else None

    def observe(self, worked: Worked) -> None:
        # By its ids, for each item of a request that another process follows has come by itself.
        members: dict[tuple[int, int], tuple[Span, list[int]]] = {}
        for index, item in enumerate(worked.items):
            span: Span | None = getattr(item.request, "trace", None)
            if span is not None:
                context = span.get_span_context()
                ids = context.trace_id, context.span_id
                members.setdefault(ids, (span, []))[1].append(index)
        if members:
            self._tell_batch(worked, list(members.values()))

    def close(self) -> None:
        """Send what is left. What no collector takes within CLOSE_S is lost."""
        # In a thread, for the time that the SDK grants itself is longer.
        sending = threading.Thread(target=self._sending.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_S)

    def _tell_batch(self, worked: Worked, members: Sequence[tuple[Span, Sequence[int]]]) -> None:
        """A span for each request that had items in a batch, and one of the batch itself.

        That of the batch belongs to the trace of the first of them, as sampled as that is, and is
        linked with all.
        """
        now_ns, now_s = time.time_ns(), time.monotonic()

        def at(when_s: float) -> int:
            return now_ns - round((now_s - when_s) * 1e9)

        size = len(worked.items)
        stages: list[Span] = []
        for request, indices in members:
            items = [worked.items[index] for index in indices]
            arrived_s = min(item.arrived_s for item in items)
            attributes: dict[str, Any] = {
                "flowlang.stage": worked.stage,
                "flowlang.wait_s": items[0].taken_s - arrived_s,
                "flowlang.batch_size": size,
                "flowlang.items": len(items),
            }
            stage = self._start(worked.stage, request, attributes, at(arrived_s))
            _fail_by(stage, [worked.outcomes[index] for index in indices], 1)
            stages.append(stage)
        first, _ = members[0]
        attributes = {
            "flowlang.stage": worked.stage,
            "flowlang.instance": worked.instance,
            "flowlang.batch_size": size,
        }
        links = [Link(stage.get_span_context()) for stage in stages]
        taken_ns = at(worked.items[0].taken_s)
        batch = self._start(f"{worked.stage} batch", first, attributes, taken_ns, links)
        _fail_by(batch, worked.outcomes, size)
        for stage in stages:
            stage.add_link(batch.get_span_context())
            stage.end(now_ns)
        batch.end(now_ns)

    def _start(
        self,
        name: str,
        parent: Span,
        attributes: Mapping[str, Any],
        start_ns: int,
        links: Sequence[Link] = (),
    ) -> Span:
        context = set_span_in_context(parent, _ROOT)
        return self._tracer.start_span(
            name, context, attributes=attributes, links=links, start_time=start_ns
        )


def _fail_by(span: Span, outcomes: Sequence[Any], least: int) -> None:
    """Have a span tell of the first error, where at least so many outcomes are errors."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if len(errors) >= least:
        _fail(span, errors[0])


def check_variables(environ: Mapping[str, str]) -> None:
    """Raises FlowError where the variables ask for what cannot be.

    The SDK would say the same of the numbers, but as it starts its thread: in each process by
    itself, and when others take connections already.
    """
    for name, only in ONLY.items():
        given = environ.get(name, "").strip()
        if given not in ("", only):
            raise FlowError(f"--otel: {name} is {given!r}, and traces can only go by {only!r}")
    numbers = {name: _number(environ, name) for name in NUMBERS}
    if numbers[BATCH] > numbers[QUEUE]:
        raise FlowError(
            f"--otel: {BATCH} is {numbers[BATCH]}, and {QUEUE} is less: {numbers[QUEUE]}"
        )


def _number(environ: Mapping[str, str], name: str) -> int:
    given = environ.get(name, "").strip()
    try:
        number = int(given or NUMBERS[name])
    except ValueError:
        number = 0
    if number <= 0:
        raise FlowError(f"--otel: {name} is {given!r}, and a whole number above 0 is wanted")
    return number
