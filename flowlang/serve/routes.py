"""The ASGI application: routes, and the way of a request through a flow and back.

Layer 4. Written to the bare ASGI protocol, because a framework would cost more per request than
everything here. Knows nothing of sockets, signals or the loading of models.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from flowlang.diagnostics import BadRequest, Draining, FlowError, RequestError, StageFailed
from flowlang.items import plain
from flowlang.plan.draw import plan_svg
from flowlang.plan.physical import MAX_BYTES, FlowProgram, PhysicalPlan
from flowlang.serve.answer import (
    HTML,
    SVG,
    WANTED,
    Answer,
    Refusal,
    deadline_of,
    encode,
    error_answer,
    reader_of,
    request_id_of,
    to_json,
    told,
)
from flowlang.serve.form import ParameterReader, Part, is_form, only_item, parts_of
from flowlang.serve.inference import Inference
from flowlang.serve.metrics import KIND as METRICS
from flowlang.serve.metrics import metrics_text
from flowlang.serve.v2 import InferenceRoutes, is_below, refused

if TYPE_CHECKING:
    from flowlang.app import App, Flow

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

Result = TypeVar("Result")

MAX_BODY_BYTES = MAX_BYTES + (64 << 10)  # the largest picture, and room for what wraps it
BODY_S = 120.0  # a body that takes longer is cut off
STALLED_S = 5.0  # when stopping, a body that takes longer is cut off
WATCH_AFTER_S = 0.05  # a client is watched for hanging up once its answer takes longer

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

log = logging.getLogger("flowlang.serve")


class _HungUp(Exception):
    """The client is gone: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class _Door:
    """A flow that can be called, and what makes its item of a body."""

    flow: Flow
    read: Callable[[bytes], Any] | None
    parameters: ParameterReader

    def item(self, body: bytes) -> Any:
        """The flow's item, as a body brings it. Raises BadRequest."""
        return body if self.read is None else self.read(body)


