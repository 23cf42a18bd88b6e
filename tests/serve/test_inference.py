"""The Open Inference Protocol over HTTP: Triton's own client is answered as it asks."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

import flowlang
from flowlang.serve.tensor import BYTES, NUMPY
from tests.serve.asking import PICTURES, RAW, ROW_BYTES, as_input, infer, one_row
from tests.serve.server import Server

NAN = float("nan")


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
            *("binary_tensor_data", "classification", "model_configuration", "parameters"),
            *("schedule_policy", "statistics"),
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


@pytest.mark.parametrize("is_binary", [True, False])
def test_several_pictures_in_one_request(
    client: triton.InferenceServerClient,
    folder: Path,
    is_binary: bool,
) -> None:
    """Each picture is an item; they are answered together, and as Python answers each of them."""
    wanted = [triton.InferRequestedOutput(n, is_binary) for n in ("embedding", "scores")]
    pictures = as_input("input", PICTURES, BYTES)
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
    answer = client.infer("classify", [as_input("input", column, BYTES)]).as_numpy("output")
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
    sent = as_input("input", values, datatype, is_binary=is_binary)
    wanted = [triton.InferRequestedOutput("output", is_binary)]
    answer = client.infer(model, [sent], outputs=wanted)
    np.testing.assert_array_equal(answer.as_numpy("output"), np.array(expected, NUMPY[datatype]))


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize(
    ("model", "datatype", "values", "count", "expected"),
    [
        ("same", "FP32", [[1, 5, 0.3], [-2, NAN, 1e-9]], 2, ["5.0:1 1.0:0", "1e-09:2 -2.0:0"]),
        ("same", "FP32", [[1, 5, 0.3]], 9, ["5.0:1 1.0:0 0.3:2"]),
        ("levels", "UINT8", [[0, 200, 5], [9, 7, 9]], 2, ["200:1 5:2", "9:0 9:2"]),
        ("reversed", "UINT8", [[[1, 4], [3, 2]]], 3, ["4:3 3:0 2:1"]),
        ("double", "INT64", [3, -4], 2, ["6:0", "-8:0"]),
    ],
)
def test_the_greatest_numbers_of_an_output(
    client: triton.InferenceServerClient,
    model: str,
    datatype: str,
    values: Any,
    count: int,
    expected: list[str],
    is_binary: bool,
) -> None:
    """Classes are asked for: of each item its greatest numbers, with their places in it."""
    wanted = [triton.InferRequestedOutput("output", is_binary, count)]
    answer = client.infer(model, [as_input("input", values, datatype)], outputs=wanted)
    found = answer.as_numpy("output").tolist()
    texts = [[t.decode() if is_binary else t for t in row] for row in found]
    assert texts == [row.split() for row in expected]


def test_classes_of_one_tensor_of_a_record(client: triton.InferenceServerClient) -> None:
    """The one that they are asked of is texts, and the other the tensor it is."""
    pictures = [as_input("input", PICTURES, BYTES)]
    plain = client.infer("two", pictures)
    outputs = [triton.InferRequestedOutput("scores", class_count=3)]
    outputs.append(triton.InferRequestedOutput("embedding"))
    answer = client.infer("two", pictures, outputs=outputs)
    np.testing.assert_array_equal(answer.as_numpy("embedding"), plain.as_numpy("embedding"))
    found = [[text.decode().split(":") for text in row] for row in answer.as_numpy("scores")]
    scores = plain.as_numpy("scores")
    places = np.argsort(-scores, axis=1)[:, :3]
    assert [[int(place) for _, place in row] for row in found] == places.tolist()
    values = np.array([[value for value, _ in row] for row in found], np.float32)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, places, 1))


def test_texts_bytes_and_json_as_items(client: triton.InferenceServerClient) -> None:
    """A BYTES tensor holds texts, or bytes, or JSON, as the flow takes them."""
    shout = client.infer("shout", [as_input("input", ["gr\xfc\xdfe".encode()], BYTES)])
    assert shout.as_numpy("output")[0].decode() == "GR\xdcSSE"
    parts = client.infer("parts", [as_input("input", [b'["aGk=", "aG8="]', b"[]"], BYTES)])
    assert parts.as_numpy("output").tolist() == [b"hi+ho", b""]
    for fields in ({"data": b"hi"}, {"data": b"hi", "hint": b"ho"}):
        given = [as_input(name, [value], BYTES) for name, value in fields.items()]
        expected = b"hi?" + fields.get("hint", b"none")
        assert client.infer("hinted", given).as_numpy("output").tolist() == [expected]
    total = client.infer("total", [as_input("input", [b"[1, 2.5]", b"[]"], BYTES)])
    assert total.as_numpy("output").tolist() == [3.5, 0.0]
    facts = client.infer("facts", [as_input("input", [b"abcdefgh", b"0" * 16], BYTES)])
    assert facts.as_numpy("size").tolist() == [8, 16]
    assert facts.as_numpy("start").tolist() == [b"abc", b"000"]
    assert facts.as_numpy("ratio").tolist() == [1.0, 2.0]
    assert facts.as_numpy("is_long").tolist() == [False, True]


def test_parameters_reach_the_flow(client: triton.InferenceServerClient) -> None:
    """A flow's parameters come with the request; those that are no plain values are tensors."""
    picture = as_input("input", [PICTURES[0]], BYTES)
    for given_k, count in ((None, 2), (1, 1), (5, 5)):
        parameters = {} if given_k is None else {"k": given_k}
        answer = client.infer("classes", [picture], parameters=parameters)
        assert len(json.loads(answer.as_numpy("output")[0])) == count
    inputs = [as_input("input", [b"a", b"b"], BYTES), as_input("other", [b"1", b"2"], BYTES)]
    assert client.infer("joined", inputs).as_numpy("output").tolist() == [b"a+1", b"b+2"]


