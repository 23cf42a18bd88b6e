"""What an answer, an error or a start that failed leaves in memory: nothing."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from flowlang.diagnostics import BadRequest, EngineError, StageFailed
from flowlang.runtime.stage import InstanceLost
from tests.runtime.workers import NET, Start, Worker, row
from tests.waiting import LONG_S, eventually


@pytest.mark.parametrize("kind", [EngineError, InstanceLost])
def test_an_app_that_does_not_start_is_freed(start: Start, kind: type[Exception]) -> None:
    """Whoever keeps its error, an EngineError always, what could not be made ready is gone: let go
    of by the lane that made it, in whose thread the GPU is current that it lies on.
    """
    makers: list[threading.Thread] = []
    freed: list[threading.Thread] = []

    class Cold(Worker):
        def warm(self) -> None:
            makers.append(threading.current_thread())
            weakref.finalize(self, lambda: freed.append(threading.current_thread()))
            try:
                raise OSError("no room")
            except OSError as error:
                raise kind("out of memory") from error

    gc.disable()
    try:
        with pytest.raises(EngineError, match="out of memory"):
            start(NET.format(2), Cold)
        assert len(makers) == 2
        assert {*freed} == {*makers}
    finally:
        gc.enable()


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
