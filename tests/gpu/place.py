"""What the tests on a GPU load and hold it against, and how far it may be from that.

Where a file is decoded matters to its pixels, so models are held to tight limits on pixels decoded
on the host, and DALI's decoding is held to its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from flowlang import App, load
from tests.regions import cells_of, on_host, region_of

Array: TypeAlias = NDArray[Any]

# The `pytestmark` of every file here.
ON_GPU = [
    pytest.mark.gpu,
    # What NVIDIA's packages warn of is theirs to mend; a thread that dies is ours.
    pytest.mark.filterwarnings("default", "error::pytest.PytestUnhandledThreadExceptionWarning"),
]
LONG_S = 60.0
CELLS = 'decode -> resize(64) -> rgb -> trt("chw.onnx", batch=1..32) x{}'
CLASSIFY = (
    'decode{} -> resize(224) -> rgb -> normalize(imagenet) -> trt("{}.onnx", {}, batch=1..4..16) x1'
)
# A decoder's differences shrink in the mean over a cell of 64 pixels.
CELL_LEVELS = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the models of these tests are, and the engines made of them."""

    models: Path
    engines: Path

    def load(self, text: str, name: str = "test", engines: Path | None = None) -> App:
        path = self.models / f"{name}.flow"
        path.write_text(text, "utf-8")
        return load(path, device="gpu", engines=engines or self.engines)


def decoded(data: bytes) -> Array:
    """The pixels of a picture file as OpenCV sees them: blue, green, red."""
    image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return np.asarray(image)


def run_directly(path: Path, **feeds: Array) -> dict[str, Array]:
    """What ONNX Runtime says in single precision on the host, asked without anything of ours."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def cells_on_host(place: Place, files: Iterable[bytes], text: str = CELLS) -> list[Array]:
    """What the models of `write_models` must answer for pictures, by the reference operators."""
    nodes = region_of(text.format(1), place.models)[:-1]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda data: cells_of(on_host(nodes, data)), files))


def relative(got: Array, wanted: Array) -> float:
    """The length of the difference over the length of what is wanted."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
