"""Which waiting items make the next batch of a stage.

Layer 3. Pure logic: time comes in as an argument, nothing is locked and nobody is woken here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from flowlang.runtime.request import UNANSWERED, Request

if TYPE_CHECKING:
    from flowlang.runtime.walk import Walk


# Queues are swept of what nobody waits for once they have doubled, and hold as many entries more:
# so each entry is looked at about once.
SPARE = 32


class Item:
    """One unit of a request's work, waiting for a stage.

    `walk` is where in its flow it stands; None where the flow is one stage and nothing else.
    `taken_by` is the batcher that gave it to an instance, while that works on it. `taken_s` is when
    that was, which is kept for an observer only.
    """

    __slots__ = (
        "arrived_s", "is_settled", "request", "taken_by", "taken_s", "unit", "value", "walk",
    )  # fmt: skip

    taken_s: float

    def __init__(
        self,
        request: Request,
        unit: int,
        value: Any,
        arrived_s: float,
        walk: Walk | None = None,
    ) -> None:
        self.request = request
        self.unit = unit
        self.value = value
        self.arrived_s = arrived_s
        self.walk = walk
        self.taken_by: Batcher | None = None
        self.is_settled = False  # has come back, or is past the stage's timeout

    @property
    def rank(self) -> int:
        return self.request.rank

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits for its outcome."""
        if self.is_settled or self.request.outcome is not UNANSWERED:
            return False
        walk = self.walk
        return walk is None or not walk.is_given_up


Ranked = TypeVar("Ranked", Item, Request)


def place(queue: deque[Ranked], entry: Ranked) -> None:
    """Put an entry into a queue in order of rank, behind those of its own."""
    queue.insert(bisect_right(queue, entry.rank, key=lambda other: other.rank), entry)


def first_of(items: Iterable[Item]) -> Item:
    """The item that arrived first, where they are in order of rank."""
    return min(items, key=lambda item: item.arrived_s)


def bring_back(item: Item) -> None:
    """Note that no instance works on an item any more. Twice is once."""
    if item.taken_by is not None:
        item.taken_by.at_work -= 1
        item.taken_by = None


class Batcher:
    """First come, first served; a free instance takes what waits, up to `high`.

    What waits is spread over the free instances rather than swallowed by one: at ten waiting
    requests and three free instances a single batch of ten would leave two of them idle. Nor does
    an instance take more than its share of all that waits or is being worked on, of which `at_work`
    counts the latter: or one would have most and the others next to nothing, in turns. With
    `is_shared` what waits is spread over all instances, the busy ones too: right where a batch
    saves nothing and only delays its last item. A `wait_s` above 0 holds an incomplete batch back
    until its oldest item has waited that long, and then it has all that waits. With `is_ranked`,
    set once items may differ in it, a lower rank is served before a higher one, however long that
    waits.
    """

    def __init__(
        self, low: int, high: int, wait_s: float, instances: int, *, is_shared: bool = False
    ) -> None:
        self.low = low
        self.high = high
        self.wait_s = wait_s
        self.instances = instances
        self.is_shared = is_shared
        self.is_ranked = False
        self.waiting: deque[Item] = deque()
        self.at_work = 0
        self._swept_at = SPARE

    def put(self, item: Item) -> None:
        self._drop_unwanted()  # or they would pile up in front of a stuck stage
        if len(self.waiting) >= self._swept_at:
            self._sweep()
        if self.is_ranked:
            place(self.waiting, item)
        else:
            self.waiting.append(item)

    def due_s(self) -> float | None:
        """When a batch can be taken: in the past if now, None if nothing waits."""
        self._drop_unwanted()
        if not self.waiting:
            return None
        oldest = (first_of(self.waiting) if self.is_ranked else self.waiting[0]).arrived_s
        return oldest if len(self.waiting) >= self.high else oldest + self.wait_s

    def take(self, now_s: float, free: int) -> list[Item]:
        """The next batch for one of `free` free instances; empty if it is not due."""
        due = self.due_s()
        if due is None or (self.wait_s and due > now_s):
            return []
        waiting = self.waiting
        share = count = len(waiting)
        if not self.wait_s:
            among = self.instances if self.is_shared else max(1, free)
            share = min(-(-count // among), -(-(count + self.at_work) // self.instances))
        size = min(self.high, max(share, self.low), count)
        batch: list[Item] = []
        try:
            while waiting and len(batch) < size:
                item = waiting[0]
                is_plain = item.walk is None and item.request.outcome is UNANSWERED
                if (is_plain and not item.is_settled) or item.is_wanted:
                    batch.append(item)
                waiting.popleft()
        except BaseException:
            waiting.extendleft(reversed(batch))
            raise
        for item in batch:
            item.taken_by = self
        self.at_work += len(batch)
        return batch

    def put_back(self, batch: list[Item]) -> None:
        """Have a batch wait again that could not be handed over, first of all."""
        for item in batch:
            bring_back(item)
        self.waiting.extendleft(reversed(batch))

    def _drop_unwanted(self) -> None:
        waiting = self.waiting
        while waiting:
            first = waiting[0]
            # Most items are of one stage and wanted: that is told without a call.
            if first.walk is None and not first.is_settled and first.request.outcome is UNANSWERED:
                return
            if first.is_wanted:
                return
            waiting.popleft()

    def _sweep(self) -> None:
        """Let go of what nobody waits for behind an item that is wanted."""
        self.waiting = deque(item for item in self.waiting if item.is_wanted)
        self._swept_at = 2 * len(self.waiting) + SPARE
