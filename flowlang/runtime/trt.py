"""Models as TensorRT engines: built, cached, and run through execution contexts.

Layer 3, and the only file importing tensorrt. One path for TensorRT 8.6, 10 and 11: tensors by
name, and what a release has or lacks is asked of the module, not of its version. No TensorRT object
is made before CUDA has answered: without a driver its constructors crash the process.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flowlang.diagnostics import EngineError
from flowlang.plan.onnx import file_sha256
from flowlang.runtime import cuda, rework
from flowlang.runtime.engine_store import EngineKey, EngineStore
from flowlang.runtime.request import in_words
from flowlang.runtime.stage import InstanceLost, clear_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("flowlang.trt")

Key = TypeVar("Key")
Made = TypeVar("Made")

WORKSPACE = 2 << 30
SMALL_BATCH = 8  # up to this a profile of its own: one made for 64 takes 0.1 ms longer for one
SMALL_BEST = 4
GRAPHED_SIZES = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)


@functools.cache
def _trt() -> Any:
    reason = cuda.why_no_gpu()
    if reason:
        raise EngineError(f"there is no GPU to run on: {reason}")
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"running models on a GPU needs TensorRT ({error}): pip install 'flowlang[gpu]'"
        ) from None
    return tensorrt


@functools.cache
def _logger() -> Any:
    trt = _trt()
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.DEBUG,  # TensorRT warns of what its user cannot mend
        trt.ILogger.INFO: logging.DEBUG,
        trt.ILogger.VERBOSE: logging.NOTSET,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level >= logging.ERROR:
                self.last = message
            if level > logging.NOTSET:
                log.log(level, "%s", message)

    return Logger()


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is built from. `batch` is (least, best, most).

    `content` gives what an encrypted model holds, and None for a plain file, whose `weights` may be
    in files beside it.
    """

    model: Path
    precision: str
    batch: tuple[int, int, int]
    prologue: rework.Prologue | None
    workspace: int = WORKSPACE
    content: Callable[[], bytes | None] = field(default=lambda: None, compare=False)
    weights: tuple[Path, ...] = ()

    @property
    def profiles(self) -> tuple[tuple[int, int, int], ...]:
        """The ranges of batch sizes to tune the engine for, each (least, best, most); small first.

        TensorRT picks kernels that are fast at a profile's best size. Where that is a large one,
        small batches, which a quiet service has, get a profile of their own.
        """
        low, best, _ = self.batch
        if low > SMALL_BEST or best <= SMALL_BATCH:
            return (self.batch,)
        return ((low, SMALL_BEST, SMALL_BATCH), self.batch)

    def key(self, gpu: cuda.Gpu) -> EngineKey:
        """The key under which the engine is stored for a GPU."""
        trt = _trt()
        normalisation = None
        if self.prologue is not None:
            p = self.prologue
            normalisation = (p.mean or (), p.std or (), (p.height, p.width, p.channels))
        return EngineKey(
            model_sha256=_sha256_of(self.model, *self.weights),
            precision=self.precision,
            profile=tuple(("input", (low,), (best,), (high,)) for low, best, high in self.profiles),
            normalisation=normalisation,
            options=(
                ("layout", self.prologue.layout if self.prologue else "as is"),
                ("workspace", str(self.workspace)),
            ),
            tensorrt=trt.__version__,
            gpu=gpu.name,
            compute_capability=gpu.compute_capability,
            driver_class=gpu.driver,
        )


def _sha256_of(model: Path, *weights: Path) -> str:
    """That of a model's file, or of all its files where there are several."""
    try:
        each = [_sha256(file, file.stat().st_mtime_ns) for file in (model, *weights)]
    except OSError as error:
        raise EngineError(
            f"`{model.name}` cannot be read: {error.strerror}: {error.filename}"
        ) from None
    return each[0] if not weights else hashlib.sha256("".join(each).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, changed_ns: int) -> str:
    return file_sha256(path)


