"""Callers on real threads and event loops: answered, refused, out of time, or gone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import signal
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from flowlang.diagnostics import Cancelled, DeadlineExceeded, Overloaded
from tests.runtime.workers import NET, ONE_BY_ONE, Gate, Interrupted, Start, Worker, name, row
from tests.waiting import LONG_S, eventually


def test_threads_futures_and_event_loops_call_at_once(start: Start) -> None:
    """Thousands of requests by every road at the same time each get their own answer."""
    text = """
        flow first = trt("net.onnx", batch=1..8) x2
        flow second = trt("net.onnx", batch=1..32) x2
        export flow f = first -> { a: second, b: pass }
        schedule { f(queue=100000, slo=100s) }"""
    app = start(text, lambda: list)

    def call(base: int) -> list[Any]:
        return [app(row(base + number)) for number in range(200)]

    async def gather(base: int) -> list[Any]:
        return await asyncio.gather(*(app.acall(row(base + number)) for number in range(800)))

    with ThreadPoolExecutor(6) as pool:
        threads = [pool.submit(call, base * 1000) for base in range(4)]
        loops = [pool.submit(asyncio.run, gather(base * 1000)) for base in (10, 20)]
        futures = [app.submit(row(30000 + number)) for number in range(800)]
        answers = [future.result(LONG_S) for future in futures]
        assert [a["a"][0] for a in answers] == list(range(30000, 30800))
        for base, thread in enumerate(threads):
            answers = thread.result(LONG_S)
            assert [a["a"][0] for a in answers] == list(range(base * 1000, base * 1000 + 200))
        for base, loop in zip((10, 20), loops, strict=True):
            answers = loop.result(LONG_S)
            assert [a["b"][0] for a in answers] == list(range(base * 1000, base * 1000 + 800))
    assert app.scheduler.outstanding == 0
    assert all(e.under_way == 0 for e in app.scheduler.entrances.values())


def test_a_cancelled_future_leaves_the_queue(start: Start) -> None:
    """A future cancelled while it waits is done at once, never runs, and makes room."""
    worker = Worker(Gate())
    app = start(NET.format(1), lambda: worker)
    first = app.submit(b"first")
    assert eventually(lambda: bool(worker.ran))
    second, third = app.submit(b"second"), app.submit(b"third")
    assert second.cancel()
    assert app.scheduler.outstanding == 2
    done, _ = concurrent.futures.wait([second], timeout=LONG_S)
    assert done == {second}
    assert isinstance(worker.work, Gate)
    worker.work.opened.set()
    assert (first.result(LONG_S), third.result(LONG_S)) == (b"first", b"third")
    assert worker.ran == [b"first", b"third"]
    assert not first.cancel()


def test_a_cancelled_task_leaves_the_queue(start: Start) -> None:
    """Cancelling a task, or a timeout around it, takes its request out before it runs."""
    worker = Worker(Gate())
    app = start(NET.format(1), lambda: worker)

    async def scene() -> None:
        first = asyncio.create_task(app.acall(b"first"))
        while not worker.ran:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(app.acall(b"second"))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(app.acall(b"third"), 0.01)
        assert app.scheduler.outstanding == 1
        assert isinstance(worker.work, Gate)
        worker.work.opened.set()
        assert await first == b"first"

    asyncio.run(scene())
    assert worker.ran == [b"first"]


def test_deadlines_are_kept_behind_a_stuck_lane(start: Start) -> None:
    """The watch answers at the deadline, by every road, though no instance ever comes back."""
    gate = Gate()
    app = start(NET.format(1), lambda: gate)
    far = app.submit(b"far", deadline_s=1000.0)
    assert gate.entered.wait(LONG_S)
    for deadline_s in (0.05, 0.0):
        began_s = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="not answered by its deadline"):
            app(b"near", deadline_s=deadline_s)
        assert time.monotonic() - began_s >= deadline_s
        with pytest.raises(DeadlineExceeded):
            app.submit(b"near", deadline_s=deadline_s).result(LONG_S)
        with pytest.raises(DeadlineExceeded):
            asyncio.run(app.acall(b"near", deadline_s=deadline_s))
    assert not far.done()
    gate.opened.set()
    assert far.result(LONG_S) == b"far"


def test_a_deadline_in_centuries_keeps_no_other_from_its_own(start: Start) -> None:
    """The watch cannot sleep for as long as that, and sleeps for as long as it can."""
    gate = Gate()
    app = start(NET.format(1), lambda: gate)
    far = app.submit(b"far", deadline_s=1e12)
    assert gate.entered.wait(LONG_S)
    time.sleep(0.05)  # the watch goes to sleep
    with pytest.raises(DeadlineExceeded):
        app.submit(b"near", deadline_s=0.05).result(LONG_S)
    gate.opened.set()
    assert far.result(LONG_S) == b"far"


def test_a_stage_out_of_time_is_named(start: Start) -> None:
    """A stage's timeout counts from when the item reached it, and the error names the stage."""
    text = """
        flow first = trt("net.onnx") x1
        flow second = trt("net.onnx", timeout=20ms) x1
        export flow f = first -> second"""
    gate = Gate()
    works: list[Any] = [list, gate]
    app = start(text, lambda: works.pop(0))
    with pytest.raises(DeadlineExceeded, match=r"stage `.*` did not finish") as caught:
        app(row(1))
    assert caught.value.stage in ("first", "second")
    gate.opened.set()


