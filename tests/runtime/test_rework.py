"""Models made ready for TensorRT still answer what they answered, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from examples import models
from flowlang.diagnostics import EngineError
from flowlang.plan import graph
from flowlang.runtime import rework
from flowlang.runtime.gpu import spec_of
from tests.pictures import photographs
from tests.regions import gpu_plan, on_host, region_of, write_models, write_taker

Array: TypeAlias = NDArray[Any]

FLOWS = {
    "chw": 'decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("chw.onnx")',
    "chw, as it is": 'decode -> resize(64) -> rgb -> trt("chw.onnx")',
    "hwc": 'decode -> resize(64) -> bgr -> normalize(imagenet) -> trt("hwc.onnx")',
    "hwc, as it is": 'decode -> resize(64) -> rgb -> trt("hwc.onnx")',
    "gray": 'decode -> resize(64) -> gray -> normalize(imagenet) -> trt("gray.onnx")',
    "gray, as it is": 'decode -> resize(64) -> gray -> trt("gray.onnx")',
    "half": 'decode -> resize(64) -> rgb -> normalize(unit) -> trt("half.onnx")',
    "several outputs": 'decode -> resize(64) -> rgb -> normalize(signed) -> trt("heads.onnx")',
    "oblong": 'decode -> resize(h=32, w=96) -> rgb -> normalize(imagenet) -> trt("oblong.onnx")',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_models(tmp_path_factory.mktemp("models"))
    write_taker(root / "oblong.onnx", TensorProto.FLOAT, ("N", 3, 32, 96))
    models.two_heads(root / "heads.onnx", size=64)
    return root


def run(model: Any, rows: Sequence[Array]) -> list[Array]:
    """All outputs of a model, for rows given to its first input as one batch."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    return list(session.run(None, {given.name: np.stack(rows)}))


@pytest.mark.parametrize("text", FLOWS.values(), ids=list(FLOWS))
def test_a_prologue_does_what_the_packing_did(folder: Path, text: str) -> None:
    """With 8-bit pixels in front of it the model answers as it does for the packed tensor."""
    (stage,) = gpu_plan(text, folder).stages
    spec = spec_of(stage)
    assert spec.prologue is not None
    nodes = region_of(text, folder)
    assert nodes[-1].op == graph.PACK
    files = photographs(3, 160, 120)
    levels = [on_host(nodes[:-1], data) for data in files]
    if spec.prologue.channels == 1:
        levels = [image[:, :, None] for image in levels]
    packed = [on_host(nodes, data) for data in files]
    wanted = run(rework.load(spec.model), packed)
    model = rework.prepend(rework.load(spec.model), spec.prologue)
    onnx.checker.check_model(model, full_check=True)
    got = run(model, levels)
    assert len(got) == len(wanted)
    limit = 2e-2 if "half" in text else 1e-4  # half precision keeps three digits
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=limit, atol=limit)


def test_the_prologue_begins_with_a_cast(folder: Path) -> None:
    """TensorRT takes 8-bit levels as an input only, so nothing else may touch them."""
    prologue = rework.Prologue("chw", 64, 64, 3, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    model = rework.prepend(rework.load(folder / "chw.onnx"), prologue)
    name = model.graph.input[0].name
    (user,) = (node for node in model.graph.node if name in node.input)
    assert user.op_type == "Cast"
    assert [i.name for i in model.graph.input] == [name]
    kind = model.graph.input[0].type.tensor_type
    assert kind.elem_type == TensorProto.UINT8
    assert [d.dim_value for d in kind.shape.dim][1:] == [64, 64, 3]


def test_weights_among_the_inputs_are_left_alone(folder: Path) -> None:
    """Older exporters list weights as inputs too; the picture is what is not a weight."""
    model = rework.load(folder / "heads.onnx")
    for weight in model.graph.initializer:
        port = helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims))
        model.graph.input.insert(0, port)
    prologue = rework.Prologue("chw", 64, 64, 3, None, None)
    model = rework.prepend(model, prologue)
    weights = {weight.name for weight in model.graph.initializer}
    (name,) = (port.name for port in model.graph.input if port.name not in weights)
    assert name.startswith(rework.PREFIX)
    image = cv2.resize(np.eye(8, dtype=np.uint8) * 255, (64, 64))
    levels = np.repeat(image[:, :, None], 3, 2)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    got = session.run(["scores"], {name: levels[None]})[0]
    planes = levels.transpose(2, 0, 1).astype(np.float32)
    (wanted, _) = run(rework.load(folder / "heads.onnx"), [planes])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


