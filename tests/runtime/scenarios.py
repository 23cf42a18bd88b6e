"""Scenarios on virtual time: flows, what is asked of them, how long all takes, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from flowlang.diagnostics import RequestError
from flowlang.plan.physical import PhysicalPlan, StagePlan
from flowlang.runtime.batcher import Item
from flowlang.runtime.entrance import Stage
from flowlang.runtime.request import Request
from tests.simulation import Batch, Simulation, models_folder, plan_of

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


@cache
def plan(text: str) -> PhysicalPlan:
    return plan_of(text, models_folder(), cores=3)


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


FEW = settings(max_examples=150)


def waiting(stage: Stage) -> list[Item]:
    return [i for i in stage.batcher.waiting if not i.request.is_answered and not i.is_settled]


def simulated(text: str, t0_s: float = 0.004, a_s: float = 0.001) -> Simulation:
    return Simulation(plan(text), lambda stage, items: t0_s + a_s * len(items))
