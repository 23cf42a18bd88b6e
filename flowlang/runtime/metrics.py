"""Counts of what happened: requests and their outcomes, batches and how they were filled.

Layer 3. Plain numbers, changed under the scheduler's lock and read without it; what they look like
to a monitoring system is for the faces to say.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

# Seconds: from a queue's shortest wait to a deadline's longest.
LATENCY_S = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
OK = "ok"
Counted = TypeVar("Counted")


class Histogram:
    """How many values fell up to each bound (and above the last), and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def merge(self, other: Histogram) -> None:
        """Add what another of the same bounds holds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class FlowCounts:
    """The requests of one flow: those answered with a result, and the others by error code."""

    __slots__ = ("failures", "latency_s", "successes")

    def __init__(self) -> None:
        self.successes = 0
        self.failures: dict[str, int] = {}
        self.latency_s = Histogram(LATENCY_S)

    def answer(self, code: str | None, latency_s: float) -> None:
        """Count a request that has been let in, `code` None for one with a result."""
        if code is None:
            self.successes += 1
        else:
            self.fail(code)
        latencies = self.latency_s  # its `add`, without the call: this is done for every request
        latencies.counts[bisect_left(LATENCY_S, latency_s)] += 1
        latencies.sum += latency_s

    def fail(self, code: str, times: int = 1) -> None:
        """Count one that was refused at the entrance, or failed; or so many of them."""
        self.failures[code] = self.failures.get(code, 0) + times

    def merge(self, other: FlowCounts) -> None:
        """Add what another has counted, who may go on counting meanwhile."""
        self.successes += other.successes
        for code, times in other.failures.copy().items():
            self.fail(code, times)
        self.latency_s.merge(other.latency_s)

    @property
    def outcomes(self) -> dict[str, int]:
        """All of them by error code, or `ok`."""
        return {OK: self.successes, **self.failures}


class StageCounts:
    """The batches of one stage.

    `sizes` has those taken, by size, and `worked` those done: how many, and how long instances
    worked on them, in seconds. `waited_s` has for each batch how long its oldest item waited.
    `failures` are items, by error code.
    """

    __slots__ = ("failures", "sizes", "waited_s", "worked")

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.worked: dict[int, tuple[int, float]] = {}
        self.waited_s = Histogram(LATENCY_S)
        self.failures: dict[str, int] = {}

    def count_work(self, size: int, busy_s: float, times: int = 1) -> None:
        """Count a batch and how long it was worked on; or so many, and how long on all of them."""
        batches, before_s = self.worked.get(size, (0, 0.0))
        self.worked[size] = (batches + times, before_s + busy_s)

    def count_failure(self, code: str, times: int = 1) -> None:
        self.failures[code] = self.failures.get(code, 0) + times

    def merge(self, other: StageCounts) -> None:
        """Add what another has counted, who may go on counting meanwhile."""
        for size, batches in other.sizes.copy().items():
            self.sizes[size] = self.sizes.get(size, 0) + batches
        for size, (batches, busy_s) in other.worked.copy().items():
            self.count_work(size, busy_s, batches)
        self.waited_s.merge(other.waited_s)
        for code, times in other.failures.copy().items():
            self.count_failure(code, times)

    @property
    def busy_s(self) -> float:
        """The time that all instances worked, added up."""
        return sum(busy_s for _, busy_s in self.worked.copy().values())


class Succession(Generic[Counted]):
    """What one scheduler after the other counts. Who looks at it does so from one thread.

    Where flows take over from others, those before go on to count what they still have, as does a
    lane that was given up. Once a scheduler is gone nobody does, and `add_up` is given what it
    counted: so there are never more of these than there are schedulers.
    """

    def __init__(self, add_up: Callable[[Counted], object]) -> None:
        self._add_up = add_up
        self._living: list[Counted] = []
        self._ended: deque[Counted] = deque()

    def follow(self, scheduler: object, counted: Counted) -> None:
        """This is what a scheduler counts, the last of all."""
        self._living.append(counted)
        # Told by the garbage collector, in any thread: so it is added up elsewhere.
        weakref.finalize(scheduler, self._ended.append, counted).atexit = False
        self._add_up_ended()  # or all before would be kept until somebody looks

    def living(self) -> list[Counted]:
        """What may still be counted, in order. All before has been added up."""
        self._add_up_ended()
        return self._living

    def _add_up_ended(self) -> None:
        while self._ended:
            counted = self._ended.popleft()
            self._living.remove(counted)
            self._add_up(counted)
