"""Reading a model's header: what it says, what it costs, and what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import random
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from flowlang.plan.onnx import Model, NotAModel, Port, Tie, file_sha256, read_model
from flowlang.plan.types import Record, Tensor
from tests import standins
from tests.standins import DTYPES, MODELS, write_model

LARGE_BYTES = 50 << 20


def matmul(rows: int, columns: int, ir_version: int = 8) -> onnx.ModelProto:
    """A model with one weight; before IR version 4 it lists the weight among its inputs."""
    weight = numpy_helper.from_array(np.ones((rows, columns), np.float32), "weight")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows])]
    if ir_version < 4:
        inputs.insert(
            0, helper.make_tensor_value_info("weight", TensorProto.FLOAT, [rows, columns])
        )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "matmul",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", columns])],
        initializer=[weight],
    )
    return helper.make_model(graph, ir_version=ir_version)


SMALL = matmul(4, 2).SerializeToString()


def read_bytes(path: Path, data: bytes) -> Model:
    path.write_bytes(data)
    return read_model(path)


@pytest.mark.parametrize("name", MODELS)
def test_inputs_and_outputs_are_read_as_declared(name: str, tmp_path: Path) -> None:
    """Names, dtypes and shapes come out as written; dimensions with a name are of any length."""
    inputs, outputs = MODELS[name]
    model = read_model(write_model(tmp_path / name, inputs, outputs))

    def port(name: str, dtype: str, dims: Sequence[int | str | None] | None) -> Port:
        shape = None if dims is None else tuple(d if isinstance(d, int) else None for d in dims)
        symbols = tuple(d if isinstance(d, str) else None for d in dims or ())
        return Port(name, dtype, shape, symbols)

    assert model.inputs == tuple(port(*p) for p in inputs)
    assert model.outputs == tuple(port(*p) for p in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_language_is_read(dtype: str, tmp_path: Path) -> None:
    """Each dtype a tensor type can name is one a model can declare."""
    path = write_model(tmp_path / "m.onnx", [("x", dtype, ("N", 2))], [("y", "f32", ("N",))])
    assert read_model(path).inputs[0].item == Tensor(dtype, (2,))


def test_an_item_has_one_dimension_less_than_the_batch(tmp_path: Path) -> None:
    """Types describe one item; a model without known dimensions gives a tensor of any rank."""
    ports = [("a", "f32", ("N", 3, None)), ("b", "f32", ("N",)), ("c", "f32", None)]
    model = read_model(write_model(tmp_path / "m.onnx", [("x", "f32", ("N", 1))], ports))
    items = (Tensor("f32", (3, None)), Tensor("f32", ()), Tensor("f32", None))
    assert model.output == Record(tuple(zip("abc", items, strict=True)))


def test_dimensions_that_are_no_length_are_of_any(tmp_path: Path) -> None:
    """Some exporters write 0 or -1 for a dimension that is free."""
    path = write_model(tmp_path / "m.onnx", [("x", "f32", (-1, 3, 0))], [("y", "f32", (0, 5))])
    model = read_model(path)
    assert model.inputs[0].shape == (None, 3, None)
    assert model.fixed_batch is None


def test_dimensions_of_one_name_are_tied(tmp_path: Path) -> None:
    """Those of an item, of one input or of several; not what exporters write for no name."""
    inputs: list[standins.Port] = [
        ("a", "f32", ("N", "seq", "N")),
        ("b", "f32", ("N", 3, "seq", "side", "side")),
        ("c", "f32", ("N", "alone", "None", "?")),
        ("d", "f32", ("N", "None", "?", None)),
    ]
    model = read_model(write_model(tmp_path / "m.onnx", inputs, [("y", "f32", ("N",))]))
    assert model.ties == (
        Tie("seq", (("a", 0), ("b", 1))),
        Tie("side", (("b", 2), ("b", 3))),
    )


@pytest.mark.parametrize(("first", "size"), [(4, 4), ("N", None), (None, None)])
def test_a_batch_is_fixed_where_the_first_dimension_is_a_number(
    first: int | str | None, size: int | None, tmp_path: Path
) -> None:
    """A number in front fixes the batch, a name or nothing leaves it free."""
    path = write_model(tmp_path / "m.onnx", [("x", "f32", (first, 3))], [("y", "f32", (first, 2))])
    assert read_model(path).fixed_batch == size


@pytest.mark.parametrize("ir_version", [3, 4, 8])
def test_weights_are_no_inputs(ir_version: int, tmp_path: Path) -> None:
    """Before IR version 4 weights are listed among the inputs, and are left out all the same."""
    model = read_bytes(tmp_path / "m.onnx", matmul(4, 2, ir_version).SerializeToString())
    assert [p.name for p in model.inputs] == ["x"]


def test_weights_are_not_loaded(tmp_path: Path) -> None:
    """Reading the header of a model with 50 MB of weights takes less than 1 MB of memory."""
    onnx.save_model(matmul(LARGE_BYTES // 40, 10), tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx").stat().st_size > LARGE_BYTES
    read_model(write_model(tmp_path / "warm.onnx", *MODELS["resnet50.onnx"]))
    tracemalloc.start()
    try:
        model = read_model(tmp_path / "large.onnx")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.inputs == (Port("x", "f32", (None, LARGE_BYTES // 40), ("N", None)),)
    assert peak_bytes < 1 << 20


def test_weights_in_another_file_are_not_needed(tmp_path: Path) -> None:
    """A header is read the same with its weights kept outside, and even where they are gone."""
    path = tmp_path / "outside.onnx"
    onnx.save_model(
        matmul(64, 8), path, save_as_external_data=True, location="weights", size_threshold=0
    )
    inside = read_bytes(tmp_path / "inside.onnx", matmul(64, 8).SerializeToString())
    assert (tmp_path / "weights").is_file()
    (tmp_path / "weights").unlink()
    model = read_model(path)
    assert (model.inputs, model.outputs) == (inside.inputs, inside.outputs)
    assert model.weights == (tmp_path / "weights",)
    assert not inside.weights


def in_constant(weight: onnx.TensorProto) -> list[onnx.NodeProto]:
    return [helper.make_node("Constant", [], ["w"], value=weight)]


def in_body(weight: onnx.TensorProto) -> list[onnx.NodeProto]:
    body = helper.make_graph(
        [helper.make_node("Identity", ["inside"], ["out"])],
        "body",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [64])],
        [weight],
    )
    yes = numpy_helper.from_array(np.asarray(True), "yes")
    return [
        helper.make_node("Constant", [], ["is_so"], value=yes),
        helper.make_node("If", ["is_so"], ["w"], then_branch=body, else_branch=body),
    ]


@pytest.mark.parametrize("holding", [in_constant, in_body])
def test_weights_in_another_file_are_found_wherever_they_are_used(
    holding: Callable[[onnx.TensorProto], list[onnx.NodeProto]], tmp_path: Path
) -> None:
    """Constants, and the bodies of control flow, may have theirs outside as well: an engine built
    of them must not outlive them.
    """
    weight = numpy_helper.from_array(np.ones(64, np.float32), "inside")
    nodes = [*holding(weight), helper.make_node("Add", ["x", "w"], ["y"])]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 64]) for n in "xy"]
    made = helper.make_model(helper.make_graph(nodes, "made", ports[:1], ports[1:]))
    assert not read_bytes(tmp_path / "inside.onnx", made.SerializeToString()).weights
    onnx.save_model(
        made, tmp_path / "outside.onnx", save_as_external_data=True, location="weights",
        size_threshold=0, convert_attribute=True,
    )  # fmt: skip
    model = read_model(tmp_path / "outside.onnx")
    assert model.weights == (tmp_path / "weights",)
    assert model.weights[0].stat().st_size >= weight.ByteSize() // 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\x08\x08", "it holds no graph"),
        (b"not a model", "it is no protobuf message"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "it holds no graph"),
        (SMALL[: len(SMALL) // 2], "it is cut short, or it is no protobuf message"),
        (b"\xff" * 40, "it is no protobuf message"),
        (b"\x3a\x00", "it has no inputs or no outputs"),
    ],
)
def test_what_is_no_model_is_refused_with_a_reason(
    data: bytes, reason: str, tmp_path: Path
) -> None:
    """Empty, cut and foreign files are told apart."""
    with pytest.raises(NotAModel, match=reason):
        read_bytes(tmp_path / "m.onnx", data)


def test_a_model_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """No cut through a model, or in front of its graph's end, reads as a model."""
    graph = matmul(4, 2).graph.SerializeToString()
    for end in range(SMALL.index(graph) + len(graph)):
        with pytest.raises(NotAModel):
            read_bytes(tmp_path / "m.onnx", SMALL[:end])


