"""The typed plan: what the flows of a program compute, as a graph of operators.

Layer 2. Nodes are immutable and shared; one graph a flow, from its input to its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flowlang.diagnostics import InternalError, Span
from flowlang.plan.onnx import Model
from flowlang.plan.types import Type

# Nodes the checker makes itself; every other `op` is a row of the operator table.
INPUT, RECORD, FIELD, PACK = "input", "record", "field", "pack"
GLUE = frozenset({RECORD, FIELD})


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operator is written: the flow, and the place.

    Nodes of one site are one physical thing, however often its flow is mentioned.
    """

    flow: str
    span: Span


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """An operator at work on the results of its inputs.

    `params` are final values; `param_spans` tell where each was written.
    """

    op: str
    params: Mapping[str, Any]
    inputs: tuple[Node, ...]
    type: Type
    span: Span
    site: Site
    param_spans: Mapping[str, Span] = field(default_factory=dict)
    model: Model | None = None

    def with_inputs(self, inputs: tuple[Node, ...]) -> Node:
        return self if inputs == self.inputs else replace(self, inputs=inputs)


@dataclass(frozen=True, slots=True)
class FlowPlan:
    """One flow: its input node, its output node, and how it was declared."""

    name: str
    input: Node
    output: Node
    span: Span
    doc: str | None = None
    is_exported: bool = False

    def nodes(self) -> list[Node]:
        """Every node on the way to the output, inputs before those that use them."""
        return topological(self.output)


def topological(output: Node) -> list[Node]:
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, Iterator[Node]]] = [(output, iter(output.inputs))]
    seen.add(id(output))
    while stack:
        node, inputs = stack[-1]
        following = next((n for n in inputs if id(n) not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(id(following))
            stack.append((following, iter(following.inputs)))
    return order


def rebuild(plan: FlowPlan, change: Callable[[Node], Node]) -> FlowPlan:
    """The plan with each node replaced by `change(node)`, its inputs already replaced."""
    new: dict[int, Node] = {}
    for node in plan.nodes():
        moved = node.with_inputs(tuple(new[id(i)] for i in node.inputs))
        new[id(node)] = change(moved)
    return replace(plan, input=new.get(id(plan.input), plan.input), output=new[id(plan.output)])


def consumers(plan: FlowPlan) -> dict[int, list[Node]]:
    """By `id` of a node, the nodes that use its result."""
    uses: dict[int, list[Node]] = {id(plan.input): []}
    for node in plan.nodes():
        uses.setdefault(id(node), [])
        for source in node.inputs:
            uses[id(source)].append(node)
    return uses


def check_legal(before: FlowPlan, after: FlowPlan, name: str) -> FlowPlan:
    """The plan `after` the rewrite `name`, if it is one. Raises InternalError if it is not."""
    order = after.nodes()
    if after.output.type != before.output.type or after.input.type != before.input.type:
        raise InternalError(f"{name} changed what flow `{before.name}` takes or gives")
    inputs = [n for n in order if n.op == INPUT]
    if any(n is not after.input for n in inputs):
        raise InternalError(f"{name} left flow `{before.name}` with a second input")
    done: set[int] = set()
    for node in order:
        if any(id(i) not in done for i in node.inputs):
            raise InternalError(f"{name} put `{node.op}` before its input in `{before.name}`")
        done.add(id(node))
    return after
