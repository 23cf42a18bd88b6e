"""What the plain face takes and answers, as an OpenAPI 3.1 document.

Layer 4. Made from the flows' types and documentation; describes flowlang.serve.routes, and knows
nothing of how that works. The Open Inference Protocol has a description of its own.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang import __version__
from flowlang.diagnostics import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Draining,
    Overloaded,
    RequestError,
    StageFailed,
)
from flowlang.plan.graph import Parameter
from flowlang.plan.types import (
    BYTES,
    Image,
    ListOf,
    Optional,
    Record,
    Scalar,
    Tensor,
    Type,
    Unknown,
    without_null,
)
from flowlang.serve.answer import takes_bytes
from flowlang.serve.form import MAX_PARTS, form_fields, item_name

if TYPE_CHECKING:
    from flowlang.app import Flow

Json: TypeAlias = dict[str, Any]

VERSION = "3.1.0"
_OCTETS = "application/octet-stream"
_BYTES: Json = {"contentMediaType": _OCTETS}
_RAISED: tuple[type[RequestError], ...] = (
    *(BadRequest, Overloaded, Cancelled, StageFailed, Draining, DeadlineExceeded),
)
# Every code of an error: its status, and when it is answered.
ERRORS: Mapping[str, tuple[int, str]] = {
    **{kind.code: (kind.http_status, str(kind.__doc__).partition("\n")[0]) for kind in _RAISED},
    "unauthorized": (401, "The header Authorization does not bring the token."),
    "not-found": (404, "There is nothing at this path."),
    "wrong-method": (405, "The path is there for another method."),
    "body-timeout": (408, "Not all of the body was there in time."),
    "too-large": (413, "The body, or its JSON, is larger than the server takes."),
    "unsupported-encoding": (415, "The body has a Content-Encoding."),
    "internal": (500, "The server is at fault; its log says why, under the request's id."),
    "loading": (503, "The flows are not loaded yet."),
    "restarting": (503, "The process of the models has stopped, and is being started again."),
}
_OF_CALLS = (400, 404, 408, 413, 415, 429, 499, 500, 503, 504)
_HEADERS: Mapping[int, tuple[str, ...]] = {
    401: ("WWW-Authenticate",), 405: ("Allow",), 429: ("Retry-After",), 503: ("Retry-After",)
}  # fmt: skip
_PLAIN: Mapping[str, Json] = {
    "str": {"type": "string"},
    "path": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "duration": {"type": "number", "description": "Seconds."},
    "bool": {"type": "boolean"},
    "bytes": {"type": "string", "contentEncoding": "base64"},
}
_SHAPES: Mapping[str, tuple[tuple[int, ...], str]] = {
    "box": ((4,), "Left, top, right and bottom, in pixels."),
    "quad": ((4, 2), "Four points, x and y of each in pixels."),
}
_SHOWN_DEFAULTS = ("int", "float", "duration", "bool")  # a text may be a place on the server


def document(flows: Sequence[Flow], *, free: Container[str] | None = None) -> Json:
    """The whole document for these flows.

    `free` are the paths to look at without a token; None where the server asks for none at all.
    """
    paths = {f"/flows/{flow.name}": {"post": _call(flow, f"call_{flow.name}")} for flow in flows}
    paths |= {
        f"/flows/{flow.name}/plan.svg": {"get": _drawing(flow, f"draw_{flow.name}")}
        for flow in flows
    }
    root = {"get": _look("page", "A page to try the flows in a browser.", "text/html")}
    if len(flows) == 1:
        root["post"] = _call(flows[0], "call")
    found: Json = {
        "openapi": VERSION,
        "info": {
            "title": "flowlang",
            "version": __version__,
            "description": "Flows over HTTP: the item of a request goes in, its answer comes out.",
        },
        "paths": {**paths, "/": root, **_server_paths()},
        "components": _components(),
    }
    return found if free is None else _locked(found, free)


def _locked(found: Json, free: Container[str]) -> Json:
    """A document whose server asks for a token."""
    scheme = {"type": "http", "scheme": "bearer"}
    found["components"]["securitySchemes"] = {"token": scheme}
    found["security"] = [{"token": []}]
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            if method == "get" and path in free:
                operation["security"] = []
            else:
                operation["responses"]["401"] = _ref("responses", "401")
    return found


# Types


def schema_of(kind: Type, *, is_answer: bool) -> Json:
    """The JSON Schema of a type. An answer has null where a number is none, as 0 / 0 is not."""
    if isinstance(kind, Optional):
        return {"anyOf": [schema_of(kind.item, is_answer=is_answer), {"type": "null"}]}
    if isinstance(kind, ListOf):
        return {"type": "array", "items": schema_of(kind.item, is_answer=is_answer)}
    if isinstance(kind, Record):
        return _record(kind, is_answer=is_answer)
    if isinstance(kind, (Image, Tensor)):
        if kind.shape is None:
            return {"description": f"{kind}: numbers, in lists as deep as it has dimensions."}
        return _array(_number(kind.dtype, is_answer=is_answer), kind.shape, str(kind))
    if isinstance(kind, Scalar) and kind.name in _SHAPES:
        return _array(_number("f64", is_answer=is_answer), *_SHAPES[kind.name])
    if isinstance(kind, Scalar):
        found = dict(_PLAIN[kind.name])
        return _or_null(found) if is_answer and found["type"] == "number" else found
    return {}


def _record(kind: Record, *, is_answer: bool) -> Json:
    found: Json = {
        "type": "object",
        "properties": {n: schema_of(part, is_answer=is_answer) for n, part in kind.fields},
        "required": [n for n, part in kind.fields if not isinstance(part, Optional)],
    }
    if kind.name:
        found["title"] = kind.name
    if not is_answer:
        found["additionalProperties"] = False
    return found


def _number(dtype: str, *, is_answer: bool) -> Json:
    if dtype == "bool":
        return {"type": "boolean"}
    if dtype[0] == "f":
        return _or_null({"type": "number"}) if is_answer else {"type": "number"}
    bits = int(dtype[1:])
    least, most = (0, 2**bits - 1) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return {"type": "integer", "minimum": least, "maximum": most}


def _or_null(schema: Json) -> Json:
    return {**schema, "type": [schema["type"], "null"]}


def _array(item: Json, shape: Iterable[int | None], description: str) -> Json:
    found = item
    for side in reversed(list(shape)):
        length = {} if side is None else {"minItems": side, "maxItems": side}
        found = {"type": "array", "items": found, **length}
    return {**found, "description": description}


# Calls of flows


def _call(flow: Flow, name: str) -> Json:
    responses = {"200": _answered(flow.output)}
    responses |= {str(status): _ref("responses", str(status)) for status in _OF_CALLS}
    found: Json = {
        "operationId": name,
        "tags": ["flows"],
        "summary": f"{flow.name}: {flow.input} -> {flow.output}",
        "parameters": [
            *(_in_query(p) for p in flow.parameters if not _is_bytes(p)),
            *(_ref("parameters", name) for name in ("X-Deadline-Ms", "X-Priority", "X-Request-Id")),
        ],
        "requestBody": {"required": True, "content": _body(flow)},
        "responses": responses,
    }
    if flow.doc:
        found["description"] = flow.doc
    return found


def _is_bytes(parameter: Parameter) -> bool:
    return without_null(parameter.type) == BYTES


def _in_query(parameter: Parameter) -> Json:
    kind = without_null(parameter.type)
    schema = schema_of(kind, is_answer=False)
    found: Json = {
        "name": parameter.name,
        "in": "query",
        "required": parameter.is_required,
        "description": str(parameter.type),
    }
    if not isinstance(kind, Scalar) or kind.name in _SHAPES:
        return {**found, "content": {"application/json": {"schema": schema}}}
    return {**found, "schema": {**schema, **_default(parameter, kind)}}


def _default(parameter: Parameter, kind: Scalar) -> Json:
    if parameter.default is None or kind.name not in _SHOWN_DEFAULTS:
        return {}
    value = parameter.default.params["value"]
    is_told = isinstance(value, (bool, int, float)) and math.isfinite(value)
    return {"default": value} if is_told else {}


def _body(flow: Flow) -> Json:
    """What a body may be. Where bytes are needed besides the item, only a form brings both."""
    form = {"multipart/form-data": _form(flow)}
    if any(_is_bytes(p) and p.is_required for p in flow.parameters):
        return form
    if takes_bytes(flow.input):
        return {_OCTETS: {}, "image/*": {}, **form}
    schema = schema_of(flow.input, is_answer=False)
    return {"application/json": {"schema": schema}, **form}


def _form(flow: Flow) -> Json:
    """A form: its parts are items, or the fields of one, but for those with parameters' names."""
    names = [p.name for p in flow.parameters]
    fields = form_fields(flow.input, names)
    item = item_name([*names, *fields])
    is_plain = takes_bytes(flow.input)
    kinds = {item: _OCTETS if is_plain else "application/json"}
    kinds |= {p.name: _OCTETS for p in flow.parameters if _is_bytes(p)}
    items = dict(_BYTES) if is_plain else schema_of(flow.input, is_answer=False)
    most = MAX_PARTS - len(names)
    files = {p.name: dict(_BYTES) for p in flow.parameters if _is_bytes(p)}
    needed = [p.name for p in flow.parameters if _is_bytes(p) and p.is_required]
    properties: Json = {
        item: {
            "type": "array",
            "items": items,
            "minItems": 1,
            "maxItems": most,
            "description": "The item, or several, each answered for itself. A part with a file's "
            "name may have any name, and the parameters of the query may be parts instead.",
        },
        **files,
    }
    schema: Json = {"type": "object", "properties": properties, "required": [item, *needed]}
    if fields:
        kinds |= {name: _kind_of_part(kind) for name, kind in fields.items()}
        one: Json = {
            "description": "The item, a part for each of its fields.",
            "type": "object",
            "properties": {**{name: _part(kind) for name, kind in fields.items()}, **files},
            "required": [*(n for n, k in fields.items() if not isinstance(k, Optional)), *needed],
        }
        schema = {"anyOf": [one, schema]}
    return {
        "schema": schema,
        "encoding": {name: {"contentType": kind} for name, kind in kinds.items()},
    }


