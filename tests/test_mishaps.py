"""What goes wrong around an app and not in a flow: no memory, no threads, a log that fails."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from flowlang import (
    App,
    DeadlineExceeded,
    Draining,
    FlowError,
    RequestError,
    StageFailed,
    load,
)
from flowlang.app import Flow
from flowlang.plan.files import compile_file
from flowlang.plan.physical import Machine, lower
from flowlang.runtime.batcher import Batcher
from flowlang.runtime.entrance import Stage
from flowlang.runtime.metrics import FlowCounts, Histogram
from flowlang.runtime.scheduler import Scheduler
from flowlang.runtime.stage import Lane
from tests.waiting import LONG_S, eventually

OPERATORS = """
import time
import weakref
from flowlang import batched

class Speechless(Exception):
    def __str__(self):
        raise Speechless

@batched
def length(items: list[bytes]) -> list[int]:
    return [len(item) for item in items]

def picky(item: bytes) -> int:
    if item == b"bad":
        raise Speechless
    return 1 // len(item)

def slow(item: bytes) -> int:
    time.sleep(len(item) / 1000)
    return len(item)
"""
FLOWS = """
use "odd.py" as odd
export flow length = odd.length(batch=1..4)
export flow picky = odd.picky
export flow slow = odd.slow(timeout=30ms)
export flow pair = { one: odd.length(batch=1..2), two: odd.length(batch=1..2) }
export flow patient = odd.length(batch=2..2, wait=100s)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "odd.py").write_text(OPERATORS)
    path = tmp_path / "app.flow"
    path.write_text(FLOWS)
    return path


@pytest.fixture
def app(path: Path) -> Iterator[App]:
    with load(path, device="cpu") as app:
        yield app


def is_lane() -> bool:
    return isinstance(threading.current_thread(), Lane)


def lanes() -> set[threading.Thread]:
    """The threads of apps that are alive."""
    return {t for t in threading.enumerate() if t.name.startswith("flowlang-")}


def test_an_error_that_has_no_words_fails_its_item_alone(app: App) -> None:
    """Its kind is told at least, and the lane goes on."""
    with pytest.raises(StageFailed, match="failed: Speechless"):
        app["picky"].submit(b"bad").result(LONG_S)
    assert app["picky"].submit(b"x").result(LONG_S) == 1


