"""What the clients of a storm send, good and bad, and what they make of the answers.

Each is given the number of its request, of twelve digits, which a right answer repeats.
"""

from __future__ import annotations

import gzip
import json
import random
import socket
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
import numpy as np
import tritonclient.grpc as triton
from thriftpy2.rpc import client_context
from thriftpy2.thrift import TException

from tests.pictures import bad, photographs
from tests.serve.idl import IDL
from tests.serve.server import PATIENCE_S, Raw, head

PICTURES = photographs(3)
CORRUPT = [bad()[name].data for name in ("empty", "text", "jpeg-half", "jpeg-30000x30000")]
BOMB = gzip.compress(bytes(64 << 20))  # 64 MiB of nothing, in 64 KB
INFER = "/inference.GRPCInferenceService/ModelInfer"
HONEST = (429, 503, 504)


@dataclass
class Ports:
    """Where the server listens, what its flow `small` makes of PICTURES, and the connections that
    nobody closes until the end.
    """

    http: int
    grpc: int
    thrift: int
    small: list[bytes]
    kept: list[Raw] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """What became of a request: `right`, `refused` as it should be, a status, `cut` or wrong."""

    number: int
    kind: str
    outcome: str
    began_s: float
    ended_s: float


Client: TypeAlias = Callable[[Ports, str, random.Random], str]
GOOD: dict[str, Client] = {}
BAD: dict[str, Client] = {}


def _http(kinds: dict[str, Client]) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """A client over a connection of its own."""

    def add(client: Callable[[Raw, str, random.Random, Ports], str]) -> Callable[..., str]:
        def ask(ports: Ports, number: str, dice: random.Random) -> str:
            try:
                connection = Raw(ports.http)
            except TimeoutError:
                return "wrong: no connection"
            except OSError:
                return "cut"
            try:
                return client(connection, number, dice, ports)
            except TimeoutError:
                return "wrong: no answer"
            except (OSError, IndexError):  # the end of the connection, where a line was wanted
                return "cut"
            finally:
                if connection not in ports.kept:
                    connection.close()

        kinds[client.__name__.strip("_")] = ask
        return client

    return add


# Good requests over HTTP


def _body(number: str, dice: random.Random, size: int) -> bytes:
    return number.encode() + dice.randbytes(size)


def _told(answer: tuple[int, dict[str, str], bytes], number: str, body: bytes) -> str:
    """What an answer of `tell` comes to."""
    status, headers, content = answer
    if headers["x-request-id"] != number:
        return f"wrong: the id {headers['x-request-id']}"
    if status != 200:
        return str(status) if status in HONEST else f"wrong: {status} {content!r}"
    return _is_told(json.loads(content), number, body)


def _is_told(told: dict[str, Any], number: str, body: bytes) -> str:
    is_right = (told["number"], told["sum"]) == (number, zlib.crc32(body))
    return "right" if is_right else f"wrong: {told}"


def _id(number: str) -> str:
    return f"X-Request-Id: {number}"