def test_parameters_of_the_protocol_may_be_the_flows(server: Server) -> None:
    """A flow may name its parameters as ones of the protocol that have no effect here."""

    def told(**parameters: Any) -> str:
        tensor = one_row(shape=[1], datatype="BYTES", data=["x"])
        answer = infer(server, "told", inputs=[tensor], parameters=parameters).json()
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
    sent = as_input("input", [b"0" * 100_000], BYTES)
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
                    client.infer("double", [as_input("input", [i], "INT64")], request_id=str(i))
                    for i in range(40)
                )
            )
        return [(a.get_response()["id"], int(a.as_numpy("output")[0])) for a in answers]

    assert asyncio.run(ask()) == [(str(i), 2 * i) for i in range(40)]


def test_what_is_null_is_as_left_out(server: Server) -> None:
    """Clients that write every field they know are answered as those that write none."""
    nothing = {"id": None, "parameters": None, "outputs": None}
    tensor = one_row(parameters={"shared_memory_region": None})
    assert infer(server, "same", inputs=[tensor]).status_code == 200
    tensor = one_row(parameters=None)
    answer = infer(server, "same", inputs=[tensor], **nothing)
    assert answer.json() == infer(server, "same", inputs=[one_row()]).json()
    outputs: list[dict[str, Any]] = [{"name": "output", "parameters": None}]
    fields = {"classification": None, "shared_memory_region": None, "binary_data": None}
    outputs.append({"name": "output", "parameters": fields})
    flags = {"binary_data_output": None, "timeout": None, "priority": None}
    flags |= {"sequence_id": None, "size": None}
    asked = infer(server, "same", inputs=[tensor], outputs=outputs, parameters=flags)
    assert asked.json() == answer.json()
    body = json.dumps({"inputs": [_binary_of(None, [1, 2, 3])]})
    assert server.client.post("/v2/models/same/infer", content=body).json() == answer.json()


def _binary_of(size: Any, data: Any) -> dict[str, Any]:
    return one_row(data=data, parameters={"binary_data_size": size})


@pytest.mark.skipif(shutil.which("perf_analyzer") is None, reason="perf_analyzer is not installed")
@pytest.mark.parametrize("options", [[], ["--async", "-b", "4"]])
def test_perf_analyzer_measures(server: Server, options: list[str]) -> None:
    """Triton's load generator runs against the server as it comes."""
    command = ["perf_analyzer", "-m", "same", "-u", f"127.0.0.1:{server.port}", "-i", "http"]
    window = ["--measurement-interval", "500", "-r", "3", "-s", "99", *options]
    done = subprocess.run([*command, *window], capture_output=True, text=True, timeout=60)
    assert "Successful request count" in done.stdout, done.stdout + done.stderr
