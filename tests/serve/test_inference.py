"""The Open Inference Protocol over HTTP: Triton's own client, and what no client would send."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

import flowlang
from flowlang.diagnostics import BadRequest, RequestError
from flowlang.serve.answer import to_json
from flowlang.serve.inference import Inference
from flowlang.serve.routes import Service
from flowlang.serve.tensor import BYTES, NUMPY, Tensor, from_list, from_raw, to_list, to_raw
from flowlang.serve.v2 import InferenceRoutes
from tests.pictures import bad, photographs
from tests.serve.faces import write_types
from tests.serve.processes import peak_bytes
from tests.serve.server import KINDS, PATIENCE_S, Server, serving

PICTURES = photographs(3)
RAW = {"Inference-Header-Content-Length": "0"}
ROW = [[1.0, 2.0, 3.0]]
ROW_BYTES = np.array(ROW, np.float32).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, `all.flow` and `types.flow`."""
    folder = tmp_path_factory.mktemp("flows")
    write_types(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of every flow."""
    with serving(
        folder, *request.param, str(folder / "all.flow"), str(folder / "types.flow")
    ) as server:
        yield server.wait_ready()
        # Only the operator that fails on purpose may show up.
        assert server.errors.count("Traceback") == server.errors.count("\nRuntimeError: a secret")


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    """Triton's client, as it comes."""
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


def _input(name: str, values: Any, datatype: str, *, is_binary: bool = True) -> triton.InferInput:
    array = np.asarray(values, object if datatype == BYTES else NUMPY[datatype])
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=is_binary)
    return found


def _ask(server: Server, model: str, **fields: Any) -> httpx.Response:
    body = {"inputs": [{"name": "input", "shape": [1, 3], "datatype": "FP32", "data": ROW}]}
    return server.client.post(f"/v2/models/{model}/infer", json=body | fields)


def _tensor(**fields: Any) -> dict[str, Any]:
    return {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]} | fields


# What there is


def test_the_server_and_its_models_describe_themselves(
    client: triton.InferenceServerClient,
) -> None:
    """Health, metadata, configuration and the index are what Triton's client asks for."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("two")
    assert client.is_model_ready("two", "1")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata() == {
        "name": "flowlang",
        "version": flowlang.__version__,
        "extensions": [
            *("binary_tensor_data", "model_configuration", "parameters", "schedule_policy"),
            "statistics",
        ],
    }
    assert client.get_model_metadata("two", "1") == {
        "name": "two",
        "versions": ["1"],
        "platform": "flowlang",
        "inputs": [{"name": "input", "datatype": "BYTES", "shape": [-1, 1]}],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "embedding", "datatype": "FP32", "shape": [-1, 16]},
        ],
    }
    config = client.get_model_config("pair")
    assert config["max_batch_size"] > 0
    assert config["input"][0] == {
        "name": "image",
        "data_type": "TYPE_FP32",
        "dims": [3, 64, 64],
        "optional": False,
    }
    index = client.get_model_repository_index()
    assert {"name": "classify", "version": "1", "state": "READY", "reason": ""} in index
    with pytest.raises(InferenceServerException, match="there is no model `nothing`; there is"):
        client.get_model_metadata("nothing")


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        ("double", {"input": ("INT64", [-1, 1])}, {"output": ("INT64", [-1])}),
        ("negate", {"input": ("BOOL", [-1, 1])}, {"output": ("BOOL", [-1])}),
        ("total", {"input": ("BYTES", [-1, 1])}, {"output": ("FP64", [-1])}),
        ("zeros", {"input": ("INT64", [-1, 1])}, {"output": ("UINT8", [-1, -1, 2])}),
        ("reversed", {"input": ("UINT8", [-1, -1, 2])}, {"output": ("UINT8", [-1, -1, 2])}),
        ("echo", {"input": ("BYTES", [-1, 1])}, {"output": ("BYTES", [-1])}),
        (
            "joined",
            {"input": ("BYTES", [-1, 1]), "other": ("BYTES", [-1, 1])},
            {"output": ("BYTES", [-1])},
        ),
        (
            "facts",
            {"input": ("BYTES", [-1, 1])},
            {
                "size": ("INT64", [-1]),
                "start": ("BYTES", [-1]),
                "ratio": ("FP64", [-1]),
                "is_long": ("BOOL", [-1]),
            },
        ),
    ],
)
def test_types_are_tensors(
    client: triton.InferenceServerClient, model: str, inputs: Any, outputs: Any
) -> None:
    """Numbers, texts, arrays and bytes are tensors, a record one a field, the rest JSON."""
    found = client.get_model_metadata(model)
    assert {p["name"]: (p["datatype"], p["shape"]) for p in found["inputs"]} == inputs
    assert {p["name"]: (p["datatype"], p["shape"]) for p in found["outputs"]} == outputs


# Answers


@pytest.mark.parametrize("is_binary", [True, False])
def test_several_pictures_in_one_request(
    client: triton.InferenceServerClient,
    folder: Path,
    is_binary: bool,
) -> None:
    """Each picture is an item; they are answered together, and as Python answers each of them."""
    wanted = [triton.InferRequestedOutput(n, is_binary) for n in ("embedding", "scores")]
    pictures = _input("input", PICTURES, BYTES)
    answer = client.infer("two", [pictures], outputs=wanted, request_id="a-7")
    assert answer.get_response()["id"] == "a-7"
    assert [o["name"] for o in answer.get_response()["outputs"]] == ["embedding", "scores"]
    with flowlang.load(folder / "all.flow") as app:
        for name in ("embedding", "scores"):
            expected = np.stack([app["two"](picture)[name] for picture in PICTURES])
            np.testing.assert_allclose(answer.as_numpy(name), expected, rtol=1e-4, atol=1e-5)


def test_a_list_of_records_is_json(client: triton.InferenceServerClient) -> None:
    """Labels come as JSON in a BYTES tensor, one an item, and with Triton's column too."""
    column = np.array([[PICTURES[0]], [PICTURES[1]]], object)
    answer = client.infer("classify", [_input("input", column, BYTES)]).as_numpy("output")
    assert answer.shape == (2,)
    labels = json.loads(answer[0])
    assert [set(label) for label in labels] == [{"index", "label", "score"}] * 3


