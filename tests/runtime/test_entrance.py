"""Entrances on virtual time: who is let in, who waits in front, and who comes first."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowlang.diagnostics import BadRequest, Draining, Overloaded
from flowlang.plan.physical import StagePlan
from flowlang.runtime.entrance import Entrance
from flowlang.runtime.request import Request
from tests.runtime.scenarios import (
    FEW,
    SHAPES,
    UNIT_S,
    Scenario,
    plan,
    scenarios,
    simulated,
    start,
    waiting,
)
from tests.simulation import Simulation, expected


def stages_of(entrance: Entrance) -> list[StagePlan]:
    used = set(entrance.program.steps.stages())
    stages = plan(entrance.program.plan.span.source.text).stages
    return [s for s in stages if s.index in used]


def room(entrance: Entrance) -> int:
    """How many items the instances of a flow's stages can take in one go."""
    return sum(s.instances * s.batch[2] for s in stages_of(entrance))


def most_inside(entrance: Entrance) -> int:
    """How many requests may be unanswered: those that wait, and those that are worked on."""
    at_work = (s.instances * (s.batch[2] if s.model else 1) for s in stages_of(entrance))
    return entrance.program.queue + sum(at_work)


@FEW
@given(scenarios())
def test_the_counters_of_an_entrance_tell_what_is_inside(scenario: Scenario) -> None:
    """Accepted and unanswered requests are counted exactly, and all counts return to nothing."""
    course = start(scenario)
    simulation, scheduler = course.simulation, course.simulation.scheduler

    def check() -> None:
        for name, entrance in scheduler.entrances.items():
            assert entrance.outstanding == course.unanswered(name) <= entrance.limit
            backlog = sum(1 for r in entrance.backlog if not r.is_answered)
            assert entrance.under_way + backlog == entrance.outstanding
            width = 2 * room(entrance)
            if len(entrance.program.steps.units) > 1 and width:
                assert entrance.under_way <= width
                assert not backlog or entrance.under_way == width
            else:
                assert not backlog

    simulation.on_event = check
    simulation.run()
    assert scheduler.outstanding == 0
    for stage in scheduler.stages:
        assert (stage.rung, stage.lost, waiting(stage)) == (set(), 0, [])
        assert len(stage.idle) == stage.plan.instances


@FEW
@given(scenarios())
def test_a_request_is_refused_exactly_when_its_queue_is_full(scenario: Scenario) -> None:
    """Overloaded is raised at once where as many are unanswered as may be, and only there."""
    course = start(scenario)
    scheduler = course.simulation.scheduler
    submit = scheduler.submit

    def watched(entrance: Any, *rest: Any) -> Request:
        inside = course.unanswered(entrance.program.name)
        try:
            request = submit(entrance, *rest)
        except Overloaded:
            assert inside == most_inside(entrance)
            raise
        assert inside < most_inside(entrance)
        return request

    scheduler.submit = watched  # type: ignore[method-assign, assignment]
    course.simulation.run()
    assert all(type(error) is Overloaded for error in course.refused)
    assert len(course.refused) + len(course.accepted) == len(scenario.calls)


