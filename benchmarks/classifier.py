"""A picture classifier written out by hand: what flowlang is measured against, and its peers serve.

Knows nothing of flowlang and needs numpy, OpenCV and ONNX Runtime alone: the peers' servers import
it in an environment of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
LEVELS = [
    ((np.arange(256, dtype=np.float32) - np.float32(m)) / np.float32(s)).astype(np.float32)
    for m, s in zip(MEAN, STD, strict=True)
]


def prepare(picture: bytes) -> NDArray[np.float32]:
    """A JPEG as the model's input, float32 1x3x224x224, with what is fastest in OpenCV.

    Raises ValueError for what is no picture.
    """
    import cv2

    image: Any = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("not a picture")
    image = cv2.cvtColor(cv2.resize(image, (224, 224)), cv2.COLOR_BGR2RGB)
    out = np.empty((1, 3, 224, 224), np.float32)
    for plane, levels, target in zip(cv2.split(image), LEVELS, out[0], strict=True):
        cv2.LUT(plane, levels, dst=target)
    return out


def session(model: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session with its default options, or with this many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


class Classifier:
    """The best class of each of several pictures, as JSON gives it."""

    def __init__(self, model: Path, threads: int = 0) -> None:
        self._session = session(model, threads)

    def __call__(self, inputs: Sequence[NDArray[np.float32]]) -> list[dict[str, Any]]:
        """The answers for what `prepare` made, run as one batch."""
        batch = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        return [best_class(logits) for logits in self._session.run(None, {"data": batch})[0]]


def best_class(logits: NDArray[np.float32]) -> dict[str, Any]:
    """The class of the largest logit, and its share of the softmax."""
    powers = np.exp(logits - logits.max())
    index = int(powers.argmax())
    return {"index": index, "score": float(powers[index] / powers.sum())}
