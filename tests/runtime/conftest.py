"""An app whose instances come from the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flowlang.app import App
from flowlang.plan.physical import StagePlan
from flowlang.runtime.instances import Instances
from flowlang.runtime.stage import Instance
from tests.runtime.workers import Gate, Start, Worker
from tests.simulation import plan_of, write_models
from tests.waiting import LONG_S


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an App of a flow text whose instances come from a function."""
    apps: list[App] = []
    gates: list[Gate] = []

    def starter(text: str, make: Callable[[], Any]) -> App:
        def made(self: Instances, stage: StagePlan, number: int) -> Instance:
            work = make()
            if isinstance(work, Gate):
                gates.append(work)
            return work if hasattr(work, "run") else Worker(work)

        monkeypatch.setattr(Instances, "make", made)
        apps.append(App(plan_of(text, folder, cores=4)))
        return apps[-1]

    yield starter
    for gate in gates:
        gate.opened.set()
    for app in apps:
        app.close(LONG_S)
        for lane in app._lanes:
            lane.join(LONG_S)
            assert not lane.is_alive()
