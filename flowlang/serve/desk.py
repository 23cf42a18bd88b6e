"""The engine's side of `--ingest`: requests that front processes have read, answered in lots.

Layer 4. A front sends what it read over a channel; here it goes to the flows, and the answers of
one turn of the event loop go back in one message. `flowlang.serve.front` is the other side.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import InternalError, RequestError
from flowlang.plan.graph import Parameter
from flowlang.plan.types import Type
from flowlang.serve.channel import Channel, Listener, Record
from flowlang.serve.inference import emptied

if TYPE_CHECKING:
    from flowlang.app import App, Flow
    from flowlang.runtime.request import Request

log = logging.getLogger("flowlang.serve")


class Kind(IntEnum):
    """What a message is. Bytes travel as they are, everything else pickled: both sides are ours."""

    CALL = 1  # the bytes of a flow's item; `part` is the flow's number, `within_s` the deadline
    CALL_WITH = 2  # the same, pickled: item, priority, parameters
    ASK = 3  # what HTTP brought that is no call of a flow: the name of a question, and its words
    CANCEL = 4  # the number of a call that nobody waits for any more
    OPEN = 5  # the front has its flows, and lets requests in
    ANSWERS = 6  # pickled: the number and the outcome of each
    FLOWS = 7  # pickled: the flows there are now, each a Card


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


class Desk:
    """Takes the connections of fronts, and expects so many. Belongs to one event loop."""

    def __init__(
        self,
        path: str,
        questions: Mapping[str, Question],
        expects: int,
    ) -> None:
        self._path = path
        self._questions = questions
        self._missing = expects
        self._on_complete: Callable[[], object] = lambda: None
        self._fronts: set[_Front] = set()
        self._listener: Listener | None = None
        self._numbers = itertools.count()
        self._cards: list[Card] = []
        self.flows: dict[int, Flow] = {}  # by number; those taken over from stay, and refuse

    def start(self, on_complete: Callable[[], object]) -> None:
        """Begin to take connections. Raises OSError.

        `on_complete` is called once, when as many fronts as are expected let requests in.
        """
        self._on_complete = on_complete
        self._listener = Listener(self._path, self._meet)

    def let_in(self, app: App) -> None:
        """These are the flows from now on."""
        before = {card.number for card in self._cards}
        self.flows = {n: flow for n, flow in self.flows.items() if n in before}
        self._cards = []
        for flow in app.flows.values():
            card = Card(
                next(self._numbers) & 0xFFFF,
                flow.name,
                flow.doc,
                flow.input,
                flow.output,
                tuple(flow.parameters),
            )
            self.flows[card.number] = flow
            self._cards.append(card)
        for front in self._fronts:
            front.tell(self._cards)

    def _meet(self) -> _Front:
        front = _Front(self, self._questions)
        self._fronts.add(front)
        if self._cards:
            asyncio.get_running_loop().call_soon(front.tell, self._cards)
        return front

    def forget(self, front: _Front) -> None:
        self._fronts.discard(front)

    def count_open(self) -> None:
        """A front has opened its doors."""
        self._missing -= 1
        if not self._missing:
            self._on_complete()

    async def emptied(self, within_s: float) -> bool:
        """Wait until no front waits for an answer. Returns whether that is so."""
        return await emptied(lambda: sum(f.under_way for f in self._fronts), within_s)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for front in list(self._fronts):
            front.channel.close()


class _Front:
    """One front: what it asked and was not told yet. Also the reply of its requests."""

    channel: Channel

    def __init__(self, desk: Desk, questions: Mapping[str, Question]) -> None:
        self._desk = desk
        self._questions = questions
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, tuple[Flow, Request]] = {}
        self._asked: set[asyncio.Task[None]] = set()
        self._is_open = False
        self._answers: deque[tuple[int, Any]] = deque()
        self._wake = self._call_loop  # bound once: it is looked up for every answer

    @property
    def under_way(self) -> int:
        return len(self._calls) + len(self._asked) + len(self._answers)

    def tell(self, cards: list[Card]) -> None:
        self.channel.send(0, Kind.FLOWS, pickle.dumps(cards))

    # What comes

    def receive(self, record: Record, message: bytes) -> None:
        number, kind = record.number, record.kind
        try:
            if kind == Kind.CALL:
                self._call(number, record, message, 0, {})
            elif kind == Kind.CALL_WITH:
                self._call(number, record, *pickle.loads(message))
            elif kind == Kind.CANCEL:
                self._cancel(number)
            elif kind == Kind.OPEN:
                self._open()
            else:
                question, *words = pickle.loads(message)
                self._asked.add(
                    task := self._loop.create_task(self._answer(number, question, words))
                )
                task.add_done_callback(self._asked.discard)
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
        flow = self._desk.flows[record.part]
        request = flow.put(item, self, number, record.within_s or None, priority, parameters)
        self._calls[number] = flow, request

    def _cancel(self, number: int) -> None:
        if number in self._calls:
            flow, request = self._calls.pop(number)
            flow.cancel(request)

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._desk.count_open()

    async def _answer(self, number: int, question: str, words: list[Any]) -> None:
        try:
            answer = self._questions[question](*words)
            self._tell_soon(number, await answer if isinstance(answer, Awaitable) else answer)
        except Exception as error:
            log.exception("a front's question `%s` was not answered", question)
            self._tell_soon(number, InternalError(str(error)))

    def lost(self) -> None:
        """The front is gone, and its clients with it."""
        self._desk.forget(self)
        for number in list(self._calls):
            self._cancel(number)
        for task in self._asked:
            task.cancel()

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


def _pickled(answers: list[tuple[int, Any]]) -> bytes:
    try:
        return pickle.dumps(answers, pickle.HIGHEST_PROTOCOL)
    except Exception:  # one of them cannot travel: which?
        return pickle.dumps([(number, _portable(outcome)) for number, outcome in answers])


def _portable(outcome: Any) -> Any:
    try:
        pickle.dumps(outcome)
    except Exception:
        log.exception("an answer of type %s cannot be sent to a front", type(outcome).__name__)
        return InternalError("an answer that cannot travel between processes")
    return outcome
