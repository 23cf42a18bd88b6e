"""A server process: a listening socket, the flows loaded behind it, a stop that loses nothing.

Layer 4, and the only file importing uvicorn. Everything said over HTTP is in flowlang.serve.routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence, Sized
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import httptools
import uvicorn
import uvloop
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from flowlang.diagnostics import FlowError
from flowlang.serve.access import REFUSED, AccessLog
from flowlang.serve.answer import CLOSE
from flowlang.serve.backend import Backend, Local
from flowlang.serve.corked import Corked
from flowlang.serve.direct import DirectCall, Headers, Respond
from flowlang.serve.inference import emptied
from flowlang.serve.launch import (
    BACKLOG,
    STOPS,
    allow_many_connections,
    end,
    keep_freed_memory,
    listen,
    open_standard_streams,
    report,
    say,
    url_of,
)
from flowlang.serve.routes import MAX_BODY_BYTES, Service
from flowlang.serve.setup import MakeFace, Setup
from flowlang.serve.tls import Certificate, expect_no_goodbye
from flowlang.serve.token import Token

if TYPE_CHECKING:
    from flowlang.app import App
    from flowlang.serve.body import Receive, Scope, Send
    from flowlang.serve.supervisor import Reins
    from flowlang.serve.trace import Tracer

GRACE_S = 30.0
KEEP_ALIVE_S = 75  # longer than clients and balancers keep an idle connection
HEAD_S = 30.0  # from the first byte of a request's head to its last
HANDSHAKE_S = 20.0  # of TLS
LINGER_S = 0.2  # once all is answered: so that who writes just now is told, and not cut off
MAX_HEAD_BYTES = 64 << 10  # of a request's line and headers
URL_BYTES = 16  # by so much of a URL the head that it belongs to is found
MAX_WAITING = 16  # requests behind one that is not answered yet, before no more are read

BeginCall: TypeAlias = Callable[["Scope", bytes, Respond], "DirectCall | None"]

log = logging.getLogger("flowlang.serve")


def serve(
    load: Callable[[], App],
    host: str,
    port: int,
    *,
    grace_s: float = GRACE_S,
    drain_delay_s: float = 0.0,
    on_listen: Callable[[str], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    watches: bool = False,
    faces: Sequence[MakeFace] = (),
    certificate: Certificate | None = None,
    token: Token | None = None,
    metrics_port: int | None = None,
    fronts: int = 0,
    tracer: Tracer | None = None,
    tells_requests: bool = False,
) -> int:
    """Serve flows until SIGTERM or SIGINT. Returns the exit status.

    `load` runs in the background while health checks are answered already. `on_listen` and
    `on_ready` are told the URL: the one once connections are taken, the other once the flows are
    loaded; by default both print it. Port 0 is any free one.

    The first signal stops it: no request is let in, those inside are answered within `grace_s`
    seconds, status 0 (1 if they were not). A second one ends the process at once, status 1. So
    does, with its error printed, a port that cannot be had or a `load` that fails. Signals are
    listened to in the main thread only. With a `drain_delay_s` requests are let in for so long
    after the first signal, while health checks say already that none should be sent here.

    With `watches`, `load` is called again whenever a file of the flows has changed: the new ones
    take over while the old ones answer what they have. Where it fails the old ones stay.

    `faces` are other protocols to serve the same flows by; the URL told is then a list of them,
    HTTP's the last. With a `certificate` all is spoken over TLS, and with a `token` only who has it
    is let in, but over Thrift, which has no place for one. At `metrics_port` /metrics is told to
    everybody, and nothing else. Requests are followed by a `tracer`, which is started and closed
    here and is also the observer of what `load` gives; with `tells_requests` each of them has a
    line in the log.

    With `fronts`, as many processes read HTTP, and one more has the flows and the other protocols.
    """
    open_standard_streams()
    allow_many_connections()
    keep_freed_memory()
    try:
        listeners = [listen(host, port)]
        there = listeners[0].getsockname()[1]
        if fronts:
            # It is known now that nobody has the port: two servers could share it unnoticed.
            listeners[0].close()
            listeners = [listen(host, there, is_shared=True) for _ in range(fronts)]
        metrics_listener = None if metrics_port is None else listen(host, metrics_port)
    except FlowError as error:
        report(error)
        return 1
    setup = Setup(
        host=host,
        port=there,
        grace_s=grace_s,
        drain_delay_s=drain_delay_s,
        max_body_bytes=max_body_bytes,
        faces=faces,
        certificate=certificate,
        token=token,
        metrics_listener=metrics_listener,
        on_listen=on_listen,
        on_ready=on_ready,
        tracer=tracer,
        tells_requests=tells_requests,
    )
    if fronts:
        from flowlang.serve.ingest import serve_by_fronts

        return serve_by_fronts(setup, load, listeners, watches=watches)
    service = Service(max_body_bytes=max_body_bytes, token=token, tracer=tracer)
    backend = Local(load, service.let_in, watches=watches, grace_s=grace_s)
    return Server(setup, service, backend, listeners[0]).finish()


def _say_where(url: str) -> None:
    say(f"loading, on {url}")


class _Malformed(Exception):
    """What was sent is no request that could be served: it is answered with this, the last."""

    def __init__(self, message: str = "Invalid HTTP request received.", status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


_TOO_LARGE = "Request headers are too large."


class _Flow(FlowControl):
    """Reads no more while too many requests wait: uvicorn would, whenever one asks for its body."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if len(self._waiting) < MAX_WAITING:
            super().resume_reading()