def test_a_log_that_fails_stops_no_lane(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose failure could not be logged is answered all the same."""

    def fail(record: logging.LogRecord) -> bool:
        raise KeyError(record.name)

    monkeypatch.setattr(logging.getLogger("flowlang"), "filters", [fail])
    monkeypatch.setattr(logging.getLogger("flowlang.python"), "filters", [fail])
    for _ in range(2):
        with pytest.raises(StageFailed):
            app["picky"].submit(b"").result(LONG_S)
    assert app["picky"].submit(b"x").result(LONG_S) == 1


PLACES = [
    (Histogram, "add"),
    (FlowCounts, "answer"),
    (Stage, "next_bell"),
    (Stage, "put"),
    (Batcher, "take"),
    (Scheduler, "_settle"),
    (Scheduler, "_start"),
    (Scheduler, "_stage_of"),
    (Scheduler, "arrived"),
    (Scheduler, "lose_instance"),
]


@pytest.mark.parametrize(("kind", "step"), PLACES)
def test_a_lane_that_is_out_of_memory_for_once_loses_no_request(
    app: App, monkeypatch: pytest.MonkeyPatch, kind: type, step: str
) -> None:
    """Wherever that comes, each is answered: with its result, or an error."""
    count, real, fails = 0, getattr(kind, step), [3, 4, 9]

    def failing(*args: Any) -> Any:
        nonlocal count
        if is_lane():
            count += 1
            if count in fails:
                raise MemoryError
        return real(*args)

    monkeypatch.setattr(kind, step, failing)
    if step == "lose_instance":
        fails[:] = [1]
        monkeypatch.setattr(Scheduler, "take_ahead", failing)
    for flow, answer in (("length", 2), ("pair", {"one": 2, "two": 2})):
        futures = [app[flow].submit(b"ab") for _ in range(40)]
        for future in futures:
            error = future.exception(LONG_S)
            assert error is None or isinstance(error, RequestError)
            assert error is not None or future.result() == answer
        assert eventually(lambda: app.scheduler.outstanding == 0)
    assert app["length"](b"abc") == 3
    assert all(lane.is_alive() for lane in app._lanes)


class Strict:
    """An observer that follows nothing that a lane sends."""

    def current(self) -> None:
        if is_lane():
            raise LookupError("nothing to follow in a lane")

    def observe(self, worked: object) -> None: ...


def test_a_map_that_a_lane_cannot_go_on_with_says_so(path: Path) -> None:
    """Its caller has the error, all others have their answers."""
    with App(lower([compile_file(path)], Machine(2)), observer=Strict()) as app:
        failed: Future[object] = Future()

        def go() -> None:
            try:
                failed.set_result(list(app["length"].map([b"x"] * 2000, ahead=3)))
            except LookupError as error:
                failed.set_result(error)

        threading.Thread(target=go, daemon=True).start()
        assert isinstance(failed.result(LONG_S), LookupError)
        assert app["length"].submit(b"ab").result(LONG_S) == 2
        assert eventually(lambda: app.scheduler.outstanding == 0)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_an_app_that_stops_half_started_leaves_no_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> None:
    """Also while somebody holds the error, as an interactive interpreter does."""
    start, left, before = threading.Thread.start, number, lanes()

    def failing(thread: threading.Thread) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise error
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(type(error)) as held:
        load(path, device="cpu")
    assert eventually(lambda: lanes() <= before)
    assert held.value is error


def test_a_stuck_lane_is_replaced_once_there_is_a_thread_for_it(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch, which starts it, tries again; deadlines are kept meanwhile."""
    start = threading.Thread.start
    refused: list[Lane] = []

    def failing(thread: threading.Thread) -> None:
        if isinstance(thread, Lane) and len(refused) < 2:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(DeadlineExceeded):
        app["slow"].submit(b"x" * 1000).result(LONG_S)
    assert eventually(lambda: bool(refused))
    with pytest.raises(DeadlineExceeded):
        app["patient"].submit(b"x", deadline_s=0.02).result(LONG_S)
    asked_s = time.monotonic()
    assert eventually(lambda: len(app._lanes) == 7)
    assert app["slow"].submit(b"x").result(LONG_S) == 1
    assert time.monotonic() < asked_s + 0.9  # not by the lane that was stuck


def test_a_callback_does_not_end_the_watch_over_deadlines(app: App) -> None:
    """Whatever it raises, later deadlines are kept."""

    def interrupt(future: Future[Any]) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        future = app["patient"].submit(b"x", deadline_s=0.02)
        future.add_done_callback(interrupt)
        with pytest.raises(DeadlineExceeded):
            future.result(LONG_S)


@pytest.mark.parametrize("kind", ["cancels", "closes"])
def test_what_the_collector_ends_under_the_lock_waits_for_nothing(path: Path, kind: str) -> None:
    """Whoever holds a future or an app may end it in `__del__`, which runs in any thread."""
    app = load(path, device="cpu")
    future = app["patient"].submit(b"x")

    class Client:
        def __init__(self) -> None:
            self.ring = self  # so that only the collector finds it

        def __del__(self) -> None:
            if kind == "cancels":
                future.cancel()
            else:
                app.close()

    def collect() -> None:
        with app.scheduler._lock:
            gc.collect()

    Client()
    collecting = threading.Thread(target=collect, daemon=True)
    collecting.start()
    collecting.join(LONG_S)
    assert not collecting.is_alive()
    assert eventually(lambda: app.scheduler.outstanding == 0)
    assert kind == "closes" or app["length"](b"abc") == 3
    assert eventually(lambda: kind == "cancels" or not app._watch.is_alive())
    assert isinstance(future.exception(LONG_S) if kind == "closes" else FlowError(), FlowError)
    app.close()


@pytest.mark.parametrize("call", [Flow.acall, Flow.atimed])
def test_a_coroutine_that_nobody_awaits_any_more_takes_its_request_back(
    app: App, call: Callable[..., Coroutine[Any, Any, Any]]
) -> None:
    """Its loop may be closed, and whoever drops it may be in a lane that has the lock."""

    async def begin() -> Coroutine[Any, Any, Any]:
        coroutine = call(app["patient"], b"x")
        coroutine.send(None)
        assert app.scheduler.outstanding == 1
        return coroutine

    with app.scheduler._lock:
        asyncio.run(begin()).close()
    assert eventually(lambda: app.scheduler.outstanding == 0)


@pytest.mark.parametrize("kind", ["map", "submit", "deadline"])
def test_an_app_that_was_closed_under_load_is_forgotten(path: Path, kind: str) -> None:
    """With its threads and models, though it could not answer all, and some had its errors."""

    def use() -> weakref.ref[Scheduler]:
        app = load(path, device="cpu")
        if kind == "map":
            answers = app["pair"].map([b"x"] * 5000)
            next(answers)
            app.close(0.0)
            with pytest.raises(Draining):
                list(answers)
        else:
            allowed_s = 0.01 if kind == "deadline" else None
            futures = [app["slow"].submit(b"x" * 5, deadline_s=allowed_s) for _ in range(50)]
            app.close(0.0)
            assert isinstance(futures[-1].exception(LONG_S), (Draining, DeadlineExceeded))
        return weakref.ref(app.scheduler)

    before, scheduler = lanes(), use()
    assert eventually(lambda: lanes() <= before)

    def is_forgotten() -> bool:
        gc.collect()
        return scheduler() is None

    assert eventually(is_forgotten)
