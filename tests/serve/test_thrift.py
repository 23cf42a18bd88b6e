"""The Thrift services: clients of both libraries, and what no client would send."""

from __future__ import annotations

import asyncio
import json
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thrift.protocol.TBase import TBase
from thrift.protocol.TBinaryProtocol import TBinaryProtocol
from thrift.Thrift import TApplicationException, TMessageType, TType
from thrift.transport.TSocket import TSocket
from thrift.transport.TTransport import TBufferedTransport, TFramedTransport, TTransportBase
from thriftpy2.rpc import client_context
from thriftpy2.thrift import TApplicationException as Refused
from thriftpy2.transport import TBufferedTransportFactory, TFramedTransportFactory

import flowlang
from flowlang.plan.types import FLOAT, LABEL, STR, ListOf, Tensor
from flowlang.serve.inference import Inference
from flowlang.serve.setup import Setup
from flowlang.serve.thrift import ThriftServer, gives_label
from flowlang.serve.thrift_wire import Extent, Malformed, find_message
from tests.pictures import bad, photographs
from tests.serve.faces import facing, write_types
from tests.serve.idl import IDL
from tests.serve.server import PATIENCE_S, Raw, Server, write

PICTURES = photographs(2)
SLEEPER = """
import time

def sleep(data: bytes) -> bytes:
    time.sleep(3)
    return data
"""
PING = b"\x80\x01\x00\x01\x00\x00\x00\x04ping\x00\x00\x00\x07\x00"
PONG = b"\x80\x01\x00\x02\x00\x00\x00\x04ping\x00\x00\x00\x07\x00"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, `all.flow`, `types.flow`, and `one.flow` with one flow that gives labels."""
    folder = tmp_path_factory.mktemp("flows")
    write_types(folder)
    text = (folder / "all.flow").read_text()
    write(folder / "one.flow", text[: text.index("export flow two")] + "export flow echo = pass\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A Thrift server of one flow that gives labels, and one that does not."""
    with facing(folder, "thrift", "one.flow") as server:
        yield server.wait_ready()
        assert "Traceback" not in server.errors


@pytest.fixture(scope="module")
def several(folder: Path) -> Iterator[Server]:
    """A Thrift server of many flows, of which a client names one."""
    with facing(folder, "thrift", "all.flow", "types.flow") as server:
        yield server.wait_ready()


def _client(server: Server, service: Any, *, is_framed: bool = False) -> Any:
    transport = TFramedTransportFactory() if is_framed else TBufferedTransportFactory()
    patience_ms = int(PATIENCE_S * 1000)
    return client_context(
        service, "127.0.0.1", server.port, trans_factory=transport, socket_timeout=patience_ms
    )


def _params(data: bytes) -> Any:
    return IDL.InferenceParams(uuid="a-7", data=data)


# Answers


@pytest.mark.parametrize("is_framed", [False, True])
def test_a_picture_is_answered_with_its_label(
    server: Server, folder: Path, is_framed: bool
) -> None:
    """The seed's client: a connection, a ping, and a picture a call, in either transport."""
    with flowlang.load(folder / "one.flow") as app:
        expected = [app["classify"](picture)[0] for picture in PICTURES]
    with _client(server, IDL.InferenceService, is_framed=is_framed) as client:
        client.ping()
        for picture, label in zip(PICTURES, expected, strict=True):
            found = client.infer_batch(_params(picture))
            assert found.label == label["label"]
            assert found.score == pytest.approx(label["score"], rel=1e-4)


@pytest.mark.parametrize("is_framed", [False, True])
@pytest.mark.parametrize("name", ["empty", "text", "jpeg-half"])
def test_a_corrupt_picture_is_an_exception(server: Server, name: str, is_framed: bool) -> None:
    """Not an empty answer, which clients take for one; and the connection goes on."""
    with _client(server, IDL.InferenceService, is_framed=is_framed) as client:
        with pytest.raises(Refused) as caught:
            client.infer_batch(_params(bad()[name].data))
        assert caught.value.type == Refused.INTERNAL_ERROR
        assert str(caught.value.message).startswith("bad-request: ")
        assert bad()[name].word in str(caught.value.message)
        assert client.infer_batch(_params(PICTURES[0])).label


