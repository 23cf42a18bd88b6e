"""What goes over the wire: results and errors to bodies, headers and JSON bodies to values.

Layer 4. Knows nothing of connections or routes. What a client is told of an error never holds a
place in a file, a path or a traceback: those go to the log, under the request's id.
"""

from __future__ import annotations

import binascii
import gc
import json
import math
import random
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from flowlang.diagnostics import BadRequest, RequestError, StageFailed
from flowlang.items import plain
from flowlang.plan.types import BYTES, ListOf, Optional, Record, Type, Unknown

JSON, OCTETS = b"application/json", b"application/octet-stream"
HTML, SVG = b"text/html; charset=utf-8", b"image/svg+xml"
RETRY_S = b"1"
MAX_JSON_BYTES = 16 << 20  # Python's values take up to twenty times the room of their text
MAX_JSON_VALUES = 1 << 18  # of a request: while they are made of their text, nothing else is done
CLOSE = (b"connection", b"close")

_ID = re.compile(rb"[\x20-\x7e]{1,128}")
_MILLISECONDS = re.compile(rb"[0-9]{1,9}(\.[0-9]{1,6})?")
_BASE64 = re.compile("[A-Za-z0-9+/]*={0,2}").fullmatch
_PRIORITY = re.compile(rb"[0-9]{1,9}")
_Error = TypeVar("_Error", bound=BaseException)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Answer:
    """A response but for what every response carries, and the `error` that it tells of, if any."""

    status: int
    body: bytes
    kind: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    error: RequestError | None = None


