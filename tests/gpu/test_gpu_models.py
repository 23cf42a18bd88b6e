"""Models on an NVIDIA GPU: what TensorRT answers, against ONNX Runtime on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from flowlang import App
from flowlang.diagnostics import BadRequest, EngineError
from tests.gpu.place import (
    CELL_LEVELS,
    CELLS,
    CLASSIFY,
    ON_GPU,
    Array,
    Place,
    cells_on_host,
    relative,
    run_directly,
)
from tests.regions import on_host, region_of

pytestmark = ON_GPU


def likeness(got: Array, wanted: Array) -> float:
    """The mean cosine of rows, once what all rows share is taken off."""
    a, b = got - wanted.mean(0), wanted - wanted.mean(0)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / lengths).mean())


@pytest.fixture(scope="module")
def wanted_logits(place: Place, crops: list[bytes]) -> Array:
    """Logits of the classifier for the crops, by the reference operators and ONNX Runtime."""
    return run_directly(place.models / "net.onnx", data=pixels(place, crops))["logits"]


def pixels(place: Place, files: Sequence[bytes]) -> Array:
    nodes = region_of(CLASSIFY.format("", "net", "fp32"), place.models)
    with ThreadPoolExecutor(8) as pool:
        return np.stack(list(pool.map(lambda data: on_host(nodes, data), files)))


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-3), ("fp16", 1e-2)])
def test_logits_are_those_of_the_reference(
    open_app: Callable[..., App],
    crops: list[bytes],
    wanted_logits: Array,
    precision: str,
    limit: float,
) -> None:
    """On equal pixels an engine gives the logits of ONNX Runtime, up to its precision."""
    app = open_app(CLASSIFY.format("(libjpeg)", "net", precision))
    got = np.stack(list(app.map(crops)))
    error = relative(got, wanted_logits)
    assert error < limit, f"{precision}: relative error {error:.2e}"
    # The classifier's weights are random, so some pictures have two classes at almost one score.
    first, second = np.sort(wanted_logits, 1)[:, :-3:-1].T
    is_clear = first - second > 10 * limit * wanted_logits.std()
    assert is_clear.sum() >= 100
    same = got.argmax(1) == wanted_logits.argmax(1)
    assert same[is_clear].all(), f"{precision}: {(~same & is_clear).sum()} other classes"


def test_logits_of_pictures_decoded_on_the_gpu(
    open_app: Callable[..., App], crops: list[bytes], wanted_logits: Array
) -> None:
    """Decoding on the GPU moves the logits by no more than levels differ between decoders.

    A network of random weights passes such differences on tenfold, where a trained one damps them.
    """
    app = open_app(CLASSIFY.format("", "net", "fp16"))
    got = np.stack(list(app.map(crops)))
    assert likeness(got, wanted_logits) > 0.97
    same = got.argmax(1) == wanted_logits.argmax(1)
    assert same.mean() > 0.6
    assert likeness(got[::-1], wanted_logits) < 0.5


def test_an_int8_model_answers_as_its_graph_says(
    place: Place, open_app: Callable[..., App], crops: list[bytes]
) -> None:
    """A model with quantize and dequantize nodes runs in int8 and agrees with ONNX Runtime."""
    quantize(place, crops[:16])
    app = open_app(CLASSIFY.format("(libjpeg)", "quantized", "int8"))
    got = np.stack(list(app.map(crops[:64])))
    wanted = run_directly(place.models / "quantized.onnx", data=pixels(place, crops[:64]))["logits"]
    assert likeness(got, wanted) > 0.85
    assert likeness(got[::-1], wanted) < 0.5


def quantize(place: Place, files: Sequence[bytes]) -> None:
    """Write quantized.onnx: the classifier with its ranges measured on some pictures."""
    quantization = pytest.importorskip("onnxruntime.quantization", exc_type=ImportError)

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self._rows = iter(pixels(place, files))

        def get_next(self) -> dict[str, Array] | None:
            row = next(self._rows, None)
            return None if row is None else {"data": row[None]}

    quantization.quantize_static(
        str(place.models / "net.onnx"),
        str(place.models / "quantized.onnx"),
        Calibration(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": True,
            "QuantizeBias": False,
        },
    )


def test_int8_without_quantization_is_told(open_app: Callable[..., App]) -> None:
    """A plain model asked to run in int8 is an EngineError that says what it lacks."""
    with pytest.raises(EngineError, match=r"`mlp.onnx` has no quantize/dequantize nodes"):
        open_app('trt("mlp.onnx", int8, batch=1..8) x1')


TAKERS = [
    ("chw", "rgb"), ("hwc", "bgr"), ("gray", "gray"), ("half", "rgb"), ("levels", "rgb"),
    ("levels_chw", "bgr"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "colour"), TAKERS)
def test_a_model_may_take_pictures_in_any_layout(
    place: Place, open_app: Callable[..., App], photos: list[bytes], model: str, colour: str
) -> None:
    """Channels first or last, one or three, single, half or 8-bit: the model sees the picture."""
    text = f'decode{{}} -> resize(64) -> {colour} -> trt("{model}.onnx", batch=1..8) x1'
    wanted = cells_on_host(place, photos[:8], text.format(""))
    for decode, limit in (("(libjpeg)", 0.3), ("", CELL_LEVELS)):
        got = list(open_app(text.format(decode)).map(photos[:8]))
        for one, other in zip(got, wanted, strict=True):
            assert abs(one - other).max() <= limit


def test_a_model_of_tensors_answers_as_onnx_runtime(
    place: Place, open_app: Callable[..., App]
) -> None:
    """A flow that is nothing but a model takes arrays, and refuses those that do not fit."""
    app = open_app('trt("mlp.onnx", batch=1..8) x2')
    items = np.random.default_rng(5).standard_normal((50, 16), np.float32)
    wanted = run_directly(place.models / "mlp.onnx", data=items)["logits"]
    got = np.stack(list(app.map(items)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=5e-3, atol=5e-3 * abs(wanted).max())
    with pytest.raises(BadRequest):
        app(np.zeros(17, np.float32))


def test_a_fixed_batch_is_filled_up(open_app: Callable[..., App]) -> None:
    """A model of four at a time answers one, two or three as well, with nothing left over."""
    app = open_app('trt("four.onnx") x1')
    for count in (1, 2, 3, 4, 7):
        items = np.random.default_rng(count).random((count, 6), np.float32)
        np.testing.assert_array_equal(np.stack(list(app.map(items))), items)


def write_doubler(path: Path, kind: int, *sides: int) -> None:
    """Write a model that adds `data` to itself, items of one shape and dtype."""
    ports = [helper.make_tensor_value_info(n, kind, ["N", *sides]) for n in ("data", "out")]
    node = helper.make_node("Add", ["data", "data"], ["out"])
    graph = helper.make_graph([node], "doubler", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opsets), path)


def test_whole_numbers_stay_what_the_model_says(place: Place, open_app: Callable[..., App]) -> None:
    """TensorRT 8.6 computes in 32 bits where a model has 64: answers have 64 all the same, and a
    number that 32 do not hold is refused, not made another.
    """
    write_doubler(place.models / "long.onnx", TensorProto.INT64, 3)
    app = open_app('trt("long.onnx", batch=1..4) x1')
    small, large = np.asarray([1, -2, 3]), np.asarray([1, 2, 1 << 40])
    one, other = app.map([small, large], errors="return")
    assert one.dtype == np.int64
    np.testing.assert_array_equal(one, 2 * small)
    if isinstance(other, Exception):
        assert isinstance(other, BadRequest)
        assert "with the number 1099511627776 is not tensor<i32, 3>" in str(other)
    else:
        np.testing.assert_array_equal(other, 2 * large)


def test_an_item_may_be_one_number(place: Place, open_app: Callable[..., App]) -> None:
    """A model whose batch is a row of numbers takes and gives one for each item."""
    write_doubler(place.models / "numbers.onnx", TensorProto.FLOAT)
    app = open_app('trt("numbers.onnx", batch=1..4) -> trt("numbers.onnx", batch=1..4)')
    answers = list(app.map([np.float32(n) for n in range(7)]))
    assert answers == [4.0 * n for n in range(7)]
    assert {(np.shape(a), a.dtype) for a in answers} == {((), np.dtype(np.float32))}


def test_an_input_for_a_whole_batch_is_told(place: Place, open_app: Callable[..., App]) -> None:
    """What has no batch dimension cannot be given item by item."""
    shapes: dict[str, list[str | int]] = {"data": ["N", 2], "scale": [], "out": ["N", 2]}
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    node = helper.make_node("Mul", ["data", "scale"], ["out"])
    graph = helper.make_graph([node], "scaled", ports[:2], ports[2:])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=opsets), place.models / "scaled.onnx"
    )
    with pytest.raises(EngineError, match=r"`scaled.onnx` takes one `scale` for a whole batch"):
        open_app('trt("scaled.onnx", batch=1..4) x1')


def test_two_outputs_are_a_record(place: Place, open_app: Callable[..., App]) -> None:
    """A model with several outputs gives a record of them, by name."""
    app = open_app('trt("heads.onnx", batch=1..4) x1')
    items = np.random.default_rng(6).random((9, 3, 64, 64), np.float32)
    wanted = run_directly(place.models / "heads.onnx", data=items)
    for index, answer in enumerate(app.map(items)):
        assert list(answer) == ["scores", "embedding"]
        for name, rows in wanted.items():
            assert relative(answer[name], rows[index]) < 1e-2


def test_two_inputs_take_a_record(place: Place, open_app: Callable[..., App]) -> None:
    """A model with several inputs takes records, whatever the order of their fields."""
    app = open_app('trt("pair.onnx", batch=1..4) x1')
    random = np.random.default_rng(7)
    images = random.random((6, 3, 64, 64), np.float32)
    features = random.random((6, 8), np.float32)
    wanted = run_directly(place.models / "pair.onnx", image=images, features=features)["scores"]
    items = [{"features": f, "image": i} for f, i in zip(features, images, strict=True)]
    assert relative(np.stack(list(app.map(items))), wanted) < 1e-2


def test_one_picture_feeds_two_models(
    place: Place, open_app: Callable[..., App], photos: list[bytes]
) -> None:
    """A picture decoded once goes to both models of a record, and each answers for itself."""
    text = """
        flow one = trt("heads.onnx", batch=1..4) x1 -> .scores
        flow two = trt("others.onnx", batch=1..4) x1 -> .scores
        export flow both =
          decode -> resize(64) -> rgb -> normalize(imagenet) -> { a: one, b: two }"""
    app = open_app(text)
    nodes = region_of(
        'decode -> resize(64) -> rgb -> normalize(imagenet) -> trt("chw.onnx")', place.models
    )
    seen = np.stack([on_host(nodes, data) for data in photos[:12]])
    answers = list(app["both"].map(photos[:12]))
    for name, model in (("a", "heads"), ("b", "others")):
        wanted = run_directly(place.models / f"{model}.onnx", data=seen)["scores"]
        assert relative(np.stack([answer[name] for answer in answers]), wanted) < 2e-2


def test_what_follows_a_model_runs_behind_it(
    place: Place, open_app: Callable[..., App], photos: list[bytes]
) -> None:
    """Operators of the host work on what an engine gave, in the same stage."""
    app = open_app(CELLS.format(1) + " -> softmax -> top(3)")
    for data, cells in zip(photos[:4], cells_on_host(place, photos[:4]), strict=True):
        labels = app(data)
        assert len(labels) == 3
        assert cells[labels[0]["index"]] >= cells.max() - 2 * CELL_LEVELS
