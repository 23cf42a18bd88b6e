"""The typed plan: what the flows of a program compute, as a graph of operators.

Layer 2. Nodes are immutable and shared; one graph a flow, from its input to its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flowlang.diagnostics import InternalError, Span
from flowlang.plan.onnx import Model
from flowlang.plan.types import Optional, Type

# Nodes the checker makes itself; every other `op` is a row of the operator table.
INPUT, PACK, CUT_OUT, SELECT, PYTHON = "input", "pack", "crop_box", "select", "python"
RECORD, FIELD, LIST, LITERAL, UNARY, BINARY, WIDEN = (
    "record", "field", "list", "literal", "unary", "binary", "widen",
)  # fmt: skip
MAP, ROUTE, FALLBACK = "map", "route", "fallback"
FUNCTION = "def"  # the param of a Python operator that has its function: no argument has this name
GLUE = frozenset(
    {RECORD, FIELD, LIST, LITERAL, UNARY, BINARY, WIDEN}
)  # see flowlang.plan.expression


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operator is written: the flow with its arguments, and the place.

    Nodes of one site are one physical thing, however often its flow is mentioned.
    """

    flow: str
    span: Span
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def place(self) -> tuple[str, Span]:
        """What settings are kept under: they are the same whatever the arguments."""
        return (self.flow, self.span)


@dataclass(frozen=True, slots=True)
class Live:
    """A parameter's value that each request brings: the input at `index` of its node has it."""

    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """An operator at work on the results of its inputs.

    The first input is the item; the others are values it needs besides. `params` are final values,
    or Live; `param_spans` tell where each was written. `bodies` are what a control node runs.
    """

    op: str
    params: Mapping[str, Any]
    inputs: tuple[Node, ...]
    type: Type
    span: Span
    site: Site
    param_spans: Mapping[str, Span] = field(default_factory=dict)
    model: Model | None = None
    bodies: tuple[Body, ...] = ()

    def with_inputs(self, inputs: tuple[Node, ...]) -> Node:
        return self if inputs == self.inputs else replace(self, inputs=inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A part of a flow that runs by itself: for each element, or only where it is chosen.

    It is a graph of its own, from `item`; of the values around it, it sees those it uses, as
    `captures`: the node inside, and which input of the control node gives its value.
    """

    item: Node
    captures: tuple[tuple[Node, int], ...]
    output: Node


@dataclass(frozen=True, slots=True)
class Parameter:
    """A value that a request brings besides its item. `default` is None where it must bring it."""

    node: Node
    name: str
    type: Type
    default: Node | None = None

    @property
    def is_required(self) -> bool:
        return self.default is None and not isinstance(self.type, Optional)


@dataclass(frozen=True, slots=True)
class FlowPlan:
    """One flow: its input node, its output node, and how it was declared."""

    name: str
    input: Node
    output: Node
    span: Span
    doc: str | None = None
    is_exported: bool = False
    parameters: tuple[Parameter, ...] = ()

    def nodes(self) -> list[Node]:
        """Every node on the way to the output, inputs before those that use them."""
        return topological(self.output)

    def levels(self) -> Iterator[Node]:
        """The output of the flow's own graph, then that of each body in it, however deep."""
        stack = [self.output]
        while stack:
            output = stack.pop(0)
            yield output
            stack += [b.output for node in topological(output) for b in node.bodies]

    def all_nodes(self) -> Iterator[Node]:
        """Every node, those inside bodies too."""
        for output in self.levels():
            yield from topological(output)


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
    new = _rebuilt(plan.output, change)
    parameters = tuple(replace(p, node=new.get(id(p.node), p.node)) for p in plan.parameters)
    return replace(
        plan,
        input=new.get(id(plan.input), plan.input),
        output=new[id(plan.output)],
        parameters=parameters,
    )


def _rebuilt(output: Node, change: Callable[[Node], Node]) -> dict[int, Node]:
    """By `id` of each node of one graph, what has become of it; bodies are rebuilt too."""
    new: dict[int, Node] = {}
    for node in topological(output):
        moved = node.with_inputs(tuple(new[id(i)] for i in node.inputs))
        if moved.bodies:
            moved = replace(moved, bodies=tuple(_body(b, change) for b in moved.bodies))
        new[id(node)] = change(moved)
    return new


def _body(body: Body, change: Callable[[Node], Node]) -> Body:
    new = _rebuilt(body.output, change)
    captures = tuple((new.get(id(n), n), index) for n, index in body.captures)
    return Body(new.get(id(body.item), body.item), captures, new[id(body.output)])


def consumers(output: Node) -> dict[int, list[Node]]:
    """By `id` of a node of one graph, the nodes that use its result."""
    uses: dict[int, list[Node]] = {}
    for node in topological(output):
        uses.setdefault(id(node), [])
        for source in node.inputs:
            uses[id(source)].append(node)
    return uses


def check_legal(before: FlowPlan, after: FlowPlan, name: str) -> FlowPlan:
    """The plan `after` the rewrite `name`, if it is one. Raises InternalError if it is not."""
    if after.output.type != before.output.type or after.input.type != before.input.type:
        raise InternalError(f"{name} changed what flow `{before.name}` takes or gives")
    known = {id(after.input), *(id(p.node) for p in after.parameters)}
    _check_graph(after.output, known, f"{name} left flow `{before.name}`")
    return after


def _check_graph(output: Node, known: set[int], where: str) -> None:
    """Each graph has its own inputs and no others, and nothing comes before what it needs."""
    done: set[int] = set()
    for node in topological(output):
        if node.op == INPUT and id(node) not in known:
            raise InternalError(f"{where} with an input from elsewhere")
        if any(id(i) not in done for i in node.inputs):
            raise InternalError(f"{where} with `{node.op}` before its input")
        done.add(id(node))
        for body in node.bodies:
            if any(not 0 < index < len(node.inputs) for _, index in body.captures):
                raise InternalError(f"{where} with a body that captures what is not there")
            inner = {id(body.item), *(id(n) for n, _ in body.captures)}
            _check_graph(body.output, inner, where)
