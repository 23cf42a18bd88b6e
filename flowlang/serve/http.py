"""A server process: a listening socket, the flows loaded behind it, a stop that loses nothing.

Layer 4, and the only file importing uvicorn. Everything said over HTTP is in flowlang.serve.routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flowlang.diagnostics import CompileError, FlowError
from flowlang.serve.routes import MAX_BODY_BYTES, Service
from flowlang.serve.watch import reload_on_change

if TYPE_CHECKING:
    from flowlang.app import App
    from flowlang.serve.inference import Inference

GRACE_S = 30.0
BACKLOG = 2048
KEEP_ALIVE_S = 75  # longer than clients and balancers keep an idle connection
LINGER_S = 0.2  # once all is answered: so that who writes just now is told, and not cut off
KEPT_BYTES = 64 << 20  # at the top of a heap; what is larger than half of it lies in none
MAX_HEAD_BYTES = 64 << 10  # of a request's line and headers
MAX_CORKED_BYTES = 64 << 10  # of a body that is written with its head
STOPS = (signal.SIGTERM, signal.SIGINT)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Face(Protocol):
    """Another protocol beside HTTP, at a port of its own: flowlang.serve.grpc, .thrift."""

    scheme: str

    async def start(self) -> int:
        """Begin to listen. Returns the port. Raises OSError where it cannot be had."""

    async def stop(self, grace_s: float) -> bool:
        """Answer what is inside, then stop. Returns whether that was done in time."""


def serve(
    load: Callable[[], Sequence[App]],
    host: str,
    port: int,
    *,
    grace_s: float = GRACE_S,
    on_listen: Callable[[str], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    watches: bool = False,
    faces: Sequence[Callable[[Inference], Face]] = (),
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
    told is then a list of them, HTTP's the last.
    """
    try:
        listener = _listen(host, port)
    except OSError as error:
        print(f"flowlang: cannot listen on {host}:{port}: {error.strerror}", file=sys.stderr)
        return 1
    _allow_many_connections()
    _keep_freed_memory()
    service = Service(max_body_bytes=max_body_bytes)
    server = _Server(
        service,
        load,
        grace_s,
        _url(host, listener),
        on_listen or (lambda url: _say(f"loading, on {url}")),
        on_ready or (lambda url: _say(f"serving {', '.join(service.names)} on {url}")),
        watches=watches,
        faces=[make(service.inference) for make in faces],
    )
    uvloop.run(server.serve(sockets=[listener]))
    if server.is_cut_short:
        # A thread inside ONNX Runtime aborts the process if the interpreter ends around it.
        _end(server.status)
    return server.status


def _listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _allow_many_connections() -> None:
    """Each connection takes a file descriptor, and the usual soft limit is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _keep_freed_memory() -> None:
    """Have glibc keep what bodies and pictures have used, rather than give it back each time.

    Given back and had again, memory is cleared by the kernel page by page: measured on bodies of
    65 KB, up to ten page faults a request and a third of the processor time spent on it. Naming
    one of the two thresholds stops glibc from raising the other by itself, so both are named.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        set_option(_M_TRIM_THRESHOLD, KEPT_BYTES)


def _say(line: str) -> None:
    print(line, flush=True)


def _warn(line: str) -> None:
    print(f"flowlang: {line}", file=sys.stderr, flush=True)


def _end(status: int) -> None:
    """End the process without waiting for any thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Corked:
    """A transport that keeps a response's head back until its body is there, to write both at once.

    uvicorn writes the two apart: two system calls and two packets for an answer of a few bytes,
    which is a tenth of what a small answer costs, and wakes its client twice.
    """

    __slots__ = ("_head", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing  # asked for every response

    def write(self, data: bytes) -> None:
        if self._head:
            head, self._head = self._head, b""
            if len(data) <= MAX_CORKED_BYTES:
                data = head + data
            else:  # to copy it would cost more than a packet
                self._transport.write(head)
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100 "):
            self._head = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Write a head that no body follows."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Protocol(HttpToolsProtocol):
    """HTTP with a limit on the size of a request's head, and on the pauses before its end."""

    _head_bytes = 0
    _in_head = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._corked = _Corked(transport)
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


