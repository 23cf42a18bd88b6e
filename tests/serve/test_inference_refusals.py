"""The Open Inference Protocol over HTTP: what no client would send is refused with the reason."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from flowlang.serve.tensor import BYTES
from tests.pictures import bad
from tests.serve.asking import PICTURES, RAW, as_input, infer, one_row
from tests.serve.processes import peak_bytes
from tests.serve.server import Server


@pytest.mark.parametrize("number", [2**62, -(2**62) - 1, 2**63 - 1])
def test_a_number_that_no_tensor_holds_is_told(
    server: Server, client: triton.InferenceServerClient, number: int
) -> None:
    """What a flow gives beyond INT64 is refused by name; over the plain face it is as it is."""
    with pytest.raises(InferenceServerException) as caught:
        client.infer("double", [as_input("input", [1, number], "INT64")])
    assert caught.value.status() == "400"
    assert caught.value.message().startswith("`output`: a number that INT64 cannot hold")
    assert server.client.post("/flows/double", json=number).json() == 2 * number


def test_one_corrupt_picture_is_named(client: triton.InferenceServerClient) -> None:
    """The item that cannot be answered is told by its number, and with the flow's own words."""
    corrupt = bad()["text"]
    pictures = as_input("input", [PICTURES[0], corrupt.data, PICTURES[1]], BYTES)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("classify", [pictures])
    assert caught.value.status() == "400"
    assert caught.value.message().startswith("item 1: ")
    assert corrupt.word in caught.value.message()


def _wanted(**parameters: Any) -> list[dict[str, Any]]:
    """The one output, asked for with these parameters."""
    return [{"name": "output", "parameters": parameters}]