class _Protocol(HttpToolsProtocol):
    """HTTP, with more of RFC 9110 and 9112 kept than uvicorn does, and limits on what is sent.

    A head is limited in its size and its time, and so is the silence behind it.
    """

    _in_head = False
    _in_trailer = False  # or just in front of a chunk
    _head_bytes = 0  # that have come of a head or a trailer without its end, or fewer
    _head_until_s = 0.0
    _is_long = False  # whether a head that ends now may be too large
    _hosts = 0
    _answering: RequestResponseCycle | None = None  # `cycle` is the last: others may be before it
    _malformed: _Malformed | None = None  # to be answered once all before it is
    _silent_until_s = math.inf  # then it is closed, unless something has come
    _timer: asyncio.TimerHandle | None = None
    _timer_at_s = math.inf
    _call: DirectCall | None = None  # that is under way without a task

    def __init__(self, *options: Any, begin_call: BeginCall | None = None, **more: Any) -> None:
        super().__init__(*options, **more)
        self._begin_call = begin_call

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._corked = Corked(transport)
        super().connection_made(self._corked)  # type: ignore[arg-type]
        self.flow = _Flow(transport, self.pipeline)
        self._close_if_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        answering = self._answering
        if answering is not None and not answering.response_complete:
            answering.disconnected = True
            answering.message_event.set()
        if self._call is not None and answering is not None:
            self._call.give_up()
            self._let_go(answering)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._is_long = self._in_head or len(data) > MAX_HEAD_BYTES
        if self._in_head or self._in_trailer:
            self._head_bytes += len(data)  # all of it, unless that ends: then it is of no use
        rest = None
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                rest = memoryview(data)[offer.args[0] :]
            if rest is not None:
                self._decline_upgrade(rest)
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a method below has raised
            self._turn_away(cause if isinstance(cause, _Malformed) else _Malformed())
            return
        if self._in_head:
            if not self._head_bytes:  # it has begun, behind a body perhaps
                self._head_bytes = len(data) - data.rfind(self.url[:URL_BYTES])
            if self._head_bytes > MAX_HEAD_BYTES:
                self._turn_away(_Malformed(_TOO_LARGE))
                return
        elif self._in_trailer and self._head_bytes > MAX_HEAD_BYTES:
            self._turn_away(_Malformed(_TOO_LARGE))
            return
        if (self.cycle is None or self.cycle.response_complete) and not self._corked.is_closing():
            self._close_if_idle()

    # Silence. A timer set and taken back for each request would be a fifteenth of what a small one
    # costs: there is one, which looks again when it is due.

    def _close_if_idle(self) -> None:
        until_s = self.loop.time() + self.timeout_keep_alive
        if self._in_head:
            if not self._head_until_s:
                self._head_until_s = self.loop.time() + HEAD_S
            until_s = self._head_until_s
        self._silent_until_s = until_s
        if until_s < self._timer_at_s:
            self._look_at(until_s)

    def _look_at(self, when_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(when_s, self._close_if_silent)
        self._timer_at_s = when_s

    def _close_if_silent(self) -> None:
        self._timer, self._timer_at_s = None, math.inf
        if self._silent_until_s <= self.loop.time():
            self.timeout_keep_alive_handler()
        elif self._silent_until_s < math.inf:
            self._look_at(self._silent_until_s)

    def _unset_keepalive_if_required(self) -> None:
        self._silent_until_s = math.inf

    # An upgrade, to HTTP/2 for example, is offered: clients take no for an answer (RFC 9110, 7.8)

    def _should_upgrade(self) -> bool:
        return True  # so that nothing is begun: the parser takes what is offered as accepted

    def _decline_upgrade(self, rest: memoryview | None) -> None:
        """Read a head anew, but without the upgrade that it offered, and then what is behind it."""
        while rest is not None:
            method = self.scope["method"]
            if method == "CONNECT":  # no upgrade, but there too something else is to follow
                self._in_head = True
                raise httptools.HttpParserError
            version = self.parser.get_http_version()
            lines = [b" ".join((method.encode(), self.url, b"HTTP/" + version.encode()))]
            lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"\r\n".join((*lines, b"", b"")))
            data, rest = rest, None
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                rest = data[offer.args[0] :]

    # A call that is there as a whole goes past ASGI: a task costs more than all else of it

    def _begin(self, cycle: RequestResponseCycle, application: Any) -> None:
        """Begin to answer the request that is next: as a mere call, if it is there as a whole."""
        if (
            self._begin_call is not None
            and not cycle.more_body
            and not self.flow.write_paused
            and not self._corked.is_closing()
            and not cycle.disconnected  # over TLS that is all there is to be seen of it
        ):
            respond = partial(self._respond, cycle)
            scope = cast("Scope", cycle.scope)
            self._call = self._begin_call(scope, bytes(cycle.body), respond)
            if self._call is not None:
                cycle.body = bytearray()  # or it would stay until the next request
                self.flow.resume_reading()  # or a client that hangs up would not be noticed
                return
        super()._start_asgi_task(cycle, application)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # Once all is read that has come: bodies are there then, and calls of many connections are
        # batched together.
        self.loop.call_soon(self._begin, cycle, app)

    def _respond(
        self, cycle: RequestResponseCycle, status: int, headers: Headers, body: bytes
    ) -> None:
        """Write a whole response, which is what uvicorn makes of two messages of an application."""
        lines = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
        if CLOSE in headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        cycle.response_started = cycle.response_complete = True
        self.transport.write(b"".join(lines))
        self.transport.write(body)
        if not cycle.keep_alive:
            self.transport.close()
        self._let_go(cycle)
        self.on_response_complete()

    def _let_go(self, cycle: RequestResponseCycle) -> None:
        """A call is over. Nothing may hold a connection that is: it would stay as garbage."""
        self._call = None
        cycle.on_response = lambda: None  # as uvicorn does

    # What is no request

    def _turn_away(self, malformed: _Malformed) -> None:
        """Answer what is malformed, in its turn, and hear no more."""
        if self._malformed is not None:
            return
        cycle = self.cycle
        is_next = cycle is None or cycle.response_complete
        if not self._in_head:  # it is in the body of the last request
            if cycle.response_started:
                self.transport.close()
                return
            is_next = cycle is self._answering
            if is_next:
                cycle.scope[REFUSED] = malformed.status  # type: ignore[literal-required]
            else:
                self.pipeline.popleft()
        if is_next:
            self._answer(malformed)
        else:
            self._malformed = malformed

    def _answer(self, malformed: _Malformed) -> None:
        status, body = malformed.status, malformed.message.encode("ascii")
        lines = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: text/plain; charset=utf-8",
            f"content-length: {len(body)}",
            "connection: close",
        )
        self.transport.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
        self.transport.close()

    # What the parser tells

    def on_message_begin(self) -> None:
        self._in_head, self._in_trailer, self._head_bytes = True, False, 0
        self._hosts, self._head_until_s = 0, 0.0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer: none is asked for (RFC 9110, 6.5.1)
            return
        name = name.lower()
        if name == b"host":
            self._hosts += 1
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding" and value.lower() != b"chunked":
            raise _Malformed("This Transfer-Encoding is not known here: send it chunked.", 501)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._is_long and self._head_size() > MAX_HEAD_BYTES:
            raise _Malformed(_TOO_LARGE)
        if self._hosts != 1 and (self._hosts or self.parser.get_http_version() != "1.0"):
            raise _Malformed(f"A request has one Host, not {self._hosts}.")
        if self.expect_100_continue:
            self.expect_100_continue = self.parser.get_http_version() != "1.0"
        super().on_headers_complete()
        self._in_head = False
        if not self.pipeline:
            self._answering = self.cycle
        else:
            self.flow.resume_reading()  # or a client that hangs up would not be noticed

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def on_chunk_header(self) -> None:
        self._in_trailer, self._head_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        self._in_trailer = False
        # A body in one piece is handed over as it came: uvicorn would copy it twice.
        if not self.cycle.body:
            self.cycle.body, body = body, b""  # type: ignore[assignment]
        super().on_body(body)

    def on_response_complete(self) -> None:
        self._corked.flush()
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._answering, application = self.pipeline.pop()
            self._start_asgi_task(self._answering, application)
        elif self._malformed is not None:
            self._answer(self._malformed)
            return
        else:
            self._close_if_idle()
        self.flow.resume_reading()

    def shutdown(self) -> None:
        super().shutdown()
        if self.scheme == "https" and self.transport.is_closing():
            expect_no_goodbye(self.transport)