def test_the_newer_service_has_a_field_for_errors(server: Server) -> None:
    """`process_image` answers with JSON, or with the reason and `success` false."""
    with _client(server, IDL.ImageProcessingService) as client:
        found = client.process_image(IDL.ProcessRequest(image_data=PICTURES[0]))
        assert (found.success, found.error_message) == (True, "")
        assert len(json.loads(found.result_data)) == 3
        refused = client.process_image(IDL.ProcessRequest(image_data=b"x"))
        assert (refused.success, refused.result_data) == (False, "")
        assert refused.error_message.startswith("bad-request: ")


class _Params(TBase):  # type: ignore[misc]
    """As Apache's compiler writes it."""

    __slots__ = ("data", "uuid")
    thrift_spec = (
        None,
        (1, TType.STRING, "uuid", "UTF8", None),
        (2, TType.STRING, "data", "BINARY", None),
    )

    def __init__(self, uuid: str | None = None, data: bytes | None = None) -> None:
        self.uuid = uuid
        self.data = data


class _Arguments(TBase):  # type: ignore[misc]
    __slots__ = ("params",)
    thrift_spec = (None, (1, TType.STRUCT, "params", (_Params, _Params.thrift_spec), None))

    def __init__(self, params: _Params | None = None) -> None:
        self.params = params


class _Result(TBase):  # type: ignore[misc]
    __slots__ = ("label", "score")
    thrift_spec = (
        None,
        (1, TType.STRING, "label", "UTF8", None),
        (2, TType.DOUBLE, "score", None, None),
    )

    def __init__(self, label: str | None = None, score: float | None = None) -> None:
        self.label = label
        self.score = score


class _Success(TBase):  # type: ignore[misc]
    __slots__ = ("success",)
    thrift_spec = ((0, TType.STRUCT, "success", (_Result, _Result.thrift_spec), None),)

    def __init__(self, success: _Result | None = None) -> None:
        self.success = success


class _Apache:
    """A client on Apache's library, as its compiler would write it."""

    def __init__(self, server: Server, transport: Any) -> None:
        connection = TSocket("127.0.0.1", server.port)
        connection.setTimeout(PATIENCE_S * 1000)
        self._transport: TTransportBase = transport(connection)
        self._protocol = TBinaryProtocol(self._transport)
        self._transport.open()

    def call(self, name: str, data: bytes, *, uuid: str | None = "a", kind: int = 1) -> _Result:
        self._protocol.writeMessageBegin(name, kind, 7)
        _Arguments(_Params(uuid, data)).write(self._protocol)
        self._protocol.writeMessageEnd()
        self._transport.flush()
        answered, kind, number = self._protocol.readMessageBegin()
        assert (answered, number) == (name.rpartition(":")[2], 7)
        if kind == TMessageType.EXCEPTION:
            error = TApplicationException()
            error.read(self._protocol)
            self._protocol.readMessageEnd()
            raise error
        found = _Success()
        found.read(self._protocol)
        self._protocol.readMessageEnd()
        assert found.success is not None
        return found.success

    def close(self) -> None:
        self._transport.close()


@pytest.fixture(params=[TBufferedTransport, TFramedTransport])
def apache(request: pytest.FixtureRequest, server: Server) -> Iterator[_Apache]:
    """A client of Apache's library, in each of its transports."""
    client = _Apache(server, request.param)
    yield client
    client.close()


def test_the_other_library_is_answered_too(apache: _Apache) -> None:
    """Apache Thrift's client gets labels, and exceptions of the type that says what was wrong."""
    assert (apache.call("infer_batch", PICTURES[0]).score or 0) > 0
    for name, arguments, kind in (
        ("infer_batch", {"data": b"x"}, TApplicationException.INTERNAL_ERROR),
        ("infer", {"data": b"x"}, TApplicationException.UNKNOWN_METHOD),
        ("infer_batch", {"data": b"x", "uuid": None}, TApplicationException.PROTOCOL_ERROR),
        ("infer_batch", {"data": b"x", "kind": 2}, TApplicationException.INVALID_MESSAGE_TYPE),
    ):
        with pytest.raises(TApplicationException) as caught:
            apache.call(name, **arguments)
        assert caught.value.type == kind
    assert apache.call("infer_batch", PICTURES[1]).label