RANKED = st.lists(
    st.tuples(st.sampled_from("fg"), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40
)


@FEW
@given(RANKED, st.sampled_from(["high", "normal", "low"]), st.booleans())
def test_nobody_is_overtaken_by_a_higher_rank(
    asked: list[tuple[str, int, int]], priority: str, is_walk: bool
) -> None:
    """Queues are in order of rank and then of arrival, those in front of full stages too."""
    last = "softmax" if is_walk else "pass"
    simulation = simulated(f"""
        flow net = trt("net.onnx", batch=1..2) x1
        export flow f = net -> {last}
        export flow g = net
        schedule {{ g(priority={priority}) }}""")
    stage = simulation.scheduler.stages[0]
    ranks = {"high": 1, "normal": 2, "low": 3}
    at_s, wanted = 0.0, {}
    for flow, number, gap in asked:
        at_s += gap * UNIT_S

        def ask(flow: str = flow, number: int = number) -> None:
            request = simulation.submit(flow, priority=number)
            wanted[request] = number or (2 if flow == "f" else ranks[priority])

        simulation.at(at_s, ask)

    def check() -> None:
        queue = [(item.rank, item.arrived_s) for item in stage.batcher.waiting]
        assert queue == sorted(queue)
        for entrance in simulation.scheduler.entrances.values():
            backlog = [(request.rank, request.arrived_s) for request in entrance.backlog]
            assert backlog == sorted(backlog)

    simulation.on_event = check
    simulation.run()
    assert {r: r.rank for r in wanted} == wanted
    assert len(simulation.answers) == len(asked)


def test_the_one_flow_is_served_before_the_other() -> None:
    """Of flows that share a stage, the requests of the one with the higher priority come first."""
    simulation = simulated("""
        flow net = trt("net.onnx", batch=1..1) x1
        export flow f = net
        export flow g = net
        schedule { f(priority=low) g(priority=high) }""")
    asked = [simulation.submit(flow) for flow in "ffgfg"]  # before any is taken
    simulation.run()
    places = [asked.index(answer.request) for answer in simulation.answers]
    assert places == [2, 4, 0, 1, 3]


@pytest.mark.parametrize(
    ("flow", "at_work"),
    [
        ("pass", 1),
        ("softmax", 1),
        ("decode x2", 2),
        ('trt("net.onnx", batch=1..1) x2', 2),
        ('trt("net.onnx", batch=1..8) x2', 16),
    ],
)
def test_a_full_queue_is_what_waits(flow: str, at_work: int) -> None:
    """Besides those that wait, as many are let in as can be worked on at the same time."""
    simulation = simulated(f"export flow f = {flow}\nschedule {{ f(queue=3) }}")
    entrance = simulation.scheduler.entrances["f"]
    assert entrance.limit == 3 + at_work
    simulation.scheduler.submit_many(entrance, deque(["picture"] * 200), simulation)
    with pytest.raises(Overloaded):
        simulation.scheduler.submit(entrance, "picture", simulation)


def test_a_backlog_lets_the_first_in_first() -> None:
    """Requests that wait in front of full stages are let in by their priority too."""
    text = """
        flow net = trt("net.onnx", batch=1..1) x1
        flow again = trt("net.onnx", batch=1..1) x1
        export flow f = net -> again"""
    simulation = simulated(text)
    width = simulation.scheduler.entrances["f"].width
    asked = [simulation.submit("f") for _ in range(width + 2)]
    urgent = simulation.submit("f", priority=1)
    simulation.run()
    answered = [answer.request for answer in simulation.answers]
    assert answered.index(asked[0]) < answered.index(urgent) < answered.index(asked[width])
    assert [request for request in answered if request is not urgent] == asked


def test_nobody_pays_for_a_priority_that_is_not_used() -> None:
    """Queues are plain ones until a request brings a priority, or flows of two share a stage."""
    for setting in ("", "schedule { f(priority=low) }"):
        simulation = simulated(f'export flow f = trt("net.onnx")\n{setting}')
        stage = simulation.scheduler.stages[0]
        simulation.submit("f")
        assert not stage.batcher.is_ranked
        simulation.submit("f", priority=2)
        assert stage.batcher.is_ranked


def test_cancelled_requests_do_not_pile_up_at_an_entrance() -> None:
    """Behind one that waits in front of full stages, those given up are let go of."""
    simulation = simulated(SHAPES["chain"].format("batch=1", 1, "batch=1", 1))
    simulation.service_s = lambda stage, items: 1e6
    entrance = simulation.scheduler.entrances["f"]
    for _ in range(entrance.width + 1):
        simulation.submit("f")
    for _ in range(5000):
        simulation.scheduler.cancel(simulation.submit("f"))
    assert len(entrance.backlog) <= 2 * entrance.limit + 1


def test_a_backlog_of_requests_that_need_no_stage_empties_at_once() -> None:
    """Thousands that end as soon as they are let in, behind one: each makes room for the next."""
    simulation = simulated("""
        flow net = trt("net.onnx", batch=1) x1
        export flow f: list<tensor<f32, 4>> -> { a: list<tensor<f32, 4>>, b: list<tensor<f32, 4>> }
          = { a: map(net, max=2), b: pass }
        schedule { f(queue=5000) }""")
    width = simulation.scheduler.entrances["f"].width
    inside = [simulation.submit("f", [0, 1]) for _ in range(width)]
    behind = [simulation.submit("f", [0, 1, 2]) for _ in range(5000 - width)]
    simulation.run()
    assert all(isinstance(request.outcome, dict) for request in inside)
    assert all(isinstance(request.outcome, BadRequest) for request in behind)
    assert simulation.scheduler.outstanding == 0


def test_a_backlog_of_answered_requests_does_not_grow() -> None:
    """Requests that expire behind a stuck stage leave the backlog as others join it."""
    text = SHAPES["chain"].format("batch=1", 1, "batch=1", 1)
    simulation = Simulation(plan(text), lambda stage, items: 1e6)
    for number in range(500):
        simulation.at(number * 0.01, lambda: simulation.submit("f", deadline_s=0.005))
    simulation.run(50.0)
    entrance = simulation.scheduler.entrances["f"]
    assert len(simulation.answers) == 500
    assert (
        len(entrance.backlog) + sum(len(s.batcher.waiting) for s in simulation.scheduler.stages)
        < 10
    )


@pytest.mark.parametrize("deadline_s", [None, 64 * UNIT_S])
@pytest.mark.parametrize("shape", ["one stage", "chain"])
def test_of_many_at_once_as_many_are_taken_in_as_have_room(
    shape: str, deadline_s: float | None
) -> None:
    """What finds the queue full is left with whoever asked; the rest are as if sent one by one."""
    text = SHAPES[shape].format("batch=1..4", 2, "batch=1..2", 1)
    simulation = simulated(f"{text}\nschedule {{ f(queue=6) }}")
    scheduler, entrance = simulation.scheduler, simulation.scheduler.entrances["f"]
    values = deque(f"picture {i}" for i in range(entrance.limit + 3))
    given = list(values)
    requests = scheduler.submit_many(entrance, values, simulation, deadline_s)
    assert list(values) == given[-3:]
    assert scheduler.submit_many(entrance, values, simulation) == []
    simulation.run()
    assert {id(a.request) for a in simulation.answers} == {id(r) for r in requests}
    stages = [stage.plan for stage in scheduler.stages]
    for request, value in zip(requests, given, strict=False):
        assert request.outcome == expected(entrance.program, stages, value)
    assert len(scheduler.submit_many(entrance, values, simulation)) == 3
    simulation.run()
    scheduler.drain(0.0)
    values.append("late")
    with pytest.raises(Draining):
        scheduler.submit_many(entrance, values, simulation)
