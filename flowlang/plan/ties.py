"""Which arrays of a request have sides of one length, as a model names them alike.

Layer 2. A model says so of its inputs; where those are what a request brings, as it comes, its
lengths can be held against each other before anything waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowlang.plan import graph
from flowlang.plan.graph import FlowPlan, Node
from flowlang.plan.ops import OPS

# Where the sides of an image lie that becomes a tensor: its axes by those of the tensor.
_IMAGE_AXES: Mapping[str, Mapping[int, int]] = {"chw": {1: 0, 2: 1}, "hwc": {0: 0, 1: 1}}


@dataclass(frozen=True, slots=True)
class Side:
    """A side of an array that a request brings: slot 0 is its item, then come its parameters."""

    slot: int
    fields: tuple[str, ...]
    axis: int


@dataclass(frozen=True, slots=True)
class GivenTie:
    """Sides of what a request brings that have one length, and what the model calls it."""

    symbol: str
    sides: tuple[Side, ...]


def ties_of(plan: FlowPlan) -> list[GivenTie]:
    """Those of all models that every request of a flow comes to."""
    slots = {id(plan.input): 0}
    slots |= {id(p.node): slot for slot, p in enumerate(plan.parameters, 1)}
    found: dict[GivenTie, None] = {}
    for node in plan.nodes():
        for tie in node.model.ties if node.model is not None else ():
            traced = (_traced(*_source(node, name), axis, slots) for name, axis in tie.sides)
            sides = tuple(dict.fromkeys(side for side in traced if side is not None))
            if len(sides) > 1:
                found[GivenTie(tie.symbol, sides)] = None
    return list(found)


def _source(node: Node, port: str) -> tuple[Node, tuple[str, ...]]:
    """What a model gets as one of its inputs: a node, or a field of the record it gives."""
    given = node.inputs[0]
    if node.model is None or len(node.model.inputs) == 1:
        return given, ()
    if given.op == graph.RECORD:
        return dict(zip(given.params["names"], given.inputs, strict=True))[port], ()
    return given, (port,)


def _traced(
    node: Node, fields: tuple[str, ...], axis: int, slots: Mapping[int, int]
) -> Side | None:
    """The side of what a request brings that this is; None where it is made on the way."""
    while id(node) not in slots:
        if node.op == graph.FIELD:
            fields = (node.params["name"], *fields)
        elif node.op == graph.PACK:
            inner = _IMAGE_AXES[node.params["layout"]].get(axis)
            if inner is None:
                return None
            axis = inner
        elif node.op not in OPS or not OPS[node.op].keeps_size:
            return None
        node = node.inputs[0]
    return Side(slots[id(node)], fields, axis)


def differing(symbol: str, lengths: Sequence[tuple[int, str]]) -> str | None:
    """What is wanted of lengths that are to be one, each with where it is; None where they are."""
    for length, place in lengths:
        first, where = lengths[0]
        if length != first:
            return f"`{symbol}` of one length, not {first} in {where} and {length} in {place}"
    return None


def placed(name: str, axis: int, rank: int) -> str:
    """A side of an array in words; of one with a single axis there is no other."""
    return name if rank == 1 else f"axis {axis} of {name}"
