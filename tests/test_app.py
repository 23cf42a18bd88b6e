"""The Python face, from a flow file on disk to answers by every road."""

from __future__ import annotations

import asyncio
import base64
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import flowlang
from examples import models
from flowlang import (
    App,
    BadRequest,
    CompileError,
    DeadlineExceeded,
    Draining,
    FlowError,
    Overloaded,
    StageFailed,
    load,
)
from flowlang.runtime import seal
from flowlang.runtime.request import Request, Wake
from flowlang.window import LotReply
from tests.pictures import blurred_noise
from tests.waiting import eventually

Array: TypeAlias = NDArray[Any]

CLASSIFY = 'decode -> resize(16) -> rgb -> normalize(imagenet) -> trt("net.onnx", batch=1..4) x2'
PATIENT = CLASSIFY.replace("1..4) x2", "2..2, wait=100s) x1")  # a lone request waits for another
TWO = """
    flow small = resize(16) -> rgb -> normalize(imagenet)
    flow net = trt("net.onnx", batch=1..4) x2
    ## The best three classes.
    export flow classify = decode -> small -> net -> top(3, names="names.txt")
    export flow describe = decode -> small -> { classes: net -> softmax, best: net -> best }
    """


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.resnet(root / "net.onnx", width=8, classes=10, size=16)
    models.two_heads(root / "heads.onnx", size=16)
    models.two_inputs(root / "pair.onnx", size=16)
    models.identity(root / "same.onnx", ("N", 3))
    models.labels(root / "names.txt", 10)
    return root


@pytest.fixture
def open_app(folder: Path) -> Iterator[Callable[..., App]]:
    """Loads flow texts as files beside the models, and closes the apps again."""
    apps: list[App] = []

    def opener(text: str, **options: Any) -> App:
        path = folder / "app.flow"
        path.write_text(text, "utf-8")
        apps.append(load(path, device="cpu", **options))
        return apps[-1]

    yield opener
    for app in apps:
        app.close()


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[App]:
    """The app of two flows that most tests call."""
    path = folder / "two.flow"
    path.write_text(TWO, "utf-8")
    with load(path, device="cpu") as opened:
        yield opened


PICTURES = [blurred_noise(seed, 48, 64) for seed in range(12)]


def prepared(data: bytes) -> Array:
    """What a network should see of a picture: imagenet's mean and std, 3x16x16."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    rgb = cv2.resize(image, (16, 16), interpolation=cv2.INTER_LINEAR)[:, :, ::-1]
    mean, std = np.asarray([123.675, 116.28, 103.53]), np.asarray([58.395, 57.12, 57.375])
    return np.ascontiguousarray(((rgb - mean) / std).transpose(2, 0, 1), np.float32)


@pytest.fixture(scope="module")
def logits(folder: Path) -> dict[bytes, Array]:
    """What the network says of the pictures, by OpenCV, numpy and ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(
        str(folder / "net.onnx"), providers=["CPUExecutionProvider"]
    )
    feeds = {"data": np.stack([prepared(p) for p in PICTURES])}
    return dict(zip(PICTURES, session.run(None, feeds)[0], strict=True))


def softmax(values: Array) -> Array:
    shares = np.exp(values - values.max())
    return np.asarray(shares / shares.sum())


