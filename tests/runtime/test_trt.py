"""What an engine is built from, as far as it can be told without TensorRT."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from examples import models
from flowlang.diagnostics import EngineError, Source
from flowlang.plan.check import compile_source
from flowlang.plan.onnx import read_model
from flowlang.plan.physical import Machine, lower
from flowlang.runtime import cuda, dali, trt
from flowlang.runtime.build import build_engines
from flowlang.runtime.cuda import Gpu
from flowlang.runtime.engine_store import EngineKey, EngineStore
from flowlang.runtime.gpu import decodings_of
from flowlang.runtime.trt import EngineSpec
from tests.standins import furnish
from tests.waiting import LONG_S

if TYPE_CHECKING:
    from flowlang.runtime.cuda import Stream

HOME = ("GetCurrent", "PushCurrent_v2", "PopCurrent_v2")  # of the driver, to have one current
GPU = Gpu(0, "NVIDIA H200", "9.0", "13.0")


@pytest.mark.parametrize(
    ("batch", "profiles"),
    [
        ((1, 64, 64), ((1, 4, 8), (1, 64, 64))),
        ((1, 16, 64), ((1, 4, 8), (1, 16, 64))),
        ((4, 32, 32), ((4, 4, 8), (4, 32, 32))),
        ((1, 8, 8), ((1, 8, 8),)),
        ((1, 4, 64), ((1, 4, 64),)),
        ((16, 32, 32), ((16, 32, 32),)),
        ((64, 64, 64), ((64, 64, 64),)),
    ],
)
def test_small_batches_have_a_profile_of_their_own(
    batch: tuple[int, int, int], profiles: tuple[tuple[int, int, int], ...]
) -> None:
    """An engine made for large batches is tuned for small ones too, if it may get any."""
    spec = EngineSpec(Path("model.onnx"), "fp16", batch, None)
    assert spec.profiles == profiles
    assert spec.profiles[-1] == batch


def digest(path: Path) -> str:
    spec = EngineSpec(path, "fp16", (1, 8, 8), None, weights=read_model(path).weights)
    return spec.key(GPU).digest


def test_an_engine_belongs_to_weights_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in a file beside the model that change make it another model, as any would."""
    monkeypatch.setattr(trt, "_trt", lambda: SimpleNamespace(__version__="10.0"))
    path, beside = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    model = onnx.load(str(models.two_heads(tmp_path / "inside.onnx", size=8)))
    onnx.save_model(model, path, save_as_external_data=True, location=beside.name, size_threshold=0)
    before, content = digest(path), beside.read_bytes()
    beside.write_bytes(bytes(len(content)))
    os.utime(beside, ns=(1, 1))
    assert digest(path) != before
    beside.write_bytes(content)
    os.utime(beside, ns=(2, 2))
    assert digest(path) == before
    beside.unlink()
    with pytest.raises(EngineError, match=r"`m.onnx` cannot be read: .*m.onnx.data"):
        digest(path)


def write(path: Path, nodes: list[onnx.NodeProto], *weights: onnx.TensorProto) -> EngineSpec:
    """What an engine is built from, of a model from `x` to `y`."""
    ports = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in "xy"]
    made = helper.make_graph(nodes, "made", ports[:1], ports[1:], weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)]), path)
    return EngineSpec(path, "fp32", (1, 1, 1), None)