def _part(kind: Type) -> Json:
    """A field in a part of its own: of a list as such, clients would make many."""
    kind = without_null(kind)
    if kind == BYTES:
        return dict(_BYTES)
    schema = schema_of(kind, is_answer=False)
    if isinstance(kind, Scalar) and kind.name not in _SHAPES:
        return schema
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}


def _kind_of_part(kind: Type) -> str:
    kind = without_null(kind)
    if kind == BYTES:
        return _OCTETS
    return "text/plain" if kind in (Scalar("str"), Scalar("path")) else "application/json"


def _answered(kind: Type) -> Json:
    """The answer to a call: that of the item, or those of a form's items."""
    result = schema_of(kind, is_answer=True)
    several = {
        "title": "Several",
        "description": "The answers to the items of a form, in its order.",
        "type": "object",
        "properties": {"results": {"type": "array", "items": _one_of_several(result)}},
        "required": ["results"],
    }
    content: Json = {}
    may_be_bytes = without_null(kind) == BYTES or isinstance(kind, Unknown)
    if may_be_bytes:
        content[_OCTETS] = {}
    of_one = {"type": "null"} if isinstance(kind, Optional) and may_be_bytes else result
    schema = several if kind == BYTES else {"anyOf": [of_one, several]}
    content["application/json"] = {"schema": schema}
    return {"description": f"{kind}", "headers": _headers(), "content": content}


