"""The Open Inference Protocol over gRPC: Triton's own client, and what no client would send."""

from __future__ import annotations

import queue
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

import flowlang
from flowlang.serve.proto import read_protocol
from flowlang.serve.tensor import BYTES, NUMPY
from tests.pictures import bad, photographs
from tests.serve.faces import facing
from tests.serve.server import PATIENCE_S, Raw, Server, check_errors, running, wait_until

PICTURES = photographs(2)
HEALTH = read_protocol("health.proto").messages
SERVICE = "/inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A gRPC server of every flow."""
    with facing(folder, "grpc", "all.flow", "types.flow") as server:
        yield server.wait_ready()
        check_errors(server)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    """Triton's client, as it comes."""
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    """A connection for calls that Triton's client does not make."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


def _input(name: str, values: Any, datatype: str) -> triton.InferInput:
    array = np.asarray(values, object if datatype == BYTES else NUMPY[datatype])
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array)
    return found


def _call(channel: grpc.Channel, method: str, answer: Any = None) -> Callable[..., Any]:
    """A method called with bytes, or with messages of Triton's stubs."""
    found: Callable[..., Any] = channel.unary_unary(
        f"{SERVICE}/{method}",
        request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
        response_deserializer=answer and answer.FromString,
    )
    return found


def _health(channel: grpc.Channel, service: str) -> str:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=HEALTH["HealthCheckResponse"].FromString,
    )
    status = check(HEALTH["HealthCheckRequest"](service=service)).status
    kinds = HEALTH["HealthCheckResponse"].DESCRIPTOR.enum_types_by_name["ServingStatus"]
    return str(kinds.values_by_number[status].name)


# What there is


