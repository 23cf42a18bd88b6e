"""A server of several processes: fronts that read HTTP, and an engine that has the flows.

Layer 4. One interpreter reads some thousands of pictures a second; a GPU takes many more. So HTTP
is read by processes of their own, each listening to the same port by itself (SO_REUSEPORT), and
what they read goes to the engine through shared memory.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from flowlang.diagnostics import RequestError
from flowlang.serve.answer import Answer, reason_of
from flowlang.serve.backend import Local
from flowlang.serve.desk import Desk, Question, portable_error
from flowlang.serve.front import Engine, FrontService
from flowlang.serve.http import Server
from flowlang.serve.routes import Service
from flowlang.serve.setup import Setup
from flowlang.serve.supervisor import Reins, Supervisor

if TYPE_CHECKING:
    from flowlang.app import App

LEAVE_S = 1.0  # for fronts to pass on why they have no answer


def serve_by_fronts(
    setup: Setup, load: Callable[[], App], listeners: Sequence[socket.socket], *, watches: bool
) -> int:
    """Serve flows with a front for each listener. Returns the exit status."""
    metrics = setup.metrics_listener
    held = [*listeners, *([] if metrics is None else [metrics])]
    inside = memoryview(mmap.mmap(-1, 4 * len(listeners))).cast("I")  # which all of them share
    fronts = [partial(_be_front, setup, held, inside, number) for number in range(len(listeners))]
    engine = partial(_be_engine, setup, load, listeners, watches)
    return Supervisor(engine, fronts, held).run()


def _be_front(
    setup: Setup,
    held: Sequence[socket.socket],
    inside: memoryview[int],
    number: int,
    path: str,
    reins: Reins,
) -> int:
    _close([*held[:number], *held[number + 1 :]])
    service = FrontService(
        inside,
        number,
        max_body_bytes=setup.max_body_bytes,
        token=setup.token,
        tracer=setup.tracer,
    )
    service.engine = Engine(path, service.let_in_remote, service.shut, setup.tracer)
    own = replace(setup, faces=(), metrics_listener=None, on_listen=_nothing)
    return Server(own, service, service.engine, held[number], reins).finish()


def _be_engine(
    setup: Setup,
    load: Callable[[], App],
    listeners: Sequence[socket.socket],
    watches: bool,
    path: str,
    reins: Reins,
) -> int:
    _close(listeners)
    # It is the fronts that ask for the token; what is told of the server is told here.
    service = Service(max_body_bytes=setup.max_body_bytes, token=setup.token, tracer=setup.tracer)
    flows = _Flows(path, len(listeners), service, load, watches, setup, reins)
    return Server(setup, service, flows, None, reins).finish()


def _close(others: Sequence[socket.socket]) -> None:
    """A port is given up once nobody holds it, so that each process holds its own alone."""
    for listener in others:
        listener.close()


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
        setup: Setup,
        reins: Reins,
    ) -> None:
        super().__init__(load, self._open, watches=watches, grace_s=setup.grace_s)
        self._service = service
        self._tracer = setup.tracer
        self._reins = reins
        questions: dict[str, Question] = {"look": self._look, "infer": self._infer}
        self._desk = Desk(path, questions, fronts, service.inference.refusals, setup.tracer)

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
        self,
        path: str,
        request_id: bytes,
        headers: dict[bytes, bytes],
        body: bytes,
        until_s: float | None,
    ) -> tuple[Answer, bytes]:
        timeout_s = None if until_s is None else until_s - time.monotonic()  # of one clock for all
        answer, request_id = await self._service.infer(path, headers, body, request_id, timeout_s)
        return replace(answer, error=self._told_to_trace(answer.error)), request_id

    def _told_to_trace(self, error: RequestError | None) -> RequestError | None:
        """What an inference failed with, for its span in the front, in a class that can travel."""
        if error is None or self._tracer is None or self._tracer.current() is None:
            return None
        return portable_error(reason_of(error))

    def _open(self, app: App) -> None:
        self._service.let_in(app)
        self._desk.let_in(app)

    async def close(self, within_s: float) -> bool:
        clock = asyncio.get_running_loop().time
        until_s = clock() + within_s
        # Fronts stop at the same time, and leave once they have answered all that they let in.
        in_time = not self.is_loaded or await self._desk.deserted(within_s)
        in_time = await super().close(max(0.0, until_s - clock())) and in_time
        if not in_time:  # the flows have answered what they could not do
            await self._desk.deserted(LEAVE_S)
        self._desk.close()
        return in_time
