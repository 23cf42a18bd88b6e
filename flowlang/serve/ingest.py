"""A server of several processes: fronts that read HTTP, and an engine that has the flows.

Layer 4. One interpreter reads some thousands of pictures a second; a GPU takes many more. So HTTP
is read by processes of their own, each listening to the same port by itself (SO_REUSEPORT), and
what they read goes to the engine through shared memory.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from flowlang.serve.answer import Answer
from flowlang.serve.backend import Local
from flowlang.serve.desk import Desk
from flowlang.serve.front import Engine, FrontService
from flowlang.serve.http import Server, Setup
from flowlang.serve.routes import Service
from flowlang.serve.supervisor import Reins, Supervisor

if TYPE_CHECKING:
    from flowlang.app import App


def serve_by_fronts(
    setup: Setup, load: Callable[[], App], listeners: Sequence[socket.socket], *, watches: bool
) -> int:
    """Serve flows with a front for each listener. Returns the exit status."""
    # The listeners stay open here: who connects while a front is started again waits for it.
    fronts = [partial(_be_front, setup, listener) for listener in listeners]
    engine = partial(_be_engine, setup, load, len(fronts), watches)
    return Supervisor(engine, fronts).run()


def _be_front(setup: Setup, listener: socket.socket, path: str, reins: Reins) -> int:
    service = FrontService(max_body_bytes=setup.max_body_bytes, token=setup.token)
    service.engine = Engine(path, service.let_in_remote, service.shut)
    own = replace(setup, faces=(), metrics_listener=None, on_listen=_nothing, on_ready=_nothing)
    return Server(own, service, service.engine, listener, reins.fileno()).finish()


def _be_engine(
    setup: Setup, load: Callable[[], App], fronts: int, watches: bool, path: str, reins: Reins
) -> int:
    service = Service(max_body_bytes=setup.max_body_bytes)
    flows = _Flows(path, fronts, service, load, watches, setup.grace_s, reins)
    return Server(setup, service, flows, None, reins.fileno()).finish()


def _nothing(url: str) -> None: ...


class _Flows(Local):
    """The flows of the engine, lent to fronts at a desk."""

    def __init__(
        self,
        path: str,
        fronts: int,
        service: Service,
        load: Callable[[], App],
        watches: bool,
        grace_s: float,
        reins: Reins,
    ) -> None:
        super().__init__(load, self._open, watches=watches, grace_s=grace_s)
        self._service = service
        self._reins = reins
        self._desk = Desk(path, {"look": self._look, "infer": self._infer}, fronts)

    def start(
        self, on_ready: Callable[[], object], on_failure: Callable[[BaseException], object]
    ) -> None:
        """As any, but ready once every front lets requests in."""
        self._desk.start(on_ready)
        super().start(self._reins.is_ready, on_failure)

    def _look(self, path: str, request_id: bytes, method: str) -> tuple[Answer, bytes]:
        answer = self._service.look(method, path, request_id)
        return replace(answer, error=None), request_id  # the error is told: it need not travel

    async def _infer(
        self, path: str, request_id: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> tuple[Answer, bytes]:
        answer, request_id = await self._service.infer(path, headers, body, request_id)
        return replace(answer, error=None), request_id

    def _open(self, app: App) -> None:
        self._service.let_in(app)
        self._desk.let_in(app)

    async def close(self, within_s: float) -> bool:
        in_time = await self._desk.emptied(within_s)
        self._desk.close()
        return await super().close(within_s) and in_time
