"""The front's side of `--ingest`: HTTP here, the flows in the engine process.

Layer 4. A front is a server as any other, but that its flows are names: what they are called with
goes to the engine over a channel. `flowlang.serve.desk` is the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import (
    DeadlineExceeded,
    Draining,
    InternalError,
    Overloaded,
    RequestError,
)
from flowlang.runtime.request import Told, tell
from flowlang.serve.answer import Answer, Refusal, error_answer
from flowlang.serve.channel import Channel, Record, connect
from flowlang.serve.desk import Card, Kind
from flowlang.serve.inference import emptied
from flowlang.serve.routes import Service
from flowlang.serve.v2 import is_below, is_health, refused

if TYPE_CHECKING:
    from flowlang.serve.trace import Tracer

RETRY_S = 0.05  # between tries to connect
FIRST_WORD_S = 1.0  # of the engine: for so long a front that begins takes no connections
LATE_S = 0.02  # behind a deadline, for an engine that keeps and counts it too to be first
PROBE_S = 1.0  # between looks whether the engine reads
STALLED_S = 3.0  # an engine that has read nothing for longer is stalled

log = logging.getLogger("flowlang.serve")


def _dumps(value: Any) -> bytes:
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def _message(item: Any, priority: int, parameters: Mapping[str, Any]) -> tuple[Kind, bytes]:
    """A call as it travels."""
    if isinstance(item, bytes) and not priority and not parameters:
        return Kind.CALL, item
    return Kind.CALL_WITH, _dumps((item, priority, parameters))


class RemoteFlow:
    """A flow of the engine, called as one of this process is."""

    def __init__(self, engine: Engine, card: Card) -> None:
        self.name, self.doc = card.name, card.doc
        self.input, self.output = card.input, card.output
        self.parameters = card.parameters
        self._number = card.number
        self._engine = engine

    async def acall(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> Any:
        """See flowlang.app.Flow.acall."""
        message = _message(item, priority, parameters)
        return await self._engine.call(*message, self._number, deadline_s or 0.0)

    def ask(self, item: Any, told: Told) -> Callable[[], object]:
        """See flowlang.app.Flow.ask."""
        number = self._engine.begin(told, *_message(item, 0, {}), self._number)
        return partial(self._engine.give_up, number)

    def count_refusal(self, code: str) -> None:
        """See flowlang.app.Flow.count_refusal."""
        self._engine.tell_refusal(self._number, code)


class Engine:
    """The engine as a front sees it: a connection, made again when it is lost.

    `let_in` is told of the flows whenever they have changed, `shut` when the engine is gone.
    """

    channel: Channel
    is_loading = False  # it is the engine process that loads

    def __init__(
        self,
        path: str,
        let_in: Callable[[dict[str, RemoteFlow]], object],
        shut: Callable[[], object],
        tracer: Tracer | None = None,
    ) -> None:
        self._path = path
        self._tracer = tracer
        self._let_in = let_in
        self._shut = shut
        self._calls: dict[int, Told] = {}
        self._refusals: Counter[tuple[int | None, str]] = Counter()  # not told yet
        self._is_connected = False
        self._numbers = itertools.count()
        self._connecting: asyncio.Task[None] | None = None
        self._probing: asyncio.TimerHandle | None = None
        self._probed_s: float | None = None  # when the probe was sent that is not back yet
        self._is_held = False
        self._is_closed = False
        self._has_heard = asyncio.Event()
        self.is_loaded = False

    async def prepare(self) -> None:
        """See flowlang.serve.backend.Backend. Who has waited for this front is not to be refused
        for want of flows that are there: the engine says so as soon as it is met.
        """
        self._connecting = asyncio.get_running_loop().create_task(self._connect())
        self._probe()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._has_heard.wait(), FIRST_WORD_S)

    def start(
        self, on_ready: Callable[[], object], on_failure: Callable[[BaseException], object]
    ) -> None:
        """See flowlang.serve.backend.Backend. The engine tells it of all: a front says nothing."""

    async def _connect(self) -> None:
        is_told = False
        while not self._is_closed:
            try:
                await connect(self._path, self)
            except (FileNotFoundError, ConnectionError):  # it does not listen yet
                pass
            except OSError as error:  # there is no memory for it, or no file descriptor
                if not is_told:
                    log.warning("flowlang: no way to the engine: %s", error.strerror)
                is_told = True
            else:
                self._is_connected = True
                return
            await asyncio.sleep(RETRY_S)

    async def _connect_again(self) -> None:
        """With a pause: an engine that is there may have no room for the connection."""
        await asyncio.sleep(RETRY_S)
        await self._connect()

    def hold(self) -> None:
        """See flowlang.serve.backend.Backend. The engine may not have been told to stop yet."""
        self._is_held = True

    async def close(self, within_s: float) -> bool:
        """See flowlang.serve.backend.Backend. The engine goes on until no front is connected."""
        in_time = await emptied(lambda: len(self._calls), within_s)
        self._is_closed = True
        self._fail_all(Draining("the app stopped before this was done"))
        if self._connecting is not None:
            self._connecting.cancel()
        if self._probing is not None:
            self._probing.cancel()
        if self._is_connected:
            self.channel.close()
        return in_time

    # Asking

    async def call(
        self, kind: Kind, message: bytes, part: int | None = None, within_s: float = 0.0
    ) -> Any:
        """What the engine answers. Raises what it failed with, Refusal where it is gone,
        Overloaded where it is too far behind, and DeadlineExceeded where it is late.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        number = self.begin(future, kind, message, part, within_s)
        timer = None
        if within_s:  # an engine that is stopped, or held up, does not look at any deadline
            timer = loop.call_later(within_s + LATE_S, self._expire, number)
        try:
            return await future
        except asyncio.CancelledError:
            self.give_up(number)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def begin(
        self,
        told: Told,
        kind: Kind,
        message: bytes,
        part: int | None = None,
        within_s: float = 0.0,
    ) -> int:
        """Ask the engine, and have its answer told. Returns the number of the call. Raises Refusal
        and Overloaded, as `call` does.
        """
        if not self.is_loaded:
            raise self._refused(None, self._gone())
        if self.channel.is_full:
            raise self._refused(part, Overloaded("too much is on its way to the engine"))
        number = next(self._numbers) & 0xFFFFFFFF
        self._calls[number] = told
        if self._tracer is not None:
            self._tell_trace(self._tracer, kind)
        sent_s = time.monotonic() if within_s else 0.0
        self.channel.send(number, kind, message, part or 0, within_s, sent_s)
        return number

    def give_up(self, number: int) -> None:
        """Nobody waits for a call any more."""
        if self._calls.pop(number, None) is not None and self.channel.is_open:
            self.channel.send(number, Kind.CANCEL, b"")

    def _expire(self, number: int) -> None:
        """The deadline of a call has passed, and the engine has not said so."""
        told = self._calls.pop(number, None)
        if told is not None and not told.done():
            told.set_exception(DeadlineExceeded())
            self.channel.send(number, Kind.CANCEL, b"")

    def _tell_trace(self, tracer: Tracer, kind: Kind) -> None:
        """Say which trace the next message belongs to, where that is of use to the engine.

        It logs what inferences failed with, and names their traces, whether they are followed or
        not; of a call whose trace is not followed it says nothing.
        """
        if (kind == Kind.ASK or tracer.current() is not None) and (headers := tracer.headers()):
            self.channel.send(0, Kind.TRACE, _dumps(headers))

    async def ask(self, question: str, *words: Any, within_s: float = 0.0) -> Any:
        """What the engine answers to a question that is no call of a flow."""
        message = _dumps((question, *words))
        return await self.call(Kind.ASK, message, within_s=within_s)

    @property
    def is_stalled(self) -> bool:
        """Whether the engine is there, and reads nothing: it is stopped, or held up."""
        return self._probed_s is not None and time.monotonic() > self._probed_s + STALLED_S

    def _probe(self) -> None:
        """Send the engine a probe every PROBE_S, unless the last one is not back yet."""
        self._probing = asyncio.get_running_loop().call_later(PROBE_S, self._probe)
        self._tell_refusals()
        if self._is_connected and self._probed_s is None:
            self._probed_s = time.monotonic()
            self.channel.send(0, Kind.PROBE, b"")

    def _refused(self, part: int | None, error: RequestError) -> RequestError:
        self.tell_refusal(part, error.code)
        return error

    def tell_refusal(self, part: int | None, code: str) -> None:
        """Have a request counted that was refused here, of flow `part` or of none."""
        self._refusals[part, code] += 1
        self._tell_refusals()

    def _tell_refusals(self) -> None:
        """Tell of them, if the engine can be told just now."""
        if self._refusals and self.is_loaded and not self.channel.is_full:
            self.channel.send(0, Kind.REFUSED, _dumps(list(self._refusals.items())))
            self._refusals.clear()

    # Hearing

    def receive(self, record: Record, message: bytes) -> None:
        if record.kind == Kind.ANSWERS:
            for number, outcome in pickle.loads(message):
                told = self._calls.pop(number, None)
                if told is not None:
                    tell(told, outcome)
        elif record.kind == Kind.PROBE:
            self._probed_s = None
        elif record.kind == Kind.FLOWS:
            self._has_heard.set()
            self._take([RemoteFlow(self, card) for card in pickle.loads(message)])

    def _take(self, flows: list[RemoteFlow]) -> None:
        if not flows or self._is_held:
            return
        self.is_loaded = True
        self._let_in({flow.name: flow for flow in flows})
        self.channel.send(0, Kind.OPEN, b"")
        self._tell_refusals()

    def lost(self) -> None:
        """The engine is gone: whoever waits is told, and whoever comes, until it is there again."""
        self.is_loaded = self._is_connected = False
        self._probed_s = None
        for part, code in list(self._refusals):  # the next engine has other flows
            if part is not None:
                del self._refusals[part, code]
        self._fail_all(self._gone())
        if not self._is_closed:
            self._shut()
            self._connecting = asyncio.get_running_loop().create_task(self._connect_again())

    def _gone(self) -> RequestError:
        """Why nothing can be asked: who stops lets go of the engine too, and it does not fail."""
        if self._is_held:
            return Draining()
        return Refusal("restarting", 503, "the engine has stopped, and is being started again")

    def _fail_all(self, error: RequestError) -> None:
        calls, self._calls = self._calls, {}
        for told in calls.values():
            tell(told, error)


