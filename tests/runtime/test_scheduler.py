"""The scheduler on virtual time: every request is answered once, whatever happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InternalError,
    Overloaded,
    StageFailed,
)
from flowlang.runtime.scheduler import Scheduler
from flowlang.runtime.walk import Ended, Walk, Work, arrive
from tests.runtime.scenarios import (
    FEW,
    UNIT_S,
    Scenario,
    finish_early,
    plan,
    play,
    scenarios,
    simulated,
    start,
)
from tests.simulation import expected


@FEW
@given(scenarios())
def test_every_request_is_answered_once_and_with_its_own_answer(scenario: Scenario) -> None:
    """An answer is what the flow makes of the item, or an error that had its occasion."""
    course = play(scenario)
    counted = Counter(a.request for a in course.simulation.answers)
    assert counted == Counter(dict.fromkeys(course.accepted, 1))
    for request, outcome in course.outcomes().items():
        call, program = course.accepted[request], request.entrance.program
        if not isinstance(outcome, Exception):
            assert outcome == expected(program, course.plan.stages, request.token)
        elif isinstance(outcome, StageFailed):
            assert call.faulty_stage is not None or course.lost
        elif isinstance(outcome, Cancelled):
            assert call.patience is not None
        else:
            assert isinstance(outcome, DeadlineExceeded)
            times = [call.deadline, program.slo_s, *(s.timeout_s for s in course.plan.stages)]
            assert any(t is not None for t in times)


@settings(max_examples=400)
@given(scenarios(closing=True))
def test_nothing_is_left_over_when_the_app_closes(scenario: Scenario) -> None:
    """At whatever moment it drains and closes, every request taken in is answered exactly once."""
    course = start(scenario)
    assert scenario.drain_at is not None
    finish_early(course, scenario.drain_at * UNIT_S, scenario.grace * UNIT_S)
    scheduler = course.simulation.scheduler
    assert Counter(a.request for a in course.simulation.answers) == Counter(
        dict.fromkeys(course.accepted, 1)
    )
    course.simulation.run()
    assert len(course.simulation.answers) == len(course.accepted)
    assert scheduler.outstanding == 0
    assert all(e.under_way == 0 for e in scheduler.entrances.values())
    assert all(not s.rung and not s.idle and not s.batcher.waiting for s in scheduler.stages)
    refused_s = scenario.drain_at * UNIT_S
    late = [r for r in course.accepted if r.arrived_s > refused_s]
    assert not late


@FEW
@given(scenarios(troubles=False, timeout=False), st.integers(0, 100))
def test_draining_answers_what_was_accepted(scenario: Scenario, drain_at: int) -> None:
    """With time enough, draining refuses newcomers and gives all others their results."""
    course = start(scenario)
    simulation = course.simulation
    simulation.run(drain_at * UNIT_S)
    is_empty = simulation.scheduler.drain(0.0)
    assert is_empty == (simulation.scheduler.outstanding == 0)
    accepted = len(course.accepted)
    simulation.run()
    assert len(course.accepted) == accepted
    assert simulation.scheduler.drain(0.0)
    for request, outcome in course.outcomes().items():
        assert outcome == expected(request.entrance.program, course.plan.stages, request.token)
    assert all(isinstance(e, Overloaded | Draining) for e in course.refused)


def test_what_waits_behind_lost_instances_is_answered() -> None:
    """Where a stage has no instance left, its queue is answered; where it has one, it goes on."""
    for instances, failures in ((1, 4), (2, 1)):
        simulation = simulated(f'export flow f = trt("net.onnx", batch=1) x{instances}')
        lost = iter([2.0])
        simulation.lose = lambda stage, items, lost=lost: next(lost, None)  # type: ignore[misc]
        for at_s in (0.0, 0.001, 0.002, 1.0, 3.0):
            simulation.at(at_s, partial(simulation.submit, "f"))
        simulation.run()
        outcomes = [a.outcome for a in simulation.answers]
        assert len(outcomes) == 5
        assert sum(isinstance(o, StageFailed) for o in outcomes) == failures
        assert all(a.at_s - a.request.arrived_s < 0.2 for a in simulation.answers)


def test_a_request_that_fails_as_nobody_expects_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes no other along, keeps no place in the queue, and is in the log."""

    def broken(walk: Walk, unit: int, outcome: Any) -> Iterator[Work | Ended]:
        yield from arrive(walk, unit, outcome)
        if walk.request.token == "bad":
            raise RecursionError("too deep")

    monkeypatch.setattr("flowlang.runtime.scheduler.arrive", broken)
    text = 'flow net = trt("net.onnx", batch=1..4)\nexport flow f = net -> { a: net, b: softmax }'
    simulation = simulated(text)
    entrance = simulation.scheduler.entrances["f"]
    asked = [
        simulation.scheduler.submit(entrance, np.ones(4), simulation, token)
        for token in ("good", "bad", "good")
    ]
    simulation.work = lambda stage, item: item.value
    simulation.run()
    good, bad, other = (request.outcome for request in asked)
    assert good.keys() == other.keys() == {"a", "b"}
    assert isinstance(bad, StageFailed)
    assert "RecursionError: too deep" in str(bad)
    assert simulation.scheduler.outstanding == 0
    assert "a request failed as nobody expected" in caplog.text


def test_a_take_after_the_end_is_told_so() -> None:
    """An instance that asks just after the close has its bell rung instead of waiting for ever."""
    scheduler = Scheduler(plan('export flow f = trt("net.onnx") x1'), lambda: 0.0)
    rings: list[int] = []
    scheduler.close()
    items, due_s = scheduler.take(scheduler.stages[0], lambda: rings.append(1))
    assert (items, due_s, rings) == ([], None, [1])


def test_a_batch_must_come_back_whole() -> None:
    """Outcomes that do not match their items are a fault of flowlang, and said to be."""
    simulation = simulated('export flow f = trt("net.onnx", batch=4) x1')
    simulation.submit("f")
    scheduler = simulation.scheduler
    items, _ = scheduler.take(scheduler.stages[0])
    with pytest.raises(InternalError, match="1 items went into a batch, 2 came out"):
        scheduler.finish(items, [1, 2])


def test_a_failing_batch_gives_every_request_an_error_of_its_own() -> None:
    """Errors are raised in many threads, so no two requests share one; each names the stage."""
    simulation = simulated('flow net = trt("net.onnx", batch=4) x1\nexport flow f = net')
    simulation.lose = lambda stage, items: 1.0
    for _ in range(9):
        simulation.submit("f")
    simulation.run(0.9)
    outcomes = [a.outcome for a in simulation.answers]
    assert len({id(o) for o in outcomes}) == 9
    assert {(type(o), o.stage) for o in outcomes} == {(StageFailed, "net")}