def test_our_messages_are_tritons() -> None:
    """Every field and value of ours has the number, name and type that Triton's stubs give it."""
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}

    def collect(found: dict[str, Any], message: Any, scope: str) -> None:
        name = f"{scope}.{message.name}"
        for field in message.field:
            where = (field.number, field.label, field.type, field.type_name)
            found[f"{name}.{field.name}"] = (*where, field.HasField("oneof_index"))
        for nested in message.nested_type:
            collect(found, nested, name)

    for module in (service_pb2, model_config_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        for message in file.message_type:
            collect(theirs, message, "")
    protocol = read_protocol("inference.proto")
    file = FileDescriptorProto()
    protocol.messages["ModelInferRequest"].DESCRIPTOR.file.CopyToProto(file)
    for message in file.message_type:
        collect(ours, message, "")
    assert len(ours) > 80
    assert {name: theirs.get(name) for name in ours} == ours
    (enum,) = file.enum_type
    values = model_config_pb2.DataType.items()
    assert {(v.name, v.number) for v in enum.value} <= set(values)


def test_the_server_and_its_models_describe_themselves(
    client: triton.InferenceServerClient,
) -> None:
    """Health, metadata, configuration and the index are what Triton's client asks for."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("two", "1")
    assert not client.is_model_ready("nothing")
    assert not client.is_model_ready("two", "2")
    assert client.get_server_metadata().version == flowlang.__version__
    found = client.get_model_metadata("two", as_json=True)
    assert found["inputs"] == [{"name": "input", "datatype": "BYTES", "shape": ["-1", "1"]}]
    assert found["outputs"][0] == {"name": "scores", "datatype": "FP32", "shape": ["-1", "10"]}
    config = client.get_model_config("pair").config
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("image", model_config_pb2.TYPE_FP32, [3, 64, 64]),
        ("features", model_config_pb2.TYPE_FP32, [8]),
    ]
    index = client.get_model_repository_index().models
    assert ("classify", "1", "READY") in {(m.name, m.version, m.state) for m in index}


def test_the_health_service_of_grpc(channel: grpc.Channel) -> None:
    """The server, the protocol and each model can be asked after."""
    for service in ("", "inference.GRPCInferenceService", "two"):
        assert _health(channel, service) == "SERVING"
    with pytest.raises(grpc.RpcError) as caught:
        _health(channel, "nothing")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


# Answers


def test_pictures_are_answered_as_in_python(
    client: triton.InferenceServerClient, folder: Path
) -> None:
    """Several pictures in one request, one output of two asked for, and the id echoed."""
    wanted = [triton.InferRequestedOutput("embedding")]
    answer = client.infer("two", [_input("input", PICTURES, BYTES)], outputs=wanted, request_id="7")
    response = answer.get_response()
    assert (response.id, response.model_name, response.model_version) == ("7", "two", "1")
    assert [output.name for output in response.outputs] == ["embedding"]
    with flowlang.load(folder / "all.flow") as app:
        expected = np.stack([app["two"](picture)["embedding"] for picture in PICTURES])
    np.testing.assert_allclose(answer.as_numpy("embedding"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "datatype", "values", "expected"),
    [
        ("double", "INT64", [1, -3], [2, -6]),
        ("half", "FP64", [1.0, 2**24 + 1], [0.5, 2**23 + 0.5]),
        ("negate", "BOOL", [True, False], [False, True]),
        ("same", "FP32", [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
        ("reversed", "UINT8", [[[1, 2], [3, 4]]], [[[3, 4], [1, 2]]]),
        ("shout", "BYTES", [b"a", b"b"], [b"A", b"B"]),
    ],
)
def test_typed_contents_are_read_as_raw_ones(
    client: triton.InferenceServerClient,
    channel: grpc.Channel,
    model: str,
    datatype: str,
    values: Any,
    expected: Any,
) -> None:
    """A tensor may come in the field of its datatype, as KServe's clients send it."""
    raw = client.infer(model, [_input("input", values, datatype)]).as_numpy("output")
    assert raw.tolist() == expected
    field = {
        "INT64": "int64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
        "BOOL": "bool_contents",
        "UINT8": "uint_contents",
        "BYTES": "bytes_contents",
    }[datatype]
    request = service_pb2.ModelInferRequest(model_name=model)
    array = np.asarray(values, object if datatype == BYTES else NUMPY[datatype])
    tensor = request.inputs.add(name="input", datatype=datatype, shape=array.shape)
    getattr(tensor.contents, field).extend(array.ravel().tolist())
    answer = _call(channel, "ModelInfer", service_pb2.ModelInferResponse)(request)
    assert triton.InferResult(answer).as_numpy("output").tolist() == expected


def test_parameters_reach_the_flow(client: triton.InferenceServerClient) -> None:
    """A flow's parameters come with the request; what clients add unasked does no harm."""
    picture = _input("input", [PICTURES[0]], BYTES)
    answer = client.infer("classes", [picture], parameters={"k": 1})
    assert answer.as_numpy("output")[0].count(b"label") == 1
    answer = client.infer("classes", [picture], priority=3, sequence_id=5, sequence_start=True)
    assert answer.as_numpy("output")[0].count(b"label") == 2
    with pytest.raises(InferenceServerException, match="no parameter `size`"):
        client.infer("classes", [picture], parameters={"size": 3})


def test_the_greatest_numbers_of_an_output(client: triton.InferenceServerClient) -> None:
    """Classes are asked for: of each item its greatest numbers, with their places in it."""
    rows = [_input("input", [[1, 5, 0.3], [9, 7, 9]], "FP32")]
    answer = client.infer("same", rows, outputs=[triton.InferRequestedOutput("output", 2)])
    expected = [[b"5.0:1", b"1.0:0"], [b"9.0:0", b"9.0:2"]]
    assert answer.as_numpy("output").tolist() == expected
    text = [_input("input", [b"a"], BYTES)]
    with pytest.raises(InferenceServerException, match="`output` is BYTES: only numbers"):
        client.infer("shout", text, outputs=[triton.InferRequestedOutput("output", 2)])
    region = triton.InferRequestedOutput("output")
    region.set_shared_memory("region", 24)
    with pytest.raises(InferenceServerException, match="there is no shared memory"):
        client.infer("same", rows, outputs=[region])


def test_a_stream_answers_in_order_and_goes_on_after_errors(
    client: triton.InferenceServerClient,
) -> None:
    """Requests of a stream are worked on together; an error is one answer among the others."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        for number in range(100):
            model = "nothing" if number == 50 else "double"
            sent = [_input("input", [number], "INT64")]
            client.async_stream_infer(model, sent, request_id=str(number))
        found = [answers.get(timeout=PATIENCE_S) for _ in range(100)]
    finally:
        client.stop_stream()
    assert "there is no model `nothing`" in str(found.pop(50)[1])
    assert [(r.get_response().id, int(r.as_numpy("output")[0])) for r, _ in found] == [
        (str(n), 2 * n) for n in range(100) if n != 50
    ]
    last = found[-1][0].get_response().parameters["triton_final_response"]
    assert last.bool_param


def test_statistics_count_what_was_asked(client: triton.InferenceServerClient) -> None:
    """Answers, items and failures are counted by model, the parts of the time equally often."""

    def counts() -> list[int]:
        (found,) = client.get_inference_statistics("shout").model_stats
        stats = found.inference_stats
        assert stats.success.count == stats.compute_infer.count == stats.compute_output.count
        assert stats.success.count == stats.queue.count
        assert stats.success.ns > stats.queue.ns > 0
        return [found.inference_count, stats.success.count, stats.fail.count]

    client.infer("shout", [_input("input", [b"a"], BYTES)])
    before = counts()
    client.infer("shout", [_input("input", [b"a", b"b"], BYTES)])
    with pytest.raises(InferenceServerException):
        client.infer("shout", [_input("input", [b"\xff"], BYTES)])
    assert [b - a for a, b in zip(before, counts(), strict=True)] == [2, 1, 1]


def test_statistics_tell_the_batches_of_models(client: triton.InferenceServerClient) -> None:
    """The batches that a flow's models were given are told by size, with the time they took."""

    def batches() -> dict[int, int]:
        (found,) = client.get_inference_statistics("classes").model_stats
        for batch in found.batch_stats:
            assert batch.compute_infer.ns > batch.compute_input.ns == 0
            assert batch.compute_infer.count == batch.compute_input.count
        return {int(b.batch_size): int(b.compute_infer.count) for b in found.batch_stats}

    before = sum(size * count for size, count in batches().items())
    client.infer("classes", [_input("input", list(PICTURES), BYTES)])
    assert sum(size * count for size, count in batches().items()) == before + len(PICTURES)


# Refusals


def _refused(call: Callable[[], Any]) -> tuple[str, str]:
    """The status and message of a call that fails."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status(), caught.value.message()


def test_errors_have_their_status(client: triton.InferenceServerClient) -> None:
    """Each reason is the status that gRPC has for it, with the place and without secrets."""
    pictures = _input("input", [PICTURES[0], bad()["text"].data], BYTES)
    status, message = _refused(lambda: client.infer("classify", [pictures]))
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("item 1: ")
    row = _input("input", [[1, 2, 3]], "FP32")
    assert _refused(lambda: client.infer("nothing", [row]))[0] == "StatusCode.NOT_FOUND"
    assert _refused(lambda: client.infer("same", [row], "2"))[0] == "StatusCode.NOT_FOUND"
    assert _refused(lambda: client.get_model_config("nothing"))[0] == "StatusCode.NOT_FOUND"
    assert _refused(lambda: client.load_model("same"))[0] == "StatusCode.UNIMPLEMENTED"
    secret = _refused(lambda: client.infer("fail", [_input("input", [b"x"], BYTES)]))
    assert secret == ("StatusCode.INTERNAL", "stage `ops.fail` failed")
    late = _refused(lambda: client.infer("held", [row], timeout=50_000))
    assert late[0] == "StatusCode.DEADLINE_EXCEEDED"


def _failures(client: triton.InferenceServerClient) -> int:
    """How many requests of `held` had no answer."""
    (found,) = client.get_inference_statistics("held").model_stats
    return int(found.inference_stats.fail.count)


def test_the_clients_deadline_is_the_requests(
    client: triton.InferenceServerClient, server: Server
) -> None:
    """A call with a deadline gives up at it, and the request with it."""
    row = _input("input", [[1, 2, 3]], "FP32")

    before = _failures(client)
    start_s = time.monotonic()
    status, _ = _refused(lambda: client.infer("held", [row], client_timeout=0.1))
    assert status == "StatusCode.DEADLINE_EXCEEDED"
    assert time.monotonic() - start_s < 5
    wait_until(lambda: _failures(client) == before + 1)


def test_a_full_queue_is_resource_exhausted(client: triton.InferenceServerClient) -> None:
    """Where others fill a flow's queue, a request is turned away at once."""
    limit = client.get_model_config("narrow").config.max_batch_size

    def ask(_: int) -> str:
        try:
            client.infer("narrow", [_input("input", [b"x"] * limit, BYTES)])
        except InferenceServerException as error:
            return str(error.status())
        return "ok"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(ask, range(2))) == ["StatusCode.RESOURCE_EXHAUSTED", "ok"]


