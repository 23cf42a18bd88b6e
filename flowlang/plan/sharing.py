"""Which stages the plans of several files have in common.

Layer 2. Within a file a named flow is one physical thing, and an operator that is written twice is
two. No file can name a flow of another one's, so between files the work itself is compared: a model
is one stage where files name the same one, to do the same by the same settings.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from flowlang.plan import graph
from flowlang.plan.check import Plan
from flowlang.plan.graph import Node
from flowlang.plan.onnx import Model
from flowlang.plan.schedule import OF_REQUESTS
from flowlang.plan.types import Image

Key = TypeVar("Key")
Work: TypeAlias = tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """One stage of several files: the chain of operators that each of them has for it."""

    chains: tuple[Sequence[Node], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The nodes `start` to `stop` of a chain are a shared stage; the others stay its file's own."""

    shared: Shared
    start: int
    stop: int

    def cut(self, chain: list[Node]) -> Iterator[tuple[list[Node], Shared | None]]:
        """A chain in pieces, with what the one in the middle is a part of."""
        if self.start:
            yield chain[: self.start], None
        yield chain[self.start : self.stop], self.shared
        if self.stop < len(chain):
            yield chain[self.stop :], None


@dataclass(frozen=True, slots=True)
class ModelChain:
    """A chain with a model, in three: the operators in front of it, it with its packing, the rest.

    With `is_whole` the model stays together with what is in front of it.
    """

    nodes: Sequence[Node]
    front: tuple[Work, ...]
    model: tuple[Work, ...]
    rest: tuple[Work, ...]
    is_whole: bool

    @property
    def key(self) -> object:
        """What it has to have in common with a chain of another file to share a stage with it."""
        return (self.is_whole, self.model, self.front if self.is_whole else ())


def model_chain(nodes: Sequence[Node], at: int, plan: Plan, *, is_whole: bool) -> ModelChain:
    """A chain of a file's plan, with its model at that place."""
    works = [_work(node, plan) for node in nodes]
    start = at - 1 if at and nodes[at - 1].op == graph.PACK else at
    front, model, rest = works[:start], works[start : at + 1], works[at + 1 :]
    return ModelChain(nodes, tuple(front), tuple(model), tuple(rest), is_whole)


def parts_of(files: Sequence[Mapping[Key, ModelChain]]) -> list[dict[Key, Part]]:
    """For each file, which of its chains share a stage with those of others.

    A file that has one chain twice shares them one by one: the first with the others' first.
    """
    members: dict[object, list[tuple[int, Key, ModelChain]]] = {}
    for number, chains in enumerate(files):
        before: Counter[object] = Counter()
        for key, chain in chains.items():
            members.setdefault((chain.key, before[chain.key]), []).append((number, key, chain))
            before[chain.key] += 1
    found: list[dict[Key, Part]] = [{} for _ in files]
    for group in members.values():
        if len(group) > 1:
            for (number, key, _), part in zip(group, _shared([c for *_, c in group]), strict=True):
                found[number][key] = part
    return found


def _shared(chains: Sequence[ModelChain]) -> list[Part]:
    """The part of each chain that all of them have in common."""
    has_front = len({chain.front for chain in chains}) == 1
    has_rest = len({chain.rest for chain in chains}) == 1
    spans = [
        (
            0 if has_front else len(chain.front),
            len(chain.nodes) if has_rest else len(chain.front) + len(chain.model),
        )
        for chain in chains
    ]
    pieces = (c.nodes[start:stop] for c, (start, stop) in zip(chains, spans, strict=True))
    shared = Shared(tuple(pieces))
    return [Part(shared, start, stop) for start, stop in spans]


def _work(node: Node, plan: Plan) -> Work:
    """What a node does, whatever file it is written in."""
    given = {n: v for n, v in node.params.items() if n not in ("chain", "model")}
    params = sorted((n, id(v) if callable(v) else repr(v)) for n, v in given.items())
    settings = {n: g.value for n, g in plan.settings.at(node.site).items() if n not in OF_REQUESTS}
    return (
        node.op,
        tuple(params),
        seen_by(node),
        _content(node.model),
        arriving(node),
        tuple(sorted(settings.items())),
    )


def _content(model: Model | None) -> Work:
    """A model's file, by whatever names it is reached, as it was when it was read."""
    if model is None:
        return ()
    return (os.path.realpath(model.path), model.inputs, model.outputs)


def seen_by(boxes: Node) -> tuple[tuple[str, str], ...]:
    """What was done to the picture that the model before a `boxes` was given, if a node is one."""
    chain: Sequence[Node] = boxes.params.get("chain") or ()
    return tuple((n.op, repr(sorted(n.params.items()))) for n in chain)


def arriving(node: Node) -> Work:
    """What of the types that arrive decides the work of a node.

    The sides of an image do not, they may differ by item, but for packing it into a tensor.
    """
    types = [i.type for i in node.inputs]
    if node.op == graph.PACK:
        return tuple(types)
    return tuple((t.colour, t.dtype) if isinstance(t, Image) else t for t in types)
