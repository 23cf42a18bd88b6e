"""The engine's side of `--ingest`: requests that front processes have read, answered in lots.

Layer 4. A front sends what it read over a channel; here it goes to the flows, and the answers of
one turn of the event loop go back in one message. `flowlang.serve.front` is the other side.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import pickle
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import DeadlineExceeded, Draining, InternalError, RequestError
from flowlang.plan.graph import Parameter
from flowlang.plan.types import Type
from flowlang.serve.answer import OCTETS, encode
from flowlang.serve.channel import Channel, Listener, Record
from flowlang.serve.inference import emptied

if TYPE_CHECKING:
    from flowlang.app import App, Flow
    from flowlang.runtime.request import Request
    from flowlang.serve.trace import Tracer

KNOWN = frozenset(("builtins", "copyreg", "flowlang", "numpy"))  # whose values travel as they are

log = logging.getLogger("flowlang.serve")


class Kind(IntEnum):
    """What a message is. Bytes travel as they are, everything else pickled: both sides are ours."""

    CALL = 1  # the bytes of a flow's item; `part` is the flow's number, `within_s` the deadline
    CALL_WITH = 2  # the same, pickled: item, priority, parameters
    ASK = 3  # what HTTP brought that is no call of a flow: the name of a question, and its words
    CANCEL = 4  # the number of a call that nobody waits for any more
    OPEN = 5  # the front has its flows, and lets requests in
    ANSWERS = 6  # pickled: the number and the outcome of each
    FLOWS = 7  # pickled: the flows there are now, each a Card; none while they are loaded
    TRACE = 8  # pickled: the trace that the message behind it belongs to, as headers
    PROBE = 9  # nothing, which is sent back: that the engine reads what it is sent
    REFUSED = 10  # pickled: requests refused before they came here: flow, code, and how many


@dataclass(frozen=True, slots=True)
class Card:
    """A flow as a front needs to know it."""

    number: int
    name: str
    doc: str | None
    input: Type
    output: Type
    parameters: tuple[Parameter, ...]


Question = Callable[..., "Awaitable[Any] | Any"]


def _nothing() -> None: ...


class Desk:
    """Takes the connections of fronts, and expects so many. Belongs to one event loop.

    Among `refusals` are counted those that fronts tell of and that are of no flow.
    """

    def __init__(
        self,
        path: str,
        questions: Mapping[str, Question],
        expects: int,
        refusals: Counter[str],
        tracer: Tracer | None = None,
    ) -> None:
        self._path = path
        self._questions = questions
        self._expects = expects
        self._refusals = refusals
        self._tracer = tracer
        self._on_complete: Callable[[], object] = _nothing
        self._fronts: set[_Front] = set()
        self._listener: Listener | None = None
        self._numbers = itertools.count()
        self._cards: list[Card] = []
        self._flows: dict[int, Flow] = {}  # by number

    def start(self, on_complete: Callable[[], object]) -> None:
        """Begin to take connections. Raises OSError.

        `on_complete` is called once, when as many fronts as are expected let requests in.
        """
        self._on_complete = on_complete
        self._listener = Listener(self._path, self._meet)

    def let_in(self, app: App) -> None:
        """These are the flows from now on."""
        self._cards = []
        self._flows = {}
        for flow in app.flows.values():
            card = Card(
                next(self._numbers) & 0xFFFF,
                flow.name,
                flow.doc,
                flow.input,
                flow.output,
                tuple(flow.parameters),
            )
            self._flows[card.number] = flow
            self._cards.append(card)
        for front in self._fronts:
            front.tell(self._cards)

    def _meet(self) -> _Front:
        front = _Front(self, self._questions, self._tracer)
        self._fronts.add(front)
        # Once it has its channel; that there are no flows yet is told too.
        asyncio.get_running_loop().call_soon(lambda: front.tell(self._cards))
        return front

    def flow(self, number: int) -> Flow:
        """A flow by its number. Raises Draining where another has taken over."""
        try:
            return self._flows[number]
        except KeyError:
            raise Draining("the flow has been taken over from") from None

    def count_refusals(self, number: int | None, code: str, times: int) -> None:
        """Count requests that a front refused: of no flow, or of one not taken over from."""
        if number is None:
            self._refusals[code] += times
        elif number in self._flows:
            self._flows[number].count_refusal(code, times)

    def forget(self, front: _Front) -> None:
        self._fronts.discard(front)

    def look_for_all(self) -> None:
        """To be called when a front has opened its doors."""
        if sum(front.is_open for front in self._fronts) == self._expects:
            on_complete, self._on_complete = self._on_complete, _nothing
            on_complete()

    async def deserted(self, within_s: float) -> bool:
        """Wait until no front is there. Returns whether that is so."""
        return await emptied(lambda: len(self._fronts), within_s)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for front in list(self._fronts):
            front.channel.close()


class _Front:
    """One front: what it asked and was not told yet. Also the reply of its requests."""

    channel: Channel

    def __init__(
        self, desk: Desk, questions: Mapping[str, Question], tracer: Tracer | None
    ) -> None:
        self._desk = desk
        self._questions = questions
        self._tracer = tracer
        self._trace = b""  # that of the next message
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, tuple[Flow, Request]] = {}
        self._asked: dict[int, asyncio.Task[None]] = {}
        self.is_open = False
        self._answers: deque[tuple[int, Any]] = deque()
        self._wake = self._call_loop  # bound once: it is looked up for every answer

    def tell(self, cards: list[Card]) -> None:
        self.channel.send(0, Kind.FLOWS, pickle.dumps(cards))

    # What comes

    def receive(self, record: Record, message: bytes) -> None:
        if not self._trace or self._tracer is None:
            self._take(record, message)
            return
        trace, self._trace = self._trace, b""
        with self._tracer.attached(pickle.loads(trace)):
            self._take(record, message)

    def _take(self, record: Record, message: bytes) -> None:
        number, kind = record.number, record.kind
        try:
            if kind == Kind.CALL:
                self._call(number, record, message, 0, {})
            elif kind == Kind.CALL_WITH:
                self._call(number, record, *pickle.loads(message))
            elif kind == Kind.CANCEL:
                self._cancel(number)
            elif kind == Kind.REFUSED:
                for (flow, code), count in pickle.loads(message):
                    self._desk.count_refusals(flow, code, count)
            elif kind == Kind.TRACE:
                self._trace = message
            elif kind == Kind.OPEN:
                self._open()
            elif kind == Kind.PROBE:
                self.channel.send(number, Kind.PROBE, b"")
            else:
                self._ask(number, *pickle.loads(message))
        except RequestError as error:
            self._tell_soon(number, error)
        except Exception as error:
            log.exception("a front's message could not be read")
            self._tell_soon(number, InternalError(str(error)))

    def _call(
        self,
        number: int,
        record: Record,
        item: Any,
        priority: int,
        parameters: Mapping[str, Any],
    ) -> None:
        flow = self._desk.flow(record.part)
        within_s = sent_s = None
        if record.within_s:  # since it was sent, by the clock that all processes share
            within_s, sent_s = record.within_s, record.sent_s
            if sent_s + within_s <= time.monotonic():
                flow.count_refusal(DeadlineExceeded.code)
                raise DeadlineExceeded()
        request = flow.put(item, self, number, within_s, priority, parameters, sent_s)
        self._calls[number] = flow, request

    def _ask(self, number: int, question: str, *words: Any) -> None:
        task = self._loop.create_task(self._answer(number, question, words))
        self._asked[number] = task
        task.add_done_callback(lambda _: self._asked.pop(number))

    def _cancel(self, number: int) -> None:
        if number in self._calls:
            flow, request = self._calls.pop(number)
            flow.cancel(request)
        elif number in self._asked:
            # It may have come just now, and is to begin: an inference is counted by its flow.
            self._loop.call_soon(self._asked[number].cancel)

    def _open(self) -> None:
        self.is_open = True
        self._desk.look_for_all()

    async def _answer(self, number: int, question: str, words: tuple[Any, ...]) -> None:
        try:
            answer = self._questions[question](*words)
            self._tell_soon(number, await answer if isinstance(answer, Awaitable) else answer)
        except Exception as error:
            log.exception("a front's question `%s` was not answered", question)
            self._tell_soon(number, InternalError(str(error)))

    def lost(self) -> None:
        """The front is gone, and its clients with it."""
        self._desk.forget(self)
        for number in [*self._calls, *self._asked]:
            self._cancel(number)

    # What goes

    def settle(self, request: Request) -> Callable[[], object]:
        self._answers.append((request.token, request.outcome))
        return self._wake

    def _call_loop(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._tell)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._answers.clear()

    def _tell_soon(self, number: int, outcome: Any) -> None:
        self._answers.append((number, outcome))
        self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        """Send all answers there are."""
        answers: list[tuple[int, Any]] = []
        while self._answers:
            answer = self._answers.popleft()
            self._calls.pop(answer[0], None)
            answers.append(answer)
        if answers and self.channel.is_open:
            self.channel.send(0, Kind.ANSWERS, _pickled(answers))


class _Pickler(pickle.Pickler):
    """Refuses what a front could not read: it has none of the code that operators are."""

    def reducer_override(self, value: Any) -> Any:
        is_named = isinstance(value, (type, FunctionType, BuiltinFunctionType))
        home = value.__module__ if is_named else type(value).__module__
        if (home or "").partition(".")[0] not in KNOWN:
            raise pickle.PicklingError(f"a front does not know {home}")
        return NotImplemented


def _dumps(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _pickled(answers: list[tuple[int, Any]]) -> bytes:
    try:
        return _dumps(answers)
    except Exception:  # one of them cannot travel: which?
        return _dumps([(number, _portable(outcome)) for number, outcome in answers])


def portable_error(error: RequestError) -> RequestError:
    """An error as the class of ours that it is one of, with what it says itself."""
    kind: type[RequestError] = next(
        k for k in type(error).__mro__ if k.__module__ == RequestError.__module__
    )
    found = kind(str(error.message), stage=error.stage, place=error.place)
    found.code, found.http_status = str(error.code), int(error.http_status)
    return found


def _portable(outcome: Any) -> Any:
    """An outcome as it is if it can travel, or else what it is over HTTP."""
    try:
        _dumps(outcome)
    except Exception:
        try:
            if isinstance(outcome, RequestError):
                return portable_error(outcome)
            kind, body = encode(outcome)
            return body if kind == OCTETS else json.loads(body)
        except Exception:
            log.exception("an answer of type %s cannot be sent", type(outcome).__name__)
            return InternalError("an answer that cannot be sent")
    return outcome
