"""Lanes on real threads: instances that are lost, fail, or have two batches in hand."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from flowlang.diagnostics import BadRequest, EngineError, StageFailed
from flowlang.runtime.batcher import Item
from flowlang.runtime.stage import InstanceLost
from tests.runtime.workers import (
    NET,
    ONE_BY_ONE,
    Gate,
    Interrupted,
    Overlapped,
    Start,
    Worker,
    name,
    poison,
)
from tests.waiting import LONG_S, eventually


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
