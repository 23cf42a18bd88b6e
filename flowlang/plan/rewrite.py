"""Rewrites of a flow's plan, each from legal plan to legal plan.

Layer 2. Every pass is a function `verb_noun(plan) -> plan`; after each one the plan is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flowlang.plan import graph
from flowlang.plan.graph import FlowPlan, Node, check_legal, rebuild
from flowlang.plan.model import Packing, fit
from flowlang.plan.ops import OPS, PRESETS
from flowlang.plan.types import Image, Record, Tensor, Type


def rewrite(plan: FlowPlan) -> FlowPlan:
    """All passes in order, the plan checked after each."""
    for rule in PASSES:
        plan = check_legal(plan, rule(plan), rule.__name__)
    return plan


def drop_passes(plan: FlowPlan) -> FlowPlan:
    """`pass` does nothing, so it goes; a flow that is nothing else keeps its one stage."""
    dropped = rebuild(plan, lambda node: node.inputs[0] if node.op == "pass" else node)
    if plan.output.op == "pass" and dropped.output is dropped.input:
        return replace(dropped, output=plan.output.with_inputs((dropped.input,)))
    return dropped


def pick_fields(plan: FlowPlan) -> FlowPlan:
    """A field of a record just made is the value it was made from."""

    def change(node: Node) -> Node:
        if node.op != graph.FIELD or node.inputs[0].op != graph.RECORD:
            return node
        record = node.inputs[0]
        names: tuple[str, ...] = record.params["names"]
        return record.inputs[names.index(node.params["name"])]

    return rebuild(plan, change)


def split_normalize(plan: FlowPlan) -> FlowPlan:
    """`mean` and `std` of a model become a `normalize` before it, to fuse like any other."""

    def change(node: Node) -> Node:
        levels = {n: node.params.get(n) for n in ("mean", "std")}
        if node.op != "trt" or None in levels.values() or len(node.inputs) != 1:
            return node
        image = node.inputs[0]
        if not isinstance(image.type, Image):
            return node
        normal = Node(
            "normalize", {"preset": None, **levels}, (image,), replace(image.type, dtype="f32"),
            node.span, node.site,
        )  # fmt: skip
        return replace(node, inputs=(normal,), params={**node.params, "mean": None, "std": None})

    return rebuild(plan, change)


def insert_packs(plan: FlowPlan) -> FlowPlan:
    """Between an image and a model goes a `pack`: the tensor the model's input wants."""

    def change(node: Node) -> Node:
        if node.model is None:
            return node
        if len(node.model.inputs) == 1:
            return replace(node, inputs=(_packed(node, node.inputs[0], 0),))
        record = node.inputs[0]
        names, values = _fields(node, record)
        order = {p.name: i for i, p in enumerate(node.model.inputs)}
        fields = tuple(
            _packed(node, f, order[n]) if n in order else f
            for n, f in zip(names, values, strict=True)
        )
        if fields == values:
            return node
        kind = Record(tuple((n, f.type) for n, f in zip(names, fields, strict=True)))
        packed = Node(graph.RECORD, {"names": names}, fields, kind, record.span, record.site)
        return replace(node, inputs=(packed,))

    return rebuild(plan, change)


def _fields(node: Node, record: Node) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    """Names and values of the fields that a model of several inputs gets.

    Of a record that is made elsewhere (an element, a way out of an `if`) they are picked out.
    """
    if record.op == graph.RECORD:
        return record.params["names"], record.inputs
    if node.model is None or not isinstance(record.type, Record):
        return (), ()
    kinds = dict(record.type.fields)
    names = tuple(p.name for p in node.model.inputs if p.name in kinds)
    return names, tuple(
        Node(graph.FIELD, {"name": n}, (record,), kinds[n], record.span, record.site) for n in names
    )


def _packed(node: Node, item: Node, index: int) -> Node:
    if node.model is None or not isinstance(item.type, Image):
        return item
    packing = fit(item.type, node.model.inputs[index], node.model)
    if not isinstance(packing, Packing):
        return item
    params = {"layout": packing.layout, "dtype": packing.dtype, "mean": None, "std": None}
    kind = _packed_type(item.type, packing)
    return Node(graph.PACK, params, (item,), kind, node.span, node.site)


def _packed_type(image: Image, packing: Packing) -> Type:
    sides = (image.height, image.width)
    shape = (image.channels, *sides) if packing.layout == "chw" else (*sides, image.channels)
    return Tensor(packing.dtype, shape)


def fold_normalize(plan: FlowPlan) -> FlowPlan:
    """A `normalize` that is then packed is done while packing: one walk over the pixels."""

    def change(node: Node) -> Node:
        if node.op != graph.PACK or node.inputs[0].op != "normalize":
            return node
        normal = node.inputs[0]
        mean, std = levels_of(normal)
        return replace(node, inputs=normal.inputs, params={**node.params, "mean": mean, "std": std})

    return rebuild(plan, change)


def levels_of(normal: Node) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of a `normalize`, one each a channel, in the image's order of channels."""
    image = normal.inputs[0].type
    channels = image.channels or 3 if isinstance(image, Image) else 3
    preset = normal.params["preset"]
    mean, std = PRESETS[preset] if preset else (normal.params["mean"], normal.params["std"])
    if preset and channels == 1 and len(mean) == 3:
        # The gray of a preset given in colours, by the weights `gray` uses.
        weights = (0.299, 0.587, 0.114)
        mean, std = ((sum(w * v for w, v in zip(weights, x, strict=True)),) for x in (mean, std))
    if preset and isinstance(image, Image) and image.colour == "bgr":
        mean, std = mean[::-1], std[::-1]
    return _for_each(mean, channels), _for_each(std, channels)


def _for_each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values[:channels]


def merge_equal(plan: FlowPlan) -> FlowPlan:
    """Equal work on equal input is done once. What has instances of its own stays, written twice.

    Nodes with bodies stay too: what is in them is another graph's.
    """
    seen: dict[object, Node] = {}

    def change(node: Node) -> Node:
        kind = OPS[node.op].kind if node.op in OPS else node.op
        if node.bodies or node.op == graph.INPUT:
            return node
        own = node.site if kind in ("model", graph.PYTHON) else None
        # The chain of `boxes` follows from its input, and would be spelled out with all before it.
        given = {n: v for n, v in node.params.items() if n != "chain"}
        params = sorted((n, repr(v)) for n, v in given.items() if not callable(v))
        others = tuple(id(v) for v in node.params.values() if callable(v))
        key = (node.op, tuple(params), others, tuple(id(i) for i in node.inputs), own)
        return seen.setdefault(key, node)

    return rebuild(plan, change)


PASSES: tuple[Callable[[FlowPlan], FlowPlan], ...] = (
    drop_passes,
    pick_fields,
    split_normalize,
    merge_equal,
    insert_packs,
    fold_normalize,
    merge_equal,
)
