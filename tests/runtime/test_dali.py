"""Regions on DALI's CPU backend: the graph that runs on a GPU, against the reference operators."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowlang.diagnostics import BadRequest, EngineError
from flowlang.plan import graph
from flowlang.runtime import cuda, dali
from flowlang.runtime.dali import Decoding, Decodings, Region
from flowlang.runtime.gpu import _Batch, _Pictures
from flowlang.runtime.stage import InstanceLost
from flowlang.runtime.vision import as_bmp
from tests.pictures import encode, good, photograph, photographs
from tests.regions import (
    CHAINS,
    Chain,
    arrays,
    decodable,
    gpu_plan,
    in_dali,
    on_host,
    region_of,
    write_models,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("nvidia") is None
        or importlib.util.find_spec("nvidia.dali") is None,
        reason="NVIDIA DALI is not installed (pip install 'flowlang[gpu]')",
    ),
    # What DALI's own code warns of is not ours to mend.
    pytest.mark.filterwarnings("default"),
]

BATCH = 8
UNDECODED = ("tiff-1-bit",)  # refused by DALI itself, so a GPU instance decodes them on the host
ROUNDED = {"jpeg-cmyk": 1, "tiff-palette": 1}  # levels, from more than eight bits or three colours
Open = Callable[..., tuple[Region, list[Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def open_region(folder: Path) -> Iterator[Open]:
    """Builds a flow's region without a GPU, and gives it back with its operators."""
    opened: list[Region] = []

    def opener(text: str, batch: int = BATCH) -> tuple[Region, list[Any]]:
        nodes = region_of(text, folder)
        opened.append(Region(nodes, batch, None, Decoding(threads=1)))
        return opened[-1], nodes

    yield opener
    for region in opened:
        region.close()


def files() -> list[bytes]:
    """Photographs of several sizes and shapes, some of odd sides."""
    sizes = ((500, 375), (375, 500), (251, 127), (640, 427))
    return [photographs(1, *size, seed=seed)[0] for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.text)
def test_every_operator_agrees_with_its_reference(open_region: Open, chain: Chain) -> None:
    """DALI's results are those of the reference operators, within the operators' tolerances."""
    region, nodes = open_region(chain.text)
    given = files()
    chain.check(in_dali(region, given), [on_host(nodes, data) for data in given], jpeg=False)


# Sides that the shape decides end in a half here; in single precision the last three fall below.
HALVES = {
    "resize(224, fit=shorter)": ((448, 501), (449, 448), (898, 896), (192, 417), (387, 192)),
    "resize(h=100)": ((501, 200), (505, 200), (603, 200), (417, 192)),
    "resize(w=100)": ((200, 501), (200, 505), (200, 603), (192, 417)),
    "resize(320, fit=letterbox)": ((640, 425), (429, 640), (640, 1), (640, 481)),
    "resize(h=224, w=900, fit=pad)": ((448, 501), (417, 192), (423, 192), (405, 192)),
    "resize(224, fit=shorter) -> crop(224)": ((448, 501), (501, 448), (898, 896), (192, 417)),
}


@pytest.mark.parametrize("text", HALVES)
def test_a_side_that_ends_in_a_half_is_rounded_alike(open_region: Open, text: str) -> None:
    """DALI makes it as long as the reference does, upwards, and puts it in the same place."""
    region, nodes = open_region(f"decode -> {text} -> rgb")
    for size in HALVES[text]:
        data = encode(photograph("coffee.png").resize(size), "PNG")
        (got,) = in_dali(region, [data])
        wanted = on_host(nodes, data)
        assert got.shape == wanted.shape, size
        assert abs(got.astype(int) - wanted).max() <= 1, size


# Pictures in the way of a GPU instance, their region on DALI's CPU backend


@pytest.fixture
def open_pictures(folder: Path) -> Iterator[Callable[[str], _Pictures]]:
    """Builds what begins the batches of a flow's one stage."""
    opened: list[_Pictures] = []

    def opener(text: str) -> _Pictures:
        (stage,) = gpu_plan(text, folder).stages
        lane: Any = SimpleNamespace(
            resources=SimpleNamespace(decodings=Decodings()),
            context=SimpleNamespace(inputs={"data": None}, row_bytes={"data": 0}),
        )
        no_gpu: Any = None
        region = [node for node in stage.region if node.op != graph.PACK]
        opened.append(_Pictures(region, stage, no_gpu, lane))
        return opened[-1]

    yield opener
    for pictures in opened:
        pictures.close()


