"""The engine's desk and the fronts before it, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowlang
from flowlang.app import App
from flowlang.diagnostics import Draining
from flowlang.serve.desk import Desk
from flowlang.serve.front import Engine, RemoteFlow
from tests.serve.server import PATIENCE_S, write


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    with flowlang.load(write(tmp_path / "echo.flow", "pass\n"), device="cpu") as app:
        yield app


class Front:
    """A front that has met the desk, and the flows it was told of last."""

    def __init__(self, path: str) -> None:
        self.flows: dict[str, RemoteFlow] = {}
        self.has_flows = asyncio.Event()
        self.engine = Engine(path, self._let_in, self.has_flows.clear)

    def _let_in(self, flows: dict[str, RemoteFlow]) -> None:
        self.flows = flows
        self.has_flows.set()

    async def be_open(self) -> RemoteFlow:
        """Wait until it lets requests in, and the desk knows it. Returns its flow."""
        await asyncio.wait_for(self.has_flows.wait(), PATIENCE_S)
        assert await self.flows["main"].acall(b"knock") == b"knock"  # behind the word that it does
        return self.flows["main"]


async def _meet(path: str) -> Front:
    front = Front(path)
    await front.engine.prepare()
    return front


def test_all_fronts_are_there_once_each_of_them_is(app: App, tmp_path: Path) -> None:
    """One that went and came again is one; and that all are there is said once."""

    async def go() -> None:
        told: list[str] = []
        desk = Desk(path := str(tmp_path / "engine"), {}, 2)
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
        desk = Desk(path := str(tmp_path / "engine"), {}, 1)
        desk.start(lambda: None)
        desk.let_in(app)
        front = await _meet(path)
        first = await front.be_open()
        for _ in range(2):
            desk.let_in(app)
            with pytest.raises(Draining):
                await first.acall(b"late")
        last = await front.be_open()
        assert await last.acall(b"x") == b"x"
        await front.engine.close(PATIENCE_S)
        assert await desk.deserted(PATIENCE_S)
        desk.close()

    asyncio.run(go())


def test_a_front_that_leaves_answers_first(app: App, tmp_path: Path) -> None:
    """It waits for what it has asked, at most so long, and says why there is no answer."""

    async def go() -> None:
        desk = Desk(path := str(tmp_path / "engine"), {"late": asyncio.sleep}, 1)
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
