"""Bodies of requests, read whole and within bounds, and clients that hang up meanwhile.

Layer 4. Written to the bare ASGI protocol. Knows nothing of routes or flows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from flowlang.diagnostics import DeadlineExceeded, Draining, RequestError
from flowlang.serve.answer import Refusal

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

Result = TypeVar("Result")

MAX_UNDER_WAY_BYTES = 1 << 30  # of all bodies together that are there in part
LOOKS = 16  # for bodies that take too long, in the time of one
WATCH_AFTER_S = 0.05  # a client is watched for hanging up once its answer takes longer


class HungUp(Exception):
    """The client is gone: there is nobody to answer."""


class BrokenOff(HungUp):
    """The same, before all of its body was there, or that has turned into what is none."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a request is to be answered, its body included: at a time of the event loop's clock."""

    at_s: float

    @classmethod
    def within(cls, given_s: float) -> Deadline:
        return cls(asyncio.get_running_loop().time() + given_s)

    def left_s(self) -> float:
        """What is left of it. Raises DeadlineExceeded where that is nothing."""
        left_s = self.at_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise DeadlineExceeded()
        return left_s


class BodyReader:
    """Reads bodies of at most `max_bytes`, each within `within_s`. Belongs to one event loop."""

    def __init__(self, max_bytes: int, within_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_under_way = max(max_bytes, MAX_UNDER_WAY_BYTES)
        self._under_way = 0
        self._within_s = within_s
        self._looks = 0
        self._since: dict[asyncio.Task[Any], int] = {}  # the looks there had been, by who reads
        self._cut_off: dict[asyncio.Task[Any], RequestError] = {}
        self._is_looking = False

    async def read(
        self, found: dict[bytes, bytes], receive: Receive, deadline: Deadline | None = None
    ) -> bytes:
        """The whole body. Raises Refusal for one that is too long, or too slow, and BrokenOff."""
        if found.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal("unsupported-encoding", 415, "send the body without Content-Encoding")
        if int(found.get(b"content-length", b"0")) > self._max_bytes:
            raise self._too_large(is_last=False)  # its end is known: the rest is passed over
        # A timer for each body would cost more than the rest of this: most are there already.
        task, timer = _this_task(), None
        self._since[task] = self._looks
        if not self._is_looking:
            self._look_later()
        if deadline is not None:
            told = str(DeadlineExceeded())
            missed = Refusal("deadline-exceeded", 504, told, is_last=True)
            timer = asyncio.get_running_loop().call_at(deadline.at_s, self._cut, task, missed)
        try:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BrokenOff
            body: bytes = message.get("body", b"")
            if message.get("more_body", False):
                body = await self._read_rest(body, receive)
        except asyncio.CancelledError:
            error = self._cut_off.pop(task, None)
            if error is None:
                raise
            raise error from None
        finally:
            self._since.pop(task, None)
            if timer is not None:
                timer.cancel()
        if len(body) > self._max_bytes:
            raise self._too_large(is_last=False)
        return body

    def is_bounded(self, found: dict[bytes, bytes]) -> bool:
        """Whether a body that nobody reads is known to end, so that it can be passed over."""
        length = int(found.get(b"content-length", b"0"))
        return b"transfer-encoding" not in found and length <= self._max_bytes

    def cut_all(self) -> None:
        """Wait no longer for bodies on their way: the app is stopping."""
        for task in list(self._since):
            self._cut(task, Draining("the app is stopping, and not all of the body is there"))

    async def _read_rest(self, first: bytes, receive: Receive) -> bytes:
        chunks, size, more = [first], len(first), True
        self._under_way += size
        try:
            while more:
                if size > self._max_bytes:
                    raise self._too_large(is_last=True)
                if self._under_way > self._max_under_way:
                    many = "too many bodies are on their way at once"
                    raise Refusal("overloaded", 429, many, is_last=True)
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise BrokenOff
                chunk = message.get("body", b"")
                chunks.append(chunk)
                size += len(chunk)
                self._under_way += len(chunk)
                more = message.get("more_body", False)
        finally:
            self._under_way -= size
        return b"".join(chunks)

    def _look_later(self) -> None:
        self._is_looking = True
        asyncio.get_running_loop().call_later(self._within_s / LOOKS, self._look)

    def _look(self) -> None:
        self._looks += 1
        late = f"not all of the body was there within {self._within_s:g} s"
        for task in [task for task, looks in self._since.items() if self._looks > looks + LOOKS]:
            self._cut(task, Refusal("body-timeout", 408, late, is_last=True))
        self._is_looking = bool(self._since)
        if self._is_looking:
            self._look_later()

    def _cut(self, task: asyncio.Task[Any], error: RequestError) -> None:
        if self._since.pop(task, None) is not None:
            self._cut_off[task] = error
            task.cancel()

    def _too_large(self, *, is_last: bool) -> Refusal:
        message = f"the body is larger than {self._max_bytes:,} bytes"
        return Refusal("too-large", 413, message, is_last=is_last)


class Watches:
    """Cancels calls whose clients hang up.

    A client is watched once its answer is late, WATCH_AFTER_S to twice that: most answers come
    before. One timer looks after all calls, for a timer each would cost more than the rest of this.
    """

    def __init__(self) -> None:
        self._young: set[_Watch] = set()  # since the timer last went off
        self._old: set[_Watch] = set()
        self._is_ticking = False

    async def unless_hung_up(self, call: Awaitable[Result], receive: Receive) -> Result:
        """The result of a call. Raises HungUp once nobody is there to be told."""
        watch = _Watch(receive)
        self._young.add(watch)
        if not self._is_ticking:
            self._is_ticking = True
            asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._tick)
        try:
            return await call
        except asyncio.CancelledError:
            if watch.hung_up:
                raise HungUp from None
            raise
        finally:
            self._young.discard(watch)
            self._old.discard(watch)
            watch.stop()

    def _tick(self) -> None:
        for watch in self._old:
            watch.begin()
        self._old, self._young = self._young, set()
        self._is_ticking = bool(self._old)
        if self._is_ticking:
            asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._tick)


class _Watch:
    """Cancels the task that made it when its client hangs up, once it has begun."""

    __slots__ = ("_receive", "_task", "_watcher", "hung_up")

    def __init__(self, receive: Receive) -> None:
        self.hung_up = False
        self._receive = receive
        self._task = _this_task()
        self._watcher: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._wait())

    def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.hung_up = True
        self._task.cancel()


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("the application must be called in a task")
    return task
