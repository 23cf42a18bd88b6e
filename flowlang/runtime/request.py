"""A request on its way, and the ways in which its answer reaches whoever asked.

Layer 3. A reply is told of an answer with `settle`; what it returns, if anything, is called once
for a whole batch of answers, so that a thousand requests of one event loop cost one wake-up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from flowlang.runtime.frame import without_frames

if TYPE_CHECKING:
    from flowlang.runtime.entrance import Entrance

log = logging.getLogger("flowlang")

Wake: TypeAlias = Callable[[], object]


class Unanswered:
    """The outcome of a request that has none yet."""


UNANSWERED = Unanswered()


class Reply(Protocol):
    """Where answers go."""

    def settle(self, request: Request) -> Wake | None:
        """Take note of an answer. Called once a request, outside all locks, from any thread."""


class Request:
    """One call of a flow. `outcome` is its result, or the exception it failed with.

    `queued_s` is how long no instance was at work on it, once it has a result. The scheduler counts
    it up for a request that walks: `at_work` are its items in instances, `idle_since_s` is when the
    last of them was finished. One whose flow is one stage waits once, and needs neither. `priority`
    is there if it was given one, and `trace` if it is followed: it belongs to the observer.
    """

    __slots__ = (
        "arrived_s", "at_work", "entrance", "idle_since_s", "is_inside", "is_under_way", "outcome",
        "priority", "queued_s", "reply", "token", "trace", "value",
    )  # fmt: skip

    at_work: int
    idle_since_s: float
    priority: int
    queued_s: float
    trace: Any

    def __init__(
        self, entrance: Entrance, value: Any, reply: Reply, token: Any, arrived_s: float
    ) -> None:
        self.entrance = entrance
        self.reply = reply
        self.token = token
        self.arrived_s = arrived_s
        self.outcome: Any = UNANSWERED
        self.is_inside = False  # counted as one of those that are
        self.is_under_way = False  # in the stages, not in the backlog of the entrance
        self.value: Any = value  # what was given, until it is under way

    @property
    def is_answered(self) -> bool:
        return self.outcome is not UNANSWERED

    def begin_work(self, now_s: float) -> None:
        """An item of it has been taken. What waits beside others at work holds nothing up."""
        if not self.at_work:
            self.queued_s += now_s - self.idle_since_s
        self.at_work += 1

    def end_work(self, now_s: float) -> None:
        self.at_work -= 1
        if not self.at_work:
            self.idle_since_s = now_s

    @property
    def rank(self) -> int:
        """The lowest is taken first: its own priority, or that of its flow."""
        return getattr(self, "priority", self.entrance.program.priority)


AnyError = TypeVar("AnyError", bound=BaseException)


def strip(error: AnyError) -> AnyError:
    """An error without the way it came by.

    That leads through the frames of operators, which hold the pictures they were at work on, and
    those of their lane, which hold the error: all of it would stay until the garbage is collected.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def in_words(error: BaseException) -> str:
    """An error that nobody expected, in words: what kind it is, and what it says."""
    kind = type(error).__name__
    try:
        said = str(error)
        return f"{kind}: {said}" if said else kind
    except Exception:  # which can be told no more than that
        return kind


def deliver(settled: Iterable[Request]) -> None:
    """Hand answers to those who asked, with one wake-up for each of them.

    What one of them fails at is told once all the others have their answers.
    """
    wakes: dict[Wake, None] = {}
    failures: list[BaseException] = []
    for request in settled:
        try:
            if request.entrance.gives_images:
                request.outcome = without_frames(request.outcome)
            wake = request.reply.settle(request)
        except BaseException as error:
            failures.append(error)
        else:
            if wake is not None:
                wakes[wake] = None
    for wake in wakes:
        try:
            wake()
        except BaseException as error:
            failures.append(error)
    interrupt: KeyboardInterrupt | None = None
    for failure in failures:
        if isinstance(failure, KeyboardInterrupt):
            interrupt = failure  # for whoever is interrupted
        else:
            log.error("what is called with an answer failed", exc_info=failure)
    failures.clear()  # or an error, through its traceback, would hold itself
    if interrupt is not None:
        raise interrupt


class Waiter:
    """The reply of a thread that waits for one answer."""

    __slots__ = ("_bell",)

    def __init__(self) -> None:
        self._bell = threading.Lock()
        self._bell.acquire()

    def settle(self, request: Request) -> Wake:
        return self._bell.release

    def wait(self, request: Request) -> Any:
        """The result of the request. Raises what it failed with."""
        self._bell.acquire()
        outcome = request.outcome
        if not isinstance(outcome, BaseException):
            return outcome
        request.outcome = None  # or the error, through its traceback, would hold itself
        try:
            raise outcome
        finally:
            del outcome


class FutureReply:
    """The reply of a `concurrent.futures.Future`, kept as the request's token."""

    __slots__ = ()

    def settle(self, request: Request) -> None:
        future: Future[Any] = request.token
        request.token = None  # the future knows the request, to cancel it: no ring of the two
        try:
            if isinstance(request.outcome, BaseException):
                future.set_exception(request.outcome)
            else:
                future.set_result(request.outcome)
        except InvalidStateError:  # cancelled by its owner in the meantime
            if future.cancelled():
                future.set_running_or_notify_cancel()  # or `concurrent.futures.wait` never ends


class Told(Protocol):
    """What is told of one outcome in the thread of an event loop, as its futures are."""

    def done(self) -> bool: ...
    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, error: BaseException, /) -> None: ...


def tell(told: Told, outcome: Any) -> None:
    """Tell an outcome that is not told yet: a result, or the exception that it failed with."""
    if told.done():
        return
    if isinstance(outcome, BaseException):
        told.set_exception(outcome)
    else:
        told.set_result(outcome)


class LoopReply:
    """The reply of an event loop: answers pile up and are handed over in one wake-up."""

    __slots__ = ("_answers", "_loop", "_wake")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # kept by its loop, so it must not keep the loop
        self._answers: deque[Request] = deque()
        self._wake: Wake = self._call_loop  # bound once: it is looked up for every answer

    def settle(self, request: Request) -> Wake:
        self._answers.append(request)
        return self._wake

    def _call_loop(self) -> None:
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._drain)
                return
        except RuntimeError:
            pass
        self._answers.clear()  # the loop is closed or gone: nobody is left to tell

    def _drain(self) -> None:
        answers = self._answers
        while answers:
            request = answers.popleft()
            tell(request.token, request.outcome)