class Service:
    """The application. It begins without flows, `loading`; all methods belong to one event loop."""

    def __init__(self, *, max_body_bytes: int = MAX_BODY_BYTES, body_s: float = BODY_S) -> None:
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.under_way = 0
        self.inference = Inference()
        self._inference_routes = InferenceRoutes(self.inference, max_body_bytes)
        self._max_body_bytes = max_body_bytes
        self._body_s = body_s
        self._doors: dict[str, _Door] = {}  # by path
        self._open: dict[str, _Door] = {}  # the same while requests are let in, else empty
        self.names: list[str] = []
        self._apps: Sequence[App] = ()
        self._drawn: dict[str, tuple[PhysicalPlan, FlowProgram]] = {}  # by path of the drawing
        self._listing = b""
        self._reading: dict[asyncio.Task[Any], bool] = {}  # True once it is cut off
        self._watches = _Watches()
        self._page = resources.files(__package__).joinpath("page.html").read_bytes()

    def let_in(self, apps: Iterable[App]) -> None:
        """Take requests for these flows. Raises FlowError if two have one name."""
        self._apps = tuple(apps)
        doors: dict[str, _Door] = {}
        for flow in (flow for app in self._apps for flow in app.flows.values()):
            path = f"/flows/{flow.name}"
            if path in doors:
                raise FlowError(f"two flows are named `{flow.name}`: give one another name")
            doors[path] = _Door(flow, reader_of(flow.input), ParameterReader(flow.parameters))
        self.names = [door.flow.name for door in doors.values()]
        self._drawn = {
            f"/flows/{program.name}/plan.svg": (app.physical, program)
            for app in self._apps
            for program in app.physical.programs
        }
        self._listing = to_json({"flows": [_listed(path, d) for path, d in doors.items()]})
        if len(doors) == 1:
            doors["/"] = next(iter(doors.values()))
        self._doors = self._open = doors
        self.inference.let_in(self._apps)
        self.state = "ready"

    def refuse(self) -> None:
        """Let no request in any more. Those inside go on."""
        self.state = "draining"
        self._open = {}
        self.inference.refuse()

    async def emptied(self, within_s: float) -> bool:
        """Wait until no request is inside, at most so long. Returns whether that is so."""
        clock = asyncio.get_running_loop().time
        start_s = clock()
        while self.under_way and clock() < start_s + within_s:
            if clock() > start_s + min(STALLED_S, within_s / 2):
                for task in self._reading:
                    self._cut(task)
            await asyncio.sleep(0.01)
        return not self.under_way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _decline(scope, receive, send)
            return
        found = {name: value for name, value in scope["headers"] if name in WANTED}
        request_id = request_id_of(found.get(b"x-request-id"))
        method, path = scope["method"], scope["path"]
        door = self._open.get(path) if method == "POST" else None
        if door is None and not self._inference_routes.is_inference(method, path):
            answer = self._answer_elsewhere(method, path, request_id)
            await self._send(send, answer, request_id)
            return
        self.under_way += 1
        try:
            if door is None:
                answer = await self._answer_inference(scope, found, receive)
            else:
                answer = await self._answer_call(
                    door, scope["query_string"], found, request_id, receive
                )
            await self._send(send, answer, request_id)
        except _HungUp:
            pass
        finally:
            self.under_way -= 1

    async def _send(self, send: Send, answer: Answer, request_id: bytes) -> None:
        headers = [
            (b"content-type", answer.kind),
            (b"content-length", b"%d" % len(answer.body)),
            (b"x-request-id", request_id),
            *answer.headers,
        ]
        if self.state == "draining":
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    # Flows

    async def _answer_call(
        self,
        door: _Door,
        query: bytes,
        found: dict[bytes, bytes],
        request_id: bytes,
        receive: Receive,
    ) -> Answer:
        flow = door.flow
        try:
            deadline_s = deadline_of(found.get(b"x-deadline-ms"))
            parameters = door.parameters.of_query(query) if query else {}
            body = await self._read_body(found, receive)
            items: list[Part] = []
            if is_form(found.get(b"content-type")):
                given, items = door.parameters.of_form(parts_of(found[b"content-type"], body))
                if twice := parameters.keys() & given.keys():
                    raise BadRequest(f"`{min(twice)}` is given in the query and in the form")
                parameters |= given
                body = only_item(items, given)

            def call(door: _Door) -> Awaitable[Any]:
                if len(items) > 1:
                    return _call_each(door, items, deadline_s, parameters, request_id)
                return door.flow.acall(door.item(body), deadline_s=deadline_s, **parameters)

            kind, encoded = encode(
                await self._watches.unless_hung_up(self._call(door, call), receive)
            )
            return Answer(200, encoded, kind)
        except RequestError as error:
            level = logging.WARNING if isinstance(error, StageFailed) else logging.INFO
            log.log(level, "request %s of flow `%s`: %s", request_id.decode(), flow.name, error)
            return error_answer(error, flow.name, request_id)
        except _HungUp:
            raise
        except Exception:
            log.exception("request %s of flow `%s` failed", request_id.decode(), flow.name)
            return error_answer(Refusal("internal", 500, "internal error"), flow.name, request_id)

    async def _answer_inference(
        self, scope: Scope, found: dict[bytes, bytes], receive: Receive
    ) -> Answer:
        found.pop(b"content-encoding", None)  # undone by the protocol, once the body is there
        try:
            body = await self._read_body(found, receive)
        except RequestError as error:
            return refused(error)
        answer = self._inference_routes.infer(scope["path"], dict(scope["headers"]), body)
        return await self._watches.unless_hung_up(answer, receive)

    async def _call(self, door: _Door, call: Callable[[_Door], Awaitable[Any]]) -> Any:
        """The result of a call; of the flow that has taken over, where that happened meanwhile."""
        try:
            return await call(door)
        except Draining:
            successor = self._open.get(f"/flows/{door.flow.name}", door)
            if successor is door:
                raise
            return await call(successor)

    async def _read_body(self, found: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises Refusal for one that is too long, or too slow."""
        if found.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal("unsupported-encoding", 415, "send the body without Content-Encoding")
        if int(found.get(b"content-length", b"0")) > self._max_body_bytes:
            raise self._too_large(is_last=False)  # its end is known: the rest is passed over
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _HungUp
        first: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(first) > self._max_body_bytes:
                raise self._too_large(is_last=False)
            return first
        return await self._read_rest(first, receive)

    async def _read_rest(self, first: bytes, receive: Receive) -> bytes:
        loop, task = asyncio.get_running_loop(), _this_task()
        chunks, size, more = [first], len(first), True
        self._reading[task] = False
        timer = loop.call_later(self._body_s, self._cut, task)
        try:
            while more:
                if size > self._max_body_bytes:
                    raise self._too_large(is_last=True)
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _HungUp
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                more = message.get("more_body", False)
        except asyncio.CancelledError:
            if not self._reading[task]:
                raise
            if self.state == "draining":
                raise Draining("the app is stopping, and not all of the body is there") from None
            late = f"not all of the body was there within {self._body_s:g} s"
            raise Refusal("body-timeout", 408, late, is_last=True) from None
        finally:
            timer.cancel()
            del self._reading[task]
        if size > self._max_body_bytes:
            raise self._too_large(is_last=False)
        return b"".join(chunks)

    def _cut(self, task: asyncio.Task[Any]) -> None:
        if not self._reading.get(task, True):
            self._reading[task] = True
            task.cancel()

    def _too_large(self, *, is_last: bool) -> Refusal:
        message = f"the body is larger than {self._max_body_bytes:,} bytes"
        return Refusal("too-large", 413, message, is_last=is_last)

    # Everything else

    def _answer_elsewhere(self, method: str, path: str, request_id: bytes) -> Answer:
        """The answer to all but a call of a flow that is let in."""
        if is_below(path):
            return self._inference_routes.look(method, path)
        looks = {
            "/": self._show_page,
            "/flows": self._list_flows,
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
                raise _wrong_method(method, "GET, HEAD, POST")
            if path in looks and path != "/":
                raise _wrong_method(method, "GET, HEAD")
            raise self._refusal_of_call(method, path)
        except RequestError as error:
            return error_answer(error, None, request_id)

    def _refusal_of_call(self, method: str, path: str) -> RequestError:
        if path in self._doors:
            if method != "POST":
                return _wrong_method(method, "POST")
            return Draining("the app is stopping and takes no more requests")
        if self.state == "loading" and method == "POST":
            return Refusal("loading", 503, "the flows are not loaded yet")
        known = ", ".join(f"/flows/{name}" for name in self.names)
        if path == "/":
            return Refusal("not-found", 404, f"there are several flows, so POST to one: {known}")
        hint = f"; flows take POST at {known}" if known else ""
        return Refusal("not-found", 404, f"there is nothing at this path{hint}")

    def _show_page(self) -> Answer:
        return Answer(200, self._page, HTML, _PAGE_HEADERS)

    def _list_flows(self) -> Answer:
        if self.state == "loading":
            raise Refusal("loading", 503, "the flows are not loaded yet")
        return Answer(200, self._listing)

    def _show_metrics(self) -> Answer:
        return Answer(200, metrics_text(self._apps, self.state), METRICS)

    def _tell_ready(self) -> Answer:
        body = to_json({"status": self.state, "requests": self.under_way})
        return Answer(200 if self.state == "ready" else 503, body)


async def _call_each(
    door: _Door,
    items: list[Part],
    deadline_s: float | None,
    parameters: dict[str, Any],
    request_id: bytes,
) -> dict[str, Any]:
    """Every item of a form through the flow: a result or an error for each, in order."""

    async def call(part: Part) -> dict[str, Any]:
        name = part.file_name if part.file_name is not None else part.name
        try:
            item = door.item(part.content)
            result = await door.flow.acall(item, deadline_s=deadline_s, **parameters)
        except RequestError as error:
            log.info("request %s, `%s`: %s", request_id.decode(), name, error)
            return {"name": name, "error": told(error, door.flow.name, request_id)}
        return {"name": name, "result": plain(result)}

    return {"results": await asyncio.gather(*(call(part) for part in items))}


class _Watches:
    """Cancels calls whose clients hang up.

    A client is watched once its answer is late, WATCH_AFTER_S to twice that: most answers come
    before. One timer looks after all calls, for a timer each would cost more than the rest of this.
    """

    def __init__(self) -> None:
        self._young: set[_Watch] = set()  # since the timer last went off
        self._old: set[_Watch] = set()
        self._is_ticking = False

    async def unless_hung_up(self, call: Awaitable[Result], receive: Receive) -> Result:
        """The result of a call. Raises _HungUp once nobody is there to be told."""
        watch = _Watch(receive)
        self._young.add(watch)
        if not self._is_ticking:
            self._is_ticking = True
            asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._tick)
        try:
            return await call
        except asyncio.CancelledError:
            if watch.hung_up:
                raise _HungUp from None
            raise
        finally:
            self._young.discard(watch)
            self._old.discard(watch)
            watch.stop()

    def _tick(self) -> None:
        for watch in self._old:
            watch.begin()
        self._old, self._young = self._young, set()
        self._is_ticking = bool(self._old)
        if self._is_ticking:
            asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._tick)


class _Watch:
    """Cancels the task that made it when its client hangs up, once it has begun."""

    __slots__ = ("_receive", "_task", "_watcher", "hung_up")

    def __init__(self, receive: Receive) -> None:
        self.hung_up = False
        self._receive = receive
        self._task = _this_task()
        self._watcher: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._wait())

    def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.hung_up = True
        self._task.cancel()


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("the application must be called in a task")
    return task


def _wrong_method(method: str, allowed: str) -> Refusal:
    message = f"{method} is not possible at this path; {allowed} is"
    return Refusal("wrong-method", 405, message, headers=((b"allow", allowed.encode()),))


def _listed(path: str, door: _Door) -> dict[str, Any]:
    flow = door.flow
    return {
        "name": flow.name,
        "doc": flow.doc,
        "input": str(flow.input),
        "output": str(flow.output),
        "path": path,
        "takes": "bytes" if door.read is None else "json",
        "parameters": [
            {"name": p.name, "type": str(p.type), "required": p.default is None}
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


def asgi(*apps: App, max_body_bytes: int = MAX_BODY_BYTES) -> Service:
    """Running flows as an ASGI application. Whoever loaded the apps closes them.

    Raises FlowError if two flows have one name.
    """
    service = Service(max_body_bytes=max_body_bytes)
    service.let_in(apps)
    return service
