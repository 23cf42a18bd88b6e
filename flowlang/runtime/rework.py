"""Models made ready for TensorRT: pixels as they are decoded go in, precision is in the graph.

Layer 3, and the only file importing the package onnx (headers are read in `plan.onnx` without it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any

from flowlang.diagnostics import EngineError

PREFIX = "flowlang_"
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear"})
_CONTROL = frozenset({"If", "Loop", "Scan"})
WEIGHTS_ALONE = 4  # before this IR version a graph lists its weights among its inputs


@dataclass(frozen=True, slots=True)
class Prologue:
    """Work moved from the region into the engine: 8-bit height x width x channels come in.

    Levels become (level - mean) / std, then the layout and the dtype the model's input has.
    """

    layout: str
    height: int
    width: int
    channels: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def load(path: Path, data: bytes | None = None) -> Any:
    """A model's graph with its weights; from `data` where the file was opened elsewhere."""
    import onnx

    try:
        if data is not None:
            return onnx.load_model_from_string(data)
        return onnx.load(str(path))
    except Exception as error:
        raise EngineError(f"`{path.name}` cannot be read as ONNX: {error}") from error


def has_quantization(model: Any) -> bool:
    """Whether the graph holds quantize/dequantize pairs, which is what int8 needs."""
    return any(node.op_type in _QUANTIZED for node in _all_nodes(model))


def has_half(model: Any) -> bool:
    """Whether the graph already computes in fp16 somewhere."""
    from onnx import TensorProto

    ports = (*model.graph.input, *model.graph.output)
    kinds = {p.type.tensor_type.elem_type for p in ports}
    kinds |= {weight.data_type for weight in model.graph.initializer}
    for node in _all_nodes(model):
        kinds.add(_casts_to(node))
        kinds |= {a.t.data_type for a in node.attribute}
    return TensorProto.FLOAT16 in kinds


def to_fp16(model: Any) -> Any:
    """The graph computing in fp16, its inputs and outputs left as they are.

    One whose weights are half already, or that is quantized, has its types from whoever made it.
    What is computed from shapes alone, the bodies of control flow, and what has no fp16 stay in
    fp32.
    """
    from onnx import TensorProto, inliner, shape_inference
    from onnxruntime.transformers import float16

    if has_quantization(model) or any(
        weight.data_type == TensorProto.FLOAT16 for weight in model.graph.initializer
    ):
        return model
    if model.functions:
        model = inliner.inline_local_functions(model)
    _make_plain(model)
    model = shape_inference.infer_shapes(model)
    meant = {n.output[0] for n in model.graph.node if _casts_to(n) == TensorProto.FLOAT16}
    model = float16.convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *_CONTROL],
        node_block_list=_name_of_shapes(model.graph),
    )
    _keep_single(model.graph, meant)
    _widen_captured(model.graph)
    _sort(model.graph)
    return model


def _make_plain(model: Any) -> None:
    """Have weights be weights alone, and constants be tensors: so they are seen to be floats."""
    import numpy as np
    from onnx import helper, numpy_helper

    g = model.graph
    ports = _ports(g)
    del g.input[:]
    g.input.extend(ports)
    model.ir_version = max(model.ir_version, WEIGHTS_ALONE)
    for node in g.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name in ("value_float", "value_floats"):
                value = np.asarray(helper.get_attribute_value(attribute), np.float32)
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))


def _ports(g: Any) -> list[Any]:
    """The inputs of a graph but for its weights, which old ones list among them."""
    weights = {weight.name for weight in g.initializer}
    return [port for port in g.input if port.name not in weights]


def _name_of_shapes(g: Any) -> list[str]:
    """Give a name to each node that computes from shapes alone, and return the names.

    A size, or a number of positions, may be past what fp16 counts exactly (2048) or at all (65504),
    and TensorRT computes shapes in no fp16.
    """
    known = {weight.name for weight in g.initializer} | {""}  # without a picture
    shaped: set[str] = set()
    names = []
    for number, node in enumerate(g.node):
        if node.op_type in ("Shape", "Size"):
            is_shaped = True
        elif node.op_type not in _CONTROL and known.issuperset(node.input):
            is_shaped = node.op_type == "Range" or not shaped.isdisjoint(node.input)
        else:
            continue
        known.update(node.output)
        if is_shaped:
            shaped.update(node.output)
            node.name = f"{PREFIX}shape_{number}"
            names.append(node.name)
    return names


def _keep_single(g: Any, meant: set[str]) -> None:
    """Have what stays in fp32 not go through fp16 between one node and the next.

    `meant` are the results that whoever made the graph has cast to fp16.
    """
    from onnx import TensorProto

    narrowed = {
        node.output[0]: node.input[0]
        for node in g.node
        if _casts_to(node) == TensorProto.FLOAT16 and node.output[0] not in meant
    }
    for node in g.node:
        if node.input and node.input[0] in narrowed and _casts_to(node) == TensorProto.FLOAT:
            node.op_type = "Identity"
            node.input[0] = narrowed[node.input[0]]
            del node.attribute[:]


