"""A discrete-event simulation of lanes: the real scheduler, a virtual clock, given service times.

Simulated lanes and the simulated watch follow flowlang/runtime/stage.py step by step, so that what
holds here of order, waiting and counting holds of the threads there.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from examples import models
from flowlang.diagnostics import RequestError, Source, StageFailed
from flowlang.plan import graph
from flowlang.plan.check import compile_source
from flowlang.plan.expression import compute
from flowlang.plan.physical import (
    FlowProgram,
    Machine,
    PhysicalPlan,
    StagePlan,
    Steps,
    Unit,
    lower,
)
from flowlang.plan.types import Record
from flowlang.runtime.batcher import Item
from flowlang.runtime.entrance import Stage
from flowlang.runtime.request import Request
from flowlang.runtime.scheduler import Scheduler

RETRY_S = 0.1  # between attempts to replace a lost instance


def write_models(folder: Path) -> Path:
    """The small models that the flows of these tests name."""
    models.identity(folder / "net.onnx", ("N", 4))
    models.identity(folder / "four.onnx", (4, 4))
    models.two_heads(folder / "heads.onnx", size=8)
    models.two_inputs(folder / "pair.onnx", size=8)
    return folder


@cache
def models_folder() -> Path:
    """A folder with the models, for what hypothesis makes up where no fixture reaches."""
    made = TemporaryDirectory()
    atexit.register(made.cleanup)
    return write_models(Path(made.name))


def plan_of(text: str, folder: Path, cores: int = 8) -> PhysicalPlan:
    """The physical plan of a flow's text, as if it stood in a file of `folder`."""
    return lower([compile_source(Source(str(folder / "test.flow"), text))], Machine(cores))


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it was taken."""

    stage: int
    lane: Lane
    items: tuple[Item, ...]
    start_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was delivered."""

    request: Request
    outcome: Any
    at_s: float


class Simulation:
    """A scheduler at work on virtual time.

    `service_s` gives the seconds a batch takes, `work` the outcome of an item. `lose` may give
    the seconds until a batch's instance, lost with it, is replaced. `wake_s` is how long an
    instance takes to hear its bell.
    """

    def __init__(
        self,
        plan: PhysicalPlan,
        service_s: Callable[[StagePlan, Sequence[Item]], float],
        work: Callable[[StagePlan, Item], Any] | None = None,
        lose: Callable[[StagePlan, Sequence[Item]], float | None] = lambda stage, items: None,
        wake_s: float = 0.0,
    ) -> None:
        self.clock = Clock()
        self.scheduler = Scheduler(plan, self.clock)
        self.scheduler.on_expiry = self._look
        self.service_s, self.lose, self.wake_s = service_s, lose, wake_s
        self.work = work or (lambda stage, item: trace(stage, item.value))
        self.batches: list[Batch] = []
        self.answers: list[Answer] = []
        self.queued: list[dict[Item, None]] = [{} for _ in plan.stages]  # in order of arrival
        self.on_event: Callable[[], object] = lambda: None
        self.on_rest: Callable[[], object] = lambda: None  # nothing more happens at this instant
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._alarm_s = math.inf
        self.lanes = [
            Lane(self, stage)
            for stage in self.scheduler.stages
            for _ in range(stage.plan.instances)
        ]
        for lane in self.lanes:
            self.at(0.0, lane.ask)

    def settle(self, request: Request) -> None:
        """The simulation is the reply of its requests."""
        self.answers.append(Answer(request, request.outcome, self.clock.now_s))

    def submit(
        self, flow: str, value: Any = None, deadline_s: float | None = None, priority: int = 0
    ) -> Request:
        entrance = self.scheduler.entrances[flow]
        return self.scheduler.submit(entrance, value, self, None, deadline_s, priority)

    def at(self, when_s: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), action))

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        self.at(self.clock.now_s + delay_s, action)

    def run(self, until_s: float = math.inf) -> None:
        """Let everything happen that happens until then."""
        while True:
            event_s = self._events[0][0] if self._events else math.inf
            following_s = min(event_s, self._alarm_s)
            if following_s > self.clock.now_s:
                self.on_rest()
            if following_s > until_s or following_s == math.inf:
                return
            self.clock.now_s = following_s
            if self._alarm_s <= event_s:
                self.scheduler.expire()
                self._look()
            else:
                heapq.heappop(self._events)[2]()
            self._notice()
            self.on_event()

    def _look(self) -> None:
        when_s = self.scheduler.next_expiry_s()
        self._alarm_s = math.inf if when_s is None else max(when_s, self.clock.now_s)

    def _notice(self) -> None:
        for stage, queued in zip(self.scheduler.stages, self.queued, strict=True):
            queued.update(dict.fromkeys(stage.batcher.waiting))


