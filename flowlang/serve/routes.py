"""The ASGI application: routes, and the way of a request through a flow and back.

Layer 4. Written to the bare ASGI protocol, because a framework would cost more per request than
everything here. Knows nothing of sockets, signals or the loading of models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import BadRequest, Cancelled, Draining, RequestError
from flowlang.items import plain
from flowlang.plan.draw import plan_svg
from flowlang.plan.physical import MAX_BYTES, FlowProgram, PhysicalPlan
from flowlang.plan.types import Optional
from flowlang.serve.access import REFUSED, REQUEST_ID
from flowlang.serve.answer import (
    CLOSE,
    HTML,
    SVG,
    Answer,
    Refusal,
    check_json,
    deadline_of,
    error_answer,
    loading,
    priority_of,
    request_id_of,
    result_answer,
    to_json,
    told,
    wrong_method,
)
from flowlang.serve.body import (
    BodyReader,
    BrokenOff,
    Deadline,
    HungUp,
    Receive,
    Scope,
    Send,
    Watches,
)
from flowlang.serve.direct import DirectCall, Respond
from flowlang.serve.door import Called, Door, door_of
from flowlang.serve.form import (
    Part,
    form_fields,
    is_form,
    only_item,
    parts_of,
)
from flowlang.serve.inference import Inference, State, asked_again, emptied, known
from flowlang.serve.log import (
    tell_broken,
    tell_refused,
    tell_unanswered,
    tell_unanswered_part,
)
from flowlang.serve.metrics import KIND as METRICS
from flowlang.serve.metrics import Counts, metrics_text
from flowlang.serve.openapi import document
from flowlang.serve.token import Token
from flowlang.serve.v2 import InferenceRoutes, is_below, is_health, refused

if TYPE_CHECKING:
    from flowlang.app import App
    from flowlang.serve.trace import Trace, Tracer

MAX_BODY_BYTES = MAX_BYTES + (64 << 10)  # the largest picture, and room for what wraps it
BODY_S = 120.0  # a body that takes longer is cut off
STALLED_S = 5.0  # when stopping, a body that takes longer is cut off
# What is looked at without a token: health, by who cannot have one, and pages without any data.
OPEN = frozenset(("/", "/docs", "/health/live", "/health/ready"))
# Headers that ask for more than an answer to the body.
ASKS_MORE = frozenset((b"content-encoding", b"x-deadline-ms", b"x-priority"))

_PAGE_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        b"img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-cache"),
)


class Service:
    """The application. It begins without flows, `loading`; all methods belong to one event loop."""

    def __init__(
        self,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        body_s: float = BODY_S,
        token: Token | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._is_draining = False
        self.under_way = 0
        self.inference = Inference(tracer)
        self._inference_routes = InferenceRoutes(self.inference, max_body_bytes)
        self._watches = Watches()
        self._bodies = BodyReader(max_body_bytes, body_s)
        self._token = token
        self._tracer = tracer
        self._doors: dict[str, Door] = {}  # by path
        self._open: dict[str, Door] = {}  # the same while requests are let in, else empty
        self.names: list[str] = []
        self._counts = Counts()
        self._drawn: dict[str, tuple[PhysicalPlan, FlowProgram]] = {}  # by path of the drawing
        self._listing = b""
        self._described = b""
        self._page, self._docs = (
            resources.files(__package__).joinpath(name).read_bytes()
            for name in ("page.html", "docs.html")
        )

    @property
    def state(self) -> State:
        return self.inference.state

    @property
    def inside(self) -> int:
        """How many requests are inside the server: other processes of it may have some too."""
        return self.under_way

    def let_in(self, app: App) -> None:
        """Take requests for these flows."""
        self._counts.follow(app)
        self.open(app.flows)
        self._drawn = {
            f"/flows/{program.name}/plan.svg": (app.physical, program)
            for program in app.physical.programs
        }
        listed = [_listed(path, door) for path, door in self._doors.items() if path != "/"]
        self._listing = to_json({"flows": listed})
        free = None if self._token is None else OPEN
        self._described = to_json(document(list(app.flows.values()), free=free))
        self.inference.let_in(app)

    def open(self, flows: Mapping[str, Called]) -> None:
        """Let in calls of these flows."""
        doors = {f"/flows/{name}": door_of(flow) for name, flow in flows.items()}
        self.names = list(flows)
        if len(doors) == 1:
            doors["/"] = next(iter(doors.values()))
        self._doors = self._open = doors

    def begin_to_drain(self) -> None:
        """Say that none should be sent here any more, and let in who comes all the same."""
        self._is_draining = True
        self.inference.hinder("draining")

    def refuse(self) -> None:
        """Let no request in any more. Those inside go on."""
        self._is_draining = True
        self._open = {}
        self.inference.refuse()

    async def emptied(self, within_s: float) -> bool:
        """Wait until no request is inside, at most so long. Returns whether that is so."""
        patience_s = min(STALLED_S, within_s / 2)
        return await emptied(lambda: self.under_way, within_s, patience_s, self._bodies.cut_all)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _decline(scope, receive, send)
            return
        found = dict(scope["headers"])
        if len(found) != len(scope["headers"]):
            found = _joined(scope["headers"])
        scope[REQUEST_ID] = request_id = request_id_of(found.get(b"x-request-id"))
        method, path = scope["method"], scope["path"]
        if self._token is not None and not _is_open(method, path):
            try:
                self._token.check(found.get(b"authorization"))
            except Refusal as error:
                self._refuse(error, request_id)
                await self._send(send, self._turn_away(path, found, error, request_id), request_id)
                return
        door = self._open.get(path) if method == "POST" else None
        if door is None and not self._inference_routes.is_inference(method, path):
            answer = await self._look(method, path, request_id)
            await self._send(send, answer, request_id)
            return
        self.under_way += 1
        trace = None if self._tracer is None else self._follow(self._tracer, scope, found, door)
        try:
            if door is None:
                answer, request_id = await self._answer_inference(scope, found, request_id, receive)
            else:
                answer = await self._answer_call(
                    door, scope["query_string"], found, request_id, receive
                )
            if trace is not None:
                trace.answered(request_id.decode("ascii"), answer.status, answer.error)
            await self._send(send, answer, request_id)
        except BrokenOff:
            code = BadRequest.code if REFUSED in scope else Cancelled.code
            (self._flow_at(path) or self).count_refusal(code)
        except HungUp:
            pass
        finally:
            self.under_way -= 1
            if trace is not None:
                trace.end()

    def _follow(
        self, tracer: Tracer, scope: Scope, found: dict[bytes, bytes], door: Door | None
    ) -> Trace:
        path: str = scope["path"]
        name = door.flow.name if door is not None else path.split("/")[3]
        parent = {
            header.decode(): found[header].decode("latin-1")
            for header in (b"traceparent", b"tracestate")
            if header in found
        }
        attributes = {"http.request.method": scope["method"], "url.path": path}
        request_id = scope[REQUEST_ID].decode("ascii")
        return tracer.begin(known(name, self.names), parent, attributes, request_id)

    def count_refusal(self, code: str) -> None:
        """Count a request that was refused, and that is of no flow."""
        self.inference.count_refusal(code)

    def _refuse(self, error: RequestError, request_id: bytes) -> None:
        """Count a request that is refused and is of no flow, and tell of it."""
        self.count_refusal(error.code)
        tell_refused(request_id.decode("ascii"), error.code, error.message)

    def _tell_unanswered(self, path: str, error: RequestError, request_id: bytes) -> None:
        """Tell of a request that was not answered with a result: as one of its flow, if any."""
        flow, known_as = self._flow_at(path), request_id.decode("ascii")
        if flow is None:
            tell_refused(known_as, error.code, error.message)
        else:
            tell_unanswered(known_as, flow.name, error)

    def _flow_at(self, path: str) -> Called | None:
        """The flow that a request of this path is of, if that is there."""
        parts = path.split("/")  # of a flow or a model
        door = self._doors.get(path) or self._doors.get(f"/flows/{'/'.join(parts[3:4])}")
        return None if door is None else door.flow

    async def _send(self, send: Send, answer: Answer, request_id: bytes) -> None:
        headers = self._headers(answer, request_id)
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    def _headers(self, answer: Answer, request_id: bytes) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"content-type", answer.kind),
            (b"content-length", b"%d" % len(answer.body)),
            (b"x-request-id", request_id),
            *answer.headers,
        ]
        if self._is_draining:  # who asks again over a new connection may be sent elsewhere
            headers.append(CLOSE)
        return headers

    async def tell_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application of a port for metrics alone, where nobody is asked for a token."""
        if scope["type"] != "http":
            await _decline(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        request_id = request_id_of(dict(scope["headers"]).get(b"x-request-id"))
        try:
            if path != "/metrics":
                raise Refusal("not-found", 404, "this port has /metrics, and nothing else")
            if method not in ("GET", "HEAD"):
                raise wrong_method(method, "GET, HEAD")
            await self._send(send, self._show_metrics(), request_id)
        except Refusal as error:
            await self._send(send, error_answer(error, None, request_id), request_id)

    def _turn_away(
        self, path: str, found: dict[bytes, bytes], error: Refusal, request_id: bytes
    ) -> Answer:
        """The answer to who has not the token, whose body is not read."""
        answer = refused(error) if is_below(path) else error_answer(error, None, request_id)
        if self._bodies.is_bounded(found):
            return answer
        return replace(answer, headers=(*answer.headers, CLOSE))

    # Flows

    async def _answer_call(
        self,
        door: Door,
        query: bytes,
        found: dict[bytes, bytes],
        request_id: bytes,
        receive: Receive,
    ) -> Answer:
        flow = door.flow
        is_read = False
        try:
            deadline = _deadline_in(found)
            asked: dict[str, Any] = {"priority": priority_of(found.get(b"x-priority"))}
            parameters = door.parameters.of_query(query) if query else {}
            body: bytes | dict[str, Any] = await self._bodies.read(found, receive, deadline)
            items: list[Part] = []
            if isinstance(body, bytes) and is_form(found.get(b"content-type")):
                form = door.parameters.of_form(parts_of(found[b"content-type"], body))
                if twice := parameters.keys() & form.parameters.keys():
                    raise BadRequest(f"`{min(twice)}` is given in the query and in the form")
                parameters |= form.parameters
                items = form.items
                body = form.record or only_item(items, form.parameters)
            elif isinstance(body, bytes) and door.read is not None:
                check_json([body])
            if deadline is not None:
                asked["deadline_s"] = deadline.left_s()
            is_read = True
            call: Awaitable[Any]
            if len(items) > 1:
                call = self._call_each(door, items, asked | parameters, request_id)
            else:
                call = self._call(door, body, asked | parameters)
            return result_answer(await self._watches.unless_hung_up(call, receive))
        except HungUp:
            raise
        except Exception as error:
            if not is_read and isinstance(error, RequestError):
                flow.count_refusal(error.code)
            return self.unanswered(door, error, request_id)

    def unanswered(self, door: Door, error: BaseException, request_id: bytes) -> Answer:
        """The answer to a call that came to no result. It is told to the log too."""
        name = door.flow.name
        if not isinstance(error, RequestError):
            tell_broken(request_id.decode(), name, error)
            error = Refusal("internal", 500, "internal error")
        else:
            tell_unanswered(request_id.decode(), name, error)
        return error_answer(error, name, request_id)

    def begin_call(self, scope: Scope, body: bytes, respond: Respond) -> DirectCall | None:
        """Begin a call of a flow whose body is there already, without a task.

        None where it asks for more than an answer to its body, or is to be refused: then it goes
        the way of all other requests.
        """
        door = self._open.get(scope["path"]) if scope["method"] == "POST" else None
        headers = scope["headers"]
        if door is None or scope["query_string"] or self._tracer is not None:
            return None
        found = dict(headers)
        if (
            len(found) != len(headers)
            or not ASKS_MORE.isdisjoint(found)
            or is_form(found.get(b"content-type"))
            or not self._bodies.is_bounded(found)
        ):
            return None
        if self._token is not None:
            try:
                self._token.check(found.get(b"authorization"))
            except Refusal:
                return None
        self.under_way += 1
        call = DirectCall(self, body, request_id_of(found.get(b"x-request-id")), respond)
        call.begin(door)
        return call

    def leave(self, call: DirectCall, answer: Answer | None) -> None:
        """A call that was begun is over, with an answer to be sent or without."""
        self.under_way -= 1
        if answer is not None:
            call.respond(answer.status, self._headers(answer, call.request_id), answer.body)

    def successor(self, door: Door) -> Door | None:
        """The door that has taken over from one, or that one itself; None where none is open."""
        return self._open.get(f"/flows/{door.flow.name}")

    async def _answer_inference(
        self, scope: Scope, found: dict[bytes, bytes], request_id: bytes, receive: Receive
    ) -> tuple[Answer, bytes]:
        """The answer to an inference, and the request's id: its message may bring one."""
        headers = found.copy()
        found.pop(b"content-encoding", None)  # undone by the protocol, once the body is there
        try:
            deadline = _deadline_in(found)
            body = await self._bodies.read(found, receive, deadline)
            timeout_s = None if deadline is None else deadline.left_s()
        except RequestError as error:
            (self._flow_at(scope["path"]) or self).count_refusal(error.code)
            self._tell_unanswered(scope["path"], error, request_id)
            return refused(error), request_id
        answer = self.infer(scope["path"], headers, body, request_id, timeout_s)
        return await self._watches.unless_hung_up(answer, receive)

    async def infer(
        self,
        path: str,
        headers: dict[bytes, bytes],
        body: bytes,
        request_id: bytes,
        timeout_s: float | None,
    ) -> tuple[Answer, bytes]:
        """The answer to an inference of the Open Inference Protocol, and the request's id."""
        return await self._inference_routes.infer(path, headers, body, request_id, timeout_s)

    def _call(
        self, door: Door, body: bytes | dict[str, Any], asked: dict[str, Any]
    ) -> Awaitable[Any]:
        """The result of a call; of the flow that has taken over, where that happened meanwhile."""

        async def call(now: Door) -> Any:
            item = now.item(body, is_checked=now is door)  # another may take JSON where it did not
            return await now.flow.acall(item, **asked)

        return asked_again(door, lambda: self.successor(door), call)

    async def _call_each(
        self, door: Door, items: list[Part], asked: dict[str, Any], request_id: bytes
    ) -> dict[str, Any]:
        """Every item of a form through the flow: a result or an error for each, in order."""

        async def call(part: Part) -> dict[str, Any]:
            name = part.file_name if part.file_name is not None else part.name
            try:
                result = await self._call(door, part.content, asked)
            except RequestError as error:
                tell_unanswered_part(request_id.decode(), door.flow.name, name, error)
                return {"name": name, "error": told(error, door.flow.name, request_id)}
            return {"name": name, "result": plain(result)}

        return {"results": await asyncio.gather(*(call(part) for part in items))}

    # Everything else

    async def _look(self, method: str, path: str, request_id: bytes) -> Answer:
        return self.look(method, path, request_id)

    def look(self, method: str, path: str, request_id: bytes) -> Answer:
        """The answer to all but a call of a flow that is let in."""
        answer = self._look_up(method, path, request_id)
        if answer.error is not None:
            self._refuse(answer.error, request_id)
        return answer

    def _look_up(self, method: str, path: str, request_id: bytes) -> Answer:
        if is_below(path):
            return self._inference_routes.look(method, path)
        looks = {
            "/": lambda: Answer(200, self._page, HTML, _PAGE_HEADERS),
            "/docs": lambda: Answer(200, self._docs, HTML, _PAGE_HEADERS),
            "/openapi.json": lambda: self._once_loaded(self._described),
            "/flows": lambda: self._once_loaded(self._listing),
            "/health/live": lambda: Answer(200, b'{"status":"live"}'),
            "/health/ready": self._tell_ready,
            "/metrics": self._show_metrics,
        }
        try:
            if path in looks and method in ("GET", "HEAD"):
                return looks[path]()
            if path in self._drawn and method in ("GET", "HEAD"):
                return Answer(200, plan_svg(*self._drawn[path]).encode(), SVG)
            if path == "/" and method != "POST":
                raise wrong_method(method, "GET, HEAD, POST")
            if path in looks and path != "/":
                raise wrong_method(method, "GET, HEAD")
            raise self._refusal_of_call(method, path)
        except RequestError as error:
            return error_answer(error, None, request_id)

    def _refusal_of_call(self, method: str, path: str) -> RequestError:
        if self.state == "loading" and method == "POST":
            return loading()
        if path in self._doors:
            if method != "POST":
                return wrong_method(method, "POST")
            return Draining()
        paths = ", ".join(f"/flows/{name}" for name in self.names)
        if path == "/":
            return Refusal("not-found", 404, f"there are several flows, so POST to one: {paths}")
        hint = f"; flows take POST at {paths}" if paths else ""
        return Refusal("not-found", 404, f"there is nothing at this path{hint}")

    def _once_loaded(self, body: bytes) -> Answer:
        if not body:
            raise loading()
        return Answer(200, body)

    def _show_metrics(self) -> Answer:
        inference = self.inference
        text = metrics_text(self._counts, inference.status, inference.refusals)
        return Answer(200, text, METRICS)

    def _tell_ready(self) -> Answer:
        body = to_json({"status": self.inference.status, "requests": self.inside})
        return Answer(200 if self.inference.is_ready else 503, body)


def _joined(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Headers by name. Lines of one name are one list, in their order (RFC 9110, 5.3)."""
    lines: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        lines.setdefault(name, []).append(value)
    return {name: b", ".join(values) for name, values in lines.items()}


def _deadline_in(found: dict[bytes, bytes]) -> Deadline | None:
    """The deadline of a request that has come just now. Raises BadRequest."""
    given_s = deadline_of(found.get(b"x-deadline-ms"))
    return None if given_s is None else Deadline.within(given_s)


def _is_open(method: str, path: str) -> bool:
    """Whether a request is answered without a token."""
    return method in ("GET", "HEAD") and (path in OPEN or is_health(path))


def _listed(path: str, door: Door) -> dict[str, Any]:
    flow = door.flow
    fields = form_fields(flow.input, [p.name for p in flow.parameters])
    return {
        "name": flow.name,
        "doc": flow.doc,
        "input": str(flow.input),
        "output": str(flow.output),
        "path": path,
        "takes": "bytes" if door.read is None else "json",
        "fields": [
            {"name": name, "type": str(kind), "required": not isinstance(kind, Optional)}
            for name, kind in fields.items()
        ],
        "parameters": [
            {"name": p.name, "type": str(p.type), "required": p.is_required}
            for p in flow.parameters
        ],
    }


async def _decline(scope: Scope, receive: Receive, send: Send) -> None:
    """Lifespan events need nothing here, and there are no WebSockets."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
    while scope["type"] == "lifespan":
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


def asgi(app: App, *, max_body_bytes: int = MAX_BODY_BYTES) -> Service:
    """Running flows as an ASGI application. Whoever loaded the app closes it."""
    service = Service(max_body_bytes=max_body_bytes)
    service.let_in(app)
    return service
