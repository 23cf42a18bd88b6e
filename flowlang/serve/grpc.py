"""The Open Inference Protocol, version 2, over gRPC, and gRPC's own health checks.

Layer 4, and the only file importing grpc. Messages are those of inference.proto and health.proto;
what they ask is answered by flowlang.serve.inference. Bodies are parsed here and not by grpc, which
answers what is no message with a traceback.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, TypeAlias

from flowlang.diagnostics import BadRequest, FlowError, RequestError
from flowlang.serve.access import tell
from flowlang.serve.answer import Refusal, is_request_id, request_id_of
from flowlang.serve.inference import (
    VERSION,
    Inference,
    Model,
    Request,
    check_no_region,
    class_count,
    emptied,
    known,
)
from flowlang.serve.proto import Method, Protocol, read_protocol
from flowlang.serve.setup import Setup
from flowlang.serve.tensor import (
    BYTES,
    Tensor,
    Values,
    check_count,
    check_datatype,
    check_shape,
    from_field,
    from_raw,
    to_raw,
)
from flowlang.serve.token import Token

Message: TypeAlias = Any  # of a class made from a .proto file
Call: TypeAlias = Any  # grpc.aio.ServicerContext

MAX_TEXT = 1000  # of a status: it travels in a header, and those are limited
WINDOW = 64  # requests of one stream under way at once
LINGER_S = 0.2  # once all is answered: for answers still on their way
KEEP_ALIVE_MS = 60_000  # a connection that is silent for so long is asked whether it still stands
IDLE_MS = 75_000  # one without a call for so long is closed, as over HTTP: clients connect again
HANDSHAKE_MS = 20_000  # of TLS and HTTP/2
MAX_CALLS = 1024  # of one connection at once, more than batches take; others wait in the client
CODES: Mapping[int, str] = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    413: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 499: "CANCELLED", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip
_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents",
    "INT32": "int_contents", "INT64": "int64_contents", "UINT8": "uint_contents",
    "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", BYTES: "bytes_contents",
}  # fmt: skip
_HELD: Mapping[str, str] = {"int_contents": "INT32", "uint_contents": "UINT32"}  # of the narrower


# What is answered without a token: to health checks nobody can give one.
OPEN = frozenset(
    (
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
        "/grpc.health.v1.Health/Check",
    )
)
INFERENCE = "ModelInferRequest"  # a message whose errors Inference counts
REQUEST_ID = "x-request-id"  # in the metadata of a call, and behind its answer
TRACED = {"rpc.system": "grpc", "rpc.method": "inference.GRPCInferenceService/ModelInfer"}
_WORD = re.compile("(?<!^)(?=[A-Z])")  # where a word of a name begins, but for the first

log = logging.getLogger("flowlang.serve")


class GrpcServer:
    """Serves the models of `inference` over gRPC, in the event loop that starts it."""

    def __init__(self, inference: Inference, setup: Setup, port: int) -> None:
        host = setup.host
        self.scheme = "grpcs" if setup.certificate else "grpc"
        self._inference = inference
        self._setup = setup
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._under_way = 0  # of what was let in: not all is answered, and taken by its client
        self._server: Any = None

    async def start(self) -> int:
        """Begin to listen. Returns the port. Raises FlowError where it cannot be had."""
        import grpc

        inference = read_protocol("inference.proto")
        health = read_protocol("health.proto")
        recorders = (_recorder(),) if self._setup.tells_requests else ()
        token = self._setup.token
        guards = () if token is None else (_guard(token, self._inference),)
        server = grpc.aio.server(
            interceptors=(*recorders, *guards),  # those that are turned away are recorded too
            options=(
                ("grpc.max_receive_message_length", self._setup.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # or two servers would share a port unnoticed
                ("grpc.keepalive_time_ms", KEEP_ALIVE_MS),
                ("grpc.max_connection_idle_ms", IDLE_MS),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
                ("grpc.max_concurrent_streams", MAX_CALLS),
                # It would refuse calls within that, on account of those that ended just now.
                ("grpc.http.overload_protection", 0),
            ),
        )
        answers = _Answers(self._inference, inference.messages)
        server.add_generic_rpc_handlers(
            (
                self._service(inference, answers),
                self._service(health, _Health(self._inference, health.messages)),
            )
        )
        try:
            port = self._add_port(server)
        except RuntimeError:
            port = 0
        if not port:
            raise FlowError(f"cannot listen on {self._address} for gRPC")
        await server.start()
        self._server = server
        return port

    async def stop(self, grace_s: float) -> bool:
        """Answer what is inside, then stop. Returns whether that was done in time.

        Nothing new is let in once `inference` refuses it, which is told to who asks until the end.
        """
        in_time = await emptied(lambda: self._under_way, grace_s)
        if self._server is not None:
            await self._server.stop(LINGER_S)
        return in_time

    def _add_port(self, server: Any) -> int:
        import grpc

        certificate = self._setup.certificate
        if certificate is None:
            return int(server.add_insecure_port(self._address))
        pair = (certificate.key, certificate.chain)
        credentials = grpc.ssl_server_credentials([pair])  # of TLS 1.2 or later
        return int(server.add_secure_port(self._address, credentials))

    def _service(self, protocol: Protocol, answers: Any) -> Any:
        """The methods of a service, each of them a method of `answers`: ModelInfer, model_infer."""
        import grpc

        return grpc.method_handlers_generic_handler(
            protocol.service,
            {
                m.name: self._method(protocol, m, getattr(answers, _WORD.sub("_", m.name).lower()))
                for m in protocol.methods
            },
        )

    def _method(self, protocol: Protocol, method: Method, answer: Callable[..., Any]) -> Any:
        import grpc

        kind = protocol.messages[method.request]
        if method.is_request_stream:
            return grpc.stream_stream_rpc_method_handler(self._streaming(kind, answer))
        if method.is_response_stream:
            return grpc.unary_stream_rpc_method_handler(_watching(kind, answer))
        return grpc.unary_unary_rpc_method_handler(self._unary(kind, answer))

    def _unary(
        self, kind: Any, answer: Callable[[Message, Call], Awaitable[Message]]
    ) -> Callable[[bytes, Call], Awaitable[bytes]]:
        async def call(body: bytes, context: Call) -> bytes:
            if self._inference.is_open:
                self._under_way += 1
                context.add_done_callback(self._leave)
            found = await self._outcome(kind, body, answer, context)
            if isinstance(found, RequestError):
                await _refuse(context, found)
                raise found  # never reached: refusing raises
            _record("OK")
            return found

        return call

    def _leave(self, context: Call) -> None:
        """A call that was let in is over: its client has taken the answer, or is gone."""
        self._under_way -= 1

    async def _outcome(
        self,
        kind: Any,
        body: bytes,
        answer: Callable[[Message, Call], Awaitable[Message]],
        context: Call,
    ) -> bytes | RequestError:
        """The bytes to answer a message with, or why there are none."""
        message = None
        try:
            message = _parsed(kind, body)
            found = await answer(message, context)
            return bytes(found.SerializeToString())
        except RequestError as error:
            if message is None or kind.DESCRIPTOR.name != INFERENCE:
                self._inference.turn_away(error, _repeatable_id(context.invocation_metadata()))
            return error
        except Exception:  # gRPC would tell the client all of it
            log.exception("a %s could not be answered", kind.DESCRIPTOR.name)
            return Refusal("internal", 500, "internal error")

    def _streaming(
        self, kind: Any, answer: Callable[[Message, Call], Awaitable[Message]]
    ) -> Callable[[AsyncIterator[bytes], Call], AsyncIterator[bytes]]:
        """A stream of requests: worked on together, and answered in their order."""

        async def call(bodies: AsyncIterator[bytes], context: Call) -> AsyncIterator[bytes]:
            tasks: asyncio.Queue[asyncio.Task[bytes | RequestError] | None]
            tasks = asyncio.Queue(WINDOW)
            left: set[asyncio.Task[Any]] = set()
            let_in: set[asyncio.Task[Any]] = set()  # and not taken by the client yet

            async def read() -> None:
                async for body in bodies:
                    task = asyncio.ensure_future(self._outcome(kind, body, answer, context))
                    left.add(task)
                    task.add_done_callback(left.discard)
                    if self._inference.is_open:
                        let_in.add(task)
                        self._under_way += 1
                    await tasks.put(task)
                await tasks.put(None)

            left.add(asyncio.ensure_future(read()))
            try:
                while (task := await tasks.get()) is not None:
                    found = await task
                    if isinstance(found, RequestError):
                        await _refuse(context, found)
                    else:
                        yield found
                    if task in let_in:
                        let_in.remove(task)
                        self._under_way -= 1
                _record("OK")
            finally:
                self._under_way -= len(let_in)
                for unfinished in left:
                    unfinished.cancel()

        return call


def _guard(token: Token, inference: Inference) -> Any:
    """What turns away calls without the token, before any of their messages is read."""
    import grpc

    class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
        async def intercept_service(self, proceed: Any, call: Any) -> Any:
            if call.method in OPEN:
                return await proceed(call)
            given = dict(call.invocation_metadata).get("authorization")
            try:
                token.check(None if given is None else str(given).encode())
            except RequestError as error:
                inference.turn_away(error, _repeatable_id(call.invocation_metadata))
                return _refusal(error)
            return await proceed(call)

    def _refusal(error: RequestError) -> Any:
        async def turn_away(bodies: AsyncIterator[bytes], context: Call) -> None:
            await _refuse(context, error)

        return grpc.stream_stream_rpc_method_handler(turn_away)  # whose messages may go unread

    return Guard()


def _watching(
    kind: Any, answer: Callable[[Message, Call], AsyncIterator[Message]]
) -> Callable[[bytes, Call], AsyncIterator[bytes]]:
    async def call(body: bytes, context: Call) -> AsyncIterator[bytes]:
        try:
            request = _parsed(kind, body)
        except RequestError as error:
            await _refuse(context, error)
            return
        async for message in answer(request, context):
            yield bytes(message.SerializeToString())

    return call


def _parsed(kind: Any, body: bytes) -> Message:
    """A message out of its bytes. Raises BadRequest."""
    from google.protobuf.message import DecodeError

    try:
        return kind.FromString(body)
    except DecodeError:
        raise BadRequest(f"this is no {kind.DESCRIPTOR.name}") from None


async def _refuse(context: Call, error: RequestError) -> None:
    """End a call with the status of an error. Always raises."""
    import grpc

    status = _status(error)
    _record(status)
    await context.abort(grpc.StatusCode[status], error.message[:MAX_TEXT])


def _status(error: RequestError) -> str:
    return CODES.get(error.http_status, "INTERNAL")


class _Entry:
    """What the access log tells of a call, or of one message of a stream, at the end of its task.

    Made in that task, and found there by whoever knows more. It is gRPC's own: a call is cancelled
    where its client is gone, and not every call gets as far as a handler of ours.
    """

    def __init__(self, path: str, request_id: str = "") -> None:
        self.path = path
        self.request_id = request_id
        self.status = "CANCELLED"  # until it is answered
        self._start_s = time.perf_counter()
        self.follow()
        _entry.set(self)

    def follow(self) -> None:
        """Have it told when this task ends. Again, and it belongs to the trace begun meanwhile."""
        task = asyncio.current_task()
        assert task is not None
        task.remove_done_callback(self._tell)
        task.add_done_callback(self._tell)

    def _tell(self, task: asyncio.Task[Any]) -> None:
        import grpc

        number, _ = grpc.StatusCode[self.status].value
        tell("gRPC", self.path, number, self._start_s, self.request_id, self.status)


_entry: ContextVar[_Entry | None] = ContextVar("flowlang-access", default=None)


def _record(status: str) -> None:
    """Say how this call or message has ended, where that is told."""
    if (entry := _entry.get()) is not None:
        entry.status = status


def _recorder() -> Any:
    """What begins an entry for each call, known or not. gRPC goes on with it in the same task."""
    import grpc

    class Recorder(grpc.aio.ServerInterceptor):  # type: ignore[misc]
        async def intercept_service(self, proceed: Any, call: Any) -> Any:
            entry = _Entry(call.method, _repeatable_id(call.invocation_metadata))
            handler = await proceed(call)
            if handler is None:
                entry.status = "UNIMPLEMENTED"
            return handler

    return Recorder()


class _Answers:
    """The methods of the protocol's service, by their names."""

    def __init__(self, inference: Inference, messages: Mapping[str, Any]) -> None:
        self._inference = inference
        self._messages = messages

    def _make(self, kind: str, /, **fields: Any) -> Message:
        return self._messages[kind](**fields)

    async def server_live(self, request: Message, context: Call) -> Message:
        return self._make("ServerLiveResponse", live=True)

    async def server_ready(self, request: Message, context: Call) -> Message:
        return self._make("ServerReadyResponse", ready=self._inference.is_ready)

    async def model_ready(self, request: Message, context: Call) -> Message:
        is_ready = self._inference.is_model_ready(request.name, request.version)
        return self._make("ModelReadyResponse", ready=is_ready)

    async def server_metadata(self, request: Message, context: Call) -> Message:
        return self._make("ServerMetadataResponse", **self._inference.metadata())

    async def model_metadata(self, request: Message, context: Call) -> Message:
        model = self._inference.model(request.name, request.version)
        return self._make("ModelMetadataResponse", **model.metadata())

    async def model_config(self, request: Message, context: Call) -> Message:
        model = self._inference.model(request.name, request.version)
        return self._make("ModelConfigResponse", config=model.config())

    async def model_statistics(self, request: Message, context: Call) -> Message:
        found = self._inference.statistics(request.name, request.version)
        return self._make("ModelStatisticsResponse", **found)

    async def repository_index(self, request: Message, context: Call) -> Message:
        models = self._inference.index(is_ready=request.ready)
        return self._make("RepositoryIndexResponse", models=models)

    async def model_infer(self, request: Message, context: Call) -> Message:
        exchange = _Exchange(request, context, self._messages["ModelInferResponse"])
        context.set_trailing_metadata(((REQUEST_ID, exchange.request_id),))
        return await self._infer(request, context, exchange)

    async def _infer(self, request: Message, context: Call, exchange: _Exchange) -> Message:
        if (entry := _entry.get()) is not None:
            entry.request_id = exchange.request_id
        name, version = request.model_name, request.model_version
        tracer = self._inference.tracer
        if tracer is None or not self._inference.is_open:
            return await self._inference.infer(name, version, exchange)
        parent = {
            key: value
            for key, value in context.invocation_metadata()
            if key in ("traceparent", "tracestate")
        }
        flow = known(name, self._inference.models)
        with tracer.begin(flow, parent, TRACED, exchange.request_id):
            if entry is not None:
                entry.follow()
            return await self._inference.infer(name, version, exchange)

    async def model_stream_infer(self, request: Message, context: Call) -> Message:
        """One answer of a stream; an error is an answer too, and the stream goes on."""
        if (stream := _entry.get()) is not None:
            _Entry(stream.path)  # of its own
        try:
            exchange = _Exchange(request, context, self._messages["ModelInferResponse"])
            found = await self._infer(request, context, exchange)
        except RequestError as error:
            _record(_status(error))
            empty = self._make("ModelInferResponse", id=request.id)
            return self._make(
                "ModelStreamInferResponse", error_message=error.message, infer_response=empty
            )
        _record("OK")
        # Some clients wait for this before they count a request as answered.
        found.parameters["triton_final_response"].bool_param = True
        return self._make("ModelStreamInferResponse", infer_response=found)