@_http(GOOD)
def _tells(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    body = _body(number, dice, dice.choice((0, 100, 10_000, 200_000)))
    connection.post("/flows/tell", body, _id(number), f"X-Priority: {dice.randint(0, 3)}")
    return _told(connection.answer(), number, body)


@_http(GOOD)
def _huge(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    body = number.encode() + bytes(dice.randint(1 << 20, 6 << 20))
    connection.post("/flows/tell", body, _id(number))
    return _told(connection.answer(), number, body)


@_http(GOOD)
def _chunked(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    pieces = [number.encode(), *(dice.randbytes(dice.randint(1, 20_000)) for _ in range(5))]
    lines = ["POST /flows/tell HTTP/1.1", "Host: test", "Transfer-Encoding: chunked", _id(number)]
    connection.send("\r\n".join([*lines, "", ""]))
    for piece in pieces:
        connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    connection.send("0\r\n\r\n")
    return _told(connection.answer(), number, b"".join(pieces))


@_http(GOOD)
def _slow_sender(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    body = _body(number, dice, 2_000)
    sent = head("/flows/tell", len(body), _id(number)).encode() + body
    cuts = sorted(dice.sample(range(1, len(sent)), 8))
    for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        connection.send(sent[begin:end])
        time.sleep(0.01)
    return _told(connection.answer(), number, body)


@_http(GOOD)
def _pipelined(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    """Its answers come one after the other: nothing else does."""
    bodies = [number[1:].encode() + b"abcd"[n : n + 1] for n in range(4)]
    for body in bodies:
        connection.post("/flows/tell", body, _id(body.decode()))
    told = [_told(connection.answer(), body.decode(), body) for body in bodies]
    connection.socket.shutdown(socket.SHUT_WR)
    if connection.rest():
        return "wrong: an answer to nothing"
    return next((one for one in told if one != "right"), "right")


@_http(GOOD)
def _form(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    bodies = [number[1:].encode() + b"xy"[n : n + 1] + dice.randbytes(50) for n in range(2)]
    parts = [
        b'--chaos\r\nContent-Disposition: form-data; name="a"; filename="%d"\r\n\r\n%b\r\n'
        % (n, body)
        for n, body in enumerate(bodies)
    ]
    sent = b"".join(parts) + b"--chaos--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=chaos"
    connection.post("/flows/tell", sent, _id(number), kind)
    status, headers, content = answer = connection.answer()
    if status != 200:
        return _told(answer, number, b"")
    for found, body in zip(json.loads(content)["results"], bodies, strict=True):
        if "error" in found:
            return (
                "503" if found["error"]["code"] in ("restarting", "loading") else f"wrong: {found}"
            )
        if (judged := _is_told(found["result"], body[:12].decode(), body)) != "right":
            return judged
    return "right" if headers["x-request-id"] == number else "wrong: the id"


@_http(GOOD)
def _picture(connection: Raw, number: str, dice: random.Random, ports: Ports) -> str:
    which = dice.randrange(len(PICTURES))
    connection.post("/flows/small", PICTURES[which], _id(number))
    status, headers, content = answer = connection.answer()
    if status != 200:
        return _told(answer, number, b"")
    if headers["x-request-id"] != number:
        return "wrong: the id"
    return "right" if content == ports.small[which] else f"wrong: {content!r}"


@_http(GOOD)
def _hurried(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    connection.post("/flows/nap", number.encode(), _id(number), "X-Deadline-Ms: 40")
    return _same(connection.answer(), number)


@_http(GOOD)
def _crowding(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    connection.post("/flows/narrow", number.encode(), _id(number))
    return _same(connection.answer(), number)


def _same(answer: tuple[int, dict[str, str], bytes], number: str) -> str:
    if answer[0] != 200:
        return _told(answer, number, b"")
    return "right" if answer[2] == number.encode() else f"wrong: {answer}"


@_http(GOOD)
def _inference(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    tensor = {"name": "input", "datatype": "BYTES", "shape": [1], "data": [number]}
    sent = json.dumps({"id": number, "inputs": [tensor]}).encode()
    connection.post("/v2/models/same/infer", sent)
    status, _headers, content = connection.answer()
    if status != 200:
        return str(status) if status in HONEST else f"wrong: {status} {content!r}"
    told = json.loads(content)
    is_right = (told["id"], told["outputs"][0]["data"]) == (number, [number])
    return "right" if is_right else f"wrong: {told}"


# Good requests over the other protocols


def _over_grpc(ports: Ports, number: str, dice: random.Random) -> str:
    sent = triton.InferInput("input", [1], "BYTES")
    sent.set_data_from_numpy(np.array([number.encode()], object))
    with triton.InferenceServerClient(f"127.0.0.1:{ports.grpc}") as client:
        try:
            found = client.infer("same", [sent], request_id=number, client_timeout=PATIENCE_S)
        except triton.InferenceServerException as error:
            is_gone = error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED")
            return "unavailable" if is_gone else f"wrong: {error}"
    is_right = (found.get_response().id, found.as_numpy("output")[0]) == (number, number.encode())
    return "right" if is_right else f"wrong: {found.get_response()}"


def _over_thrift(ports: Ports, number: str, dice: random.Random) -> str:
    body = _body(number, dice, 1_000)
    patience_ms = int(PATIENCE_S * 1000)
    service = IDL.ImageProcessingService
    try:
        with client_context(
            service, "127.0.0.1", ports.thrift, socket_timeout=patience_ms
        ) as client:
            found = client.process_image(IDL.ProcessRequest(image_data=body))
    except TimeoutError:
        return "wrong: no answer"
    except (TException, OSError):
        return "unavailable"
    if not found.success:
        is_loading = "not loaded" in found.error_message
        return "unavailable" if is_loading else f"wrong: {found.error_message}"
    return _is_told(json.loads(found.result_data), number, body)


GOOD["over_grpc"] = _over_grpc
GOOD["over_thrift"] = _over_thrift


# Bad requests


def _refused(connection: Raw, *statuses: int) -> str:
    """What is told to a request that is none: one of the statuses, and that once."""
    status, _headers, content = connection.answer()
    if status in statuses:
        return "refused"
    return str(status) if status in HONEST else f"wrong: {status} {content!r}"


@_http(BAD)
def _corrupt(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    connection.post("/flows/small", dice.choice(CORRUPT), _id(number))
    return _refused(connection, 400)


@_http(BAD)
def _declared_too_large(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    connection.send(head("/flows/tell", 10**12))
    return _refused(connection, 413)


@_http(BAD)
def _hung_up(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    connection.post("/flows/nap", number.encode())
    return "refused"


@_http(BAD)
def _half_sent(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    connection.send(head("/flows/tell", 1_000), number.encode())
    return "refused"


@_http(BAD)
def _half_open(connection: Raw, number: str, dice: random.Random, ports: Ports) -> str:
    """A client that says something, and then nothing any more."""
    connection.send(head("/flows/tell", 1_000)[: dice.randint(0, 60)])
    ports.kept.append(connection)
    return "refused"


@_http(BAD)
def _half_closed(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    connection.send(head("/flows/tell", 1_000), number.encode())
    connection.socket.shutdown(socket.SHUT_WR)
    told = connection.rest()
    if told.startswith(b"HTTP/1.1 503 "):  # for that no body is needed
        return "503"
    return f"wrong: {told!r}" if told else "refused"


@_http(BAD)
def _bomb(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    path, status = dice.choice((("/flows/tell", 415), ("/v2/models/same/infer", 413)))
    connection.post(path, BOMB, "Content-Encoding: gzip")
    return _refused(connection, status)


@_http(BAD)
def _longer_than_told(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    """What is behind the end of a body is the next request, and this is none."""
    body = number.encode()
    connection.send(head("/flows/tell", len(body), _id(number)), body, b"\0more\r\n\r\n")
    answer = connection.answer()
    if answer[0] == 400:  # it was there before the first was answered
        return "refused"
    told = _told(answer, number, body)
    return "refused" if told == "right" else told


@_http(BAD)
def _smuggled(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    """Headers of which a proxy in front might read another length: none is let through."""
    line = dice.choice(
        (
            "Content-Length: 5\r\nTransfer-Encoding: chunked",
            "Content-Length: 5\r\nContent-Length: 6",
            "Content-Length: 5, 6",
            "Content-Length: +5",
            "Transfer-Encoding: chunked, identity",
            "Transfer-Encoding : chunked",
            "Content-Length: 5\r\n Transfer-Encoding: chunked",
        )
    )
    hidden = "0\r\n\r\nPOST /flows/tell HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n"
    connection.send(f"POST /flows/tell HTTP/1.1\r\nHost: test\r\n{line}\r\n\r\n{hidden}")
    connection.socket.shutdown(socket.SHUT_WR)
    told = connection.rest()
    return f"wrong: {line!r} {told!r}" if b" 200 " in told else "refused"


@_http(BAD)
def _no_http(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    hello = b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03"  # of TLS
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    connection.send(dice.choice((hello, preface, dice.randbytes(300), b"\0" * 70_000)))
    connection.socket.shutdown(socket.SHUT_WR)
    told = connection.rest()
    return f"wrong: {told!r}" if b" 200 " in told else "refused"


@_http(BAD)
def _no_inference(connection: Raw, number: str, dice: random.Random, _: Ports) -> str:
    connection.post("/v2/models/same/infer", dice.choice((b"{}", b"[", dice.randbytes(99))))
    return _refused(connection, 400)


def _sends(port: Callable[[Ports], int], sent: Callable[[random.Random], bytes]) -> Client:
    """A client that sends bytes to another port, and waits for the end of it or an answer."""

    def ask(ports: Ports, number: str, dice: random.Random) -> str:
        with suppress(ConnectionError), Raw(port(ports)) as connection:
            connection.send(sent(dice))
            connection.socket.shutdown(socket.SHUT_WR)
            try:
                connection.rest()
            except TimeoutError:
                return "wrong: not closed"
        return "refused"

    return ask


def _no_protobuf(ports: Ports, number: str, dice: random.Random) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        try:
            told = channel.unary_unary(INFER)(dice.randbytes(40), timeout=PATIENCE_S)
        except grpc.RpcError as error:
            codes = ("INTERNAL", "INVALID_ARGUMENT", "NOT_FOUND")
            if error.code().name in ("UNAVAILABLE", "CANCELLED"):
                return "unavailable"
            return "refused" if error.code().name in codes else f"wrong: {error}"
    return f"wrong: {told!r}"


def _no_thrift(dice: random.Random) -> bytes:
    name = b"\x80\x01\x00\x01\x00\x00\x00\x0dprocess_image\x00\x00\x00\x07"
    return dice.choice(
        (
            name + dice.randbytes(60),
            name + b"\x0c\x00\x01\x0b\x00\x01\x7f\xff\xff\xff",  # bytes that are not there
            b"\x7f\xff\xff\xff" + dice.randbytes(60),
            b"GET / HTTP/1.1\r\n\r\n",
        )
    )


BAD["no_http2"] = _sends(lambda ports: ports.grpc, lambda dice: dice.randbytes(200))
BAD["http_to_grpc"] = _sends(lambda ports: ports.grpc, lambda _: b"GET / HTTP/1.1\r\n\r\n")
BAD["no_thrift"] = _sends(lambda ports: ports.thrift, _no_thrift)
BAD["no_protobuf"] = _no_protobuf


def version_of(port: int) -> int:
    """The version of the flows that answers; 0 where none does."""
    with suppress(OSError, IndexError, ValueError), Raw(port) as connection:
        connection.post("/flows/tell", b"version".ljust(12))
        status, _, content = connection.answer()
        return int(json.loads(content)["version"]) if status == 200 else 0
    return 0
