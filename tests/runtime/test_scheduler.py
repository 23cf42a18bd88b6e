"""The scheduler on virtual time: nothing is lost, waits for nothing, or is counted twice."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Draining,
    InternalError,
    Overloaded,
    RequestError,
    StageFailed,
)
from flowlang.plan.physical import PhysicalPlan, StagePlan
from flowlang.runtime.batcher import Item
from flowlang.runtime.entrance import Entrance, Stage
from flowlang.runtime.request import Request
from flowlang.runtime.scheduler import Scheduler
from flowlang.runtime.walk import Ended, Walk, Work, arrive
from tests.simulation import Batch, Simulation, expected, plan_of, write_models

UNIT_S = 1 / 1024  # all made-up times are multiples of it, so that sums of them are exact
IMAGE = "resize(8) -> rgb -> normalize(imagenet)"
SHAPES = {
    "one stage": 'export flow f = trt("net.onnx", {0}) x{1}',
    "fixed batch": 'export flow f = trt("four.onnx") x{1} -> softmax',
    "image operators": f"export flow f = decode -> {{{{ a: {IMAGE}, b: gray }}}}",
    "chain": """
        flow first = trt("net.onnx", {0}) x{1}
        flow second = trt("net.onnx", {2}) x{3}
        export flow f = first -> second -> top(2)""",
    "diamond": """
        flow first = trt("net.onnx", {0}) x{1}
        flow second = trt("net.onnx", {2}) x{3}
        export flow f = first -> {{ a: second -> second, b: first, c: pass }}""",
    "fan-out": """
        flow first = trt("net.onnx", {0}) x{1}
        flow second = trt("net.onnx", {2}) x{3}
        export flow f = first -> {{ a: second, b: first, c: softmax -> second, d: pass }}""",
    "shared": """
        flow first = trt("net.onnx", {0}) x{1}
        flow second = trt("net.onnx", {2}) x{3}
        export flow f = first -> second
        export flow g = second -> {{ a: first -> best, b: first }}""",
    "two outputs": f"""
        flow heads = trt("heads.onnx", {{0}}) x{{1}}
        export flow f = decode -> {IMAGE}
          -> {{{{ all: heads, best: heads -> .scores -> best }}}}""",
    "two inputs": f"""
        export flow f: {{{{ image: bytes, features: tensor<f32, 8> }}}} -> tensor<f32, 10> =
          {{{{ image: .image -> decode -> {IMAGE}, features: .features }}}}
          -> trt("pair.onnx", {{0}}) x{{1}}""",
    "glue alone": """
        export flow f: {{ image: int, features: int }} -> {{ a: int, b: int }} =
          {{ a: .features, b: .image }}""",
    "nothing": "export flow f: int -> int {{ return in }}",
}
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES)


@cache
def folder() -> TemporaryDirectory[str]:
    made = TemporaryDirectory()
    write_models(Path(made.name))
    return made


@cache
def plan(text: str) -> PhysicalPlan:
    return plan_of(text, Path(folder().name), cores=3)


@pytest.fixture(scope="module", autouse=True)
def _models() -> Any:
    yield
    plan.cache_clear()
    folder().cleanup()
    folder.cache_clear()


@dataclass(frozen=True, slots=True)
class Call:
    """A request to be made; times in units."""

    gap: int
    flow: int
    deadline: int | None
    patience: int | None
    faulty_stage: int | None


@dataclass(frozen=True, slots=True)
class Scenario:
    """A program, what is asked of it, and how long everything takes."""

    text: str
    calls: tuple[Call, ...]
    service: tuple[int, int]
    wake: int = 0
    losses: tuple[int, ...] = ()
    drain_at: int | None = None
    grace: int = 0


def _optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), strategy)


@cache
def calls(timeout: bool, troubles: bool) -> st.SearchStrategy[list[Call]]:
    call = st.builds(
        Call,
        st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3, 8, 40]),
        st.integers(0, 1),
        _optional(st.integers(0, 40)) if timeout else st.none(),
        _optional(st.integers(0, 40)) if troubles else st.none(),
        _optional(st.integers(0, 3)) if troubles else st.none(),
    )
    return st.one_of(
        st.lists(call, min_size=1, max_size=8), st.lists(call, min_size=30, max_size=60)
    )


@st.composite
def stage_settings(draw: st.DrawFn, wait: bool, timeout: bool) -> str:
    low = draw(st.sampled_from([1, 1, 2, 3]))
    given = [f"batch={low}..{low + draw(st.sampled_from([0, 0, 1, 4]))}"]
    if wait and draw(st.booleans()):
        given.append(f"wait={draw(st.integers(1, 8))}ms")
    if timeout and draw(st.booleans()):
        given.append(f"timeout={draw(st.integers(4, 40))}ms")
    return ", ".join(given)


@st.composite
def scenarios(
    draw: st.DrawFn, *, wait: bool = True, timeout: bool = True, troubles: bool = True,
    closing: bool = False,
) -> Scenario:  # fmt: skip
    settings_of = stage_settings(wait, timeout)
    text = draw(st.sampled_from(list(SHAPES.values()))).format(
        draw(settings_of), draw(st.integers(1, 3)), draw(settings_of), draw(st.integers(1, 3))
    )
    # A queue longer than the stages are wide is where a backlog forms.
    entrance = [f"queue={draw(st.sampled_from([1, 3, 30]))}"] if draw(st.booleans()) else []
    entrance += [f"slo={draw(st.integers(5, 60))}ms"] if timeout and draw(st.booleans()) else []
    if entrance:
        text += f"\nschedule {{ f({', '.join(entrance)}) }}"
    return Scenario(
        text,
        tuple(draw(calls(timeout, troubles))),
        (draw(st.integers(0, 12)), draw(st.integers(0, 3))),
        draw(st.sampled_from([0, 0, 1])) if troubles else 0,
        tuple(draw(st.lists(st.integers(0, 10), max_size=3))) if troubles else (),
        draw(st.integers(0, 150)) if closing else None,
        draw(st.integers(0, 20)),
    )


@dataclass(slots=True)
class Course:
    """How a scenario went."""

    scenario: Scenario
    plan: PhysicalPlan
    simulation: Simulation
    accepted: dict[Request, Call] = field(default_factory=dict)
    refused: list[RequestError] = field(default_factory=list)
    lost: list[Item] = field(default_factory=list)

    def outcomes(self) -> dict[Request, Any]:
        return {a.request: a.outcome for a in self.simulation.answers}

    def end_s(self, batch: Batch) -> float:
        t0, a = self.scenario.service
        return batch.start_s + (t0 + a * len(batch.items)) * UNIT_S

    def unanswered(self, flow: str) -> int:
        of_flow = [r for r in self.accepted if r.entrance.program.name == flow]
        return sum(1 for r in of_flow if not r.is_answered)


def start(scenario: Scenario) -> Course:
    """A simulation with all calls of a scenario ahead of it."""
    physical = plan(scenario.text)
    t0, a = scenario.service
    losses = iter(range(10**6))
    course: Course

    def lose(stage: StagePlan, items: Sequence[Item]) -> float | None:
        if next(losses) not in scenario.losses:
            return None
        course.lost += items
        return 0.25

    def work(stage: StagePlan, item: Item) -> Any:
        if course.accepted[item.request].faulty_stage == stage.index:
            return ValueError("a faulty item")
        return default(stage, item)

    simulation = Simulation(
        physical,
        lambda stage, items: (t0 + a * len(items)) * UNIT_S,
        lose=lose,
        wake_s=scenario.wake * UNIT_S,
    )
    default, simulation.work = simulation.work, work
    course = Course(scenario, physical, simulation)
    at = 0
    for call in scenario.calls:
        at += call.gap
        simulation.at(at * UNIT_S, lambda call=call: ask(course, call))  # type: ignore[misc]
    return course


def ask(course: Course, call: Call) -> None:
    simulation = course.simulation
    names = sorted(simulation.scheduler.entrances)
    deadline_s = None if call.deadline is None else call.deadline * UNIT_S
    entrance = simulation.scheduler.entrances[names[call.flow % len(names)]]
    number = len(course.accepted)
    value = {"image": number, "features": -number}
    # Told to `accepted` first: a flow without stages answers before `submit` returns.
    try:
        request = simulation.scheduler.submit(entrance, value, simulation, value, deadline_s)
    except RequestError as error:
        course.refused.append(error)
        return
    course.accepted[request] = call
    if call.patience is not None:
        simulation.after(call.patience * UNIT_S, lambda: simulation.scheduler.cancel(request))


def play(scenario: Scenario) -> Course:
    """A scenario from its first call until nothing moves any more."""
    course = start(scenario)
    simulation = course.simulation
    if scenario.drain_at is not None:
        finish_early(course, scenario.drain_at * UNIT_S, scenario.grace * UNIT_S)
    simulation.run()
    return course


def finish_early(course: Course, drain_s: float, grace_s: float) -> None:
    """Drain, close and abandon, in the steps of `flowlang.app.App.close`."""
    simulation = course.simulation
    simulation.run(drain_s)
    simulation.clock.now_s = max(simulation.clock.now_s, drain_s)
    if not simulation.scheduler.drain(0.0):
        simulation.run(drain_s + grace_s)
    simulation.scheduler.close()
    simulation.run(simulation.clock.now_s + 3 * UNIT_S)
    simulation.scheduler.abandon([i for lane in simulation.lanes for i in lane.items])


FEW = settings(max_examples=150, deadline=None)


@FEW
@given(scenarios())
def test_every_request_is_answered_once_and_with_its_own_answer(scenario: Scenario) -> None:
    """An answer is what the flow makes of the item, or an error that had its occasion."""
    course = play(scenario)
    counted = Counter(a.request for a in course.simulation.answers)
    assert counted == Counter(dict.fromkeys(course.accepted, 1))
    lost = {i.request for i in course.lost}
    waited_for_lost = bool(lost)
    for request, outcome in course.outcomes().items():
        call, program = course.accepted[request], request.entrance.program
        if not isinstance(outcome, Exception):
            assert outcome == expected(program, course.plan.stages, request.token)
        elif isinstance(outcome, StageFailed):
            assert call.faulty_stage is not None or waited_for_lost
        elif isinstance(outcome, Cancelled):
            assert call.patience is not None
        else:
            assert isinstance(outcome, DeadlineExceeded)
            times = [call.deadline, program.slo_s, *(s.timeout_s for s in course.plan.stages)]
            assert any(t is not None for t in times)


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


def waiting(stage: Stage) -> list[Item]:
    return [i for i in stage.batcher.waiting if not i.request.is_answered and not i.is_settled]


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


@settings(max_examples=400, deadline=None)
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


def simulated(text: str, t0_s: float = 0.004, a_s: float = 0.001) -> Simulation:
    return Simulation(plan(text), lambda stage, items: t0_s + a_s * len(items))


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


def test_a_wait_holds_a_batch_back_until_it_is_due_or_complete() -> None:
    """With wait=8ms a batch starts when its oldest item is 8 ms old, or when it is complete."""
    simulation = simulated('export flow f = trt("net.onnx", batch=1..3, wait=8ms) x2')
    for at_s in (1.0, 1.005, 2.0, 2.001, 2.002, 2.003):
        simulation.at(at_s, lambda: simulation.submit("f"))
    simulation.run()
    started = [(len(b.items), b.start_s) for b in simulation.batches]
    assert started == [(2, 1.008), (3, 2.002), (1, pytest.approx(2.011))]


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
    assert all(isinstance(request.outcome, StageFailed) for request in behind)
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
    simulation.scheduler.close()
    outcomes = [a.outcome for a in simulation.answers]
    assert len({id(o) for o in outcomes}) == 9


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