def flat(height: int, width: int, orientation: int = 1, form: str = "JPEG") -> bytes:
    """A picture of one colour, stored as height x width."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.new("RGB", (width, height), (90, 90, 90)), form, exif=exif)


TAKER = ' -> rgb -> trt("chw.onnx")'
LONG, TURNED, SHORT = flat(1, 9000), flat(1, 9000, orientation=6), flat(30, 40)


@pytest.mark.parametrize(
    ("region", "outcomes"),
    [
        ("resize(300, fit=shorter) -> crop(64)", (False, False, True)),
        ("resize(h=300) -> resize(64)", (False, True, True)),
        ("resize(w=300) -> resize(64)", (True, False, True)),
        ("rgb -> resize(w=300) -> bgr -> resize(64)", (True, False, True)),
        ("crop(h=1) -> resize(h=300) -> resize(64)", (False, True, True)),
        ("resize(64)", (True, True, True)),
    ],
)
def test_a_picture_that_would_explode_is_refused_before_its_region(
    open_pictures: Callable[[str], _Pictures], region: str, outcomes: Sequence[bool]
) -> None:
    """DALI has no limit of its own: the one is refused that would be too large, as it stands."""
    pictures = open_pictures(f"export flow f = decode -> {region}{TAKER}")
    batch = _Batch([LONG, TURNED, SHORT])
    pictures.begin(batch)
    assert [o is None for o in batch.outcomes] == list(outcomes)
    (run,) = batch.runs
    assert run.indices == [i for i, is_good in enumerate(outcomes) if is_good]
    for error in batch.outcomes:
        if error is not None:
            assert isinstance(error, BadRequest)
            assert error.stage == "resize"
            assert "resize failed: an image of" in error.message
            assert "of more than 67,108,864 pixels" in error.message
    run.region.result()


def test_every_format_is_refused_alike_where_it_would_explode(
    open_pictures: Callable[[str], _Pictures],
) -> None:
    """Not only the size of everyday JPEGs is looked at, and what is no picture is told as such."""
    pictures = open_pictures(f"export flow f = decode -> resize(w=300) -> crop(64){TAKER}")
    tall = [flat(9000, 1, form=form) for form in ("JPEG", "PNG", "BMP", "GIF")]
    batch = _Batch([*tall, b"nothing"])
    pictures.begin(batch)
    assert [o.stage for o in batch.outcomes] == ["resize"] * 4 + ["decode"]
    assert not batch.good


@pytest.mark.parametrize("name", good())
def test_every_format_is_decoded_alike(open_region: Open, name: str) -> None:
    """Every file that is handed to DALI shows what OpenCV sees in it, and so does every other."""
    region, nodes = open_region("decode -> rgb")
    data = good()[name].data
    if name in UNDECODED:
        with pytest.raises(RuntimeError):
            in_dali(region, [decodable(data)])
        data = as_bmp(data)
    (got,) = in_dali(region, [decodable(data)])
    wanted = on_host(nodes, data)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted.astype(np.float32), atol=ROUNDED.get(name, 0))


def test_a_picture_that_cannot_be_decoded_fails_its_batch_and_no_other(open_region: Open) -> None:
    """The batch raises RuntimeError, and what comes after it is right, a hundred times over."""
    region, nodes = open_region("decode -> resize(64) -> rgb")
    given = files()
    wanted = [on_host(nodes, data) for data in given]
    for turn in range(100):
        bad = given[turn % 4][: 300 + turn]
        with pytest.raises(RuntimeError, match=r"nvImageCodec|Failed to decode"):
            in_dali(region, [given[0], bad, given[1]])
        if turn % 10 == 0:
            for got, seen in zip(in_dali(region, given), wanted, strict=True):
                assert abs(got.astype(int) - seen).max() <= 1


def test_a_picture_smaller_than_its_crop_fails(open_region: Open) -> None:
    """Where the reference refuses a picture, DALI does not invent the pixels it lacks."""
    region, _ = open_region("decode -> crop(200) -> rgb")
    small = encode(photograph("coffee.png").resize((150, 220)), "PNG")
    with pytest.raises(RuntimeError):
        in_dali(region, [small])


def test_a_batch_may_be_of_any_size_up_to_the_most(open_region: Open) -> None:
    """One pipeline takes 1 to `batch` pictures in any order of sizes, and refuses more."""
    region, nodes = open_region("decode -> resize(h=40, w=60) -> rgb")
    given = files()
    for count in (1, 8, 3, 8, 2, 1, 5):
        batch = [given[(i + count) % 4] for i in range(count)]
        results = in_dali(region, batch)
        assert len(results) == count
        for data, got in zip(batch, results, strict=True):
            assert abs(got.astype(int) - on_host(nodes, data)).max() <= 1
    with pytest.raises(InstanceLost, match=r"batch.size"):
        in_dali(region, given * 3)


def test_a_result_stays_as_it_is_while_more_batches_run(open_region: Open) -> None:
    """What a batch gave is not overwritten by those behind it, as long as it is kept."""
    region, nodes = open_region("decode -> resize(64) -> rgb")
    given = files()
    kept = [(index, region.run([given[index], given[index - 1]])) for index in range(4)] * 2
    for _ in range(6):
        region.run(given)
    for index, result in kept:
        for row, source in enumerate((index, index - 1)):
            seen = np.asarray(result.as_tensor())[row]
            wanted = on_host(nodes, given[source])
            assert abs(seen.astype(int) - wanted).max() <= 1


def test_a_batch_is_begun_before_it_is_asked_for(open_region: Open) -> None:
    """`start` and `result` may stand apart; each result belongs to its own start."""
    region, nodes = open_region("decode -> resize(64) -> rgb")
    for data in files() * 2:
        region.start([data])
        (got,) = arrays(region.result())
        assert abs(got.astype(int) - on_host(nodes, data)).max() <= 1


def test_pictures_are_kept_until_dali_has_read_them(open_region: Open) -> None:
    """It reads them where they lie, those of a batch that failed too: no more than the last two."""
    region, _ = open_region("decode -> resize(64) -> rgb")
    good = files()[0]
    bad = [bytes([number]) * 5000 for number in range(4)]
    alone = [sys.getrefcount(picture) for picture in bad]

    def kept() -> list[int]:
        counts = [sys.getrefcount(picture) for picture in bad]
        return [number for number in range(4) if counts[number] > alone[number]]

    region.start([bad[0]])
    assert kept() == [0]
    with pytest.raises(RuntimeError):
        region.result()
    assert kept() == [0]
    for number in (1, 2, 3):
        with pytest.raises(RuntimeError):
            region.run([bad[number]])
    assert kept() == [2, 3]
    region.run([good])
    assert kept() == []


def test_a_region_that_took_half_a_batch_is_lost(open_region: Open) -> None:
    """What was fed and never run would be given to the next batch, and each gets another's."""
    region, _ = open_region("decode -> resize(64) -> rgb")

    def refuse() -> None:
        raise RuntimeError("Critical error in pipeline:\nwith this\n\nencountered:\n\nno memory\n")

    region._run = refuse
    with pytest.raises(InstanceLost, match=r"^DALI begins no batch: no memory$"):
        region.start(files())


