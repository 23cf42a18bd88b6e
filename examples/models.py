"""Makes the ONNX models that the examples, tests and benchmarks run, and pictures to run them on.

Networks come from a seed, so nothing large is stored and the same arguments give the same bytes.
Weights are random: a classifier tells pictures apart, but its class names mean nothing.

    python examples/models.py classifier DIR   # classifier.onnx, classes.txt
    python examples/models.py text DIR         # text models out of the installed rapidocr package
    python examples/models.py pictures DIR     # photographs and lines of print out of scikit-image
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from PIL import Image

Dim: TypeAlias = "int | str"

OPSET = 17
IR_VERSION = 8
# Part of every recipe: raise it when a generator's output changes, so that old files are remade.
GENERATION = 2
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
# Measured on photographs: brings the standard deviation of a picture's logits to about 2.
HEAD_GAIN = {18: 0.45, 50: 0.7}
# Small corrections of what passes by, as trained residual branches are; at 1 a network of fifty
# layers is chaotic: a tenth of a level at its input changes the whole of its answer.
BRANCH_GAIN = 0.25
# The standard deviation over inputs of relu(x) for a standard normal x.
RELU_STD = math.sqrt(0.5 - 0.5 / math.pi)
TEXT_MODELS = {
    "text_detection.onnx": "*_det_*.onnx",
    "text_recognition.onnx": "*_rec_*.onnx",
    "text_orientation.onnx": "*_cls_*.onnx",
}
ORIENTATIONS = ("upright", "upside down")
PHOTOGRAPHS = {"cat.jpg": "chelsea.png", "coffee.jpg": "coffee.png", "rocket.jpg": "rocket.jpg"}
LINE = (4, 10, 294, 34)  # of page.png: left, top, right, bottom of its headline


class Network:
    """A growing graph with seeded weights; methods return the name of the tensor they add."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[Dim]) -> str:
        """Declare a float32 input."""
        self._inputs.append(_float_port(name, shape))
        return name

    def output(self, name: str, shape: Sequence[Dim]) -> None:
        """Declare the tensor `name` as a float32 output."""
        self._outputs.append(_float_port(name, shape))

    def node(self, op: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Append one node; `name` names its result."""
        from onnx import helper

        result = name or f"{op.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [result], **attributes))
        return result

    def conv(
        self, source: str, cin: int, cout: int, kernel: int, stride: int = 1, gain: float = 1.0
    ) -> str:
        """Append a convolution with bias, as batch normalisation leaves one when folded.

        Filters are smooth, as trained ones are: random ones answer to noise more than to pictures.
        """
        weight = _smoothed(self._balanced((cout, cin, kernel, kernel))) * gain
        bias = self._random.standard_normal(cout, dtype="float32") * 0.05
        inputs = (source, self._weight("w", weight), self._weight("b", bias))
        pads = [kernel // 2] * 4
        return self.node("Conv", inputs, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)

    def dense(self, source: str, cin: int, cout: int, name: str = "", gain: float = 1.0) -> str:
        """Append a fully connected layer; `gain` scales its result."""
        weight = self._balanced((cout, cin)) * gain
        bias = self._random.standard_normal(cout, dtype="float32") * 0.05
        inputs = (source, self._weight("w", weight), self._weight("b", bias))
        return self.node("Gemm", inputs, name, transB=1)

    def relu(self, source: str) -> str:
        """Append a rectifier."""
        return self.node("Relu", [source])

    def pooled(self, source: str) -> str:
        """Append an average over height and width: [N, C, H, W] -> [N, C]."""
        return self.node("Flatten", [self.node("GlobalAveragePool", [source])], axis=1)

    def flat(self, source: str, rows: int, columns: int) -> str:
        """Append a change of shape to [N, rows, columns]."""
        import numpy as np

        shape = np.asarray([0, rows, columns], "int64")
        return self.node("Reshape", [source, self._constant("shape", shape)])

    def spread(self, values: np.ndarray[Any, Any], like: str) -> str:
        """Append a constant [rows, columns], once for each item of the batch of `like`."""
        import numpy as np

        # Zero times the mean of the item: the batch is known only when the graph runs.
        mean = self.node("ReduceMean", [like], axes=[1, 2], keepdims=0)
        mean = self.node("ReduceMean", [mean], axes=[1], keepdims=1)
        nothing = self.node("Mul", [mean, self._weight("zero", np.zeros(1))])
        nothing = self.flat(nothing, 1, 1)
        return self.node("Add", [nothing, self._weight("grid", values[None])])

    def model(self, recipe: str) -> onnx.ModelProto:
        """Close the graph; `recipe` goes into the model's doc string."""
        from onnx import helper

        graph = helper.make_graph(
            self._nodes, "examples", self._inputs, self._outputs, initializer=self._weights
        )
        return helper.make_model(
            graph,
            producer_name="flowlang-examples",
            doc_string=recipe,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )

    def _constant(self, prefix: str, array: np.ndarray[Any, Any]) -> str:
        from onnx import numpy_helper

        name = f"{prefix}_{len(self._nodes)}"
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def _weight(self, prefix: str, array: np.ndarray[Any, Any]) -> str:
        return self._constant(prefix, array.astype("float32"))

    def _balanced(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """He's initialisation with every filter summing to zero.

        Rectified inputs share a positive mean, which random filters carry to the head until all
        pictures score alike; a filter that sums to zero removes it, as batch normalisation would.
        """
        weight = self._random.standard_normal(shape, dtype="float32")
        axes = tuple(range(1, len(shape)))
        weight -= weight.mean(axis=axes, keepdims=True)
        return weight / (RELU_STD * math.sqrt(math.prod(shape[1:])))


def _smoothed(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Filters blurred over height and width, their norms kept."""
    import numpy as np

    side = weight.shape[-1]
    if side == 1:
        return weight
    distance = np.arange(side)[:, None] - np.arange(side)
    blur = np.exp(-0.5 * (distance / (side / 5)) ** 2).astype("float32")
    smooth = np.einsum("oihw,hy,wx->oiyx", weight, blur, blur)
    axes = (1, 2, 3)
    smooth -= smooth.mean(axis=axes, keepdims=True)
    norm = np.sqrt((weight**2).sum(axis=axes, keepdims=True))
    return np.asarray(smooth * norm / np.sqrt((smooth**2).sum(axis=axes, keepdims=True)), "float32")


def resnet(
    path: str | Path,
    *,
    depth: int = 18,
    width: int = 16,
    classes: int = 1000,
    size: int = 224,
    seed: int = 0,
    batch: Dim = "N",
    input_name: str = "data",
    output_name: str = "logits",
) -> Path:
    """Write a ResNet: float32 [batch, 3, size, size], normalised RGB -> float32 [batch, classes].

    `depth` is 18 or 50; `width` is the first stage's channel count (64 in the paper).
    Raises ValueError for another depth.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth must be one of {sorted(BLOCKS)}, not {depth}")
    recipe = _recipe("resnet", depth, width, classes, size, seed, batch, input_name, output_name)

    def build() -> onnx.ModelProto:
        network = Network(seed)
        source = network.input(input_name, (batch, 3, size, size))
        features, channels = _residual_stages(network, source, depth, width)
        pooled = network.pooled(features)
        network.dense(pooled, channels, classes, output_name, gain=HEAD_GAIN[depth])
        network.output(output_name, (batch, classes))
        return network.model(recipe)

    return _write(path, recipe, build)


def _residual_stages(network: Network, source: str, depth: int, width: int) -> tuple[str, int]:
    """Append the stem and four stages; return the features' name and channel count."""
    features = network.relu(network.conv(source, 3, width, 7, stride=2))
    features = network.node(
        "MaxPool", [features], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
    )
    block = _plain_block if depth == 18 else _bottleneck
    channels = width
    for stage, count in enumerate(BLOCKS[depth]):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            features, channels = block(network, features, channels, width << stage, stride)
    return features, channels


def _plain_block(
    network: Network, source: str, cin: int, width: int, stride: int
) -> tuple[str, int]:
    branch = network.relu(network.conv(source, cin, width, 3, stride))
    branch = network.conv(branch, width, width, 3, gain=BRANCH_GAIN)
    return _joined(network, source, branch, cin, width, stride)


def _bottleneck(
    network: Network, source: str, cin: int, width: int, stride: int
) -> tuple[str, int]:
    branch = network.relu(network.conv(source, cin, width, 1))
    branch = network.relu(network.conv(branch, width, width, 3, stride))
    branch = network.conv(branch, width, width * 4, 1, gain=BRANCH_GAIN)
    return _joined(network, source, branch, cin, width * 4, stride)


def _joined(
    network: Network, source: str, branch: str, cin: int, cout: int, stride: int
) -> tuple[str, int]:
    if stride != 1 or cin != cout:
        source = network.conv(source, cin, cout, 1, stride)
    return network.relu(network.node("Add", [branch, source])), cout


def mlp(
    path: str | Path, *, inputs: int, hidden: int, layers: int, outputs: int, seed: int = 0
) -> Path:
    """Write a perceptron with `layers` hidden layers: `data` [N, inputs] -> `logits` [N, outputs].

    Its time goes into reading weights, so it gains from batching on a CPU; ResNets do not.
    """
    recipe = _recipe("mlp", inputs, hidden, layers, outputs, seed)

    def build() -> onnx.ModelProto:
        network = Network(seed)
        features, width = network.input("data", ("N", inputs)), inputs
        for _ in range(layers):
            features, width = network.relu(network.dense(features, width, hidden)), hidden
        network.dense(features, width, outputs, "logits")
        network.output("logits", ("N", outputs))
        return network.model(recipe)

    return _write(path, recipe, build)


def identity(path: str | Path, shape: Sequence[Dim]) -> Path:
    """Write a model that answers its float32 input `data` unchanged as `result`."""
    recipe = _recipe("identity", *shape)

    def build() -> onnx.ModelProto:
        network = Network(0)
        network.node("Identity", [network.input("data", shape)], "result")
        network.output("result", shape)
        return network.model(recipe)

    return _write(path, recipe, build)


def two_heads(path: str | Path, *, size: int = 64, seed: int = 0) -> Path:
    """Write `data` [N, 3, size, size] -> `scores` [N, 10] and `embedding` [N, 16]."""
    recipe = _recipe("two_heads", size, seed)

    def build() -> onnx.ModelProto:
        network = Network(seed)
        source = network.input("data", ("N", 3, size, size))
        pooled = network.pooled(network.relu(network.conv(source, 3, 32, 3, stride=2)))
        network.dense(pooled, 32, 10, "scores", gain=2.0)
        network.dense(pooled, 32, 16, "embedding")
        network.output("scores", ("N", 10))
        network.output("embedding", ("N", 16))
        return network.model(recipe)

    return _write(path, recipe, build)


def two_inputs(path: str | Path, *, size: int = 64, seed: int = 0) -> Path:
    """Write `image` [N, 3, size, size] and `features` [N, 8] -> `scores` [N, 10]."""
    recipe = _recipe("two_inputs", size, seed)

    def build() -> onnx.ModelProto:
        network = Network(seed)
        image = network.input("image", ("N", 3, size, size))
        features = network.input("features", ("N", 8))
        pooled = network.pooled(network.relu(network.conv(image, 3, 32, 3, stride=2)))
        both = network.node("Concat", [pooled, features], axis=1)
        network.dense(both, 40, 10, "scores", gain=2.0)
        network.output("scores", ("N", 10))
        return network.model(recipe)

    return _write(path, recipe, build)


def detector(
    path: str | Path,
    *,
    head: str = "yolov8",
    side: int = 640,
    classes: Sequence[str] = ("person", "dog", "car", "bus", "truck"),
    seed: int = 0,
) -> Path:
    """Write a detector: `images` [N, 3, side, side] -> `output0`, laid out as its head gives it.

    It sees in cells of 8, 16 and 32 pixels. What it reports is a matter of brightness and colour,
    so that different pictures give different boxes; the boxes have the size of a few cells. `head`
    is yolov8 (4 + classes rows, a column for each cell) or yolox (a row for each cell of offsets,
    logarithms of sizes, objectness and classes). The class names stand in the metadata.
    """
    recipe = _recipe("detector", head, side, *classes, seed)

    def build() -> onnx.ModelProto:
        network = Network(seed)
        source = network.input("images", ("N", 3, side, side))
        parts = [_cells(network, source, head, side, step, len(classes)) for step in (8, 16, 32)]
        joined = network.node("Concat", parts, "output0" if head == "yolov8" else "", axis=2)
        cells = sum((side // step) ** 2 for step in (8, 16, 32))
        if head == "yolov8":
            network.output("output0", ("N", 4 + len(classes), cells))
        else:
            network.node("Transpose", [joined], "output0", perm=[0, 2, 1])
            network.output("output0", ("N", cells, 5 + len(classes)))
        model = network.model(recipe)
        entry = model.metadata_props.add()
        entry.key, entry.value = "names", str(dict(enumerate(classes)))
        return model

    return _write(path, recipe, build)


def _cells(network: Network, source: str, head: str, side: int, step: int, classes: int) -> str:
    """Boxes and scores of one size of cells: [N, rows, cells]."""
    import numpy as np

    across = side // step
    seen = network.node("AveragePool", [source], kernel_shape=[step] * 2, strides=[step] * 2)
    scores = network.node("Sigmoid", [network.conv(seen, 3, classes, 1, gain=8.0 / step)])
    scores = network.flat(scores, classes, across * across)
    grid = np.stack(np.meshgrid(np.arange(across), np.arange(across)), 0).reshape(2, -1)
    if head == "yolov8":
        boxes = np.concatenate([(grid + 0.5) * step, np.full_like(grid, 3 * step)])
        parts = [network.spread(boxes, source), scores]
    else:
        inside = np.concatenate([np.full(grid.shape, 0.5), np.full(grid.shape, np.log(3.0))])
        parts = [network.spread(inside, source), network.spread(np.ones_like(grid[:1]), source)]
        parts.append(scores)
    return network.node("Concat", parts, axis=1)


def recogniser(
    path: str | Path, *, height: int = 32, width: int = 512, classes: int = 97, seed: int = 0
) -> Path:
    """Write a reader of lines: `x` [N, 1, height, width] -> `steps` [N, width / 8, classes]."""
    recipe = _recipe("recogniser", height, width, classes, seed)

    def build() -> onnx.ModelProto:
        network = Network(seed)
        source = network.input("x", ("N", 1, height, width))
        cell = [height, 8]
        columns = network.node("AveragePool", [source], kernel_shape=cell, strides=cell)
        values = network.flat(network.conv(columns, 1, classes, 1, gain=0.02), classes, width // 8)
        rows = network.node("Transpose", [values], perm=[0, 2, 1])
        network.node("Softmax", [rows], "steps", axis=2)
        network.output("steps", ("N", width // 8, classes))
        return network.model(recipe)

    return _write(path, recipe, build)


def labels(path: str | Path, count: int = 1000) -> Path:
    """Write `count` class names, one a line: `class 0`, `class 1` and so on."""
    text = "".join(f"class {number}\n" for number in range(count))
    return _replace(path, text.encode())


def classifier(folder: str | Path) -> list[Path]:
    """Write what `classify.flow` needs: `classifier.onnx` and `classes.txt`."""
    root = Path(folder)
    return [resnet(root / "classifier.onnx"), labels(root / "classes.txt")]


def text(folder: str | Path) -> list[Path]:
    """Copy the text models of the installed `rapidocr` package, and write what classes mean.

    Line k (from 1) of `text_keys.txt` is the character of class k. Class 0 of the recogniser is
    the CTC blank and has no line; its last class is the space, which is the file's last line.
    `text_orientations.txt` names the two classes of the orientation model.
    Raises RuntimeError if rapidocr is missing or carries other models.
    """
    source = _folder_of("rapidocr", "models")
    copied = []
    for name, pattern in TEXT_MODELS.items():
        found = sorted(source.glob(pattern))
        if len(found) != 1:
            raise RuntimeError(f"expected one {pattern} in {source}, found {len(found)}")
        copied.append(_replace(Path(folder) / name, found[0].read_bytes()))
    keys = "".join(f"{key}\n" for key in recogniser_keys(Path(folder) / "text_recognition.onnx"))
    orientations = "".join(f"{name}\n" for name in ORIENTATIONS)
    return [
        *copied,
        _replace(Path(folder) / "text_keys.txt", keys.encode()),
        _replace(Path(folder) / "text_orientations.txt", orientations.encode()),
    ]


def recogniser_keys(path: str | Path) -> list[str]:
    """Read a recogniser's characters out of its metadata, and append the space."""
    import onnx

    for entry in onnx.load(path).metadata_props:
        if entry.key == "character":
            # Not splitlines: the list holds characters which that counts as line ends.
            return [*entry.value.rstrip("\n").split("\n"), " "]
    raise RuntimeError(f"{path} has no `character` entry in its metadata")


def pictures(folder: str | Path) -> list[Path]:
    """Write three photographs, a page of print, and one of its lines upright and upside down.

    They come out of the installed scikit-image package. Raises RuntimeError if it is missing.
    """
    from PIL import Image

    source = _folder_of("skimage", "data")
    made = []
    for name, original in PHOTOGRAPHS.items():
        with Image.open(source / original) as photograph:
            made.append(_save(Path(folder) / name, photograph.convert("RGB"), "JPEG"))
    with Image.open(source / "page.png") as page:
        line = page.crop(LINE)
        made.append(_save(Path(folder) / "page.png", page, "PNG"))
    made.append(_save(Path(folder) / "line.png", line, "PNG"))
    made.append(_save(Path(folder) / "line_upside_down.png", line.rotate(180), "PNG"))
    return made


def _save(path: Path, image: Image.Image, form: str) -> Path:
    image.info = {}  # page.png carries a colour profile that is out of order
    out = io.BytesIO()
    image.save(out, form, quality=90)
    return _replace(path, out.getvalue())


def _folder_of(package: str, folder: str) -> Path:
    # Found without importing it: that pulls in packages which copying files does not need.
    import importlib.util

    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package} is not installed: run `make setup`")
    return Path(spec.origin).parent / folder


def _float_port(name: str, shape: Sequence[Dim]) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _recipe(kind: str, *arguments: Dim) -> str:
    return "flowlang-examples " + json.dumps([GENERATION, kind, *arguments])


def _write(path: str | Path, recipe: str, build: Callable[[], onnx.ModelProto]) -> Path:
    """Write the model unless `path` already holds one with this recipe."""
    target = Path(path)
    if target.is_file():
        with target.open("rb") as file:
            # The doc string is serialised ahead of the graph, so the weights need not be read.
            if recipe.encode() in file.read(1024):
                return target
    return _replace(target, build().SerializeToString(deterministic=True))


def _replace(path: str | Path, content: bytes) -> Path:
    """Write through a temporary file, so that no reader sees half of one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


COMMANDS: dict[str, Callable[[Path], list[Path]]] = {
    "classifier": classifier,
    "text": text,
    "pictures": pictures,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the models and pictures of the examples.")
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    for path in COMMANDS[arguments.what](arguments.folder):
        print(path)


if __name__ == "__main__":
    main()
