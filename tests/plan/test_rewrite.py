"""Rewrites of plans: each keeps what a flow takes and gives, and done twice is done once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowlang.diagnostics import InternalError, Source
from flowlang.plan import graph
from flowlang.plan.check import check_source, compile_source
from flowlang.plan.graph import FlowPlan, Node, check_legal
from flowlang.plan.rewrite import PASSES, levels_of, rewrite
from flowlang.plan.types import BYTES, STR

pytestmark = pytest.mark.usefixtures("folder")

GOLDEN = Path(__file__).parents[1] / "golden"
PROGRAMS = {file.stem: file.read_text("utf-8") for file in sorted(GOLDEN.glob("*.flow"))}
EACH_PROGRAM = pytest.mark.parametrize("name", PROGRAMS)
HEAD = "decode -> resize(224) -> rgb"


def flows(text: str) -> tuple[FlowPlan, ...]:
    return compile_source(Source("app.flow", text)).flows


def sketch(plan: FlowPlan) -> list[str]:
    """A plan as text: operators with their params, inputs by number, and types."""
    nodes = plan.nodes()
    numbers = {id(node): number for number, node in enumerate(nodes)}
    return [
        f"{n.op} {dict(sorted(n.params.items()))} {[numbers[id(i)] for i in n.inputs]} {n.type}"
        for n in nodes
    ]


def ops(plan: FlowPlan) -> list[str]:
    return [n.op for n in plan.nodes()]


@EACH_PROGRAM
def test_rewriting_keeps_what_a_flow_takes_and_gives(name: str) -> None:
    """Input and output types are those the checker found."""
    for flow in flows(PROGRAMS[name]):
        after = rewrite(flow)
        assert (after.input.type, after.output.type) == (flow.input.type, flow.output.type)


@EACH_PROGRAM
@pytest.mark.parametrize("rule", dict.fromkeys(PASSES), ids=lambda rule: rule.__name__)
def test_each_pass_done_twice_is_done_once(name: str, rule: Callable[[FlowPlan], FlowPlan]) -> None:
    """A pass finds nothing left to do in what it made, and leaves its argument alone."""
    for flow in flows(PROGRAMS[name]):
        before = sketch(flow)
        once = check_legal(flow, rule(flow), rule.__name__)
        assert sketch(rule(once)) == sketch(once)
        assert sketch(flow) == before


@EACH_PROGRAM
def test_all_passes_done_twice_are_done_once(name: str) -> None:
    """A rewritten plan is rewritten to itself."""
    for flow in flows(PROGRAMS[name]):
        after = rewrite(flow)
        assert sketch(rewrite(after)) == sketch(after)


STAGES = st.sampled_from(
    [
        "decode", "resize(224)", "resize(h=20, w=30)", "resize(64, fit=shorter)", "crop(16)",
        "rgb", "bgr", "gray", "normalize(imagenet)", "normalize(unit)", "pass", "softmax",
        "best", ".label",
        'trt("resnet50.onnx")', 'trt("gray.onnx")', 'trt("vector.onnx")', "resize(28)",
        'trt("resnet50.onnx", mean=1, std=2)', "net", ".a", "{ a: pass, b: gray }",
        "{ a: rgb, ... }", "{ a: net -> best, b: net }",
    ]
)  # fmt: skip


@settings(
    max_examples=400,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(STAGES, min_size=1, max_size=8))
def test_whatever_checks_is_rewritten_legally(stages: list[str]) -> None:
    """Any pipeline that checks is rewritten without a change of types, and only once."""
    text = f"flow net = {HEAD[10:]} -> trt('resnet50.onnx')".replace("'", '"')
    text += f"\nexport flow main = {HEAD} -> {' -> '.join(stages)}"
    plan, _ = check_source(Source("app.flow", text))
    if plan is not None:
        after = rewrite(plan.flows[0])
        assert after.output.type == plan.flows[0].output.type
        assert sketch(rewrite(after)) == sketch(after)


def test_a_pass_that_changes_a_type_is_our_bug() -> None:
    """The legality check stops a rewrite that alters what a flow gives or takes."""
    flow = flows("decode -> rgb")[0]
    other = replace(flow, output=replace(flow.output, type=STR))
    with pytest.raises(InternalError, match="changed what flow `main` takes or gives"):
        check_legal(flow, other, "spoil_output")
    other = replace(flow, input=replace(flow.input, type=STR))
    with pytest.raises(InternalError, match="spoil_input changed"):
        check_legal(flow, other, "spoil_input")


def test_a_second_input_is_our_bug() -> None:
    """A flow has one item, so a rewrite that brings in another is stopped."""
    flow = flows("decode -> rgb")[0]
    stray = Node(graph.INPUT, {}, (), BYTES, flow.span, flow.input.site)
    decode = flow.nodes()[1]
    other = replace(flow, output=flow.output.with_inputs((decode.with_inputs((stray,)),)))
    with pytest.raises(InternalError, match="an input from elsewhere"):
        check_legal(flow, other, "forget_input")


def test_pass_goes_where_something_else_is_left() -> None:
    """`pass` is dropped; a flow that is nothing else keeps one, to have a stage to run."""
    assert ops(rewrite(flows("decode -> pass -> rgb -> pass")[0])) == ["input", "decode", "rgb"]
    assert ops(rewrite(flows("pass -> pass -> pass")[0])) == ["input", "pass"]


def test_a_field_of_a_record_just_made_is_the_value_itself() -> None:
    """Neither the record nor the field is left, nor the work of fields nobody takes."""
    after = rewrite(flows("decode -> { a: rgb, b: gray } -> .b -> resize(8)")[0])
    assert ops(after) == ["input", "decode", "gray", "resize"]


def test_equal_work_is_done_once_and_models_stay_apart() -> None:
    """Two branches share what they do alike; two models that were written stay two."""
    model = 'trt("resnet50.onnx")'
    text = f"decode -> {{ a: resize(224) -> rgb -> {model}, b: resize(224) -> rgb -> {model} }}"
    after = ops(rewrite(flows(text)[0]))
    assert [after.count(op) for op in ("decode", "resize", "rgb", "pack", "trt")] == [1, 1, 1, 1, 2]


def test_a_flow_mentioned_twice_on_one_item_runs_once() -> None:
    """Two mentions of a flow on the same item give one result."""
    text = (
        f'flow net = trt("resnet50.onnx")\nexport flow f = {HEAD} -> {{ a: net, b: net -> best }}'
    )
    assert ops(rewrite(flows(text)[0])).count("trt") == 1


def test_normalizing_is_folded_into_packing() -> None:
    """`normalize` before a model, and `mean` and `std` of a model, are done while packing."""
    texts = [
        f'{HEAD} -> normalize(mean=[1, 2, 3], std=4) -> trt("resnet50.onnx")',
        f'{HEAD} -> trt("resnet50.onnx", mean=[1, 2, 3], std=4)',
    ]
    for text in texts:
        pack = next(n for n in rewrite(flows(text)[0]).nodes() if n.op == graph.PACK)
        assert (pack.params["mean"], pack.params["std"]) == ((1.0, 2.0, 3.0), (4.0, 4.0, 4.0))
        assert pack.inputs[0].op == "rgb"


def test_normalizing_stays_where_its_result_is_wanted() -> None:
    """An image that is given out normalized is normalized as such."""
    text = f'{HEAD} -> normalize(unit) -> {{ seen: pass, score: trt("resnet50.onnx") }}'
    assert sorted(ops(rewrite(flows(text)[0]))) == [
        "decode", "input", "normalize", "pack", "record", "resize", "rgb", "trt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "mean", "std"),
    [
        ("rgb -> normalize(imagenet)", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("bgr -> normalize(imagenet)", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),
        ("gray -> normalize(imagenet)", (117.037605,), (57.530325,)),
        ("gray -> normalize(unit)", (0.0,), (255.0,)),
        ("rgb -> normalize(signed)", (127.5,) * 3, (127.5,) * 3),
        ("bgr -> normalize(mean=[1, 2, 3], std=5)", (1.0, 2.0, 3.0), (5.0, 5.0, 5.0)),
    ],
)
def test_levels_follow_the_channels_of_the_image(
    stages: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """A preset is given in red, green, blue and turned to the image's order; numbers are not."""
    found = levels_of(flows(f"decode -> {stages}")[0].output)
    assert found[0] == pytest.approx(mean)
    assert found[1] == pytest.approx(std)