class Lane:
    """An instance and its thread, as `flowlang.runtime.stage.Lane` runs them."""

    def __init__(self, simulation: Simulation, stage: Stage) -> None:
        self.simulation = simulation
        self.scheduler = simulation.scheduler
        self.stage = stage
        self.items: list[Item] = []
        self._nap = 0

    def ring(self) -> None:
        self.simulation.after(self.simulation.wake_s, self._arrive)

    def _arrive(self) -> None:
        self._nap += 1
        self.scheduler.arrived(self.stage, self.ring)
        self.ask()

    def ask(self) -> None:
        if self.scheduler.is_closed:
            return
        self._nap += 1
        items, due_s = self.scheduler.take(self.stage, self.ring)
        now_s = self.simulation.clock.now_s
        if not items:
            if due_s is not None:
                nap = self._nap
                self.simulation.at(max(due_s, now_s), lambda: self._tire(nap))
            return
        self.items = items
        self.simulation.batches.append(Batch(self.stage.plan.index, self, tuple(items), now_s))
        self.simulation.after(self.simulation.service_s(self.stage.plan, items), self._finish)

    def _tire(self, nap: int) -> None:
        """The patience of a nap is over; where the bell has been rung by now, it will be heard."""
        if nap == self._nap and self.scheduler.leave(self.stage, self.ring):
            self.ask()

    def _finish(self) -> None:
        simulation, plan, items = self.simulation, self.stage.plan, self.items
        repair_s = simulation.lose(plan, items)
        if repair_s is None:
            self.scheduler.finish(items, [simulation.work(plan, item) for item in items])
            self.items = []
            simulation.after(0.0, self.ask)
            return
        told = "an instance was lost"
        self.scheduler.finish(items, [StageFailed(told, stage=plan.name) for _ in items])
        self.items = []
        self.scheduler.lose_instance(self.stage)
        self._repair(simulation.clock.now_s + repair_s)

    def _repair(self, until_s: float) -> None:
        if self.scheduler.is_closed:
            return
        if self.simulation.clock.now_s < until_s:
            self.scheduler.fail_if_lost(self.stage, "an instance was lost")
            self.simulation.after(RETRY_S, lambda: self._repair(until_s))
            return
        self.scheduler.regain_instance(self.stage)
        self.ask()


def trace(stage: StagePlan, value: Any) -> Any:
    """The outcome of a simulated stage: what it was called and what it got."""
    kind = stage.nodes[-1].type
    if isinstance(kind, Record):
        return {name: (stage.index, name, value) for name, _ in kind.fields}
    return (stage.index, value)


def expected(program: FlowProgram, stages: Sequence[StagePlan], item: Any) -> Any:
    """What a flow of traced stages answers, unit after unit, with nothing scheduled."""
    return interpret(program.steps, lambda unit, value: trace(stages[unit.stage or 0], value), item)


def interpret(
    steps: Steps, work: Callable[[Unit, Any], Any], item: Any, around: Sequence[Any] = ()
) -> Any:
    """What steps make of an item, by plain recursion. Raises RequestError where they fail."""
    slots = {0: item} | {slot: around[source] for slot, source in steps.captures}
    for unit in steps.units:
        values = [slots[s] for s in unit.inputs]
        if unit.stage is not None:
            value = work(unit, values[0] if len(values) == 1 else tuple(values))
            if isinstance(value, RequestError):
                raise value
            slots[unit.output] = value
        else:
            slots[unit.output] = _control(unit, work, values)
    return slots[steps.result]


def _control(unit: Unit, work: Callable[[Unit, Any], Any], values: list[Any]) -> Any:
    params = unit.node.params
    if unit.node.op == graph.MAP:
        if len(values[0]) > params["max"]:
            raise StageFailed("too many")
        found = []
        for element in values[0]:
            try:
                found.append(interpret(unit.bodies[0], work, element, values))
            except RequestError:
                if params["on_error"] == "fail":
                    raise
                if params["on_error"] == "null":
                    found.append(None)
        return found
    if unit.node.op == graph.ROUTE:
        chosen = params["cases"].get(values[1], params["otherwise"])
        return interpret(unit.bodies[chosen], work, values[0], values)
    if unit.node.op == graph.FALLBACK:
        for number, body in enumerate(unit.bodies, 1):
            is_last = number == len(unit.bodies)
            try:
                value = interpret(body, work, values[0], values)
            except RequestError:
                if is_last:
                    raise
                continue
            if value is not None or is_last or not params["skips_null"]:
                return value
    try:
        return compute(unit.node, values)
    except Exception as error:
        raise StageFailed(str(error)) from error
