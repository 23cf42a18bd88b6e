"""Chains of image operators, and how far DALI may be from the reference operators in each.

The tests of DALI's CPU backend and those of the GPU run the same chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flowlang.diagnostics import Source
from flowlang.plan.check import compile_source
from flowlang.plan.graph import Node
from flowlang.plan.physical import Machine, PhysicalPlan, lower
from flowlang.runtime.dali import Region
from flowlang.runtime.gpu import is_decoded
from flowlang.runtime.host import work_of
from flowlang.runtime.picture import read_picture
from flowlang.runtime.vision import as_bmp

Array: TypeAlias = NDArray[Any]

# How far a GPU's JPEG decoder may be from libjpeg-turbo's: anywhere, and over all pictures on
# average. It is furthest off at edges, and a part of a picture may have little else.
JPEG_LEVELS, JPEG_MEAN = 6.0, 0.7


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain and its tolerance: the greatest and the mean difference, in levels.

    `step` is what one level becomes at the chain's end; `slack` what rounding adds there.
    """

    text: str
    most: float = 0.0
    mean: float = 0.0
    step: float = 1.0
    slack: float = 0.0

    def check(self, got: Sequence[Array], wanted: Sequence[Array], *, jpeg: bool) -> None:
        """Raise AssertionError where what the chain made of pictures is further apart than it may
        be.
        """
        apart = [self._apart(mine, theirs) for mine, theirs in zip(got, wanted, strict=True)]
        limit = (self.most + JPEG_LEVELS * jpeg) * self.step + self.slack
        most = max(float(each.max()) for each in apart)
        assert most <= limit, f"{self.text}: {most:g} apart, {limit:g} at most"
        if jpeg:
            apart = [np.concatenate([each.ravel() for each in apart])]
        limit = (self.mean + JPEG_MEAN * jpeg) * self.step + self.slack
        mean = max(float(each.mean()) for each in apart)
        assert mean <= limit, f"{self.text}: {mean:g} apart on average, {limit:g} at most"

    @staticmethod
    def _apart(got: Array, wanted: Array) -> Array:
        assert str(got.dtype) == str(wanted.dtype)
        assert got.size == wanted.size, (got.shape, wanted.shape)
        return abs(got.astype(np.float64).reshape(wanted.shape) - wanted.astype(np.float64))


def _resize(text: str) -> Chain:
    return Chain(f"decode -> {text}", 1, 0.25)


# Levels are normalized in single precision: 1e-6 of values that stay below 3.
_FLOATS = 4e-6
CHAINS = (
    Chain("decode"),
    Chain("decode -> rgb"),
    Chain("decode -> bgr"),
    Chain("decode -> gray", 1, 0.1),
    Chain("decode -> rgb -> bgr"),
    Chain("decode -> rgb -> gray", 1, 0.1),
    _resize("resize(224)"),
    _resize("resize(640)"),
    _resize("resize(h=96, w=160)"),
    _resize("resize(h=101)"),
    _resize("resize(w=333)"),
    _resize("resize(256, fit=shorter)"),
    _resize("resize(225, fit=letterbox)"),
    _resize("resize(h=300, w=200, fit=letterbox, fill=0)"),
    _resize("resize(h=200, w=301, fit=pad) -> rgb"),
    _resize("resize(256, fit=shorter) -> crop(224) -> rgb"),
    Chain("decode -> resize(224, antialias)", 1, 0.01),
    Chain("decode -> resize(97, fit=letterbox, antialias)", 1, 0.01),
    Chain("decode -> crop(101)"),
    Chain("decode -> crop(h=64)"),
    Chain("decode -> crop(h=33, w=90) -> bgr"),
    Chain("decode -> resize(64) -> gray", 2, 0.4),
    Chain("decode -> gray -> resize(64)", 2, 0.4),
    Chain("decode -> rgb -> normalize(imagenet)", step=1 / 57, slack=_FLOATS),
    Chain("decode -> bgr -> normalize(imagenet)", step=1 / 57, slack=_FLOATS),
    Chain("decode -> gray -> normalize(imagenet)", 1, 0.1, 1 / 57, _FLOATS),
    Chain("decode -> rgb -> normalize(unit)", step=1 / 255, slack=_FLOATS),
    Chain("decode -> resize(64) -> rgb -> normalize(signed)", 1, 0.25, 1 / 127, _FLOATS),
    Chain("decode -> rgb -> normalize(mean=[10, 20, 30], std=[50, 60, 70])", step=1 / 50,
          slack=2e-5),
    Chain('decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("chw.onnx")', 1, 0.25,
          1 / 57, _FLOATS),
    Chain('decode -> resize(64) -> bgr -> normalize(imagenet) -> trt("hwc.onnx")', 1, 0.25,
          1 / 57, _FLOATS),
    Chain('decode -> resize(64) -> gray -> normalize(unit) -> trt("gray.onnx")', 2, 0.4,
          1 / 255, _FLOATS),
    Chain('decode -> resize(64) -> rgb -> normalize(unit) -> trt("half.onnx")', 1, 0.25,
          1 / 255, 1e-3),
    Chain('decode -> resize(64) -> rgb -> trt("chw.onnx")', 1, 0.25),
    Chain('decode -> resize(64) -> rgb -> trt("levels.onnx")', 1, 0.25),
    Chain('decode -> resize(64) -> rgb -> trt("levels_chw.onnx")', 1, 0.25),
)  # fmt: skip