def test_a_cancelled_call_is_left_out_of_the_batch(client: triton.InferenceServerClient) -> None:
    """A batch of 64 waits for its last item: one that was given up is not counted."""
    answers: queue.Queue[Any] = queue.Queue()
    one = [_input("input", [[1, 2, 3]], "FP32")]
    many = [_input("input", [[1, 2, 3]] * 63, "FP32")]

    before = _failures(client)
    call = client.async_infer("held", one, lambda result, error: None)
    time.sleep(0.2)
    call.cancel()
    wait_until(lambda: _failures(client) == before + 1)
    client.async_infer("held", many, lambda result, error: answers.put(error))
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.3)
    client.infer("held", one)
    assert answers.get(timeout=PATIENCE_S) is None


def _request(**fields: Any) -> Any:
    """A sound request of `same`, but for some fields."""
    raw = fields.pop("raw", [bytes(12)])
    contents = fields.pop("contents", None)
    parameters = fields.pop("parameters", {})
    request = service_pb2.ModelInferRequest(model_name=fields.pop("model", "same"))
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 3]} | fields
    if contents is not None:
        tensor["contents"] = service_pb2.InferTensorContents(**contents)
    request.inputs.append(service_pb2.ModelInferRequest.InferInputTensor(**tensor))
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(value)
    request.raw_input_contents.extend(raw)
    return request


