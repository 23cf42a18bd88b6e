"""Model files that say what a model takes and gives, and compute nothing: enough for checking.

Every program under tests/errors, on the pages of the errors and in docs/language.md finds the files
it names in a folder furnished here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from onnx import TensorProto, helper, save_model

from examples.models import IR_VERSION, OPSET

Dims: TypeAlias = "Sequence[int | str | None] | None"
Port: TypeAlias = "tuple[str, str, Dims]"

DTYPES = {
    "f16": TensorProto.FLOAT16, "f32": TensorProto.FLOAT, "f64": TensorProto.DOUBLE,
    "u8": TensorProto.UINT8, "i8": TensorProto.INT8, "u16": TensorProto.UINT16,
    "i16": TensorProto.INT16, "i32": TensorProto.INT32, "i64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}  # fmt: skip

IMAGE: Port = ("data", "f32", ("N", 3, 224, 224))
LOGITS: Port = ("logits", "f32", ("N", 1000))

MODELS: dict[str, tuple[list[Port], list[Port]]] = {
    "resnet50.onnx": ([IMAGE], [LOGITS]),
    "small.onnx": ([IMAGE], [LOGITS]),
    "model.onnx": ([IMAGE], [LOGITS]),
    "models/resnet50.onnx": ([IMAGE], [LOGITS]),
    "fixed.onnx": ([("data", "f32", (4, 3, 224, 224))], [("logits", "f32", (4, 1000))]),
    "gray.onnx": ([("data", "f32", ("N", 1, 28, 28))], [("digits", "f32", ("N", 10))]),
    "levels.onnx": ([("picture", "u8", ("N", None, None, 3))], [LOGITS]),
    "ids.onnx": ([("ids", "i64", ("N", 16))], [("vector", "f32", ("N", 64))]),
    "tokens.onnx": (
        [("ids", "i64", ("N", "seq")), ("mask", "i64", ("N", "seq"))],
        [("vector", "f32", ("N", 64))],
    ),
    "vector.onnx": ([("vector", "f32", ("N", 1000))], [("score", "f32", ("N", 2))]),
    "det.onnx": (
        [("images", "f32", ("N", 3, 480, 640))],
        [("boxes", "f32", ("N", 100, 4)), ("scores", "f32", ("N", 100))],
    ),
    "pair.onnx": (
        [("left", "f32", ("N", 1000)), ("right", "f32", ("N", 1000))],
        [("score", "f32", ("N", 1))],
    ),
    "yolov8n.onnx": (
        [("images", "f32", ("N", 3, 640, 640))],
        [("output0", "f32", ("N", 84, 8400))],
    ),
    "rec.onnx": ([("x", "f32", ("N", 1, 32, 512))], [("steps", "f32", ("N", 64, 97))]),
}
TEXTS = {
    "imagenet.txt": "".join(f"class {i}\n" for i in range(1000)),
    "models/imagenet.txt": "".join(f"class {i}\n" for i in range(1000)),
    "keys.txt": "".join(f"{chr(0x61 + i % 26)}\n" for i in range(96)),
    "notes.txt": "not a model\n",
    "common.flow": "flow prep(size: int = 224) = resize(size) -> rgb -> normalize(imagenet)\n",
    "first.flow": 'use "second.flow" as second\nflow prep = second.prep\n',
    "second.flow": 'use "first.flow" as first\nflow prep = first.prep\n',
    "itself.flow": 'use "itself.flow" as itself\nflow prep = resize(224)\n',
    "post.py": """\
import numpy as np

def word(item: str) -> str:
    return item

def part(image: np.ndarray, *, side: int) -> str:
    return str(image.shape)

def both(left: str, right: str) -> str:
    return left + right

class Counter:
    def count(self, item: str) -> int: ...

count = Counter().count

def mirror(image: "image<rgb>") -> "image<rgb>":
    return image[:, ::-1]
""",
    "broken.py": "def part(image: bytes) -> str\n    return ''\n",
    "binary.py": "\0\0\0",
    "vague.py": """\
def untyped(image):
    return image

def gives_nothing(image: bytes):
    print(image)

def takes_anything(*images: bytes) -> str:
    return str(images)

def strange(image: bytes) -> complex:
    return 1j

def wrong_words(image: bytes) -> "tensor<f32, many>":
    return image

def bare(image) -> str:
    return ''

def loose(image: bytes) -> dict:
    return {}

def listed(image: bytes) -> list:
    return []

def pixels(image: Tensor) -> str:
    return ''

def numpy_words(image: bytes) -> "tensor<float32, 1000>":
    return image

@batched
def one(image: bytes) -> list[str]:
    return ''
""",
    "coroutine.py": "async def part(image: bytes) -> str:\n    return ''\n",
}


def write_model(path: Path, inputs: Sequence[Port], outputs: Sequence[Port]) -> Path:
    """Write a model that declares these inputs and outputs: (name, dtype, dimensions) each."""

    def declare(port: Port) -> Any:
        name, dtype, dims = port
        return helper.make_tensor_value_info(name, DTYPES[dtype], dims)

    nodes = [helper.make_node("Identity", [inputs[0][0]], [name]) for name, _, _ in outputs]
    graph = helper.make_graph(nodes, "standin", [*map(declare, inputs)], [*map(declare, outputs)])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a version that every ONNX Runtime we allow can read: onnx writes its newest.
    opset = [helper.make_opsetid("", OPSET)]
    save_model(helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opset), path)
    return path


def furnish(folder: Path) -> Path:
    """Write all stand-in files into a folder."""
    for name, (inputs, outputs) in MODELS.items():
        write_model(folder / name, inputs, outputs)
    for name, text in TEXTS.items():
        (folder / name).write_text(text, "utf-8")
    return folder
