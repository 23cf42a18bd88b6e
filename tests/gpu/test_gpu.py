"""Flows on an NVIDIA GPU: what DALI and TensorRT make of them, against the reference operators.

Engines are built once a session. Where a file is decoded matters to its pixels, so models are held
to tight limits on pixels decoded on the host, and DALI's decoding is held to its own.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from examples import models
from flowlang import App, load
from flowlang.diagnostics import BadRequest, EngineError, FlowError, StageFailed
from flowlang.runtime import cuda, dali, trt
from flowlang.runtime.dali import Decoding, Decodings, Region
from flowlang.runtime.instances import Instances
from flowlang.runtime.stage import InstanceLost
from tests.engines import build_soon
from tests.pictures import bad, good, photographs
from tests.regions import (
    CHAINS,
    JPEG_LEVELS,
    Chain,
    cells_of,
    decodable,
    gpu_plan,
    in_dali,
    on_host,
    region_of,
    write_models,
)

pytestmark = [
    pytest.mark.gpu,
    # What NVIDIA's packages warn of is theirs to mend; a thread that dies is ours.
    pytest.mark.filterwarnings("default", "error::pytest.PytestUnhandledThreadExceptionWarning"),
]

Array: TypeAlias = NDArray[Any]

LONG_S = 60.0
CELLS = 'decode -> resize(64) -> rgb -> trt("chw.onnx", batch=1..32) x{}'
CLASSIFY = (
    'decode{} -> resize(224) -> rgb -> normalize(imagenet) -> trt("{}.onnx", {}, batch=1..4..16) x1'
)
# A decoder's differences shrink in the mean over a cell of 64 pixels.
CELL_LEVELS = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the models of these tests are, and the engines made of them."""

    models: Path
    engines: Path

    def load(self, text: str, name: str = "test", engines: Path | None = None) -> App:
        path = self.models / f"{name}.flow"
        path.write_text(text, "utf-8")
        return load(path, device="gpu", engines=engines or self.engines)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The models and engines. How pictures are decoded best is measured once, not for each app."""
    reason = cuda.why_no_gpu()
    if reason:
        pytest.skip(reason)
    cuda.use(0)
    root = write_models(tmp_path_factory.mktemp("models"))
    models.resnet(root / "net.onnx", depth=18, width=8)
    models.mlp(root / "mlp.onnx", inputs=16, hidden=64, layers=2, outputs=5)
    models.identity(root / "four.onnx", (4, 6))
    models.two_heads(root / "heads.onnx", size=64)
    models.two_heads(root / "others.onnx", size=64, seed=1)
    models.two_inputs(root / "pair.onnx", size=64)
    measure, measured = dali.choose_decodings, {}

    def measure_once(device: int, *rest: Any) -> Decodings:
        if device not in measured:
            measured[device] = measure(device, *rest)
        return measured[device]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dali, "choose_decodings", measure_once)
        build_soon(patch)
        yield Place(root, tmp_path_factory.mktemp("engines"))


@pytest.fixture
def open_app(place: Place) -> Iterator[Callable[..., App]]:
    """Loads flows on the GPU, and closes them again."""
    apps: list[App] = []

    def opener(text: str, **options: Any) -> App:
        apps.append(place.load(text, f"app{len(apps)}", **options))
        return apps[-1]

    yield opener
    for app in apps:
        app.close()


@pytest.fixture
def open_instance(place: Place) -> Iterator[Callable[[str], Any]]:
    """Makes warm instances of flows of one stage, whose batches a test puts together itself."""
    opened: list[Any] = []

    def opener(text: str) -> Any:
        plan = gpu_plan(text, place.models)
        (stage,) = plan.stages
        made = Instances(plan, place.engines)
        instance = made.make(stage, 0)
        opened.extend((instance, made))
        instance.warm()
        return instance

    yield opener
    for thing in opened:
        thing.close()


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return photographs(32)


@pytest.fixture(scope="module")
def crops(photos: list[bytes]) -> list[bytes]:
    """256 pictures: crops of the photographs, of many sizes."""
    random = np.random.default_rng(3)
    whole = [decoded(data) for data in photos]
    made = []
    for index in range(256):
        image = whole[index % len(whole)]
        top, left = random.integers(0, 120, 2)
        height, width = random.integers(180, 250, 2)
        crop = image[top : top + height, left : left + width][:, :: int(random.choice((-1, 1)))]
        made.append(cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
    return made


def decoded(data: bytes) -> Array:
    """The pixels of a picture file as OpenCV sees them: blue, green, red."""
    image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return np.asarray(image)


def run_directly(path: Path, **feeds: Array) -> dict[str, Array]:
    """What ONNX Runtime says in single precision on the host, asked without anything of ours."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def cells_on_host(place: Place, files: Iterable[bytes], text: str = CELLS) -> list[Array]:
    """What the models of `write_models` must answer for pictures, by the reference operators."""
    nodes = region_of(text.format(1), place.models)[:-1]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda data: cells_of(on_host(nodes, data)), files))


