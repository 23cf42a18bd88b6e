"""Plan and physical plan as text.

Layer 2. The text is for people and for golden files: the same program always gives the same text.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import Diagnostic, Span
from flowlang.plan import graph
from flowlang.plan.check import Plan
from flowlang.plan.expression import Expression
from flowlang.plan.graph import FlowPlan, Live, Node, Parameter
from flowlang.plan.ops import OPS, Param
from flowlang.plan.rewrite import rewrite
from flowlang.plan.schedule import NORMAL, PRIORITIES
from flowlang.plan.values import seconds, shown, written
from flowlang.syntax.wording import one_line

if TYPE_CHECKING:  # what is not needed to explain a plan is not loaded for it
    from flowlang.plan.physical import PhysicalPlan, StagePlan, Steps


def explain_plan(plan: Plan) -> str:
    """Every flow as its operators, with the type each gives, conversions marked with `+`."""
    out = []
    for flow in plan.flows:
        out += [_headline(flow), *_operators(rewrite(flow)), ""]
    out += _params(plan)
    out += [_remark(hint) for hint in plan.hints]
    return "\n".join(out).rstrip() + "\n"


def explain_physical(physical: PhysicalPlan) -> str:
    """Every flow as the stages it walks through, with batches, instances and devices."""
    out = []
    for program in physical.programs:
        out.append(_headline(program.plan))
        names = {0: "%0"} | {
            slot: f"%{parameter.name}" for slot, parameter in enumerate(program.plan.parameters, 1)
        }
        out += _steps(program.steps, physical, names, itertools.count(1), "  ")
        slo = f"  slo {seconds(program.slo_s)}" if program.slo_s else ""
        word = next(word for word, rank in PRIORITIES.items() if rank == program.priority)
        priority = f"  priority {word}" if word != NORMAL else ""
        out += [f"  queue {program.queue}{slo}{priority}", ""]
    for stage in physical.stages:
        out += [*_stage(stage), ""]
    out += _params(*physical.plans)
    hints = [hint for plan in physical.plans for hint in plan.hints]
    out += [_remark(hint) for hint in (*hints, *physical.remarks)]
    return "\n".join(out).rstrip() + "\n"


def _steps(
    steps: Steps,
    physical: PhysicalPlan,
    names: dict[int, str],
    numbers: Iterator[int],
    indent: str,
) -> Iterable[str]:
    """The units of a graph, those of its bodies below each control node."""
    for unit in steps.units:
        names[unit.output] = f"%{next(numbers)}"
        what = node_text(unit.node)
        if unit.stage is not None:
            stage = physical.stages[unit.stage]
            what = f"stage {stage.index + 1} {stage.name}"
        inputs = " ".join(names[i] for i in unit.inputs)
        yield f"{indent}{names[unit.output]} = {what}{f'  of {inputs}' if inputs else ''}"
        for label, body in zip(body_labels(unit.node), unit.bodies, strict=True):
            item = f"%{next(numbers)}"
            inner = {0: item} | {slot: names[unit.inputs[i]] for slot, i in body.captures}
            yield f"{indent}  {label} {item}"
            yield from _steps(body, physical, inner, numbers, indent + "    ")
            yield f"{indent}    gives {inner[body.result]}"


def body_labels(node: Node) -> list[str]:
    """How the bodies of a control node are called, in order."""
    if node.op == graph.MAP:
        return ["each"]
    if node.op == graph.FALLBACK:
        return ["try", *["else"] * (len(node.bodies) - 1)]
    if node.op != graph.ROUTE:
        return []
    cases: dict[int, list[str]] = {}
    for value, number in node.params["cases"].items():
        cases.setdefault(number, []).append(written(value))
    return [
        f"when {' | '.join(cases[i])}" if i in cases else "else" for i in range(len(node.bodies))
    ]


def _headline(flow: FlowPlan) -> str:
    parameters = ", ".join(map(_parameter, flow.parameters))
    name = f"{flow.name}({parameters})" if parameters else flow.name
    left = f"flow {name}: {flow.input.type} -> {flow.output.type}"
    return f"{left:<56} {_place(flow.span)}"


def _parameter(given: Parameter) -> str:
    if given.default is None:
        return f"{given.name}: {given.type}"
    is_literal = given.default.op == graph.LITERAL
    text = node_text(given.default) if is_literal else one_line(given.default.span)
    return f"{given.name}: {given.type} = {text}"


def _place(span: Span) -> str:
    return f"{os.path.basename(span.source.name)}:{span.line}"


def _operators(flow: FlowPlan) -> Iterable[str]:
    names = {id(flow.input): "%0"} | {id(p.node): f"%{p.name}" for p in flow.parameters}
    yield from _graph(flow.input, flow.output, names, itertools.count(1), "  ")


def _graph(
    item: Node, output: Node, names: dict[int, str], numbers: Iterator[int], indent: str
) -> Iterable[str]:
    """The nodes of a graph with their types, those of its bodies below each control node."""
    previous = item
    for node in graph.topological(output):
        if id(node) in names:
            continue
        names[id(node)] = f"%{next(numbers)}"
        mark = "+" if node.op in (graph.PACK, graph.WIDEN) else " "
        is_next = node.inputs[:1] == (previous,)
        others = node.inputs[1:] if is_next else node.inputs
        sources = f"  of {' '.join(names[id(i)] for i in node.inputs)}" if others else ""
        left = f"{indent}{names[id(node)]:<3}{mark} {node_text(node)}{sources}"
        yield f"{left:<56} {node.type}"
        for label, body in zip(body_labels(node), node.bodies, strict=True):
            arriving = f"%{next(numbers)}"
            inner = names | {id(body.item): arriving}
            inner |= {id(n): names[id(node.inputs[i])] for n, i in body.captures}
            yield f"{f'{indent}  {label} {arriving}':<56} {body.item.type}"
            yield from _graph(body.item, body.output, inner, numbers, indent + "    ")
            yield f"{f'{indent}    gives {inner[id(body.output)]}':<56} {body.output.type}"
        previous = node


def _stage(stage: StagePlan) -> Iterable[str]:
    from flowlang.plan.chain import decodes_on_gpu

    low, best, most = stage.batch
    batch = f"{low}..{most}" if best == most else f"{low}..{best}..{most}"
    head = f"stage {stage.index + 1} {stage.name}"
    timeout = f"  timeout {seconds(stage.timeout_s)}" if stage.timeout_s else ""
    yield (
        f"{head:<28} {stage.place} x{stage.instances}  batch {batch}"
        f"  wait {seconds(stage.wait_s)}{timeout}"
    )
    if stage.region:
        runs = "DALI" if stage.device == "gpu" and decodes_on_gpu(stage.region) else "OpenCV"
        yield f"  region  {_chain(stage.region)}  ({runs})"
    model = next((n for n in stage.nodes if n.model is not None), None)
    if model is not None:
        runs = "ONNX Runtime, fp32" if stage.device == "cpu" else "TensorRT, from device memory"
        yield f"  model   {node_text(model)}  ({runs})"
    if stage.tail:
        yield f"  host    {_chain(stage.tail)}"
    if stage.nodes[0].op == graph.PYTHON:
        node = stage.nodes[0]
        yield f"  python  {node_text(node)}  ({node.params[graph.FUNCTION].path.name})"


def _chain(nodes: Iterable[Node]) -> str:
    text = ""
    for node in nodes:
        joint = " +" if node.op == graph.PACK else " -> "
        text = f"{text}{joint}{node_text(node)}" if text else node_text(node)
    return text


def node_text(node: Node) -> str:
    """A node as it is written, its arguments filled in."""
    if node.op == graph.RECORD:
        return "{ " + ", ".join(node.params["names"]) + " }"
    if node.op == graph.FIELD:
        return f".{node.params['name']}"
    if node.op == graph.LITERAL:
        return written(node.params["value"])
    if node.op in (graph.BINARY, graph.UNARY):
        return str(node.params["operator"])
    if node.op == graph.WIDEN:
        return "widen"
    if node.op == graph.LIST:
        return "[ ]"
    if node.op == graph.ROUTE:
        is_if = [value is True for value in node.params["cases"]] == [True]  # which 1 equals
        return "if" if is_if else "match"
    if node.op == graph.FALLBACK:
        return "??"
    if node.op == graph.SELECT:
        return "filter"
    if node.op == graph.PACK:
        parts = [node.params["layout"], node.params["dtype"]]
        parts += [f"{n}={_value(node.params[n])}" for n in ("mean", "std") if node.params[n]]
        return f"pack({', '.join(parts)})"
    if node.op == graph.CUT_OUT:
        return "crop(upright)" if node.params["upright"] else "crop"
    if node.op == graph.PYTHON:
        return _python_text(node)
    op = OPS.get(node.op)
    if op is None:
        return node.op
    parts = [
        _argument(node, p)
        for p in op.params
        if node.params.get(p.name) is not None and node.params[p.name] != p.default
    ]
    return f"{op.name}({', '.join(parts)})" if parts else op.name


def _python_text(node: Node) -> str:
    function = node.params[graph.FUNCTION]
    given = {n: v for n, v in node.params.items() if n in node.param_spans}
    parts = [
        f"{n}={_span_text(node, n) if isinstance(v, Live) else written(v)}"
        for n, v in given.items()
    ]
    return f"{function.shown}({', '.join(parts)})" if parts else str(function.shown)


def _argument(node: Node, param: Param) -> str:
    value = node.params[param.name]
    if param.kind == "flag":
        return param.name
    if isinstance(value, Live):
        text = _span_text(node, param.name)
    else:
        text = written(value) if param.kind == "str" else _value(value)
    return f"{param.name}={text}" if param.is_named else text


def _span_text(node: Node, name: str) -> str:
    """An argument that comes with the request, as it is written."""
    return one_line(node.param_spans[name])


def _value(value: Any) -> str:
    if isinstance(value, Path):
        return written(value.name)
    if isinstance(value, list):
        return f"<{len(value)} names>"
    if isinstance(value, Expression):
        return " ".join(value.text.split())
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{v:g}" for v in value) + "]"
    return str(value)


def _params(*plans: Plan) -> list[str]:
    params = [param for plan in plans for param in plan.params]
    rows = [f"param {p.name} = {shown(p.value)}  ({p.origin})" for p in params]
    rows = list(dict.fromkeys(rows))  # a file that two of them use has its own once
    return [*rows, ""] if rows else []


def _remark(hint: Diagnostic) -> str:
    return f"{hint.severity}[{hint.slug}]: {hint.message} ({_place(hint.span)})"