def _widen_captured(g: Any) -> None:
    """Have the bodies of control flow, which stay in fp32, take so what they take from outside."""
    from onnx import TensorProto, helper

    kinds = {value.name: value.type.tensor_type.elem_type for value in g.value_info}
    kinds |= {weight.name: weight.data_type for weight in g.initializer}
    bodies = [body for node in g.node for body in _bodies(node)]
    taken = sorted(set().union(*map(_captured, bodies)))
    names = {n: f"{PREFIX}{n}" for n in taken if kinds.get(n) == TensorProto.FLOAT16}
    for body in bodies:
        _rename(body, names)
    g.node.extend(
        helper.make_node("Cast", [old], [new], to=TensorProto.FLOAT) for old, new in names.items()
    )


def _sort(g: Any) -> None:
    """Put each node behind those whose results it takes. Raises ValueError where none can be."""
    makers: dict[str, int] = {}
    for number, node in enumerate(g.node):
        for name in filter(None, node.output):
            if makers.setdefault(name, number) != number:
                raise ValueError(f"two nodes give `{name}`")
    taken = {
        number: {
            makers[name]
            for name in {*node.input, *chain.from_iterable(map(_captured, _bodies(node)))}
            if name in makers
        }
        for number, node in enumerate(g.node)
    }
    nodes = [g.node[number] for number in TopologicalSorter(taken).static_order()]
    ordered = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del g.node[:]
    g.node.extend(ordered)


def _all_nodes(model: Any) -> Iterator[Any]:
    """The nodes of a graph, of its functions, and of the bodies in them."""
    waiting = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [inner for body in _bodies(node) for inner in body.node]


def _casts_to(node: Any) -> int:
    """The dtype that a Cast gives; 0 for any other node."""
    return next((a.i for a in node.attribute if node.op_type == "Cast" and a.name == "to"), 0)


def _bodies(node: Any) -> list[Any]:
    """The graphs that a node of control flow holds."""
    return [g for a in node.attribute for g in (*a.graphs, *([a.g] if a.HasField("g") else ()))]


def _captured(body: Any) -> set[str]:
    """What a body, and the bodies in it, take from around it."""
    used = {name for node in body.node for name in node.input}
    made = {value.name for value in (*body.input, *body.initializer)}
    made.update(name for node in body.node for name in node.output)
    for node in body.node:
        used.update(*map(_captured, _bodies(node)))
    return used - made


def _rename(body: Any, names: Mapping[str, str]) -> None:
    """Have a body, and the bodies in it, take other things from around it."""
    for node in body.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for inner in _bodies(node):
            _rename(inner, names)


def prepend(model: Any, prologue: Prologue) -> Any:
    """The model with a prologue before its first input.

    The first node is the Cast: TensorRT takes 8-bit tensors as network inputs and nowhere else.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    g = model.graph
    old = _ports(g)[0]
    dtype = old.type.tensor_type.elem_type
    sides = [prologue.height, prologue.width, prologue.channels]
    new = helper.make_tensor_value_info(f"{PREFIX}image", TensorProto.UINT8, ["N", *sides])
    nodes = [helper.make_node("Cast", [new.name], [f"{PREFIX}0"], to=TensorProto.FLOAT)]
    constants = []
    if prologue.mean is not None and prologue.std is not None:
        mean = np.asarray(prologue.mean, np.float32)
        std = np.asarray(prologue.std, np.float32)
        constants = [
            numpy_helper.from_array(np.asarray(1 / std, np.float32), f"{PREFIX}scale"),
            numpy_helper.from_array(np.asarray(-mean / std, np.float32), f"{PREFIX}offset"),
        ]
        nodes.append(helper.make_node("Mul", [f"{PREFIX}0", f"{PREFIX}scale"], [f"{PREFIX}1"]))
        nodes.append(helper.make_node("Add", [f"{PREFIX}1", f"{PREFIX}offset"], [f"{PREFIX}2"]))
    last = nodes[-1].output[0]
    if prologue.layout == "chw":
        nodes.append(helper.make_node("Transpose", [last], [f"{PREFIX}3"], perm=[0, 3, 1, 2]))
        last = f"{PREFIX}3"
    nodes.append(helper.make_node("Cast", [last], [old.name], to=dtype))
    kept = [i for i in g.input if i.name != old.name]
    after = list(g.node)
    del g.node[:], g.input[:]
    g.node.extend([*nodes, *after])
    g.input.extend([new, *kept])
    g.initializer.extend(constants)
    return model
