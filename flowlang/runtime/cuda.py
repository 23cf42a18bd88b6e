"""CUDA memory, streams and graphs, as few and as plain as the GPU modules need.

Layer 3, and the only file importing cuda-python. Every call's status is looked at; a failure is an
EngineError, or InstanceLost where the context is beyond use.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import EngineError
from flowlang.runtime.stage import InstanceLost

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Errors after which a context answers every call with the same error (CUDA Runtime API, "Data
# types used by CUDA Runtime", cudaError).
LOST = frozenset({"cudaErrorIllegalAddress", "cudaErrorLaunchFailure", "cudaErrorECCUncorrectable",
                  "cudaErrorHardwareStackError", "cudaErrorIllegalInstruction",
                  "cudaErrorMisalignedAddress", "cudaErrorInvalidAddressSpace",
                  "cudaErrorInvalidPc", "cudaErrorLaunchTimeout", "cudaErrorDeviceUninitialized",
                  "cudaErrorContextIsDestroyed", "cudaErrorAssert", "cudaErrorContained",
                  "cudaErrorTensorMemoryLeak", "cudaErrorMpsClientTerminated",
                  "cudaErrorExternalDevice"})  # fmt: skip


# Streams of one of these queues wait for each other, and there are eight of them unless more are
# asked for before CUDA starts: too few for the pipelines and contexts of an app.
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


@functools.cache
def _runtime() -> Any:
    os.environ.setdefault(QUEUES, "32")
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(
            f"running on a GPU needs cuda-python ({error}): pip install 'flowlang[gpu]'"
        ) from None
    return runtime


def _call(name: str, *args: Any) -> Any:
    """A CUDA runtime call's results, or its failure raised."""
    status, *results = getattr(_runtime(), name)(*args)
    if status.value:
        raise _failure(name, status)
    return results[0] if len(results) == 1 else results


def _failure(call: str, status: Any) -> Exception:
    name, call = status.name, call + where()
    if name == "cudaErrorMemoryAllocation":
        what = (
            "page-locked memory of the host" if call.startswith("cudaMallocHost") else "GPU memory"
        )
        return EngineError(f"out of {what} ({call})")
    if name in LOST:
        return InstanceLost(f"the GPU's context is lost: {name} in {call}")
    return EngineError(f"{name} in {call}")


def why_no_gpu() -> str | None:
    """Why nothing can run on a GPU here, or None where there is one.

    To be asked before any TensorRT object is made: without a driver its constructors crash.
    """
    try:
        status, count = _runtime().cudaGetDeviceCount()
    except EngineError as error:
        return str(error)
    except Exception as error:  # the loader's own error where the driver's library is missing
        return f"the NVIDIA driver is missing ({error})"
    if status.name == "cudaErrorInsufficientDriver":
        return "the NVIDIA driver is missing, or too old for this CUDA"
    if status.value:
        return f"CUDA does not start: {status.name}"
    return None if count else "the driver sees no GPU"


def gpu_count() -> int:
    """How many GPUs there are; 0 where CUDA cannot be used."""
    return 0 if why_no_gpu() else int(_call("cudaGetDeviceCount"))


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as an engine's key needs it."""

    index: int
    name: str
    compute_capability: str
    driver: str


@functools.cache
def gpu(index: int) -> Gpu:
    """What a GPU is. Raises EngineError where there is none of that number."""
    reason = why_no_gpu()
    if reason:
        raise EngineError(f"there is no GPU to run on: {reason}")
    count = gpu_count()
    if not 0 <= index < count:
        raise EngineError(f"there is no gpu {index}: this machine has {count}, the first is gpu 0")
    found = _call("cudaGetDeviceProperties", index)
    driver = int(_call("cudaDriverGetVersion"))
    return Gpu(
        index,
        found.name.decode().rstrip("\0"),
        f"{found.major}.{found.minor}",
        f"{driver // 1000}.{driver % 1000 // 10}",
    )


class _Current(threading.local):
    """The GPU that was made current in a thread. CUDA could not tell once its context is lost."""

    index: int | None = None


_current = _Current()


def use(index: int) -> None:
    """Make a GPU the current one of this thread."""
    _current.index = index
    _call("cudaSetDevice", index)


def where() -> str:
    """Which GPU an error of this thread is about, to be put behind what failed."""
    return "" if _current.index is None else f" on gpu {_current.index}"


def free_bytes() -> int:
    """Free memory of the current GPU."""
    return int(_call("cudaMemGetInfo")[0])


