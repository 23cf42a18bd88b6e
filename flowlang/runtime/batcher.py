"""Which waiting items make the next batch of a stage.

Layer 3. Pure logic: time comes in as an argument, nothing is locked and nobody is woken here.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from flowlang.runtime.request import Request


class Item:
    """One unit of a request's work, waiting for a stage."""

    __slots__ = ("arrived_s", "is_over", "request", "unit", "value")

    def __init__(self, request: Request, unit: int, value: Any, arrived_s: float) -> None:
        self.request = request
        self.unit = unit
        self.value = value
        self.arrived_s = arrived_s
        self.is_over = False  # finished, or past the stage's timeout


class Batcher:
    """First come, first served; a free instance takes what waits, up to `high`.

    What waits is spread over the free instances rather than swallowed by one: at ten waiting
    requests and three free instances a single batch of ten would leave two of them idle. With
    `is_shared` it is spread over all instances, the busy ones too: right where a batch saves
    nothing and only delays its last item. A `wait_s` above 0 holds an incomplete batch back until
    its oldest item has waited that long.
    """

    def __init__(
        self, low: int, high: int, wait_s: float, instances: int, *, is_shared: bool = False
    ) -> None:
        self.low = low
        self.high = high
        self.wait_s = wait_s
        self.instances = instances
        self.is_shared = is_shared
        self.waiting: deque[Item] = deque()

    def put(self, item: Item) -> None:
        self._drop_answered()  # or they would pile up in front of a stuck stage
        self.waiting.append(item)

    def due_s(self) -> float | None:
        """When a batch can be taken: in the past if now, None if nothing waits."""
        self._drop_answered()
        if not self.waiting:
            return None
        oldest = self.waiting[0].arrived_s
        return oldest if len(self.waiting) >= self.high else oldest + self.wait_s

    def take(self, now_s: float, free: int) -> list[Item]:
        """The next batch for one of `free` free instances; empty if it is not due."""
        due = self.due_s()
        if due is None or (self.wait_s and due > now_s):
            return []
        waiting = self.waiting
        count = len(waiting)
        among = self.instances if self.is_shared else free
        share = count if self.wait_s else -(-count // max(1, among))
        size = min(self.high, max(share, self.low), count)
        batch: list[Item] = []
        while waiting and len(batch) < size:
            item = waiting.popleft()
            if not item.request.is_answered and not item.is_over:
                batch.append(item)
        return batch

    def _drop_answered(self) -> None:
        waiting = self.waiting
        while waiting and (waiting[0].request.is_answered or waiting[0].is_over):
            waiting.popleft()
