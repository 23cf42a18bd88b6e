"""What tests ask a server, by the Open Inference Protocol or plainly, its errors and its counts."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families

from flowlang.serve.tensor import BYTES, NUMPY
from tests.pictures import photographs
from tests.serve.server import Server

PICTURES = photographs(3)
RAW = {"Inference-Header-Content-Length": "0"}
NUMBERS = [1.0, 2.0, 3.0]
ROW = [NUMBERS]
ROW_BYTES = np.array(ROW, np.float32).tobytes()


def as_input(name: str, values: Any, datatype: str, *, is_binary: bool = True) -> triton.InferInput:
    """A tensor as Triton's client sends it."""
    array = np.asarray(values, object if datatype == BYTES else NUMPY[datatype])
    found = triton.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, binary_data=is_binary)
    return found


def bytes_by_grpc(data: bytes) -> list[tritonclient.grpc.InferInput]:
    """One item of bytes as Triton's client sends it by gRPC."""
    found = tritonclient.grpc.InferInput("input", [1], BYTES)
    found.set_data_from_numpy(np.array([data], object))
    return [found]


def one_row(**fields: Any) -> dict[str, Any]:
    """A tensor of one row as JSON has it, but for the fields that are given."""
    return {"name": "input", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]} | fields


def infer(server: Server, model: str, **fields: Any) -> httpx.Response:
    """The answer to a request of one row, but for the fields that are given."""
    body = {"inputs": [one_row(data=ROW)]}
    return server.client.post(f"/v2/models/{model}/infer", json=body | fields)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error that an answer is, with all that every error has."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"code", "message", "stage", "flow", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def ask_application(application: Any, method: str, path: str, **body: Any) -> httpx.Response:
    """What an ASGI application answers in this process, without a server."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **body)

    return asyncio.run(ask())


def counted(server: Server, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    text = server.client.get("/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