def test_a_weakly_typed_network_is_permitted_what_its_graph_says(tmp_path: Path) -> None:
    """TensorRT 8.6 refuses a quantized graph where it may not compute in int8, whatever is asked;
    a strongly typed network needs no leave.
    """
    step = numpy_helper.from_array(np.asarray(0.1, np.float32), "step")
    zero = numpy_helper.from_array(np.asarray(0, np.int8), "zero")
    spec = write(
        tmp_path / "quantized.onnx",
        [
            helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
        ],
        step,
        zero,
    )
    wanted = {"fp32": {"INT8"}, "fp16": {"FP16", "INT8"}, "int8": {"FP16", "INT8"}}
    for precision, permitted in wanted.items():
        asked = dataclasses.replace(spec, precision=precision)
        assert trt._reworked(asked, False)[1] == permitted
        assert trt._reworked(asked, True)[1] == set()
    plain = write(tmp_path / "plain.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    assert trt._reworked(plain, False)[1] == set()


def test_a_graph_that_cannot_be_made_half_is_told(tmp_path: Path) -> None:
    """Names that its converter takes for itself, say: that is an EngineError with the file's."""
    nodes = [
        helper.make_node("Relu", ["x"], ["graph_output_cast_0"]),
        helper.make_node("Neg", ["graph_output_cast_0"], ["graph_input_cast_0"]),
        helper.make_node("Relu", ["graph_input_cast_0"], ["y"]),
    ]
    spec = dataclasses.replace(write(tmp_path / "m.onnx", nodes), precision="fp16")
    with pytest.raises(
        EngineError, match=r"`m.onnx` cannot be made fp16 \(ValueError: two nodes give"
    ):
        trt._reworked(spec, True)
    assert trt._reworked(spec, False)[1] == {"FP16"}


def test_an_engine_is_not_kept_as_that_of_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may be replaced between its key and its building, which waits for other builders:
    whoever has the old model again would get the engine of the new one.
    """
    module = SimpleNamespace(__version__="10.0", NetworkDefinitionCreationFlag=SimpleNamespace())
    monkeypatch.setattr(trt, "_trt", lambda: module)
    spec = write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    key = spec.key(GPU)
    with pytest.raises(AttributeError, match="Builder"):  # which is all that is missing
        trt.build(spec, key)
    write(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])])
    os.utime(tmp_path / "m.onnx", ns=(1, 1))
    with pytest.raises(EngineError, match=r"`m.onnx` changed before its engine was built"):
        trt.build(spec, key)


class Outdated(SimpleNamespace):
    """Of a release that has several names for a thing, and warns of the older ones."""

    device_memory_size_v2 = 4096

    @property
    def device_memory_size(self) -> int:
        raise DeprecationWarning("superseded by device_memory_size_v2")

    def create_execution_context_without_device_memory(self) -> None:
        raise DeprecationWarning("use create_execution_context")


def test_outdated_names_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 10 warns of names that 8.6 has alone, even where they are only looked at: that is an
    error in a program which has warnings be errors.
    """
    given: list[object] = []
    engine = Outdated(
        num_io_tensors=0,
        create_execution_context=lambda strategy: SimpleNamespace(
            set_device_memory=lambda *memory: given.append((strategy, *memory))
        ),
    )
    module = SimpleNamespace(
        TensorIOMode=SimpleNamespace(INPUT=1),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"),
    )
    monkeypatch.setattr(trt, "_trt", lambda: module)
    monkeypatch.setattr(trt, "_logger", lambda: None)
    at_home = {f"cuCtx{name}": lambda context: 0 for name in HOME}
    monkeypatch.setattr(cuda, "_driver", lambda: SimpleNamespace(**at_home))
    made = trt.Engine(b"", EngineSpec(Path("m.onnx"), "fp32", (1, 1, 1), None))
    assert made.scratch_bytes == 4096
    scratch: Any = SimpleNamespace(address=512, size_bytes=4096)
    trt._Execution(made, cast("Stream", None), 0, {}, scratch)
    assert given == [("ours", 512, 4096)]


def test_an_engine_is_freed_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread lets go of it last has its GPU current for as long as that takes, and what
    was current before, if anything was, behind that; not where the GPU is beyond use.
    """
    current = threading.local()
    freed: list[int | None] = []

    class Made(SimpleNamespace):
        def __del__(self) -> None:
            freed.append(getattr(current, "gpu", None))

    def get(found: Any) -> int:
        found._obj.value = current.gpu
        return 0

    def push(context: ctypes.c_void_p) -> int:
        if is_lost.is_set():
            return 999
        current.before, current.gpu = getattr(current, "gpu", None), context.value
        return 0

    def pop(found: Any) -> int:
        current.gpu = current.before
        return 0

    def let_go() -> int | None:
        engines.pop()
        return getattr(current, "gpu", None)

    is_lost = threading.Event()
    driver = SimpleNamespace(cuCtxGetCurrent=get, cuCtxPushCurrent_v2=push, cuCtxPopCurrent_v2=pop)
    module = SimpleNamespace(
        TensorIOMode=SimpleNamespace(INPUT=1),
        Runtime=lambda logger: Made(deserialize_cuda_engine=lambda plan: Made(num_io_tensors=0)),
    )
    monkeypatch.setattr(trt, "_trt", lambda: module)
    monkeypatch.setattr(trt, "_logger", lambda: None)
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    current.gpu = 7
    spec = EngineSpec(Path("m.onnx"), "fp32", (1, 1, 1), None)
    engines = [trt.Engine(b"", spec) for _ in range(3)]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(let_go).result() is None
    assert freed == [7, 7]
    current.gpu = 3
    assert let_go() == 3
    assert freed == [7, 7, 7, 7]
    is_lost.set()
    assert let_go() == 3
    assert freed == [7, 7, 7, 7, 3, 3]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSpec:
    """What an engine is built from, as far as its key tells."""
    monkeypatch.setattr(trt, "_trt", lambda: SimpleNamespace(__version__="10.0"))
    return write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])])


def test_lanes_that_wait_for_one_engine_share_its_failure(
    tmp_path: Path, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To find that a model cannot be built may take minutes, which each lane would take again, and
    those of each GPU of the kind. Who asks later has it tried once more, for memory may be there by
    then.
    """
    plans, tries = trt.Plans(EngineStore(tmp_path)), itertools.count(1)
    engines = [trt.Engines(plans, dataclasses.replace(GPU, index=number)) for number in range(2)]
    are_waiting = threading.Barrier(4)

    def failing(*given: Any) -> bytes:
        with contextlib.suppress(threading.BrokenBarrierError):
            are_waiting.wait(0.5)  # nobody comes: the others wait for this one
        raise EngineError(f"try {next(tries)} failed")

    monkeypatch.setattr(trt, "build", failing)

    def told(number: int) -> str:
        with pytest.raises(EngineError) as error:
            engines[number % 2].of(spec)
        return str(error.value)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(told, range(4))) == ["try 1 failed"] * 4
    assert told(0) == "try 2 failed"


