"""What the Open Inference Protocol's statistics extension tells of a model.

Layer 4. Requests are counted here, as they are answered; batches by the scheduler's stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.runtime.metrics import StageCounts, Succession

if TYPE_CHECKING:
    from flowlang.runtime.entrance import Stage
    from flowlang.runtime.scheduler import Scheduler


@dataclass(slots=True)
class Span:
    """How often something happened, and how long it took together, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def as_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class Statistics:
    """What the protocol tells of a model: requests, and the time they took.

    The parts of the time are told apart as a flow sees them: reading tensors, waiting while nothing
    of the request is worked on, the flow's work, and writing tensors. Batches are those of the
    flow's models, whoever filled them.
    """

    NAMES = (
        *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
        *("cache_hit", "cache_miss"),
    )

    def __init__(self) -> None:
        self.items = 0
        self.last_ms = 0  # when the last request came, in milliseconds since 1970
        self.spans = {name: Span() for name in self.NAMES}
        self._past = StageCounts()
        self._succession = Succession(self._add_up)

    def follow(self, scheduler: Scheduler, stages: Sequence[Stage]) -> None:
        """Count the batches of these stages too, from now on."""
        self._succession.follow(scheduler, [stage.counts for stage in stages])

    def _add_up(self, counted: list[StageCounts]) -> None:
        for counts in counted:
            self._past.merge(counts)

    def succeed(
        self, items: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        """Count an answered request. `queue_ns` is a part of `infer_ns`."""
        self.items += items
        spans = self.spans
        spans["success"].add(input_ns + infer_ns + output_ns)
        spans["queue"].add(queue_ns)
        spans["compute_input"].add(input_ns)
        spans["compute_infer"].add(infer_ns - queue_ns)
        spans["compute_output"].add(output_ns)

    def fail(self, ns: int) -> None:
        """Count a request that was not answered."""
        self.spans["fail"].add(ns)

    def as_json(self) -> dict[str, Any]:
        return {
            "last_inference": self.last_ms,
            "inference_count": self.items,
            "execution_count": self.spans["success"].count,
            "inference_stats": {name: span.as_json() for name, span in self.spans.items()},
            "batch_stats": [_batches(size, span) for size, span in sorted(self.batches().items())],
        }

    def batches(self) -> dict[int, Span]:
        """The batches of each size, and the time instances worked on them."""
        total = StageCounts()
        living = self._succession.living()
        for counts in (self._past, *(counts for counted in living for counts in counted)):
            total.merge(counts)
        return {
            size: Span(count, round(busy_s * 1e9)) for size, (count, busy_s) in total.worked.items()
        }


def _batches(size: int, work: Span) -> dict[str, Any]:
    """The batches of one size. Tensors are read and written for requests, and not for batches."""
    nothing = Span(work.count).as_json()
    return {
        "batch_size": size,
        "compute_input": nothing,
        "compute_infer": work.as_json(),
        "compute_output": nothing,
    }
