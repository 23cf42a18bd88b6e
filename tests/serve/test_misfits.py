"""What a client sends that a flow cannot work on is 400, and tells what is wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import flowlang
from tests.serve.asking import error_of
from tests.serve.server import Server, check_errors, serving, write

PYTHON = """
from typing import Annotated
import numpy as np

def area(place: Annotated[list, "box"]) -> float:
    return (place[2] - place[0]) * (place[3] - place[1])

def corner(place: Annotated[list, "quad"]) -> float:
    return place[0][0]

def letters(text: str) -> Annotated[np.ndarray, "tensor<i64, ?>"]:
    return np.arange(len(text.encode()))

def nothing(image: Annotated[np.ndarray, "image<rgb>"]) -> Annotated[np.ndarray, "image<rgb>"]:
    return image[:0]
"""
FLOWS = """
use "p.py" as p
type tokens = { ids: tensor<i64, ?>, mask: tensor<i64, ?> }
export flow tied = trt("tied.onnx")
export flow renamed: { a: { b: tensor<i64, ?> }, c: tensor<i64, ?> } -> tensor<i64, ?> =
  { ids: .a -> .b, mask: .c } -> trt("tied.onnx")
export flow beside(mask: tensor<i64, ?>): tensor<i64, ?> -> tensor<i64, ?> =
  { ids: pass, mask } -> trt("tied.onnx")
export flow sized: { ids: tensor<i64, 4>, mask: tensor<i64, ?> } -> tensor<i64, ?> =
  trt("tied.onnx")
export flow made: { a: str, b: str } -> tensor<i64, ?> =
  { ids: .a -> p.letters, mask: .b -> p.letters } -> trt("tied.onnx")
export flow each: list<tokens> -> list<tensor<i64, ?>> = map(trt("tied.onnx"), max=3)
export flow some: list<tokens> -> list<tensor<i64, ?>?> =
  map(trt("tied.onnx", batch=1..4), on_error=null)
export flow square = trt("square.onnx")
export flow masked: { image: image<rgb>, mask: image<gray> } -> tensor<f32, 3x?x?> =
  { image: .image -> flip -> normalize(unit), mask: .mask -> normalize(unit) } -> trt("masked.onnx")