def write_models(folder: Path) -> Path:
    """The models that the chains name: each takes a picture of 64x64 in a way of its own."""
    from onnx import TensorProto

    chw, hwc = ("N", 3, 64, 64), ("N", 64, 64, 3)
    write_taker(folder / "chw.onnx", TensorProto.FLOAT, chw)
    write_taker(folder / "hwc.onnx", TensorProto.FLOAT, hwc)
    write_taker(folder / "gray.onnx", TensorProto.FLOAT, ("N", 1, 64, 64))
    write_taker(folder / "half.onnx", TensorProto.FLOAT16, chw)
    write_taker(folder / "levels.onnx", TensorProto.UINT8, hwc)
    write_taker(folder / "levels_chw.onnx", TensorProto.UINT8, chw)
    return folder


def write_taker(path: Path, kind: int, shape: Sequence[int | str]) -> Path:
    """Write a model that averages `data` of one shape and dtype in cells of 8x8 to `cells`, f32.

    [N, C, H, W] or [N, H, W, C] -> [N, C * H * W / 64], so an answer shows which picture it is of.
    """
    import onnx
    from onnx import TensorProto, helper

    sides = list(shape)
    nodes = [helper.make_node("Cast", ["data"], ["floats"], to=TensorProto.FLOAT)]
    if sides[-1] == 3:
        nodes.append(helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]))
        sides = [sides[0], sides[3], sides[1], sides[2]]
    nodes.append(
        helper.make_node(
            "AveragePool", [nodes[-1].output[0]], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]
        )
    )
    nodes.append(helper.make_node("Flatten", ["pooled"], ["cells"], axis=1))
    count = int(sides[1]) * int(sides[2]) * int(sides[3]) // 64
    graph = helper.make_graph(
        nodes,
        "taker",
        [helper.make_tensor_value_info("data", kind, list(shape))],
        [helper.make_tensor_value_info("cells", TensorProto.FLOAT, [sides[0], count])],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)
    return path


def cells_of(image: Array) -> Array:
    """What those models answer for an image of height x width x 3: float32."""
    rows, columns = image.shape[0] // 8, image.shape[1] // 8
    blocks = image.astype(np.float32).reshape(rows, 8, columns, 8, -1).mean((1, 3))
    return np.asarray(blocks.transpose(2, 0, 1).reshape(-1))


def gpu_plan(text: str, folder: Path) -> PhysicalPlan:
    """The physical plan of a flow for a machine with one GPU; none is needed to make it."""
    source = Source(str(folder / "test.flow"), text)
    return lower([compile_source(source)], Machine(4, "gpu", (0,)))


def region_of(text: str, folder: Path) -> list[Node]:
    """The image operators of a flow of one stage, and the packing for its model."""
    (stage,) = gpu_plan(text, folder).stages
    return list(stage.region)


def on_host(nodes: Sequence[Node], data: bytes) -> Array:
    """What the reference operators make of a picture file."""
    value: Any = data
    for node in nodes:
        value = work_of(node, {})(value)
    return np.asarray(value)


def in_dali(region: Region, files: Sequence[bytes]) -> list[Array]:
    """What a region makes of picture files, brought to the host."""
    return arrays(region.run(files))


def arrays(result: Any) -> list[Array]:
    """A region's result as one array a picture."""
    if hasattr(result, "as_cpu"):
        result = result.as_cpu()
    return [np.array(result.at(i)) for i in range(len(result))]


def decodable(data: bytes) -> bytes:
    """The file as a GPU instance hands it to DALI: what that cannot decode becomes a bitmap."""
    picture = read_picture(data)
    return data if is_decoded(picture) else as_bmp(data, picture)
