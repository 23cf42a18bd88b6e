"""Closing an app on real threads: every request in it is answered."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from flowlang.app import App
from flowlang.diagnostics import Draining
from tests.runtime.workers import ONE_BY_ONE, Gate, Overlapped, Start, name, row
from tests.waiting import LONG_S, eventually


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
