"""What is made of CUDA's answers, with a runtime that answers as it is told."""

from __future__ import annotations

import enum
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flowlang.diagnostics import EngineError
from flowlang.runtime import cuda
from flowlang.runtime.gpu import GpuInstance, _Arrays, _Batch
from flowlang.runtime.stage import InstanceLost

# Some of cudaError_t
Status = enum.IntEnum(
    "Status",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorLaunchFailure": 719,
        "cudaErrorMpsClientTerminated": 808,
    },
)


class Runtime:
    """The CUDA runtime as far as graphs and page-locked memory go. `fails` says what fails how."""

    def __init__(self) -> None:
        self.fails: dict[str, Status] = {}
        self.graphs = 0
        self.cudaError_t = Status
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            status = self.fails.get(name, Status.cudaSuccess)
            if not status:
                self.graphs += (name == "cudaStreamEndCapture") - (name == "cudaGraphDestroy")
            return status, 7

        return call


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(cuda, "_runtime", lambda: made)
    monkeypatch.setattr(cuda, "_current", cuda._Current())  # the thread of the tests goes on
    monkeypatch.setattr(cuda, "_driver", lambda: SimpleNamespace(cuGraphLaunch=None))
    return made


def test_a_captured_graph_is_given_back_whatever_fails(runtime: Runtime) -> None:
    """The captured graph is of no use once it is made executable, or once it cannot be."""
    stream = cuda.Stream()

    def fail() -> None:
        raise InstanceLost("refused")

    stream.capture(lambda: None)
    with pytest.raises(InstanceLost, match="refused"):
        stream.capture(fail)
    runtime.fails["cudaGraphInstantiate"] = Status.cudaErrorMemoryAllocation
    with pytest.raises(EngineError, match=r"^out of GPU memory \(cudaGraphInstantiate\)$"):
        stream.capture(lambda: None)
    assert runtime.graphs == 0
    runtime.fails["cudaStreamEndCapture"] = Status.cudaErrorInvalidValue  # then there is none
    for work in (fail, lambda: None):
        with pytest.raises((InstanceLost, EngineError)):
            stream.capture(work)
    assert runtime.graphs == 0


def test_memory_that_lacks_is_named(runtime: Runtime) -> None:
    """Page-locked memory is the host's: that of the GPU may be free."""
    runtime.fails["cudaMallocHost"] = Status.cudaErrorMemoryAllocation
    with pytest.raises(EngineError, match=r"^out of page-locked memory of the host \("):
        cuda.PinnedBuffer((4,), "float32")


def test_the_gpu_that_lacks_memory_is_named(runtime: Runtime) -> None:
    """It is that of the thread it lacks in, whatever another one has current."""
    cuda.use(1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cuda.use, 0).result()
        runtime.fails["cudaStreamCreateWithFlags"] = Status.cudaErrorMemoryAllocation
        told = r"^out of GPU memory \(cudaStreamCreateWithFlags on gpu {}\)$"
        with pytest.raises(EngineError, match=told.format(0)):
            pool.submit(cuda.Stream).result()
    with pytest.raises(EngineError, match=told.format(1)):
        cuda.Stream()


def test_memory_of_nothing_is_an_empty_array(runtime: Runtime) -> None:
    """A side of 0 is nothing to copy, and no reason to fail with the memory held."""
    for shape, dtype in (((4, 0), "float32"), ((0,), "int64")):
        made = cuda.PinnedBuffer(shape, dtype)
        assert made.array.shape == shape
        assert made.array.dtype == dtype


def test_a_context_beyond_use_is_lost(runtime: Runtime) -> None:
    """Errors after which CUDA asks for a new process ask here for a new instance."""
    for status in (Status.cudaErrorLaunchFailure, Status.cudaErrorMpsClientTerminated):
        runtime.fails["cudaSetDevice"] = status
        with pytest.raises(InstanceLost, match=f"{status.name} in cudaSetDevice on gpu 0"):
            cuda.use(0)
    runtime.fails["cudaSetDevice"] = Status.cudaErrorInvalidValue
    with pytest.raises(EngineError, match=r"^cudaErrorInvalidValue in cudaSetDevice on gpu 1$"):
        cuda.use(1)


def test_a_stream_that_cannot_be_waited_for_is_lost(runtime: Runtime) -> None:
    """Its work may still be under way, and what that reads must stay: its lane needs another."""
    stream = cuda.Stream()
    stream.wait()
    runtime.fails["cudaStreamSynchronize"] = Status.cudaErrorInvalidValue
    with pytest.raises(InstanceLost, match=r"^a stream is beyond use: cudaErrorInvalidValue in "):
        stream.wait()


def test_what_the_driver_says_is_told_in_the_words_of_the_runtime(runtime: Runtime) -> None:
    """Their numbers are the same; one that this cuda-python does not know yet is told as it is."""
    with pytest.raises(InstanceLost, match="cudaErrorLaunchFailure in cuGraphLaunch"):
        raise cuda._driver_failure("cuGraphLaunch", 719)
    with pytest.raises(EngineError, match=r"^CUDA error 4711 in cuGraphLaunch$"):
        raise cuda._driver_failure("cuGraphLaunch", 4711)


@pytest.mark.parametrize("fails", ["load", "start"])
def test_what_was_decoded_stays_until_its_copy_is_done(fails: str) -> None:
    """Where a model does not start, or a later part of its batch does not reach it, the copy of
    what did may be under way: it is waited for.
    """
    order: list[str] = []

    class Held:
        def __del__(self) -> None:
            order.append("let go")

    def load(batch: _Batch) -> None:
        batch.good, batch.held = [0], [Held()]
        if fails == "load":
            raise EngineError("no copy")

    def refuse(count: int) -> None:
        raise EngineError("no graph")

    lane: Any = object.__new__(GpuInstance)
    lane.source = SimpleNamespace(load=load)
    lane.context = SimpleNamespace(start=refuse)
    lane.stream = SimpleNamespace(wait=lambda: order.append("waited"))
    with pytest.raises(EngineError, match=r"no (copy|graph)"):
        lane.launch(_Batch([b"picture"]))
    assert order == ["waited", "let go"]


def test_a_model_of_arrays_warms_up_on_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory holds by itself would be indices of nothing to a model that takes indices."""
    copied: dict[str, tuple[list[int], int]] = {}

    def copy(target: str, source: Any, size_bytes: int, stream: str) -> None:
        copied[target] = source.array.tolist(), size_bytes

    monkeypatch.setattr(cuda, "copy_to_device", copy)
    source: Any = object.__new__(_Arrays)
    inputs = {"ids": "input of ids", "more": "input of more"}
    source.lane = SimpleNamespace(context=SimpleNamespace(inputs=inputs), stream="stream")
    source.staged = {
        name: SimpleNamespace(array=np.full(3, 1 << 40), size_bytes=24) for name in inputs
    }
    source.warm()
    assert copied == {name: ([0, 0, 0], 24) for name in inputs.values()}


@pytest.mark.parametrize(("set_before", "wanted"), [(None, "32"), ("8", "8")])
def test_cuda_is_asked_for_more_queues_than_it_has(
    set_before: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the number when it starts, so that is set before; a number that is set stays."""
    monkeypatch.setenv(cuda.QUEUES, set_before or "")
    if set_before is None:
        monkeypatch.delenv(cuda.QUEUES)
    runtime = types.ModuleType("cuda.bindings")
    runtime.runtime = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", runtime)
    cuda._runtime.__wrapped__()
    assert os.environ[cuda.QUEUES] == wanted
