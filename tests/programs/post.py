"""What the programs beside this file do in Python."""

from __future__ import annotations

from typing import Annotated, TypedDict

import numpy as np
from numpy.typing import NDArray

from flowlang import batched

Logits = NDArray[np.float32]


class Attributes(TypedDict):
    """What can be told of a person."""

    tall: bool
    score: float


class Label(TypedDict):
    """A class with its score."""

    index: int
    label: str
    score: float


def labels(scores: Annotated[Logits, "tensor<f32, 1000>"], top: int = 5) -> list[Label]:
    """The greatest scores, best first."""
    best = np.argsort(-scores, kind="stable")[:top].tolist()
    return [{"index": i, "label": f"class {i}", "score": float(scores[i])} for i in best]


def face(image: Annotated[Logits, "image"]) -> Annotated[Logits, "tensor<f32, 48>"]:
    """A coarse look at a picture, as a vector."""
    rows = np.array_split(image, 4, 0)
    cells = [np.array_split(row, 4, 1) for row in rows]
    return np.asarray([c.mean((0, 1)) for row in cells for c in row], np.float32).reshape(-1)


def cosine(
    a: Annotated[Logits, "tensor<f32, 48>"], b: Annotated[Logits, "tensor<f32, 48>"]
) -> float:
    """How alike two vectors are, -1 to 1."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def name(best: Label) -> str:
    """The name of a label."""
    return best["label"]


@batched
def attributes(scores: list[Annotated[Logits, "tensor<f32, 1000>"]]) -> list[Attributes]:
    """What can be told of people, of a batch at once."""
    return [{"tall": bool(s[0] > s[1]), "score": float(s.max())} for s in scores]
