"""The Open Inference Protocol, version 2, over HTTP, with the binary tensor extension.

Layer 4. Turns paths, headers and bodies into requests of flowlang.serve.inference, and what that
answers into bodies. Knows nothing of sockets, of event loops or of hanging up.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flowlang.diagnostics import BadRequest, RequestError
from flowlang.serve.answer import (
    OCTETS,
    Answer,
    Refusal,
    check_json,
    from_json,
    is_request_id,
    priority_of,
    refusing,
    to_json,
    wrong_method,
)
from flowlang.serve.inference import (
    VERSION,
    Inference,
    Model,
    Request,
    check_no_region,
    class_count,
)
from flowlang.serve.tensor import (
    BYTES,
    Tensor,
    check_datatype,
    check_shape,
    from_list,
    from_raw,
    to_list,
    to_raw,
)

START = "/v2"
HEAD = b"inference-header-content-length"  # of the JSON in front of binary tensors
MAX_MEMBERS = 4096  # of a body in gzip (RFC 1952, 2.2)
PIECE_BYTES = 64 << 10  # unpacked at once: what follows a member in them is copied
COMPRESS_BYTES = 1 << 10  # an answer below this is sent as it is
# Of zlib; `deflate` has its wrapper, and `x-gzip` is another name of gzip (RFC 9110, 8.4.1).
_WBITS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}

_SETTINGS = "what is logged and traced is set where the server is started"

Headers: TypeAlias = Mapping[bytes, bytes]
Binary: TypeAlias = Callable[[str], bool]  # whether the output of this name goes back as bytes


def is_below(path: str) -> bool:
    """Whether a path is one of the protocol's."""
    return path == START or path.startswith(f"{START}/")


def is_health(path: str) -> bool:
    """Whether a path is one of the protocol's health checks."""
    return path.startswith(f"{START}/health/")


class InferenceRoutes:
    """Everything below /v2."""

    def __init__(self, inference: Inference, max_body_bytes: int) -> None:
        self._inference = inference
        self._max_body_bytes = max_body_bytes

    def look(self, method: str, path: str) -> Answer:
        """The answer to whatever is no inference, and has no body that matters."""
        try:
            return self._found(method, path.removeprefix(START).split("/")[1:])
        except RequestError as error:
            return refused(error)

    def is_inference(self, method: str, path: str) -> bool:
        """Whether a request is one that `infer` answers, now."""
        parts = path.split("/")
        return (
            method == "POST"
            and parts[2:3] == ["models"]
            and parts[-1] == "infer"
            and (len(parts) == 5 or (len(parts) == 7 and parts[4] == "versions"))
            and self._inference.is_open
        )

    async def infer(
        self,
        path: str,
        headers: Headers,
        body: bytes,
        request_id: bytes,
        timeout_s: float | None = None,
    ) -> tuple[Answer, bytes]:
        """The answer to an inference, and the request's id: X-Request-Id, else its message's.

        `timeout_s` is what its header granted, less the time that its body took.
        """
        parts = path.split("/")
        name, version = parts[3], parts[5] if len(parts) == 7 else ""
        exchange = _Exchange(headers, body, self._max_body_bytes, request_id, timeout_s)
        try:
            answer = await self._inference.infer(name, version, exchange)
        except RequestError as error:
            return refused(error), exchange.request_id.encode("ascii")
        packed = _packed(headers.get(b"accept-encoding"), answer)
        return packed, exchange.request_id.encode("ascii")

    def _found(self, method: str, parts: list[str]) -> Answer:
        match parts:
            case [] | [""]:
                return _get(method, self._inference.metadata)
            case ["health", "live"]:
                return _get(method, lambda: {"live": True})
            case ["health", "ready"]:
                return _yes_or_no(method, self._inference.is_ready)
            case ["repository", "index"]:
                return _said(method, "POST", self._inference.index)
            case ["repository", "models", _, ("load" | "unload")]:
                raise Refusal("off", 403, "models are not loaded or unloaded over the network")
            case ["systemsharedmemory" | "cudasharedmemory", *_]:
                raise _nothing("there is no shared memory: requests and answers hold their tensors")
            case ["trace", "setting"] | ["logging"]:
                raise _nothing(_SETTINGS)
            case ["models", "stats"]:
                return _get(method, self._inference.statistics)
            case ["models", name, "versions", version, *rest]:
                return self._of_model(method, name, version, rest)
            case ["models", name, *rest]:
                return self._of_model(method, name, "", rest)
        raise _nothing()

    def _of_model(self, method: str, name: str, version: str, rest: list[str]) -> Answer:
        inference = self._inference
        match rest:
            case []:
                return _get(method, lambda: inference.model(name, version).metadata())
            case ["ready"]:
                inference.model(name, version)
                return _yes_or_no(method, inference.is_model_ready(name, version), name)
            case ["config"]:
                return _get(method, lambda: inference.model(name, version).config())
            case ["stats"]:
                return _get(method, lambda: inference.statistics(name, version))
            case ["trace", "setting"]:
                raise _nothing(_SETTINGS)
            case ["infer"]:
                if method == "POST":
                    inference.check_open()
                raise wrong_method(method, "POST")
        raise _nothing()


