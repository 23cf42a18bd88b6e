"""Many items through a flow, answered in order, some of them under way ahead.

Layer 4, what `Flow.map` is made of. Items are submitted in lots and their answers waited for in
lots, which costs a third of a call for each.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flowlang.diagnostics import BadRequest, RequestError
from flowlang.runtime.entrance import Entrance
from flowlang.runtime.request import UNANSWERED, Request, Wake
from flowlang.runtime.scheduler import Scheduler

PAUSE_S = 0.001  # between tries where others fill the queue


class LotReply:
    """The reply of a thread that waits for whichever of its requests is answered next.

    `on_news` is called first, by whichever thread brings the answers.
    """

    __slots__ = ("_answers", "_bell", "_on_news", "_wake")

    def __init__(self, on_news: Callable[[], object]) -> None:
        self._bell = threading.Lock()
        self._bell.acquire()
        self._on_news = on_news
        self._wake: Wake = self._ring
        self._answers: deque[None] = deque()  # one for each: no two threads may change a number

    def settle(self, request: Request) -> Wake:
        self._answers.append(None)
        return self._wake

    def count(self) -> int:
        """How many were answered since the last count."""
        count = len(self._answers)
        for _ in range(count):
            self._answers.pop()
        return count

    def _ring(self) -> None:
        try:
            self._on_news()
        finally:
            with contextlib.suppress(RuntimeError):  # rung already, and not heard yet
                self._bell.release()

    def wait(self) -> None:
        """Wait until something was answered since the last wait."""
        self._bell.acquire()


class Window:
    """The items of one `map`: those under way, and those answered whose turn has not come.

    At most `ahead` are under way. Of an iterable no more than `ahead` are taken before their turn,
    for it may be endless, or slow; of a sequence up to twice as many, so that one late answer does
    not keep those behind it from being replaced.

    Where items `are_at_hand`, to be taken without any code of the caller's, the lane that brings
    answers sends the next ones itself if too few are left for all lanes: to wake the caller for it
    takes longer than to do it, and the lane would stand idle meanwhile.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        entrance: Entrance,
        accept: Callable[[Any], Any],
        items: Iterable[Any],
        ahead: int,
        deadline_s: float | None,
        priority: int,
        *,
        are_at_hand: bool = False,
    ) -> None:
        self._scheduler = scheduler
        self._entrance = entrance
        self._accept = accept
        self._deadline_s = deadline_s
        self._priority = priority
        self._ahead = ahead
        self._is_sequence = isinstance(items, Sequence)
        self._reach = 2 * ahead if self._is_sequence else ahead
        self._source = iter(items)
        self._has_more = True
        self._is_done = False  # all was sent, and all answers given
        self._is_closed = False
        self._failure: BaseException | None = None  # of a lane at sending
        self._reply = LotReply(self._replace if are_at_hand else _nothing)
        self._sending = threading.Lock()  # held by who takes items and sends them, in their order
        self._under_way = 0
        self._window: deque[Request | BadRequest] = deque()
        self._values: deque[Any] = deque()  # accepted, and the queue had no room for them yet
        self._refused: BadRequest | None = None  # of the item behind those

    def outcomes(self) -> Iterator[Any]:
        """The outcome of each item in order: a result, or the exception it failed with."""
        try:
            while True:
                while self._window and (first := self._outcome()) is not UNANSWERED:
                    self._window.popleft()
                    yield first
                if not self._submit():
                    if self._is_done:
                        return
                    self._wait()
        finally:  # also where an error ended it, or whoever asked has enough
            self._is_closed = True
            self._give_up()

    def _outcome(self) -> Any:
        first = self._window[0]
        return first.outcome if isinstance(first, Request) else first

    def _replace(self) -> None:
        """Send what answers have made room for, in the thread that brought them."""
        if not self._sending.acquire(blocking=False):
            return  # by the caller, by another lane, or further up in this very thread
        try:
            self._count()
            if self._under_way < self._entrance.room and not self._is_closed:
                self._send()
        except RequestError:
            pass  # the app is stopping: the caller will be told so
        except BaseException as error:  # what was sent may be lost: the caller must not go on
            self._failure = error
        finally:
            self._sending.release()
        if self._is_closed and self._window:  # meanwhile
            self._give_up()

    def _give_up(self) -> None:
        """Take back what nobody waits for any more. Takes no lock: see Scheduler.give_up."""
        left: list[Request] = []
        with contextlib.suppress(IndexError):
            while True:
                request = self._window.popleft()
                if isinstance(request, Request):
                    left.append(request)
        self._scheduler.give_up(left)

    def _submit(self) -> bool:
        """Send what there is room for. Returns whether anything was sent, or refused."""
        with self._sending:
            if self._failure is not None:
                raise self._failure
            self._count()
            is_sent = self._send()
            # An answer can be seen before the news of it, which makes room for the next.
            self._is_done = not (self._window or self._values or self._has_more)
            return is_sent

    def _count(self) -> None:
        self._under_way -= self._reply.count()

    def _send(self) -> bool:
        if self._refused is None:
            self._take()
        lot = self._scheduler.submit_many(
            self._entrance, self._values, self._reply, self._deadline_s, self._priority
        )
        self._window += lot
        self._under_way += len(lot)
        if self._refused is None or self._values:
            return bool(lot)
        self._window.append(self._refused)
        self._refused = None
        return True

    def _take(self) -> None:
        """Take as many items as there is room for; of an iterable one, the next may be long."""
        room = min(self._ahead - self._under_way, self._reach - len(self._window))
        while self._has_more and len(self._values) < room:
            try:
                self._values.append(self._accept(next(self._source)))
            except StopIteration:
                self._has_more = False
            except BadRequest as error:
                self._refused = error
                return
            if not self._is_sequence:
                return

    def _wait(self) -> None:
        if self._under_way:
            self._reply.wait()
        else:
            time.sleep(PAUSE_S)  # others fill the queue: take turns with them


def _nothing() -> None: ...