def test_a_call_answers_like_the_libraries_below(
    open_app: Callable[..., App], logits: dict[bytes, Array]
) -> None:
    """The smallest program gives what OpenCV and ONNX Runtime give by themselves."""
    app = open_app(CLASSIFY)
    for data in PICTURES[:4]:
        np.testing.assert_allclose(app(data), logits[data], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(app(bytearray(PICTURES[0])), app(memoryview(PICTURES[0])))


def test_a_record_joins_what_its_branches_answer(app: App, logits: dict[bytes, Array]) -> None:
    """Fan-out and fan-in: each field holds its branch's answer for the same picture."""
    futures = [app["describe"].submit(data) for data in PICTURES]
    for data, future in zip(PICTURES, futures, strict=True):
        answer = future.result()
        assert list(answer) == ["classes", "best"]
        np.testing.assert_allclose(answer["classes"], softmax(logits[data]), rtol=1e-3, atol=1e-3)
        index = int(logits[data].argmax())
        assert answer["best"]["index"] == index
        assert answer["best"]["score"] == pytest.approx(float(logits[data][index]), rel=1e-3)


def test_every_road_gives_the_same_answer(app: App, logits: dict[bytes, Array]) -> None:
    """Call, submit, await and map agree, alone and many at once."""
    flow = app["classify"]
    wanted = [
        [f"class {index}" for index in np.argsort(-logits[data])[:3].tolist()] for data in PICTURES
    ]

    def names(answers: Any) -> list[list[str]]:
        return [[label["label"] for label in answer] for answer in answers]

    async def gather() -> list[Any]:
        return await asyncio.gather(*(flow.acall(data) for data in PICTURES))

    assert names(flow(data) for data in PICTURES) == wanted
    assert names(f.result() for f in [flow.submit(data) for data in PICTURES]) == wanted
    assert names(asyncio.run(gather())) == wanted
    assert names(flow.map(PICTURES)) == wanted
    assert names(flow.map(iter(PICTURES), ahead=1)) == wanted


def test_two_flows_may_feed_one_network_differently(
    open_app: Callable[..., App], folder: Path
) -> None:
    """A network shared by two flows sees of each picture what that very flow makes of it."""
    app = open_app("""
        flow net = trt("heads.onnx")
        export flow scaled = decode -> resize(16) -> rgb -> normalize(imagenet) -> net -> .scores
        export flow raw = decode -> resize(16) -> rgb -> net -> .scores
        """)
    session = onnxruntime.InferenceSession(
        str(folder / "heads.onnx"), providers=["CPUExecutionProvider"]
    )
    image = cv2.imdecode(np.frombuffer(PICTURES[0], np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    rgb = cv2.resize(image, (16, 16))[:, :, ::-1].transpose(2, 0, 1)
    inputs = {"scaled": prepared(PICTURES[0]), "raw": np.ascontiguousarray(rgb, np.float32)}
    for name, seen in inputs.items():
        wanted = session.run(["scores"], {"data": seen[None]})[0][0]
        np.testing.assert_allclose(app[name](PICTURES[0]), wanted, rtol=1e-3, atol=1e-3)


def test_two_flows_may_bring_colours_in_different_orders(
    open_app: Callable[..., App], folder: Path
) -> None:
    """A shared `rgb` swaps channels for the flow that brings blue first, and for no other."""
    app = open_app("""
        flow net = rgb -> normalize(imagenet) -> trt("heads.onnx")
        export flow once = decode -> resize(16) -> net -> .scores
        export flow twice = decode -> resize(16) -> rgb -> net -> .scores
        """)
    np.testing.assert_allclose(app["once"](PICTURES[1]), app["twice"](PICTURES[1]), rtol=1e-4)


def test_a_model_of_two_inputs_takes_a_record(open_app: Callable[..., App], folder: Path) -> None:
    """A record arrives as a mapping, and its fields are fed to the inputs of their names."""
    app = open_app("""
        export flow f: { picture: bytes, features: tensor<f32, 8> } -> tensor<f32, 10> =
          { image: .picture -> decode -> resize(16) -> rgb -> normalize(imagenet),
            features: .features } -> trt("pair.onnx", batch=1..4)
        """)
    features = np.random.default_rng(0).random((3, 8), np.float32)
    session = onnxruntime.InferenceSession(
        str(folder / "pair.onnx"), providers=["CPUExecutionProvider"]
    )
    images = np.stack([prepared(p) for p in PICTURES[:3]])
    wanted = session.run(None, {"image": images, "features": features})[0]
    items = [{"picture": p, "features": f} for p, f in zip(PICTURES[:3], features, strict=True)]
    for got, row in zip(app.map(items), wanted, strict=True):
        np.testing.assert_allclose(got, row, rtol=1e-3, atol=1e-3)
    for wrong in (b"bytes", {"picture": PICTURES[0]}, {**items[0], "more": 1}):
        with pytest.raises(BadRequest, match="a record with the fields picture, features"):
            app(wrong)


def test_map_keeps_order_and_looks_ahead_no_further_than_told(app: App) -> None:
    """At most `ahead` items are under way, so an endless iterable is read only as needed."""
    taken = itertools.count(1)
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        for data in itertools.cycle(PICTURES):
            read = next(taken)
            yield data

    flow = app["describe"]
    answers = flow.map(endless(), ahead=4)
    assert read == 0
    for number in range(1, 30):
        answer = next(answers)
        assert number <= read <= number + 4
        alone = flow(PICTURES[(number - 1) % len(PICTURES)])
        assert answer["best"]["index"] == alone["best"]["index"]
    answers.close()  # type: ignore[attr-defined]


def test_map_that_is_abandoned_takes_its_requests_back(open_app: Callable[..., App]) -> None:
    """Closing the iterator early, or an error raised by it, leaves nothing in the queue."""
    app = open_app(PATIENT)
    answers = app.map(iter(PICTURES), ahead=3)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert app.scheduler.outstanding == 0
    with pytest.raises(BadRequest):
        list(app.map([*PICTURES[:2], b"", PICTURES[3], PICTURES[4]], ahead=20))
    assert app.scheduler.outstanding == 0


@pytest.mark.parametrize("kind", [list, iter])
def test_map_is_collected_in_a_lane(open_app: Callable[..., App], kind: Callable[..., Any]) -> None:
    """The garbage collector runs in any thread, also in one that holds the scheduler's lock."""
    app = open_app(PATIENT)
    answers = app.map(kind(PICTURES), ahead=3)
    next(answers)
    with app.scheduler._lock:
        answers.close()  # type: ignore[attr-defined]
    assert eventually(lambda: app.scheduler.outstanding == 0)
    assert len(list(app.map(PICTURES[:2]))) == 2


def test_map_gives_what_is_there_before_it_asks_for_more(open_app: Callable[..., App]) -> None:
    """An answer does not wait for `ahead` more items: they may come from a slow camera."""
    app = open_app(CLASSIFY)
    answers: list[Any] = []
    seen: list[int] = []

    def source() -> Iterator[bytes]:
        for number in range(3):
            seen.append(len(answers))
            yield PICTURES[number]
            while app.scheduler.outstanding:
                time.sleep(0.001)

    for answer in app.map(source()):
        answers.append(answer)  # noqa: PERF402 - the source looks at them
    assert len(answers) == 3
    assert seen == [0, 0, 1]


def test_map_gives_errors_in_place_where_asked_to(app: App) -> None:
    """With errors="return" a bad item costs nobody but itself; without, it ends the iteration."""
    items = [PICTURES[0], b"no picture", 17, PICTURES[1]]
    first, second, third, fourth = app["classify"].map(items, errors="return")
    assert len(first) == len(fourth) == 3
    assert isinstance(second, BadRequest)
    assert isinstance(third, BadRequest)
    answers = app["classify"].map(items)
    assert len(next(answers)) == 3
    with pytest.raises(BadRequest, match="decode failed"):
        next(answers)


def test_map_goes_on_where_an_answer_is_seen_before_it_is_told(
    open_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane may be put aside between the two: what is left has its turn when it goes on."""
    app = open_app("export flow f = decode -> resize(16)")
    gate = threading.Event()
    settle, submit_many = LotReply.settle, app.scheduler.submit_many

    def settle_late(self: LotReply, request: Request) -> Wake:
        assert gate.wait(20.0)
        return settle(self, request)

    def submit_and_wait(*args: Any) -> list[Request]:
        requests = submit_many(*args)
        while not all(request.is_answered for request in requests):
            time.sleep(0.001)
        return requests

    monkeypatch.setattr(LotReply, "settle", settle_late)
    monkeypatch.setattr(app.scheduler, "submit_many", submit_and_wait)
    answers = app.map(iter(PICTURES[:4]), ahead=1)
    next(answers)
    threading.Timer(0.1, gate.set).start()
    assert len(list(answers)) == 3


@pytest.mark.parametrize("ahead", [0, -1])
def test_map_needs_something_under_way(app: App, ahead: int) -> None:
    """To look ahead no further than nothing would give no answers."""
    with pytest.raises(BadRequest, match=f"`ahead` is 1 or more, not {ahead}"):
        list(app["classify"].map(PICTURES, ahead=ahead))


def test_map_takes_turns_where_the_queue_is_full(open_app: Callable[..., App]) -> None:
    """More items ahead than a flow may hold are not an error: map waits for its own answers."""
    app = open_app(f"export flow f = {CLASSIFY}\nschedule {{ f(queue=1) }}")
    assert len(list(app.map(PICTURES * 4, ahead=100))) == 48
    readers = [Future[int]() for _ in range(3)]
    threads = [
        threading.Thread(
            target=lambda r=r: r.set_result(len(list(app.map(PICTURES * 2, ahead=50))))
        )
        for r in readers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [r.result(0) for r in readers] == [24] * 3


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("cat.jpg", "takes bytes, not str; read the file first"),
        (Path("cat.jpg"), "takes bytes, not .*Path; read the file first"),
        (None, "takes bytes, not null"),
        (np.zeros(3, np.uint8), "takes bytes, not an array of uint8"),
        (7, "takes bytes, not int"),
    ],
)
def test_what_is_no_bytes_is_refused_at_the_door(app: App, item: Any, message: str) -> None:
    """Whatever is not bytes is a BadRequest at once, by every road, and enters no queue."""
    flow = app["classify"]
    with pytest.raises(BadRequest, match=message):
        flow(item)
    with pytest.raises(BadRequest, match=message):
        flow.submit(item)
    with pytest.raises(BadRequest, match=message):
        asyncio.run(flow.acall(item))
    assert app.scheduler.outstanding == 0


def test_tensors_are_held_against_their_type(open_app: Callable[..., App]) -> None:
    """An array of another dtype or shape, or nothing like an array, is a BadRequest."""
    app = open_app('export flow f = trt("same.onnx", batch=1..4)')
    wanted = np.asarray([1, 2, 3], np.float32)
    for good in (wanted, [1, 2, 3], (1.0, 2.0, 3.0), np.asarray([3, 2, 1], np.float32)[::-1]):
        np.testing.assert_array_equal(app(good), wanted)
    for wrong in (
        wanted.astype(np.float64),
        wanted.astype(">f4"),
        wanted[:2],
        wanted[None],
        "abc",
        [[1, 2], [3]],
        None,
        object(),
        {"data": wanted},
        b"123",
    ):
        with pytest.raises(BadRequest, match="this flow takes tensor<f32, 3>"):
            app(wrong)


def test_images_are_held_against_their_type(open_app: Callable[..., App]) -> None:
    """A flow that starts from an image takes arrays of 8-bit levels, height x width x 3."""
    app = open_app("export flow f: image<rgb, u8> -> image<gray, u8> = gray -> resize(h=3, w=5)")
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    gray = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (5, 3))
    np.testing.assert_array_equal(app(image), gray)
    for wrong in (image.astype(np.float32), image[:, :, 0], image[None], image[:, :, :2], b"bytes"):
        with pytest.raises(BadRequest):
            app(wrong)


@pytest.mark.parametrize("wrong", [300, -1, 1.5, "x"])
def test_levels_that_would_change_are_refused(open_app: Callable[..., App], wrong: Any) -> None:
    """Lists become images only where every number is a level; none is wrapped or cut."""
    app = open_app("export flow f: image<rgb, u8> -> image<gray, u8> = gray")
    assert app([[[255, 255, 255]]]).tolist() == [[255]]
    with pytest.raises(BadRequest, match="this flow takes image<rgb, u8, hwc>"):
        app([[[wrong, 0, 0]]])


@pytest.mark.parametrize(
    ("kind", "good", "wrong"),
    [
        ("int", 3, ("3", 3.5, None, b"3", True)),
        ("float", 0.5, ("0.5", None)),
        ("str", "text", (b"text", 3)),
        ("bool", True, (1, "true")),
    ],
)
def test_plain_values_are_held_against_their_type(
    open_app: Callable[..., App], kind: str, good: Any, wrong: tuple[Any, ...]
) -> None:
    """A flow declared to take a number or a text takes nothing else."""
    app = open_app(f"export flow f: {{ x: {kind} }} -> {kind} = .x")
    assert app({"x": good}) == good
    for item in wrong:
        with pytest.raises(BadRequest, match=f"takes {kind}"):
            app({"x": item})


def test_a_flow_without_any_stage_answers(open_app: Callable[..., App]) -> None:
    """Rearranging a record takes no instance, however often it is asked for."""
    app = open_app(
        "export flow f: { x: int, y: int } -> { a: int, b: int } = { a: .y, b: .x }\n"
        "export flow g: { x: int, y: int } -> { x: int, y: int } { return in }\n"
        "schedule { f(queue=3) g(queue=3) }"
    )
    for number in range(20):
        item = {"x": number, "y": -number}
        assert app["f"](item) == {"a": -number, "b": number}
        assert app["g"](item) == item


def test_errors_name_the_operator_and_its_place(app: App, folder: Path) -> None:
    """A failure while serving tells what failed and where in the flow it stands."""
    with pytest.raises(BadRequest) as caught:
        app["classify"](PICTURES[0][:-300])
    path = folder / "two.flow"
    assert str(caught.value).startswith("decode failed: the file ends before its picture")
    assert str(caught.value).endswith(f"({path}:5:28)")
    assert caught.value.stage == "decode"


def test_one_of_several_flows_is_picked_by_name(app: App) -> None:
    """An app of several flows wants a name, and tells those there are."""
    for call in (app, app.submit, lambda item: list(app.map([item]))):
        with pytest.raises(FlowError, match="name one of them: `classify`, `describe`"):
            call(PICTURES[0])
    with pytest.raises(
        FlowError, match="there is no flow `classfy`; there is `classify`, `describe`"
    ):
        app["classfy"]
    assert list(app.flows) == ["classify", "describe"]
    assert app["classify"].doc == "The best three classes."
    assert repr(app["classify"]) == "<flow classify: bytes -> list<label>>"


def test_a_file_that_does_not_check_is_told_in_full(folder: Path) -> None:
    """Loading raises every error of the file, with place, caret and help."""
    path = folder / "wrong.flow"
    path.write_text('flow a = decode -> resise(224)\nexport flow b = trt("none.onnx")\n', "utf-8")
    with pytest.raises(CompileError) as caught:
        load(path, device="cpu")
    slugs = [d.slug for d in caught.value.diagnostics]
    assert slugs == ["unknown-operator", "missing-file"]
    text = str(caught.value)
    assert "error[unknown-operator]: there is no operator or flow named `resise`" in text
    assert f" --> {path}:1:20" in text
    assert "did you mean `resize`?" in text
    assert [d.slug for d in flowlang.check(path)] == slugs
    with pytest.raises(OSError, match="absent"):
        load(folder / "absent.flow")


def test_engines_of_an_encrypted_model_are_encrypted_wherever_the_key_is_from(
    folder: Path, open_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's key, too, which opens the model; plain models have plain engines."""
    text = base64.b64encode(bytes(range(32))).decode()
    plain = (folder / "same.onnx").read_bytes()
    sealed = seal.seal(plain, seal.read_key(text), header=seal.MODEL_HEADER)
    (folder / "same.onnx.encrypted").write_bytes(sealed)
    monkeypatch.setenv("FLOWLANG_KEY", text)
    assert open_app('trt("same.onnx")')._instances._key is None
    for options in ({}, {"key": text}):
        key = open_app('trt("same.onnx.encrypted")', **options)._instances._key
        assert key is not None
        assert key.secret == bytes(range(32))


def test_params_and_schedules_are_chosen_at_loading(open_app: Callable[..., App]) -> None:
    """`values` overrides params as `--set` does, and `schedule` picks a named one."""
    text = """
        param k: int = 2
        export flow f = trt("same.onnx") -> top(k)
        schedule { f(queue=7) }
        schedule small { f(queue=1) }"""
    item = np.asarray([3, 2, 1], np.float32)
    assert len(open_app(text)(item)) == 2
    app = open_app(text, values={"k": 3}, schedule="small")
    assert len(app(item)) == 3
    assert app.physical.programs[0].queue == 1
    with pytest.raises(CompileError, match="k"):
        open_app(text, values={"k": "many"})


def test_an_unknown_device_is_told(folder: Path) -> None:
    """A device that does not exist is an error with the devices there can be."""
    with pytest.raises(FlowError, match="`tpu`"):
        load(folder / "two.flow", device="tpu")


def test_a_closed_app_answers_nobody(open_app: Callable[..., App]) -> None:
    """After closing, every road raises Draining; closing again does nothing."""
    app = open_app(CLASSIFY)
    assert app.close() is True
    for _ in range(2):
        with pytest.raises(Draining):
            app(PICTURES[0])
        with pytest.raises(Draining):
            app.submit(PICTURES[0])
        with pytest.raises(Draining):
            asyncio.run(app.acall(PICTURES[0]))
        with pytest.raises(Draining):
            list(app.map(PICTURES))
        assert app.close() is True


def test_leaving_the_block_closes_the_app(folder: Path) -> None:
    """As a context manager an app finishes what it took in, and ends its threads."""
    path = folder / "block.flow"
    path.write_text(CLASSIFY, "utf-8")
    before = threading.active_count()
    with load(path, device="cpu") as app:
        futures = [app.submit(data) for data in PICTURES]
        assert threading.active_count() > before
    assert all(f.done() and f.exception() is None for f in futures)
    with pytest.raises(Draining):
        app(PICTURES[0])
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError), load(path, device="cpu") as app:
        raise ZeroDivisionError
    with pytest.raises(Draining):
        app(PICTURES[0])


def test_an_app_that_is_dropped_ends_wherever_the_collector_runs(folder: Path) -> None:
    """Also in a lane that has the lock of the scheduler, and without anybody waiting for it."""
    path = folder / "dropped.flow"
    path.write_text(CLASSIFY, "utf-8")
    apps = [load(path, device="cpu")]
    scheduler, threads = apps[0].scheduler, [*apps[0]._lanes, apps[0]._watch]
    assert len(apps[0](PICTURES[0])) == 10

    def drop() -> None:
        with scheduler._lock:
            apps.clear()
            gc.collect()

    dropping = threading.Thread(target=drop, daemon=True)
    dropping.start()
    dropping.join(20.0)
    assert not dropping.is_alive()
    for thread in threads:
        thread.join(20.0)
        assert not thread.is_alive()


def test_a_callback_may_close_the_app(open_app: Callable[..., App]) -> None:
    """It runs in a lane, or in the watch where the deadline has passed, which cannot end itself."""
    for deadline_s, flow in ((None, CLASSIFY), (0.05, PATIENT)):
        app = open_app(flow)
        closed: Future[bool] = Future()
        answer = app.submit(PICTURES[0], deadline_s=deadline_s)
        answer.add_done_callback(lambda _, app=app, to=closed: to.set_result(app.close(20.0)))  # type: ignore[misc]
        assert closed.result(30.0) is True
        for thread in (*app._lanes, app._watch):
            thread.join(20.0)
            assert not thread.is_alive()
        assert app.close() is True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process cannot be forked here")
def test_a_fork_is_told_that_it_has_no_lanes(folder: Path) -> None:
    """Nobody would answer in a child process: it says so at once, and the parent goes on."""
    path = folder / "forked.flow"
    path.write_text(CLASSIFY, "utf-8")
    code = f"""
import os, sys
import flowlang
def refused(call):
    try:
        call()
    except flowlang.FlowError as error:
        return "load them in this process" in str(error)
app = flowlang.load({str(path)!r}, device="cpu")
picture = {PICTURES[0]!r}
app(picture)
app.scheduler._lock.acquire()
child = os.fork()
if not child:
    calls = (lambda: app(picture), lambda: app.submit(picture), lambda: list(app.map([picture])))
    os._exit(0 if all(map(refused, calls)) and app.close() else 3)  # as multiprocessing does
app.scheduler._lock.release()
_, status = os.waitpid(child, 0)
assert len(app(picture)) == 10
sys.exit(os.waitstatus_to_exitcode(status))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_app_that_cannot_start_leaves_nothing_behind(
    open_app: Callable[..., App], folder: Path
) -> None:
    """A model that fails its trial run is an error of `load`, and no thread is left."""
    data = (folder / "same.onnx").read_bytes()
    (folder / "broken.onnx").write_bytes(data.replace(b"Identity", b"Identitx"))
    before = threading.active_count()
    with pytest.raises(flowlang.EngineError, match=r"cannot load `broken\.onnx`"):
        open_app('flow a = trt("broken.onnx") x2\nexport flow f = trt("same.onnx") -> a')
    assert threading.active_count() == before


def test_deadlines_and_full_queues_reach_the_caller(open_app: Callable[..., App]) -> None:
    """A flow's `slo` is every request's deadline unless the call names another."""
    app = open_app(f"""
        export flow f = {PATIENT}
        schedule {{ f(slo=50ms, queue=1) }}""")
    with pytest.raises(DeadlineExceeded, match="not answered by its deadline"):
        app(PICTURES[0])
    with pytest.raises(DeadlineExceeded, match="not answered by its deadline"):
        app(PICTURES[0], deadline_s=0.02)
    waiting = [app.submit(PICTURES[0], deadline_s=100.0)]
    assert len(app.submit(PICTURES[1], deadline_s=100.0).result()) == 10
    assert len(waiting[0].result()) == 10
    entrance = app.scheduler.entrances["f"]
    assert entrance.limit == 3
    assert entrance.outstanding == 0


def test_an_overloaded_app_refuses(open_app: Callable[..., App]) -> None:
    """What comes on top of a full queue is refused at once, and the rest is answered."""
    app = open_app(f"export flow f = {CLASSIFY}\nschedule {{ f(queue=1) }}")
    accepted: list[Future[Any]] = []
    refused = 0
    for data in PICTURES * 10:
        try:
            accepted.append(app.submit(data))
        except Overloaded:
            refused += 1
    assert refused
    assert Overloaded.http_status == 429
    assert all(len(f.result()) == 10 for f in accepted)


def test_a_failing_item_is_a_stage_failure_with_a_cause(open_app: Callable[..., App]) -> None:
    """An operator that cannot work on an item is a StageFailed, and the app goes on."""
    app = open_app('export flow f: tensor<f32, ?x?> -> str = ctc("names.txt")')
    with pytest.raises(StageFailed, match="ctc failed: the model knows 12 classes") as caught:
        app(np.eye(12, dtype=np.float32))
    assert caught.value.http_status == 500
    assert app(np.eye(11, dtype=np.float32)[[3, 3, 0, 1]]) == "class 2class 0"


@pytest.mark.parametrize(
    "flow",
    [
        "list<float> { return [1] -> map(pass / k) }",
        "list<int> { return [1] -> filter(pass / k > 1) }",
        "float = decode -> .width / k",
    ],
)
def test_a_division_by_zero_is_told_in_words(open_app: Callable[..., App], flow: str) -> None:
    """Not by the name of an exception."""
    app = open_app(f"export flow f(k: int): bytes -> {flow}")
    with pytest.raises(StageFailed) as caught:
        app(PICTURES[0], k=0)
    assert caught.value.message.endswith(" failed: division by zero")


def test_importing_flowlang_costs_nothing() -> None:
    """The package brings in none of what it runs on before it is asked to."""
    code = (
        "import sys, flowlang; flowlang.BadRequest; "
        "heavy = {'numpy', 'cv2', 'onnx', 'onnxruntime', 'rich'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Several files


def test_flows_of_several_files_are_one_app(folder: Path, logits: dict[bytes, Array]) -> None:
    """What two files ask of one model is batched together, and each gets its own answer."""
    net = 'trt("net.onnx", batch=1..64, wait=60s) x1'
    start = f"decode -> resize(16) -> rgb -> normalize(imagenet) -> {net}"
    for name, end in (("first", "best"), ("second", "top(2)")):
        (folder / f"{name}.flow").write_text(f"export flow {name} = {start} -> {end}", "utf-8")
    # Either alone would wait a minute for the rest of its batch.
    with load(folder / "first.flow", folder / "second.flow", device="cpu") as app:
        asked = [(n, p) for n in ("first", "second") for p in (PICTURES * 3)[:32]]
        found = [app[name].submit(picture) for name, picture in asked]
        for (name, picture), future in zip(asked, found, strict=True):
            answer = future.result(30)
            best = answer if name == "first" else answer[0]
            assert best["index"] == int(np.argmax(logits[picture])), name
        assert app.scheduler.stages[0].counts.sizes == {64: 1}