def test_a_picture_is_the_whole_body(server: Server) -> None:
    """With a header length of 0 the body is the one item, so that curl can send a picture."""
    path = "/v2/models/two/versions/1/infer"
    response = server.client.post(path, content=PICTURES[0], headers=RAW)
    assert response.status_code == 200
    length = int(response.headers["inference-header-content-length"])
    head = json.loads(response.content[:length])
    assert "id" not in head
    sizes = [output["parameters"]["binary_data_size"] for output in head["outputs"]]
    assert (sizes, length + sum(sizes)) == ([40, 64], len(response.content))
    raw = server.client.post("/v2/models/same/infer", content=ROW_BYTES, headers=RAW)
    assert raw.content.endswith(ROW_BYTES)


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize(
    ("model", "datatype", "values", "expected"),
    [
        ("double", "INT64", [1, -3], [2, -6]),
        ("half", "FP64", [1.0, 2**24 + 1, 1e300], [0.5, 2**23 + 0.5, 5e299]),
        ("negate", "BOOL", [True, False], [False, True]),
        ("same", "FP32", [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
        ("reversed", "UINT8", [[[1, 2], [3, 4]]], [[[3, 4], [1, 2]]]),
    ],
)
def test_tensors_there_and_back(
    client: triton.InferenceServerClient,
    model: str,
    datatype: str,
    values: Any,
    expected: Any,
    is_binary: bool,
) -> None:
    """Numbers and arrays go in and come back as they are, as JSON and as bytes."""
    sent = _input("input", values, datatype, is_binary=is_binary)
    wanted = [triton.InferRequestedOutput("output", is_binary)]
    answer = client.infer(model, [sent], outputs=wanted)
    np.testing.assert_array_equal(answer.as_numpy("output"), np.array(expected, NUMPY[datatype]))


@pytest.mark.parametrize("number", [2**62, -(2**62) - 1, 2**63 - 1])
def test_a_number_that_no_tensor_holds_is_told(
    server: Server, client: triton.InferenceServerClient, number: int
) -> None:
    """What a flow gives beyond INT64 is refused by name; over the plain face it is as it is."""
    with pytest.raises(InferenceServerException) as caught:
        client.infer("double", [_input("input", [1, number], "INT64")])
    assert caught.value.status() == "400"
    assert caught.value.message().startswith("`output`: a number that INT64 cannot hold")
    assert server.client.post("/flows/double", json=number).json() == 2 * number


def test_texts_bytes_and_json_as_items(client: triton.InferenceServerClient) -> None:
    """A BYTES tensor holds texts, or bytes, or JSON, as the flow takes them."""
    shout = client.infer("shout", [_input("input", ["gr\xfc\xdfe".encode()], BYTES)])
    assert shout.as_numpy("output")[0].decode() == "GR\xdcSSE"
    parts = client.infer("parts", [_input("input", [b'["aGk=", "aG8="]', b"[]"], BYTES)])
    assert parts.as_numpy("output").tolist() == [b"hi+ho", b""]
    for fields in ({"data": b"hi"}, {"data": b"hi", "hint": b"ho"}):
        given = [_input(name, [value], BYTES) for name, value in fields.items()]
        expected = b"hi?" + fields.get("hint", b"none")
        assert client.infer("hinted", given).as_numpy("output").tolist() == [expected]
    total = client.infer("total", [_input("input", [b"[1, 2.5]", b"[]"], BYTES)])
    assert total.as_numpy("output").tolist() == [3.5, 0.0]
    facts = client.infer("facts", [_input("input", [b"abcdefgh", b"0" * 16], BYTES)])
    assert facts.as_numpy("size").tolist() == [8, 16]
    assert facts.as_numpy("start").tolist() == [b"abc", b"000"]
    assert facts.as_numpy("ratio").tolist() == [1.0, 2.0]
    assert facts.as_numpy("is_long").tolist() == [False, True]


def test_parameters_reach_the_flow(client: triton.InferenceServerClient) -> None:
    """A flow's parameters come with the request; those that are no plain values are tensors."""
    picture = _input("input", [PICTURES[0]], BYTES)
    for given_k, count in ((None, 2), (1, 1), (5, 5)):
        parameters = {} if given_k is None else {"k": given_k}
        answer = client.infer("classes", [picture], parameters=parameters)
        assert len(json.loads(answer.as_numpy("output")[0])) == count
    inputs = [_input("input", [b"a", b"b"], BYTES), _input("other", [b"1", b"2"], BYTES)]
    assert client.infer("joined", inputs).as_numpy("output").tolist() == [b"a+1", b"b+2"]


def test_parameters_of_the_protocol_may_be_the_flows(server: Server) -> None:
    """A flow may name its parameters as ones of the protocol that have no effect here."""

    def told(**parameters: Any) -> str:
        tensor = _tensor(shape=[1], datatype="BYTES", data=["x"])
        answer = _ask(server, "told", inputs=[tensor], parameters=parameters).json()
        text: str = answer["outputs"][0]["data"][0]
        return text

    own = {"item": 5, "sequence_id": 7, "headers": "a"}
    assert told(sequence_start=True, triton_x=1) == "1 2 none"
    assert told(**own) == "5 7 a"
    query = {name: str(value) for name, value in own.items()}
    assert server.client.post("/flows/told", params=query, content=b"x").json() == "5 7 a"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_bodies(
    server: Server, client: triton.InferenceServerClient, coding: str
) -> None:
    """Bodies come and go compressed where a client asks for it, and only then."""
    sent = _input("input", [b"0" * 100_000], BYTES)
    answer = client.infer(
        "echo",
        [sent],
        request_compression_algorithm=coding,
        response_compression_algorithm=coding,
    )
    assert answer.as_numpy("output")[0] == b"0" * 100_000
    plain = server.client.post("/v2/models/echo/infer", content=b"0" * 100_000, headers=RAW)
    assert "content-encoding" not in plain.headers


def test_gzip_of_several_members(server: Server) -> None:
    """They are one body, end to end; what follows the last and is none is refused."""

    def ask(sent: bytes, coding: str = "gzip") -> tuple[int, bytes]:
        headers = {**RAW, "Content-Encoding": coding}
        answer = server.client.post("/v2/models/echo/infer", content=sent, headers=headers)
        return answer.status_code, answer.content

    one, large = gzip.compress(b"abc"), os.urandom(200_000)
    assert ask(one + gzip.compress(b"") + gzip.compress(large))[1].endswith(b"abc" + large)
    assert ask(one * 100, "x-gzip")[1].endswith(b"abc" * 100)
    for wrong in (one + b"garbage", one + one[:-1], one * 5000, b""):
        assert ask(wrong)[0] == 400
    assert ask(zlib.compress(b"abc"), "deflate")[0] == 200
    assert ask(zlib.compress(b"abc") + b"d", "deflate")[0] == 400
    largest = gzip.compress(bytes(32 << 20))
    assert ask(largest)[0] == 200
    assert ask(largest + gzip.compress(bytes(1 << 20)))[0] == 413


def test_the_client_for_asyncio(server: Server) -> None:
    """Triton's other client, with forty requests at once, each answered as it asked."""

    async def ask() -> list[Any]:
        client = triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}")
        async with client:
            answers = await asyncio.gather(
                *(
                    client.infer("double", [_input("input", [i], "INT64")], request_id=str(i))
                    for i in range(40)
                )
            )
        return [(a.get_response()["id"], int(a.as_numpy("output")[0])) for a in answers]

    assert asyncio.run(ask()) == [(str(i), 2 * i) for i in range(40)]


def test_statistics_count_what_was_asked(client: triton.InferenceServerClient) -> None:
    """Answers, items and failures are counted by model, the parts of the time equally often."""

    def counts() -> tuple[int, int, int]:
        (found,) = client.get_inference_statistics("shout")["model_stats"]
        stats = found["inference_stats"]
        parts = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        assert len({stats[part]["count"] for part in parts}) == 1
        assert stats["success"]["ns"] >= stats["compute_infer"]["ns"] > 0
        return found["inference_count"], stats["success"]["count"], stats["fail"]["count"]

    client.infer("shout", [_input("input", [b"a"], BYTES)])
    before = counts()
    client.infer("shout", [_input("input", [b"a", b"b", b"c"], BYTES)])
    with pytest.raises(InferenceServerException):
        client.infer("shout", [_input("input", [b"\xff"], BYTES)])
    assert [b - a for a, b in zip(before, counts(), strict=True)] == [3, 1, 1]
    everything = client.get_inference_statistics()["model_stats"]
    assert {"shout", "classify"} <= {model["name"] for model in everything}


def _told(client: triton.InferenceServerClient, name: str) -> tuple[Any, dict[int, Any]]:
    """The time that a model's requests took by part, and the batches of each size."""
    (found,) = client.get_inference_statistics(name)["model_stats"]
    parts = {part: span["ns"] / 1e9 for part, span in found["inference_stats"].items()}
    return parts, {batch["batch_size"]: batch for batch in found["batch_stats"]}


def test_statistics_tell_waiting_from_work(folder: Path) -> None:
    """What waits for its batch is queue, and what the batch takes is compute."""
    (folder / "waits.flow").write_text(
        'export flow waits = trt("identity.onnx", batch=1..8, wait=300ms) x1\n'
        'use "sleep.py" as sleep\nexport flow works: bytes -> int = sleep.sleep\n'
    )
    (folder / "sleep.py").write_text(
        "import time\n\ndef sleep(item: bytes) -> int:\n    time.sleep(0.2)\n    return 1\n"
    )
    with serving(folder, str(folder / "waits.flow"), "--device", "cpu") as server:
        server.wait_ready()
        asker = triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=3)
        row = [_input("input", ROW * 3, "FP32")]
        asker.infer("waits", row)
        parts, batches = _told(asker, "waits")
        assert 0.3 <= parts["queue"] < parts["success"]
        assert 0 < parts["compute_infer"] < 0.3
        assert list(batches) == [3]
        assert [batches[3][f"compute_{part}"]["count"] for part in ("input", "output")] == [1, 1]
        assert 0 < batches[3]["compute_infer"]["ns"] / 1e9 <= parts["compute_infer"]
        # One operator in Python, which sleeps: the second request waits for the first.
        calls = [asker.async_infer("works", [_input("input", [b"x"], BYTES)]) for _ in range(2)]
        assert [int(call.get_result().as_numpy("output")[0]) for call in calls] == [1, 1]
        parts, batches = _told(asker, "works")
        assert 0.15 <= parts["queue"] < 0.4
        assert 0.4 <= parts["compute_infer"] < 0.6
        assert batches == {}
        asker.close()