def test_inputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    """A model over sequences or over strings is none that flowlang can run, and is told so."""
    graph = matmul(4, 2)
    graph.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    with pytest.raises(NotAModel, match="`x` is no tensor"):
        read_bytes(tmp_path / "m.onnx", graph.SerializeToString())
    graph.graph.input[0].type.sequence_type.SetInParent()
    with pytest.raises(NotAModel, match="`x` is no tensor"):
        read_bytes(tmp_path / "m.onnx", graph.SerializeToString())


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """A file that is not there is no question of models."""
    with pytest.raises(FileNotFoundError):
        read_model(tmp_path / "none.onnx")


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_damaged_models_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, seed: int, blows: int
) -> None:
    """A model with wrong bytes in it raises NotAModel or nothing."""
    dice = random.Random(seed)
    data = bytearray(SMALL)
    for _ in range(blows):
        data[dice.randrange(len(data))] = dice.randrange(256)
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    with contextlib.suppress(NotAModel):
        assert read_bytes(path, bytes(data)).inputs


def test_the_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    """The hash is the one every other tool computes, over files of more than one chunk too."""
    data = random.Random(1).randbytes(3 << 20)
    (tmp_path / "large").write_bytes(data)
    assert file_sha256(tmp_path / "large") == hashlib.sha256(data).hexdigest()