class _Server(uvicorn.Server):
    """uvicorn, loading the flows once it listens, and emptying them before it stops."""

    def __init__(
        self,
        service: Service,
        load: Callable[[], Sequence[App]],
        grace_s: float,
        url: str,
        on_listen: Callable[[str], None],
        on_ready: Callable[[str], None],
        *,
        watches: bool = False,
        faces: Sequence[Face] = (),
    ) -> None:
        super().__init__(
            uvicorn.Config(
                service,
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
        )
        self.status = 0
        self.is_cut_short = False  # stopped with threads left inside a model's code
        self._service = service
        self._load = load
        self._grace_s = grace_s
        self._url = url
        self._faces = faces
        self._on_listen = on_listen
        self._on_ready = on_ready
        self._apps: Sequence[App] = ()
        self._loader = threading.Thread(target=self._load_apps, name="flowlang-load", daemon=True)
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
        await super().startup(sockets)
        host = self._url.removeprefix("http://").rpartition(":")[0]
        try:
            urls = [f"{face.scheme}://{host}:{await face.start()}" for face in self._faces]
        except OSError as error:
            _report(error)
            self.status = 1
            self._stop()
            return
        self._url = ", ".join([*urls, self._url])
        self._on_listen(self._url)
        self._loader.start()

    # Loading

    def _load_apps(self) -> None:
        try:
            apps: Sequence[App] = self._load()
            failure: BaseException | None = None
        except BaseException as error:  # or it would load for ever
            apps, failure = (), error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for them
            self._loop.call_soon_threadsafe(self._take, apps, failure)

    def _take(self, apps: Sequence[App], failure: BaseException | None) -> None:
        if self._emptying is not None:
            return
        self._apps = apps
        if failure is None:
            try:
                self._service.let_in(apps)
            except FlowError as error:
                failure = error
        if failure is None:
            self._on_ready(self._url)
            if self._watches:
                watching = reload_on_change(self._files, self._load, self._take_over, _warn)
                self._watching = self._loop.create_task(watching)
        else:
            _report(failure)
            self.status = 1
            self._stop()

    def _files(self) -> list[str]:
        return [file for app in self._apps for file in app.plan.files]

    def _take_over(self, apps: Sequence[App]) -> None:
        """Let new flows take over; the old ones answer what they have, and are closed."""
        before, self._apps = self._apps, apps
        self._service.let_in(apps)
        for app in before:
            closing = asyncio.ensure_future(asyncio.to_thread(app.close, self._grace_s))
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
        is_loaded = bool(self._apps) or self.status != 0
        in_time = False
        if self._watching is not None:
            self._watching.cancel()
        try:
            self._service.refuse()
            stopping = (face.stop(self._grace_s) for face in self._faces)
            in_time = all(await asyncio.gather(self._service.emptied(self._grace_s), *stopping))
            closing = [
                asyncio.to_thread(app.close, max(0.0, until_s - clock())) for app in self._apps
            ]
            in_time = all(await asyncio.gather(*closing, *self._closing)) and in_time
            for listening in self.servers:
                listening.close()
            await asyncio.sleep(LINGER_S)
        finally:
            if not in_time:
                print(f"flowlang: not all was answered in {self._grace_s:g} s", file=sys.stderr)
                self.status = 1
            self.is_cut_short = not (in_time and is_loaded)
            self.config.timeout_graceful_shutdown = max(1, math.ceil(until_s - clock()))
            self.should_exit = True


def _report(failure: BaseException) -> None:
    """Say why the flows cannot be served."""
    if isinstance(failure, CompileError):
        print(failure, file=sys.stderr)
    elif isinstance(failure, (FlowError, OSError)):
        print(f"flowlang: {failure}", file=sys.stderr)
    else:
        traceback.print_exception(failure, file=sys.stderr)