export flow loose: tensor<f32> -> tensor<f32, 3> = trt("three.onnx")
export flow words = trt("words.onnx")
export flow first = trt("any.onnx") -> best
export flow place = trt("any.onnx") -> argmax
export flow shares = trt("any.onnx") -> softmax
export flow small: image<rgb> -> image<rgb> = resize(8)
export flow emptied: image<rgb> -> image<rgb> = p.nothing
export flow area = p.area
export flow corner = p.corner
export flow areas: list<box> -> list<float> = map(p.area)
export flow few: { a: list<int>, b: list<int> } -> list<int> = .a -> map(pass, max=3)
export flow most(count: int): list<float> -> list<float> = top(count, by=pass)
"""
F32, I64 = TensorProto.FLOAT, TensorProto.INT64
ONES, TWO, THREE = [1, 1, 1], [1, 1], [1, 2, 3]
QUAD = [[0, 0], [4, 0], [4, 4], [0, 4]]


def write_model(
    path: Path, op: str, inputs: dict[str, Sequence[Any]], output: Sequence[Any], kind: int = F32
) -> None:
    """A model of one operator, with a table of five words before its inputs where it gathers."""
    ports = [helper.make_tensor_value_info(n, kind, shape) for n, shape in inputs.items()]
    table = numpy_helper.from_array(np.ones((5, 3), np.float32), "table")
    is_lookup = op == "Gather"
    names = [*(["table"] if is_lookup else []), *inputs]
    result = helper.make_tensor_value_info("y", F32 if is_lookup else kind, output)
    node = helper.make_node(op, names if len(names) > 1 or op != "MatMul" else names * 2, ["y"])
    graph = helper.make_graph([node], op, ports, [result], [table] if is_lookup else [])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save_model(helper.make_model(graph, ir_version=8, opset_imports=opsets), path)


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("misfits")
    row = ["N", "seq"]
    write_model(folder / "tied.onnx", "Add", {"ids": row, "mask": row}, row, I64)
    write_model(folder / "square.onnx", "MatMul", {"x": ["N", "side", "side"]}, ["N", None, None])
    image, mask = ["N", 3, "h", "w"], ["N", 1, "h", "w"]
    write_model(folder / "masked.onnx", "Add", {"image": image, "mask": mask}, image)
    write_model(folder / "three.onnx", "Identity", {"x": ["N", 3]}, ["N", 3])
    write_model(folder / "any.onnx", "Identity", {"x": ["N", None]}, ["N", None])
    write_model(folder / "words.onnx", "Gather", {"x": row}, ["N", "seq", 3], I64)
    write(folder / "p.py", PYTHON)
    return write(folder / "misfits.flow", FLOWS)


@pytest.fixture(scope="module")
def misfits(flows: Path) -> Iterator[Server]:
    with serving(flows.parent, str(flows)) as server:
        yield server.wait_ready()
        check_errors(server)


def pixels(height: int, width: int, *channels: int) -> Any:
    return np.ones((height, width, *channels), int).tolist()


@pytest.mark.parametrize(
    ("flow", "item", "words"),
    [
        (
            "tied",
            {"ids": THREE, "mask": TWO},
            "`seq` of one length, not 3 in `ids` and 2 in `mask`",
        ),
        # Of length one it would be stretched, to an answer that nobody meant.
        (
            "tied",
            {"ids": THREE, "mask": [1]},
            "`seq` of one length, not 3 in `ids` and 1 in `mask`",
        ),
        ("renamed", {"a": {"b": THREE}, "c": TWO}, "not 3 in `a.b` and 2 in `c`"),
        ("beside?mask=[1,1]", THREE, "`seq` of one length, not 3 in the item and 2 in `mask`"),
        ("sized", {"ids": [1, 2, 3, 4], "mask": TWO}, "not 4 in `ids` and 2 in `mask`"),
        ("made", {"a": "abc", "b": "ab"}, "`tied.onnx` takes `seq` of one length, not 3 in `ids`"),
        ("each", [{"ids": TWO, "mask": TWO}, {"ids": THREE, "mask": TWO}], "`tied.onnx` takes"),
        ("square", pixels(2, 3), "`side` of one length, not 2 in axis 0 of the item and 3 in axis"),
        (
            "masked",
            {"image": pixels(3, 4, 3), "mask": pixels(3, 5)},
            "`w` of one length, not 4 in axis 1 of `image` and 5 in axis 1 of `mask`",
        ),
        ("loose", [1, 2], "`three.onnx` takes `x` as tensor<f32, 3>, not an array of shape (2,)"),
        ("loose", 1, "`three.onnx` takes `x` as tensor<f32, 3>, not an array of shape ()"),
        ("first", [], "there is no greatest value in an array of shape (0,)"),
        ("place", [], "there is no greatest value in an array of shape (0,)"),
        ("square", None, "this flow takes tensor<f32, ?x?>, not null"),
        ("area", [1, 2, 3], "this flow takes box (left, top, right and bottom), not [1, 2, 3]"),
        ("area", ["1", "2", "3", "4"], "this flow takes box (left"),
        ("area", [True, 2, 3, 4], "this flow takes box (left"),
        ("area", None, "this flow takes box (left, top, right and bottom), not null"),
        ("area", [0, 0, float("nan"), 1], "this flow takes box (left"),
        ("area", [0, 0, 10**400, 1], "this flow takes box (left"),
        ("area", [[0, 0], [1]], "this flow takes box (left"),
        ("areas", [[1, 2, 3, 4], "x"], "element 1: this flow takes box (left"),
        ("corner", [1, 2, 3, 4], "this flow takes quad (four points), not [1, 2, 3, 4]"),
        ("each", [{"ids": TWO, "mask": TWO}] * 4, "a list of 4 elements, and `max` is 3"),
        ("few", {"a": [1] * 4, "b": []}, "`a` is a list of 4 elements, and `max` is 3"),
        ("most?count=0", [1, 2], "`k` must be a whole number from 1 to 100000, and `count` is 0"),
        ("made", {"a": "\ud800", "b": "a"}, "a string in it is no text (a lone surrogate)"),
    ],
)
def test_a_client_is_told_what_is_wanted(misfits: Server, flow: str, item: Any, words: str) -> None:
    """With the field or the input that it is about, and not that a stage failed."""
    reply = misfits.client.post(f"/flows/{flow}", content=json.dumps(item))
    assert (reply.status_code, error_of(reply)["code"]) == (400, "bad-request")
    assert words in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("flow", "item", "answer"),
    [
        ("tied", {"ids": THREE, "mask": ONES}, [2, 3, 4]),
        ("tied", {"ids": [], "mask": []}, []),
        ("beside?mask=[1,1,1]", THREE, [2, 3, 4]),
        ("made", {"a": "\U0001f600", "b": "abcd"}, [0, 2, 4, 6]),
        ("square", pixels(2, 2), [[2, 2], [2, 2]]),
        ("loose", THREE, THREE),
        ("shares", [], []),
        ("area", [-1, 0, 1.5, 2], 5),
        ("corner", QUAD, 0),
        ("each", [{"ids": TWO, "mask": TWO}] * 3, [[2, 2]] * 3),
    ],
)
def test_what_fits_is_answered(misfits: Server, flow: str, item: Any, answer: Any) -> None:
    """Also what is empty, or of a length that only the request decides."""
    reply = misfits.client.post(f"/flows/{flow}", content=json.dumps(item))
    assert (reply.status_code, reply.json()) == (200, answer)


@pytest.mark.parametrize("shape", [[1, 0, 5, 3], [1, 5, 0, 3]])
def test_an_image_without_pixels_is_refused(misfits: Server, shape: list[int]) -> None:
    """JSON below /flows cannot say it, and a tensor can."""
    tensor = {"name": "input", "datatype": "UINT8", "shape": shape, "data": []}
    reply = misfits.client.post("/v2/models/small/infer", json={"inputs": [tensor]})
    assert reply.status_code == 400
    assert f"one of shape {tuple(shape[1:])} has no pixels" in reply.json()["error"]


def test_what_only_the_model_knows_is_told_by_its_name(misfits: Server) -> None:
    """No number says how many words there are."""
    reply = misfits.client.post("/flows/words", json=[1, 7])
    assert (reply.status_code, error_of(reply)["code"]) == (500, "stage-failed")
    assert error_of(reply)["message"] == "stage `words.onnx` failed"


def test_what_does_not_fit_takes_nobody_with_it(flows: Path) -> None:
    """An element that a model cannot take leaves its batch before the model runs."""
    good, bad = {"ids": TWO, "mask": TWO}, {"ids": THREE, "mask": TWO}
    with flowlang.load(flows, device="cpu") as app:
        assert [None if a is None else a.tolist() for a in app["some"]([good, bad, good, bad])] == [
            [2, 2],
            None,
            [2, 2],
            None,
        ]
        (first, refused, last) = app["tied"].map([good, bad, good], errors="return")
        assert first.tolist() == last.tolist() == [2, 2]
        assert isinstance(refused, flowlang.BadRequest)


def test_an_operator_in_python_gives_no_image_without_pixels(flows: Path) -> None:
    """It is told at the operator, and not by the one behind it."""
    with (
        flowlang.load(flows, device="cpu") as app,
        pytest.raises(flowlang.StageFailed, match="an array of shape 0x4x3 is no image"),
    ):
        app["emptied"](np.ones((4, 4, 3), np.uint8))