# Building


def build(
    spec: EngineSpec, key: EngineKey, progress: Callable[[str], None] = lambda step: None
) -> bytes:
    """An engine's plan, from its model. Takes from seconds to minutes.

    `progress` is told of each step where TensorRT reports them. Raises EngineError with TensorRT's
    own reason where it cannot be built, and where the model is no longer that of the key, under
    which its engine would be kept: another process may have built for minutes before this.
    """
    trt = _trt()
    creation = trt.NetworkDefinitionCreationFlag
    is_strong = hasattr(creation, "STRONGLY_TYPED")
    model, permitted = _reworked(spec, is_strong)
    if _sha256_of(spec.model, *spec.weights) != key.model_sha256:
        raise EngineError(f"`{spec.model.name}` changed before its engine was built: load it again")
    flags = 0
    if hasattr(creation, "EXPLICIT_BATCH"):
        flags |= 1 << int(creation.EXPLICIT_BATCH)
    if is_strong:
        flags |= 1 << int(creation.STRONGLY_TYPED)
    builder = trt.Builder(_logger())
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, _logger())
    if not parser.parse(model.SerializeToString(), str(spec.model)):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"TensorRT cannot read `{spec.model.name}`: {reasons}")
    config = _configuration(trt, builder, network, spec, is_strong, permitted, progress)
    started_s = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"TensorRT cannot build `{spec.model.name}`: {_logger().last}")
    log.info("built `%s` in %.0f s", spec.model.name, time.monotonic() - started_s)
    return bytes(plan)


def _reworked(spec: EngineSpec, is_strong: bool) -> tuple[Any, set[str]]:
    """A model made ready, and what its network may compute in besides fp32 where that is not said
    by the graph alone: what it says all the same, and what is asked for.
    """
    name, permitted = spec.model.name, set()
    model = rework.load(spec.model, spec.content())
    is_quantized = rework.has_quantization(model)
    if spec.precision == "int8" and not is_quantized:
        raise EngineError(
            f"`{name}` has no quantize/dequantize nodes, so it cannot run in int8: "
            "quantize it first, for example with onnxruntime.quantization.quantize_static"
        )
    if not is_strong:
        if rework.has_half(model) or spec.precision in ("fp16", "int8"):
            permitted.add("FP16")
        if is_quantized:
            permitted.add("INT8")
    elif spec.precision == "fp16":
        try:
            model = rework.to_fp16(model)
        except Exception as error:  # what converts it takes some things for granted
            raise EngineError(
                f"`{name}` cannot be made fp16 ({in_words(error)}): run it in fp32, or export it "
                "in fp16"
            ) from error
    if spec.prologue is not None:
        model = rework.prepend(model, spec.prologue)
    return model, permitted


def _configuration(
    trt: Any,
    builder: Any,
    network: Any,
    spec: EngineSpec,
    is_strong: bool,
    permitted: Iterable[str],
    progress: Callable[[str], None],
) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace)
    if spec.precision == "fp32" and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # it keeps no more digits than fp16
    for name in permitted:
        config.set_flag(getattr(trt.BuilderFlag, name))
    preview = getattr(trt, "PreviewFeature", None)
    if preview is not None and hasattr(preview, "PROFILE_SHARING_0806") and not is_strong:
        config.set_preview_feature(preview.PROFILE_SHARING_0806, True)
    sources = getattr(trt, "TacticSource", None)
    if hasattr(sources, "CUDNN") and hasattr(config, "set_tactic_sources"):
        # TensorRT's own kernels and nothing else: cuBLAS and cuDNN are large and were never faster.
        left_out = ("CUBLAS", "CUBLAS_LT", "CUDNN")
        mask = config.get_tactic_sources()
        for name in left_out:
            if hasattr(sources, name):
                mask &= ~(1 << int(getattr(sources, name)))
        config.set_tactic_sources(mask)
    for batch in spec.profiles:
        config.add_optimization_profile(_profile(builder, network, spec, batch))
    monitor = getattr(trt, "IProgressMonitor", None)
    if monitor is not None and hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(monitor, progress)
    return config