def test_a_region_whose_result_nobody_took_is_lost(open_region: Open) -> None:
    """The next batch would be given it."""
    region, _ = open_region("decode -> resize(64) -> rgb")
    region.start(files()[:1])
    with pytest.raises(InstanceLost, match="a batch was begun whose pictures nobody took"):
        region.start(files()[1:2])


def test_pictures_that_cannot_be_handed_over_are_no_batch(open_region: Open) -> None:
    """Nothing was begun of them, so the region goes on."""
    region, _ = open_region("decode -> resize(64) -> rgb")
    nothing: Any = None
    with pytest.raises(TypeError):
        region.start([files()[0], nothing])
    assert len(region.run(files()[:2])) == 2


def test_a_gpu_that_dali_does_not_work_on_is_told(folder: Path) -> None:
    """What DALI fails at where no picture is at fault, at making a pipeline, is an EngineError."""
    nodes = region_of("decode -> resize(64) -> rgb", folder)
    with pytest.raises(EngineError, match=r"^DALI makes no pipeline: "):
        Region(nodes, 4, 99, Decoding())
    with pytest.raises(EngineError, match=r"^DALI makes no pipeline: "):
        dali.choose_decodings(99, 1, files())


def test_a_gpu_that_fails_at_being_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is what it fails at while it is seen what decodes fastest."""

    def fail(**given: object) -> Any:
        raise RuntimeError("Critical error\nencountered:\n\nno memory\n")

    monkeypatch.setattr(dali, "_decoder", lambda *given: SimpleNamespace(run=fail))
    with pytest.raises(EngineError, match=r"^DALI does not decode here: no memory$"):
        dali.choose_decodings(0, 1, files())


def test_the_reason_of_a_failure_is_told_without_its_traceback(open_region: Open) -> None:
    """DALI puts the pipeline's definition before what it met there."""
    region, _ = open_region("decode -> resize(64) -> rgb")
    with pytest.raises(RuntimeError) as caught:
        region.run([b"no picture"])
    assert dali.reason(caught.value).startswith("nvImageCodec failure")
    assert dali.reason(RuntimeError("short")) == "short"
    assert dali.reason(RuntimeError("")) == "no reason given"


