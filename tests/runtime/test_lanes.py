"""Lanes, deadlines and replies on real threads, with instances that do as they are told."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import io
import logging
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flowlang.app import App
from flowlang.diagnostics import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineError,
    Overloaded,
    Source,
    StageFailed,
)
from flowlang.plan.check import compile_source
from flowlang.plan.physical import Machine, StagePlan, lower
from flowlang.runtime.batcher import Item
from flowlang.runtime.instances import Instances
from flowlang.runtime.stage import Instance, InstanceLost
from tests.simulation import write_models
from tests.waiting import LONG_S, eventually

# One stage taking any bytes, since what its instances do with them is up to each test.
NET = """
    export flow f = decode -> resize(8) -> rgb -> trt("heads.onnx", batch=1..4) x{}
    schedule {{ f(queue=100000) }}"""
ONE_BY_ONE = NET.replace("1..4", "1")

Start = Callable[..., App]


class Worker:
    """An instance that does to a batch what it is told, and remembers its life."""

    def __init__(self, work: Callable[[Sequence[Any]], list[Any]] = list) -> None:
        self.work = work
        self.is_warm = self.is_closed = False
        self.ran: list[Any] = []

    def warm(self) -> None:
        self.is_warm = True

    def run(self, values: Sequence[Any]) -> list[Any]:
        assert self.is_warm
        assert not self.is_closed
        self.ran += [v for v in values if isinstance(v, bytes)]
        return self.work(values)

    def close(self) -> None:
        self.is_closed = True


class Interrupted(BaseException):
    """Like KeyboardInterrupt, and not one."""


class Gate:
    """Work that waits behind a gate. What is on its way through is shown by `entered`."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        self.entered.set()
        assert self.opened.wait(LONG_S)
        return list(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an App of a flow text whose instances come from a function."""
    apps: list[App] = []
    gates: list[Gate] = []

    def starter(text: str, make: Callable[[], Any] | Callable[[StagePlan], Any]) -> App:
        def made(self: Instances, stage: StagePlan, number: int) -> Instance:
            work = make()  # type: ignore[call-arg]
            if isinstance(work, Gate):
                gates.append(work)
            return work if hasattr(work, "run") else Worker(work)

        monkeypatch.setattr(Instances, "make", made)
        plan = compile_source(Source(str(folder / "test.flow"), text))
        apps.append(App(lower([plan], Machine(4))))
        return apps[-1]

    yield starter
    for gate in gates:
        gate.opened.set()
    for app in apps:
        app.close(LONG_S)
        for lane in app._lanes:
            lane.join(LONG_S)
            assert not lane.is_alive()


def name(number: int) -> bytes:
    return b"item %d" % number


def row(number: int) -> NDArray[np.float32]:
    return np.full(4, number, np.float32)


def poison(values: Sequence[Any]) -> list[Any]:
    if b"poison" in values:
        raise InstanceLost("the context is gone")
    return list(values)


def test_a_lost_instance_is_replaced_while_others_go_on(start: Start) -> None:
    """Its batch is answered with an error, it is closed, and a warm one takes its place."""
    workers: list[Worker] = []

    def make() -> Worker:
        workers.append(Worker(poison))
        return workers[-1]

    app = start(NET.format(2), make)
    assert len(workers) == 2
    for number in range(50):
        if number % 10 == 5:
            with pytest.raises(StageFailed, match="an instance was lost: the context is gone"):
                app(b"poison")
        assert app(name(number)) == name(number)
    assert eventually(lambda: len(workers) == 7 and all(w.is_warm for w in workers))
    lost = [w for w in workers if b"poison" in w.ran]
    assert len(lost) == 5
    assert all(w.is_closed for w in lost)
    assert [w.is_closed for w in workers].count(False) == 2


def test_requests_are_answered_while_no_instance_can_be_made(start: Start) -> None:
    """With the only instance gone, what comes in gets an error until one can be made again."""
    is_broken = threading.Event()
    made: list[Worker] = []

    def make() -> Worker:
        if is_broken.is_set():
            raise EngineError("no device")
        made.append(Worker(poison))
        return made[-1]

    app = start(NET.format(1), make)
    is_broken.set()
    with pytest.raises(StageFailed, match="the context is gone"):
        app(b"poison")
    for future in [app.submit(name(number)) for number in range(10)]:
        with pytest.raises(StageFailed, match="an instance was lost: no device") as caught:
            future.result(LONG_S)
        assert caught.value.stage == app.scheduler.stages[0].plan.name
    is_broken.clear()
    assert eventually(lambda: len(made) == 2)
    assert app(b"1") == b"1"


def test_an_instance_that_does_not_close_does_not_take_its_lane_along(start: Start) -> None:
    """A lost instance may fail even at closing; its lane goes on with the next one."""

    class Stubborn(Worker):
        def close(self) -> None:
            raise OSError("the device is gone")

    app = start(NET.format(1), lambda: Stubborn(poison))
    with pytest.raises(StageFailed):
        app(b"poison")
    assert app(b"1") == b"1"


def test_an_instance_that_does_not_warm_up_is_closed(start: Start) -> None:
    """An app whose instance fails at its trial run does not start, and holds nothing."""
    workers: list[Worker] = []

    class Cold(Worker):
        def warm(self) -> None:
            super().warm()
            if len(workers) == 3:
                raise EngineError("out of memory")

    def make() -> Worker:
        workers.append(Cold())
        return workers[-1]

    with pytest.raises(EngineError, match="out of memory"):
        start(NET.format(3), make)
    assert len(workers) == 3
    assert eventually(lambda: all(w.is_closed for w in workers))


@pytest.mark.parametrize("kind", [EngineError, InstanceLost])
def test_an_app_that_does_not_start_is_freed(start: Start, kind: type[Exception]) -> None:
    """Once its error, an EngineError always, is gone, so is what could not be made ready."""
    seen: list[weakref.ref[Worker]] = []

    class Cold(Worker):
        def warm(self) -> None:
            seen.append(weakref.ref(self))
            raise kind("out of memory")

    gc.disable()
    try:
        with pytest.raises(EngineError, match="out of memory") as caught:
            start(NET.format(2), Cold)
        del caught
        assert len(seen) == 2
        assert eventually(lambda: all(s() is None for s in seen))
    finally:
        gc.enable()


@pytest.mark.parametrize("outcomes", [0, 3])
def test_an_instance_that_miscounts_fails_its_batch_alone(start: Start, outcomes: int) -> None:
    """Too many or too few outcomes are an error for that batch, and the lane goes on."""
    app = start(
        NET.format(1), lambda: lambda values: values if b"odd" not in values else [1] * outcomes
    )
    with pytest.raises(StageFailed, match=f"1 items gave {outcomes} outcomes"):
        app(b"odd")
    assert app(b"even") == b"even"


@pytest.mark.parametrize("error", [ZeroDivisionError("by nothing"), BadRequest("too dark")])
def test_a_failing_batch_fails_each_of_its_requests(start: Start, error: Exception) -> None:
    """Each request has an error of its own, since each is raised in a thread of its own."""
    gate = Gate()

    def work(values: Sequence[Any]) -> list[Any]:
        if b"first" in values:
            return gate(values)
        raise error

    app = start(NET.format(1), lambda: work)
    first = app.submit(b"first")
    assert gate.entered.wait(LONG_S)
    others = [app.submit(name(number)) for number in range(4)]
    gate.opened.set()
    assert first.result(LONG_S) == b"first"
    raised = [future.exception(LONG_S) for future in others]
    assert len({id(e) for e in raised}) == 4
    expected = type(error) if isinstance(error, BadRequest) else StageFailed
    assert all(type(e) is expected and str(error) in str(e) for e in raised)


@pytest.mark.parametrize("where", ["the instance", "the scheduler"])
def test_an_error_that_nobody_expects_does_not_take_its_lane_along(
    start: Start, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its items are answered, the log has it, and the lane goes on with a new instance."""
    workers: list[Worker] = []

    def work(values: Sequence[Any]) -> list[Any]:
        if b"bad" in values:
            raise Interrupted("bad luck")
        return list(values)

    def make() -> Worker:
        workers.append(Worker(work if where == "the instance" else list))
        return workers[-1]

    app = start(NET.format(1), make)
    assert app(b"good") == b"good"
    finish = app.scheduler.finish

    def broken(items: Sequence[Item], outcomes: Sequence[Any], busy_s: float = 0.0) -> None:
        if b"bad" in outcomes:
            raise ZeroDivisionError("bad luck")
        finish(items, outcomes, busy_s)

    if where == "the scheduler":
        monkeypatch.setattr(app.scheduler, "finish", broken)
    with pytest.raises(StageFailed, match=r"an instance was lost: .*: bad luck"):
        app.submit(b"bad").result(LONG_S)
    assert app(b"good") == b"good"
    assert [w.is_closed for w in workers] == [True, False]
    assert "gives up an instance" in caplog.text
    assert "Traceback" in caplog.text


def test_a_callback_does_not_take_a_lane_along(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """What users have called with an answer may end in `sys.exit`; all others get their answers."""
    gate = Gate()
    app = start(NET.format(1), lambda: gate)
    first = app.submit(b"first")
    assert gate.entered.wait(LONG_S)
    batch = [app.submit(name(number)) for number in range(4)]
    for future in (first, batch[0]):
        future.add_done_callback(lambda _: sys.exit("enough"))
    gate.opened.set()
    assert [future.result(LONG_S) for future in batch] == [name(number) for number in range(4)]
    assert app(b"last") == b"last"
    assert app._lanes[0].is_alive()
    assert "what is called with an answer failed" in caplog.text


def test_what_a_stuck_lane_holds_is_answered_at_close(start: Start) -> None:
    """Running and waiting requests alike are told that the app stopped, and close returns."""
    gate = Gate()
    app = start(ONE_BY_ONE.format(1), lambda: gate)
    futures = [app.submit(name(number)) for number in range(4)]
    assert gate.entered.wait(LONG_S)
    assert app.close(0.05) is False
    for future in futures:
        assert future.done()
        assert isinstance(future.exception(), Draining)
    with pytest.raises(Draining):
        app(b"5")
    gate.opened.set()
    app._watch.join(LONG_S)  # which ends the rest as soon as the lane comes back
    assert not any(thread.is_alive() for thread in (*app._lanes, app._watch))


def test_closing_in_time_answers_everything(start: Start) -> None:
    """What was accepted before the close is finished; close says so, and says so again."""
    gate = Gate()
    app = start(ONE_BY_ONE.format(1), lambda: gate)
    futures = [app.submit(name(number)) for number in range(4)]
    assert gate.entered.wait(LONG_S)
    closed: Future[bool] = Future()
    closer = threading.Thread(target=lambda: closed.set_result(app.close(LONG_S)))
    closer.start()
    assert eventually(lambda: _is_draining(app))
    gate.opened.set()
    closer.join(LONG_S)
    assert closed.result(0) is True
    assert [f.result(0) for f in futures] == [name(n) for n in range(4)]
    assert app.close() is True
    assert not any(lane.is_alive() for lane in app._lanes)


def _is_draining(app: App) -> bool:
    try:
        app.submit(b"late").cancel()
    except Draining:
        return True
    return False


def test_closing_under_fire_answers_every_caller(start: Start) -> None:
    """Callers in many threads get a result or Draining, whenever the close happens."""
    text = """
        flow first = trt("net.onnx", batch=1..4) x2
        flow second = trt("net.onnx", batch=1..4) x2
        export flow f = first -> { a: second, b: second, c: first }"""
    for pause_s in (0.0, 0.01, 0.05):
        app = start(text, lambda: list)
        ends: list[Any] = []

        def call(app: App = app, ends: list[Any] = ends) -> None:
            number = 0
            try:
                while True:
                    assert [v[0] for v in app(row(number)).values()] == [number] * 3
                    number += 1
            except BaseException as error:
                ends.append(error)

        callers = [threading.Thread(target=call) for _ in range(6)]
        for caller in callers:
            caller.start()
        time.sleep(pause_s)
        app.close(LONG_S)
        for caller in callers:
            caller.join(LONG_S)
        assert [type(e) for e in ends] == [Draining] * 6
        assert app.scheduler.outstanding == 0


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


class AllBad(Worker):
    """An instance for which every item is bad, and which holds batches while it works on them."""

    def __init__(self) -> None:
        super().__init__(lambda values: [ValueError("bad") for _ in values])

    def begin(self, values: Sequence[Any]) -> list[Any]:
        return list(values)

    def launch(self, begun: list[Any]) -> list[Any]:
        return begun

    def collect(self, launched: list[Any]) -> list[Any]:
        return self.run(launched)


@pytest.mark.parametrize("make", [lambda: AllBad().work, AllBad])
def test_an_idle_lane_holds_no_item(start: Start, make: Callable[[], Any]) -> None:
    """Once answered, an item is freed at once, by no help of the garbage collector."""
    text = 'export flow f = trt("net.onnx", batch=1..4) x1'
    app = start(text, make)
    gc.disable()
    try:
        roads: list[Callable[[Any], Any]] = [app, lambda item: app.submit(item).result(LONG_S)]
        for road in roads:
            picture = row(1)
            seen = weakref.ref(picture)
            with pytest.raises(StageFailed, match="ValueError: bad"):
                road(picture)
            del picture
            assert eventually(lambda seen=seen: seen() is None)  # type: ignore[misc]
    finally:
        gc.enable()


def test_an_error_holds_nothing_but_its_words(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failing operator had in hand is freed with the answer, whoever keeps the error; the
    log has the traceback of one that nobody expected.
    """
    written = io.StringIO()
    monkeypatch.setattr(logging.getLogger("flowlang"), "handlers", [logging.StreamHandler(written)])
    monkeypatch.setattr(logging.getLogger("flowlang"), "propagate", False)  # pytest keeps records
    seen: list[weakref.ref[Any]] = []

    def fail(value: Any, kind: type[Exception]) -> None:
        picture = row(1)
        seen.append(weakref.ref(picture))
        try:
            raise OSError("no such level")
        except OSError as error:
            raise kind("too dark") from error

    def work(values: Sequence[Any]) -> list[Any]:
        outcomes: list[Any] = []
        for value in values:
            try:
                fail(value, ValueError if value[0] else BadRequest)
            except Exception as error:  # as chains of operators do
                outcomes.append(error)
        return outcomes

    app = start('export flow f = trt("net.onnx", batch=1..4) x1', lambda: work)

    async def call(road: Callable[[Any], Any], item: Any) -> None:
        """Not around the loop, whose own frames hold a task that failed."""
        try:
            await road(item)
        except (BadRequest, StageFailed) as error:
            seen.append(weakref.ref(error))

    roads: list[Callable[[Any], Any]] = [
        app,
        lambda item: app.submit(item).result(LONG_S),
        lambda item: asyncio.run(call(app.acall, item)),
        lambda item: asyncio.run(call(app["f"].atimed, item)),
        lambda item: list(app.map([item])),
    ]
    gc.collect()
    gc.disable()
    try:
        kept = list(app.map([row(n % 2) for n in range(20)], errors="return"))
        assert {type(error) for error in kept} == {BadRequest, StageFailed}
        assert eventually(lambda: all(s() is None for s in seen))
        for road in roads:
            for number in (0, 1):
                try:
                    road(row(number))
                except (BadRequest, StageFailed) as error:
                    seen.append(weakref.ref(error))
                assert eventually(lambda: all(s() is None for s in seen))
        assert len(seen) == len(kept) + 2 * 2 * len(roads)
    finally:
        gc.enable()
    assert 'raise kind("too dark") from error' in written.getvalue()


def test_answered_futures_are_freed(start: Start) -> None:
    """A future and its request form no ring that only the garbage collector could undo."""
    app = start('export flow f = trt("net.onnx", batch=1..4) x1', lambda: list)
    gc.disable()
    try:
        future = app.submit(row(1))
        answer = weakref.ref(future.result(LONG_S))
        del future
        assert eventually(lambda: answer() is None)
    finally:
        gc.enable()


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


class Overlapped(Worker):
    """An instance that begins a batch while the one before is under way. `step` is told of all."""

    def __init__(self, step: Callable[[str, list[Any]], None]) -> None:
        super().__init__()
        self.step = step

    def begin(self, values: Sequence[Any]) -> list[Any]:
        assert self.is_warm
        assert not self.is_closed
        self.step("begin", list(values))
        return list(values)

    def launch(self, begun: list[Any]) -> list[Any]:
        self.step("launch", begun)
        return begun

    def collect(self, launched: list[Any]) -> list[Any]:
        self.step("collect", launched)
        return launched


def test_a_batch_is_begun_while_another_is_under_way(start: Start) -> None:
    """Each batch is begun, launched and collected, and the next is begun before that is over."""
    steps: list[tuple[str, bytes]] = []
    arrived = threading.Event()

    def step(which: str, values: list[Any]) -> None:
        steps.append((which, values[0]))
        if which == "launch" and values == [name(0)]:
            assert arrived.wait(LONG_S)

    app = start(ONE_BY_ONE.format(1), lambda: Overlapped(step))
    futures = [app.submit(name(number)) for number in range(3)]
    arrived.set()
    assert [f.result(LONG_S) for f in futures] == [name(n) for n in range(3)]
    assert app(b"later") == b"later"
    for item in (*map(name, range(3)), b"later"):
        assert [which for which, value in steps if value == item] == ["begin", "launch", "collect"]
    for number in range(2):
        assert steps.index(("begin", name(number + 1))) < steps.index(("collect", name(number)))
        assert steps.index(("collect", name(number))) < steps.index(("launch", name(number + 1)))


@pytest.mark.parametrize(
    "error", [ValueError("bad luck"), InstanceLost("bad luck"), Interrupted("bad luck")]
)
@pytest.mark.parametrize("where", ["begin", "launch", "collect"])
def test_a_failing_step_fails_what_it_must(start: Start, where: str, error: BaseException) -> None:
    """A step that fails takes its batch along; a lost instance takes all that is in it."""
    arrived = threading.Event()
    workers: list[Overlapped] = []

    def step(which: str, values: list[Any]) -> None:
        if which == "launch" and values == [name(0)]:
            assert arrived.wait(LONG_S)
        if which == where and values == [name(1)]:
            raise error

    def make() -> Overlapped:
        workers.append(Overlapped(step))
        return workers[-1]

    app = start(ONE_BY_ONE.format(1), make)
    futures = [app.submit(name(number)) for number in range(4)]
    arrived.set()
    failed = [f.exception(LONG_S) for f in futures]
    assert isinstance(failed[1], StageFailed)
    assert "bad luck" in str(failed[1])
    assert failed[3] is None
    if isinstance(error, ValueError):
        assert failed[0] is failed[2] is None
        assert len(workers) == 1
    else:
        assert [w.is_closed for w in workers] == [True, False]
        assert not any(f is not None and not isinstance(f, StageFailed) for f in failed)
        assert [f is not None for f in failed] == {
            "begin": [True, True, False, False],
            "launch": [False, True, False, False],
            "collect": [False, True, True, False],
        }[where]


def test_both_batches_of_a_stuck_lane_are_answered_at_close(start: Start) -> None:
    """What has been begun and what is under way in a lane that hangs are both answered."""
    gate = Gate()
    arrived = threading.Event()

    def step(which: str, values: list[Any]) -> None:
        if which == "launch" and values == [name(0)]:
            assert arrived.wait(LONG_S)
        if which == "collect":
            gate(values)

    app = start(ONE_BY_ONE.format(1), lambda: Overlapped(step))
    futures = [app.submit(name(number)) for number in range(3)]
    arrived.set()
    assert gate.entered.wait(LONG_S)
    assert app.close(0.05) is False
    assert [type(f.exception(0)) for f in futures] == [Draining] * 3
    gate.opened.set()