def _one_of_several(result: Json) -> Json:
    name = {"type": "string", "description": "The file's name, or else the part's."}
    error = {"$ref": "#/components/schemas/Error/properties/error"}
    return {
        "oneOf": [
            {"type": "object", "properties": {"name": name, key: part}, "required": ["name", key]}
            for key, part in (("result", result), ("error", error))
        ]
    }


# Everything else


def _look(name: str, summary: str, kind: str, schema: Json | None = None, *failing: int) -> Json:
    """An operation that looks at something."""
    content = {kind: {} if schema is None else {"schema": schema}}
    answered = {"description": summary, "headers": _headers(), "content": content}
    failed = {str(status): _ref("responses", str(status)) for status in failing}
    return {
        "operationId": name,
        "tags": ["server"],
        "summary": summary,
        "parameters": [_ref("parameters", "X-Request-Id")],
        "responses": {"200": answered, **failed},
    }


def _drawing(flow: Flow, name: str) -> Json:
    return _look(
        name, f"The stages of flow `{flow.name}` as a picture.", "image/svg+xml", None, 404
    )


def _server_paths() -> Json:
    ready = _look("ready", "Whether requests are let in.", "application/json", _state())
    ready["responses"]["503"] = {**ready["responses"]["200"], "description": "They are not."}
    live = {"type": "object", "properties": {"status": {"const": "live"}}, "required": ["status"]}
    this = {"type": "object", "required": ["openapi"]}
    return {
        "/flows": {"get": _look("flows", "The flows.", "application/json", _listing(), 503)},
        "/health/live": {"get": _look("live", "That it lives.", "application/json", live)},
        "/health/ready": {"get": ready},
        "/metrics": {"get": _look("metrics", "Prometheus' text format.", "text/plain")},
        "/openapi.json": {"get": _look("openapi", "This.", "application/json", this, 503)},
        "/docs": {"get": _look("docs", "A page that shows this.", "text/html")},
    }


