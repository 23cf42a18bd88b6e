"""Nodes made by hand, for tests of what operators do rather than of how programs are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowlang.diagnostics import Source, Span
from flowlang.plan import graph
from flowlang.plan.graph import Node, Site
from flowlang.plan.ops import OPS
from flowlang.plan.types import UNKNOWN, Image, Type
from flowlang.runtime.host import work_of

SPAN = Span(Source("test.flow", "decode"), 0, 6)
SITE = Site("test", SPAN)


def made(
    op: str, *, inputs: Sequence[Node] = (), gives: Type = UNKNOWN, takes: Type = UNKNOWN,
    **params: Any,
) -> Node:  # fmt: skip
    """A node of an operator; parameters not named have the defaults of the operator's row."""
    row = OPS.get(op)
    defaults = {p.name: p.default for p in row.params} if row is not None else {}
    before = tuple(inputs) or (Node(graph.INPUT, {}, (), takes, SPAN, SITE),)
    return Node(op, {**defaults, **params}, before, gives, SPAN, SITE)


def image_node(op: str, **params: Any) -> Node:
    return made(op, takes=Image("bgr"), gives=Image("bgr"), **params)


def run(op: str, value: Any, *extras: Any, **params: Any) -> Any:
    """What an operator makes of an item."""
    return work_of(made(op, takes=Image(), **params), {})(value, *extras)