def test_statistics_go_on_when_other_flows_take_over(folder: Path) -> None:
    """Requests and batches of the flows that were loaded before a change stay counted."""
    inference = Inference()
    routes = InferenceRoutes(inference, 1 << 20)
    for answered in (1, 2):
        with flowlang.load(folder / "all.flow", device="cpu") as app:
            inference.let_in(app)
            body = json.dumps({"inputs": [_tensor()]}).encode()
            call = routes.infer("/v2/models/same/infer", {}, body, b"1")
            assert asyncio.run(call)[0].status == 200
            (found,) = inference.statistics("same")["model_stats"]
            assert found["inference_stats"]["success"]["count"] == answered
            (batches,) = found["batch_stats"]
            assert (batches["batch_size"], batches["compute_infer"]["count"]) == (1, answered)


# Refusals


def test_what_is_null_is_as_left_out(server: Server) -> None:
    """Clients that write every field they know are answered as those that write none."""
    nothing = {"id": None, "parameters": None, "outputs": None}
    tensor = _tensor(parameters=None)
    answer = _ask(server, "same", inputs=[tensor], **nothing)
    assert answer.json() == _ask(server, "same", inputs=[_tensor()]).json()
    outputs = [{"name": "output", "parameters": None}]
    flags = {"binary_data_output": None, "timeout": None, "priority": None}
    flags |= {"sequence_id": None, "size": None}
    asked = _ask(server, "same", inputs=[tensor], outputs=outputs, parameters=flags)
    assert asked.json() == answer.json()
    body = json.dumps({"inputs": [_binary_of(None, [1, 2, 3])]})
    assert server.client.post("/v2/models/same/infer", content=body).json() == answer.json()


