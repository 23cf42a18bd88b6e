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
from onnx import TensorProto, helper

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
