"""A server process: a listening socket, the flows loaded behind it, a stop that loses nothing.

Layer 4, and the only file importing uvicorn. Everything said over HTTP is in flowlang.serve.routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flowlang.diagnostics import CompileError, FlowError
from flowlang.serve.access import AccessLog
from flowlang.serve.routes import MAX_BODY_BYTES, Service
from flowlang.serve.tls import Certificate
from flowlang.serve.token import Token
from flowlang.serve.watch import reload_on_change

if TYPE_CHECKING:
    from flowlang.app import App
    from flowlang.serve.body import Receive, Scope, Send
    from flowlang.serve.inference import Inference
    from flowlang.serve.trace import Tracer

GRACE_S = 30.0
BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than clients and balancers keep an idle connection
HANDSHAKE_S = 20.0  # of TLS
LINGER_S = 0.2  # once all is answered: so that who writes just now is told, and not cut off
MAX_HEAD_BYTES = 64 << 10  # of a request's line and headers
STOPS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger("flowlang.serve")


class Face(Protocol):
    """Another protocol beside HTTP, at a port of its own: flowlang.serve.grpc, .thrift."""

    scheme: str

    async def start(self) -> int:
        """Begin to listen. Returns the port. Raises OSError where it cannot be had."""

    async def stop(self, grace_s: float) -> bool:
        """Answer what is inside, then stop. Returns whether that was done in time."""


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
    faces: Sequence[Callable[[Inference], Face]] = (),
    certificate: Certificate | None = None,
    token: Token | None = None,
    metrics_port: int | None = None,
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

    `faces` are other protocols to serve the same flows by, made of what they answer with; the URL
    told is then a list of them, HTTP's the last. With a `certificate` HTTP is spoken over TLS, and
    with a `token` only who has it is let in; whoever makes the faces gives them theirs.
    At `metrics_port` /metrics is told to everybody, and nothing else. Requests are followed by a
    `tracer`, which is also the observer of what `load` gives; with `tells_requests` each of them
    over HTTP has a line in the log.
    """
    try:
        listener = _listen(host, port)
        metrics_listener = None if metrics_port is None else _listen(host, metrics_port)
    except FlowError as error:
        _report(error)
        return 1
    _allow_many_connections()
    service = Service(max_body_bytes=max_body_bytes, token=token, tracer=tracer)
    server = _Server(
        service,
        load,
        grace_s,
        host,
        listener,
        on_listen or (lambda url: _say(f"loading, on {url}")),
        on_ready or (lambda url: _say(f"serving {', '.join(service.names)} on {url}")),
        watches=watches,
        faces=[make(service.inference) for make in faces],
        certificate=certificate,
        metrics_listener=metrics_listener,
        tells_requests=tells_requests,
    )
    uvloop.run(server.serve())
    if tracer is not None:
        tracer.close()
    if server.is_cut_short:
        # A thread inside ONNX Runtime aborts the process if the interpreter ends around it.
        _end(server.status)
    return server.status


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises FlowError where that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(
            address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both
        )
    except OSError as error:
        raise FlowError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _allow_many_connections() -> None:
    """Each connection takes a file descriptor, and the usual soft limit is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _say(line: str) -> None:
    print(line, flush=True)


def _warn(line: str) -> None:
    log.warning("flowlang: %s", line)


def _end(status: int) -> None:
    """End the process without waiting for any thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Protocol(HttpToolsProtocol):
    """HTTP with a limit on the size of a request's head, and on the pauses before its end."""

    _head_bytes = 0
    _in_head = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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