HOSTILE: list[tuple[str, Any, str]] = [
    ("same", [], "the request: a JSON object"),
    ("same", {}, "inputs: a list"),
    ("same", {"inputs": {}}, "inputs: a list"),
    ("same", {"inputs": []}, "inputs: `input` is missing; this model takes `input`"),
    ("same", {"inputs": [7]}, "inputs[0]: a JSON object"),
    ("same", {"inputs": [one_row(name=None)]}, "inputs[0].name"),
    ("same", {"inputs": [one_row(name="x")]}, "inputs[0]: no input is named `x`"),
    ("same", {"inputs": [one_row(), one_row()]}, "inputs[1]: `input` is given twice"),
    ("same", {"inputs": [one_row(datatype="FP33")]}, "inputs[0].datatype: `FP33` is none of"),
    ("same", {"inputs": [one_row(datatype=["FP32"])]}, "inputs[0].datatype"),
    ("same", {"inputs": [one_row(datatype="FP64")]}, "`input` is FP32, not FP64"),
    ("same", {"inputs": [one_row(shape=[3])]}, "inputs[0].shape: `input` is of shape [-1, 3]"),
    ("same", {"inputs": [one_row(shape=[2, 3])]}, "holds 6 values, and there are 3"),
    ("same", {"inputs": [one_row(shape=[1, 4])]}, "`input` is of shape [-1, 3]"),
    ("same", {"inputs": [one_row(shape=[-1, -3])]}, "inputs[0].shape: its numbers"),
    ("same", {"inputs": [one_row(shape="13")]}, "inputs[0].shape: a list"),
    ("same", {"inputs": [one_row(shape=[1.0, 3])]}, "inputs[0].shape: its numbers"),
    ("same", {"inputs": [one_row(shape=[True, 3])]}, "inputs[0].shape: its numbers"),
    ("same", {"inputs": [one_row(shape=[10**18, 3])]}, "1,000,000,000,000,000,000 items, and a"),
    ("same", {"inputs": [one_row(shape=[1, 10**4000])]}, "or above 9223372036854775807"),
    ("same", {"inputs": [one_row(shape=[1, 0, 2**62])]}, "too large for what holds no values"),
    ("same", {"inputs": [one_row(shape=[1] * 1000)]}, "inputs[0].shape: a list of at most 32"),
    ("same", {"inputs": [one_row(shape=[0, 3], data=[])]}, "0 items, and a request has 1 to"),
    ("same", {"inputs": [one_row(data=None)]}, "inputs[0].data: a list"),
    ("same", {"inputs": [one_row(data=["1", "2", "3"])]}, "not all of it is FP32"),
    ("same", {"inputs": [one_row(data=[[1, [2], 3]])]}, "not all of it is FP32"),
    ("same", {"inputs": [one_row(data=[[1], [2], [3]])]}, "a list of 3 at depth 1 is not of shape"),
    (
        "same",
        {"inputs": [one_row(shape=[2, 3], data=[[1, 2, 3, 4], [5, 6]])]},
        "a list of 2 at depth 2 is not of shape [2, 3]",
    ),
    ("same", {"inputs": [one_row(data=[[[1], [2], [3]]])]}, "at depth 3 is not of shape"),
    ("same", {"inputs": [one_row(data=[1, 2, True])]}, "not all of it is FP32"),
    ("same", {"inputs": [one_row(data=[1, 2, 10**400])]}, "in the range of FP32"),
    ("same", {"inputs": [one_row(data=[1, 2, 1e300])]}, "in the range of FP32"),
    ("same", {"inputs": [one_row(data=[1, 2, None])]}, "not all of it is FP32"),
    ("same", {"inputs": [one_row(parameters=[])]}, "inputs[0].parameters: a JSON object"),
    ("same", {"inputs": [one_row(parameters={"shared_memory_region": "r"})]}, "no shared memory"),
    ("same", {"inputs": [one_row(parameters={"binary_data_size": 12})]}, "both `data` and"),
    ("same", {"inputs": [one_row()], "outputs": [{"name": "x"}]}, "outputs[0]: no output is named"),
    ("same", {"inputs": [one_row()], "outputs": [{}]}, "outputs[0].name"),
    ("same", {"inputs": [one_row()], "outputs": {}}, "outputs: a list"),
    (
        "same",
        {"inputs": [one_row()], "outputs": _wanted(shared_memory_region="r")},
        "outputs[0].parameters: there is no shared memory",
    ),
    *(
        (
            "same",
            {"inputs": [one_row()], "outputs": _wanted(classification=count)},
            "outputs[0].parameters.classification: a whole number of classes",
        )
        for count in (-1, 2.0, "2", True)
    ),
    (
        "negate",
        {
            "inputs": [one_row(shape=[1], datatype="BOOL", data=[True])],
            "outputs": _wanted(classification=1),
        },
        "`output` is BOOL: only numbers are told as classes",
    ),
    (
        "shout",
        {
            "inputs": [one_row(shape=[1], datatype="BYTES", data=["a"])],
            "outputs": _wanted(classification=1),
        },
        "`output` is BYTES: only numbers are told as classes",
    ),
    (
        "same",
        {"inputs": [one_row()], "parameters": {"binary_data_output": "yes"}},
        "parameters.binary_data_output: true or false",
    ),
    ("same", {"inputs": [one_row()], "parameters": {"timeout": -1}}, "parameters.timeout"),
    ("same", {"inputs": [one_row()], "parameters": {"timeout": 2**64}}, "parameters.timeout"),
    ("same", {"inputs": [one_row()], "parameters": {"timeout": 10**400}}, "parameters.timeout"),
    ("same", {"inputs": [one_row()], "parameters": {"size": 3}}, "no parameter `size`"),
    ("same", {"inputs": [one_row()], "parameters": 3}, "parameters: a JSON object"),
    ("same", {"inputs": [one_row()], "id": 7}, "id: a string"),
    ("double", {"inputs": [one_row(shape=[1], datatype="INT64", data=[1.5])]}, "is INT64"),
    (
        "double",
        {"inputs": [one_row(shape=[1], datatype="INT64", data=[2**64])]},
        "the range of INT64",
    ),
    (
        "reversed",
        {"inputs": [one_row(shape=[1, 1, 2], datatype="UINT8", data=[1, 256])]},
        "of UINT8",
    ),
    ("half", {"inputs": [one_row(shape=[1], datatype="FP32", data=[1])]}, "is FP64, not FP32"),
    ("shout", {"inputs": [one_row(shape=[1], datatype="BYTES", data=[1])]}, "are strings"),
    (
        "shout",
        {"inputs": [one_row(shape=[2, 1], datatype="BYTES", data=[["a"], "b"])]},
        "as deep",
    ),
    ("shout", {"inputs": [one_row(shape=[1], datatype="BYTES", data=["\ud800"])]}, "surrogate"),
    ("total", {"inputs": [one_row(shape=[1], datatype="BYTES", data=["[1,"])]}, "element 0"),
    ("pair", {"inputs": [one_row(name="features", shape=[1, 8], data=[0] * 8)]}, "`image` is"),
    (
        "joined",
        {
            "inputs": [
                one_row(shape=[1], datatype="BYTES", data=["a"]),
                one_row(name="other", shape=[2], datatype="BYTES", data=["a", "b"]),
            ]
        },
        "inputs[1].shape: it has not 1 items, as inputs[0] has",
    ),
    (
        "zeros",
        {"inputs": [one_row(shape=[2], datatype="INT64", data=[1, 2])]},
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


def test_an_answer_has_so_many_classes(server: Server) -> None:
    """Those that were asked for are counted before the flow is, if an item can have as many."""

    def ask(model: str, count: int, **fields: Any) -> httpx.Response:
        tensor = one_row(**fields)
        return infer(server, model, inputs=[tensor], outputs=_wanted(classification=count))

    rows = {"shape": [2], "datatype": "INT64", "data": [1, 1]}  # of no known size each
    assert ask("zeros", 1 << 17, **rows).json()["outputs"][0]["shape"] == [2, 2]
    refused = ask("zeros", (1 << 17) + 1, **rows)
    assert refused.status_code == 413
    assert refused.json() == {"error": "an answer has at most 262,144 classes"}
    assert ask("same", 2**64 - 1).json()["outputs"][0]["shape"] == [1, 3]
    assert ask("same", 2**64).status_code == 400


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        (lambda c: c.load_model("same"), "403", "not loaded or unloaded over the network"),
        (lambda c: c.unload_model("same"), "403", "not loaded or unloaded over the network"),
        (lambda c: c.get_system_shared_memory_status(), "404", "no shared memory"),
        (lambda c: c.register_system_shared_memory("r", "/r", 9), "404", "no shared memory"),
        (lambda c: c.unregister_cuda_shared_memory("r"), "404", "no shared memory"),
        (lambda c: c.get_trace_settings(), "404", "set where the server is started"),
        (lambda c: c.update_trace_settings("same", {}), "404", "set where the server is started"),
        (lambda c: c.get_log_settings(), "404", "set where the server is started"),
        (lambda c: c.update_log_settings({}), "404", "set where the server is started"),
    ],
)
def test_what_is_not_offered_says_so(
    client: triton.InferenceServerClient,
    call: Callable[[triton.InferenceServerClient], object],
    status: str,
    said: str,
) -> None:
    """Whatever else Triton's client can call is refused with what there is instead."""
    with pytest.raises(InferenceServerException) as caught:
        call(client)
    assert caught.value.status() == status
    assert said in caught.value.message()


PAIRS = {"datatype": "UINT8"}
TEXTS = {"datatype": BYTES}


def _binary(size: Any, raw: bytes, **fields: Any) -> tuple[bytes, bytes]:
    """JSON with one binary tensor, and the bytes behind it."""
    tensor = one_row(parameters={"binary_data_size": size}) | fields
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
    tensor = one_row(shape=[2_000_000, 0, 2], datatype="UINT8", data=[])
    response = infer(server, "reversed", inputs=[tensor])
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
    sent = one_row(shape=[1], datatype="BYTES", parameters={"binary_data_size": 5})
    del sent["data"]
    head = json.dumps({"inputs": [sent]}).encode()
    response = server.client.post(
        "/v2/models/echo/infer",
        content=head + b"\1\0\0\0\xff",
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert response.status_code == 400
    assert "`binary_data`" in response.json()["error"]