class _Exchange:
    """One inference: a request out of a body, and a body out of its answer, as that asked."""

    def __init__(
        self,
        headers: Headers,
        body: bytes,
        max_body_bytes: int,
        request_id: bytes,
        timeout_s: float | None,
    ) -> None:
        self.request_id = request_id.decode("ascii")
        self._headers = headers
        self._body = body
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s
        self._is_binary: Binary = _never

    def read(self, model: Model) -> Request:
        encoding = self._headers.get(b"content-encoding")
        body = _unpacked(encoding, self._body, self._max_body_bytes)
        request, self._is_binary = read_request(model, self._headers, body, self._timeout_s)
        own = request.id.encode("utf-8", "surrogatepass")
        if b"x-request-id" not in self._headers and is_request_id(own):
            self.request_id = own.decode("ascii")
        return request

    def write(self, model: Model, request: Request, tensors: list[Tensor]) -> Answer:
        return write_answer(model, request, tensors, self._is_binary)


def refused(error: RequestError) -> Answer:
    """An error as the protocol tells it."""
    return refusing(error, {"error": error.message})


def _said(method: str, allowed: str, say: Callable[[], Any]) -> Answer:
    if method not in allowed.split(", "):
        raise wrong_method(method, allowed)
    return Answer(200, to_json(say()))


def _get(method: str, say: Callable[[], Any]) -> Answer:
    return _said(method, "GET, HEAD", say)


def _yes_or_no(method: str, is_so: bool, name: str | None = None) -> Answer:
    """Clients look at the status alone."""
    body = {"ready": is_so} if name is None else {"name": name, "ready": is_so}
    answer = _get(method, lambda: body)
    return answer if is_so else Answer(503, answer.body)


def _nothing(why: str = "there is nothing at this path of the protocol") -> Refusal:
    return Refusal("not-found", 404, why)


# Compression (RFC 9110, "Content Codings")


def _unpacked(encoding: bytes | None, body: bytes, max_bytes: int) -> bytes:
    """A body without its compression. Raises Refusal where it becomes too large, or is none."""
    if encoding is None or encoding.lower() == b"identity":
        return body
    if encoding.lower() not in _WBITS:
        raise Refusal("unsupported-encoding", 415, "a body is sent as it is, in gzip or deflate")
    found, at, left, view = [], 0, max_bytes, memoryview(body)
    for _ in range(MAX_MEMBERS):
        unpacker = zlib.decompressobj(_WBITS[encoding.lower()])
        while not unpacker.eof:
            piece = view[at : at + PIECE_BYTES]
            if not piece:
                raise BadRequest("the compressed body ends before its end")
            try:
                found.append(unpacker.decompress(piece, left + 1))
            except zlib.error:
                raise BadRequest("the body is not of the compression it claims") from None
            at += len(piece) - len(unpacker.unused_data)
            left -= len(found[-1])
            if left < 0:
                told = f"the body unpacked is larger than {max_bytes:,} bytes"
                raise Refusal("too-large", 413, told)
        if at == len(body):
            return b"".join(found)
        if encoding.lower() == b"deflate":
            raise BadRequest("something follows the end of the compressed body")
    raise BadRequest(f"a compressed body has at most {MAX_MEMBERS:,} members")


def _packed(accepted: bytes | None, answer: Answer) -> Answer:
    """An answer compressed, where it is large and the client asked for that and nothing else.

    A list of codings is what any HTTP library accepts; one alone is a wish.
    """
    if accepted not in _WBITS or len(answer.body) < COMPRESS_BYTES:
        return answer
    packer = zlib.compressobj(1, wbits=_WBITS[accepted])
    body = packer.compress(answer.body) + packer.flush()
    headers = (*answer.headers, (b"content-encoding", accepted))
    return Answer(answer.status, body, answer.kind, headers)


# Requests


def _never(name: str) -> bool:
    return False


def _always(name: str) -> bool:
    return True


def read_request(
    model: Model, headers: Headers, body: bytes, timeout_s: float | None
) -> tuple[Request, Binary]:
    """A request out of a body, and which outputs it wants as bytes. Raises BadRequest."""
    length = _head_length(headers.get(HEAD), len(body))
    priority = priority_of(headers.get(b"x-priority"))
    if length == 0:
        tensors = [_raw_input(model, body)]
        return Request(tensors, timeout_s=timeout_s, priority=priority), _always
    head = _object("", _parsed(body[:length]))
    parameters = _fields("parameters", head.get("parameters"))
    wanted, is_binary = _wanted(head.get("outputs"), parameters)
    request_id = "" if head.get("id") is None else head["id"]
    if not isinstance(request_id, str):
        raise BadRequest("id: a string is wanted")
    given = head.get("inputs")
    if not isinstance(given, list):
        raise BadRequest("inputs: a list of tensors is wanted")
    inputs = _Inputs(model, memoryview(body)[length:])
    tensors = [inputs.read(f"inputs[{index}]", value) for index, value in enumerate(given)]
    inputs.check_end()
    return Request(tensors, wanted, parameters, request_id, timeout_s, priority), is_binary


