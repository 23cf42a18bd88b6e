"""Lines in the log: how they are written, and those that tell of a request without a result.

Layer 4. Modules log as everywhere in Python, with what a line is about in `extra`, under the names
in FIELDS: as text it is a sentence, as JSON these are values of their own.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Literal

from flowlang.diagnostics import RequestError, StageFailed
from flowlang.serve.launch import Outlet

FIELDS = (
    *("request_id", "flow", "stage", "instance", "gpu", "code", "place"),
    *("method", "path", "status", "ms"),
)

Form = Literal["text", "json"]

log = logging.getLogger("flowlang.serve")
_encode = json.JSONEncoder(default=str).encode


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record. `trace_id` finds the trace that the caller is in, if any."""

    def __init__(self, trace_id: Callable[[], str | None] | None = None) -> None:
        super().__init__()
        self._trace_id = trace_id

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in FIELDS:
            value = getattr(record, name, None)
            if value is not None:
                told[name] = value
        if self._trace_id is not None and (trace_id := self._trace_id()) is not None:
            told["trace_id"] = trace_id
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return _encode(told)


def _rfc3339(when_s: float) -> str:
    when = datetime.fromtimestamp(when_s, timezone.utc)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_log(form: Form, level: str, trace_id: Callable[[], str | None] | None = None) -> None:
    """Have all that is logged in this process written to stderr, from `level` on."""
    handler = logging.StreamHandler(Outlet(sys.stderr))
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    if form == "json":
        handler.setFormatter(JsonFormatter(trace_id))
        # What Python itself would write there goes through the log, or it would be no JSON.
        logging.captureWarnings(True)
        sys.excepthook = _tell_uncaught
        threading.excepthook = _tell_uncaught_in_thread


def _tell_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("%s", kind.__name__, exc_info=(kind, error, trace))


def _tell_uncaught_in_thread(given: threading.ExceptHookArgs) -> None:
    name = given.thread.name if given.thread is not None else "?"
    error = given.exc_value or given.exc_type()
    trace = given.exc_traceback
    log.critical("thread %s ended", name, exc_info=(given.exc_type, error, trace))


def _fields(request_id: str, flow: str, error: RequestError) -> dict[str, Any]:
    """What a line about a request without a result is about."""
    return {
        "request_id": request_id,
        "flow": flow,
        "code": error.code,
        "stage": error.stage,
        "place": error.place,
    }


def on_one_line(text: str) -> str:
    """Text with what could end its line, or steer a terminal, written out: clients may send it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def tell_unanswered(request_id: str, flow: str, error: RequestError) -> None:
    """A request was not answered with a result: the server's fault where a stage failed."""
    level = logging.WARNING if isinstance(error, StageFailed) else logging.INFO
    fields = _fields(request_id, flow, error)
    reason = on_one_line(str(error))
    log.log(level, "request %s of flow `%s`: %s", request_id, flow, reason, extra=fields)


def tell_refused(request_id: str, code: str, reason: str) -> None:
    """A request was refused that is of no flow. It may have no id."""
    fields = {"request_id": request_id or None, "code": code}
    log.info("request %s: %s", request_id or "-", on_one_line(reason), extra=fields)


def tell_unanswered_part(request_id: str, flow: str, part: str, error: RequestError) -> None:
    """The same of one part of a form, whose others go on."""
    fields = _fields(request_id, flow, error)
    words = (request_id, on_one_line(part), on_one_line(str(error)))
    log.info("request %s, `%s`: %s", *words, extra=fields)


def tell_broken(request_id: str, flow: str, error: BaseException) -> None:
    """A request met an error of ours."""
    fields = {"request_id": request_id, "flow": flow, "code": "internal"}
    log.error("request %s of flow `%s` failed", request_id, flow, exc_info=error, extra=fields)