def test_half_precision_with_a_prologue_agrees(tmp_path: Path) -> None:
    """A ResNet made fp16, then given its prologue, keeps its logits to one part in a hundred."""
    path = models.resnet(tmp_path / "net.onnx", width=8, size=64, classes=100)
    levels = [
        cv2.resize(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8), (64, 64))
        for seed in range(8)
    ]
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    prologue = rework.Prologue("chw", 64, 64, 3, mean, std)
    wanted = run(rework.prepend(rework.load(path), prologue), levels)[0]
    half = rework.prepend(rework.to_fp16(rework.load(path)), prologue)
    kinds = {weight.data_type for weight in half.graph.initializer if weight.name.startswith("w")}
    assert kinds == {TensorProto.FLOAT16}
    (got,) = run(half, levels)
    assert got.dtype == np.float32
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-2


def make(
    nodes: Sequence[Any],
    outputs: Sequence[Any],
    *,
    opset: int = 17,
    functions: Sequence[Any] = (),
    **weights: Any,
) -> Any:
    """A model of `x`, 2 x 3 x 16 x 16 in single precision."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 16, 16])
    named = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    inner = helper.make_graph(nodes, "made", [x], outputs, named)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ours", 1)]
    return helper.make_model(inner, ir_version=8, opset_imports=opsets, functions=functions)


def floats(name: str, *sides: int) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sides)


node = helper.make_node
KERNEL = np.random.default_rng(0).normal(0, 0.2, (4, 3, 3, 3)).astype(np.float32)
CONV = node("Conv", ["x", "kernel"], ["c"], pads=[1] * 4)
SINGLE = np.float32
TWO = numpy_helper.from_array(np.asarray([2], np.float32), "two")


def branches(*nodes: Any, **weights: Any) -> Any:
    """A model that ends in an `If`, whose branches are both of these nodes, from `c` to `o`."""
    named = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    bodies = [helper.make_graph(nodes, "body", [], [floats("o", 2, 4, 16, 16)], named)] * 2
    last = node("If", ["yes"], ["end"], then_branch=bodies[0], else_branch=bodies[1])
    half = node("Mul", ["c", "part"], ["beside"])
    both = node("Add", ["end", "beside"], ["out"])
    return make(
        [CONV, half, last, both], [floats("out", 2, 4, 16, 16)], kernel=KERNEL, yes=True,
        part=SINGLE(0.5),
    )  # fmt: skip


def weights_among_inputs() -> Any:
    model = make([CONV], [floats("c", 2, 4, 16, 16)], kernel=KERNEL)
    model.graph.input.insert(0, floats("kernel", 4, 3, 3, 3))
    model.ir_version = 3
    return model


def of_functions() -> Any:
    body = [node("Constant", [], ["two"], value=TWO), node("Mul", ["given", "two"], ["twice"])]
    opsets = [helper.make_opsetid("", 17)]
    twice = helper.make_function("ours", "Twice", ["given"], ["twice"], body, opsets)
    call = node("Twice", ["c"], ["o"], domain="ours")
    return make([CONV, call], [floats("o", 2, 4, 16, 16)], functions=[twice], kernel=KERNEL)


def quantized(opset: int) -> Any:
    nodes = [
        node("QuantizeLinear", ["x", "step", "zero"], ["levels"]),
        node("DequantizeLinear", ["levels", "step", "zero"], ["back"]),
        node("Conv", ["back", "kernel"], ["c"], pads=[1] * 4),
    ]
    weights: dict[str, Any] = {"kernel": KERNEL, "step": SINGLE(0.02), "zero": np.int8(0)}
    return make(nodes, [floats("c", 2, 4, 16, 16)], opset=opset, **weights)


GRAPHS = {
    "a convolution": make([CONV], [floats("c", 2, 4, 16, 16)], kernel=KERNEL),
    "constants that are no tensors": make(
        [
            node("Constant", [], ["two"], value_float=2.0),
            node("Constant", [], ["parts"], value_floats=[0.5]),
            node("Mul", ["x", "two"], ["y"]),
            node("Mul", ["y", "parts"], ["o"]),
        ],
        [floats("o", 2, 3, 16, 16)],
    ),
    "weights among the inputs": weights_among_inputs(),
    "functions of its own": of_functions(),
    "an output that is used, and indices": make(
        [
            node("Flatten", ["x"], ["rows"]),
            node("TopK", ["rows", "count"], ["values", "indices"]),
            node("Mul", ["values", "two"], ["o"]),
        ],
        [
            floats("values", 2, 5),
            floats("o", 2, 5),
            helper.make_tensor_value_info("indices", TensorProto.INT64, [2, 5]),
        ],
        count=np.asarray([5]),
        two=SINGLE(2),
    ),
    "a size by its shape": make(
        [
            CONV,
            node("Shape", ["c"], ["shape"]),
            node("Slice", ["shape", "third", "end"], ["sides"]),
            node("Cast", ["sides"], ["floats"], to=TensorProto.FLOAT),
            node("Div", ["wanted", "floats"], ["by"]),
            node("Concat", ["ones", "by"], ["scales"], axis=0),
            node("Resize", ["c", "", "scales"], ["o"], mode="linear"),
        ],
        [floats("o", 2, 4, 32, 48)],
        kernel=KERNEL, third=np.asarray([2]), end=np.asarray([4]), ones=np.ones(2, SINGLE),
        wanted=np.asarray([32, 48], SINGLE),
    ),
    "a count past what fp16 has": make(
        [
            node("Resize", ["x", "", "scales"], ["large"], mode="nearest"),
            node("Shape", ["large"], ["shape"]),
            node("Cast", ["shape"], ["floats"], to=TensorProto.FLOAT),
            node("ReduceProd", ["floats"], ["count"], axes=[0], keepdims=1),
            node("Cast", ["count"], ["whole"], to=TensorProto.INT64),
            node("Reshape", ["large", "whole"], ["o"]),
        ],
        [floats("o", 2 * 3 * 160 * 160)],
        scales=np.asarray([1, 1, 10, 10], SINGLE),
    ),
    "positions past what fp16 counts": make(
        [
            node("Range", ["none", "count", "one"], ["positions"]),
            node("Cast", ["positions"], ["floats"], to=TensorProto.FLOAT),
            node("Sub", ["floats", "most"], ["before"]),
            node("ReduceMean", ["x"], ["level"], axes=[1, 2, 3], keepdims=0),
            node("Unsqueeze", ["level", "one"], ["column"]),
            node("Add", ["column", "before"], ["o"]),
        ],
        [floats("o", 2, 4)],
        none=np.int64(4093), count=np.int64(4097), one=np.int64(1), most=SINGLE(4096),
    ),
    "branches": branches(
        node("Constant", [], ["two"], value=TWO), node("Mul", ["c", "two"], ["o"])
    ),
    "branches of what has no fp16": branches(node("Max", ["c", "most"], ["o"]), most=SINGLE(0.1)),
    "branches in branches": branches(
        node(
            "If", ["yes"], ["o"],
            then_branch=helper.make_graph(
                [node("Add", ["c", "c"], ["p"])], "then", [], [floats("p", 2, 4, 16, 16)]
            ),
            else_branch=helper.make_graph(
                [node("Conv", ["x", "kernel"], ["q"], pads=[1] * 4)], "else", [],
                [floats("q", 2, 4, 16, 16)],
            ),
        )
    ),
    "half already": rework.to_fp16(make([CONV], [floats("c", 2, 4, 16, 16)], kernel=KERNEL)),
    "quantized": quantized(17),
    "quantized, of an opset that has half": quantized(19),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_any_graph_made_half_is_a_graph(name: str) -> None:
    """Half precision keeps the ports of a model, passes ONNX's checks, and answers alike."""
    model = GRAPHS[name]
    weights = {weight.name for weight in model.graph.initializer}
    ports = [p for p in (*model.graph.input, *model.graph.output) if p.name not in weights]
    rows = list(np.random.default_rng(1).normal(0, 1, (2, 3, 16, 16)).astype(np.float32))
    wanted = run(model, rows)
    half = rework.to_fp16(onnx.ModelProto.FromString(model.SerializeToString()))
    assert [*half.graph.input, *half.graph.output] == ports
    onnx.checker.check_model(half, full_check=True)
    for one, other in zip(run(half, rows), wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["a size by its shape", "a count past what fp16 has"])