def test_a_flow_is_named_where_there_are_several(several: Server) -> None:
    """`flow:method`, as Thrift names services at one port; without it the flows are listed."""
    client = _Apache(several, TBufferedTransport)
    try:
        assert client.call("classify:infer_batch", PICTURES[0]).label.startswith("class ")  # type: ignore[union-attr]
        assert client.call("classes:infer_batch", PICTURES[0]).label
        for name, said in (
            ("infer_batch", "name the flow, as in `flow:method`; those that take pictures are"),
            ("echo:infer_batch", "flow `echo` gives unknown, and no label with a score"),
            ("double:infer_batch", "flow `double` does not take the bytes of a picture"),
            ("fail:infer_batch", "no label with a score"),
        ):
            with pytest.raises(TApplicationException) as caught:
                client.call(name, PICTURES[0])
            assert said in str(caught.value.message)
    finally:
        client.close()


@pytest.mark.parametrize(
    ("kind", "is_so"),
    [
        (ListOf(LABEL), True),
        (LABEL, True),
        (Tensor("f32", (10,)), True),
        (Tensor("f32", (10, 10)), False),
        (Tensor("i64", (10,)), False),
        (FLOAT, False),
        (ListOf(STR), False),
    ],
)
def test_which_flows_give_labels(kind: Any, is_so: bool) -> None:
    """Labels, and the scores of classes, of which the highest is the label."""
    assert gives_label(kind) is is_so


def test_scores_have_the_number_of_the_class(folder: Path) -> None:
    """A classifier without names answers with the number of the best class, as the seed's did."""
    text = 'decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("classifier.onnx")\n'
    path = write(folder / "scores.flow", text)
    with flowlang.load(path) as app:
        scores = app(PICTURES[0])
    with facing(folder, "thrift", "scores.flow") as server:
        server.wait_ready()
        with _client(server, IDL.InferenceService) as client:
            found = client.infer_batch(_params(PICTURES[0]))
    assert found.label == str(int(scores.argmax()))
    assert found.score == pytest.approx(float(scores.max()), rel=1e-4)


def test_many_clients_at_once(server: Server) -> None:
    """Twenty connections with ten pictures each, as the seed's load test has them."""

    def ask(number: int) -> list[str]:
        with _client(server, IDL.InferenceService, is_framed=number % 2 == 0) as client:
            return [client.infer_batch(_params(PICTURES[i % 2])).label for i in range(10)]

    with ThreadPoolExecutor(20) as pool:
        answers = [*pool.map(ask, range(20))]
    assert len({tuple(labels) for labels in answers}) == 1


def test_calls_sent_ahead_are_answered_in_order(server: Server) -> None:
    """Several messages in one piece, and one message in many pieces, are answered one by one."""
    with server.connect() as connection:
        connection.send(PING * 500)
        assert _read(connection, len(PONG) * 500) == PONG * 500
        for byte in PING:
            connection.send(bytes([byte]))
        assert _read(connection, len(PONG)) == PONG


def _read(connection: Raw, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = connection.socket.recv(size - len(found))
        assert piece
        found += piece
    return found


# Hostile bytes

HEAD = b"\x80\x01\x00\x01\x00\x00\x00\x04ping\x00\x00\x00\x07"
HUGE = b"\x7f\xff\xff\xff"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: test\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"\x80\x02\x00\x01\x00\x00\x00\x04ping\x00\x00\x00\x07\x00",  # another version
        b"\x82\x21\x01\x04ping\x00",  # the compact protocol
        b"\x00\x00\x00\x04ping\x01\x00\x00\x00\x07\x00",  # the protocol before versions
        b"\x80\x01\x00\x01" + HUGE,  # a name of 2 GiB
        b"\x80\x01\x00\x01\xff\xff\xff\xff",  # a name of -1
        b"\x80\x01\x00\x01\x00\x00\x00\x02\xff\xfe\x00\x00\x00\x07\x00",  # a name that is no text
        HEAD + b"\x0b\x00\x01" + HUGE,  # a string of 2 GiB
        HEAD + b"\x0f\x00\x01\x02" + HUGE + bytes(1000),  # a list of 2 thousand million
        HEAD + b"\x0f\x00\x01\x0c" + HUGE + bytes(2000),  # of structs without fields
        HEAD + b"\x0f\x00\x01\x02\xff\xff\xff\xff",  # a list of -1
        HEAD + b"\x0d\x00\x01\x0b\x0b" + HUGE + bytes(20000),  # a map
        HEAD + b"\x0c\x00\x01" * 100_000,  # structs in structs
        HEAD + b"\x0f\x00\x01" + b"\x0f\x00\x00\x00\x01" * 100_000,  # lists in lists
        HEAD + b"\x02\x00\x01\x00" * 100_000,  # fields without end
        HEAD + b"\x63\x00\x01",  # an unknown type
        HUGE,  # a frame of 2 GiB
        b"\x00\x00\x00\x12" + PING + b"\x00",  # a frame with something behind its message
        b"\x00\x00\x00\x08" + PING,  # a frame that is too short
        b"\x00\x00\x00\x00",  # a frame of nothing
    ],
)
def test_what_is_no_message_ends_its_connection(server: Server, sent: bytes) -> None:
    """Nothing that is claimed is made; the connection is closed, and others go on."""
    with server.connect() as connection:
        connection.send(sent)
        connection.wait_closed()
    with server.connect() as connection:
        connection.send(PING)
        assert _read(connection, len(PONG)) == PONG