class Warmed:
    """Pictures whose warming runs on the CPU: the sizes of the batches that each region had."""

    def __init__(self, pictures: _Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.copied: list[int] = []
        self.pictures, run = pictures, Region.run
        lane: Any = pictures.lane
        lane.stream = SimpleNamespace(handle=None, wait=lambda: None)
        pictures.row_bytes = 1
        pictures.target = SimpleNamespace(address=0)  # type: ignore[assignment]

        def running(region: Region, given: Sequence[bytes], stream: int | None = None) -> Any:
            self.sizes.append((region.batch, len(given)))
            return run(region, given, stream)

        def copy(target: int, source: int, size_bytes: int, stream: object) -> None:
            self.copied.append(size_bytes)

        monkeypatch.setattr(Region, "run", running)
        monkeypatch.setattr(cuda, "copy_on_device", copy)


def test_one_bad_picture_of_a_full_batch_takes_nobody_along(
    open_pictures: Callable[[str], _Pictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the process, which DALI alone would. All others are right, in rows of their own."""
    pictures = open_pictures('export flow f = decode -> resize(64) -> rgb -> trt("chw.onnx")')
    lane: Any = pictures.lane
    lane.stream = SimpleNamespace(handle=None, wait=lambda: None)
    rows = np.zeros((56, 64 * 64 * 3), np.uint8)
    pictures.row_bytes = rows.shape[1]
    pictures.target = SimpleNamespace(address=rows.ctypes.data)  # type: ignore[assignment]

    def copy(target: int, source: int, size_bytes: int, stream: object) -> None:
        ctypes.memmove(target, source, size_bytes)

    monkeypatch.setattr(cuda, "copy_on_device", copy)
    nodes = pictures.nodes
    given = photographs(8)
    wanted = {data: on_host(nodes, data).ravel().astype(int) for data in given}
    tiff = good()["tiff-1-bit"].data
    wanted[tiff] = on_host(nodes, tiff).ravel().astype(int)
    with ThreadPoolExecutor(4) as rescuers:
        lane.resources.rescuers = rescuers
        for count in (56, 56, 33, 29, 28, 9, 8, 56):
            for at in (0, count // 2, count - 1):
                values = [given[(index + at) % 8] for index in range(count)]
                values[at] = tiff  # which DALI refuses, and a host decodes
                values[at - 1] = b"no picture"
                batch = _Batch(values)
                pictures.begin(batch)
                pictures.load(batch)
                left = [index for index in range(count) if index != (at - 1) % count]
                assert sorted(batch.good) == left
                assert [i for i, o in enumerate(batch.outcomes) if o is not None] == [
                    (at - 1) % count
                ]
                for row, index in enumerate(batch.good):
                    assert abs(rows[row] - wanted[values[index]]).max() <= 1


def test_each_region_decodes_a_full_batch_first(
    open_pictures: Callable[[str], _Pictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG decoder stays as it set itself up for its first batch: small ones have their own."""
    text = 'export flow f = decode -> resize(64) -> rgb -> trt("chw.onnx", batch=1..{})'
    warmed = Warmed(open_pictures(text.format(12)), monkeypatch)
    warmed.pictures.warm()
    assert warmed.sizes == [(12, 12), (12, 1), (8, 8), (8, 1)]
    assert warmed.copied == [12, 1, 8, 1]
    few = Warmed(open_pictures(text.format(4)), monkeypatch)
    few.pictures.warm()
    assert few.sizes == [(4, 4), (4, 1)]
    many = Warmed(open_pictures(text.format(56)), monkeypatch)
    many.pictures.warm()
    assert many.sizes == [(28, 28), (28, 1), (28, 28), (28, 1), (8, 8), (8, 1)]


def test_a_gpu_that_does_not_decode_is_told_before_the_first_request(
    open_pictures: Callable[[str], _Pictures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where DALI fails on good pictures nothing starts; where a region refuses them, it does."""
    refusing = Warmed(
        open_pictures(f"export flow f = decode -> crop(640) -> resize(64){TAKER}"), monkeypatch
    )
    refusing.pictures.warm()
    assert len(refusing.sizes) == 6
    assert not refusing.copied
    failing = Warmed(open_pictures(f"export flow f = decode -> resize(64){TAKER}"), monkeypatch)

    def fail(stream: object) -> Any:
        raise RuntimeError("no memory")

    failing.pictures.large[0]._outputs = fail
    with pytest.raises(EngineError, match="DALI does not decode here: no memory"):
        failing.pictures.warm()