def test_gpus_of_two_kinds_build_side_by_side_and_those_of_one_kind_once(
    tmp_path: Path,
    spec: EngineSpec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who builds says for which GPU, and who waits for that says nothing."""
    both = threading.Barrier(2)
    gpus = [Gpu(0, "A", "9.0", "13.0"), Gpu(1, "B", "8.9", "13.0")]
    gpus += [dataclasses.replace(gpu, index=gpu.index + 2) for gpu in gpus]

    def build(spec: EngineSpec, key: EngineKey) -> bytes:
        both.wait(LONG_S)
        return key.gpu.encode()

    monkeypatch.setattr(trt, "build", build)
    plans = trt.Plans(EngineStore(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda gpu: plans.of(spec, gpu), gpus)) == [b"A", b"B"] * 2
    said = [r.getMessage() for r in caplog.records if r.name == "flowlang.trt"]
    told = r"building an engine for `m.onnx` on gpu {} \({}\): not built yet"
    assert len(said) == 2
    for kind, numbers in {"A": "[02]", "B": "[13]"}.items():
        assert any(re.match(told.format(numbers, kind), line) for line in said)


def test_engines_built_ahead_are_one_for_gpus_of_a_kind(
    tmp_path: Path, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is built on the first GPU of its kind. Where there is nothing to build none is touched,
    for a GPU that is only asked for would give its memory for it.
    """
    kinds = ["A", "B", "A", "B"]
    used: list[int] = []
    built: list[tuple[str, int]] = []

    def build(spec: EngineSpec, key: EngineKey, progress: Callable[[str], None]) -> bytes:
        built.append((key.gpu, used[-1]))
        return key.gpu.encode()

    monkeypatch.setattr(trt, "build", build)
    monkeypatch.setattr(cuda, "use", used.append)
    monkeypatch.setattr(cuda, "gpu", lambda number: Gpu(number, kinds[number], "9.0", "13.0"))
    text = 'trt("m.onnx", batch=1..1, gpu=0..3) x4'
    source = Source(str(spec.model.with_name("app.flow")), text)
    plan = lower([compile_source(source)], Machine(4, "gpu", (0, 1, 2, 3)))
    store = EngineStore(tmp_path / "engines")
    first = build_engines(plan, store, lambda model, step: None)
    assert built == [("A", 0), ("B", 1)]
    assert [(b.model, b.gpu, b.path.is_file()) for b in first] == [
        ("m.onnx", "A", True),
        ("m.onnx", "B", True),
    ]
    again = build_engines(plan, store, lambda model, step: None)
    assert [(b.path, b.took_s) for b in again] == [(b.path, 0) for b in first]
    assert used == [0, 1]


def test_decoding_is_measured_for_all_the_gpus_that_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads of each region are its part of the cores, of which another GPU has no more."""
    asked: list[tuple[int, int]] = []

    def choose(gpu: int, regions: int, pictures: object) -> dali.Decodings:
        asked.append((gpu, regions))
        return dali.Decodings()

    monkeypatch.setattr(dali, "choose_decodings", choose)
    monkeypatch.setattr(cuda, "use", lambda number: None)
    furnish(tmp_path)
    flow = "export flow {} = {} -> resize(224) -> rgb -> trt({}) x{}\n"
    text = flow.format("a", "decode", '"resnet50.onnx", gpu=0..1, batch=1..56', 4)
    text += flow.format("b", "decode", '"small.onnx", gpu=1, batch=1..8', 3)
    text += flow.format("c", "decode(libjpeg)", '"model.onnx", gpu=2', 1)
    source = Source(str(tmp_path / "app.flow"), text)
    plan = lower([compile_source(source)], Machine(4, "gpu", (0, 1, 2)))
    assert [decodings_of(plan, gpu) is None for gpu in range(3)] == [False, False, True]
    assert asked == [(0, 4 * 2 + 3), (1, 4 * 2 + 3)]