def relative(got: Array, wanted: Array) -> float:
    """The length of the difference over the length of what is wanted."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def likeness(got: Array, wanted: Array) -> float:
    """The mean cosine of rows, once what all rows share is taken off."""
    a, b = got - wanted.mean(0), wanted - wanted.mean(0)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / lengths).mean())


# Regions


@pytest.fixture(scope="module")
def references(place: Place, photos: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Photographs, and some of them in files that keep every pixel."""
    images = [decoded(data) for data in photos[:4]]
    images[1] = images[1][:251, :127]
    return photos[: dali.MOST], [cv2.imencode(".png", image)[1].tobytes() for image in images]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.text)
def test_every_operator_agrees_with_its_reference(
    place: Place, references: tuple[list[bytes], list[bytes]], chain: Chain
) -> None:
    """Results on the GPU are those of the reference operators, within the tolerances."""
    nodes = region_of(chain.text, place.models)
    region = Region(nodes, dali.MOST, 0, Decoding())
    try:
        for files, is_jpeg in zip(references, (True, False), strict=True):
            for data, got in zip(files, in_dali(region, files), strict=True):
                chain.check(got, on_host(nodes, data), jpeg=is_jpeg)
    finally:
        region.close()


@pytest.fixture(scope="module")
def decoder(place: Place) -> Iterator[tuple[Region, list[Any]]]:
    nodes = region_of("decode -> rgb", place.models)
    region = Region(nodes, 8, 0, Decoding())
    yield region, nodes
    region.close()


@pytest.mark.parametrize("name", good())
def test_every_format_shows_the_same(decoder: tuple[Region, list[Any]], name: str) -> None:
    """What DALI is handed of a file, or of its bitmap, shows what OpenCV sees in the file."""
    region, nodes = decoder
    picture = good()[name]
    if name == "tiff-1-bit":
        pytest.skip("DALI refuses it, so an instance decodes it on the host: tested with instances")
    (got,) = in_dali(region, [decodable(picture.data)])
    wanted = on_host(nodes, picture.data)
    assert got.shape == wanted.shape
    apart = abs(got.astype(int) - wanted).max()
    assert apart <= (JPEG_LEVELS + 1 if picture.format == "jpeg" else 1), f"{name}: {apart} levels"


def test_every_format_goes_through_a_flow(place: Place, open_instance: Any) -> None:
    """Files of all formats together are answered, those the GPU cannot decode included."""
    instance = open_instance(CELLS.format(1))
    names = list(good())
    files = [good()[name].data for name in names]
    outcomes = [o for at in range(0, len(files), 32) for o in instance.run(files[at : at + 32])]
    failed = {}
    for name, outcome, wanted in zip(names, outcomes, cells_on_host(place, files), strict=True):
        if isinstance(outcome, Exception):
            failed[name] = str(outcome)
        elif abs(outcome - wanted).max() > CELL_LEVELS + 1:
            failed[name] = f"{abs(outcome - wanted).max():.1f} levels"
    assert not failed


# Models


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


# Batches


