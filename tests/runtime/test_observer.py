"""What an observer is told of requests and their batches, and what it cannot do to them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowlang import App, StageFailed
from flowlang.plan.files import compile_file
from flowlang.plan.physical import Machine, lower
from flowlang.runtime.observer import Worked

FLOWS = """
export flow echo = pass
export flow chain = decode -> resize(8)
"""


class Notes:
    """An observer that writes down what it is told; `following` is what it follows just now."""

    def __init__(self) -> None:
        self.following: object | None = None
        self.batches: list[tuple[str, list[Any], list[Any]]] = []
        self.is_broken = False

    def current(self) -> object | None:
        return self.following

    def observe(self, worked: Worked) -> None:
        if self.is_broken:
            raise RuntimeError("of the observer")
        traces = [getattr(item.request, "trace", None) for item in worked.items]
        assert all(item.taken_s >= item.arrived_s for item in worked.items)
        self.batches.append((worked.stage, traces, list(worked.outcomes)))


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def app(tmp_path: Path, notes: Notes) -> Iterator[App]:
    path = tmp_path / "all.flow"
    path.write_text(FLOWS)
    with App(lower([compile_file(path)], Machine(2)), observer=notes) as app:
        yield app


def test_a_batch_is_shown_with_what_follows_its_requests(app: App, notes: Notes) -> None:
    """A request keeps what followed it when it was submitted; another one has nothing."""
    notes.following = "mine"
    assert app["echo"](b"x") == b"x"
    notes.following = None
    assert app["echo"](b"y") == b"y"
    app.close()
    told = {outcome: trace for _, (trace,), (outcome,) in notes.batches}
    assert told == {b"x": "mine", b"y": None}


def test_a_whole_iterable_is_followed_at_once(app: App, notes: Notes) -> None:
    """All items of a `map` belong to what followed the call."""
    notes.following = "mine"
    assert len(list(app["echo"].map([b"x"] * 20))) == 20
    app.close()
    traces = [trace for _, traces, _ in notes.batches for trace in traces]
    assert traces == ["mine"] * 20


def test_the_outcome_of_an_item_may_be_its_error(app: App, notes: Notes) -> None:
    """What fails is shown as what it failed with."""
    with pytest.raises(Exception, match="not a picture"):
        app["chain"](b"x")
    app.close()
    ((_, _, (outcome,)),) = notes.batches
    assert isinstance(outcome, Exception)
    assert not isinstance(outcome, StageFailed)


def test_an_observer_that_fails_is_not_the_requests_fault(
    app: App, notes: Notes, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers come as ever, and the lane goes on; the log has the reason."""
    notes.is_broken = True
    with caplog.at_level(logging.ERROR):
        assert [app["echo"](b"x") for _ in range(3)] == [b"x"] * 3
        app.close()
    assert len([r for r in caplog.records if "could not be observed" in r.message]) == 3