PREFIXED = struct.pack("<I", 2**32 - 1) + b"abc"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"raw": []}, "inputs[0].contents.fp32_contents: shape [1, 3] holds 3 values"),
        ({"raw": [bytes(12)] * 2}, "raw_input_contents: there are 2 of them, and 1 inputs"),
        ({"raw": [bytes(11)]}, "takes 12 bytes, and there are 11"),
        ({"contents": {"fp32_contents": [1]}}, "both `contents` and `raw_input_contents`"),
        ({"raw": [], "contents": {"fp64_contents": [1, 2, 3]}}, "and there are 0"),
        ({"datatype": "FP16"}, "`input` is FP32, not FP16"),
        ({"datatype": "BF16"}, "`BF16` is none of"),
        ({"datatype": ""}, "`` is none of"),
        ({"shape": [-1, 3]}, "none is below 0"),
        ({"shape": [2**62, 3]}, "4,611,686,018,427,387,904 items, and a request has 1 to"),
        ({"shape": [1, 2**62]}, "`input` is of shape [-1, 3]"),
        (
            {"model": "reversed", "datatype": "UINT8", "shape": [1, 2**62, 2]},
            "takes 9,223,372,036,854,775,808 bytes",
        ),
        ({"model": "reversed", "datatype": "UINT8", "shape": [1 << 22, 0, 2]}, "holds no values"),
        ({"shape": [1] * 100}, "a list of at most 32"),
        ({"shape": []}, "`input` is of shape [-1, 3]"),
        ({"name": "x"}, "no input is named `x`"),
        (
            {"model": "shout", "datatype": "BYTES", "shape": [1], "raw": [PREFIXED]},
            "reaches beyond",
        ),
        (
            {"model": "reversed", "datatype": "UINT8", "shape": [1, 1, 2], "raw": []}
            | {"contents": {"uint_contents": [1, 256]}},
            "the range of UINT8",
        ),
        ({"parameters": {"timeout": service_pb2.InferParameter()}}, "`timeout` has no value"),
        (
            {"parameters": {"timeout": service_pb2.InferParameter(string_param="soon")}},
            "parameters.timeout: a whole number",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused(
    channel: grpc.Channel, fields: dict[str, Any], said: str
) -> None:
    """INVALID_ARGUMENT with the place in the request, whatever sizes are claimed."""
    with pytest.raises(grpc.RpcError) as caught:
        _call(channel, "ModelInfer")(_request(**fields))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert said in caught.value.details()


@settings(max_examples=60)
@given(body=st.binary(max_size=200))
def test_any_bytes_are_answered(channel: grpc.Channel, body: bytes) -> None:
    """What is no message, or asks for no model, is refused; the server is there afterwards."""
    with pytest.raises(grpc.RpcError) as caught:
        _call(channel, "ModelInfer")(body)
    codes = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert caught.value.code() in codes, caught.value.details()


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelStatistics", "RepositoryIndex"])
def test_no_message_is_no_traceback(channel: grpc.Channel, method: str) -> None:
    """Bytes that are no protobuf give INVALID_ARGUMENT, in streams too."""
    with pytest.raises(grpc.RpcError) as caught:
        _call(channel, method)(b"\xff\xff\xff")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith(f"this is no {method}Request")
    stream = channel.stream_stream(f"{SERVICE}/ModelStreamInfer")
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(iter([b"\xff\xff\xff"])))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_values_that_no_shape_asks_for_are_not_looked_at(channel: grpc.Channel) -> None:
    """A million of them are counted, and no more."""
    many = _request(
        model="double", datatype="INT64", shape=[1], raw=[],
        contents={"int64_contents": [1] * 1_000_000},
    )  # fmt: skip
    body = many.SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        _call(channel, "ModelInfer")(body)
    assert "shape [1] holds 1 values, and there are 1,000,000" in caught.value.details()


