"""Where requests wait: the entrance of a flow, and the queue of each stage.

Layer 3. Changed under the scheduler's lock; nothing is locked and nobody is woken here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from flowlang.diagnostics import BadRequest
from flowlang.plan.physical import FlowProgram, StagePlan
from flowlang.plan.types import may_hold_images
from flowlang.runtime.batcher import Batcher, Item
from flowlang.runtime.metrics import FlowCounts, StageCounts
from flowlang.runtime.request import Request, Wake
from flowlang.runtime.walk import Track


class Stage:
    """A stage's queue, its batcher, and who is waiting for work.

    `idle` holds the bells of instances with nothing to do; `rung` has those rung and still on
    their way, so that a burst of requests wakes one instance and not one each; `bells` has all
    there are. An instance whose bell is rung once too often looks for work, and finds none.
    """

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan
        low, _, high = plan.batch
        self.batcher = Batcher(low, high, plan.wait_s, plan.instances, is_shared=plan.model is None)
        self.idle: list[Wake] = []
        self.rung: set[Wake] = set()
        self.bells: set[Wake] = set()
        self.lost = 0
        self.counts = StageCounts()

    def put(self, item: Item) -> Wake | None:
        """Queue an item. Returns the bell to ring, if an instance should be woken for it."""
        self.batcher.put(item)
        return self.next_bell()

    def next_bell(self) -> Wake | None:
        if self.idle and len(self.batcher.waiting) > len(self.rung) * self.batcher.high:
            bell = self.idle.pop()
            self.rung.add(bell)
            return bell
        return None


class Entrance:
    """The way into a flow: its program made ready to run, and its bounded queue.

    At most `limit` requests are inside: those that wait, and as many as the stages can work on at
    the same time. Of those, at most `width` are under way in the stages; the rest wait here, by
    rank and as they came (compressed pictures are small, decoded ones are not).
    """

    def __init__(self, program: FlowProgram, stages: Sequence[Stage]) -> None:
        self.program = program
        self.outstanding = 0
        self.under_way = 0
        self.backlog: deque[Request] = deque()
        self.is_filling = False  # those of the backlog are being let in
        self.is_ranked = False  # whether a request has come that has a priority of its own
        self.counts = FlowCounts()
        units = program.steps.units
        self.stages = [stages[s] for s in dict.fromkeys(program.steps.stages())]
        self.limit = program.queue + sum(s.plan.at_once for s in self.stages)
        # What instances may take in one go: more than that at hand makes no batch larger.
        self.room = sum(s.plan.instances * s.plan.batch[2] for s in self.stages)
        self.width = 2 * self.room if self.room and len(units) > 1 else self.limit
        self.track = Track(program.steps)
        self.gives_images = may_hold_images(program.output)
        self.has_parameters = bool(program.plan.parameters)
        # The stage of a flow that is one stage, which most are: its requests are queued there at
        # once, without what only the others need.
        self.door: Stage | None = None
        if len(units) == 1 and units[0].stage is not None and units[0].inputs == (0,):
            self.door = stages[units[0].stage]

    def rank_by(self, priority: int) -> None:
        """Have queues in order of rank, now that a request has a priority. Raises BadRequest."""
        if not isinstance(priority, int) or priority < 0:
            told = f"not {priority!r}"
            raise BadRequest(f"a priority is 1 or more, or 0 for that of the flow, {told}")
        if not self.is_ranked:
            for stage in self.stages:
                stage.batcher.is_ranked = True
            self.is_ranked = True