def _binary_of(size: Any, data: Any) -> dict[str, Any]:
    return _tensor(data=data, parameters={"binary_data_size": size})


def test_one_corrupt_picture_is_named(client: triton.InferenceServerClient) -> None:
    """The item that cannot be answered is told by its number, and with the flow's own words."""
    corrupt = bad()["text"]
    pictures = _input("input", [PICTURES[0], corrupt.data, PICTURES[1]], BYTES)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("classify", [pictures])
    assert caught.value.status() == "400"
    assert caught.value.message().startswith("item 1: ")
    assert corrupt.word in caught.value.message()


HOSTILE: list[tuple[str, Any, str]] = [
    ("same", [], "the request: a JSON object"),
    ("same", {}, "inputs: a list"),
    ("same", {"inputs": {}}, "inputs: a list"),
    ("same", {"inputs": []}, "inputs: `input` is missing; this model takes `input`"),
    ("same", {"inputs": [7]}, "inputs[0]: a JSON object"),
    ("same", {"inputs": [_tensor(name=None)]}, "inputs[0].name"),
    ("same", {"inputs": [_tensor(name="x")]}, "inputs[0]: no input is named `x`"),
    ("same", {"inputs": [_tensor(), _tensor()]}, "inputs[1]: `input` is given twice"),
    ("same", {"inputs": [_tensor(datatype="FP33")]}, "inputs[0].datatype: `FP33` is none of"),
    ("same", {"inputs": [_tensor(datatype=["FP32"])]}, "inputs[0].datatype"),
    ("same", {"inputs": [_tensor(datatype="FP64")]}, "`input` is FP32, not FP64"),
    ("same", {"inputs": [_tensor(shape=[3])]}, "inputs[0].shape: `input` is of shape [-1, 3]"),
    ("same", {"inputs": [_tensor(shape=[2, 3])]}, "holds 6 values, and there are 3"),
    ("same", {"inputs": [_tensor(shape=[1, 4])]}, "`input` is of shape [-1, 3]"),
    ("same", {"inputs": [_tensor(shape=[-1, -3])]}, "inputs[0].shape: its numbers"),
    ("same", {"inputs": [_tensor(shape="13")]}, "inputs[0].shape: a list"),
    ("same", {"inputs": [_tensor(shape=[1.0, 3])]}, "inputs[0].shape: its numbers"),
    ("same", {"inputs": [_tensor(shape=[True, 3])]}, "inputs[0].shape: its numbers"),
    ("same", {"inputs": [_tensor(shape=[10**18, 3])]}, "1,000,000,000,000,000,000 items, and a"),
    ("same", {"inputs": [_tensor(shape=[1, 10**4000])]}, "or above 9223372036854775807"),
    ("same", {"inputs": [_tensor(shape=[1, 0, 2**62])]}, "too large for what holds no values"),
    ("same", {"inputs": [_tensor(shape=[1] * 1000)]}, "inputs[0].shape: a list of at most 32"),
    ("same", {"inputs": [_tensor(shape=[0, 3], data=[])]}, "0 items, and a request has 1 to"),
    ("same", {"inputs": [_tensor(data=None)]}, "inputs[0].data: a list"),
    ("same", {"inputs": [_tensor(data=["1", "2", "3"])]}, "not all of it is FP32"),
    ("same", {"inputs": [_tensor(data=[[1, [2], 3]])]}, "not all of it is FP32"),
    ("same", {"inputs": [_tensor(data=[[1], [2], [3]])]}, "a list of 3 at depth 1 is not of shape"),
    (
        "same",
        {"inputs": [_tensor(shape=[2, 3], data=[[1, 2, 3, 4], [5, 6]])]},
        "a list of 2 at depth 2 is not of shape [2, 3]",
    ),
    ("same", {"inputs": [_tensor(data=[[[1], [2], [3]]])]}, "at depth 3 is not of shape"),
    ("same", {"inputs": [_tensor(data=[1, 2, True])]}, "not all of it is FP32"),
    ("same", {"inputs": [_tensor(data=[1, 2, 10**400])]}, "in the range of FP32"),
    ("same", {"inputs": [_tensor(data=[1, 2, 1e300])]}, "in the range of FP32"),
    ("same", {"inputs": [_tensor(data=[1, 2, None])]}, "not all of it is FP32"),
    ("same", {"inputs": [_tensor(parameters=[])]}, "inputs[0].parameters: a JSON object"),
    ("same", {"inputs": [_tensor(parameters={"shared_memory_region": "r"})]}, "no shared memory"),
    ("same", {"inputs": [_tensor(parameters={"binary_data_size": 12})]}, "both `data` and"),
    ("same", {"inputs": [_tensor()], "outputs": [{"name": "x"}]}, "outputs[0]: no output is named"),
    ("same", {"inputs": [_tensor()], "outputs": [{}]}, "outputs[0].name"),
    ("same", {"inputs": [_tensor()], "outputs": {}}, "outputs: a list"),
    (
        "same",
        {
            "inputs": [_tensor()],
            "outputs": [{"name": "output", "parameters": {"classification": 2}}],
        },
        "`classification` is not possible",
    ),
    (
        "same",
        {"inputs": [_tensor()], "parameters": {"binary_data_output": "yes"}},
        "parameters.binary_data_output: true or false",
    ),
    ("same", {"inputs": [_tensor()], "parameters": {"timeout": -1}}, "parameters.timeout"),
    ("same", {"inputs": [_tensor()], "parameters": {"timeout": 2**64}}, "parameters.timeout"),
    ("same", {"inputs": [_tensor()], "parameters": {"timeout": 10**400}}, "parameters.timeout"),
    ("same", {"inputs": [_tensor()], "parameters": {"size": 3}}, "no parameter `size`"),
    ("same", {"inputs": [_tensor()], "parameters": 3}, "parameters: a JSON object"),
    ("same", {"inputs": [_tensor()], "id": 7}, "id: a string"),
    ("double", {"inputs": [_tensor(shape=[1], datatype="INT64", data=[1.5])]}, "is INT64"),
    (
        "double",
        {"inputs": [_tensor(shape=[1], datatype="INT64", data=[2**64])]},
        "the range of INT64",
    ),
    (
        "reversed",
        {"inputs": [_tensor(shape=[1, 1, 2], datatype="UINT8", data=[1, 256])]},
        "of UINT8",
    ),
    ("half", {"inputs": [_tensor(shape=[1], datatype="FP32", data=[1])]}, "is FP64, not FP32"),
    ("shout", {"inputs": [_tensor(shape=[1], datatype="BYTES", data=[1])]}, "are strings"),
    (
        "shout",
        {"inputs": [_tensor(shape=[2, 1], datatype="BYTES", data=[["a"], "b"])]},
        "as deep",
    ),
    ("shout", {"inputs": [_tensor(shape=[1], datatype="BYTES", data=["\ud800"])]}, "surrogate"),
    ("total", {"inputs": [_tensor(shape=[1], datatype="BYTES", data=["[1,"])]}, "element 0"),
    ("pair", {"inputs": [_tensor(name="features", shape=[1, 8], data=[0] * 8)]}, "`image` is"),
    (
        "joined",
        {
            "inputs": [
                _tensor(shape=[1], datatype="BYTES", data=["a"]),
                _tensor(name="other", shape=[2], datatype="BYTES", data=["a", "b"]),
            ]
        },
        "inputs[1].shape: it has not 1 items, as inputs[0] has",
    ),
    (
        "zeros",
        {"inputs": [_tensor(shape=[2], datatype="INT64", data=[1, 2])]},
        "in different shapes",
    ),
]


