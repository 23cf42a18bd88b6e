"""Bodies of requests, read whole and within bounds, and clients that hang up meanwhile.

Layer 4. Written to the bare ASGI protocol. Knows nothing of routes or flows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias, TypeVar

from flowlang.diagnostics import Draining
from flowlang.serve.answer import Refusal

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

Result = TypeVar("Result")

WATCH_AFTER_S = 0.05  # a client is watched for hanging up once its answer takes longer


class HungUp(Exception):
    """The client is gone: there is nobody to answer."""


class BodyReader:
    """Reads bodies of at most `max_bytes`, each within `within_s`. Belongs to one event loop."""

    def __init__(self, max_bytes: int, within_s: float) -> None:
        self.is_draining = False
        self._max_bytes = max_bytes
        self._within_s = within_s
        self._reading: dict[asyncio.Task[Any], bool] = {}  # True once it is cut off

    async def read(self, found: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises Refusal for one that is too long, or too slow."""
        if found.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal("unsupported-encoding", 415, "send the body without Content-Encoding")
        if int(found.get(b"content-length", b"0")) > self._max_bytes:
            raise self._too_large(is_last=False)  # its end is known: the rest is passed over
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HungUp
        first: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(first) > self._max_bytes:
                raise self._too_large(is_last=False)
            return first
        return await self._read_rest(first, receive)

    def is_bounded(self, found: dict[bytes, bytes]) -> bool:
        """Whether a body that nobody reads is known to end, so that it can be passed over."""
        length = int(found.get(b"content-length", b"0"))
        return b"transfer-encoding" not in found and length <= self._max_bytes

    def cut_all(self) -> None:
        """Wait no longer for bodies on their way."""
        for task in self._reading:
            self._cut(task)

    async def _read_rest(self, first: bytes, receive: Receive) -> bytes:
        loop, task = asyncio.get_running_loop(), _this_task()
        chunks, size, more = [first], len(first), True
        self._reading[task] = False
        timer = loop.call_later(self._within_s, self._cut, task)
        try:
            while more:
                if size > self._max_bytes:
                    raise self._too_large(is_last=True)
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HungUp
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                more = message.get("more_body", False)
        except asyncio.CancelledError:
            if not self._reading[task]:
                raise
            if self.is_draining:
                raise Draining("the app is stopping, and not all of the body is there") from None
            late = f"not all of the body was there within {self._within_s:g} s"
            raise Refusal("body-timeout", 408, late, is_last=True) from None
        finally:
            timer.cancel()
            del self._reading[task]
        if size > self._max_bytes:
            raise self._too_large(is_last=False)
        return b"".join(chunks)

    def _cut(self, task: asyncio.Task[Any]) -> None:
        if not self._reading.get(task, True):
            self._reading[task] = True
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