def test_shapes_are_computed_in_single_precision(name: str) -> None:
    """TensorRT computes shapes in no fp16: nothing on the way from a shape to a size is half."""
    half = rework.to_fp16(onnx.ModelProto.FromString(GRAPHS[name].SerializeToString()))
    makers = {output: maker for maker in half.graph.node for output in maker.output}
    sized = next(n for n in reversed(half.graph.node) if n.op_type in ("Resize", "Reshape"))
    waiting, seen = list(sized.input[1:]), []
    while waiting:
        maker = makers.get(waiting.pop())
        if maker is not None and maker.op_type != "Shape":
            seen.append(maker)
            waiting += maker.input
    assert "Cast" in {maker.op_type for maker in seen}
    assert TensorProto.FLOAT16 not in {a.i for maker in seen for a in maker.attribute}


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("opset", [17, 19])
def test_a_quantized_model_takes_a_prologue(opset: int, is_half: bool) -> None:
    """Pixels in front of quantize/dequantize pairs, asked for in half precision or not."""
    prologue = rework.Prologue("chw", 16, 16, 3, (127.5,) * 3, (127.5,) * 3)
    levels = list(np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3), np.uint8))
    planes = [((row.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1) for row in levels]
    (wanted,) = run(quantized(opset), planes)
    model = quantized(opset)
    model = rework.prepend(rework.to_fp16(model) if is_half else model, prologue)
    assert rework.has_quantization(model)
    onnx.checker.check_model(model, full_check=True)
    (got,) = run(model, levels)
    np.testing.assert_allclose(got, wanted, atol=0.05)  # a level between two steps may go to either


def test_half_is_found_wherever_it_is() -> None:
    """A weakly typed network needs leave for fp16 where a constant or a cast says so alone."""
    one = numpy_helper.from_array(np.asarray(1, np.float16))
    assert not rework.has_half(GRAPHS["branches"])
    for inner in (
        [node("Constant", [], ["one"], value=one), node("CastLike", ["c", "one"], ["h"])],
        [node("Cast", ["c"], ["h"], to=TensorProto.FLOAT16)],
    ):
        assert rework.has_half(branches(*inner, node("Cast", ["h"], ["o"], to=TensorProto.FLOAT)))


def test_quantization_is_found(tmp_path: Path) -> None:
    """A model counts as quantized once it holds a quantize or dequantize node."""
    path = models.mlp(tmp_path / "mlp.onnx", inputs=4, hidden=8, layers=1, outputs=2)
    model = rework.load(path)
    assert not rework.has_quantization(model)
    from onnxruntime import quantization

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(np.random.default_rng(0).random((4, 1, 4), np.float32))

        def get_next(self) -> dict[str, Array] | None:
            row = next(self._rows, None)
            return None if row is None else {"data": row}

    quantization.quantize_static(path, tmp_path / "quantized.onnx", Calibration())
    assert rework.has_quantization(rework.load(tmp_path / "quantized.onnx"))


def test_a_file_that_is_no_model_is_told(tmp_path: Path) -> None:
    """What the package onnx cannot read is an EngineError with the file's name."""
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model at all")
    with pytest.raises(EngineError, match=r"`broken.onnx` cannot be read as ONNX"):
        rework.load(path)
    with pytest.raises(EngineError, match=r"`given.onnx` cannot be read as ONNX"):
        rework.load(Path("given.onnx"), b"\xff\xff\xff")
