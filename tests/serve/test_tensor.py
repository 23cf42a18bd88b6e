"""Tensors of the Open Inference Protocol, and the messages around them, whatever is in them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flowlang
from flowlang.diagnostics import BadRequest, RequestError
from flowlang.serve.answer import to_json
from flowlang.serve.inference import Inference
from flowlang.serve.tensor import BYTES, NUMPY, Tensor, from_list, from_raw, to_list, to_raw
from flowlang.serve.v2 import InferenceRoutes
from tests.serve.asking import one_row


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


@given(tensors(), st.integers(-5, 5))
def test_bytes_of_another_length_are_refused(tensor: Tensor, more: int) -> None:
    """A tensor with bytes behind it, or without its last ones, is none."""
    raw = to_raw(tensor)
    changed = raw + bytes(more) if more >= 0 else raw[:more]
    if len(changed) != len(raw):
        with pytest.raises(BadRequest):
            from_raw("x", tensor.datatype, tensor.shape, changed)


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


@settings(max_examples=150)
@given(
    model=st.sampled_from(["double", "half", "negate", "shout", "total", "reversed", "joined"]),
    request=REQUESTS | JSON,
    behind=st.binary(max_size=20),
)
@example(
    model="double", request={"inputs": [one_row(shape=[1], datatype="INT64", data=[5])]}, behind=b""
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