class _Exchange:
    """One inference: a request out of a message, and a message out of its answer."""

    def __init__(self, message: Message, call: Call, kind: Any) -> None:
        self.request_id = _request_id(message, call)
        self._message = message
        self._call = call
        self._kind = kind

    def read(self, model: Model) -> Request:
        return read_request(model, self._message, self._call.time_remaining())

    def write(self, model: Model, request: Request, tensors: list[Tensor]) -> Message:
        return self._kind(
            model_name=model.name,
            model_version=VERSION,
            id=request.id,
            outputs=[{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in tensors],
            raw_output_contents=[to_raw(tensor) for tensor in tensors],
        )


def _request_id(message: Message, call: Call) -> str:
    """The message's own id, else that of the call, else a new one: a stream has many messages."""
    own = message.id.encode()
    if is_request_id(own):
        return str(message.id)
    return request_id_of(_given_id(call.invocation_metadata())).decode("ascii")


def _given_id(metadata: Iterable[tuple[str, str]]) -> bytes | None:
    given = dict(metadata).get(REQUEST_ID)
    return None if given is None else given.encode()


def _repeatable_id(metadata: Iterable[tuple[str, str]]) -> str:
    """The id that a call brings, empty where that is none."""
    given = _given_id(metadata) or b""
    return given.decode("ascii") if is_request_id(given) else ""


def read_request(model: Model, message: Message, timeout_s: float | None) -> Request:
    """A request out of a ModelInferRequest. Raises BadRequest."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        count = f"{len(raw)} of them, and {len(message.inputs)} inputs"
        raise BadRequest(f"raw_input_contents: there are {count}")
    tensors = [
        _tensor(model, f"inputs[{index}]", given, raw[index] if raw else None)
        for index, given in enumerate(message.inputs)
    ]
    wanted = {
        output.name: class_count(f"outputs[{index}].parameters", _values(output.parameters))
        for index, output in enumerate(message.outputs)
    }
    return Request(
        tensors,
        wanted,
        _values(message.parameters),
        message.id,
        timeout_s,
    )


def _tensor(model: Model, place: str, given: Message, raw: bytes | None) -> Tensor:
    datatype = check_datatype(place, given.datatype)
    shape = check_shape(place, list(given.shape))
    check_no_region(place, given.parameters, "send the tensor itself")
    model.port(place, given.name, datatype, shape)
    if raw is None:
        values = _contents(f"{place}.contents", datatype, shape, given.contents)
    elif given.HasField("contents"):
        raise BadRequest(f"{place}: it has both `contents` and `raw_input_contents`")
    else:
        values = from_raw(place, datatype, shape, raw)
    return Tensor(given.name, datatype, shape, values)


def _contents(place: str, datatype: str, shape: tuple[int, ...], contents: Message) -> Values:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise BadRequest(f"{place}: {datatype} goes into raw_input_contents")
    place = f"{place}.{field}"
    values = getattr(contents, field)
    if datatype != BYTES:
        return from_field(place, datatype, shape, values, _HELD.get(field, datatype))
    check_count(place, shape, len(values))
    return list(values)


def _values(parameters: Mapping[str, Message]) -> dict[str, Any]:
    found = {}
    for name, given in parameters.items():
        choice = given.WhichOneof("parameter_choice")
        if choice is None:
            raise BadRequest(f"parameters: `{name}` has no value")
        found[name] = getattr(given, choice)
    return found


class _Health:
    """The methods of gRPC's health service, by their names."""

    def __init__(self, inference: Inference, messages: Mapping[str, Any]) -> None:
        self._inference = inference
        self._response = messages["HealthCheckResponse"]

    async def check(self, request: Message, context: Call) -> Message:
        status = self._status(request.service)
        if status == "SERVICE_UNKNOWN":
            raise Refusal("not-found", 404, f"there is no service `{request.service:.100}`")
        return self._response(status=status)

    async def watch(self, request: Message, context: Call) -> AsyncIterator[Message]:
        changed = asyncio.Event()
        self._inference.on_change.append(changed.set)
        try:
            last = None
            while True:
                changed.clear()
                if (status := self._status(request.service)) != last:
                    last = status
                    yield self._response(status=status)
                await changed.wait()
        finally:
            self._inference.on_change.remove(changed.set)

    def _status(self, service: str) -> str:
        """A service is the server (empty), the protocol, or a model."""
        if service in ("", "inference.GRPCInferenceService"):
            return "SERVING" if self._inference.is_ready else "NOT_SERVING"
        if service not in self._inference.models:
            return "SERVICE_UNKNOWN"
        return "SERVING" if self._inference.is_model_ready(service) else "NOT_SERVING"
