"""Which items make a batch, held against a plain list that is searched from the front."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.runtime.batcher import Batcher, Item, bring_back
from flowlang.runtime.entrance import Entrance
from flowlang.runtime.request import Request
from flowlang.runtime.scheduler import Scheduler
from tests.simulation import Clock, Simulation, plan_of


@cache
def entrance() -> Entrance:
    """The door of a flow, for requests to belong to."""
    with TemporaryDirectory() as folder:
        return Scheduler(plan_of("pass", Path(folder)), Clock()).entrances["main"]


@cache
def nobody() -> Simulation:
    """A reply that is never told anything here."""
    with TemporaryDirectory() as folder:
        return Simulation(plan_of("pass", Path(folder)), lambda stage, items: 0.0)


def item_at(arrived_s: float, priority: int = 0) -> Item:
    request = Request(entrance(), None, nobody(), None, arrived_s)
    if priority:
        request.priority = priority
    return Item(request, 0, None, arrived_s)


def filled(batcher: Batcher, *arrivals_s: float) -> list[Item]:
    items = [item_at(arrived_s) for arrived_s in arrivals_s]
    for item in items:
        batcher.put(item)
    return items


def test_a_lone_item_is_taken_at_once() -> None:
    """Without a wait, one item is a batch as soon as it is there, whatever the bounds say."""
    batcher = Batcher(4, 8, 0.0, 2)
    items = filled(batcher, 1.0)
    assert batcher.due_s() == 1.0
    assert batcher.take(1.0, 2) == items
    assert batcher.take(1.0, 2) == []
    assert batcher.due_s() is None


@pytest.mark.parametrize(
    ("waiting", "at_work", "free", "size"),
    [
        (10, 24, 1, 8),
        (10, 16, 2, 5),
        (10, 8, 3, 4),
        (10, 0, 4, 3),
        (10, 0, 10, 2),
        (10, 0, 99, 2),
        (1, 8, 3, 1),
        (3, 20, 1, 3),
        (7, 3, 1, 3),  # of ten in all, over four instances
        (7, 1, 1, 2),
    ],
)
def test_what_waits_is_spread_over_the_free_instances(
    waiting: int, at_work: int, free: int, size: int
) -> None:
    """An instance takes its share of what waits, and no more than of all that is in the stage: at
    least the lower bound, at most the upper."""
    batcher = Batcher(2, 8, 0.0, 4)
    busy(batcher, at_work)
    items = filled(batcher, *[0.0] * waiting)
    assert batcher.take(0.0, free) == items[:size]


def busy(batcher: Batcher, count: int) -> None:
    """Have so many items at work."""
    filled(batcher, *[0.0] * count)
    while batcher.waiting:
        batcher.take(0.0, 1)
    assert batcher.at_work == count


def test_what_has_come_back_is_not_at_work() -> None:
    """Nor is what is put back, and what comes back twice has come back once."""
    batcher = Batcher(1, 8, 0.0, 1)
    items = filled(batcher, *[0.0] * 8)
    assert batcher.take(0.0, 1) == items
    for item in items[:3] * 2:
        bring_back(item)
    assert batcher.at_work == 5
    batcher.put_back(items[3:])
    assert batcher.at_work == 0
    assert list(batcher.waiting) == items[3:]


@pytest.mark.parametrize(("waiting", "size"), [(1, 1), (3, 1), (4, 2), (9, 3), (90, 30), (300, 64)])
def test_a_shared_stage_counts_busy_instances_too(waiting: int, size: int) -> None:
    """Where a batch saves nothing, a lone free instance leaves the others their share."""
    batcher = Batcher(1, 64, 0.0, 3, is_shared=True)
    filled(batcher, *[0.0] * waiting)
    assert len(batcher.take(0.0, 1)) == size


def test_an_incomplete_batch_is_held_until_its_oldest_item_has_waited() -> None:
    """With a wait, a batch is due when it is complete or when its oldest item has waited."""
    batcher = Batcher(1, 3, 0.5, 1)
    items = filled(batcher, 1.0, 1.25)
    assert batcher.due_s() == 1.5
    assert batcher.take(1.375, 1) == []
    assert batcher.take(1.5, 1) == items
    items = filled(batcher, 2.0, 2.0, 2.0, 2.0)
    assert batcher.due_s() == 2.0
    assert batcher.take(2.0, 4) == items[:3]
    assert batcher.due_s() == 2.5


def test_answered_items_delay_and_complete_nothing() -> None:
    """Items whose request is answered, or that are over, are not taken and set no due time."""
    batcher = Batcher(1, 8, 0.5, 1)
    first, second, third = filled(batcher, 1.0, 1.125, 1.25)
    first.request.outcome = "cancelled"
    second.is_settled = True
    assert batcher.due_s() == 1.75
    assert batcher.take(1.5, 1) == []
    assert batcher.take(1.75, 1) == [third]


def test_answered_items_do_not_pile_up_while_no_instance_asks() -> None:
    """Requests that expire in front of a stuck stage leave its queue as others join it."""
    batcher = Batcher(1, 8, 0.0, 1)
    for number in range(100):
        for item in filled(batcher, float(number)):
            item.request.outcome = "expired"
    assert len(batcher.waiting) == 1


@pytest.mark.parametrize("is_ranked", [False, True])
def test_answered_items_do_not_pile_up_behind_one_that_is_wanted(is_ranked: bool) -> None:
    """The queue holds little besides those somebody waits for, and those in their order."""
    batcher = Batcher(1, 8, 0.0, 1)
    batcher.is_ranked = is_ranked
    wanted = filled(batcher, 0.0)
    for number in range(1, 5000):
        (item,) = filled(batcher, float(number))
        if number % 100:
            item.request.outcome = "cancelled"
        else:
            wanted.append(item)
        assert len(batcher.waiting) <= 2 * len(wanted) + 100
    assert [item for item in batcher.waiting if item.is_wanted] == wanted


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 4))
def test_a_lower_rank_is_taken_first(priorities: list[int], high: int) -> None:
    """Batches hold items by rank, equals as they came; those without a priority are of rank 2."""
    batcher = Batcher(1, high, 0.0, 1)
    batcher.is_ranked = True
    items = [item_at(float(number), priority) for number, priority in enumerate(priorities)]
    for item in items:
        batcher.put(item)
    taken: list[Item] = []
    while batch := batcher.take(100.0, 1):
        taken += batch
    assert taken == sorted(items, key=lambda item: item.rank)
    assert [item.rank for item in items] == [priority or 2 for priority in priorities]


def test_the_wait_of_what_is_not_taken_first_counts() -> None:
    """A batch is due when any of its items has waited, and not only the one that is first in it."""
    batcher = Batcher(1, 3, 0.5, 1)
    batcher.is_ranked = True
    low, high = item_at(1.0, 3), item_at(1.25, 1)
    batcher.put(low)
    batcher.put(high)
    assert batcher.due_s() == 1.5
    assert batcher.take(1.5, 1) == [high, low]


@dataclass(slots=True)
class Oracle:
    """What should wait: a list, searched from the front."""

    low: int
    high: int
    wait_s: float
    instances: int
    is_shared: bool
    waiting: list[Item] = field(default_factory=list)
    at_work: list[Item] = field(default_factory=list)

    def live(self) -> list[Item]:
        return [i for i in self.waiting if not i.request.is_answered and not i.is_settled]


STEP = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 9)),
    st.tuples(st.just("take"), st.integers(1, 4)),
    st.tuples(st.just("answer"), st.integers(0, 30)),
    st.tuples(st.just("finish"), st.integers(0, 12)),
    st.tuples(st.just("pass"), st.integers(1, 5)),
)


@settings(max_examples=300)
@given(
    st.integers(1, 5), st.integers(0, 8), st.sampled_from([0.0, 0.25, 1.0]), st.integers(1, 4),
    st.booleans(), st.lists(STEP, min_size=15, max_size=60),
)  # fmt: skip
def test_batches_keep_order_bounds_and_shares(
    low: int,
    more: int,
    wait_s: float,
    instances: int,
    is_shared: bool,
    steps: list[tuple[str, int]],
) -> None:
    """Whatever happens, a batch is the front of what waits, within its bounds and its share."""
    high = low + more
    batcher = Batcher(low, high, wait_s, instances, is_shared=is_shared)
    oracle = Oracle(low, high, wait_s, instances, is_shared)
    now_s = 0.0
    for step, number in steps:
        if step == "pass":
            now_s += number * 0.125
        elif step == "put":
            oracle.waiting += filled(batcher, *[now_s] * number)
        elif step == "answer" and number < len(oracle.waiting):
            oracle.waiting[number].request.outcome = "answered"
        elif step == "finish":
            for item in oracle.at_work[:number]:
                bring_back(item)
            del oracle.at_work[:number]
        elif step == "take":
            check_take(batcher, oracle, now_s, number)


def check_take(batcher: Batcher, oracle: Oracle, now_s: float, free: int) -> None:
    live = oracle.live()
    oracle.waiting = oracle.waiting[oracle.waiting.index(live[0]) :] if live else []
    due_s = batcher.due_s()
    batch = batcher.take(now_s, free)
    assert batch == live[: len(batch)]
    assert len(batch) <= oracle.high
    assert (due_s is None) == (not live)
    if not live:
        return
    oldest_s = live[0].arrived_s
    is_due = len(live) >= oracle.high or now_s >= oldest_s + oracle.wait_s
    assert due_s is not None
    assert due_s <= oldest_s + oracle.wait_s
    assert batch or not is_due
    if oracle.waiting == live:
        among = oracle.instances if oracle.is_shared else free
        in_all = len(live) + len(oracle.at_work)
        share = min(math.ceil(len(live) / among), math.ceil(in_all / oracle.instances))
        share = len(live) if oracle.wait_s else share
        size = min(oracle.high, len(live), max(oracle.low, share))
        assert len(batch) == (size if is_due else 0)
    oracle.at_work += batch
    if batch:
        oracle.waiting = oracle.waiting[oracle.waiting.index(batch[-1]) + 1 :]
