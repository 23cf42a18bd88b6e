"""Where the flows of a server run: loaded in its own process, reloaded when they change.

Layer 4. Knows nothing of sockets or protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from flowlang.serve.launch import say
from flowlang.serve.watch import reload_on_change

if TYPE_CHECKING:
    from flowlang.app import App

COLLECT_S = (0.0, 0.1, 0.5, 2.0, 5.0)  # pauses between what the collector does after a reload


class Backend(Protocol):
    """The flows behind a server. All methods belong to one event loop."""

    @property
    def is_loading(self) -> bool:
        """Whether a thread loads flows, which nobody can end but with its process."""

    async def prepare(self) -> None:
        """What is to be done before anything listens. It is short."""

    def start(
        self, on_ready: Callable[[], object], on_failure: Callable[[BaseException], object]
    ) -> None:
        """Begin to load. One of the two is called once, when that has come to an end."""

    def hold(self) -> None:
        """Let no flows in any more, and none take over: the server stops."""

    async def close(self, within_s: float) -> bool:
        """Answer what is inside, then let go of the flows. Returns whether that was in time."""


class Local:
    """Flows in the server's own process.

    `let_in` is told of them once they are loaded. With `watches`, `load` is called again whenever a
    file of theirs has changed: the new ones take over while the old ones answer what they have, for
    at most `grace_s`. Where it fails the old ones stay.
    """

    def __init__(
        self,
        load: Callable[[], App],
        let_in: Callable[[App], object],
        *,
        watches: bool = False,
        grace_s: float,
    ) -> None:
        self._load = load
        self._let_in = let_in
        self._watches = watches
        self._grace_s = grace_s
        self._app: App | None = None
        self.is_loading = False
        self._is_held = False
        self._watching: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Future[bool]] = set()  # flows that others have taken over from

    @property
    def is_loaded(self) -> bool:
        return self._app is not None

    async def prepare(self) -> None: ...

    def start(
        self, on_ready: Callable[[], object], on_failure: Callable[[BaseException], object]
    ) -> None:
        loop = asyncio.get_running_loop()
        since_ns = time.time_ns()

        def take(loaded: App | BaseException) -> None:
            if self._is_held:
                return
            if isinstance(loaded, BaseException):
                on_failure(loaded)
                return
            self._app = loaded
            self._let_in(loaded)
            on_ready()
            if self._watches:
                watching = reload_on_change(
                    self._files, self._load_again, self._take_over, since_ns
                )
                self._watching = loop.create_task(watching)

        self._load_apart(take)

    def _load_apart(self, take: Callable[[App | BaseException], object]) -> None:
        """Load in a thread that nobody waits for at the end, and `take` what came of it."""
        loop = asyncio.get_running_loop()

        def load() -> None:
            try:
                loaded: App | BaseException = self._load()
            except BaseException as error:  # or it would load for ever
                loaded = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it
                loop.call_soon_threadsafe(finish, loaded)

        def finish(loaded: App | BaseException) -> None:
            self.is_loading = False
            take(loaded)

        self.is_loading = True
        threading.Thread(target=load, name="flowlang-load", daemon=True).start()

    async def _load_again(self) -> App:
        found: asyncio.Future[App] = asyncio.get_running_loop().create_future()

        def take(loaded: App | BaseException) -> None:
            if found.cancelled():
                return
            if isinstance(loaded, BaseException):
                found.set_exception(loaded)
            else:
                found.set_result(loaded)

        self._load_apart(take)
        return await found

    def _files(self) -> list[str]:
        return self._app.physical.files if self._app is not None else []

    def _take_over(self, app: App) -> None:
        """Let new flows take over; the old ones answer what they have, and are closed."""
        before = [self._app] if self._app is not None else []
        self._app = app
        self._let_in(app)
        if before:
            closing = asyncio.ensure_future(asyncio.to_thread(_let_go, before, self._grace_s))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        say(f"reloaded: {', '.join(app.flows)}")

    def hold(self) -> None:
        self._is_held = True
        if self._watching is not None:
            self._watching.cancel()

    async def close(self, within_s: float) -> bool:
        closing = set(self._closing)
        if self._app is not None:
            closing.add(asyncio.ensure_future(asyncio.to_thread(self._app.close, within_s)))
        return all(await asyncio.gather(*closing))


def _let_go(before: list[App], within_s: float) -> bool:
    """Close flows that nothing else holds any more, and have back what they held."""
    in_time = before.pop().close(within_s)
    with contextlib.suppress(RuntimeError):  # no thread to be had: the collector comes by itself
        threading.Thread(target=_collect, name="flowlang-collect", daemon=True).start()
    return in_time


def _collect() -> None:
    """Have the collector come for flows that were replaced.

    By itself it waits until there are many new objects, and a table of an operator's is one,
    however large. It comes several times, for one thing goes after another: the app, what its
    threads were made with, the modules of its operators; and an answer on its way or a thread at
    its end may hold them for a while.
    """
    for pause_s in COLLECT_S:
        time.sleep(pause_s)
        gc.collect()
