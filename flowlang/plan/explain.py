"""Plan and physical plan as text.

Layer 2. The text is for people and for golden files: the same program always gives the same text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowlang.diagnostics import Diagnostic, Span
from flowlang.plan import graph
from flowlang.plan.check import Plan
from flowlang.plan.graph import FlowPlan, Node
from flowlang.plan.ops import OPS, Param
from flowlang.plan.physical import PhysicalPlan, StagePlan, decodes_on_gpu
from flowlang.plan.rewrite import rewrite
from flowlang.plan.values import seconds, shown


def explain_plan(plan: Plan) -> str:
    """Every flow as its operators, with the type each gives, conversions marked with `+`."""
    out = []
    for flow in plan.flows:
        out += [_headline(flow), *_operators(rewrite(flow)), ""]
    out += _params(plan)
    out += [_remark(hint) for hint in plan.hints]
    return "\n".join(out).rstrip() + "\n"


def explain_physical(plan: Plan, physical: PhysicalPlan) -> str:
    """Every flow as the stages it walks through, with batches, instances and devices."""
    out = []
    for program in physical.programs:
        out.append(_headline(program.plan))
        for unit in program.units:
            if unit.stage is None:
                inputs = " ".join(f"%{i}" for i in unit.inputs)
                out.append(f"  %{unit.output} = {_node_text(unit.node)}  of {inputs}")
                continue
            stage = physical.stages[unit.stage]
            inputs = " ".join(f"%{i}" for i in unit.inputs)
            out.append(f"  %{unit.output} = stage {stage.index + 1} {stage.name}  of {inputs}")
        slo = f"  slo {seconds(program.slo_s)}" if program.slo_s else ""
        out += [f"  queue {program.queue}{slo}", ""]
    for stage in physical.stages:
        out += [*_stage(stage), ""]
    out += _params(plan)
    out += [_remark(hint) for hint in (*plan.hints, *physical.remarks)]
    return "\n".join(out).rstrip() + "\n"


def _headline(flow: FlowPlan) -> str:
    left = f"flow {flow.name}: {flow.input.type} -> {flow.output.type}"
    return f"{left:<56} {_place(flow.span)}"


def _place(span: Span) -> str:
    return f"{os.path.basename(span.source.name)}:{span.line}"


def _operators(flow: FlowPlan) -> Iterable[str]:
    order = [n for n in flow.nodes() if n is not flow.input]
    numbers = {id(n): i for i, n in enumerate(order, 1)}
    previous = flow.input
    for node in order:
        mark = "+" if node.op == graph.PACK else " "
        sources = (
            ""
            if node.inputs == (previous,)
            else "  of " + " ".join(f"%{numbers.get(id(i), 0)}" for i in node.inputs)
        )
        left = f"  %{numbers[id(node)]:<2}{mark} {_node_text(node)}{sources}"
        yield f"{left:<56} {node.type}"
        previous = node


def _stage(stage: StagePlan) -> Iterable[str]:
    low, best, most = stage.batch
    batch = f"{low}..{most}" if best == most else f"{low}..{best}..{most}"
    head = f"stage {stage.index + 1} {stage.name}"
    timeout = f"  timeout {seconds(stage.timeout_s)}" if stage.timeout_s else ""
    yield (
        f"{head:<28} {_device(stage)} x{stage.instances}  batch {batch}"
        f"  wait {seconds(stage.wait_s)}{timeout}"
    )
    if stage.region:
        runs = "DALI" if stage.device == "gpu" and decodes_on_gpu(stage.region) else "OpenCV"
        yield f"  region  {_chain(stage.region)}  ({runs})"
    model = next((n for n in stage.nodes if n.model is not None), None)
    if model is not None:
        runs = "ONNX Runtime, fp32" if stage.device == "cpu" else "TensorRT, from device memory"
        yield f"  model   {_node_text(model)}  ({runs})"
    if stage.tail:
        yield f"  host    {_chain(stage.tail)}"


def _device(stage: StagePlan) -> str:
    used = sorted(set(stage.gpus))
    if not used:
        return stage.device
    return f"gpu:{used[0]}" if len(used) == 1 else f"gpu:{used[0]}..{used[-1]}"


def _chain(nodes: Iterable[Node]) -> str:
    text = ""
    for node in nodes:
        joint = " +" if node.op == graph.PACK else " -> "
        text = f"{text}{joint}{_node_text(node)}" if text else _node_text(node)
    return text


def _node_text(node: Node) -> str:
    if node.op == graph.RECORD:
        return "{ " + ", ".join(node.params["names"]) + " }"
    if node.op == graph.FIELD:
        return f".{node.params['name']}"
    if node.op == graph.PACK:
        parts = [node.params["layout"], node.params["dtype"]]
        parts += [f"{n}={_value(node.params[n])}" for n in ("mean", "std") if node.params[n]]
        return f"pack({', '.join(parts)})"
    op = OPS.get(node.op)
    if op is None:
        return node.op
    parts = [
        _argument(p, node.params[p.name])
        for p in op.params
        if node.params[p.name] is not None and node.params[p.name] != p.default
    ]
    return f"{op.name}({', '.join(parts)})" if parts else op.name


def _argument(param: Param, value: Any) -> str:
    if param.kind == "flag":
        return param.name
    text = _value(value)
    return f"{param.name}={text}" if param.is_named else text


def _value(value: Any) -> str:
    if isinstance(value, Path):
        return f'"{value.name}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{v:g}" for v in value) + "]"
    return str(value)


def _params(plan: Plan) -> list[str]:
    rows = [f"param {p.name} = {shown(p.value)}  ({p.origin})" for p in plan.params]
    return [*rows, ""] if rows else []


def _remark(hint: Diagnostic) -> str:
    return f"{hint.severity}[{hint.slug}]: {hint.message} ({_place(hint.span)})"
