"""Control flow on virtual time: lists, branches and fallbacks answer as plain recursion would."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import DeadlineExceeded, RequestError, StageFailed
from flowlang.plan.physical import PhysicalPlan, StagePlan
from flowlang.runtime.batcher import Item
from tests.simulation import Simulation, interpret, models_folder, plan_of, trace

NETS = """
    flow first = trt("net.onnx", batch=1..3) x2
    flow second = trt("net.onnx", batch=1..2{0}) x1
    """
ELEMENT = "{ k: int, x: tensor<f32, 4> }"
FLOWS = {
    "map": f"export flow f: list<{ELEMENT}> -> list<tensor<f32, 4>> = map(.x -> first -> second)",
    "map drop": f"""export flow f: list<{ELEMENT}> -> list<tensor<f32, 4>> =
      map(.x -> first -> second, on_error=drop)""",
    "map null": f"""export flow f: list<{ELEMENT}> -> list<tensor<f32, 4>?> =
      map(.x -> first, on_error=null)""",
    "map max": f"""export flow f: list<{ELEMENT}> -> list<tensor<f32, 4>> =
      map(.x -> first, max=3)""",
    "nested": f"""export flow f: list<list<{ELEMENT}>> -> list<list<tensor<f32, 4>>> =
      map(map(.x -> first -> second, on_error=drop))""",
    "route": f"""export flow f: list<{ELEMENT}> -> list<tensor<f32, 4>> =
      map(if .k > 4 then (.x -> first) else (.x -> second -> first), on_error=drop)""",
    "match": f"""export flow f: list<{ELEMENT}> -> list<{{ k: int, v: tensor<f32, 4>? }}> =
      map(match .k {{ 1 | 2 => {{ k: .k, v: .x -> first }}, 3 => {{ k: .k * 2 }},
        else => {{ k: 0 - .k, v: .x }} }})""",
    "fallback": f"""export flow f: list<{ELEMENT}> -> list<tensor<f32, 4>> =
      map(.x -> (first ?? second ?? pass))""",
    "fallback fails": f"""export flow f: {ELEMENT} -> tensor<f32, 4> =
      .x -> ((first -> second) ?? (second -> first))""",
    "null": f"""export flow f: list<{ELEMENT}> -> list<int> =
      map(if .k > 4 then {{ a: .k }} else {{ b: .x }}) -> map(.a ?? 7)""",
    "captures": f"""export flow f: list<{ELEMENT}> -> list<{{ n: int, v: tensor<f32, 4> }}> {{
      let all = in -> filter(.k > 1)
      let net = all -> map(.x -> first)
      return all -> map(if .k > 3 then {{ n: .k, v: .x -> second }} else {{ n: 0, v: .x }})
    }}""",
    "division": f"""export flow f: list<{ELEMENT}> -> list<float> =
      map(12 / (.k - 2), on_error=drop)""",
    "filter": f"""export flow f: list<{ELEMENT}> -> list<int> =
      filter(.k >= 2 and not (.k == 4)) -> top(2, by=.k) -> map(.k)""",
    "list": f"""export flow f: {ELEMENT} -> list<tensor<f32, 4>> =
      [(.x -> first), (.x -> second), .x]""",
}


@cache
def plan(name: str, settings: str = "") -> PhysicalPlan:
    return plan_of(NETS.format(settings) + FLOWS[name], models_folder())


def luck(*parts: object) -> int:
    """A number that the same parts always give."""
    return zlib.crc32(repr(parts).encode())


def does(stage: StagePlan, value: Any, one_in: int) -> Any:
    """What a stage makes of a value: host operators work, models are traced and fail at times."""
    if stage.model is None:
        from flowlang.runtime.host import work_of

        for node in stage.nodes:
            value = work_of(node, {})(value)
        return value
    if one_in and luck(stage.index, value) % one_in == 0:
        return StageFailed("bad luck", stage=stage.name)
    return trace(stage, value)


ELEMENTS = st.fixed_dictionaries({"k": st.integers(0, 6), "x": st.integers(0, 99)})


def items_of(name: str) -> st.SearchStrategy[Any]:
    if name == "nested":
        return st.lists(st.lists(ELEMENTS, max_size=4), max_size=4)
    return ELEMENTS if name in ("fallback fails", "list") else st.lists(ELEMENTS, max_size=6)


@pytest.mark.parametrize("name", FLOWS)
@settings(max_examples=25)
@given(data=st.data())
def test_control_flow_answers_as_recursion_does(name: str, data: st.DataObject) -> None:
    """Whatever fails and however batches form, each request gets what plain recursion gives."""
    physical = plan(name)
    one_in = data.draw(st.sampled_from([0, 2, 3, 5]))
    items = data.draw(st.lists(items_of(name), min_size=1, max_size=5))
    pace = data.draw(st.integers(0, 3))
    simulation = Simulation(
        physical,
        lambda stage, batch: (1 + luck(stage.index, len(batch)) % 3) * pace / 8,
        lambda stage, item: does(stage, item.value, one_in),
    )
    for number, item in enumerate(items):
        simulation.at(number / 16, lambda item=item: simulation.submit("f", item))  # type: ignore[misc]
    simulation.run()
    assert len(simulation.answers) == len(items)
    got = {id(answer.request): answer.outcome for answer in simulation.answers}
    assert len(got) == len(items)
    program = physical.programs[0]
    wanted = []
    for item in items:
        try:
            wanted.append(
                interpret(
                    program.steps,
                    lambda unit, value: does(physical.stages[unit.stage or 0], value, one_in),
                    item,
                )
            )
        except RequestError:
            wanted.append(RequestError)
    told = [RequestError if isinstance(o, RequestError) else o for o in got.values()]
    assert sorted(map(repr, told)) == sorted(map(repr, wanted))
    assert simulation.scheduler.outstanding == 0
    assert not any(stage.batcher.waiting for stage in simulation.scheduler.stages if one_in == 0)


def test_elements_of_all_requests_share_batches() -> None:
    """What two requests map over the same stage meets in its batches."""
    simulation = Simulation(plan("map drop"), lambda stage, items: 1.0)
    for _ in range(2):
        simulation.at(0.0, lambda: simulation.submit("f", [{"k": 1, "x": 1}] * 3))
    simulation.run()
    owners = [{id(i.request) for i in batch.items} for batch in simulation.batches]
    assert max(len(batch.items) for batch in simulation.batches) > 1
    assert any(len(o) == 2 for o in owners)


def test_a_missed_timeout_falls_back() -> None:
    """`big ?? small`: where the first misses its timeout the second answers, at that moment."""
    slow = plan_of(
        """flow big = trt("net.onnx", timeout=50ms) x1
        flow small = trt("net.onnx") x1
        export flow f = big ?? small""",
        models_folder(),
    )

    def service_s(stage: StagePlan, items: Any) -> float:
        return 1.0 if stage.name == "big" else 0.01

    simulation = Simulation(slow, service_s)
    simulation.at(0.0, lambda: simulation.submit("f", 1))
    simulation.run()
    (answer,) = simulation.answers
    assert answer.outcome == (1, 1)
    assert answer.at_s == pytest.approx(0.06)


def test_a_deadline_ends_a_request_whatever_it_falls_back_to() -> None:
    """The deadline of a request is not a failure that `??` could mend."""
    simulation = Simulation(plan("fallback fails"), lambda stage, items: 1.0)
    simulation.at(0.0, lambda: simulation.submit("f", {"k": 1, "x": 1}, deadline_s=0.5))
    simulation.run()
    (answer,) = simulation.answers
    assert isinstance(answer.outcome, DeadlineExceeded)
    assert answer.at_s == 0.5


def test_work_given_up_by_a_fallback_leaves_the_queues() -> None:
    """Elements that wait for a map which has failed are never worked on."""
    worked: list[Any] = []

    def work(stage: StagePlan, item: Item) -> Any:
        worked.append(item.value)
        return StageFailed("no") if item.value == 0 else trace(stage, item.value)

    simulation = Simulation(plan("map"), lambda stage, items: 1.0, work)
    simulation.at(0.0, lambda: simulation.submit("f", [{"k": 1, "x": x} for x in range(100)]))
    simulation.run()
    (answer,) = simulation.answers
    assert isinstance(answer.outcome, StageFailed)
    assert len(worked) < 10


def test_a_list_longer_than_max_fails_its_request_alone() -> None:
    """A hundred thousand elements are refused with the numbers and the place, and cost nothing."""
    simulation = Simulation(plan("map max"), lambda stage, items: 1.0)
    simulation.at(0.0, lambda: simulation.submit("f", [{"k": 1, "x": 1}] * 100_000))
    simulation.at(0.0, lambda: simulation.submit("f", [{"k": 1, "x": 1}]))
    simulation.run()
    failed, done = (a.outcome for a in simulation.answers)
    assert "a list of 100,000 elements, and `max` is 3" in str(failed)
    assert "test.flow:" in str(failed)
    assert done == [(0, 1)]
