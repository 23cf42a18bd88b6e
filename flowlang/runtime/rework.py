"""Models made ready for TensorRT: pixels as they are decoded go in, precision is in the graph.

Layer 3, and the only file importing the package onnx (headers are read in `plan.onnx` without it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowlang.diagnostics import EngineError

PREFIX = "flowlang_"
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear"})


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
    return any(node.op_type in _QUANTIZED for node in model.graph.node)


def has_half(model: Any) -> bool:
    """Whether the graph already computes in fp16 somewhere."""
    from onnx import TensorProto

    ports = (*model.graph.input, *model.graph.output)
    kinds = {p.type.tensor_type.elem_type for p in ports}
    kinds |= {weight.data_type for weight in model.graph.initializer}
    return TensorProto.FLOAT16 in kinds


def to_fp16(model: Any) -> Any:
    """The graph computing in fp16, its inputs and outputs left as they are."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=True)


def prepend(model: Any, prologue: Prologue) -> Any:
    """The model with a prologue before its first input.

    The first node is the Cast: TensorRT takes 8-bit tensors as network inputs and nowhere else.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    g = model.graph
    weights = {i.name for i in g.initializer}
    old = next(i for i in g.input if i.name not in weights)
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
