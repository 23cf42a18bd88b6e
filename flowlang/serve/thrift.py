"""Pictures over Thrift: the services of inference.thrift, at one port.

Layer 4, and the only file importing thriftpy2. The transport is buffered or framed, whichever a
client uses, the protocol binary. A request that is not answered raises TApplicationException: an
empty answer would be taken for one. Where several flows are served, a client names the one it means
as Thrift names services at one port: `classify:infer_batch`.
"""

from __future__ import annotations

import asyncio
import io
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import BadRequest, RequestError
from flowlang.items import plain
from flowlang.plan.types import ListOf, Record, Tensor, Type
from flowlang.serve.access import tell
from flowlang.serve.answer import request_id_of, takes_bytes, to_json
from flowlang.serve.inference import Inference, Unanswered, asked_again, emptied
from flowlang.serve.launch import BACKLOG, listen
from flowlang.serve.log import tell_broken, tell_refused, tell_unanswered
from flowlang.serve.setup import Setup
from flowlang.serve.thrift_wire import Extent, Malformed, find_message
from flowlang.serve.tls import expect_no_goodbye

if TYPE_CHECKING:
    from flowlang.app import Flow

MESSAGE_S = 120.0  # a message that takes longer to arrive is cut off
AHEAD_BYTES = 1 << 20  # of messages sent ahead of their answers: then no more is read
_CALL, _REPLY, _EXCEPTION, _ONEWAY = 1, 2, 3, 4
_NAMES = {None: "", _REPLY: "REPLY", _EXCEPTION: "EXCEPTION"}
_UNKNOWN_METHOD, _WRONG_TYPE, _INTERNAL, _PROTOCOL = 1, 2, 6, 7  # of TApplicationException

log = logging.getLogger("flowlang.serve")


class _Refused(Exception):
    """A call that is answered with an exception: its text and the type of it.

    `code` is what it is counted by, where it is of no flow, which would count it.
    """

    def __init__(self, text: str, kind: int, code: str = "") -> None:
        super().__init__(text)
        self.kind = kind
        self.code = code


