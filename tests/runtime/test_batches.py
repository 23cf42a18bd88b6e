"""Batches on virtual time: what goes into them, in which order, and how long it waits for that."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given

from flowlang.runtime.batcher import Item
from flowlang.runtime.request import Request
from tests.runtime.scenarios import (
    FEW,
    SHAPES,
    Scenario,
    plan,
    play,
    scenarios,
    simulated,
    start,
    waiting,
)
from tests.simulation import Simulation


@FEW
@given(scenarios())
def test_batches_keep_their_bounds_and_hold_no_item_twice(scenario: Scenario) -> None:
    """A batch has at least one item and at most the greatest allowed, and no item runs twice."""
    course = play(scenario)
    ran: set[Item] = set()
    for batch in course.simulation.batches:
        assert 1 <= len(batch.items) <= course.plan.stages[batch.stage].batch[2]
        assert not ran.intersection(batch.items)
        ran.update(batch.items)
    for stage in course.simulation.scheduler.stages:
        sizes = Counter(
            len(b.items) for b in course.simulation.batches if b.stage == stage.plan.index
        )
        if not course.lost:
            assert stage.counts.sizes == sizes


@FEW
@given(scenarios())
def test_items_start_in_the_order_in_which_they_reached_their_stage(scenario: Scenario) -> None:
    """A stage is first come, first served, over all of its instances and all flows."""
    simulation = play(scenario).simulation
    for number, queued in enumerate(simulation.queued):
        place = {item: index for index, item in enumerate(queued)}
        started = [place[i] for b in simulation.batches if b.stage == number for i in b.items]
        assert started == sorted(started)


def union_s(spans: list[tuple[float, float]], until_s: float) -> float:
    """How long at least one of some spans of time lasts."""
    total_s, reached_s = 0.0, 0.0
    for start_s, end_s in sorted(spans):
        start_s, end_s = max(start_s, reached_s), min(end_s, until_s)
        total_s += max(0.0, end_s - start_s)
        reached_s = max(reached_s, end_s)
    return total_s


@FEW
@given(scenarios())
def test_a_request_is_queued_while_no_instance_is_at_work_on_it(scenario: Scenario) -> None:
    """From its arrival to its result, backlog included, a request is worked on or it waits."""
    course = play(scenario)
    spans: dict[Request, list[tuple[float, float]]] = {}
    for batch in course.simulation.batches:
        for item in batch.items:
            spans.setdefault(item.request, []).append((batch.start_s, course.end_s(batch)))
    for answer in course.simulation.answers:
        request = answer.request
        if not isinstance(answer.outcome, Exception):
            worked_s = union_s(spans.get(request, []), answer.at_s)
            waited_s = answer.at_s - request.arrived_s - worked_s
            assert request.queued_s == pytest.approx(waited_s, abs=1e-9)


@FEW
@given(scenarios())
def test_no_instance_idles_while_an_item_waits_longer_than_it_should(scenario: Scenario) -> None:
    """A free instance takes what waits: at once, or for an incomplete batch after its wait."""
    course = start(scenario)
    simulation = course.simulation

    def check() -> None:
        for stage in simulation.scheduler.stages:
            items = waiting(stage)
            if items and stage.idle and not stage.rung:
                assert simulation.clock.now_s < items[0].arrived_s + stage.plan.wait_s
                assert len(items) < stage.plan.batch[2]

    simulation.on_rest = check
    simulation.run()


@FEW
@given(scenarios(wait=False, timeout=False, troubles=False))
def test_a_free_instance_is_woken_without_delay(scenario: Scenario) -> None:
    """Without waits and with lanes that wake at once, nothing ever waits beside a free instance."""
    course = start(scenario)
    simulation = course.simulation

    def check() -> None:
        for stage in simulation.scheduler.stages:
            assert not (stage.idle and waiting(stage))
            assert not stage.rung

    simulation.on_rest = check
    simulation.run()


def test_a_lone_request_takes_its_service_times_and_nothing_more() -> None:
    """Stage after stage, a request alone in the app never waits."""
    text = SHAPES["chain"].format("batch=3..5", 2, "batch=2..2", 1)
    simulation = simulated(text)
    for start_s in (0.0, 1.0, 2.0):
        simulation.at(start_s, lambda: simulation.submit("f"))
    simulation.run()
    latencies = [a.at_s - a.request.arrived_s for a in simulation.answers]
    assert latencies == pytest.approx([0.010] * 3, abs=1e-9)


def test_a_burst_is_spread_over_all_instances() -> None:
    """Six requests at once and three instances make three batches of two."""
    simulation = simulated('export flow f = trt("net.onnx", batch=1..8) x3')
    for _ in range(6):
        simulation.at(1.0, lambda: simulation.submit("f"))
    simulation.run()
    assert [(len(b.items), b.start_s) for b in simulation.batches] == [(2, 1.0)] * 3
    assert len({b.lane for b in simulation.batches}) == 3


def test_what_is_worked_on_side_by_side_waits_once() -> None:
    """A branch that waits while another is at work does not make its request wait longer."""
    text = """
        flow first = trt("net.onnx") x1
        flow second = trt("net.onnx") x1
        export flow f = first -> { a: second, b: first }"""
    simulation = simulated(text, 0.0, 1.0)
    one, other = simulation.submit("f"), simulation.submit("f")
    simulation.run()
    # `first` works on one, the other, one and the other; `second` on one from 1 s and the other
    # from 2 s. So one's second turn in `first` waits from 1 s to 2 s, which is when `second` works.
    assert [answer.at_s for answer in simulation.answers] == [3.0, 4.0]
    assert (one.queued_s, other.queued_s) == (0.0, 1.0)


def test_a_wait_holds_a_batch_back_until_it_is_due_or_complete() -> None:
    """With wait=8ms a batch starts when its oldest item is 8 ms old, or when it is complete."""
    simulation = simulated('export flow f = trt("net.onnx", batch=1..3, wait=8ms) x2')
    for at_s in (1.0, 1.005, 2.0, 2.001, 2.002, 2.003):
        simulation.at(at_s, lambda: simulation.submit("f"))
    simulation.run()
    started = [(len(b.items), b.start_s) for b in simulation.batches]
    assert started == [(2, 1.008), (3, 2.002), (1, pytest.approx(2.011))]


def inoue(rate: float, t0: float, a: float) -> float:
    """Inoue's bound on the mean latency of take-all batching under Poisson arrivals.

    Y. Inoue, "Queueing analysis of GPU-based inference servers with dynamic batching"
    (arXiv 1912.06322): arrivals per unit of time, service t0 + a * size.
    """
    load = rate * a
    either = (
        (a + t0) / (2 * (1 - load)) * (1 + 2 * rate * t0 + (1 - rate * t0) / (1 + load)),
        1.5 * t0 / (1 - load) + a / 2 * (load + 2) / (1 - load**2),
    )
    return min(either)


@pytest.mark.parametrize("rate", [0.5, 2.0, 5.0, 15.0, 20.0])
def test_mean_latency_is_what_queueing_theory_says(rate: float) -> None:
    """One instance that takes all that waits is as fast as theory allows, at every load."""
    t0, a = 0.45, 0.0255
    physical = plan(
        'export flow f = trt("net.onnx", batch=1..10000) x1\nschedule { f(queue=9999) }'
    )
    simulation = Simulation(physical, lambda stage, items: t0 + a * len(items))
    arrivals = random.Random(7)

    def arrive() -> None:
        simulation.submit("f")
        if len(simulation.queued[0]) < 6000:
            simulation.after(arrivals.expovariate(rate), arrive)

    simulation.at(0.0, arrive)
    simulation.run()
    latencies = [x.at_s - x.request.arrived_s for x in simulation.answers]
    assert sum(latencies) / len(latencies) == pytest.approx(inoue(rate, t0, a), rel=0.1)