def _profile(builder: Any, network: Any, spec: EngineSpec, batch: tuple[int, int, int]) -> Any:
    """A profile for a range of batch sizes. Raises EngineError where other sides may change."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if not shape:
            raise EngineError(
                f"`{spec.model.name}` takes one `{tensor.name}` for a whole batch, and an engine "
                "needs one for each item: run this flow on the CPU"
            )
        if any(side < 0 for side in shape[1:]):
            raise EngineError(
                f"`{spec.model.name}` takes sizes that change ({tensor.name}: {shape}); an engine "
                "needs them fixed: resize to both sides, or run this flow on the CPU"
            )
        if shape[0] < 0:
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in batch))
    return profile


def _monitor(kind: Any, progress: Callable[[str], None]) -> Any:
    """TensorRT's progress interface (10 and later), telling of each phase as it starts."""

    class Monitor(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            kind.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress(f"{phase_name} ({num_steps} steps)")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None: ...

    return Monitor()


# Running


class Engine:
    """An engine loaded on one GPU, its weights shared by all its contexts.

    Whoever lets go of it last, be it a caller that kept an error, it is freed on that GPU.
    """

    _home: cuda.Home | None = None

    def __init__(self, plan: bytes, spec: EngineSpec) -> None:
        trt = _trt()
        self.spec = spec
        self._home = cuda.Home()
        self._runtime = trt.Runtime(_logger())
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            name = spec.model.name
            raise EngineError(f"TensorRT cannot load the engine of `{name}`: {_logger().last}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = trt.TensorIOMode.INPUT
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == is_input]
        self.outputs = [n for n in names if self.engine.get_tensor_mode(n) != is_input]
        # TensorRT makes a context in milliseconds, but not two at once on one engine.
        self.lock = threading.Lock()

    def __del__(self) -> None:
        if self._home is not None:
            with self._home.entered():
                self.engine = self._runtime = None

    @property
    def scratch_bytes(self) -> int:
        """What the inner tensors of a batch take, whichever its profile."""
        if hasattr(self.engine, "device_memory_size_v2"):  # releases with both warn of the older
            return int(self.engine.device_memory_size_v2)
        else:
            return int(self.engine.device_memory_size)

    def dtype(self, name: str) -> str:
        """numpy's name of a tensor's dtype."""
        trt = _trt()
        import numpy as np

        return str(np.dtype(trt.nptype(self.engine.get_tensor_dtype(name))))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape without its batch dimension."""
        shape = tuple(self.engine.get_tensor_shape(name))[1:]
        if any(side < 0 for side in shape):
            raise EngineError(
                f"`{self.spec.model.name}` gives `{name}` in sizes that depend on what it sees "
                f"({shape}), and an engine needs them fixed: run this flow on the CPU"
            )
        return shape


class Context:
    """A lane's way to run an engine: its buffers, its stream, a graph for each batch size.

    One thread's. Inputs are written to `inputs[name]` (device memory, batch first); `start` and
    `collect` run them. There is one of TensorRT's execution contexts for each of its profiles; they
    run one after the other, so they share the memory that a model's inner tensors take.
    """

    def __init__(self, engine: Engine, stream: cuda.Stream, *, use_graphs: bool) -> None:
        self.engine = engine
        self.stream = stream
        self.least, _, self.most = engine.spec.batch
        self.row_bytes: dict[str, int] = {}
        self.inputs: dict[str, cuda.DeviceBuffer] = {}
        self.outputs: dict[str, cuda.DeviceBuffer] = {}
        self.results: dict[str, cuda.PinnedBuffer] = {}
        self._graphs: dict[int, cuda.Graph] = {}
        self._scratch: cuda.DeviceBuffer | None = None
        self._executions: list[_Execution] = []
        self.sizes = [s for s in GRAPHED_SIZES if self.least <= s < self.most] + [self.most]
        self.use_graphs = use_graphs
        try:
            for name in (*engine.inputs, *engine.outputs):
                self._allocate(name)
            addresses = {n: b.address for n, b in (self.inputs | self.outputs).items()}
            self._scratch = cuda.DeviceBuffer(engine.scratch_bytes)
            for profile in range(len(engine.spec.profiles)):
                made = _Execution(engine, stream, profile, addresses, self._scratch)
                self._executions.append(made)
        except BaseException:
            self.close()
            raise

    def _allocate(self, name: str) -> None:
        """A tensor's buffer for a full batch, and for an output the pinned memory it comes to."""
        import numpy as np

        dtype, shape = self.engine.dtype(name), self.engine.shape(name)
        row = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        buffer = cuda.DeviceBuffer(row * self.most)
        self.row_bytes[name] = row
        if name in self.engine.inputs:
            self.inputs[name] = buffer
        else:
            self.outputs[name] = buffer
            self.results[name] = cuda.PinnedBuffer((self.most, *shape), dtype)

    def warm(self) -> None:
        """Run every batch size once and capture it, so that a request only replays."""
        if not self.use_graphs:
            for size in {self.least, self.most}:
                self._enqueue(size)
                self.stream.wait()
            return
        for size in self.sizes:
            self._enqueue(size)  # TensorRT sets itself up for a shape outside of a capture
            self.stream.wait()
            self._graphs[size] = self.stream.capture(functools.partial(self._enqueue, size))

    def _enqueue(self, size: int) -> None:
        next(e for e in self._executions if size <= e.most).enqueue(size)
        for name, target in self.results.items():
            cuda.copy_to_host(target, self.outputs[name], size * self.row_bytes[name], self.stream)

    def start(self, count: int) -> None:
        """Put a batch of `count` items on the stream, and the copy of its outputs behind it."""
        if not self.use_graphs:
            self._enqueue(max(count, self.least))
            return
        # A batch between two captured sizes runs as the larger: the rows behind it are unused.
        size = next(s for s in self.sizes if s >= count)
        self._graphs[size].launch()

    def collect(self, count: int) -> Mapping[str, NDArray[Any]]:
        """Wait for the batch, and copy its outputs out of the pinned memory."""
        self.stream.wait()
        return {name: target.array[:count].copy() for name, target in self.results.items()}

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        for buffer in (*self.inputs.values(), *self.outputs.values()):
            buffer.close()
        for result in self.results.values():
            result.close()
        self._executions.clear()
        if self._scratch is not None:
            self._scratch.close()
        del self.engine  # an error that somebody keeps may hold this


class _Execution:
    """One of TensorRT's execution contexts: an engine's kernels for one profile, on a stream."""

    def __init__(
        self,
        engine: Engine,
        stream: cuda.Stream,
        profile: int,
        addresses: Mapping[str, int],
        scratch: cuda.DeviceBuffer,
    ) -> None:
        trt = _trt()
        self.most = engine.spec.profiles[profile][2]
        self._engine = engine
        self._stream = stream
        self._shaped = 0
        with engine.lock:
            if hasattr(trt, "ExecutionContextAllocationStrategy"):
                strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
                self._context = engine.engine.create_execution_context(strategy)
            else:
                self._context = engine.engine.create_execution_context_without_device_memory()
        if self._context is None:
            raise EngineError(
                f"no execution context for `{engine.spec.model.name}`: out of GPU memory"
                f"{cuda.where()} ({cuda.free_bytes():,} bytes free)"
            )
        if hasattr(self._context, "set_device_memory"):
            self._context.set_device_memory(scratch.address, scratch.size_bytes)
        else:
            self._context.device_memory = scratch.address
        if profile and not self._context.set_optimization_profile_async(profile, stream.handle):
            raise EngineError(f"TensorRT takes no profile {profile}: {_logger().last}")
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)

    def enqueue(self, size: int) -> None:
        """Put a batch of `size` on the stream. Raises InstanceLost where the GPU is of no use."""
        if size != self._shaped:
            for name in self._engine.inputs:
                if not self._context.set_input_shape(name, (size, *self._engine.shape(name))):
                    raise EngineError(f"`{self._engine.spec.model.name}` takes no batch of {size}")
            self._check_rows(size)
            self._shaped = size
        if not self._context.execute_async_v3(self._stream.handle):
            raise InstanceLost(f"TensorRT stopped: {_logger().last}")

    def _check_rows(self, size: int) -> None:
        """Raises EngineError where an output has not one row an item: its memory would not hold it,
        and one item would be given another's.
        """
        for name in self._engine.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if shape != (size, *self._engine.shape(name)):
                model = self._engine.spec.model.name
                raise EngineError(f"`{model}` gives `{name}` as {shape} for a batch of {size}")