def _head_length(given: bytes | None, body_length: int) -> int:
    """How long the JSON is; 0 where the body is one tensor. Raises BadRequest."""
    length = body_length
    if given is not None:
        if not given.isdigit() or len(given) > 19 or int(given) > body_length:
            name = "Inference-Header-Content-Length"
            raise BadRequest(f"{name}: a number from 0 to the body's {body_length:,} bytes")
        length = int(given)
    elif not body_length:
        raise BadRequest("the body is empty, where JSON is wanted")
    return length


def _parsed(text: bytes) -> Any:
    check_json([text])
    try:
        return from_json(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"this is no JSON: {error.msg} at {where}") from None
    except (ValueError, RecursionError):
        raise BadRequest("this is no JSON that can be read") from None


def _object(place: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise BadRequest(f"{place or 'the request'}: a JSON object is wanted")
    return given


def _fields(place: str, given: Any) -> dict[str, Any]:
    """An object that may be left out, or null, which says the same."""
    return {} if given is None else _object(place, given)


def _raw_input(model: Model, body: bytes) -> Tensor:
    """The one tensor that a body without JSON is, of one item."""
    port = model.only_input()
    if port.datatype == BYTES:
        return Tensor(port.name, BYTES, (1,), [body])
    sides = port.wire_shape[1:]
    if port.shape is None or -1 in sides:
        raise BadRequest(f"`{port.name}` is of many shapes: say in JSON which one this is")
    shape = (1, *sides)
    values = from_raw(f"`{port.name}`", port.datatype, shape, body)
    return Tensor(port.name, port.datatype, shape, values)


class _Inputs:
    """Reads the tensors of a request; the binary ones lie one behind the other."""

    def __init__(self, model: Model, binary: memoryview) -> None:
        self._model = model
        self._binary = binary
        self._at = 0

    def read(self, place: str, value: Any) -> Tensor:
        given = _object(place, value)
        name = given.get("name")
        if not isinstance(name, str):
            raise BadRequest(f"{place}.name: a string is wanted")
        datatype = check_datatype(place, given.get("datatype"))
        shape = check_shape(place, given.get("shape"))
        parameters = _fields(f"{place}.parameters", given.get("parameters"))
        check_no_region(place, parameters, "send the tensor itself")
        self._model.port(place, name, datatype, shape)
        size = parameters.get("binary_data_size")
        if size is None:
            values = from_list(f"{place}.data", datatype, shape, given.get("data"))
        elif given.get("data") is not None:
            raise BadRequest(f"{place}: it has both `data` and `binary_data_size`")
        else:
            values = from_raw(place, datatype, shape, self._take(place, size))
        return Tensor(name, datatype, shape, values)

    def _take(self, place: str, size: Any) -> memoryview:
        left = len(self._binary) - self._at
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= left:
            name = f"{place}.parameters.binary_data_size"
            raise BadRequest(f"{name}: {left:,} bytes are left of the body, not {size!r:.40}")
        self._at += size
        return self._binary[self._at - size : self._at]

    def check_end(self) -> None:
        if left := len(self._binary) - self._at:
            raise BadRequest(f"{left:,} bytes of the body belong to no input")


def _wanted(given: Any, parameters: dict[str, Any]) -> tuple[dict[str, int], Binary]:
    """The outputs asked for, and how many classes of each; which of them as bytes.

    Raises BadRequest.
    """
    place = "parameters.binary_data_output"
    all_binary = _flag(place, parameters.get("binary_data_output"), default=False)
    if given is None:
        return {}, _always if all_binary else _never
    if not isinstance(given, list):
        raise BadRequest("outputs: a list is wanted")
    flags: dict[str, bool] = {}
    wanted: dict[str, int] = {}
    for index, value in enumerate(given):
        place = f"outputs[{index}]"
        output = _object(place, value)
        name = output.get("name")
        if not isinstance(name, str):
            raise BadRequest(f"{place}.name: a string is wanted")
        place = f"{place}.parameters"
        asked = _fields(place, output.get("parameters"))
        wanted[name] = class_count(place, asked)
        place = f"{place}.binary_data"
        flags[name] = _flag(place, asked.get("binary_data"), default=all_binary)
    return wanted, lambda name: flags.get(name, all_binary)


def _flag(place: str, value: Any, *, default: bool) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(f"{place}: true or false is wanted")
    return value


# Answers


def write_answer(
    model: Model, request: Request, tensors: list[Tensor], is_binary: Binary
) -> Answer:
    """A body out of what the flow gave. Raises BadRequest for what JSON cannot hold."""
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for tensor in tensors:
        output: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        if is_binary(tensor.name):
            binary.append(to_raw(tensor))
            output["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            output["data"] = to_list(tensor)
        outputs.append(output)
    head: dict[str, Any] = {"model_name": model.name, "model_version": VERSION}
    if request.id:
        head["id"] = request.id
    text = to_json({**head, "outputs": outputs})
    if not binary:
        return Answer(200, text)
    return Answer(200, b"".join((text, *binary)), OCTETS, ((HEAD, b"%d" % len(text)),))