def _state() -> Json:
    return {
        "type": "object",
        "properties": {
            "status": {"enum": ["loading", "ready", "stalled", "draining"]},
            "requests": {"type": "integer", "minimum": 0, "description": "Those inside."},
        },
        "required": ["status", "requests"],
    }


def _listing() -> Json:
    text = {"type": "string"}
    parameter = {"name": text, "type": text, "required": {"type": "boolean"}}
    flow: Json = {
        **dict.fromkeys(("name", "input", "output", "path"), text),
        "doc": {"type": ["string", "null"]},
        "takes": {"enum": ["bytes", "json"]},
        "fields": {"type": "array", "items": _whole(parameter)},
        "parameters": {"type": "array", "items": _whole(parameter)},
    }
    return _whole({"flows": {"type": "array", "items": _whole(flow)}})


def _whole(properties: Json) -> Json:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _components() -> Json:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    error = {"code": text, "message": text, "stage": maybe, "flow": maybe, "request_id": text}
    deadline = {
        "name": "X-Deadline-Ms",
        "in": "header",
        "description": "Milliseconds that the answer may take.",
        "schema": {"type": "number", "minimum": 0.001, "maximum": 999_999_999},
    }
    priority = {
        "name": "X-Priority",
        "in": "header",
        "description": "Those of 1 are served first, then those of 2; 0 is the flow's own.",
        "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
    }
    request_id = {
        "name": "X-Request-Id",
        "in": "header",
        "description": "A name for the request, to be found in the answer and in the log.",
        "schema": {"type": "string", "pattern": "^[ -~]{1,128}$"},
    }
    descriptions = {
        "X-Request-Id": "The request's id: the client's own, or else a new one.",
        "Retry-After": "Seconds.",
        "Allow": "The methods there are.",
        "WWW-Authenticate": "Bearer.",
    }
    return {
        "schemas": {"Error": _whole({"error": _whole(error)})},
        "parameters": {given["name"]: given for given in (deadline, priority, request_id)},
        "headers": {n: {"description": d, "schema": text} for n, d in descriptions.items()},
        "responses": {
            str(status): _failed(status) for status in sorted({s for s, _ in ERRORS.values()})
        },
    }


def _failed(status: int) -> Json:
    """The response of a status: the codes it may have."""
    meanings = {code: words for code, (of, words) in ERRORS.items() if of == status}
    code = {"properties": {"code": {"enum": list(meanings)}}}
    schema = {"allOf": [_ref("schemas", "Error"), {"properties": {"error": code}}]}
    return {
        "description": " ".join(f"`{name}`: {words}" for name, words in meanings.items()),
        "headers": _headers(*_HEADERS.get(status, ())),
        "content": {"application/json": {"schema": schema}},
    }


def _headers(*names: str) -> Json:
    return {name: _ref("headers", name) for name in ("X-Request-Id", *names)}


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}