def test_an_overloaded_flow_says_so_at_once(start: Start) -> None:
    """With its queue full, a flow refuses by every road, and takes requests again later."""
    gate = Gate()
    app = start(ONE_BY_ONE.format(1).replace("100000", "2"), lambda: gate)
    futures = [app.submit(name(number)) for number in range(3)]
    with pytest.raises(Overloaded, match=r"the queue of flow `f` is full \(3 requests\)"):
        app(b"3")
    with pytest.raises(Overloaded):
        app.submit(b"3")
    with pytest.raises(Overloaded):
        asyncio.run(app.acall(b"3"))
    gate.opened.set()
    assert [f.result(LONG_S) for f in futures] == [name(n) for n in range(3)]
    assert app(b"3") == b"3"


def test_answers_for_a_closed_event_loop_are_dropped(start: Start) -> None:
    """A loop may end before its answers come: nobody is told, and the app goes on."""
    gate = Gate()
    app = start(NET.format(1), lambda: gate)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # it would report the unfinished task
    task = loop.create_task(app.acall(b"lost"))
    while not gate.entered.is_set():
        loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    gate.opened.set()
    assert app(b"2") == b"2"
    assert app.scheduler.outstanding == 0
    assert not task.done()
    coroutine = task.get_coro()
    assert coroutine is not None
    coroutine.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_event_loops_are_forgotten(start: Start) -> None:
    """An app called from one short-lived event loop after another keeps none of them."""
    app = start(NET.format(1), lambda: list)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def call() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        assert await app.acall(b"1") == b"1"

    for _ in range(3):
        asyncio.run(call())
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3
    assert len(app["f"]._loops) == 0


def test_an_interrupted_caller_takes_its_request_back(start: Start) -> None:
    """Ctrl-C in a thread that waits for an answer cancels the request, and it never runs."""
    worker = Worker(Gate())
    app = start(NET.format(1), lambda: worker)
    first = app.submit(b"first")
    assert eventually(lambda: bool(worker.ran))

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            app(b"second")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert app.scheduler.outstanding == 1
    assert isinstance(worker.work, Gate)
    worker.work.opened.set()
    assert first.result(LONG_S) == b"first"
    assert app(b"third") == b"third"
    assert worker.ran == [b"first", b"third"]


def test_cancelling_is_told_to_the_reply(start: Start) -> None:
    """A request cancelled at the scheduler is answered with Cancelled, and only once."""
    gate = Gate()
    app = start(NET.format(1), lambda: gate)
    app.submit(b"first")
    assert gate.entered.wait(LONG_S)
    told: list[Any] = []

    class Told:
        def settle(self, request: Any) -> None:
            told.append(request.outcome)

    entrance = app.scheduler.entrances["f"]
    request = app.scheduler.submit(entrance, b"second", Told())
    assert app.scheduler.cancel(request)
    assert not app.scheduler.cancel(request)
    assert [type(o) for o in told] == [Cancelled]
    gate.opened.set()
    assert app(b"third") == b"third"
    assert len(told) == 1
