"""Instances of stages on the CPU: operators item by item, the model batch by batch.

Layer 3. An item that fails leaves the batch and takes nobody with it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import BadRequest, EngineError, StageFailed
from flowlang.plan import graph
from flowlang.plan.graph import Node
from flowlang.plan.onnx import Model, Port
from flowlang.plan.physical import StagePlan
from flowlang.plan.ties import differing, placed
from flowlang.plan.types import Image, Record, Shape, Tensor, numpy_dtype, shape_fits
from flowlang.runtime.frame import run_framed
from flowlang.runtime.host import Work, row_work_of, work_of
from flowlang.runtime.ort import Sessions

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CpuInstance:
    """One lane's chain of operators."""

    def __init__(self, plan: StagePlan, sessions: Sessions) -> None:
        extras = dict(zip(plan.nodes, plan.extras, strict=True))
        self.has_extras = any(extras.values())
        self.before = Chain(plan.region, extras, plan.settings)
        self.after = Chain(plan.tail, extras, plan.settings)
        node = next((n for n in plan.nodes if n.model is not None), None)
        self.model = _ModelStep(node, node.model, sessions) if node and node.model else None
        self.batch = plan.batch
        self.room: _Room | None = None
        if self.model is not None and plan.region and plan.region[-1].op == graph.PACK:
            self.room = self.model.room = _Room(plan.batch[2])
            self.before.works[-1] = self.room.taking(self.before.works[-1])
        self.at_work = sessions.at_work

    def warm(self) -> None:
        if self.model is not None:
            for size in sorted({self.batch[0], self.batch[2]}):
                self.model.warm(size)

    def run(self, values: Sequence[Any]) -> list[Any]:
        with self.at_work:
            return self._run(values)

    def _run(self, values: Sequence[Any]) -> list[Any]:
        outcomes = [v[0] for v in values] if self.has_extras else list(values)
        if self.room is not None:
            self.room.clear()
        if self.before:
            outcomes = [self.before.through(o, v) for o, v in zip(outcomes, values, strict=True)]
        if self.model is not None:
            good = [i for i, o in enumerate(outcomes) if not isinstance(o, Exception)]
            for index, result in zip(
                good, self.model.run([outcomes[i] for i in good]), strict=True
            ):
                outcomes[index] = result
        if not self.after:
            return outcomes
        return [
            o if isinstance(o, Exception) else self.after.through(o, v)
            for o, v in zip(outcomes, values, strict=True)
        ]

    def close(self) -> None:
        self.model = None