def test_every_batch_size_and_both_ways_to_enqueue(
    place: Place, open_instance: Any, photos: list[bytes]
) -> None:
    """Batches of 1 to 32 are right item by item, with CUDA graphs and without."""
    wanted = cells_on_host(place, photos)
    with_graphs = open_instance(CELLS.format(1))
    without = open_instance(CELLS.format(1).replace("1..32", "1..32, graphs=false"))
    for count in (*range(1, 21), 25, 31, 32, 3):
        order = [(index * 7 + count) % 32 for index in range(count)]
        batch = [photos[index] for index in order]
        one, other = with_graphs.run(batch), without.run(batch)
        assert len(one) == len(other) == count
        for index, a, b in zip(order, one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
            assert abs(a - wanted[index]).max() <= CELL_LEVELS


def damaged(name: str) -> bytes:
    """A file whole to its end, with bytes of its compressed pixels flipped."""
    data = bytearray(good()[name].data)
    at = len(data) // 2
    data[at : at + 40] = bytes(byte ^ 0xFF for byte in data[at : at + 40])
    return bytes(data)


def test_a_bad_picture_fails_alone(place: Place, open_instance: Any, photos: list[bytes]) -> None:
    """Of a batch in which one picture is bad only that one fails, told which operator and where.

    The last two look whole and fail in the decoder; all others are told by their headers.
    """
    instance = open_instance(CELLS.format(1))
    alone = [instance.run([data])[0] for data in photos[:7]]
    cases = {name: (picture.data, picture.word) for name, picture in bad().items()}
    cases |= {name: (damaged(name), "decoded") for name in ("png-rgb", "png-palette")}
    for number, (name, (data, word)) in enumerate(cases.items()):
        at = number % 8
        outcomes = instance.run([*photos[:at], data, *photos[at:7]])
        error = outcomes.pop(at)
        assert isinstance(error, BadRequest), name
        assert error.stage == "decode", name
        assert error.message.startswith("decode failed: "), name
        assert word.lower() in error.message.lower(), name
        assert str(error).endswith("test.flow:1:1)"), name
        for outcome, single in zip(outcomes, alone, strict=True):
            assert isinstance(outcome, np.ndarray), name
            assert abs(outcome - single).max() <= CELL_LEVELS, name


def test_one_bad_picture_of_a_full_batch_takes_nobody_along(
    place: Place, open_instance: Any, photos: list[bytes]
) -> None:
    """Nor the process, which DALI alone would: it refuses the header of the first of the two."""
    instance = open_instance(CELLS.format(1).replace("1..32", "1..56"))
    refused, broken = good()["tiff-1-bit"].data, damaged("png-rgb")
    alone = {data: instance.run([data])[0] for data in (*photos, refused)}
    for count in (56, 33, 28, 9, 56):
        for at in (0, count // 2, count - 1):
            given = [photos[(index + at) % len(photos)] for index in range(count)]
            given[at], given[at - 1] = refused, broken
            outcomes = instance.run(given)
            for data, outcome in zip(given, outcomes, strict=True):
                if data is broken:
                    assert isinstance(outcome, BadRequest)
                else:
                    assert abs(outcome - alone[data]).max() <= CELL_LEVELS


def test_several_bad_pictures_fail_alone(
    place: Place, open_instance: Any, photos: list[bytes]
) -> None:
    """A batch may hold several bad pictures of both kinds, or nothing else."""
    instance = open_instance(CELLS.format(1))
    broken = [damaged("png-rgb"), b"", damaged("png-palette"), photos[0][:-200]]
    assert [type(o) for o in instance.run(broken)] == [BadRequest] * 4
    mixed = [broken[0], photos[0], broken[1], photos[1], broken[2], photos[2], broken[3]]
    outcomes = instance.run(mixed)
    assert [isinstance(o, BadRequest) for o in outcomes] == [True, False] * 3 + [True]
    for outcome, wanted in zip(outcomes[1::2], cells_on_host(place, photos[:3]), strict=True):
        assert abs(outcome - wanted).max() <= CELL_LEVELS


def test_a_truncated_picture_that_is_allowed_outlives_a_bad_neighbour(
    open_instance: Any, photos: list[bytes]
) -> None:
    """What was made readable once stays so when its batch is done again without the bad one."""
    instance = open_instance(CELLS.format(1).replace("decode", "decode(truncated=allow)"))
    cut = photos[0][: len(photos[0]) // 2]
    (alone,) = instance.run([cut])
    outcomes = instance.run([photos[1], cut, damaged("png-rgb")])
    assert isinstance(outcomes[2], BadRequest)
    assert abs(outcomes[1] - alone).max() <= CELL_LEVELS


def test_a_picture_smaller_than_its_crop_fails_alone(
    place: Place, open_app: Callable[..., App], photos: list[bytes]
) -> None:
    """What DALI cannot crop is told as the reference operator tells it, and the rest answered."""
    app = open_app('decode -> crop(h=64, w=64) -> rgb -> trt("chw.onnx", batch=1..32) x1')
    small = good()["png-1x1"].data
    outcomes = list(app.map([photos[0], small, photos[1], small], errors="return"))
    for error in outcomes[1::2]:
        assert isinstance(error, BadRequest)
        assert error.stage == "crop"
        assert "an image of 1x1 has no centre of 64x64" in error.message
    assert all(isinstance(outcome, np.ndarray) for outcome in outcomes[::2])


def test_bad_pictures_among_the_requests_of_an_app(
    place: Place, open_app: Callable[..., App], photos: list[bytes]
) -> None:
    """Through the whole app, too, each bad picture is told to its own sender alone."""
    app = open_app(CELLS.format(2))
    whole = cells_on_host(place, photos)
    broken = [picture.data for picture in bad().values()]
    items = [(photos[i % 32], whole[i % 32]) for i in range(160)]
    mixed = [x for at, item in enumerate(items) for x in (item, (broken[at % len(broken)], None))]
    outcomes = list(app.map((data for data, _ in mixed), errors="return"))
    for outcome, (_, wanted) in zip(outcomes, mixed, strict=True):
        if wanted is None:
            assert isinstance(outcome, BadRequest)
        else:
            assert abs(outcome - wanted).max() <= CELL_LEVELS


# Many requests


COUNT = 20_000


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many different pictures, each with the cells it must be answered with."""

    files: list[bytes]
    cells: Array


@pytest.fixture(scope="module")
def crowd(place: Place) -> Crowd:
    nodes = region_of(CELLS.format(1), place.models)[:-1]

    def draw(seed: int) -> tuple[bytes, Array]:
        patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        image = cv2.resize(patches, (250, 188), interpolation=cv2.INTER_CUBIC)
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
        return data, cells_of(on_host(nodes, data))

    with ThreadPoolExecutor(12) as pool:
        drawn = list(pool.map(draw, range(COUNT), chunksize=1))
    return Crowd([data for data, _ in drawn], np.stack([cells for _, cells in drawn]))


@pytest.fixture(scope="module")
def crowd_app(place: Place) -> Iterator[App]:
    text = f"export flow f = {CELLS.format(4)}\nschedule {{ f(queue=1024) }}"
    with place.load(text, "crowd") as app:
        yield app


async def _answers(app: App, files: Sequence[bytes], outstanding: int) -> list[Any]:
    answers: list[Any] = [None] * len(files)
    numbers = iter(range(len(files)))

    async def client() -> None:
        for number in numbers:
            answers[number] = await app.acall(files[number])

    await asyncio.gather(*(client() for _ in range(outstanding)))
    return answers


def test_every_answer_is_that_of_its_own_picture(crowd: Crowd, crowd_app: App) -> None:
    """Of 20,000 different pictures through four lanes at once, each gets its own answer."""
    got = np.stack(asyncio.run(_answers(crowd_app, crowd.files, 256)))
    apart = abs(got - crowd.cells).max(1)
    # Others' answers are far away; but colours as strong as these differ more than photographs'.
    assert apart.max() <= 2 * CELL_LEVELS, f"{(apart > 2 * CELL_LEVELS).sum()} are of others"
    asked = np.random.default_rng(9).choice(COUNT, 2_000, replace=False)
    lengths = (crowd.cells**2).sum(1)
    nearest = (lengths[None] - 2 * got[asked] @ crowd.cells.T).argmin(1)
    np.testing.assert_array_equal(nearest, asked)


def test_memory_does_not_grow(crowd: Crowd, crowd_app: App) -> None:
    """After 5,000 requests that warm up, 15,000 more take neither host nor GPU memory."""

    def used() -> tuple[float, float]:
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20, -cuda.free_bytes() / 2**20

    for at in range(0, 5_000, 1_000):
        asyncio.run(_answers(crowd_app, crowd.files[at : at + 1_000], 256))
    before = used()
    for at in range(5_000, COUNT, 1_000):
        asyncio.run(_answers(crowd_app, crowd.files[at : at + 1_000], 256))
    host, gpu = (now - then for now, then in zip(used(), before, strict=True))
    assert host < 50, f"{host:.0f} MiB more"
    assert gpu < 50, f"{gpu:.0f} MiB more on the GPU"


# Engines and instances


def test_an_engine_is_built_once_and_a_damaged_one_again(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second load builds nothing; where a byte flipped the engine is built anew, and told why."""
    caplog.set_level(logging.INFO, "flowlang")
    item = np.ones(16, np.float32)

    def load_again() -> tuple[Path, int, str, Array]:
        caplog.clear()
        with place.load('trt("mlp.onnx", batch=1..2) x2', "cached", tmp_path) as app:
            answer = app(item)
        (path,) = tmp_path.glob("*.engine")
        said = "\n".join(r.getMessage() for r in caplog.records if "build" in r.getMessage())
        return path, path.stat().st_mtime_ns, said, answer

    path, built_ns, said, answer = load_again()
    assert "`mlp.onnx`" in said
    assert "not built yet" in said
    again = load_again()
    assert again[:3] == (path, built_ns, "")
    np.testing.assert_array_equal(again[3], answer)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    mended = load_again()
    assert mended[0] == path
    assert mended[1] != built_ns
    assert "damaged" in mended[2]
    np.testing.assert_allclose(mended[3], answer, rtol=1e-2, atol=1e-2)
    assert load_again()[2] == ""


def test_a_lost_instance_is_replaced(
    place: Place,
    open_app: Callable[..., App],
    photos: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The requests of a lost instance fail, its lane gets a new one, and the others go on."""
    app = open_app(CELLS.format(2))
    wanted = cells_on_host(place, photos)
    collect, warm = trt.Context.collect, trt.Context.warm
    calls, is_replaced = itertools.count(), threading.Event()

    def failing(self: Any, *rest: Any) -> Any:
        if next(calls) == 0:
            raise InstanceLost("lost on purpose")
        return collect(self, *rest)

    def warming(self: Any) -> None:
        warm(self)
        is_replaced.set()

    monkeypatch.setattr(trt.Context, "collect", failing)
    monkeypatch.setattr(trt.Context, "warm", warming)
    outcomes = list(app.map(photos * 4, errors="return"))
    failed = [o for o in outcomes if isinstance(o, Exception)]
    assert 1 <= len(failed) <= 96
    for error in failed:
        assert isinstance(error, StageFailed)
        assert "lost on purpose" in str(error)
    for index, outcome in enumerate(outcomes):
        if not isinstance(outcome, Exception):
            assert abs(outcome - wanted[index % 32]).max() <= CELL_LEVELS
    assert is_replaced.wait(LONG_S)
    for _ in range(4):
        for outcome, cells in zip(app.map(photos), wanted, strict=True):
            assert abs(outcome - cells).max() <= CELL_LEVELS


def test_a_model_that_cannot_be_built_is_told(place: Place, open_app: Callable[..., App]) -> None:
    """An operator TensorRT does not know is an EngineError with the model's name and a reason."""
    node = helper.make_node("Invented", ["data"], ["out"], domain="made.up")
    ports = [helper.make_tensor_value_info(n, 1, ["N", 4]) for n in ("data", "out")]
    graph = helper.make_graph([node], "odd", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("made.up", 1)]
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=opsets), place.models / "odd.onnx"
    )
    with pytest.raises(EngineError, match=r"TensorRT cannot (read|build) `odd.onnx`: .+"):
        open_app('trt("odd.onnx", batch=1..2) x2')


def test_an_output_without_a_row_for_each_item_is_told(
    place: Place, open_app: Callable[..., App]
) -> None:
    """Its memory would be overrun, and items given what belongs to others."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["data", "shape"], ["out"])],
        "flat",
        [helper.make_tensor_value_info("data", 1, ["N", 32])],
        [helper.make_tensor_value_info("out", 1, ["M", 4])],
        [numpy_helper.from_array(np.asarray([-1, 4], np.int64), "shape")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(
        helper.make_model(graph, ir_version=8, opset_imports=opsets), place.models / "flat.onnx"
    )
    with pytest.raises(EngineError, match=r"`flat.onnx` gives `out` as .* for a batch of"):
        open_app('trt("flat.onnx", batch=1..8) x1')


ROW_BYTES = 1 << 20


@pytest.fixture
def wide(place: Place) -> str:
    """A flow whose buffers take 256 MiB each, its engine built while there is memory for it."""
    models.identity(place.models / "wide.onnx", ("N", ROW_BYTES // 4))
    text = 'trt("wide.onnx", batch=1..1..256, graphs=false) x1'
    with place.load(text) as app:
        item = np.arange(ROW_BYTES // 4, dtype=np.float32)
        np.testing.assert_array_equal(app(item), item)
    return text


@pytest.mark.parametrize("left_bytes", [128 << 20, 400 << 20])
def test_too_little_gpu_memory_is_told_and_nothing_is_kept(
    place: Place, wide: str, left_bytes: int
) -> None:
    """Where buffers do not fit an EngineError says so, and those that did fit are given back."""
    gc.collect()
    hog = cuda.DeviceBuffer(cuda.free_bytes() - left_bytes)
    try:
        before = cuda.free_bytes()
        with pytest.raises(EngineError, match=r"out of GPU memory|cannot (build|load)"):
            place.load(wide)
        gc.collect()
        assert before - cuda.free_bytes() < 64 << 20
    finally:
        hog.close()
    with place.load(wide) as app:
        np.testing.assert_array_equal(
            app(np.ones(ROW_BYTES // 4, np.float32)), np.ones(ROW_BYTES // 4, np.float32)
        )


def test_a_buffer_larger_than_the_gpu_is_told(place: Place) -> None:
    """The error names what was wanted and what is free, and the GPU goes on working."""
    with pytest.raises(EngineError, match=r"out of GPU memory .*: 4,398,046,511,104 bytes wanted"):
        cuda.DeviceBuffer(1 << 42)
    cuda.DeviceBuffer(1 << 20).close()


def test_a_gpu_there_is_not_is_told(place: Place) -> None:
    """The device is checked before anything is loaded."""
    path = place.models / "nowhere.flow"
    path.write_text('trt("mlp.onnx", batch=1..2) x1', "utf-8")
    with pytest.raises(FlowError, match=r"there is no gpu 99: this machine has [1-9]"):
        load(path, device="gpu:99", engines=place.engines)


def test_closing_an_app_gives_its_memory_back(place: Place, photos: list[bytes]) -> None:
    """Loading and closing again and again leaves neither GPU memory nor threads behind."""
    free: list[int] = []
    threads: list[int] = []
    for _ in range(5):
        with place.load(CELLS.format(1), "again") as app:
            app(photos[0])
        gc.collect()
        limit_s = time.monotonic() + 5
        while threads and threading.active_count() > threads[0] and time.monotonic() < limit_s:
            time.sleep(0.01)
        free.append(cuda.free_bytes())
        threads.append(threading.active_count())
    assert free[1] - free[-1] < 64 << 20
    assert threads[-1] <= threads[0]
