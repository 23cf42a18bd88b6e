"""Lanes: the threads that run the instances of stages, and the one that watches the deadlines.

Layer 3. An Instance is a stage's chain of operators with whatever memory, session or context it
needs; it is made, warmed, used and closed in one thread, so it needs no lock.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol, runtime_checkable

from flowlang.diagnostics import EngineError, InternalError, RequestError, StageFailed
from flowlang.plan import graph
from flowlang.plan.physical import StagePlan
from flowlang.runtime.batcher import Item
from flowlang.runtime.entrance import Stage
from flowlang.runtime.observer import Worked
from flowlang.runtime.request import in_words
from flowlang.runtime.scheduler import Scheduler

log = logging.getLogger("flowlang")

MAX_ABANDONED = 16  # threads of one stage that never came back
RETRY_S = 0.1  # between tries where there is no memory, or no thread
LONGEST_S = 3600.0  # that a thread waits at a time: it cannot be told to wait for centuries


class Instance(Protocol):
    """One execution context of a stage."""

    def warm(self) -> None:
        """Run once on made-up items, so that the first request pays for nothing."""

    def run(self, values: Sequence[Any]) -> list[Any]:
        """The outcome of each item, in order: a value, or the exception it alone failed with.

        An exception raised instead fails the whole batch; InstanceLost says besides that this
        instance is good for nothing more and must be made anew.
        """

    def close(self) -> None:
        """Give back what it holds."""


@runtime_checkable
class Overlapping(Instance, Protocol):
    """An instance that can begin a batch while the one before it is still being worked on.

    For each batch `begin`, `launch` and `collect` are called in this order; between a batch's
    `launch` and its `collect` the next one's `begin` may come. Any of them may raise, as `run` may.
    """

    def begin(self, values: Sequence[Any]) -> Any:
        """Start what needs nothing of the batch before (decoding). Gives what `launch` needs."""

    def launch(self, begun: Any) -> Any:
        """Start the rest (the model). Gives what `collect` needs."""

    def collect(self, launched: Any) -> list[Any]:
        """Wait for the outcome of each item, in order."""


class InstanceLost(Exception):
    """An instance cannot go on, and its lane needs a new one."""


class Lane(threading.Thread):
    """A thread that makes one instance of a stage and feeds it."""

    def __init__(
        self,
        scheduler: Scheduler,
        stage: Stage,
        number: int,
        make: Callable[[], Instance],
        *,
        is_replacement: bool = False,
    ) -> None:
        super().__init__(name=f"flowlang-{stage.plan.name}-{number}", daemon=True)
        self.scheduler = scheduler
        self.stage = stage
        self.make = make
        self.is_replacement = is_replacement  # of a lane that is stuck: its app has long started
        self.is_ready = threading.Event()
        self.failure: BaseException | None = None
        self.items: list[Item] = []  # the batch being worked on
        self.number = number
        self.is_abandoned = False  # nobody waits for it any more: another lane has its place
        self.fields = {"stage": stage.plan.name, "instance": number}  # of a line in the log
        self.words = f"stage `{stage.plan.name}`"  # in one
        if stage.plan.gpus:
            self.fields["gpu"] = stage.plan.gpus[number]
            self.words += f" on gpu {stage.plan.gpus[number]}"
        self._began_s = 0.0  # when the batch being worked on was begun
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._ring = functools.partial(self._bell.put, None)

    def run(self) -> None:
        instance: Instance | None = None
        try:
            if not self.is_replacement:
                instance = self._new_instance()
        except BaseException as error:
            # Lost before it ever worked, it is one that cannot be made.
            self.failure = EngineError(str(error)) if isinstance(error, InstanceLost) else error
            clear_frames(error)
            self.is_ready.set()
            return
        self.is_ready.set()
        while True:
            try:
                if instance is None:
                    instance = self._replacement()
                if instance is None:  # nobody waits for one any more
                    break
                if isinstance(instance, Overlapping):
                    self._feed_overlapping(instance)
                else:
                    self._feed(instance)
                break
            except BaseException as error:
                self._give_up(error)
                if self.is_abandoned:
                    break
                self._close(instance)
                instance = None
        self._close(instance)

    def _give_up(self, error: BaseException) -> None:
        """Answer what an instance was at work on that is lost, or that nobody can say the state of
        because of an error that nobody expected.
        """
        words, fields = self.words, self.fields
        with _whatever_comes():
            if isinstance(error, InstanceLost):
                log.error("an instance of %s is lost: %s", words, error, extra=fields)
            else:
                log.error("%s gives up an instance", words, exc_info=error, extra=fields)
        items, outcomes = self.items, []
        while self.items and not self.scheduler.is_closed:
            with _whatever_comes():  # memory, say, which others may give back
                outcomes = [self._lost(error) for _ in items]
                self.scheduler.finish(items, outcomes)
                self.items = []
            if self.items:
                time.sleep(RETRY_S)
        with _whatever_comes():
            self.scheduler.arrived(self.stage, self._ring)
            self.scheduler.mend()
            self._observe(items, outcomes)

    @property
    def stuck_at_s(self) -> float | None:
        """When foreign code will have worked on a batch that nobody waits for any more for as long
        as the whole of the stage's timeout; None where it does no such thing.
        """
        plan, items = self.stage.plan, self.items
        if plan.nodes[0].op != graph.PYTHON or plan.timeout_s is None or not items:
            return None
        return None if any(i.is_wanted for i in items) else self._began_s + plan.timeout_s

    def _feed(self, instance: Instance) -> None:
        """Batch after batch, each done before the next is taken, until the scheduler is closed."""
        while not self.is_abandoned and (items := self._next_batch()) is not None:
            self._began_s = self.scheduler.clock()
            self.items = items
            try:
                outcomes = instance.run([item.value for item in items])
            except InstanceLost:
                raise
            except Exception as error:
                outcomes = self._all_failed(items, error)
            self._finish(items, outcomes, self.scheduler.clock() - self._began_s)
            items = outcomes = []  # hold no picture while waiting

    def _feed_overlapping(self, instance: Overlapping) -> None:
        """Batch after batch, the next begun before the one under way is collected."""
        clock = self.scheduler.clock
        before: list[Item] = []
        launched: Any = None
        since_s = 0.0  # busy since then, or since the batch before was done
        while True:
            items = (
                self._next_batch()
                if not before
                else self.scheduler.take_ahead(self.stage, len(before))
            )
            if items is None:
                return
            if not before:
                since_s = clock()
            self.items = before + items
            begun = self._try(instance.begin, [i.value for i in items], items) if items else None
            if before:
                outcomes = self._try(instance.collect, launched, before)
                now_s = clock()
                self._finish(before, outcomes, now_s - since_s)
                since_s = now_s
            if items and not isinstance(begun, _Failed):
                begun = self._try(instance.launch, begun, items)
            if isinstance(begun, _Failed):
                self._finish(items, begun.outcomes, 0.0)
                items, begun = [], None
            before, launched = items, begun
            items, begun, outcomes = [], None, None  # hold no picture while waiting

    def _try(self, step: Callable[[Any], Any], given: Any, items: list[Item]) -> Any:
        """A step of an overlapping instance; a failure becomes the outcome of all its items."""
        try:
            return step(given)
        except InstanceLost:
            raise
        except Exception as error:
            return _Failed(self._all_failed(items, error))

    def _all_failed(self, items: list[Item], error: Exception) -> list[Any]:
        log.exception("%s failed a batch", self.words, extra=self.fields)
        return [self._another(error) for _ in items]

    def _another(self, error: Exception) -> RequestError:
        """The same error for another request: each is raised in a thread of its own."""
        if isinstance(error, RequestError):
            return copy.copy(error)
        return StageFailed(in_words(error), stage=self.stage.plan.name)

    def _finish(self, items: list[Item], outcomes: Any, busy_s: float) -> None:
        if isinstance(outcomes, _Failed):
            outcomes = outcomes.outcomes
        if len(outcomes) != len(items):
            error = InternalError(f"{len(items)} items gave {len(outcomes)} outcomes")
            outcomes = self._all_failed(items, error)
        self.items = self.items[len(items) :]
        try:
            self.scheduler.finish(items, outcomes, busy_s)
        except BaseException:
            self.items = items + self.items  # to be answered with the error
            raise
        if self.scheduler.observer is not None:
            self._observe(items, outcomes)

    def _observe(self, items: list[Item], outcomes: list[Any]) -> None:
        """Show a batch to who follows requests. What goes wrong at that is not theirs."""
        observer = self.scheduler.observer
        if observer is None or not items:
            return
        try:
            observer.observe(Worked(self.stage.plan.name, self.number, items, outcomes))
        except Exception:
            log.exception("a batch could not be observed", extra=self.fields)

    def _lost(self, error: BaseException) -> StageFailed:
        reason = str(error) if isinstance(error, (InstanceLost, EngineError)) else in_words(error)
        return StageFailed(f"an instance was lost: {reason}", stage=self.stage.plan.name)

    def _new_instance(self) -> Instance:
        instance = self.make()
        try:
            instance.warm()
        except BaseException:
            self._close(instance)
            raise
        return instance

    def _close(self, instance: Instance | None) -> None:
        """Close an instance. A lost one may well fail at it, and its lane goes on."""
        try:
            if instance is not None:
                instance.close()
        except BaseException:
            with _whatever_comes():
                log.exception("an instance of %s did not close", self.words, extra=self.fields)

    def _replacement(self) -> Instance | None:
        """A new instance, however often it takes; until then what comes in is answered.

        None once the scheduler is closed.
        """
        self.scheduler.lose_instance(self.stage)
        try:
            return self._made_at_last()
        finally:
            self.scheduler.regain_instance(self.stage)

    def _made_at_last(self) -> Instance | None:
        pause_s = RETRY_S
        while not self.scheduler.is_closed:
            try:
                return self._new_instance()
            except BaseException as error:
                told = "no new instance of %s yet: %s"
                with _whatever_comes():
                    log.error(told, self.words, error, extra=self.fields)
                with _whatever_comes():
                    self.scheduler.fail_if_lost(self.stage, self._lost(error).message)
                time.sleep(pause_s)
                pause_s = min(2.0, pause_s * 2)
        return None

    def _next_batch(self) -> list[Item] | None:
        """The next batch, or None when the scheduler is closed."""
        ring = self._ring
        while not self.scheduler.is_closed:
            items, due_s = self.scheduler.take(self.stage, ring)
            if items:
                return items
            patience_s = None
            if due_s is not None:
                patience_s = min(max(0.0, due_s - self.scheduler.clock()), LONGEST_S)
            try:
                self._bell.get(timeout=patience_s)
            except Empty:
                if self.scheduler.leave(self.stage, ring):
                    continue
                self._bell.get()  # rung just as the patience ran out
            self.scheduler.arrived(self.stage, ring)
        return None


def _whatever_comes() -> contextlib.AbstractContextManager[None]:
    """For what must not end a thread of an app: a lane that ends leaves its stage without an
    instance. Where the log fails at telling of an error there is nobody left to be told.
    """
    return contextlib.suppress(BaseException)


def clear_frames(error: BaseException) -> None:
    """Let go of what could not be made, here where its GPU is current: an error is the caller's,
    and would keep it for as long as that is kept.
    """
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__ or error


class _Failed:
    """A step failed: the outcome of each item it worked on."""

    __slots__ = ("outcomes",)

    def __init__(self, outcomes: list[Any]) -> None:
        self.outcomes = outcomes


class Lanes:
    """The lanes of an app, one for each instance of each stage, and those that took a stuck one's
    place.
    """

    def __init__(self, scheduler: Scheduler, make: Callable[[StagePlan, int], Instance]) -> None:
        self._scheduler = scheduler
        self._make = make
        self._to_start: deque[Lane] = deque()
        self.all = [
            self._lane(stage, number)
            for stage in scheduler.stages
            for number in range(stage.plan.instances)
        ]

    def _lane(self, stage: Stage, number: int, *, is_replacement: bool = False) -> Lane:
        make = functools.partial(self._make, stage.plan, number)
        return Lane(self._scheduler, stage, number, make, is_replacement=is_replacement)

    def replace_stuck(self) -> float | None:
        """Give the place of each stuck lane to a new one. Returns when the next one may be.

        Called by the watch over deadlines. A thread cannot be ended from outside: it is left to
        itself, and ends if it comes back.
        """
        came_back = [lane for lane in self.all if lane.is_abandoned and not lane.is_alive()]
        for lane in came_back:
            self.all.remove(lane)
        now, following_s = self._scheduler.clock(), None
        for lane in [lane for lane in self.all if not lane.is_abandoned]:
            stuck_at_s = lane.stuck_at_s
            name = lane.stage.plan.name
            gone = sum(other.is_abandoned for other in self.all if other.stage is lane.stage)
            if stuck_at_s is None or gone >= MAX_ABANDONED:
                continue
            if stuck_at_s > now:
                following_s = min(stuck_at_s, following_s or stuck_at_s)
                continue
            lane.is_abandoned = True
            replacement = self._lane(lane.stage, lane.number, is_replacement=True)
            self.all.append(replacement)
            self._to_start.append(replacement)
            message = "stage `%s`: a call does not come back, and is left to itself"
            log.error(message, name, extra=lane.fields)
        if not self._start():
            following_s = min(now + RETRY_S, following_s or math.inf)
        return following_s

    def _start(self) -> bool:
        """Start those that took a stuck one's place. False if there is no thread to be had yet."""
        while self._to_start:
            lane = self._to_start[0]
            try:
                lane.start()
            except RuntimeError as error:
                name = lane.stage.plan.name
                log.error("no new lane of stage `%s` yet: %s", name, error, extra=lane.fields)
                return False
            self._to_start.popleft()
        return True