def test_a_picture_over_the_limit_ends_its_connection(server: Server) -> None:
    """A message larger than the server takes is not read to its end."""
    with server.connect() as connection:
        connection.send(b"\x80\x01\x00\x01\x00\x00\x00\x0binfer_batch\x00\x00\x00\x07\x0c\x00\x01")
        connection.send(b"\x0b\x00\x02", struct.pack(">i", 2 << 20))
        connection.wait_closed()


def test_a_client_that_waits_holds_up_nobody(server: Server) -> None:
    """Half a message, or none, leaves the others their answers."""
    with server.connect() as silent, server.connect() as halfway, server.connect() as other:
        halfway.send(PING[:9])
        other.send(PING)
        assert _read(other, len(PONG)) == PONG
        halfway.send(PING[9:])
        silent.send(PING)
        assert _read(halfway, len(PONG)) == _read(silent, len(PONG)) == PONG


@settings(max_examples=300)
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_have_an_extent_or_are_malformed(data: bytes, has_head: bool) -> None:
    """Whatever comes, looking for a message ends, and asks for more bytes or for none."""
    buffer = bytearray(HEAD + data if has_head else data)
    try:
        extent = find_message(buffer, 1 << 20)
    except Malformed:
        return
    if extent.is_complete:
        assert extent.start < extent.end <= len(buffer)
    else:
        assert len(buffer) < extent.end <= 1 << 20


@given(st.integers(0, len(PING)), st.booleans())
def test_a_message_is_found_once_it_is_whole(size: int, is_framed: bool) -> None:
    """Of a part, no more is asked for than the whole has; of the whole and more, the whole."""
    whole = len(PING).to_bytes(4, "big") + PING if is_framed else PING
    found = find_message(whole[:size], 1 << 20)
    assert found.is_complete == (size == len(whole))
    assert found.end <= len(whole)
    start = 4 if is_framed else 0
    assert find_message(whole + PING, 1 << 20) == Extent(start, len(whole), True, is_framed)


# Beginning and end


def test_who_hangs_up_is_left_out_of_the_batch(folder: Path) -> None:
    """A batch of two waits for its second item: one whose client is gone is not counted."""
    model = 'trt("classifier.onnx", batch=1..2, wait=60s)'
    write(folder / "held.flow", f"decode -> resize(64) -> rgb -> normalize(imagenet) -> {model}\n")
    call = b"\x80\x01\x00\x01\x00\x00\x00\x0binfer_batch\x00\x00\x00\x07\x0c\x00\x01"
    uuid = b"\x0b\x00\x01\x00\x00\x00\x01a\x0b\x00\x02"
    call += uuid + struct.pack(">i", len(PICTURES[0])) + PICTURES[0] + b"\x00\x00"
    with facing(folder, "thrift", "held.flow") as server:
        server.wait_ready()
        gone, second, third = (server.connect() for _ in range(3))
        gone.send(call)
        time.sleep(0.3)
        gone.close()
        time.sleep(0.2)
        second.send(call)
        second.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            second.socket.recv(1)
        second.socket.settimeout(PATIENCE_S)
        third.send(call)
        for connection in (second, third):
            assert _read(connection, 4) == b"\x80\x01\x00\x02"
            connection.close()


