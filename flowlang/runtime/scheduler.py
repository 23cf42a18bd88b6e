"""Admits requests, walks them through the stages of their flow, answers each exactly once.

Layer 3. One scheduler serves all flows. It starts no thread and reads no clock but the one it is
given: lanes ask it for batches (`take`), bring back outcomes (`finish`) and tell it the time
(`expire`), so that tests drive it with a virtual clock.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flowlang.diagnostics import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Draining,
    FlowError,
    InternalError,
    Overloaded,
    RequestError,
    StageFailed,
)
from flowlang.plan.physical import PhysicalPlan
from flowlang.runtime.batcher import SPARE, Item, bring_back, first_of, place
from flowlang.runtime.entrance import Entrance, Stage
from flowlang.runtime.observer import Observer
from flowlang.runtime.request import UNANSWERED, Reply, Request, Wake, deliver, in_words, strip
from flowlang.runtime.walk import Ended, Work, arrive, begin

_all: weakref.WeakSet[Scheduler] = weakref.WeakSet()

log = logging.getLogger("flowlang")


class _Afterwards:
    """What is left to do once the lock is released: bells to ring, answers to hand over, errors
    to log.
    """

    __slots__ = ("bells", "settled", "unexpected")

    def __init__(self) -> None:
        self.bells: list[Wake] = []
        self.settled: list[Request] = []
        self.unexpected: list[Exception] | None = None  # mostly

    def run(self) -> None:
        try:
            for bell in self.bells:
                bell()
        finally:
            if self.settled:
                deliver(self.settled)
        if self.unexpected is not None:
            for error in self.unexpected:
                log.error("a request failed as nobody expected", exc_info=error)
            for error in self.unexpected:
                strip(error)


class Scheduler:
    """All public methods may be called from any thread."""

    def __init__(
        self, plan: PhysicalPlan, clock: Callable[[], float], observer: Observer | None = None
    ) -> None:
        self.clock = clock
        self.observer = observer
        self.stages = [Stage(s) for s in plan.stages]
        self.entrances = {p.name: Entrance(p, self.stages) for p in plan.programs}
        for stage in self.stages:
            users = [e for e in self.entrances.values() if stage in e.stages]
            stage.batcher.is_ranked = len({e.program.priority for e in users}) > 1
        self._lock = threading.RLock()  # which knows whose it is: see `is_held`
        self._quiet = threading.Condition(self._lock)
        self._expiries: list[tuple[float, int, Request, Item | None]] = []
        self._swept_at = SPARE  # entries there may be until those answered are looked for
        self._order = itertools.count()
        self._given_up: deque[Request] = deque()
        self._alarm_s = math.inf  # when whoever calls `expire` means to do so next
        self._is_draining = False
        self._is_closed = False
        self.is_forked = False
        self.on_expiry: Callable[[], object] = lambda: None  # rung when the next expiry moved up
        _all.add(self)

    # Asking

    def submit(
        self,
        entrance: Entrance,
        value: Any,
        reply: Reply,
        token: Any = None,
        deadline_s: float | None = None,
        priority: int = 0,
        arrived_s: float | None = None,
    ) -> Request:
        """Take a request in. `deadline_s` is how long its answer may take, in seconds, since it
        arrived: now, or when the clock said `arrived_s`.

        Of those that wait, the lowest `priority` above 0 is taken first; 0 is that of the flow.
        Raises Overloaded or Draining at once instead of letting it wait for nothing, and BadRequest
        where a deadline or a priority is none.
        """
        allowed_s = entrance.program.slo_s if deadline_s is None else _seconds(deadline_s)
        now = self.clock()
        request = Request(entrance, value, reply, token, now if arrived_s is None else arrived_s)
        if self.observer is not None and (trace := self.observer.current()) is not None:
            request.trace = trace
        if priority:
            entrance.rank_by(priority)
            request.priority = priority
        after = _Afterwards()
        try:
            with self._lock:
                self._admit(request)
                if allowed_s is None and entrance.door is not None:
                    self._knock(entrance.door, request, now, after)
                else:
                    self._enter(request, now, allowed_s, after)
            after.run()
        except (RequestError, FlowError):
            raise
        except BaseException:
            self.mend([request])
            raise
        return request

    def submit_many(
        self,
        entrance: Entrance,
        values: deque[Any],
        reply: Reply,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> list[Request]:
        """Take in as many of the values as there is room for, and out of `values`.

        As `submit` one by one, at a third of its cost. Raises BadRequest or Draining, but never
        Overloaded.
        """
        requests: list[Request] = []
        if not values:
            return requests
        if priority:
            entrance.rank_by(priority)
        allowed_s = entrance.program.slo_s if deadline_s is None else _seconds(deadline_s)
        now = self.clock()
        trace = None if self.observer is None else self.observer.current()
        after = _Afterwards()
        try:
            with self._lock:
                while values and (self._is_draining or entrance.outstanding < entrance.limit):
                    request = Request(entrance, values[0], reply, None, now)
                    if priority:
                        request.priority = priority
                    if trace is not None:
                        request.trace = trace
                    requests.append(request)
                    self._admit(request)
                    values.popleft()
                    self._enter(request, now, allowed_s, after)
            after.run()
        except (RequestError, FlowError):
            raise
        except BaseException:
            self.mend(requests)
            raise
        return requests

    def count_refusal(self, entrance: Entrance, code: str, times: int = 1) -> None:
        """Count a request that was refused before it could be submitted, or so many of them."""
        with self._lock:
            entrance.counts.fail(code, times)

    def cancel(self, request: Request) -> bool:
        """Give a request up: it leaves the queue and its result is dropped.

        One whose deadline has passed is late, whoever is first to say so.
        """
        if self.is_held:
            is_left = request.is_inside and not request.is_answered
            self.give_up([request])
            return is_left
        after = _Afterwards()
        try:
            with self._lock:
                now = self.clock()
                self._expire_due(now, after)
                return self._cancel(request, now, after)
        finally:
            after.run()

    def give_up(self, requests: Iterable[Request]) -> None:
        """Cancel requests, if not at once then soon.

        The garbage collector may call this wherever it runs, and that may be under the lock:
        whoever watches the deadlines does it then.
        """
        self._given_up.extend(requests)
        if self.is_held:
            self.on_expiry()
            return
        after = _Afterwards()
        try:
            with self._lock:
                self._cancel_given_up(self.clock(), after)
        finally:
            after.run()

    @property
    def is_held(self) -> bool:
        """Whether the caller is called under the lock: by the garbage collector, as all else that
        is called there is of the runtime itself.
        """
        return self._lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def mend(self, requests: Iterable[Request] = ()) -> None:
        """Be whole again after an interrupt, or an error that nobody expected, wherever it came.

        Those whose caller was at sending them are given up. Where it came between an instance's
        leaving those that wait and the ringing of its bell, it would sleep for ever: so all are
        woken, to see for themselves.
        """
        self.give_up(requests)
        for stage in self.stages:
            for bell in list(stage.bells):
                bell()

    # Working

    def take(self, stage: Stage, bell: Wake | None = None) -> tuple[list[Item], float | None]:
        """The next batch for an instance of a stage, or when to ask again.

        With nothing to take, `bell` is kept and called once when there is.
        """
        batch: list[Item] = []
        try:
            with self._lock:
                batch = self._take(stage, len(stage.idle) + len(stage.rung) + 1)
                more = stage.next_bell() if batch and stage.batcher.waiting else None
                due = None
                if not batch:
                    due = stage.batcher.due_s()
                    if bell is not None and self._is_closed:
                        stage.rung.add(bell)
                        more = bell
                    elif bell is not None:
                        stage.idle.append(bell)
                        stage.bells.add(bell)
            if more is not None:
                more()
        except BaseException:
            self._put_back(stage, batch)
            raise
        return batch, due

    def take_ahead(self, stage: Stage, under_way: int) -> list[Item]:
        """A batch for an instance that still works on one of `under_way` items; mostly empty.

        Only where no other instance is free to take it, and where it is no smaller: a small batch
        costs nearly as much as a large one.
        """
        with self._lock:
            waiting = len(stage.batcher.waiting)
            if stage.idle or stage.rung or waiting < min(under_way, stage.batcher.high):
                return []
            return self._take(stage, 1)

    def arrived(self, stage: Stage, bell: Wake) -> None:
        """An instance that was rung is here."""
        with self._lock:
            stage.rung.discard(bell)
            if bell in stage.idle:  # it was rung once too often
                stage.idle.remove(bell)

    def leave(self, stage: Stage, bell: Wake) -> bool:
        """Take a bell back. False if it has been rung already."""
        with self._lock:
            if bell in stage.idle:
                stage.idle.remove(bell)
                return True
            return False

    def finish(self, items: Sequence[Item], outcomes: Sequence[Any], busy_s: float = 0.0) -> None:
        """Bring back the outcome of each item of a batch: a value, or an exception.

        `busy_s` is how long an instance worked on it.
        """
        if len(items) != len(outcomes):
            raise InternalError(f"{len(items)} items went into a batch, {len(outcomes)} came out")
        after = _Afterwards()
        try:
            with self._lock:
                now = self.clock()
                if items and busy_s:
                    self._stage_of(items[0]).counts.count_work(len(items), busy_s)
                for item, outcome in zip(items, outcomes, strict=True):
                    bring_back(item)
                    if item.walk is not None:
                        item.request.end_work(now)
                    is_failure = isinstance(outcome, Exception)
                    if is_failure:
                        stage = self._stage_of(item)
                        outcome = self._error_of(outcome, stage.plan.name, after)
                    if item.request.outcome is not UNANSWERED or item.is_settled:
                        continue
                    if is_failure:
                        stage.counts.count_failure(outcome.code)
                    self._settle(item, outcome, now, after)
                    item.is_settled = True
        finally:  # those that were answered are told so, whatever befell the others
            after.run()

    def lose_instance(self, stage: Stage) -> None:
        """An instance of a stage is gone until `regain_instance`."""
        with self._lock:
            stage.lost += 1

    def regain_instance(self, stage: Stage) -> None:
        with self._lock:
            stage.lost -= 1

    def fail_if_lost(self, stage: Stage, message: str) -> None:
        """Where a stage has no instance left, answer what waits for it instead of keeping it."""
        while stage.lost >= stage.plan.instances:
            items, _ = self.take(stage)
            if not items:
                return
            try:
                self.finish(items, [StageFailed(message, stage=stage.plan.name) for _ in items])
            except BaseException:
                self._put_back(stage, items)
                raise

    # Time

    def next_expiry_s(self) -> float | None:
        """When `expire` has something to do; if that moves up, `on_expiry` is rung."""
        with self._lock:
            self._drop_expiries()
            self._alarm_s = self._expiries[0][0] if self._expiries else math.inf
            return None if self._alarm_s == math.inf else self._alarm_s

    def expire(self) -> None:
        """Answer every request whose deadline has passed, or that was given up."""
        after = _Afterwards()
        try:
            with self._lock:
                now = self.clock()
                self._cancel_given_up(now, after)
                self._expire_due(now, after)
        finally:
            after.run()

    def _expire_due(self, now: float, after: _Afterwards) -> None:
        heap = self._expiries
        while heap and heap[0][0] <= now:
            entry = heapq.heappop(heap)
            try:
                self._expire(entry[2], entry[3], now, after)
            except BaseException:
                heapq.heappush(heap, entry)  # to be tried again
                raise

    # Ending

    @property
    def outstanding(self) -> int:
        return sum(e.outstanding for e in self.entrances.values())

    def drain(self, grace_s: float | None) -> bool:
        """Take no more and wait until all is answered. False if `grace_s` was not enough."""
        with self._quiet:
            self._is_draining = True
            return self._quiet.wait_for(lambda: self.outstanding == 0, grace_s)

    def close(self) -> None:
        """Answer whatever is left with Draining. Nothing runs afterwards."""
        after = _Afterwards()
        try:
            with self._lock:
                self._is_draining = self._is_closed = True
                after.bells = [b for s in self.stages for b in s.bells]
                self._let_go(after)
        finally:
            after.run()

    def _let_go(self, after: _Afterwards) -> None:
        """Answer all that is neither done nor in an instance, and keep nothing of it."""
        left = [i.request for s in self.stages for i in s.batcher.waiting]
        left += [r for e in self.entrances.values() for r in e.backlog]
        for entrance in self.entrances.values():
            entrance.backlog.clear()
        now = self.clock()
        for request in left:
            if not request.is_answered:
                self._answer(
                    request, Draining("the app stopped before it came to this"), now, after
                )
        self._expiries.clear()  # or answers, errors among them, would hold who asked
        for stage in self.stages:
            stage.batcher.waiting.clear()
            stage.rung.update(stage.idle)
            stage.idle.clear()

    def abandon(self, items: Sequence[Item]) -> None:
        """Answer items whose instance did not come back in time."""
        self.finish(items, [Draining("the app stopped before this was done") for _ in items])

    def become_forked(self) -> None:
        """Be the copy in a child process: it has no lane, and its lock may never be released."""
        self._lock = threading.RLock()
        self._quiet = threading.Condition(self._lock)
        self.is_forked = self._is_draining = self._is_closed = True
        for entrance in self.entrances.values():
            entrance.backlog.clear()
            entrance.outstanding = 0

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    # Inside the lock

    def _cancel(self, request: Request, now: float, after: _Afterwards) -> bool:
        if request.is_answered or not request.is_inside:
            return False
        self._answer(request, Cancelled("the caller gave the request up"), now, after)
        return True

    def _cancel_given_up(self, now: float, after: _Afterwards) -> None:
        while self._given_up:
            self._cancel(self._given_up[0], now, after)
            self._given_up.popleft()

    def _expire(self, request: Request, item: Item | None, now: float, after: _Afterwards) -> None:
        if not _is_awaited(request, item):
            return
        if item is None:
            self._answer(request, DeadlineExceeded(), now, after)
            return
        stage = self._stage_of(item)
        message = f"stage `{stage.plan.name}` did not finish within its timeout"
        error = DeadlineExceeded(message, stage=stage.plan.name)
        stage.counts.count_failure(error.code)
        self._settle(item, error, now, after)
        item.is_settled = True

    def _admit(self, request: Request) -> None:
        """Count a request in. Raises where there is no place for it."""
        entrance = request.entrance
        if self._is_draining:
            if self.is_forked:
                raise FlowError(
                    "this process was forked from the one that loaded the flows, and has not its "
                    "threads: load them in this process, or start it by `spawn`"
                )
            entrance.counts.fail(Draining.code)
            raise Draining()
        if entrance.outstanding >= entrance.limit:
            entrance.counts.fail(Overloaded.code)
            raise Overloaded(
                f"the queue of flow `{entrance.program.name}` is full "
                f"({entrance.outstanding} requests)"
            )
        entrance.outstanding += 1
        request.is_inside = True

    def _enter(
        self, request: Request, now: float, allowed_s: float | None, after: _Afterwards
    ) -> None:
        """A request that was let in sets out, or waits at the entrance."""
        entrance = request.entrance
        if allowed_s is not None:
            self._expire_at(request.arrived_s + allowed_s, request, None, after)
        if entrance.door is not None:
            self._knock(entrance.door, request, now, after)
        elif entrance.under_way >= entrance.width:
            backlog = entrance.backlog
            while backlog and backlog[0].is_answered:
                backlog.popleft()
            if len(backlog) > 2 * entrance.limit:  # of which at most `limit` are not answered
                backlog = entrance.backlog = deque(r for r in backlog if not r.is_answered)
            if entrance.is_ranked:
                place(backlog, request)
            else:
                backlog.append(request)
        else:
            self._start(entrance, request, now, after)

    def _knock(self, door: Stage, request: Request, now: float, after: _Afterwards) -> None:
        """Queue a request of a flow that is one stage."""
        entrance = request.entrance
        entrance.under_way += 1
        request.is_under_way = True
        # The parameters of such a flow are used by nothing.
        item = Item(request, 0, request.value[0] if entrance.has_parameters else request.value, now)
        self._line_up(door, item, now, after)

    def _line_up(self, stage: Stage, item: Item, now: float, after: _Afterwards) -> None:
        """Have an item wait for a stage, no longer than that allows."""
        if stage.plan.timeout_s is not None:
            self._expire_at(now + stage.plan.timeout_s, item.request, item, after)
        bell = stage.put(item)
        if bell is not None:
            after.bells.append(bell)

    def _expire_at(
        self, when_s: float, request: Request, item: Item | None, after: _Afterwards
    ) -> None:
        self._drop_expiries()
        if len(self._expiries) >= self._swept_at:
            self._sweep_expiries()
        heapq.heappush(self._expiries, (when_s, next(self._order), request, item))
        if when_s < self._alarm_s:
            self._alarm_s = when_s
            after.bells.append(self.on_expiry)

    def _drop_expiries(self) -> None:
        """Let go of what was answered in time, rather than keep its answer until its deadline."""
        heap = self._expiries
        while heap and not _is_awaited(heap[0][2], heap[0][3]):
            heapq.heappop(heap)

    def _sweep_expiries(self) -> None:
        """Let go of what was answered behind an entry that still matters."""
        self._expiries[:] = [e for e in self._expiries if _is_awaited(e[2], e[3])]
        heapq.heapify(self._expiries)
        self._swept_at = 2 * len(self._expiries) + SPARE

    def _take(self, stage: Stage, free: int) -> list[Item]:
        now = self.clock()
        batch = stage.batcher.take(now, free)
        if batch:
            try:
                self._count_taken(stage, batch, now)
            except BaseException:
                self._put_back(stage, batch)
                raise
        return batch

    def _put_back(self, stage: Stage, batch: list[Item]) -> None:
        with self._lock:
            stage.batcher.put_back(batch)

    def _count_taken(self, stage: Stage, batch: list[Item], now: float) -> None:
        size, counts = len(batch), stage.counts
        counts.sizes[size] = counts.sizes.get(size, 0) + 1
        oldest = first_of(batch) if stage.batcher.is_ranked else batch[0]
        counts.waited_s.add(now - oldest.arrived_s)
        if self.observer is not None:
            for item in batch:
                item.taken_s = now
        for item in batch:
            request = item.request
            if item.walk is None:
                request.queued_s = now - request.arrived_s
            else:
                request.begin_work(now)

    def _stage_of(self, item: Item) -> Stage:
        track = item.walk.track if item.walk is not None else item.request.entrance.track
        number = track.units[item.unit].stage
        if number is None:
            raise InternalError("an item waits at a unit that is no stage")
        return self.stages[number]

    def _start(self, entrance: Entrance, request: Request, now: float, after: _Afterwards) -> None:
        entrance.under_way += 1
        request.is_under_way = True
        request.at_work, request.queued_s, request.idle_since_s = 0, 0.0, request.arrived_s
        given, request.value = request.value, None
        values = given if entrance.has_parameters else (given,)
        self._go_on(request, begin(request, entrance.track, values), now, after)

    def _settle(self, item: Item, outcome: Any, now: float, after: _Afterwards) -> None:
        """A stage's outcome, which may be an error, reaches the request it is for."""
        if item.walk is None:
            self._answer(item.request, outcome, now, after)
        else:
            self._go_on(item.request, arrive(item.walk, item.unit, outcome), now, after)

    def _go_on(
        self, request: Request, steps: Iterator[Work | Ended], now: float, after: _Afterwards
    ) -> None:
        """Queue what can be worked on now, and answer what has come to its end.

        A request that fails at this as nobody expected takes neither a lane nor others along.
        """
        try:
            for step in steps:
                if isinstance(step, Ended):
                    if not request.is_answered:
                        self._answer(request, step.outcome, now, after)
                elif self._is_closed:  # nobody would take it any more
                    error = Draining("the app stopped before this was done")
                    self._answer(request, error, now, after)
                    return
                else:
                    self._queue(step, now, after)
        except Exception as error:
            self._fail(request, error, now, after)

    def _fail(self, request: Request, error: Exception, now: float, after: _Afterwards) -> None:
        """Answer a request with an error that nobody expected."""
        failure = self._error_of(error, None, after)
        if not request.is_answered:
            self._answer(request, failure, now, after)

    def _error_of(self, error: Exception, stage: str | None, after: _Afterwards) -> RequestError:
        """An error as its request has it. What is no RequestError was expected by nobody."""
        if isinstance(error, RequestError):
            return strip(error)
        known = after.unexpected = after.unexpected or []
        if error not in known:  # which several items may have failed with
            known.append(error)
        return StageFailed(in_words(error), stage=stage)

    def _queue(self, work: Work, now: float, after: _Afterwards) -> None:
        item = Item(work.walk.request, work.unit, work.value, now, work.walk)
        self._line_up(self._stage_of(item), item, now, after)

    def _answer(self, request: Request, outcome: Any, now: float, after: _Afterwards) -> None:
        after.settled.append(request)  # first: what has an outcome is told of by whoever gave it
        request.outcome = outcome
        request.value = None
        entrance = request.entrance
        entrance.outstanding -= 1
        entrance.under_way -= request.is_under_way
        code = outcome.code if isinstance(outcome, RequestError) else None
        entrance.counts.answer(code, now - request.arrived_s)
        if entrance.backlog and not entrance.is_filling:
            self._fill(entrance, now, after)
        if self._is_draining and self.outstanding == 0:
            self._quiet.notify_all()

    def _fill(self, entrance: Entrance, now: float, after: _Afterwards) -> None:
        """Let in what waits at an entrance, as far as there is room.

        Those that end at once make room for the next, which is let in here and not within them.
        """
        entrance.is_filling = True
        try:
            while entrance.backlog and entrance.under_way < entrance.width:
                following = entrance.backlog.popleft()
                if following.is_answered:
                    continue
                try:
                    self._start(entrance, following, now, after)
                except Exception as error:  # it is not the fault of the one that made room
                    self._fail(following, error, now, after)
        finally:
            entrance.is_filling = False


def _after_fork() -> None:
    for scheduler in list(_all):
        scheduler.become_forked()


os.register_at_fork(after_in_child=_after_fork)


def _seconds(deadline_s: float) -> float:
    """A deadline as a number that can be added and compared. Raises BadRequest."""
    try:
        if math.isfinite(deadline_s):
            return float(deadline_s)
    except (TypeError, ValueError, OverflowError):
        pass
    raise BadRequest("a deadline is a finite number of seconds")


def _is_awaited(request: Request, item: Item | None) -> bool:
    """Whether a deadline still matters to anybody."""
    return not request.is_answered if item is None else item.is_wanted