class Stream:
    """A stream of its own, not ordered with the default one."""

    def __init__(self) -> None:
        runtime = _runtime()
        self._stream = _call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def wait(self) -> None:
        """Wait until all that was put on the stream is done. The interpreter goes on meanwhile.

        Raises InstanceLost where that cannot be waited for: nobody knows then what is still read
        and written, and only closing what it works with ends it.
        """
        try:
            _call("cudaStreamSynchronize", self._stream)
        except EngineError as error:
            raise InstanceLost(f"a stream is beyond use: {error}") from None

    def close(self) -> None:
        _runtime().cudaStreamDestroy(self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` puts on the stream, as a graph that can be replayed."""
        runtime = _runtime()
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            status, captured = runtime.cudaStreamEndCapture(self._stream)
            if not status.value:
                runtime.cudaGraphDestroy(captured)
            raise
        captured = _call("cudaStreamEndCapture", self._stream)
        try:
            executable = _call("cudaGraphInstantiate", captured, 0)
        finally:
            runtime.cudaGraphDestroy(captured)
        return Graph(executable, self._stream)


@functools.cache
def _driver() -> Any:
    """The driver's library, called with the interpreter held.

    cuda-python lets other threads in during every call. For calls of a few microseconds that is a
    loss: to go on, the lane has to wait until one of them is made to stop.
    """
    library = ctypes.PyDLL("libcuda.so.1")
    library.cuGraphLaunch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.cuMemcpyDtoDAsync_v2.argtypes = [
        ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    library.cuCtxGetCurrent.argtypes = library.cuCtxPopCurrent_v2.argtypes = [ctypes.c_void_p]
    library.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    return library


def _driver_failure(call: str, status: int) -> Exception:
    try:
        known = _runtime().cudaError_t(status)  # the driver's numbers are the runtime's
    except ValueError:
        return EngineError(f"CUDA error {status} in {call}{where()}")
    return _failure(call, known)


class Home:
    """The context of the GPU that is current where this is made, for other threads to come to.

    What is freed in a thread that has no GPU is freed with the first one current, which then gets a
    context: hundreds of MiB for nothing where all work is done on another. `use` would be no help,
    for it cannot be undone: to have none again, or the GPU of whoever calls.
    """

    def __init__(self) -> None:
        self._driver = _driver()  # which the end of the interpreter may have taken from the module
        self._context = ctypes.c_void_p()
        status = self._driver.cuCtxGetCurrent(ctypes.byref(self._context))
        if status:
            raise _driver_failure("cuCtxGetCurrent", status)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """With it current. One that is beyond use may refuse, and then nothing of it is left."""
        is_entered = not self._driver.cuCtxPushCurrent_v2(self._context)
        try:
            yield
        finally:
            if is_entered:
                self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class Graph:
    """A captured graph; `launch` replays it on the stream it was captured from."""

    __slots__ = ("_executable", "_handle", "_launch", "_stream")

    def __init__(self, executable: Any, stream: Any) -> None:
        self._executable = executable
        self._handle = int(executable)
        self._stream = int(stream)
        self._launch = _driver().cuGraphLaunch

    def launch(self) -> None:
        status = self._launch(self._handle, self._stream)
        if status:
            raise _driver_failure("cuGraphLaunch", status)

    def close(self) -> None:
        _runtime().cudaGraphExecDestroy(self._executable)


class DeviceBuffer:
    """Memory on the current GPU."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = max(1, size_bytes)
        try:
            self.address = int(_call("cudaMalloc", self.size_bytes))
        except EngineError as error:
            raise EngineError(
                f"{error}: {self.size_bytes:,} bytes wanted, {free_bytes():,} free"
            ) from None

    def close(self) -> None:
        if self.address:
            _runtime().cudaFree(self.address)
            self.address = 0


class PinnedBuffer:
    """Page-locked host memory, which the GPU copies to and from by itself, as a numpy array."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        import numpy as np

        kind = np.dtype(dtype)
        wanted_bytes = int(np.prod(shape)) * kind.itemsize
        self.size_bytes = max(1, wanted_bytes)
        self.address = int(_call("cudaMallocHost", self.size_bytes))
        raw = (ctypes.c_byte * self.size_bytes).from_address(self.address)
        flat = np.ctypeslib.as_array(raw)[:wanted_bytes].view(kind)
        self.array: NDArray[Any] = flat.reshape(shape)

    def close(self) -> None:
        if self.address:
            _runtime().cudaFreeHost(self.address)
            self.address = 0


def copy_to_host(
    target: PinnedBuffer, source: DeviceBuffer, size_bytes: int, stream: Stream
) -> None:
    """Queue a copy from the GPU on a stream."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
    _call("cudaMemcpyAsync", target.address, source.address, size_bytes, kind, stream.handle)


def copy_to_device(
    target: DeviceBuffer, source: PinnedBuffer, size_bytes: int, stream: Stream
) -> None:
    """Queue a copy to the GPU on a stream."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
    _call("cudaMemcpyAsync", target.address, source.address, size_bytes, kind, stream.handle)


def copy_on_device(target: int, source: int, size_bytes: int, stream: Stream) -> None:
    """Queue a copy between two addresses of the GPU on a stream."""
    status = _driver().cuMemcpyDtoDAsync_v2(target, source, size_bytes, stream.handle)
    if status:
        raise _driver_failure("cuMemcpyDtoDAsync", status)