def test_messages_have_a_largest_size(channel: grpc.Channel) -> None:
    """A message over the limit is refused by its length, and one that unpacks to it as well."""
    body = _request(model="echo", datatype="BYTES", shape=[1], raw=[bytes(2 << 20)])
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        call = channel.unary_unary(f"{SERVICE}/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(body.SerializeToString(), compression=compression)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_is_not_there_is_unimplemented(channel: grpc.Channel, server: Server) -> None:
    """A method that is not offered says so; bytes that are not HTTP/2 end their connection only."""
    with pytest.raises(grpc.RpcError) as caught:
        _call(channel, "SystemSharedMemoryStatus")(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with server.connect() as connection:
        connection.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        connection.wait_closed()
    assert _health(channel, "") == "SERVING"


# Connections


@contextmanager
def patched(folder: Path, change: str) -> Iterator[Server]:
    """A server of `all.flow` over HTTP and gRPC, after a change to `face`, the module of gRPC."""
    program = (
        f"import flowlang.serve.grpc as face; {change}; from flowlang.cli import main; "
        f"main(['serve', '--port=0', '--grpc-port=0', {str(folder / 'all.flow')!r}])"
    )
    with running(folder, "-c", program) as server:
        yield server.wait_ready()


def test_a_connection_has_so_many_calls_at_once(folder: Path) -> None:
    """More wait in their client for a turn; another connection has calls of its own."""
    own = [("grpc.use_local_subchannel_pool", 1)]  # or all channels would share a connection
    with patched(folder, "face.MAX_CALLS = 20") as server:
        address = server.urls[0].removeprefix("grpc://")
        fields = {"datatype": "FP32", "shape": [1, 3], "raw": [bytes(12)]}
        quick, held = (_request(model=m, **fields).SerializeToString() for m in ("same", "held"))

        def inside() -> float:
            text = server.client.get("/metrics").text
            _, _, rest = text.partition('flowlang_requests_inside{flow="held"} ')
            return float(rest.partition("\n")[0])

        with (
            grpc.insecure_channel(address, own) as channel,
            grpc.insecure_channel(address, own) as other,
        ):
            infer = channel.unary_unary(f"{SERVICE}/ModelInfer")
            for call in [infer.future(quick) for _ in range(100)]:
                assert call.result(PATIENCE_S)
            waiting = [infer.future(held) for _ in range(30)]
            wait_until(lambda: inside() == 20)
            time.sleep(0.2)
            assert inside() == 20
            assert other.unary_unary(f"{SERVICE}/ModelInfer")(quick, timeout=PATIENCE_S)
            assert not any(call.done() for call in waiting)
        wait_until(lambda: inside() == 0)


def test_connections_without_calls_are_closed(folder: Path) -> None:
    """Whether idle or never begun, after a while; who calls again does not notice."""
    with patched(folder, "face.IDLE_MS = face.HANDSHAKE_MS = 500") as server:
        port = int(server.urls[0].rpartition(":")[2])

        def connections() -> int:
            there = psutil.Process(server.process.pid).net_connections("tcp")
            return sum(c.status == "ESTABLISHED" and c.laddr.port == port for c in there)

        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client, Raw(port) as silent:
            for _ in range(2):
                found = client.infer("echo", [_input("input", [b"x"], BYTES)])
                assert found.as_numpy("output").tolist() == [b"x"]
                wait_until(lambda: connections() == 0)
            silent.wait_closed()


# Beginning and end


def test_a_server_that_is_loading_says_so(folder: Path, tmp_path: Path) -> None:
    """Until the flows are loaded it is live and not ready, and a watcher is told when it is."""
    gate = tmp_path / "gate"
    with (
        facing(folder, "grpc", "types.flow", gate=gate) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            response_deserializer=HEALTH["HealthCheckResponse"].FromString,
        )(b"", timeout=PATIENCE_S)
        states = (message.status for message in watch)
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert next(states) == 2  # NOT_SERVING
        status, message = _refused(lambda: client.get_model_metadata("double"))
        assert (status, message) == ("StatusCode.UNAVAILABLE", "the flows are not loaded yet")
        gate.touch()
        assert next(states) == 1  # SERVING
        assert client.is_server_ready()
        watch.cancel()


def test_a_stopping_server_answers_what_it_has(folder: Path) -> None:
    """SIGTERM: what is inside is answered, what comes then is UNAVAILABLE, the status is 0."""
    with (
        facing(folder, "grpc", "types.flow") as server,
        triton.InferenceServerClient(f"127.0.0.1:{server.wait_ready().port}") as client,
        ThreadPoolExecutor(1) as pool,
    ):
        sent = [_input("input", [b"x"], BYTES)]
        client.infer("slow", sent)
        inside = pool.submit(client.infer, "slow", sent)
        time.sleep(0.15)
        server.signal(signal.SIGTERM)
        wait_until(lambda: not client.is_server_ready())
        status, _ = _refused(lambda: client.infer("slow", sent))
        assert status == "StatusCode.UNAVAILABLE"
        assert inside.result(PATIENCE_S).as_numpy("output").tolist() == [b"x"]
        assert server.wait() == 0
        assert "Traceback" not in server.errors


def test_a_port_in_use_is_refused(server: Server, folder: Path) -> None:
    """Two servers never share a port unnoticed."""
    code = f"""
import asyncio
from flowlang.serve.grpc import GrpcServer
from flowlang.serve.inference import Inference
from flowlang.serve.setup import Setup
setup = Setup(host="127.0.0.1", port=0, grace_s=1, max_body_bytes=1)
server = GrpcServer(Inference(), setup, port={server.port})
asyncio.run(server.start())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"FlowError: cannot listen on 127.0.0.1:{server.port}" in done.stderr


@pytest.mark.skipif(shutil.which("perf_analyzer") is None, reason="perf_analyzer is not installed")
@pytest.mark.parametrize("options", [[], ["--async", "-b", "4"], ["--async", "--streaming"]])
def test_perf_analyzer_measures(server: Server, options: list[str]) -> None:
    """Triton's load generator runs against the server as it comes."""
    command = ["perf_analyzer", "-m", "same", "-u", f"127.0.0.1:{server.port}", "-i", "grpc"]
    window = ["--measurement-interval", "500", "-r", "3", "-s", "99", *options]
    done = subprocess.run([*command, *window], capture_output=True, text=True, timeout=60)
    assert "Successful request count" in done.stdout, done.stdout + done.stderr