class FrontService(Service):
    """The application of a front: it reads calls of flows, and passes on everything else."""

    engine: Engine

    def __init__(self, inside: memoryview[int], number: int, **options: Any) -> None:
        self._inside = inside  # of each front, in memory that they share
        self._number = number
        super().__init__(**options)

    @property
    def under_way(self) -> int:
        return self._inside[self._number]

    @under_way.setter
    def under_way(self, count: int) -> None:
        self._inside[self._number] = count

    @property
    def inside(self) -> int:
        return sum(self._inside)

    def count_refusal(self, code: str) -> None:
        """See Service. It is the engine that counts."""
        self.engine.tell_refusal(None, code)

    def let_in_remote(self, flows: Mapping[str, RemoteFlow]) -> None:
        """Take requests for these flows."""
        self.open(flows)
        self.inference.become("ready")

    def shut(self) -> None:
        """Take none until there are flows again."""
        if self.state == "ready":
            self._open = {}
            self.inference.become("loading")

    async def infer(
        self,
        path: str,
        headers: dict[bytes, bytes],
        body: bytes,
        request_id: bytes,
        timeout_s: float | None,
    ) -> tuple[Answer, bytes]:
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        return await self._ask(
            "infer", path, request_id, headers, body, until_s, within_s=timeout_s or 0.0
        )

    async def _look(self, method: str, path: str, request_id: bytes) -> Answer:
        is_own = path.startswith("/health/") or is_health(path)
        # The engine is told to stop at the same time, and may not know it yet.
        is_refused = self.state == "draining" and path.endswith("/infer")
        if is_own or is_refused or not self.engine.is_loaded:
            self._look_at_engine()
            return self.look(method, path, request_id)
        answer, _ = await self._ask("look", path, request_id, method)
        return answer

    def _look_at_engine(self) -> None:
        if not self._is_draining:
            self.inference.hinder("stalled" if self.engine.is_stalled else "")

    async def _ask(
        self, question: str, path: str, request_id: bytes, *words: Any, within_s: float = 0.0
    ) -> tuple[Answer, bytes]:
        """The engine's answer to what was asked at a path, and the request's id."""
        try:
            answer: tuple[Answer, bytes] = await self.engine.ask(
                question, path, request_id, *words, within_s=within_s
            )
        except RequestError as error:
            told = error
        except InternalError:
            told = Refusal("internal", 500, "internal error")
        else:
            return answer
        self._tell_unanswered(path, told, request_id)
        if is_below(path):
            return refused(told), request_id
        return error_answer(told, None, request_id), request_id
