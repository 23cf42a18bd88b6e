"""The Python face: load flows, call them, stop.

Layer 4. `load` checks and plans files, starts their stages and returns an App whose flows answer
blocking calls, Futures, `await` and whole iterables.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from flowlang.diagnostics import BadRequest, FlowError, RequestError
from flowlang.items import Arguments, accept_bytes, flow_acceptor
from flowlang.plan.files import PathLike, compile_files
from flowlang.plan.physical import FlowProgram, PhysicalPlan, lower
from flowlang.runtime import seal
from flowlang.runtime.instances import Instances
from flowlang.runtime.machine import this_machine
from flowlang.runtime.observer import Observer
from flowlang.runtime.request import FutureReply, LoopReply, Reply, Request, Told, Waiter
from flowlang.runtime.scheduler import Scheduler
from flowlang.runtime.seal import KeySource
from flowlang.runtime.stage import Lane, Lanes, Watch
from flowlang.window import Window

GRACE_S = 30.0
END_S = 10.0  # for a batch under way when the program ends


def load(
    path: PathLike,
    *others: PathLike,
    device: str | None = None,
    values: Mapping[str, object] | None = None,
    schedule: str | None = None,
    engines: PathLike | None = None,
    key: KeySource | None = None,
) -> App:
    """Check a flow file, load and warm its models, and return it ready to be called.

    With `others` it is one app of all their flows: a model that two files name is loaded once, and
    its batches are made of what is asked by either.

    `values` overrides params by their names, as `--set` does on the command line; `schedule` names
    the schedule that is laid over the unnamed one.

    `device` is `cpu`, `gpu`, `gpu:1`, or None for the GPU where there is one. `engines` is the
    folder of built TensorRT engines, in place of the user's cache. `key` opens encrypted models and
    encrypts the engines built from them: 32 bytes, their base64 text, or a callable that gives them
    (without it, the environment's FLOWLANG_KEY is asked when a model needs one).
    Raises CompileError with every error of the files, FlowError where two of them serve flows of
    one name, EngineError where a model or a device cannot be set up, OSError if a file cannot be
    read.
    """
    machine = this_machine(device)
    opener = seal.model_opener(key)
    plans = compile_files([path, *others], values=values, schedule=schedule, opener=opener)
    physical = lower(plans, machine)
    models = [stage.model for stage in physical.stages]
    is_sealed = any(model is not None and model.opener is not None for model in models)
    # No engine of an encrypted model is written in plain, wherever the key comes from.
    sealing = seal.read_key(key) if key is not None or is_sealed else None
    return App(physical, engines=engines, key=sealing)


class Flow:
    """One flow of a running App. May be used from any thread and any event loop."""

    def __init__(self, app: App, program: FlowProgram) -> None:
        self.name = program.name
        self.doc = program.plan.doc
        self.input = program.input
        self.output = program.output
        self._app = app
        self._scheduler = app.scheduler
        self._entrance = app.scheduler.entrances[program.name]
        self.parameters = program.plan.parameters
        self._accept = flow_acceptor(program.plan)
        self._arguments = Arguments(program.plan)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopReply] = (
            weakref.WeakKeyDictionary()
        )
        self._last_loop: tuple[weakref.ref[asyncio.AbstractEventLoop], LoopReply] | None = None

    def __call__(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> Any:
        """The answer for one item, waiting for it. `parameters` are those the flow declares.

        Of the requests that wait, those of priority 1 are served first, then those of 2, and so on;
        0 is that of the flow, which is 2 if its schedule says nothing else.

        Raises BadRequest, Overloaded, DeadlineExceeded, StageFailed or Draining.
        """
        waiter = Waiter()
        request = self.put(item, waiter, None, deadline_s, priority, parameters)
        try:
            return waiter.wait(request)
        except BaseException:
            self.cancel(request)
            raise

    def submit(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> Future[Any]:
        """A Future of the answer. Cancelling it takes the request out of the queue."""
        future: Future[Any] = Future()
        request = self.put(item, _FUTURES, future, deadline_s, priority, parameters)
        future.add_done_callback(lambda f: f.cancelled() and self.cancel(request))
        return future

    async def acall(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> Any:
        """The answer for one item, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        request = self.put(item, self._reply_of(loop), future, deadline_s, priority, parameters)
        try:
            return await future
        except (asyncio.CancelledError, GeneratorExit):  # the latter where it is dropped
            self.cancel(request)
            raise
        finally:
            del future, request  # or an error, through its traceback, would hold itself

    async def atimed(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> tuple[Any, float]:
        """The answer for one item, and how many seconds it waited with nothing at work on it."""
        # Not one with `acall`: if either called the other, each request would pay for a coroutine.
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        request = self.put(item, self._reply_of(loop), future, deadline_s, priority, parameters)
        try:
            return await future, request.queued_s
        except (asyncio.CancelledError, GeneratorExit):
            self.cancel(request)
            raise
        finally:
            del future, request  # as in `acall`

    def ask(self, item: Any, told: Told) -> Callable[[], object]:
        """Have an answer told in the running event loop. Returns what gives the request up.

        For those who answer in callbacks: a coroutine costs more than all else of a call.
        """
        reply = self._reply_of(asyncio.get_running_loop())
        return partial(self.cancel, self.put(item, reply, told, None, 0, {}))

    def _reply_of(self, loop: asyncio.AbstractEventLoop) -> LoopReply:
        """The reply of an event loop. The last one used is looked at first."""
        last = self._last_loop
        if last is not None and last[0]() is loop:
            return last[1]
        reply = self._loops.get(loop)
        if reply is None:
            reply = self._loops[loop] = LoopReply(loop)
        self._last_loop = (weakref.ref(loop), reply)
        return reply

    def map(
        self,
        items: Iterable[Any],
        /,
        *,
        errors: Literal["raise", "return"] = "raise",
        ahead: int | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
        **parameters: Any,
    ) -> Iterator[Any]:
        """The answers of many items, in order, at most `ahead` of them under way.

        With errors="return" an item that fails gives its exception in place of an answer.
        """
        if errors not in ("raise", "return"):
            raise BadRequest(f'`errors` is "raise" or "return", not {errors!r}')
        if isinstance(items, (bytes, str)):
            raise BadRequest(f"`map` takes many items, and this {type(items).__name__} is one")
        if ahead is None:
            ahead = 2 * max(1, self._entrance.room)
        if ahead < 1:
            raise BadRequest(f"`ahead` is 1 or more, not {ahead}")
        accept = self._accept
        if parameters or self.parameters:
            accept = partial(self._accept_beside, parameters)
        window = Window(
            self._scheduler,
            self._entrance,
            accept,
            items,
            ahead,
            deadline_s,
            priority,
            are_at_hand=type(items) in (list, tuple) and accept is accept_bytes,
        )
        for outcome in window.outcomes():
            if errors == "raise" and isinstance(outcome, BaseException):
                try:
                    raise outcome
                finally:
                    del outcome  # or the error, through its traceback, would hold itself
            yield outcome

    def put(
        self,
        item: Any,
        reply: Reply,
        token: Any,
        deadline_s: float | None,
        priority: int,
        parameters: Mapping[str, Any],
        arrived_s: float | None = None,
    ) -> Request:
        """Send an item whose answer goes to a reply of the caller's own, `token` with it.

        `arrived_s` is when it was asked for by `time.monotonic`, where that was not just now.
        """
        try:
            value = self._accept(item)
            if parameters or self.parameters:
                value = self._arguments.beside(value, parameters)
        except RequestError as error:
            self.count_refusal(error.code)
            raise
        return self._scheduler.submit(
            self._entrance, value, reply, token, deadline_s, priority, arrived_s
        )

    def cancel(self, request: Request) -> bool:
        """Give a request up: it leaves the queue and its answer is dropped. False if it is over."""
        return self._scheduler.cancel(request)

    def count_refusal(self, code: str, times: int = 1) -> None:
        """Count a request that was refused before it was put: metrics have it by its code."""
        self._scheduler.count_refusal(self._entrance, code, times)

    def _accept_beside(self, parameters: Mapping[str, Any], item: Any) -> Any:
        return self._arguments.beside(self._accept(item), parameters)

    def __repr__(self) -> str:
        return f"<flow {self.name}: {self.input} -> {self.output}>"


_FUTURES = FutureReply()


class App:
    """The flows of a file or of several, running. Also a context manager, which closes it.

    Called itself, it stands for its only flow; of several, pick one: `app["name"]`.
    """

    def __init__(
        self,
        physical: PhysicalPlan,
        *,
        engines: PathLike | None = None,
        key: seal.Key | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.physical = physical
        self.scheduler = Scheduler(physical, time.monotonic, observer)
        self.flows: Mapping[str, Flow] = {p.name: Flow(self, p) for p in physical.programs}
        self._instances = Instances(physical, Path(engines) if engines is not None else None, key)
        lanes = Lanes(self.scheduler, self._instances.make)
        self._watch = Watch(self.scheduler, lanes.replace_stuck)
        self._lanes = lanes.all
        # At the latest when the interpreter ends: a thread inside ONNX Runtime would take the
        # process down with it. An app that is dropped before that is ended by its watch, for the
        # collector may drop it in one of its lanes, under the lock that the end needs.
        self._end = weakref.finalize(
            self.scheduler, _end, self.scheduler, self._watch, self._lanes, self._instances
        )
        self._watch.on_left = partial(_end_left, self._end)
        weakref.finalize(self, self._watch.leave).atexit = False
        self._start()

    def _start(self) -> None:
        # Lanes import what they need. Threads that import numpy for the first time together, one of
        # them through another package, can find it half made.
        importlib.import_module("numpy")
        try:
            self._watch.start()
            for lane in self._lanes:
                lane.start()
            for lane in self._lanes:
                lane.is_ready.wait()
        except BaseException:  # no more threads to be had, or an interrupt
            self.scheduler.close()
            self._watch.leave()
            if not self._watch.is_alive():
                self._end()
            raise
        failures = [lane.failure for lane in self._lanes if lane.failure is not None]
        if failures:
            for lane in self._lanes:
                lane.failure = None  # its frames hold what could not be made, and soon this app
            self.close(0.0)
            raise failures.pop(0)  # and not held by this frame either, which it holds itself

    def __getitem__(self, name: str) -> Flow:
        """A flow by name. Raises FlowError with the names there are."""
        return self.flow(name)

    def flow(self, name: str | None = None) -> Flow:
        """A flow by name, or the only one. Raises FlowError with the names there are."""
        names = ", ".join(f"`{n}`" for n in self.flows)
        if name is None:
            if len(self.flows) != 1:
                raise FlowError(f"there are several flows, so name one of them: {names}")
            return next(iter(self.flows.values()))
        if name not in self.flows:
            raise FlowError(f"there is no flow `{name}`; there is {names}")
        return self.flows[name]

    def __call__(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> Any:
        """See Flow.__call__."""
        return self.flow()(item, deadline_s=deadline_s, priority=priority, **parameters)

    def submit(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> Future[Any]:
        """See Flow.submit."""
        return self.flow().submit(item, deadline_s=deadline_s, priority=priority, **parameters)

    async def acall(
        self, item: Any, /, *, deadline_s: float | None = None, priority: int = 0, **parameters: Any
    ) -> Any:
        """See Flow.acall."""
        return await self.flow().acall(item, deadline_s=deadline_s, priority=priority, **parameters)

    def map(
        self,
        items: Iterable[Any],
        /,
        *,
        errors: Literal["raise", "return"] = "raise",
        ahead: int | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
        **parameters: Any,
    ) -> Iterator[Any]:
        """See Flow.map."""
        return self.flow().map(
            items,
            errors=errors,
            ahead=ahead,
            deadline_s=deadline_s,
            priority=priority,
            **parameters,
        )

    def close(self, grace_s: float = GRACE_S) -> bool:
        """Take no more, answer what was accepted, stop. Closing twice does nothing.

        What is not done after `grace_s` seconds is answered with Draining. Returns whether
        everything was done in time.
        """
        if self.scheduler.is_held:  # the garbage collector found who had it
            self._watch.leave()
            return False
        in_time = self.scheduler.drain(grace_s)
        self.scheduler.close()
        caller = threading.current_thread()
        for lane in self._lanes:
            if lane.is_alive() and not lane.is_abandoned and lane is not caller:
                lane.join(5.0 if in_time else 0.2)
        self.scheduler.abandon([item for lane in self._lanes for item in lane.items])
        if in_time and caller is not self._watch and caller not in self._lanes:
            self._end()
        else:  # a lane is still at work: on an item, or on what it calls with an answer, like this
            self._watch.leave()
        return in_time

    def __enter__(self) -> App:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _end(scheduler: Scheduler, watch: Watch, lanes: list[Lane], instances: Instances) -> None:
    """Let the threads of an app come to their end. What still waits is answered with Draining."""
    if scheduler.is_forked:
        return  # they are another process's
    scheduler.close()
    watch.stop()
    threads = [*(lane for lane in lanes if not lane.is_abandoned), watch]
    others = [thread for thread in threads if thread is not threading.current_thread()]
    for thread in others:
        if thread.is_alive():
            thread.join(END_S)
    if not any(thread.is_alive() for thread in others):  # or it would lose what it works with
        instances.close()


def _end_left(end: weakref.finalize[..., Any]) -> None:
    """What `end` does, which counts as done only then: the interpreter may end meanwhile."""
    left = end.peek()
    if left is not None:
        _end(*left[2])
        end.detach()
