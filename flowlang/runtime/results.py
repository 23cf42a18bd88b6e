"""The CPU implementation of operators on what models give: numbers, labels, lists, boxes.

Layer 3. Tensors are numpy arrays; labels, boxes and texts are plain Python. Images are the part of
`flowlang.runtime.host`, which has the table of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.diagnostics import BadRequest, EngineError, StageFailed
from flowlang.plan.graph import Node
from flowlang.plan.lines import read_lines
from flowlang.runtime import boxes
from flowlang.runtime.frame import Frame, through

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

# What an operator does to an item, given the further values its node takes.
Work: TypeAlias = Callable[..., Any]
Maker: TypeAlias = Callable[[Node, Mapping[str, Any]], Work]


def lines_of(names: Path | Sequence[str] | None) -> list[str] | None:
    """The lines of a word list; names already known as they are. Raises EngineError."""
    if not isinstance(names, Path):
        return None if names is None else list(names)
    try:
        return read_lines(names)
    except (OSError, ValueError) as error:  # it has changed since it was checked
        raise EngineError(f"`{names.name}` cannot be read: {error}") from error


def _softmax(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    def work(values: Array) -> Array:
        if not values.size:  # and no greatest
            return values.astype(np.float32)
        values = np.exp(values.astype(np.float32) - values.max(-1, keepdims=True))
        shares: Array = values / values.sum(-1, keepdims=True)
        return shares

    return work


def _sigmoid(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    def work(values: Array) -> Array:
        values = np.asarray(values, np.float32)
        small = np.exp(-abs(values))  # at most 1, so that nothing overflows
        return np.asarray(np.where(values >= 0, 1, small) / (1 + small), np.float32)

    return work


def _l2(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    def work(values: Array) -> Array:
        wide = np.asarray(values, np.float64)  # squares of what float32 holds fit
        with np.errstate(all="ignore"):
            length = np.sqrt((wide * wide).sum(-1, keepdims=True))
            return np.asarray(wide / np.where(length == 0, 1, length), np.float32)

    return work


def ranked(values: Array) -> Array:
    """The values with NaN, which a model gone wrong may give, as the least."""
    import numpy as np

    if not np.isnan(values).any():  # nearly always, and a fifth of the cost of replacing none
        return values
    return np.nan_to_num(values, nan=-np.inf, posinf=np.inf, neginf=-np.inf)


def top_places(values: Array, count: int) -> Array:
    """Where the greatest values are, at most so many, from the greatest on. NaN is the least.

    Of equals the first comes first.
    """
    import numpy as np

    order = ranked(values)
    count = min(count, len(order))
    if not count:
        return np.empty(0, np.int64)
    least = np.partition(order, len(order) - count)[len(order) - count]
    last_first = np.flatnonzero(order >= least)[::-1]
    by_rank = np.argsort(order[last_first], kind="stable")  # not of -order: what is unsigned wraps
    return last_first[by_rank][::-1][:count]


def _check_choice(values: Array) -> None:
    """Raises BadRequest where there is no value to choose: none came, or none came of it."""
    if values.ndim and not values.shape[-1]:
        raise BadRequest(f"there is no greatest value in an array of shape {values.shape}")


def _argmax(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    def work(values: Array) -> Any:
        _check_choice(values)
        places = ranked(values).argmax(-1)
        return int(places) if values.ndim == 1 else np.asarray(places, np.int64)

    return work


def label(index: int, score: float, names: list[str] | None) -> dict[str, Any]:
    """A label, by its name where there is one."""
    return {"index": index, "label": boxes.name_of(index, names), "score": score}


def _top(node: Node, settings: Mapping[str, Any]) -> Work:
    of_list = _top_of_list(node)
    if node.params.get("by") is not None:
        return of_list
    names = lines_of(node.params["names"])
    k = node.params["k"]

    def work(values: Any) -> list[Any]:
        if isinstance(values, list):
            return list(of_list(values))
        places = top_places(values, k).tolist()
        return [label(i, float(values[i]), names) for i in places]

    return work


def _top_of_list(node: Node) -> Work:
    k, by = node.params["k"], node.params.get("by") or (lambda element: element)

    def key(value: Any) -> tuple[bool, Any]:
        is_known = value is not None and value == value  # NaN is not itself
        return (True, value) if is_known else (False, 0)

    def work(elements: list[Any], *values: Any) -> list[Any]:
        return sorted(elements, key=lambda e: key(by(e, *values)), reverse=True)[:k]

    return work


def _labels(node: Node, settings: Mapping[str, Any]) -> Work:
    import numpy as np

    names, least = lines_of(node.params["names"]), node.params["min"]

    def work(values: Array) -> list[dict[str, Any]]:
        found = np.flatnonzero(values >= least)
        order = found[np.argsort(-values[found], kind="stable")]
        return [label(i, float(values[i]), names) for i in order.tolist()]

    return work


def _best(node: Node, settings: Mapping[str, Any]) -> Work:
    names = lines_of(node.params["names"])

    def work(values: Array) -> dict[str, Any]:
        _check_choice(values)
        index = int(ranked(values).argmax())
        return label(index, float(values[index]), names)

    return work


def _ctc(node: Node, settings: Mapping[str, Any]) -> Work:
    keys = ["", *(lines_of(node.params["keys"]) or ())]
    is_scored = node.params.get("scored", False)

    def work(steps: Array) -> Any:
        _check_choice(steps)
        if steps.shape[-1] > len(keys):
            raise StageFailed(
                f"the model knows {steps.shape[-1]} classes and `keys` names {len(keys) - 1}"
            )
        best = steps.argmax(-1).tolist()
        kept = [i for i, b in enumerate(best) if b and (i == 0 or b != best[i - 1])]
        text = "".join(keys[best[i]] for i in kept)
        if not is_scored:
            return text
        score = sum(float(steps[i, best[i]]) for i in kept) / len(kept) if kept else 0.0
        return {"text": text, "score": score}

    return work


def _filter(node: Node, settings: Mapping[str, Any]) -> Work:
    holds = node.params["condition"]
    return lambda elements, *values: [e for e in elements if holds(e, *values)]


def _select(node: Node, settings: Mapping[str, Any]) -> Work:
    return lambda elements, flags: [e for e, f in zip(elements, flags, strict=True) if f]


def _join(node: Node, settings: Mapping[str, Any]) -> Work:
    separator = node.params["separator"]
    return lambda texts: separator.join(t for t in texts if t is not None)


def _boxes(node: Node, settings: Mapping[str, Any]) -> Work:
    params = node.params
    head, iou, names = params["head"], params["iou"], lines_of(params.get("names"))
    if head == "db":
        return _text_boxes(node)
    conf, most = _or(params["conf"], 0.25), _or(params["max"], 256)
    frame_for, fixed = _framing(node), _input_size(node)

    def work(output: Any, *source: Any) -> list[dict[str, Any]]:
        frame = frame_for(*source)
        size = (frame.height, frame.width) if frame is not None else fixed
        found = boxes.find(head, output, conf, size, names)
        return boxes.detections(boxes.suppress_overlaps(found, iou, most), frame, names)

    return work


def _text_boxes(node: Node) -> Work:
    from flowlang.runtime.text_boxes import text_quads

    params = node.params
    conf, most = _or(params["conf"], 0.5), _or(params["max"], 1000)
    threshold, unclip = _or(params["threshold"], 0.3), _or(params["unclip"], 1.6)
    frame_for = _framing(node)

    def work(output: Any, *source: Any) -> list[dict[str, Any]]:
        frame, levels = frame_for(*source), boxes.probabilities(output)
        quads = text_quads(levels, threshold=threshold, conf=conf, unclip=unclip, most=most)
        return boxes.text_lines(quads, levels.shape, frame)

    return work


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _framing(node: Node) -> Callable[..., Frame | None]:
    """From a source to the frame of what the model saw of it; None where the chain is not known."""
    chain = node.params.get("chain")
    return (lambda *_: None) if chain is None else (lambda source: through(chain, source))


def _input_size(node: Node) -> tuple[int, int] | None:
    """Height and width of the images that the model before takes, where it says so."""
    model = node.inputs[0].model if node.inputs else None
    for port in model.inputs if model is not None else ():
        shape = port.item.shape
        if shape is not None and len(shape) == 3:
            height, width = shape[:2] if shape[2] in (1, 3) else shape[1:]
            return (height, width) if height and width else None
    return None


MAKERS: Mapping[str, Maker] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "l2": _l2,
    "argmax": _argmax,
    "labels": _labels,
    "top": _top,
    "best": _best,
    "ctc": _ctc,
    "filter": _filter,
    "select": _select,
    "join": _join,
    "boxes": _boxes,
}