def test_who_takes_over_answers_what_was_left(tmp_path: Path) -> None:
    """A call that its flow gave up when others were loaded is asked of these."""
    write(tmp_path / "sleep.py", SLEEPER)
    old = write(tmp_path / "old.flow", 'use "sleep.py" as ops\nexport flow same = ops.sleep\n')
    new = write(tmp_path / "new.flow", "export flow same = pass\n")
    setup = Setup(host="127.0.0.1", port=0, grace_s=5.0, max_body_bytes=1 << 20)

    def ask(port: int) -> Any:
        service = IDL.ImageProcessingService
        with client_context(service, "127.0.0.1", port, socket_timeout=20_000) as client:
            return client.process_image(IDL.ProcessRequest(image_data=b"x"))

    async def go() -> Any:
        inference = Inference()
        server = ThriftServer(inference, setup, 0)
        port = await server.start()
        with flowlang.load(old) as first, flowlang.load(new) as second:
            inference.let_in(first)
            asked = asyncio.create_task(asyncio.to_thread(ask, port))
            while not server.under_way:
                await asyncio.sleep(0.01)
            inference.let_in(second)
            await asyncio.to_thread(first.close, 0.0)
            answer = await asked
            await server.stop(0.0)
        return answer

    answer = asyncio.run(go())
    assert (answer.success, answer.result_data, answer.error_message) == (True, '"eA=="', "")


def test_loading_is_told_and_stopping_loses_nothing(folder: Path, tmp_path: Path) -> None:
    """Before the flows are there a call is refused; on SIGTERM what is inside is answered."""
    gate = tmp_path / "gate"
    with facing(folder, "thrift", "types.flow", gate=gate) as server:
        with _client(server, IDL.ImageProcessingService) as client:
            early = client.process_image(IDL.ProcessRequest(image_data=b"x"))
            assert early.error_message == "loading: the flows are not loaded yet"
        gate.touch()
        server.wait_ready()
        name = b"slow:process_image"
        call = b"\x80\x01\x00\x01" + struct.pack(">i", len(name)) + name + b"\x00\x00\x00\x07"
        call += b"\x0c\x00\x01\x0b\x00\x01\x00\x00\x00\x02hi\x00\x00"
        with server.connect() as inside, server.connect() as late:
            late.send(PING)
            _read(late, len(PONG))
            inside.send(call)
            time.sleep(0.2)
            server.signal(signal.SIGTERM)
            time.sleep(0.1)
            late.send(call)
            assert b"draining: " in _until_closed(late.socket)
            assert b'"aGk="' in _until_closed(inside.socket)
        assert server.wait() == 0
        assert "Traceback" not in server.errors


def _until_closed(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


def test_idle_connections_cost_nothing(server: Server) -> None:
    """Five hundred connections without a call are a socket each, and change nothing."""

    async def hold() -> bytes:
        opened = [asyncio.open_connection("127.0.0.1", server.port) for _ in range(500)]
        writers = [writer for _, writer in await asyncio.gather(*opened)]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(PING)
        found = await reader.readexactly(len(PONG))
        for opened_writer in (*writers, writer):
            opened_writer.close()
        return found

    assert asyncio.run(hold()) == PONG


def test_who_takes_no_answers_is_read_no_further(server: Server) -> None:
    """However many calls are sent ahead; and once it takes them, each is answered."""
    name, picture = b"echo:process_image", bytes(100_000)
    call = b"\x80\x01\x00\x01" + struct.pack(">i", len(name)) + name + bytes(4)
    call += b"\x0c\x00\x01\x0b\x00\x01" + struct.pack(">i", len(picture)) + picture + bytes(2)
    call = struct.pack(">i", len(call)) + call
    with server.connect() as connection, ThreadPoolExecutor(1) as pool:
        sent, most = 0, 64 << 20
        while sent < most and select.select([], [connection.socket], [], 1.0)[1]:
            sent += connection.socket.send(call[sent % len(call) :], socket.MSG_DONTWAIT)
        assert sent < most
        calls, begun = divmod(sent, len(call))
        sending = pool.submit(connection.send, call[begun:] if begun else b"", PING)
        for _ in range(calls + bool(begun)):
            (size,) = struct.unpack(">i", _read(connection, 4))
            assert _read(connection, size).endswith(b"\x00")
        assert _read(connection, len(PONG)) == PONG
        sending.result()
