"""The engine's desk and the fronts before it, in one process."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import flowlang
from flowlang.app import App
from flowlang.diagnostics import DeadlineExceeded, Draining, Overloaded
from flowlang.serve import channel
from flowlang.serve.answer import Refusal
from flowlang.serve.desk import Desk, Kind, Question
from flowlang.serve.front import RETRY_S, Engine, RemoteFlow
from flowlang.serve.trace import Tracer
from tests.serve.collector import collecting
from tests.serve.server import PATIENCE_S, write


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    with flowlang.load(write(tmp_path / "echo.flow", "pass\n"), device="cpu") as app:
        yield app


class Front:
    """A front that has met the desk, and the flows it was told of last."""

    def __init__(self, path: str, tracer: Tracer | None = None) -> None:
        self.flows: dict[str, RemoteFlow] = {}
        self.has_flows = asyncio.Event()
        self.engine = Engine(path, self._let_in, self.has_flows.clear, tracer)

    def _let_in(self, flows: dict[str, RemoteFlow]) -> None:
        self.flows = flows
        self.has_flows.set()

    async def be_open(self) -> RemoteFlow:
        """Wait until it lets requests in, and the desk knows it. Returns its flow."""
        await asyncio.wait_for(self.has_flows.wait(), PATIENCE_S)
        assert await self.flows["main"].acall(b"knock") == b"knock"  # behind the word that it does
        return self.flows["main"]


async def _meet(path: str, tracer: Tracer | None = None) -> Front:
    front = Front(path, tracer)
    await front.engine.prepare()
    return front


@asynccontextmanager
async def _open(
    app: App,
    folder: Path,
    questions: Mapping[str, Question] | None = None,
    tracer: Tracer | None = None,
) -> AsyncIterator[tuple[Desk, Front, RemoteFlow]]:
    """A desk, the one front before it, and its flow; in the end the front leaves."""
    desk = Desk(path := str(folder / "engine"), questions or {}, 1, Counter(), tracer)
    desk.start(lambda: None)
    desk.let_in(app)
    front = await _meet(path, tracer)
    yield desk, front, await front.be_open()
    await front.engine.close(PATIENCE_S)
    assert await desk.deserted(PATIENCE_S)
    desk.close()


def test_all_fronts_are_there_once_each_of_them_is(app: App, tmp_path: Path) -> None:
    """One that went and came again is one; and that all are there is said once."""

    async def go() -> None:
        told: list[str] = []
        desk = Desk(path := str(tmp_path / "engine"), {}, 2, Counter())
        desk.start(lambda: told.append("complete"))
        desk.let_in(app)
        for _ in range(3):
            again = await _meet(path)
            await again.be_open()
            assert not told
            await again.engine.close(PATIENCE_S)
            assert await desk.deserted(PATIENCE_S)
        fronts = [await _meet(path) for _ in range(3)]
        for front in fronts:
            await front.be_open()
        assert told == ["complete"]
        for front in fronts:
            await front.engine.close(PATIENCE_S)
        assert await desk.deserted(PATIENCE_S)
        desk.close()

    asyncio.run(go())


def test_a_flow_that_was_taken_over_from_refuses(app: App, tmp_path: Path) -> None:
    """However often that was, so that the front asks the one that has taken over."""

    async def go() -> None:
        async with _open(app, tmp_path) as (desk, front, first):
            for _ in range(2):
                desk.let_in(app)
                with pytest.raises(Draining):
                    await first.acall(b"late")
            last = await front.be_open()
            assert await last.acall(b"x") == b"x"

    asyncio.run(go())


def test_a_front_that_leaves_answers_first(app: App, tmp_path: Path) -> None:
    """It waits for what it has asked, at most so long, and says why there is no answer."""

    async def go() -> None:
        desk = Desk(path := str(tmp_path / "engine"), {"late": asyncio.sleep}, 1, Counter())
        desk.start(lambda: None)
        desk.let_in(app)
        front = await _meet(path)
        await front.be_open()
        for asked_s, in_time in ((0.1, True), (60.0, False)):
            asked = asyncio.ensure_future(front.engine.ask("late", asked_s, "told"))
            await asyncio.sleep(0)  # so that it is under way
            assert await front.engine.close(1.0) is in_time
            if in_time:
                assert await asked == "told"
                front = await _meet(path)
                await front.be_open()
            else:
                with pytest.raises(Draining):
                    await asked
        assert await desk.deserted(PATIENCE_S)
        desk.close()

    asyncio.run(go())


@pytest.mark.parametrize("holds", [True, False])
def test_where_the_engine_went_is_told(app: App, tmp_path: Path, holds: bool) -> None:
    """To a front that stops it is no failure that the engine goes too; to others it is."""

    async def go() -> None:
        desk = Desk(path := str(tmp_path / "engine"), {"late": asyncio.sleep}, 1, Counter())
        desk.start(lambda: None)
        desk.let_in(app)
        front = await _meet(path)
        flow = await front.be_open()
        asked = asyncio.ensure_future(front.engine.ask("late", 60.0, "told"))
        await asyncio.sleep(0)  # so that it is under way
        if holds:
            front.engine.hold()
        desk.close()
        wanted, code = (Draining, "draining") if holds else (Refusal, "restarting")
        with pytest.raises(wanted) as under_way:
            await asyncio.wait_for(asked, PATIENCE_S)
        with pytest.raises(wanted) as after:
            await flow.acall(b"x")
        assert under_way.value.code == after.value.code == code
        await front.engine.close(PATIENCE_S)

    asyncio.run(go())


def test_the_time_on_the_way_counts(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline is one from when the front was asked, whenever the engine reads of it."""

    async def go() -> None:
        async with _open(app, tmp_path) as (_, _, flow):
            spent_s: list[float] = []
            put = app["main"].put

            def note(*given: Any) -> Any:
                spent_s.append(time.monotonic() - given[-1])
                return put(*given)

            monkeypatch.setattr(app["main"], "put", note)
            for within_s in (60.0, 0.1):
                asked = asyncio.ensure_future(flow.acall(b"x", deadline_s=within_s))
                await asyncio.sleep(0)  # so that it is sent at the end of this turn
                await asyncio.sleep(0)
                time.sleep(0.2)
                if within_s > 1:
                    assert await asked == b"x"
                else:
                    with pytest.raises(DeadlineExceeded, match="not answered by its deadline"):
                        await asked
            assert len(spent_s) == 1, "it was worked for although it was too late"
            assert 0.2 <= spent_s[0] < 1

    asyncio.run(go())


TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED, UNSAMPLED = (f"00-{TRACE}-b7ad6b7169203331-{flags}" for flags in ("01", "00"))


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracer]:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        tracer = Tracer()
        tracer.start()
        yield tracer
        tracer.close()


@pytest.mark.parametrize(
    ("parent", "is_told"),
    [(None, (False, False)), (UNSAMPLED, (False, True)), (SAMPLED, (True, True))],
)
def test_a_trace_is_told_where_it_is_of_use(
    app: App, tmp_path: Path, tracer: Tracer, parent: str | None, is_told: tuple[bool, bool]
) -> None:
    """A call that is not followed costs no message more, and has no trace in the engine."""

    async def go() -> None:
        async with _open(app, tmp_path, {"trace": tracer.trace_id}, tracer) as (_, front, flow):
            kinds: list[int] = []
            send = front.engine.channel.send

            def note(number: int, kind: int, *rest: Any) -> None:
                kinds.append(kind)
                send(number, kind, *rest)

            monkeypatch.setattr(front.engine.channel, "send", note)
            if parent is not None:
                tracer.begin("main", {"traceparent": parent}, {})
            await flow.acall(b"x")
            assert kinds == [*([Kind.TRACE] if is_told[0] else []), Kind.CALL]
            kinds.clear()
            told = await front.engine.ask("trace")
            assert kinds == [*([Kind.TRACE] if is_told[1] else []), Kind.ASK]
            assert told == (TRACE if is_told[1] else None)
            # What comes behind it is none of it.
            fresh = contextvars.Context()
            assert await fresh.run(asyncio.ensure_future, front.engine.ask("trace")) is None

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(go())


def test_a_front_that_stops_lets_no_flows_in(app: App, tmp_path: Path) -> None:
    """Nor those that the engine, which has not heard of the end yet, tells it of just then."""

    async def go() -> None:
        async with _open(app, tmp_path, {"told": lambda: "told"}) as (desk, front, flow):
            front.engine.hold()
            desk.let_in(app)
            assert await front.engine.ask("told") == "told"  # behind the word of the others
            assert front.flows["main"] is flow

    asyncio.run(go())


def test_a_front_that_is_turned_away_takes_its_time(tmp_path: Path) -> None:
    """An engine that has no room for it is not asked at full speed."""

    async def go() -> int:
        knocked = 0

        def turn_away(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal knocked
            knocked += 1
            writer.close()

        path = str(tmp_path / "engine")
        async with await asyncio.start_unix_server(turn_away, path):
            front = Front(path)
            preparing = asyncio.ensure_future(front.engine.prepare())
            await asyncio.sleep(0.5)
            preparing.cancel()
            await front.engine.close(0.0)
        return knocked

    assert 1 <= asyncio.run(go()) <= 0.5 / RETRY_S + 1


def test_refusals_that_the_engine_does_not_read_of_are_added_up(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped engine does not have its fronts grow, and is told of all once it goes on."""
    monkeypatch.setattr(channel, "SENT_BYTES", 1 << 12)
    monkeypatch.setattr(channel, "WAITING_BYTES", 100_000)

    async def go() -> None:
        async with _open(app, tmp_path) as (desk, front, flow):
            told: list[int] = []
            monkeypatch.setattr(desk, "count_refusals", lambda *refusal: told.append(refusal[2]))
            for _ in range(100_000):  # in one turn of the loop, so that nobody reads
                flow.count_refusal("bad-request")
            with pytest.raises(Overloaded):
                await flow.acall(b"x")
            while front.engine.channel.is_full:
                await asyncio.sleep(0.01)
            assert await flow.acall(b"x") == b"x"  # behind all the others
            flow.count_refusal("bad-request")
            while sum(told) < 100_002:  # with the call that was refused
                await asyncio.sleep(0.01)
            assert sum(told) == 100_002
            assert len(told) < 20_000

    asyncio.run(go())