@pytest.mark.parametrize(("model", "body", "said"), HOSTILE, ids=[h[2] for h in HOSTILE])
def test_a_request_that_does_not_fit_is_refused(
    server: Server, model: str, body: Any, said: str
) -> None:
    """400 with the place in the request, and nothing of the server in it."""
    text = json.dumps(body)
    response = server.client.post(f"/v2/models/{model}/infer", content=text)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert said in response.json()["error"]
    assert ".py" not in response.text


PAIRS = {"datatype": "UINT8"}
TEXTS = {"datatype": BYTES}


def _binary(size: Any, raw: bytes, **fields: Any) -> tuple[bytes, bytes]:
    """JSON with one binary tensor, and the bytes behind it."""
    tensor = _tensor(parameters={"binary_data_size": size}) | fields
    del tensor["data"]
    return json.dumps({"inputs": [tensor]}).encode(), raw


@pytest.mark.parametrize(
    ("size", "raw", "fields", "said"),
    [
        (12, bytes(11), {}, "11 bytes are left of the body, not 12"),
        (8, bytes(8), {}, "takes 12 bytes, and there are 8"),
        (12, bytes(13), {}, "1 bytes of the body belong to no input"),
        (-1, bytes(12), {}, "12 bytes are left of the body, not -1"),
        ("12", bytes(12), {}, "12 bytes are left"),
        (10**30, bytes(12), {}, "12 bytes are left"),
        (12, bytes(12), PAIRS | {"shape": [1, 10**12, 2]}, "takes 2,000,000,000,000 bytes"),
        (4, b"\xff\xff\xff\xff", TEXTS | {"shape": [1]}, "element 0 reaches beyond"),
        (8, bytes(8), TEXTS | {"shape": [10]}, "needs more than 8 bytes"),
        (8, bytes(8), TEXTS | {"shape": [1]}, "4 bytes are left behind"),
        (6, b"\1\0\0\0a\0", TEXTS | {"shape": [2]}, "needs more than 6 bytes"),
        (8, b"\2\0\0\0ab\0\0", TEXTS | {"shape": [2]}, "element 1 reaches beyond"),
    ],
)
def test_binary_lengths_are_held_against_the_body(
    server: Server, size: Any, raw: bytes, fields: Any, said: str
) -> None:
    """No length a client claims is believed, and none of it is made before it is there."""
    model = {"UINT8": "reversed", BYTES: "shout"}.get(fields.get("datatype", ""), "same")
    head, body = _binary(size, raw, **fields)
    response = server.client.post(
        f"/v2/models/{model}/infer",
        content=head + body,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert response.status_code == 400
    assert said in response.json()["error"]


@pytest.mark.parametrize(
    ("model", "body", "length", "said"),
    [
        ("same", b"{}", "3", "a number from 0 to the body's 2 bytes"),
        ("same", b"{}", "-1", "a number from 0"),
        ("same", b"{}", "", "a number from 0"),
        ("same", b"{}", "9" * 30, "a number from 0"),
        ("same", b"", None, "the body is empty"),
        ("same", b"", "0", "takes 12 bytes, and there are 0"),
        ("same", b"[1, 2", None, "line 1, column 6"),
        ("same", b"[" * 100_000, None, "no JSON"),
        ("same", b"\xff\xfe", None, "no JSON"),
        ("same", b'{"inputs": []}x', "14", "1 bytes of the body"),
        ("pair", b"x", "0", "a raw body is one tensor, and this model takes `image`, `features`"),
        ("reversed", b"ab", "0", "say in JSON which one"),
        ("double", b"ab", "0", "takes 8 bytes"),
        ("classify", b"ab", "0", "not a picture"),
    ],
)
def test_bodies_and_header_lengths_that_do_not_fit(
    server: Server, model: str, body: bytes, length: str | None, said: str
) -> None:
    """A wrong length of the JSON, or no JSON, gives 400 with the reason."""
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    path = f"/v2/models/{model}/infer"
    response = server.client.post(path, content=body, headers=headers)
    assert (response.status_code, set(response.json())) == (400, {"error"})
    assert said in response.json()["error"]


def test_what_holds_no_values_takes_no_memory(server: Server) -> None:
    """Rows that are claimed and hold nothing are refused before they are made."""
    before = peak_bytes(server)
    tensor = _tensor(shape=[2_000_000, 0, 2], datatype="UINT8", data=[])
    response = _ask(server, "reversed", inputs=[tensor])
    assert response.status_code == 400
    assert "2,000,000 items, and a request has 1 to" in response.json()["error"]
    assert peak_bytes(server) - before < 64 << 20


@pytest.mark.parametrize(
    "data", ["1," * 250_000 + "1", "[]," * 130_000 + "[]"], ids=["numbers", "lists"]
)
def test_values_that_no_shape_asks_for_are_not_looked_at(server: Server, data: str) -> None:
    """All that JSON may have are counted, and no more: others do not wait for that."""
    tensor = f'{{"name":"input","shape":[1],"datatype":"INT64","data":[{data}]}}'
    body = f'{{"inputs":[{tensor}]}}'.encode()
    took_s: list[float] = []
    while len(took_s) < 3 and min(took_s, default=2) >= 2:  # the machine may have been busy
        start_s = time.monotonic()
        response = server.client.post("/v2/models/double/infer", content=body)
        took_s.append(time.monotonic() - start_s)
        assert response.status_code == 400
        assert "shape [1]" in response.json()["error"]
    assert min(took_s) < 2  # most of it is the parsing of JSON


def test_compression_does_not_take_memory(server: Server) -> None:
    """What unpacks to more than a body may have is refused, and so is what is no gzip."""

    def post(body: bytes, coding: str) -> tuple[int, str]:
        headers = RAW | {"Content-Encoding": coding}
        response = server.client.post("/v2/models/facts/infer", content=body, headers=headers)
        return response.status_code, response.json()["error"]

    bomb = gzip.compress(bytes(200 << 20), 9)
    assert post(bomb, "gzip")[0] == 413
    assert post(b"no gzip", "gzip") == (400, "the body is not of the compression it claims")
    assert post(gzip.compress(b"x")[:-4], "gzip")[0] == 400
    assert post(zlib.compress(b"x"), "br")[0] == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/nothing/infer", 404),
        ("POST", "/v2/models/same/versions/2/infer", 404),
        ("POST", "/v2/models/same/infer/", 404),
        ("POST", "/v2/models/same/versions/1/infer/", 404),
        ("GET", "/v2/health/live/", 404),
        ("GET", "/v2/models/same/versions/one/config", 404),
        ("GET", "/v2/models/nothing/ready", 404),
        ("GET", "/v2/models/nothing/stats", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/else", 404),
        ("GET", "/v2/models/same/versions", 404),
        ("POST", "/v2/models//infer", 404),
        ("GET", "/v2/models/same/infer", 405),
        ("POST", "/v2/health/live", 405),
        ("GET", "/v2/repository/index", 405),
        ("DELETE", "/v2", 405),
        ("POST", "/v2/repository/models/same/load", 403),
        ("POST", "/v2/repository/models/same/unload", 403),
    ],
)
def test_wrong_paths_and_methods(server: Server, method: str, path: str, status: int) -> None:
    """What is not there is 404, a wrong method 405, and loading models is off."""
    response = server.client.request(method, path)
    assert (response.status_code, set(response.json())) == (status, {"error"})
    assert ("allow" in response.headers) == (status == 405)