def _config(application: Callable[[Scope, Receive, Send], Awaitable[None]]) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        loop="uvloop",
        http=_Protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="error",  # malformed requests are none of the operator's mistakes
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
    )


class Server(uvicorn.Server):
    """uvicorn, loading the flows once it listens, and emptying them before it stops.

    It stops on a signal, or with `reins` when they say so. Without a listener it speaks the other
    protocols alone.
    """

    def __init__(
        self,
        setup: Setup,
        service: Service,
        backend: Backend,
        listener: socket.socket | None,
        reins: Reins | None = None,
    ) -> None:
        super().__init__(_config(AccessLog(service) if setup.tells_requests else service))
        self.status = 0
        self.is_cut_short = False  # stopped with threads left inside a model's code
        self._setup = setup
        self._service = service
        self._backend = backend
        self._listener = listener
        self._reins = reins
        self._scheme = "https" if setup.certificate else "http"
        self._url = url_of(self._scheme, setup.host, setup.port)
        self._context = setup.certificate.context if setup.certificate else None
        self._listening: list[asyncio.Server] = []
        self._faces = [make(service.inference, setup) for make in setup.faces]
        self._emptying: asyncio.Task[None] | None = None

    def finish(self) -> int:
        """Serve until it is to stop. Returns the exit status."""
        tracer = self._setup.tracer
        if tracer is not None:
            tracer.start()
        uvloop.run(self.serve())
        if tracer is not None:
            tracer.close()
        if self.is_cut_short:
            # A thread inside ONNX Runtime aborts the process if the interpreter ends around it.
            (end if self._reins is None else self._reins.end)(self.status)
        return self.status

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        if self._reins is not None:
            loop.add_reader(self._reins, self._stop)
            yield
            loop.remove_reader(self._reins)
            return
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for stop in STOPS:
            loop.add_signal_handler(stop, self._on_signal)
        try:
            yield
        finally:
            for stop in STOPS:
                loop.remove_signal_handler(stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=[])
        await self._backend.prepare()
        try:
            if self._listener is not None:
                # A line in the log for each request is written around the application.
                begin_call = None if self._setup.tells_requests else self._service.begin_call
                await self._listen(self._listener, self.config, begin_call)
            host, metrics = self._setup.host, self._setup.metrics_listener
            urls = [url_of(face.scheme, host, await face.start()) for face in self._faces]
            if metrics is not None:
                urls.append(await self._listen_for_metrics(metrics))
        except (FlowError, OSError) as error:
            self._fail(error)
            return
        self._url = ", ".join([*urls, self._url])
        (self._setup.on_listen or _say_where)(self._url)
        self._backend.start(self._tell_ready, self._fail)

    async def _listen(
        self,
        listener: socket.socket,
        config: uvicorn.Config,
        begin_call: BeginCall | None = None,
    ) -> None:
        """Take connections. uvicorn itself would wait at the end for handshakes under way."""

        def connect() -> _Protocol:
            return _Protocol(
                config, self.server_state, app_state={}, _loop=self._loop, begin_call=begin_call
            )

        handshake_s = HANDSHAKE_S if self._context is not None else None
        self._listening.append(
            await self._loop.create_server(
                connect,
                sock=listener,
                ssl=self._context,
                backlog=BACKLOG,
                ssl_handshake_timeout=handshake_s,
            )
        )

    async def _listen_for_metrics(self, listener: socket.socket) -> str:
        """Tell metrics at a port of their own. Returns their URL."""
        config = _config(self._service.tell_metrics)
        config.load()
        await self._listen(listener, config)
        return f"{url_of(self._scheme, self._setup.host, listener.getsockname()[1])}/metrics"

    # Stopping

    def _on_signal(self) -> None:
        if self._emptying is not None:
            end(1)
        self._stop()

    def _tell_ready(self) -> None:
        if self._setup.on_ready is not None:
            self._setup.on_ready(self._url)
        else:
            say(f"serving {', '.join(self._service.names)} on {self._url}")

    def _fail(self, failure: BaseException) -> None:
        report(failure)
        self.status = 1
        self._stop()

    def _stop(self) -> None:
        if self._reins is not None:
            self._loop.remove_reader(self._reins)  # or it would say so again and again
        if self._emptying is None:
            self._emptying = self._loop.create_task(self._empty())

    async def _empty(self) -> None:
        """Answer what is inside, then close the flows and let uvicorn end."""
        clock = self._loop.time
        if self._setup.drain_delay_s and self._service.state == "ready":
            self._service.begin_to_drain()
            await asyncio.sleep(self._setup.drain_delay_s)
        until_s = clock() + self._setup.grace_s
        in_time = False
        try:
            self._backend.hold()
            self._service.refuse()
            stopping = (face.stop(self._setup.grace_s) for face in self._faces)
            in_time = all(
                await asyncio.gather(self._service.emptied(self._setup.grace_s), *stopping)
            )
            in_time = await self._backend.close(max(0.0, until_s - clock())) and in_time
            for listening in self._listening:
                listening.close()
            await asyncio.sleep(LINGER_S)
            in_time = await self._hang_up(max(1.0, until_s - clock())) and in_time
        finally:
            if not in_time:
                log.warning("flowlang: not all was answered in %g s", self._setup.grace_s)
                self.status = 1
            self.is_cut_short = self._backend.is_loading or not in_time
            self.config.timeout_graceful_shutdown = max(1, math.ceil(until_s - clock()))
            self.should_exit = True

    async def _hang_up(self, within_s: float) -> bool:
        """Close all connections, each once its client has taken what it was answered.

        Returns whether all did; those that have not by then are cut off.
        """
        connections = self.server_state.connections
        for connection in list(connections):
            connection.shutdown()
        in_time = await emptied(lambda: len(connections), within_s)
        for connection in list(connections):
            connection.transport.abort()
        return in_time