@dataclass(slots=True)
class _Call:
    """A call as it came, and what becomes of it.

    `flow` is the one it names, if any, `request_id` what it is called in the log, once it has an
    id, and `answered` the type of the message that answers it.
    """

    flow: str
    name: str
    kind: int
    number: int
    request_id: str = ""
    answered: int | None = None


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of the services: the structs around its arguments and its result."""

    arguments: Any
    result: Any
    answer: Callable[[_Call, Any], Awaitable[Any]]


class ThriftServer:
    """Serves the flows of `inference` over Thrift, in the event loop that starts it.

    `flow` is the one meant by a client that names none; by default the only one there is that takes
    bytes, or the only one of those that gives labels.
    """

    def __init__(
        self, inference: Inference, setup: Setup, port: int, flow: str | None = None
    ) -> None:
        self.scheme = "thrifts" if setup.certificate else "thrift"
        self.max_body_bytes = setup.max_body_bytes
        self.tells_requests = setup.tells_requests
        self.under_way = 0
        self.connections: set[_Connection] = set()
        self._context = setup.certificate.context if setup.certificate else None
        self.is_tls = self._context is not None
        self._address = (setup.host, port)
        self._count_refusal = inference.count_refusal
        self._calls = _Calls(inference, flow)
        self._server: asyncio.Server | None = None
        self._methods: dict[str, _Method] = {}

    async def start(self) -> int:
        """Begin to listen. Returns the port. Raises FlowError where it cannot be had."""
        self._methods = _methods(self._calls)
        loop = asyncio.get_running_loop()
        listener = listen(*self._address)
        port: int = listener.getsockname()[1]
        self._server = await loop.create_server(
            lambda: _Connection(self), sock=listener, backlog=BACKLOG, ssl=self._context
        )
        return port

    async def stop(self, grace_s: float) -> bool:
        """Answer what is inside, then stop. Returns whether that was done in time.

        Nothing new is let in once `inference` refuses it, which is told to who asks until the end.
        """
        clock = asyncio.get_running_loop().time
        until_s = clock() + grace_s
        in_time = await emptied(lambda: self.under_way, grace_s)
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close()
        # Each goes once its client has taken what it was answered.
        in_time = await emptied(lambda: len(self.connections), until_s - clock()) and in_time
        for connection in list(self.connections):
            connection.abort()
        return in_time

    async def answer(self, message: bytes) -> bytes | None:
        """The answer to one message; None where none is expected. Raises Malformed."""
        start_s = time.perf_counter()
        protocol = _binary(message)
        try:
            asked, kind, number = protocol.read_message_begin()
        except UnicodeDecodeError:
            raise Malformed("a method's name is not UTF-8") from None
        flow, _, name = asked.rpartition(":")
        call = _Call(flow, name, kind, number)
        try:
            return await self._answer(call, protocol)
        finally:
            if self.tells_requests:
                shown = _NAMES[call.answered]
                tell("Thrift", asked, call.answered, start_s, call.request_id, shown)

    async def _answer(self, call: _Call, protocol: Any) -> bytes | None:
        try:
            found = await self._result(call, protocol)
        except _Refused as error:
            found = error
            if error.code:
                self._count_refusal(error.code)
                tell_refused(call.request_id, error.code, str(error))
        if call.kind == _ONEWAY:
            return None
        written = _written(call, found)
        call.answered = _EXCEPTION if isinstance(found, _Refused) else _REPLY
        return written

    async def _result(self, call: _Call, protocol: Any) -> Any:
        """The result of a call, in the struct around it. Raises _Refused."""
        if call.kind not in (_CALL, _ONEWAY):
            raise _Refused("this is no call", _WRONG_TYPE, BadRequest.code)
        name = call.name
        method = self._methods.get(name)
        if method is None:
            known = ", ".join(self._methods)
            text = f"there is no method `{name:.100}`; there is {known}"
            raise _Refused(text, _UNKNOWN_METHOD, "not-found")
        arguments = method.arguments()
        try:
            arguments.read(protocol)
        except Exception:  # the lengths are right, so that any other fault is what was sent
            text = f"these are no arguments of `{name}`"
            raise _Refused(text, _PROTOCOL, BadRequest.code) from None
        self.under_way += 1
        try:
            result = method.result()
            result.success = await method.answer(call, arguments)  # void has no field for it
            return result
        finally:
            self.under_way -= 1


def _methods(calls: _Calls) -> dict[str, _Method]:
    """The methods of the services that the IDL declares."""
    import thriftpy2

    text = resources.files(__package__).joinpath("inference.thrift").read_text("utf-8")
    declared = thriftpy2.load_fp(io.StringIO(text), "flowlang_inference_thrift")
    calls.declared = declared
    return {
        name: _Method(
            getattr(service, f"{name}_args"),
            getattr(service, f"{name}_result"),
            getattr(calls, name),
        )
        for service in (declared.InferenceService, declared.ImageProcessingService)
        for name in service.thrift_services
    }


def _binary(message: bytes) -> Any:
    """The binary protocol, to read a message or to write one."""
    from thriftpy2.protocol import binary
    from thriftpy2.transport import memory

    protocol: Any = binary.TBinaryProtocol
    buffer: Any = memory.TMemoryBuffer
    return protocol(buffer(message or None))


def _written(call: _Call, found: Any) -> bytes:
    """A message with a result, or with an exception."""
    from thriftpy2.thrift import TApplicationException

    protocol = _binary(b"")
    is_refused = isinstance(found, _Refused)
    protocol.write_message_begin(call.name, _EXCEPTION if is_refused else _REPLY, call.number)
    if isinstance(found, _Refused):
        found = TApplicationException(found.kind, str(found))
    found.write(protocol)
    protocol.write_message_end()
    return bytes(protocol.trans.getvalue())


class _Calls:
    """The methods, by their names: each takes the call and its arguments."""

    def __init__(self, inference: Inference, flow: str | None) -> None:
        self.declared: Any = None  # the structs of the IDL
        self._inference = inference
        self._default = flow

    async def ping(self, call: _Call, arguments: Any) -> None:
        """Answer, and nothing more."""

    async def infer_batch(self, call: _Call, arguments: Any) -> Any:
        """The label of a picture, and its score."""
        given = arguments.params
        if given is None or given.uuid is None or given.data is None:
            text = "params.uuid and params.data are required"
            raise _Refused(text, _PROTOCOL, BadRequest.code)
        # What is not UTF-8 comes as bytes.
        uuid = given.uuid.encode() if isinstance(given.uuid, str) else given.uuid
        call.request_id = request_id_of(uuid).decode("ascii")
        try:
            flow, answer = await self._ask(call, given.data, needs_label=True)
            label, score = label_of(flow.output, answer)
        except RequestError as error:
            raise _Refused(f"{error.code}: {error.message}", _INTERNAL) from None
        return self.declared.InferenceResult(label=label, score=score)

    async def process_image(self, call: _Call, arguments: Any) -> Any:
        """What a flow answers, as JSON; errors have a field of their own here."""
        given = arguments.request
        response = self.declared.ProcessResponse
        if given is None or given.image_data is None:
            raise _Refused("request.image_data is missing", _PROTOCOL, BadRequest.code)
        call.request_id = request_id_of(None).decode("ascii")
        try:
            _, answer = await self._ask(call, given.image_data, needs_label=False)
        except RequestError as error:
            message = f"{error.code}: {error.message}"
            return response(success=False, result_data="", error_message=message)
        text = to_json(plain(answer)).decode()
        return response(success=True, result_data=text, error_message="")

    async def _ask(self, call: _Call, picture: bytes, *, needs_label: bool) -> tuple[Flow, Any]:
        """What a flow answers, and which one that was: another may have taken over meanwhile."""

        def now() -> Flow:
            return self._flow(call.flow, needs_label=needs_label)

        async def ask(flow: Flow) -> tuple[Flow, Any]:
            return flow, await flow.acall(picture)

        try:
            flow = now()
        except RequestError as error:
            tell_refused(call.request_id, error.code, error.message)
            raise
        tracer = self._inference.tracer
        trace: AbstractContextManager[object] = nullcontext()
        if tracer is not None:
            trace = tracer.begin(flow.name, {}, {"rpc.system": "thrift"}, call.request_id)
        with trace:
            try:
                return await asked_again(flow, now, ask)
            except RequestError as error:
                tell_unanswered(call.request_id, flow.name, error)
                raise Unanswered(error) from error
            except Exception as error:
                tell_broken(call.request_id, flow.name, error)
                raise _Refused("internal: internal error", _INTERNAL) from None

    def _flow(self, named: str, *, needs_label: bool) -> Flow:
        """The flow that a call means. Raises RequestError, which is counted."""
        try:
            found = self._meant(named, needs_label=needs_label)
        except RequestError as error:
            self._inference.count_refusal(error.code)
            raise
        if not takes_bytes(found.input):
            found.count_refusal(BadRequest.code)
            raise BadRequest(f"flow `{found.name}` does not take the bytes of a picture")
        if needs_label and not gives_label(found.output):
            found.count_refusal(BadRequest.code)
            raise BadRequest(f"flow `{found.name}` gives {found.output}, and no label with a score")
        return found

    def _meant(self, named: str, *, needs_label: bool) -> Flow:
        self._inference.check_open()
        name = named if named in self._inference.models else self._default
        if name is not None:
            return self._inference.model(name).flow
        flows = {
            name: model.flow
            for name, model in self._inference.models.items()
            if takes_bytes(model.flow.input)
        }
        labelling = [flow for flow in flows.values() if gives_label(flow.output)]
        fitting = labelling if needs_label or len(flows) > 1 else list(flows.values())
        if len(fitting) != 1:
            known = ", ".join(f"`{flow}`" for flow in flows) or "none"
            raise BadRequest(
                f"name the flow, as in `flow:method`; those that take pictures are {known}"
            )
        return fitting[0]


def gives_label(kind: Type) -> bool:
    """Whether an answer of this type has a label and a score: labels, or the scores of classes."""
    if isinstance(kind, ListOf):
        kind = kind.item
    if isinstance(kind, Record):
        return kind.get("label") is not None and kind.get("score") is not None
    return (
        isinstance(kind, Tensor)
        and kind.dtype.startswith("f")
        and kind.shape is not None
        and len(kind.shape) == 1
    )


def label_of(kind: Type, answer: Any) -> tuple[str, float]:
    """The first label with its score, or the number of the class with the highest one.

    Raises BadRequest where there is none, as where nothing was found in a picture.
    """
    if isinstance(kind, Tensor):
        if not len(answer):
            raise BadRequest("the flow gives no score")
        best = int(answer.argmax())
        return str(best), float(answer[best])
    if isinstance(kind, ListOf):
        if not answer:
            raise BadRequest("the flow gives no label for this picture")
        answer = answer[0]
    return str(answer["label"]), float(answer["score"])


class _Connection(asyncio.Protocol):
    """One client's connection: messages out of its bytes, answered one after the other."""

    def __init__(self, server: ThriftServer) -> None:
        self._server = server
        self._buffer = bytearray()
        self._needed = 4  # bytes before it is worth looking for a message
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._late: asyncio.TimerHandle | None = None
        self._context = copy_context()  # of no request: each begins its own trace
        self._is_full = False  # the client does not take its answers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        # A client that is gone without a word is found out, in the course of two hours.
        connected = transport.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._transport = None
        if self._late is not None:
            self._late.cancel()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()
        has_to_wait = self._task is not None or self._is_full
        if has_to_wait and len(self._buffer) > AHEAD_BYTES and self._transport:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        if self._transport is not None:
            self._transport.resume_reading()
        self._advance()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            if self._server.is_tls:
                expect_no_goodbye(self._transport)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _advance(self) -> None:
        """Begin with the next message, if it is there and its turn."""
        if self._task is not None or self._is_full or len(self._buffer) < self._needed:
            self._watch()
            return
        try:
            extent = find_message(self._buffer, self._server.max_body_bytes)
        except Malformed as error:
            self._give_up(error)
            return
        if not extent.is_complete:
            self._needed = extent.end
            self._watch()
            return
        self._needed = 4
        message = bytes(memoryview(self._buffer)[extent.start : extent.end])
        del self._buffer[: extent.end]
        begin = asyncio.get_running_loop().create_task
        self._task = self._context.run(begin, self._answer(message, extent))
        self._watch()

    def _watch(self) -> None:
        """Let the rest of a message that has begun come within MESSAGE_S."""
        is_waiting = bool(self._buffer) and self._task is None and not self._is_full
        if is_waiting and self._late is None:
            self._late = asyncio.get_running_loop().call_later(MESSAGE_S, self.close)
        elif not is_waiting and self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self, error: Malformed) -> None:
        """What came is no message, and what follows cannot be told from it."""
        log.info("a Thrift connection is closed: %s", error)
        if self._server.tells_requests:
            tell("Thrift", "", None, time.perf_counter(), "")
        self.close()

    async def _answer(self, message: bytes, extent: Extent) -> None:
        try:
            answer = await self._server.answer(message)
        except Malformed as error:
            self._give_up(error)
            return
        except Exception:
            log.exception("a Thrift message could not be answered")
            self.close()
            return
        self._task = None
        if self._transport is None:
            return
        if answer is not None:
            head = len(answer).to_bytes(4, "big") if extent.is_framed else b""
            self._transport.write(head + answer)
        self._transport.resume_reading()
        self._advance()