class _Once(Generic[Key, Made]):
    """Things that are made by whoever asks first, while all others who ask for one wait.

    Where it cannot be made, all who wait are told: the next would take as long to fail. Whoever
    asks from then on has it tried again.
    """

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps  # what was made, for those who ask when it is
        self._lock = threading.Lock()
        self._made: dict[Key, Future[Made]] = {}

    def of(self, key: Key, make: Callable[[], Made]) -> Made:
        with self._lock:
            made = self._made.get(key)
            is_first = made is None
            if made is None:
                made = self._made[key] = Future()
        if is_first:
            try:
                found = make()
            except BaseException as error:
                clear_frames(error)  # in this thread, where the GPU is current that they use
                self._made.pop(key, None)
                made.set_exception(error)
            else:
                if not self._keeps:
                    self._made.pop(key, None)
                made.set_result(found)
        try:
            return made.result()
        finally:
            del made  # it holds the error, whose frames hold this one

    def close(self) -> None:
        """Let go of all that was made. Those who still work with it keep it."""
        self._made.clear()


class Plans:
    """What engines are loaded from, for all GPUs of an app: one for those of a kind, from the store
    or built on first need.
    """

    def __init__(self, store: EngineStore) -> None:
        self._store = store
        self._built: _Once[EngineKey, bytes] = _Once(keeps=False)

    def of(self, spec: EngineSpec, gpu: cuda.Gpu) -> bytes:
        """An engine's plan for a GPU, which is built on it where it has to be."""
        key = spec.key(gpu)
        return self._built.of(key, lambda: self._stored(spec, key, gpu))

    def _stored(self, spec: EngineSpec, key: EngineKey, gpu: cuda.Gpu) -> bytes:
        loaded = self._store.load(key)
        if loaded.engine is not None:
            return loaded.engine
        where = (spec.model.name, gpu.index, gpu.name)
        log.warning("building an engine for `%s` on gpu %d (%s): %s", *where, loaded.reason)
        return self._store.build(key, lambda: build(spec, key))


class Engines:
    """The engines of an app on one GPU, one a spec."""

    def __init__(self, plans: Plans, gpu: cuda.Gpu) -> None:
        self._plans = plans
        self._gpu = gpu
        self._one_by_one = threading.Lock()  # they are timed as they are built
        self._loaded: _Once[EngineSpec, Engine] = _Once(keeps=True)

    def of(self, spec: EngineSpec) -> Engine:
        """The engine of a spec, loaded already or now. The GPU is current for the caller."""
        return self._loaded.of(spec, lambda: self._engine(spec))

    def _engine(self, spec: EngineSpec) -> Engine:
        with self._one_by_one:
            return Engine(self._plans.of(spec, self._gpu), spec)

    def close(self) -> None:
        """Let go of all engines. Those who still work with one keep it."""
        self._loaded.close()
