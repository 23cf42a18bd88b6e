"""Operators on what models give, for all rows of a batch at once.

Layer 3. Each gives for every row what its counterpart in `flowlang.runtime.results` gives for it
alone. Ten calls of numpy for a row cost more than the row; for sixty-four they cost it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from flowlang.plan.graph import Node
from flowlang.runtime import results
from flowlang.runtime.results import label, lines_of, ranked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

RowWork: TypeAlias = "Callable[[Array], Sequence[Any] | None]"
"""Takes the rows of a batch and gives the value of each; None where it can only be done singly."""


def _argmax(node: Node) -> RowWork:
    return lambda rows: ranked(rows).argmax(-1).tolist() if rows.ndim == 2 else None


def _best(node: Node) -> RowWork:
    names = lines_of(node.params["names"])

    def work(rows: Array) -> list[Any] | None:
        import numpy as np

        if rows.ndim != 2:
            return None
        places = ranked(rows).argmax(-1)
        scores = np.take_along_axis(rows, places[:, None], 1)[:, 0]
        return [label(i, s, names) for i, s in zip(places.tolist(), scores.tolist(), strict=True)]

    return work


def _top(node: Node) -> RowWork:
    names, k = lines_of(node.params["names"]), node.params["k"]

    def work(rows: Array) -> list[Any] | None:
        import numpy as np

        if rows.ndim != 2 or not 0 < k <= rows.shape[1]:
            return None
        order = ranked(rows)
        least = np.partition(order, rows.shape[1] - k)[:, -k]
        found = np.nonzero(order >= least[:, None])[1]
        if len(found) != k * len(rows):
            return None  # equals at the end of a row: which of them come first is told singly
        places = found.reshape(len(rows), k)
        by_rank = np.argsort(-np.take_along_axis(order, places, 1), axis=1, kind="stable")
        places = np.take_along_axis(places, by_rank, 1)
        scores = np.take_along_axis(rows, places, 1)
        return [
            [label(i, s, names) for i, s in zip(one, other, strict=True)]
            for one, other in zip(places.tolist(), scores.tolist(), strict=True)
        ]

    return work


def _of_any_shape(name: str) -> Callable[[Node], RowWork]:
    """What works along the last axis takes rows as it takes one, if a row has an axis at all."""

    def make(node: Node) -> RowWork:
        work = results.MAKERS[name](node, {})
        return lambda rows: work(rows) if rows.ndim > 1 else None

    return make


MAKERS: Mapping[str, Callable[[Node], RowWork]] = {
    **{name: _of_any_shape(name) for name in ("softmax", "sigmoid", "l2")},
    "argmax": _argmax,
    "best": _best,
    "top": _top,
}