class Watch(threading.Thread):
    """The thread that answers requests at their deadline, and ends an app that nobody has any more.

    `look` is called each time, and says when it wants to be called again. `on_left` is called once
    the app has been left, as the last that this thread does.
    """

    def __init__(self, scheduler: Scheduler, look: Callable[[], float | None]) -> None:
        super().__init__(name="flowlang-deadlines", daemon=True)
        self.scheduler = scheduler
        self.look = look
        self.on_left: Callable[[], object] = lambda: None
        self._is_left = self._is_over = False
        self._bell = threading.Lock()
        self._bell.acquire()
        scheduler.on_expiry = self._ring

    def run(self) -> None:
        while not (self._is_left or self._is_over):  # a closed app may yet be left
            try:
                self._wait()
                self.scheduler.expire()
            except BaseException:  # memory, the log, what is called with an answer
                with _whatever_comes():
                    log.exception("the watch over deadlines failed, and goes on")
                time.sleep(RETRY_S)
        if self._is_left:
            self.on_left()

    def _wait(self) -> None:
        """Wait until there may be something to do."""
        # In this order: what nobody waits for any more is no expiry, and is looked at instead.
        times = [t for t in (self.scheduler.next_expiry_s(), self.look()) if t is not None]
        when_s = min(times, default=None)
        patience_s = None if when_s is None else when_s - self.scheduler.clock()
        if patience_s is None or patience_s > 0:
            self._bell.acquire(timeout=-1 if patience_s is None else min(patience_s, LONGEST_S))

    def stop(self) -> None:
        """To be called once the scheduler is closed."""
        self._is_over = True
        self._ring()

    def leave(self) -> None:
        """End the app, and let nobody wait for that.

        The garbage collector calls this wherever it runs, under whatever locks: it takes none.
        """
        self._is_left = True
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # rung already, and not heard yet
            self._bell.release()