def test_a_failing_operator_says_no_secrets(server: Server) -> None:
    """An exception inside a flow is 500 with the stage, and not the exception's own words."""
    response = server.client.post("/v2/models/fail/infer", content=b"x", headers=RAW)
    assert response.status_code == 500
    assert response.json() == {"error": "stage `ops.fail` failed"}


def test_bytes_that_are_no_text_ask_for_binary(server: Server) -> None:
    """JSON cannot carry a picture back; the error says how to ask for it."""
    sent = _tensor(shape=[1], datatype="BYTES", parameters={"binary_data_size": 5})
    del sent["data"]
    head = json.dumps({"inputs": [sent]}).encode()
    response = server.client.post(
        "/v2/models/echo/infer",
        content=head + b"\1\0\0\0\xff",
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert response.status_code == 400
    assert "`binary_data`" in response.json()["error"]


@pytest.mark.parametrize("by", ["parameter", "header"])
def test_a_deadline_is_kept(server: Server, by: str) -> None:
    """The parameter `timeout` (microseconds) and the header both give 504 in time."""
    body = {"inputs": [_tensor()]} | ({"parameters": {"timeout": 50_000}} if by != "header" else {})
    headers = {"X-Deadline-Ms": "50"} if by == "header" else {}
    start_s = time.monotonic()
    response = server.client.post("/v2/models/held/infer", json=body, headers=headers)
    assert response.status_code == 504
    assert 0.05 <= time.monotonic() - start_s < 5
    server.wait_inside(0)


def test_a_timeout_of_centuries_is_one(server: Server) -> None:
    """The most that a client can say is granted, and those behind it keep their deadlines."""
    body = {"inputs": [_tensor()], "parameters": {"timeout": 2**64 - 1}}
    assert server.client.post("/v2/models/same/infer", json=body).status_code == 200
    test_a_deadline_is_kept(server, "header")


def test_a_full_queue_and_too_many_items(server: Server) -> None:
    """More items than a flow may hold are 400; where others fill it, 429 with Retry-After."""
    limit = server.client.get("/v2/models/narrow/config").json()["max_batch_size"]

    def post(count: int) -> httpx.Response:
        tensor = _tensor(shape=[count], datatype="BYTES", data=["x"] * count)
        return server.client.post("/v2/models/narrow/infer", json={"inputs": [tensor]})

    over = post(limit + 1)
    assert over.status_code == 400
    assert f"a request has 1 to {limit}" in over.json()["error"]
    with ThreadPoolExecutor(2) as pool:
        answers = [*pool.map(post, [limit, limit])]
    assert sorted(a.status_code for a in answers) == [200, 429]
    full = next(a for a in answers if a.status_code == 429)
    assert full.headers["retry-after"] == "1"


def test_who_hangs_up_is_left_out_of_the_batch(server: Server) -> None:
    """A batch of 64 waits for its last item: one whose client is gone is not counted."""
    body = json.dumps({"inputs": [_tensor()]}).encode()
    with server.connect() as connection:
        connection.post("/v2/models/held/infer", body)
        server.wait_inside(1)
    server.wait_inside(0)
    many = _tensor(shape=[63, 3], data=[0] * 189)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_ask, server, "held", inputs=[many])
        server.wait_inside(1)
        time.sleep(0.3)
        assert not first.done()
        assert _ask(server, "held").status_code == 200
        assert first.result(PATIENCE_S).status_code == 200


