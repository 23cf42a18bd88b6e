"""Deadlines on virtual time: kept to the instant, and let go of once they are answered."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from flowlang.diagnostics import BadRequest, DeadlineExceeded, RequestError
from flowlang.runtime.request import Request
from tests.runtime.scenarios import FEW, UNIT_S, Scenario, play, scenarios, simulated


@FEW
@given(scenarios())
def test_deadlines_are_kept_to_the_instant(scenario: Scenario) -> None:
    """No answer comes after its request's deadline or its item's timeout, and that one on it."""
    course = play(scenario)
    done_s = {item: course.end_s(b) for b in course.simulation.batches for item in b.items}
    timeouts: dict[Request, list[float]] = {}
    for stage, queued in zip(course.plan.stages, course.simulation.queued, strict=True):
        for item in queued:
            due_s = item.arrived_s + (stage.timeout_s or math.inf)
            if due_s <= done_s.get(item, math.inf):
                timeouts.setdefault(item.request, []).append(due_s)
    for answer in course.simulation.answers:
        call, request = course.accepted[answer.request], answer.request
        allowed_s = request.entrance.program.slo_s
        if call.deadline is not None:
            allowed_s = call.deadline * UNIT_S
        due_s = math.inf if allowed_s is None else request.arrived_s + allowed_s
        assert answer.at_s <= due_s
        if isinstance(answer.outcome, DeadlineExceeded):
            assert answer.at_s in (due_s, *timeouts.get(request, ()))


@FEW
@given(scenarios())
def test_an_item_out_of_time_fails_its_request(scenario: Scenario) -> None:
    """No item of a request that is answered with a result took longer than its stage may take."""
    course = play(scenario)
    outcomes = course.outcomes()
    for batch in course.simulation.batches:
        stage = course.plan.stages[batch.stage]
        done_s = course.end_s(batch)
        for item in batch.items:
            if stage.timeout_s is not None and done_s > item.arrived_s + stage.timeout_s:
                assert isinstance(outcomes[item.request], RequestError)


def test_answered_requests_do_not_pile_up_until_their_deadlines() -> None:
    """Answers given in time are let go of, however far off their deadlines were."""
    simulation = simulated('export flow f = trt("net.onnx", batch=1)\nschedule { f(slo=1000s) }')
    for number in range(200):
        simulation.at(number * 0.01, lambda: simulation.submit("f"))
    simulation.run(100.0)
    assert len(simulation.answers) == 200
    assert len(simulation.scheduler._expiries) < 10


def test_answered_requests_do_not_pile_up_behind_one_that_waits() -> None:
    """One deadline that is still to come does not keep the answers to all later requests."""
    simulation = simulated("""
        flow net = trt("net.onnx", batch=1)
        flow other = trt("four.onnx", timeout=900s)
        export flow f = net
        export flow g = other
        export flow h = other -> softmax
        schedule { g(slo=1000s, queue=2000) }""")
    simulation.service_s = lambda stage, items: 1e4 if "net" in stage.name else 0.001
    simulation.submit("f", deadline_s=500.0)
    for number in range(2000):
        simulation.at(number * 0.01, lambda: simulation.submit("g"))
        simulation.at(number * 0.01, lambda: simulation.submit("h", np.ones(4)))
    simulation.run(400.0)
    assert len(simulation.answers) == 4000
    assert len(simulation.scheduler._expiries) < 100


def test_who_gives_up_past_the_deadline_was_late() -> None:
    """Both come at once to a process that has been stopped, and what is counted is one of them."""
    simulation = simulated('export flow f = trt("net.onnx", batch=1)')
    simulation.service_s = lambda stage, items: 1e6
    early, late = (simulation.submit("f", deadline_s=5.0) for _ in range(2))
    simulation.scheduler.cancel(early)
    simulation.clock.now_s = 5.0
    assert not simulation.scheduler.cancel(late)
    assert simulation.scheduler.entrances["f"].counts.failures == {
        "cancelled": 1,
        "deadline-exceeded": 1,
    }


def test_a_crowd_of_deadlines_is_kept_to_the_instant() -> None:
    """However many requests are given up meanwhile, each of the others has its deadline."""
    simulation = simulated("""
        export flow f = trt("net.onnx", batch=1, timeout=50s)
        schedule { f(queue=5000) }""")
    simulation.service_s = lambda stage, items: 1e6
    dice = random.Random(7)
    asked = []
    for number in range(2000):
        deadline_s = dice.randrange(1, 64) * 1.0
        request = simulation.submit("f", deadline_s=deadline_s)
        if number % 3:
            simulation.scheduler.cancel(request)
        else:
            asked.append((request, min(deadline_s, 50.0)))
    simulation.run(100.0)
    at_s = {answer.request: answer.at_s for answer in simulation.answers}
    assert [at_s[request] for request, _ in asked] == [deadline_s for _, deadline_s in asked]


@pytest.mark.parametrize(
    "deadline_s",
    [
        pytest.param("5", id="text"),
        pytest.param(math.nan, id="nan"),
        pytest.param(math.inf, id="infinite"),
        pytest.param(10**400, id="too large"),
        pytest.param([1.0], id="list"),
    ],
)
def test_a_deadline_that_is_no_number_is_refused_before_it_counts(deadline_s: Any) -> None:
    """It is the caller's fault, and takes no place in the queue that nobody would give back."""
    simulation = simulated('export flow f = trt("net.onnx", batch=1)')
    scheduler, entrance = simulation.scheduler, simulation.scheduler.entrances["f"]
    values = deque(["one", "two"])
    with pytest.raises(BadRequest, match="a finite number of seconds"):
        simulation.submit("f", "one", deadline_s)
    with pytest.raises(BadRequest, match="a finite number of seconds"):
        scheduler.submit_many(entrance, values, simulation, deadline_s)
    assert len(values) == 2
    assert scheduler.outstanding == 0
    assert scheduler.next_expiry_s() is None