class Chain:
    """Operators run one behind the other on one item.

    `extras` tells for each node which parts of the stage's item it gets besides what flows.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        extras: Mapping[Node, tuple[int, ...]],
        settings: Mapping[str, Any],
    ) -> None:
        self._nodes = nodes
        self.works = [work_of(n, settings) for n in nodes]
        self._extras = [extras[n] for n in nodes]
        self._has_extras = any(self._extras)
        # An image that leaves the stage knows where it lies in the picture it is a part of.
        self._is_framed = bool(nodes) and isinstance(nodes[-1].type, Image)

    def __bool__(self) -> bool:
        return bool(self.works)

    def through(self, value: Any, item: Any, start: int = 0) -> Any:
        """What becomes of a value, or the exception it fails with, from a work on.

        `item` has the extras.
        """
        try:
            given = (
                [[item[i] for i in places] for places in self._extras] if self._has_extras else ()
            )
            if self._is_framed:
                return run_framed(self.works, self._nodes, value, given)
            if given:
                for work, more in zip(self.works[start:], given[start:], strict=True):
                    value = work(value, *more)
                return value
            for work in self.works[start:]:
                value = work(value)
        except Exception as error:
            return error
        return value


class RowChain(Chain):
    """A chain that also takes all rows of a model's output at once, as far as possible."""

    def __init__(
        self,
        nodes: Sequence[Node],
        extras: Mapping[Node, tuple[int, ...]],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(nodes, extras, settings)
        makers = (None if extras[n] else row_work_of(n) for n in nodes)
        self._row_works = list(itertools.takewhile(lambda work: work is not None, makers))

    def of_rows(self, rows: NDArray[Any], items: Sequence[Any]) -> list[Any]:
        """The outcome of each row of a batch, as `through` gives it, at once as far as possible."""
        values, start = self._at_once(rows)
        if start == len(self.works):
            return list(values)
        return [self.through(v, i, start) for v, i in zip(values, items, strict=True)]

    def _at_once(self, rows: NDArray[Any]) -> tuple[Sequence[Any], int]:
        """What becomes of the rows together, and by how many of the works."""
        values: Any = rows
        for start, work in enumerate(self._row_works):
            try:
                done = work(values) if work is not None and hasattr(values, "ndim") else None
            except Exception:
                done = None  # one by one it is told whose fault it is
            if done is None:
                return values, start
            values = done
        return values, len(self._row_works)


def _known(shape: Shape | None) -> tuple[int, ...] | None:
    """A shape of which every side is known, or None."""
    if shape is None or None in shape:
        return None
    return tuple(side for side in shape if side is not None)


class _Room:
    """Memory for one batch of a model's input, so that its items need not be copied together."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory: NDArray[Any] | None = None  # as large as the first item asks for
        self._rows: list[NDArray[Any]] = []
        self._taken = 0

    def clear(self) -> None:
        self._taken = 0

    def taking(self, pack: Work) -> Work:
        """The work that packs an item, made to put it into the next row where it fits there."""

        def work(value: Any) -> Any:
            if self._taken == len(self._rows):
                return self._first(pack(value))
            self._taken += 1
            return pack(value, self._rows[self._taken - 1])

        return work

    def _first(self, packed: NDArray[Any]) -> NDArray[Any]:
        import numpy as np

        if self._memory is None:
            self._memory = np.empty((self._size, *packed.shape), packed.dtype)
            self._rows = list(self._memory)
        return packed

    def holds(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any] | None:
        """The batch of these, where they are all that was put here, in order; None otherwise."""
        if self._memory is None or len(parts) != self._taken:
            return None
        if all(map(operator.is_, parts, self._rows)):
            return self._memory[: self._taken]
        return None


def _loose(node: Node, model: Model) -> list[tuple[str, Tensor]]:
    """The inputs whose arrays are of any rank as far as is known, though the model's are of one."""
    given = node.inputs[0].type
    kinds = given.fields if isinstance(given, Record) else ((model.inputs[0].name, given),)
    wanted = {port.name: port.item for port in model.inputs}
    return [
        (name, wanted[name])
        for name, kind in kinds
        if isinstance(kind, Tensor) and kind.shape is None and wanted[name].shape is not None
    ]


class _ModelStep:
    """A model run on batches of items whose shapes may differ."""

    def __init__(self, node: Node, model: Model, sessions: Sessions) -> None:
        self.ports = model.inputs
        self.fixed = model.fixed_batch
        self.session = sessions.of(model)
        self.room: _Room | None = None
        self.name, self.place = model.name, str(node.span)
        self.ties = model.ties
        self.loose = _loose(node, model)

    def warm(self, size: int) -> None:
        import numpy as np

        shapes = [_known(p.item.shape) for p in self.ports]
        if None in shapes:
            return
        items = [
            np.zeros(shape or (), numpy_dtype(p.dtype))
            for p, shape in zip(self.ports, shapes, strict=True)
        ]
        item = items[0] if len(items) == 1 else dict(zip(self._names(), items, strict=True))
        try:
            self._run_batch([item] * size, self.session.warm)
        except Exception as error:
            raise EngineError(f"`{self.name}` fails on a batch of {size}: {error}") from error

    def _names(self) -> list[str]:
        return [p.name for p in self.ports]

    def run(self, items: Sequence[Any]) -> list[Any]:
        """The outcome of each item. Items of one shape share a run of the model."""
        groups: dict[Any, list[int]] = {}
        outcomes: list[Any] = [None] * len(items)
        for index, item in enumerate(items):
            if (self.ties or self.loose) and (wanted := self._misfit(item)) is not None:
                message = f"`{self.name}` takes {wanted}"
                outcomes[index] = BadRequest(message, stage=self.name, place=self.place)
            else:
                groups.setdefault(self._shape(item), []).append(index)
        for members in groups.values():
            for index, result in zip(members, self._run([items[i] for i in members]), strict=True):
                outcomes[index] = result
        return outcomes

    def _shape(self, item: Any) -> Any:
        if len(self.ports) == 1:
            return item.shape
        return tuple(item[name].shape for name in self._names())

    def _misfit(self, item: Any) -> str | None:
        """What the model wants of an item that is not so, of all that its type leaves open."""
        arrays = {self.ports[0].name: item} if len(self.ports) == 1 else item
        for name, kind in self.loose:
            if not shape_fits(arrays[name].shape, kind.shape):
                return f"`{name}` as {kind}, not an array of shape {arrays[name].shape}"
        for tie in self.ties:
            sides = [(arrays[name], name, axis) for name, axis in tie.sides]
            lengths = [(a.shape[axis], placed(f"`{n}`", axis, a.ndim)) for a, n, axis in sides]
            if (wanted := differing(tie.symbol, lengths)) is not None:
                return wanted
        return None

    def _run(self, items: list[Any]) -> list[Any]:
        """A batch; where it fails, its items one by one, so that only the guilty one fails."""
        try:
            return self._run_batch(items, self.session.run)
        except Exception as error:
            if len(items) == 1:
                message = f"`{self.name}` failed: {error}"
                return [StageFailed(message, stage=self.name, place=self.place)]
        return [self._run([item])[0] for item in items]

    def _run_batch(self, items: list[Any], run: Callable[..., Sequence[Any]]) -> list[Any]:
        import numpy as np

        count = len(items)
        if self.fixed and count < self.fixed:
            items = items + [items[-1]] * (self.fixed - count)  # the model takes no other size
        feeds = {p.name: self._stack(p, items) for p in self.ports}
        outputs = run(feeds)
        for output in outputs:
            if output.shape[:1] != (len(items),):
                raise ValueError(f"{len(items)} items gave an output of shape {output.shape}")
        if len(outputs) == 1:
            return [np.asarray(row) for row in outputs[0][:count]]
        names = self.session.outputs
        return [
            dict(zip(names, (np.asarray(o[i]) for o in outputs), strict=True)) for i in range(count)
        ]

    def _stack(self, port: Port, items: list[Any]) -> NDArray[Any]:
        import numpy as np

        parts = items if len(self.ports) == 1 else [item[port.name] for item in items]
        whole = None if self.room is None else self.room.holds(parts)
        if whole is not None:
            return whole
        return parts[0][None] if len(parts) == 1 else np.stack(parts)
