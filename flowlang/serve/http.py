"""A server process: a listening socket, the flows loaded behind it, a stop that loses nothing.

Layer 4, and the only file importing uvicorn. Everything said over HTTP is in flowlang.serve.routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flowlang.diagnostics import FlowError
from flowlang.serve.access import AccessLog
from flowlang.serve.backend import Backend, Local
from flowlang.serve.corked import Corked
from flowlang.serve.launch import (
    BACKLOG,
    STOPS,
    allow_many_connections,
    end,
    keep_freed_memory,
    listen,
    report,
    url_of,
)
from flowlang.serve.routes import MAX_BODY_BYTES, Service
from flowlang.serve.setup import MakeFace, Setup
from flowlang.serve.tls import Certificate
from flowlang.serve.token import Token

if TYPE_CHECKING:
    from flowlang.app import App
    from flowlang.serve.body import Receive, Scope, Send
    from flowlang.serve.supervisor import Reins
    from flowlang.serve.trace import Tracer

GRACE_S = 30.0
KEEP_ALIVE_S = 75  # longer than clients and balancers keep an idle connection
HANDSHAKE_S = 20.0  # of TLS
LINGER_S = 0.2  # once all is answered: so that who writes just now is told, and not cut off
MAX_HEAD_BYTES = 64 << 10  # of a request's line and headers

log = logging.getLogger("flowlang.serve")


def serve(
    load: Callable[[], App],
    host: str,
    port: int,
    *,
    grace_s: float = GRACE_S,
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
    listened to in the main thread only.

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


def _say(line: str) -> None:
    print(line, flush=True)


def _say_where(url: str) -> None:
    _say(f"loading, on {url}")


def _warn(line: str) -> None:
    log.warning("flowlang: %s", line)


class _Protocol(HttpToolsProtocol):
    """HTTP with a limit on the size of a request's head, and on the pauses before its end."""

    _head_bytes = 0
    _in_head = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._corked = Corked(transport)
        super().connection_made(self._corked)  # type: ignore[arg-type]
        self._close_if_idle()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("Request headers are too large.")
            else:
                self._close_if_idle()

    def _close_if_idle(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        # A body in one piece is handed over as it came: uvicorn would copy it twice.
        if not self.cycle.body:
            self.cycle.body, body = body, b""  # type: ignore[assignment]
        super().on_body(body)

    def on_response_complete(self) -> None:
        self._corked.flush()
        super().on_response_complete()

    def shutdown(self) -> None:
        super().shutdown()
        if self.scheme == "https" and self.transport.is_closing():
            # TLS ends with a goodbye from both, and a client that is idle does not look for ours.
            # So its own is taken as said; what is still to be sent to it is sent all the same.
            connected = self.transport.get_extra_info("socket")
            with (
                contextlib.suppress(OSError),
                socket.socket(fileno=os.dup(connected.fileno())) as ours,
            ):
                ours.shutdown(socket.SHUT_RD)


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

    It stops on a signal, or with `reins` when they say so. Without a
    listener it speaks the other protocols alone.
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
                await self._listen(self._listener, self.config)
            host, metrics = self._setup.host, self._setup.metrics_listener
            urls = [url_of(face.scheme, host, await face.start()) for face in self._faces]
            if metrics is not None:
                urls.append(await self._listen_for_metrics(metrics))
        except OSError as error:
            self._fail(error)
            return
        self._url = ", ".join([*urls, self._url])
        (self._setup.on_listen or _say_where)(self._url)
        self._backend.start(self._tell_ready, self._fail)

    async def _listen(self, listener: socket.socket, config: uvicorn.Config) -> None:
        """Take connections. uvicorn itself would wait at the end for handshakes under way."""

        def connect() -> _Protocol:
            return _Protocol(config, self.server_state, app_state={}, _loop=self._loop)

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
            _say(f"serving {', '.join(self._service.names)} on {self._url}")

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
        until_s = clock() + self._setup.grace_s
        is_loaded = self._backend.is_loaded or self.status != 0
        in_time = False
        try:
            self._service.refuse()
            stopping = (face.stop(self._setup.grace_s) for face in self._faces)
            in_time = all(
                await asyncio.gather(self._service.emptied(self._setup.grace_s), *stopping)
            )
            in_time = await self._backend.close(max(0.0, until_s - clock())) and in_time
            for listening in self._listening:
                listening.close()
            await asyncio.sleep(LINGER_S)
        finally:
            if not in_time:
                _warn(f"not all was answered in {self._setup.grace_s:g} s")
                self.status = 1
            self.is_cut_short = not (in_time and is_loaded)
            self.config.timeout_graceful_shutdown = max(1, math.ceil(until_s - clock()))
            self.should_exit = True