class Refusal(RequestError):
    """A request turned away before a flow saw it; `is_last` where its body is left unread."""

    def __init__(
        self,
        code: str,
        http_status: int,
        message: str,
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        is_last: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.http_status = http_status
        self.headers = (*headers, CLOSE) if is_last else headers


def result_answer(result: Any) -> Answer:
    """The answer that tells a result."""
    kind, body = encode(result)
    return Answer(200, body, kind)


def encode(result: Any) -> tuple[bytes, bytes]:
    """A result's content type and body: bytes as they are, anything else as JSON.

    JSON has no NaN and no infinities; they become null.
    """
    if isinstance(result, (bytes, bytearray, memoryview)):
        return OCTETS, bytes(result)
    return JSON, to_json(plain(result))


def to_json(value: Any) -> bytes:
    """Plain values as compact JSON in UTF-8."""
    try:
        return orjson.dumps(value)
    except TypeError:  # half a surrogate pair, more than 64 bits: Python's own takes those too
        pass
    try:
        text = _encode(value)
    except ValueError:
        text = _encode(_finite(value))
    return text.encode("utf-8", "replace")


def check_json(texts: Collection[bytes]) -> None:
    """Raises Refusal where the JSON of a request is too long, or has too many values."""
    if sum(map(len, texts)) > MAX_JSON_BYTES:
        raise _too_much(f"larger than {MAX_JSON_BYTES:,} bytes")
    if sum(map(_count_values, texts)) > MAX_JSON_VALUES:
        raise _too_much(f"of more than {MAX_JSON_VALUES:,} values")


def _too_much(what: str) -> Refusal:
    return Refusal("too-large", 413, f"JSON {what}: large arrays go to /v2, as binary data")


def _count_values(text: bytes) -> int:
    """How many values JSON has, roughly: where there are many, what strings hold is no value."""
    most = _count_marks(text)
    if most > MAX_JSON_VALUES:
        bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
        if bare.count(b'"') <= 4 * MAX_JSON_VALUES:  # a value has two strings, one of them its name
            return _count_marks(b"".join(bare.split(b'"')[::2]))
    return most


def _count_marks(text: bytes) -> int:
    """Of those that each begin a value."""
    return len(text) - len(text.translate(None, b",[{"))


def from_json(text: bytes) -> Any:
    """A value out of JSON in UTF-8 that has been checked. Raises ValueError or RecursionError.

    The garbage collector waits: it would walk over all lists there are again and again. No other
    thread runs meanwhile.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(str(text, "utf-8-sig"))
    finally:
        if was_enabled:
            gc.enable()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value


def error_answer(error: RequestError, flow: str | None, request_id: bytes) -> Answer:
    """The answer to a request that was not answered with a result."""
    return refusing(error, {"error": told(error, flow, request_id)})


def refusing(error: RequestError, told: Mapping[str, Any]) -> Answer:
    """The answer that tells this of an error."""
    headers = error.headers if isinstance(error, Refusal) else ()
    if error.http_status in (429, 503):
        headers = (*headers, (b"retry-after", RETRY_S))
    return Answer(error.http_status, to_json(told), JSON, headers, error)


def loading() -> Refusal:
    return Refusal("loading", 503, "the flows are not loaded yet")


def wrong_method(method: str, allowed: str) -> Refusal:
    message = f"{method} is not possible at this path; {allowed} is"
    return Refusal("wrong-method", 405, message, headers=((b"allow", allowed.encode()),))


def told(error: RequestError, flow: str | None, request_id: bytes) -> dict[str, Any]:
    """What a client is told of an error."""
    message = error.message
    if isinstance(error, StageFailed):  # its message may be any exception's
        message = f"stage `{error.stage}` failed" if error.stage else "the flow failed"
    return {
        "code": error.code,
        "message": message,
        "stage": error.stage,
        "flow": flow,
        "request_id": request_id.decode("ascii"),
    }


def reason_of(error: _Error) -> _Error | RequestError:
    """What a request failed with, where its client is told less of it."""
    cause = error.__cause__
    return cause if isinstance(cause, RequestError) else error


def request_id_of(given: bytes | None) -> bytes:
    """The client's id for its request if it can be repeated as it is, else a new one."""
    if given is not None and is_request_id(given):
        return given
    return b"%016x" % random.getrandbits(64)


def is_request_id(given: bytes) -> bool:
    """Whether this can be repeated in a header, and stands on one line of a log."""
    return _ID.fullmatch(given) is not None


def deadline_of(given: bytes | None) -> float | None:
    """Seconds, of an X-Deadline-Ms header. Raises BadRequest."""
    if given is None:
        return None
    if not _MILLISECONDS.fullmatch(given) or not float(given):
        raise BadRequest("X-Deadline-Ms is a number of milliseconds above 0, such as 250")
    return float(given) / 1e3


def priority_of(given: bytes | None) -> int:
    """The number of an X-Priority header; 0 says nothing. Raises BadRequest."""
    if given is None:
        return 0
    if not _PRIORITY.fullmatch(given):
        raise BadRequest("X-Priority is a whole number, 1 the first to be served")
    return int(given)


def takes_bytes(kind: Type) -> bool:
    """Whether a flow takes the request's body as it is, rather than JSON."""
    return isinstance(kind, Unknown) or kind == BYTES


def reader_of(kind: Type, parts: Collection[str] = ()) -> Callable[[bytes], Any] | None:
    """What makes a flow's item of a body, JSON that has been checked; None where the body is it.

    `parts` are those of a form that might have been sent instead.
    """
    if takes_bytes(kind):
        return None
    otherwise = f", or a form with the parts {', '.join(parts)}" if parts else ""

    def read(body: bytes) -> Any:
        try:
            value = from_json(body)
            _check_texts(body, value)
        except (ValueError, RecursionError) as error:
            coded = " with bytes in base64" if _has_bytes(kind) else ""
            raise BadRequest(
                f"this flow takes JSON, {kind}{coded}{otherwise}: {_reason(error)}"
            ) from None
        return _item(value, kind)

    return read


def _check_texts(body: bytes, value: Any) -> None:
    """Raises UnicodeEncodeError where a string of JSON is no text, which no answer could repeat."""
    if b"\\ud" in body or b"\\uD" in body:  # half a pair can only come as an escape
        json.dumps(value, ensure_ascii=False).encode()


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "a string in it is no text (a lone surrogate)"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return "the body is not UTF-8" if isinstance(error, UnicodeError) else "it cannot be read"


def _item(value: Any, kind: Type) -> Any:
    """A JSON value as a flow takes it: strings in base64 become bytes."""
    if isinstance(kind, Optional):
        return None if value is None else _item(value, kind.item)
    if isinstance(kind, ListOf) and isinstance(value, list):
        if kind.item == BYTES:
            return list(map(_bytes, value))
        return [_item(part, kind.item) for part in value] if _has_bytes(kind.item) else value
    if isinstance(kind, Record) and isinstance(value, dict):
        fields = dict(kind.fields)
        return {n: _field(n, v, fields[n]) if n in fields else v for n, v in value.items()}
    return _bytes(value) if kind == BYTES else value


def _field(name: str, value: Any, kind: Type) -> Any:
    try:
        return _item(value, kind)
    except BadRequest as error:
        raise BadRequest(f"`{name}`: {error.message}") from None


def _bytes(text: Any) -> bytes:
    """Bytes out of base64, in half the time that `base64` takes: a list may hold millions."""
    try:
        if _BASE64(text) is not None:
            return binascii.a2b_base64(text)
    except (TypeError, binascii.Error):
        pass
    raise BadRequest("bytes inside JSON are given as a string in base64")


def _has_bytes(kind: Type) -> bool:
    """Whether there are bytes somewhere in a type."""
    if isinstance(kind, (Optional, ListOf)):
        return _has_bytes(kind.item)
    if isinstance(kind, Record):
        return any(_has_bytes(part) for _, part in kind.fields)
    return kind == BYTES
