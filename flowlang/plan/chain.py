"""Chains: runs of operators that one instance can do in one go.

Layer 2. A chain is cut where a result is used twice, where a named flow is mentioned more than
once, before a second model, and where its parts would run in different places.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.plan import graph
from flowlang.plan.check import Plan
from flowlang.plan.graph import Node, Site, consumers, topological
from flowlang.plan.ops import OPS
from flowlang.plan.sharing import arriving, seen_by

if TYPE_CHECKING:
    from flowlang.plan.physical import Machine

# The kinds of the operators that the checker makes itself; those not here are glue or control.
_KINDS = {
    graph.PACK: "image",
    graph.CUT_OUT: "image",
    graph.SELECT: "host",
    graph.PYTHON: "python",
}


def kind_of(node: Node) -> str:
    """Where a node is done: by what runs `image`, `model`, `host` or `python`, or by no stage."""
    if node.op in OPS and not node.bodies:
        return OPS[node.op].kind
    return _KINDS.get(node.op, "control" if node.bodies else "glue")


def is_work(node: Node) -> bool:
    """Whether a node is done by a stage."""
    return kind_of(node) not in ("glue", "control")


Identity: TypeAlias = tuple[str, Site, tuple[object, ...], tuple[tuple[str, Any], ...]]
ChainIdentity: TypeAlias = tuple[Identity, ...]


def _identity(node: Node) -> Identity:
    """What makes two nodes one physical thing: where they are written, and what arrives.

    One flow may be mentioned behind images of different colours, and one model behind normalized
    and plain ones: these are not the same work.
    """
    packing = tuple(sorted(node.params.items())) if node.op == graph.PACK else ()
    if node.op == "boxes":  # which answers in coordinates of what its model was given
        packing = (("chain", seen_by(node)), ("names", repr(node.params["names"])))
    return (node.op, node.site, arriving(node), packing)


def chain_identity(chain: Sequence[Node]) -> ChainIdentity:
    return tuple(_identity(node) for node in chain)


def chains_of(outputs: Sequence[Node], plan: Plan, machine: Machine) -> list[list[Node]]:
    """All operators of all graphs, in runs that can share a stage."""
    orders = [topological(output) for output in outputs]
    uses: dict[Identity, int] = {}
    for node in itertools.chain(*orders):
        identity = _identity(node)
        uses[identity] = uses.get(identity, 0) + 1
    chains: list[list[Node]] = []
    for output, order in zip(outputs, orders, strict=True):
        users = consumers(output)
        ends: dict[int, list[Node]] = {}
        for node in order:
            if not is_work(node):
                continue
            before = ends.get(id(node.inputs[0]))
            alone = before is not None and len(users[id(before[-1])]) == 1
            if before is not None and alone and _can_follow(before, node, uses, plan, machine):
                before.append(node)
                ends[id(node)] = before
            else:
                chains.append([node])
                ends[id(node)] = chains[-1]
    return chains


def runs_on_gpu(model: Node, plan: Plan, machine: Machine) -> bool:
    """Whether a model is run by a GPU."""
    return bool(machine.gpus) and plan.settings.value(model.site, "device", machine.device) == "gpu"


def decodes_on_gpu(region: Sequence[Node]) -> bool:
    """Whether a region can run on a GPU.

    It starts from encoded pictures, nobody forbade it, and DALI has all that it does.
    """
    if not region or region[0].op != "decode" or region[0].params["decoder"] == "libjpeg":
        return False
    return all(_is_lowered(node) for node in region)


# The image operators that flowlang.runtime.dali knows.
LOWERED = frozenset({"decode", "resize", "rgb", "bgr", "gray", "crop", "normalize", graph.PACK})


def _is_lowered(node: Node) -> bool:
    params = node.params
    if node.op == "resize" and (params["fit"] == "least" or params["multiple"] or params["most"]):
        return False
    return node.op in LOWERED


def _can_follow(
    chain: list[Node],
    node: Node,
    uses: Mapping[Identity, int],
    plan: Plan,
    machine: Machine,
) -> bool:
    last = chain[-1]
    shared = (uses[_identity(last)], uses[_identity(node)])
    if shared != (1, 1) and (shared[0] != shared[1] or last.site.flow != node.site.flow):
        return False
    if node.op == graph.PACK or node.model is not None:
        # Decoding on the CPU has cores to use, a model on a GPU has lanes: a stage each.
        on_host = runs_on_gpu(node, plan, machine) and not decodes_on_gpu(chain)
        if on_host and last.op != graph.PACK:
            return False
    kinds = (kind_of(last), kind_of(node))
    return "python" not in kinds and (kinds[1] == "host" or kinds[0] == "image")