def test_loading_and_draining(folder: Path) -> None:
    """Before the flows are loaded and once the server stops, it is live, not ready, and says so."""
    service = Service()

    def get(path: str, **body: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(service)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request("POST" if body else "GET", path, **body)

        return asyncio.run(ask())

    def states() -> list[int]:
        paths = ("health/live", "health/ready", "models/double/ready", "models/double")
        found = [get(f"/v2/{path}").status_code for path in paths]
        return [*found, get("/v2/models/double/infer", json={}).status_code]

    assert states() == [200, 503, 503, 503, 503]
    with flowlang.load(folder / "types.flow") as app:
        service.let_in(app)
        assert states() == [200, 200, 200, 200, 400]
        service.refuse()
        assert states() == [200, 503, 503, 200, 503]


@pytest.mark.skipif(shutil.which("perf_analyzer") is None, reason="perf_analyzer is not installed")
@pytest.mark.parametrize("options", [[], ["--async", "-b", "4"]])
def test_perf_analyzer_measures(server: Server, options: list[str]) -> None:
    """Triton's load generator runs against the server as it comes."""
    command = ["perf_analyzer", "-m", "same", "-u", f"127.0.0.1:{server.port}", "-i", "http"]
    window = ["--measurement-interval", "500", "-r", "3", "-s", "99", *options]
    done = subprocess.run([*command, *window], capture_output=True, text=True, timeout=60)
    assert "Successful request count" in done.stdout, done.stdout + done.stderr


# Tensors


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any tensor of any datatype."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    count = int(np.prod(shape, dtype=int))
    datatype = draw(st.sampled_from([*NUMPY, BYTES]))
    if datatype == BYTES:
        return Tensor(
            "x", BYTES, shape, draw(st.lists(st.binary(), min_size=count, max_size=count))
        )
    size = np.dtype(NUMPY[datatype]).itemsize
    raw = draw(st.binary(min_size=size * count, max_size=size * count))
    if datatype == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    return Tensor("x", datatype, shape, np.frombuffer(raw, NUMPY[datatype]))


@given(tensors())
def test_tensors_survive_as_bytes(tensor: Tensor) -> None:
    """What is written as bytes is read as the same values, NaN and -0 included."""
    raw = to_raw(tensor)
    read = from_raw("x", tensor.datatype, tensor.shape, memoryview(raw))
    assert to_raw(Tensor("x", tensor.datatype, tensor.shape, read)) == raw


@given(tensors())
def test_tensors_survive_as_json(tensor: Tensor) -> None:
    """What is written as JSON is read as the same values, where JSON can hold them."""
    values = tensor.values
    if not isinstance(values, list) and not np.isfinite(values).all():
        return
    try:
        data = json.loads(to_json(to_list(tensor)))
    except BadRequest:
        assert tensor.datatype == BYTES
        return
    read = from_list("x", tensor.datatype, tensor.shape, data)
    assert to_raw(Tensor("x", tensor.datatype, tensor.shape, read)) == to_raw(tensor)


@given(st.sampled_from([*NUMPY, BYTES]), st.lists(st.integers(0, 2**40), max_size=4), st.binary())
def test_bytes_of_no_tensor_are_refused(datatype: str, shape: list[int], raw: bytes) -> None:
    """Any bytes are a tensor of that shape, or refused; whatever is claimed, nothing breaks."""
    try:
        values = from_raw("x", datatype, tuple(shape), raw)
    except BadRequest:
        return
    assert len(to_raw(Tensor("x", datatype, tuple(shape), values))) == len(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["input", "other"]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
        "datatype": st.sampled_from([*NUMPY, BYTES]) | JSON,
        "data": st.lists(st.integers(0, 300) | st.booleans(), max_size=4) | JSON,
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data_size": st.integers(-1, 20) | JSON}
        )
        | JSON,
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text() | JSON,
        "inputs": st.lists(FIELDS | JSON, max_size=2) | JSON,
        "outputs": st.lists(st.fixed_dictionaries({"name": JSON}) | JSON, max_size=2) | JSON,
        "parameters": st.dictionaries(st.sampled_from(["timeout", "k", "priority"]), JSON) | JSON,
    },
)


