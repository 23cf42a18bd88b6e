"""Items of one `map` under way: who sends them, in which order, and how many."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang import App, BadRequest, Draining, load
from tests.waiting import eventually

OPERATORS = """
import time
from flowlang import BadRequest, batched

@batched
def value(items: list[bytes]) -> list[int]:
    numbers = [int(item) for item in items]
    time.sleep(max(numbers) % 7 / 10_000)
    return numbers

def checked(item: bytes) -> int:
    if int(item) % 5 == 0:
        raise BadRequest(f"no fives: {int(item)}")
    return int(item)
"""
FLOWS = """
use "numbers.py" as n
export flow value = n.value(batch=1..4) x3
export flow checked = n.checked(batch=1..2) x2
export flow same: bytes -> bytes { return in }
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("window")
    (folder / "numbers.py").write_text(OPERATORS)
    path = folder / "app.flow"
    path.write_text(FLOWS)
    with load(path, device="cpu") as app:
        yield app


class Sent:
    """Notes which thread sent how many items, and how many were inside at most."""

    def __init__(self, app: App, flow: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_thread: dict[str, int] = {}
        self.before_lanes: list[int] = []  # inside, when a lane sent more
        self.most = 0
        submit_many = app.scheduler.submit_many
        entrance = app.scheduler.entrances[flow]

        def noted(*args: Any) -> Any:
            name, before = threading.current_thread().name, entrance.outstanding
            lot = submit_many(*args)
            if name.startswith("flowlang-"):
                self.before_lanes.append(before)
            self.by_thread[name] = self.by_thread.get(name, 0) + len(lot)
            self.most = max(self.most, entrance.outstanding)
            return lot

        monkeypatch.setattr(app.scheduler, "submit_many", noted)

    @property
    def by_lanes(self) -> int:
        return sum(n for name, n in self.by_thread.items() if name.startswith("flowlang-"))


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


class Items(Sequence[bytes]):
    """A sequence that is the caller's own, with code that no lane may run."""

    def __init__(self, count: int) -> None:
        self.items = numbers(count)
        self.threads: set[threading.Thread] = set()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        self.threads.add(threading.current_thread())
        return self.items[index]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_lane_sends_the_next_of_a_list_itself(
    app: App, monkeypatch: pytest.MonkeyPatch, kind: Callable[..., Any]
) -> None:
    """It need not wait until whoever asked is awake; no more are under way for that."""
    sent = Sent(app, "value", monkeypatch)
    answers = app["value"].map(kind(numbers(400)), ahead=6)
    assert next(answers) == 0
    assert eventually(lambda: sent.by_lanes >= 5)  # though nobody asks for an answer
    assert list(answers) == list(range(1, 400))
    assert sum(sent.by_thread.values()) == 400
    assert sent.most <= 6


def test_a_lane_goes_no_further_ahead_than_twice(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that nobody takes are not piled up."""
    sent = Sent(app, "value", monkeypatch)
    answers = app["value"].map(numbers(400), ahead=6)
    assert next(answers) == 0
    assert eventually(lambda: sum(sent.by_thread.values()) >= 12)
    time.sleep(0.05)
    assert sum(sent.by_thread.values()) <= 13
    assert list(answers) == list(range(1, 400))


@pytest.mark.parametrize("kind", [Items, lambda count: iter(numbers(count))])
def test_the_callers_own_code_runs_in_the_callers_thread(
    app: App, monkeypatch: pytest.MonkeyPatch, kind: Callable[[int], Any]
) -> None:
    """What makes items may be slow, or bound to its thread."""
    sent = Sent(app, "value", monkeypatch)
    items = kind(60)
    assert list(app["value"].map(items, ahead=6)) == list(range(60))
    assert sent.by_lanes == 0
    if isinstance(items, Items):
        assert items.threads == {threading.main_thread()}


def test_while_all_lanes_have_work_they_send_nothing(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would only keep them from it."""
    sent = Sent(app, "value", monkeypatch)
    answers = app["value"].map(numbers(400), ahead=100)
    assert next(answers) == 0
    assert eventually(lambda: bool(sent.before_lanes))
    assert max(sent.before_lanes) < app.scheduler.entrances["value"].room
    assert list(answers) == list(range(1, 400))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 60) | st.none(), max_size=80), st.integers(1, 30))
def test_outcomes_come_in_order_whoever_sends(
    app: App, wanted: list[int | None], ahead: int
) -> None:
    """Also of items that are refused at the door, or fail in an operator."""
    items = [None if number is None else b"%d" % number for number in wanted]
    got = list(app["checked"].map(items, ahead=ahead, errors="return"))
    assert len(got) == len(items)
    for number, outcome in zip(wanted, got, strict=True):
        if number is None:
            assert isinstance(outcome, BadRequest)
            assert "takes bytes, not null" in str(outcome)
        elif number % 5 == 0:
            assert isinstance(outcome, BadRequest)
            assert f"no fives: {number}" in str(outcome)
        else:
            assert outcome == number
    assert app.scheduler.outstanding == 0


def test_items_that_are_answered_at_once_are_no_recursion(app: App) -> None:
    """Each answer makes room for the next item, which is answered at once."""
    items = numbers(5_000)
    assert list(app["same"].map(items, ahead=1)) == items
    assert list(app["same"].map(items, ahead=500)) == items


def test_maps_side_by_side_keep_to_their_own(app: App) -> None:
    """Each lane brings answers of several, and sends the next of each."""
    found: dict[int, list[Any]] = {}

    def go(number: int) -> None:
        found[number] = list(app["value"].map(numbers(300)[number:], ahead=1 + number % 5))

    threads = [threading.Thread(target=go, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: list(range(number, 300)) for number in range(8)}


def test_a_map_whose_app_stops_says_so(tmp_path: Path) -> None:
    """A lane that cannot send the next goes on; who asked is told."""
    (tmp_path / "numbers.py").write_text(OPERATORS)
    path = tmp_path / "app.flow"
    path.write_text(FLOWS)
    app = load(path, device="cpu")
    answers = app["value"].map(numbers(100_000), ahead=6)
    assert list(itertools.islice(answers, 10)) == list(range(10))
    assert app.close()
    left: list[int] = []
    with pytest.raises(Draining):
        left.extend(answers)
    assert left == list(range(10, 10 + len(left)))
    assert not any(lane.is_alive() for lane in app._lanes)
