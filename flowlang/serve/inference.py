"""Flows as models of the Open Inference Protocol, version 2, whatever carries it.

Layer 4. A flow is a model of one version, `1`; a request brings one item or several, each of which
is batched with those of other requests, and is answered when all of them are. HTTP and gRPC say the
same in different words: both are built on this module, which knows neither.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from flowlang import __version__
from flowlang.diagnostics import BadRequest, Draining, RequestError
from flowlang.plan.types import Scalar, without_null
from flowlang.runtime.conform import PLAIN
from flowlang.serve.answer import Refusal, check_json, loading, reason_of, told
from flowlang.serve.form import ParameterReader
from flowlang.serve.log import tell_broken, tell_refused, tell_unanswered
from flowlang.serve.port import Port, Ports, port_of
from flowlang.serve.statistics import Statistics
from flowlang.serve.tensor import BYTES, Tensor, classes_of

if TYPE_CHECKING:
    from flowlang.app import App, Flow
    from flowlang.serve.trace import Tracer

PLATFORM = "flowlang"
VERSION = "1"  # of every model
EXTENSIONS = (
    *("binary_tensor_data", "classification", "model_configuration", "parameters"),
    *("schedule_policy", "statistics"),
)
# Request parameters that the protocol or its clients give a meaning of their own. Those that have
# none here may be a flow's; the others cannot be (flowlang.plan.declare).
RESERVED = frozenset(
    (
        *("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers"),
        *("binary_data_output", "binary_data"),
    )
)
RESERVED_START = "triton_"
LARGEST = 2**64 - 1  # of a whole number that the protocol gives a meaning: over gRPC it has 64 bits
MAX_CLASSES = 1 << 18  # of a request: while their texts are made, nothing else is done
_PLAIN = frozenset(Scalar(name) for name in PLAIN)

State: TypeAlias = Literal["loading", "ready", "draining"]
Asked = TypeVar("Asked")
Told = TypeVar("Told")
Carried = TypeVar("Carried", covariant=True)


@dataclass(frozen=True, slots=True)
class Request:
    """What a request asks: the tensors it brings, and those it wants by name (all if it has none).

    Of each of those, how many classes are wanted of an item; 0 is the tensor as it is.
    `timeout_s` is what its transport grants; its parameter `timeout` may say less. `priority` is
    what its transport says, where its parameter of that name says nothing.
    """

    inputs: Sequence[Tensor]
    outputs: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    timeout_s: float | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """A request as its flow takes it: items, the parameters of each, and the outputs wanted."""

    items: list[Any]
    parameters: list[dict[str, Any]]
    wanted: Mapping[str, int]
    deadline_s: float | None
    priority: int


class Exchange(Protocol[Carried]):
    """A transport's side of one inference: a request out of what came, an answer out of tensors.

    `request_id` is what the request is called in the log; it is settled once it has been read.
    """

    request_id: str

    def read(self, model: Model) -> Request:
        """What is asked of the model. Raises RequestError."""

    def write(self, model: Model, request: Request, tensors: list[Tensor]) -> Carried:
        """What goes back. Raises RequestError."""


class Unanswered(RequestError):
    """An error of a flow, as a client is told of it."""

    def __init__(self, error: RequestError, index: int | None = None) -> None:
        message = str(told(error, None, b"")["message"])
        super().__init__(message if index is None else f"item {index}: {message}")
        self.code, self.http_status = error.code, error.http_status


class Model:
    """A flow as a model. `limit` is how many items it takes at once."""

    def __init__(self, flow: Flow, limit: int, statistics: Statistics) -> None:
        self.name = flow.name
        self.flow = flow
        self.limit = limit
        self.statistics = statistics
        taken = {p.name for p in flow.parameters}
        name = next(n for n in ("input", "item", "in") if n not in taken)
        self.inputs = Ports.of_input(flow.input, name)
        self.outputs = Ports.of_output(flow.output, "output")
        self._texts = ParameterReader(flow.parameters)
        # Parameters of a kind that the protocol's own parameters cannot hold are tensors.
        self._arguments = {
            p.name: port_of(p.name, without_null(p.type), is_optional=not p.is_required)
            for p in flow.parameters
            if without_null(p.type) not in _PLAIN and p.name not in self.inputs.by_name
        }
        self._takes = {**self.inputs.by_name, **self._arguments}
        self._parameters = taken

    # What it is

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [_described(*_of_input(port)) for port in self._takes.values()],
            "outputs": [_described(*_of_output(port)) for port in self.outputs.all],
        }

    def config(self) -> dict[str, Any]:
        """Triton's model configuration: dimensions are those of one item."""
        return {
            "name": self.name,
            "platform": PLATFORM,
            "backend": PLATFORM,
            "max_batch_size": self.limit,
            "input": [
                {**_configured(*_of_input(port)), "optional": port.is_optional}
                for port in self._takes.values()
            ],
            "output": [_configured(*_of_output(port)) for port in self.outputs.all],
        }

    def only_input(self) -> Port:
        """The input that a body without names is. Raises BadRequest where there are others."""
        needed = [port for port in self._takes.values() if not port.is_optional]
        if len(needed) != 1:
            names = ", ".join(f"`{name}`" for name in self._takes)
            raise BadRequest(f"a raw body is one tensor, and this model takes {names}")
        return needed[0]

    # What it does

    def port(self, place: str, name: str, datatype: str, shape: tuple[int, ...]) -> Port:
        """The input that a tensor is. Raises BadRequest where it is none, or of too many items.

        To be asked before its values are read: what nobody takes shall cost nothing.
        """
        port = self._takes.get(name)
        if port is None:
            raise BadRequest(f"{place}: no input is named `{name}`; {self._needed()}")
        port.check(place, datatype, shape)
        if not 0 < shape[0] <= self.limit:
            most = f"a request has 1 to {self.limit:,}"
            raise BadRequest(f"{place}.shape: {shape[0]:,} items, and {most}")
        return port

    def read(self, request: Request) -> Work:
        """What a request asks of the flow. Raises BadRequest."""
        wanted = self._wanted(request.outputs)
        items, given = self._items(request)
        self._check_classes(wanted, len(items))
        deadline_s = _sooner(request.timeout_s, _timeout_s(request.parameters))
        what = "number, 1 the first to be served"
        priority = _whole("parameters", request.parameters, "priority", what) or request.priority
        return Work(items, given, wanted, deadline_s, priority)

    async def run(self, work: Work) -> tuple[list[Any], float]:
        """The answers for all items, and how many seconds they waited until one was worked on.

        Raises Unanswered for the first that has no answer.
        """
        calls = [
            self.flow.atimed(item, deadline_s=work.deadline_s, priority=work.priority, **parameters)
            for item, parameters in zip(work.items, work.parameters, strict=True)
        ]
        if len(calls) > 1:
            timed = await _all(calls)
            return [answer for answer, _ in timed], min(queued_s for _, queued_s in timed)
        try:
            answer, queued_s = await calls[0]
        except RequestError as error:
            raise Unanswered(error) from error
        return [answer], queued_s

    def tensors(self, answers: Sequence[Any], work: Work) -> list[Tensor]:
        """What goes back of the answers for all items. Raises BadRequest."""
        found = self.outputs.columns(answers, work.wanted)
        counts = work.wanted.values()
        return [classes_of(t, n) if n else t for t, n in zip(found, counts, strict=True)]

    def _check_classes(self, wanted: Mapping[str, int], items: int) -> None:
        made = 0.0
        for name, count in wanted.items():
            if not count:
                continue
            port = self.outputs.by_name[name]
            most = port.most_classes
            if most is None:
                raise BadRequest(f"`{name}` is {port.datatype}: only numbers are told as classes")
            made += items * min(count, most)
        if made > MAX_CLASSES:
            raise Refusal("too-large", 413, f"an answer has at most {MAX_CLASSES:,} classes")

    def _wanted(self, asked: Mapping[str, int]) -> Mapping[str, int]:
        known = self.outputs.by_name
        for index, name in enumerate(asked):
            if name not in known:
                there = ", ".join(f"`{n}`" for n in known)
                raise BadRequest(f"outputs[{index}]: no output is named `{name}`; there is {there}")
        return asked or dict.fromkeys(known, 0)

    def _items(self, request: Request) -> tuple[list[Any], list[dict[str, Any]]]:
        """The items of a request, and the parameters of each. Raises BadRequest."""
        ports: dict[str, Port] = {}
        texts: list[bytes] = []
        for index, tensor in enumerate(request.inputs):
            place = f"inputs[{index}]"
            # Again: another flow may have taken over from the one that was asked then.
            port = self.port(place, tensor.name, tensor.datatype, tensor.shape)
            if tensor.name in ports:
                raise BadRequest(f"{place}: `{tensor.name}` is given twice")
            if tensor.shape[0] != (count := request.inputs[0].shape[0]):
                raise BadRequest(f"{place}.shape: it has not {count} items, as inputs[0] has")
            ports[tensor.name] = port
            texts += port.json_of(tensor)
        check_json(texts)
        rows = {
            tensor.name: ports[tensor.name].rows(f"inputs[{index}]", tensor)
            for index, tensor in enumerate(request.inputs)
        }
        missing = [n for n, port in self._takes.items() if n not in rows and not port.is_optional]
        if missing:
            raise BadRequest(f"inputs: `{missing[0]}` is missing; {self._needed()}")
        if not rows:
            raise BadRequest(f"inputs: there is none; {self._needed()}")
        count = request.inputs[0].shape[0]
        arguments = {name: rows.pop(name) for name in self._arguments if name in rows}
        shared = self._shared(request.parameters)
        given = [shared] * count
        if arguments:
            given = [{**shared, **{n: v[i] for n, v in arguments.items()}} for i in range(count)]
        return self.inputs.items(rows, count), given

    def _needed(self) -> str:
        return f"this model takes {', '.join(f'`{name}`' for name in self._takes)}"

    def _shared(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The flow's parameters among those of a request. Raises BadRequest."""
        if not parameters:
            return {}
        found = {
            name: value
            for name, value in parameters.items()
            if value is not None
            and (
                name in self._parameters
                or not (name in RESERVED or name.startswith(RESERVED_START))
            )
        }
        try:
            texts = {name: value for name, value in found.items() if isinstance(value, str)}
            return {**found, **self._texts.of_texts(texts)}
        except BadRequest as error:
            raise BadRequest(f"parameters: {error.message}") from None


async def _all(calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """What all calls give. As soon as one fails the others are given up."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        errors = [task.exception() if task.done() else None for task in tasks]
        for index, error in enumerate(errors):
            if isinstance(error, RequestError):
                raise Unanswered(error, index) from error
            if error is not None:
                raise error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def _described(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _configured(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    datatype = "STRING" if datatype == BYTES else datatype
    return {"name": name, "data_type": f"TYPE_{datatype}", "dims": shape[1:]}


def _of_input(port: Port) -> tuple[str, str, list[int]]:
    """An input as it is described. One value an item gets a dimension of length one.

    It may be left out in a request, but perf_analyzer sends nothing that has no dimensions.
    """
    shape = [*port.wire_shape, *([1] if port.shape == () else [])]
    return port.name, port.datatype, shape


def _of_output(port: Port) -> tuple[str, str, list[int]]:
    return port.name, port.datatype, port.wire_shape


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    """What the parameter `timeout` allows: it is in microseconds. Raises BadRequest."""
    given = _whole("parameters", parameters, "timeout", "number of microseconds")
    return given / 1e6 if given else None


def check_no_region(place: str, parameters: Mapping[str, Any], instead: str) -> None:
    """Raises BadRequest where a tensor is to lie in memory that a client shares."""
    if parameters.get("shared_memory_region") is not None:
        raise BadRequest(f"{place}: there is no shared memory; {instead}")


def class_count(place: str, parameters: Mapping[str, Any]) -> int:
    """How many classes the parameters of an output ask for; 0 is the tensor. Raises BadRequest."""
    check_no_region(place, parameters, "the tensor comes in the answer")
    return _whole(place, parameters, "classification", "number of classes")


def _whole(place: str, parameters: Mapping[str, Any], name: str, what: str) -> int:
    """A parameter that the protocol gives a meaning; 0 says nothing. Raises BadRequest."""
    given = parameters.get(name)
    if given is None:
        return 0
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise BadRequest(f"{place}.{name}: a whole {what} is wanted")
    if given > LARGEST:
        raise BadRequest(f"{place}.{name}: it is above {LARGEST}, the most that it can be")
    return given


def _sooner(one: float | None, other: float | None) -> float | None:
    return min((s for s in (one, other) if s is not None), default=None)


class Inference:
    """All models of a server, and whether they take requests. Belongs to one event loop."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.state: State = "loading"
        self.hindrance = ""  # why none should be sent here, though they are let in
        self.tracer = tracer
        self.models: dict[str, Model] = {}
        self.refusals: Counter[str] = Counter()  # of requests that are of no flow, by code
        self.on_change: list[Callable[[], object]] = []  # called when `status` has changed

    def let_in(self, app: App) -> None:
        """Take requests for these flows. The counts of those that were there before go on."""
        known = {name: model.statistics for name, model in self.models.items()}
        self.models = {
            name: Model(flow, app.scheduler.entrances[name].limit, known.get(name) or Statistics())
            for name, flow in app.flows.items()
        }
        for name, model in self.models.items():
            stages = app.scheduler.entrances[name].stages
            models = [s for s in stages if s.plan.model is not None]
            model.statistics.follow(app.scheduler, models)
        self.become("ready")

    def refuse(self) -> None:
        """Let no request in any more. Those inside go on."""
        self.become("draining")

    def hinder(self, why: str) -> None:
        """Tell health checks that none should be sent here, or with no reason that they may."""
        self.hindrance = why
        self._tell_change()

    def become(self, state: State) -> None:
        self.state = state
        self._tell_change()

    def count_refusal(self, code: str) -> None:
        """Count a request that was refused, and that is of no flow: metrics have it by its code."""
        self.refusals[code] += 1

    def turn_away(self, error: RequestError, request_id: str) -> None:
        """Count such a request, and tell of it. It may have no id."""
        self.count_refusal(error.code)
        tell_refused(request_id, error.code, error.message)

    def _tell_change(self) -> None:
        for tell in self.on_change:
            tell()

    @property
    def is_open(self) -> bool:
        """Whether requests are let in."""
        return self.state == "ready"

    @property
    def is_ready(self) -> bool:
        """What health checks are told: whether requests should be sent here."""
        return self.is_open and not self.hindrance

    @property
    def status(self) -> str:
        """The state, or what hinders it from being ready."""
        return self.hindrance if self.is_open and self.hindrance else self.state

    def check_open(self) -> None:
        """Raises Refusal or Draining where no request is let in."""
        if self.state == "loading":
            raise loading()
        if self.state == "draining":
            raise Draining()

    def model(self, name: str, version: str = "") -> Model:
        """A model by its name. Raises Refusal where there is none, or not in this version."""
        found = self.models.get(name)
        if found is None:
            if self.state == "loading":
                self.check_open()
            there = ", ".join(f"`{n}`" for n in self.models)
            raise Refusal("not-found", 404, f"there is no model `{name}`; there is {there}")
        if version not in ("", VERSION):
            raise Refusal("not-found", 404, f"`{name}` has the version {VERSION}, not {version}")
        return found

    def is_model_ready(self, name: str, version: str = "") -> bool:
        return self.is_ready and name in self.models and version in ("", VERSION)

    def metadata(self) -> dict[str, Any]:
        return {"name": PLATFORM, "version": __version__, "extensions": list(EXTENSIONS)}

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """The statistics of one model, or of all. Raises Refusal where there is none such."""
        asked = [self.model(name, version)] if name else list(self.models.values())
        return {
            "model_stats": [
                {"name": m.name, "version": VERSION, **m.statistics.as_json()} for m in asked
            ]
        }

    def index(self, *, is_ready: bool = False) -> list[dict[str, str]]:
        """The models there are; with `is_ready` those that take requests."""
        if is_ready and not self.is_ready:
            return []
        state, reason = ("READY", "") if self.is_ready else ("UNAVAILABLE", self.status)
        return [
            {"name": name, "version": VERSION, "state": state, "reason": reason}
            for name in self.models
        ]

    async def infer(self, name: str, version: str, exchange: Exchange[Carried]) -> Carried:
        """Answer a request. Raises RequestError, of which a client may be told; it is counted."""
        try:
            self.check_open()
            model = self.model(name, version)
        except RequestError as error:
            self.turn_away(error, exchange.request_id)
            raise
        model.statistics.last_ms = time.time_ns() // 1_000_000
        clock = _Clock()
        try:
            request = exchange.read(model)
            work = model.read(request)
            clock.lap()

            async def run(asked: Model) -> tuple[Model, Work, list[Any], float]:
                own = work if asked is model else asked.read(request)
                return asked, own, *await asked.run(own)

            asked, done, answers, queued_s = await asked_again(model, lambda: self._now(name), run)
            clock.lap()
            carried = exchange.write(asked, request, asked.tensors(answers, done))
            clock.lap()
        except RequestError as error:
            if not clock.laps_ns:  # it was not put
                model.flow.count_refusal(error.code)
            tell_unanswered(exchange.request_id, name, reason_of(error))
            raise
        except Exception as error:
            tell_broken(exchange.request_id, name, error)
            raise Refusal("internal", 500, "internal error") from None
        else:
            input_ns, infer_ns, output_ns = clock.laps_ns
            parts_ns = (round(queued_s * 1e9), input_ns, infer_ns, output_ns)
            model.statistics.succeed(len(done.items), *parts_ns)
            return carried
        finally:
            if len(clock.laps_ns) < 3:
                model.statistics.fail(clock.total_ns)

    def _now(self, name: str) -> Model | None:
        """The model of a name that takes requests now."""
        return self.models.get(name) if self.is_open else None


async def asked_again(
    first: Asked, now: Callable[[], Asked | None], ask: Callable[[Asked], Awaitable[Told]]
) -> Told:
    """What a flow tells; or the one there is `now`, where it has taken over meanwhile."""
    try:
        return await ask(first)
    except RequestError as error:
        successor = taken_over(first, now, error)
        if successor is None:
            raise
    return await ask(successor)


def taken_over(first: Asked, now: Callable[[], Asked | None], error: BaseException) -> Asked | None:
    """What has taken over from the first `now`, where that is why it refused."""
    is_refused = isinstance(error, RequestError) and error.code == Draining.code
    successor = now() if is_refused else None
    return None if successor is first else successor


def known(name: str, flows: Container[str]) -> str:
    """The name of a flow as traces have it: what clients make up is not one of theirs."""
    return name if name in flows else "unknown"


async def emptied(
    under_way: Callable[[], int],
    grace_s: float,
    patience_s: float = math.inf,
    hurry: Callable[[], object] | None = None,
) -> bool:
    """Wait until nothing is under way, at most `grace_s`. Returns whether that was in time.

    Once it has taken `patience_s`, `hurry` is called again and again.
    """
    clock = asyncio.get_running_loop().time
    start_s = clock()
    while under_way() and clock() < start_s + grace_s:
        if hurry is not None and clock() > start_s + patience_s:
            hurry()
        await asyncio.sleep(0.01)
    return not under_way()


class _Clock:
    """Measures the parts of a request: reading it, running the flow, writing the answer."""

    def __init__(self) -> None:
        self._start_ns = self._last_ns = time.perf_counter_ns()
        self.laps_ns: list[int] = []

    def lap(self) -> None:
        now_ns = time.perf_counter_ns()
        self.laps_ns.append(now_ns - self._last_ns)
        self._last_ns = now_ns

    @property
    def total_ns(self) -> int:
        return time.perf_counter_ns() - self._start_ns