@pytest.fixture(scope="module")
def inference(folder: Path) -> Iterator[Inference]:
    """The models of `types.flow`, in this process."""
    with flowlang.load(folder / "types.flow") as app:
        inference = Inference()
        inference.let_in(app)
        yield inference


@settings(max_examples=150, deadline=None)
@given(
    model=st.sampled_from(["double", "half", "negate", "shout", "total", "reversed", "joined"]),
    request=REQUESTS | JSON,
    behind=st.binary(max_size=20),
)
@example(
    model="double", request={"inputs": [_tensor(shape=[1], datatype="INT64", data=[5])]}, behind=b""
)
def test_no_request_is_the_servers_fault(
    inference: Inference, model: str, request: Any, behind: bytes
) -> None:
    """Whatever JSON and bytes come, the answer is a result or the sender's mistake."""
    head = json.dumps(request).encode()
    routes = InferenceRoutes(inference, 1 << 20)
    headers = {b"inference-header-content-length": b"%d" % len(head)}
    call = routes.infer(f"/v2/models/{model}/infer", headers, head + behind, b"1")
    answer, _ = asyncio.run(call)
    assert answer.status in (200, 400), answer.body


def test_unknown_models_are_told_as_errors(inference: Inference) -> None:
    """The core raises what every face can map to a status."""
    with pytest.raises(RequestError) as caught:
        inference.model("nothing")
    assert caught.value.http_status == 404
