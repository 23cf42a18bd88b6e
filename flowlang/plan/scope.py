"""Where an expression stands: the flow it is written in, and the values it can name.

Layer 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowlang.diagnostics import Span
from flowlang.plan import graph
from flowlang.plan.extent import children
from flowlang.plan.fitting import called
from flowlang.plan.graph import Body, Node, Site
from flowlang.plan.module import Declared, Module
from flowlang.plan.types import Type
from flowlang.plan.values import Constant
from flowlang.syntax import tree


@dataclass(slots=True)
class Scope:
    """The values of a flow, or of a body inside one, which also sees those around it.

    A value around a body is another graph's: where it is named, a node inside stands for it.
    `captured` has those pairs, by `id` of the outer node. `item` is the pair of what arrives at a
    body and where it comes from, unless that is an element of it. `mention` is where a flow is
    mentioned.
    """

    declared: Declared
    values: dict[str, Node] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    arguments: tuple[tuple[str, Any], ...] = ()
    lets: frozenset[str] = frozenset()
    outer: Scope | None = None
    captured: dict[int, tuple[Node, Node]] = field(default_factory=dict)
    item: tuple[Node, Node] | None = None
    mention: Scope | None = None

    @property
    def module(self) -> Module:
        return self.declared.module

    def site(self, span: Span) -> Site:
        return Site(self.declared.name, span, self.arguments)

    def inside(self) -> Scope:
        """The scope of a body."""
        return Scope(self.declared, {}, self.constants, self.arguments, self.lets, self, {})

    def put(self, name: str, value: Node) -> None:
        """Give a name its value, in place of a param of that name.

        One that is known before anything runs can be told to operators like a param.
        """
        self.values[name] = value
        self.constants = {n: c for n, c in self.constants.items() if n.partition(".")[0] != name}
        if (known := constant_of(value)) is not None:
            self.constants[name] = known

    def value(self, name: str) -> Node | None:
        """The node that a name stands for here."""
        if name in self.values or self.outer is None:
            return self.values.get(name)
        found = self.outer.value(name)
        return None if found is None else self.capture(found)

    def capture(self, node: Node) -> Node:
        """What stands inside this body for a node around it."""
        if node.op == graph.LITERAL:
            return node
        if id(node) not in self.captured:
            inner = start(node.type, node, called(node))
            self.captured[id(node)] = (inner, node)
        return self.captured[id(node)][0]

    def origin(self, node: Node) -> tuple[Node, tuple[str, ...]]:
        """Where a value comes from, out of all bodies: a node, and the field of a field of it."""
        fields: tuple[str, ...] = ()
        scope: Scope | None = self
        while True:
            if node.op == "pass":
                node = node.inputs[0]
            elif node.op == graph.FIELD:
                fields = (node.params["name"], *fields)
                node = node.inputs[0]
            elif node.op == graph.RECORD and fields and fields[0] in node.params["names"]:
                node = node.inputs[node.params["names"].index(fields[0])]
                fields = fields[1:]
            elif scope is None:
                return node, fields
            else:
                pairs = [*scope.captured.values(), *((scope.item,) if scope.item else ())]
                outer = next((o for inner, o in pairs if inner is node), None)
                node, scope = outer or node, scope.outer or scope.mention

    def names(self) -> set[str]:
        """The values that can be named here."""
        return {*self.values, *(self.outer.names() if self.outer is not None else ())}

    def is_live(self, expr: tree.Expr) -> bool:
        """Whether an expression needs the item or a value of the flow."""
        stack: list[object] = [expr]
        names = self.names()
        while stack:
            part = stack.pop()
            if isinstance(part, tree.Current):
                return True
            if isinstance(part, tree.Call):
                name = part.path.names[0]
                if name in names and name not in self.constants:
                    return True
            stack += children(part)
        return False


def constant_of(value: Node) -> Constant | None:
    """What a value is before anything runs, or None where requests bring it."""
    if value.op == "unknown":
        return Constant("unknown", None, value.span)
    if value.op != graph.LITERAL:
        return None
    return Constant(str(value.type), value.params["value"], value.span)


@dataclass(slots=True)
class Bodies:
    """The bodies of one control node, and the outer values that they use, each once."""

    inputs: list[Node]
    made: list[Body] = field(default_factory=list)

    def add(self, item: Node, output: Node, scope: Scope) -> Body:
        """A body that has been elaborated in its own scope."""
        captures = []
        for inner, outer in scope.captured.values():
            if not any(outer is given for given in self.inputs[1:]):
                self.inputs.append(outer)
            index = next(i for i, given in enumerate(self.inputs) if i and outer is given)
            captures.append((inner, index))
        body = Body(item, tuple(captures), output)
        self.made.append(body)
        return body


def start(kind: Type, source: Node, name: str) -> Node:
    """The node that a body's item arrives at, known by where it comes from.

    `name` is what messages call it.
    """
    params = {"called": name, "is_inner": True}
    return Node(graph.INPUT, params, (), kind, source.span, source.site)