class _Server(uvicorn.Server):
    """uvicorn, loading the flows once it listens, and emptying them before it stops."""

    def __init__(
        self,
        service: Service,
        load: Callable[[], App],
        grace_s: float,
        host: str,
        listener: socket.socket,
        on_listen: Callable[[str], None],
        on_ready: Callable[[str], None],
        *,
        watches: bool = False,
        faces: Sequence[Face] = (),
        certificate: Certificate | None = None,
        metrics_listener: socket.socket | None = None,
        tells_requests: bool = False,
    ) -> None:
        super().__init__(_config(AccessLog(service) if tells_requests else service))
        self.status = 0
        self.is_cut_short = False  # stopped with threads left inside a model's code
        self._service = service
        self._load = load
        self._grace_s = grace_s
        self._host = host
        self._listener = listener
        self._metrics_listener = metrics_listener
        self._scheme = "https" if certificate else "http"
        self._url = _url(self._scheme, host, listener.getsockname()[1])
        self._context = certificate.context if certificate else None
        self._listening: list[asyncio.Server] = []
        self._faces = faces
        self._on_listen = on_listen
        self._on_ready = on_ready
        self._app: App | None = None
        self._loader = threading.Thread(target=self._load_app, name="flowlang-load", daemon=True)
        self._emptying: asyncio.Task[None] | None = None
        self._watches = watches
        self._watching: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Future[bool]] = set()  # flows that others have taken over from

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
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
        try:
            await self._listen(self._listener, self.config)
            urls = [_url(face.scheme, self._host, await face.start()) for face in self._faces]
            if self._metrics_listener is not None:
                urls.append(await self._listen_for_metrics(self._metrics_listener))
        except OSError as error:
            _report(error)
            self.status = 1
            self._stop()
            return
        self._url = ", ".join([*urls, self._url])
        self._on_listen(self._url)
        self._loader.start()

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
        return f"{_url(self._scheme, self._host, listener.getsockname()[1])}/metrics"

    # Loading

    def _load_app(self) -> None:
        try:
            loaded: App | BaseException = self._load()
        except BaseException as error:  # or it would load for ever
            loaded = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it
            self._loop.call_soon_threadsafe(self._take, loaded)

    def _take(self, loaded: App | BaseException) -> None:
        if self._emptying is not None:
            return
        if not isinstance(loaded, BaseException):
            self._app = loaded
            self._service.let_in(loaded)
            self._on_ready(self._url)
            if self._watches:
                watching = reload_on_change(self._files, self._load, self._take_over, _warn)
                self._watching = self._loop.create_task(watching)
        else:
            _report(loaded)
            self.status = 1
            self._stop()

    def _files(self) -> list[str]:
        plans = self._app.physical.plans if self._app is not None else ()
        return [file for plan in plans for file in plan.files]

    def _take_over(self, app: App) -> None:
        """Let new flows take over; the old ones answer what they have, and are closed."""
        before, self._app = self._app, app
        self._service.let_in(app)
        if before is not None:
            closing = asyncio.ensure_future(asyncio.to_thread(before.close, self._grace_s))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        _say(f"reloaded: {', '.join(self._service.names)}")

    # Stopping

    def _on_signal(self) -> None:
        if self._emptying is not None:
            _end(1)
        self._stop()

    def _stop(self) -> None:
        if self._emptying is None:
            self._emptying = self._loop.create_task(self._empty())

    async def _empty(self) -> None:
        """Answer what is inside, then close the flows and let uvicorn end."""
        clock = self._loop.time
        until_s = clock() + self._grace_s
        is_loaded = self._app is not None or self.status != 0
        in_time = False
        if self._watching is not None:
            self._watching.cancel()
        try:
            self._service.refuse()
            stopping = (face.stop(self._grace_s) for face in self._faces)
            in_time = all(await asyncio.gather(self._service.emptied(self._grace_s), *stopping))
            closing = set(self._closing)
            if self._app is not None:
                left_s = max(0.0, until_s - clock())
                closing.add(asyncio.ensure_future(asyncio.to_thread(self._app.close, left_s)))
            in_time = all(await asyncio.gather(*closing)) and in_time
            for listening in self._listening:
                listening.close()
            await asyncio.sleep(LINGER_S)
        finally:
            if not in_time:
                _warn(f"not all was answered in {self._grace_s:g} s")
                self.status = 1
            self.is_cut_short = not (in_time and is_loaded)
            self.config.timeout_graceful_shutdown = max(1, math.ceil(until_s - clock()))
            self.should_exit = True


def _report(failure: BaseException) -> None:
    """Say why the flows cannot be served."""
    if isinstance(failure, CompileError):
        log.error("%s", failure)
    elif isinstance(failure, (FlowError, OSError)):
        log.error("flowlang: %s", failure)
    else:
        log.error("flowlang: the flows cannot be loaded", exc_info=failure)
