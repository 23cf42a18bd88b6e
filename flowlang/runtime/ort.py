"""Models on the CPU: ONNX Runtime sessions of one model, shared by its instances.

Layer 3, and the only file that runs anything with onnxruntime, of which `runtime.rework` has a
converter. `InferenceSession.run` may be called from several threads at once, so N instances are N
concurrent calls and each session's weights are held once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flowlang.plan.onnx import Model
    from flowlang.plan.physical import StagePlan


class AtWork:
    """How many instances of an app are working on the CPU at this moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def __enter__(self) -> None:
        with self._lock:
            self.count += 1

    def __exit__(self, *failure: object) -> None:
        with self._lock:
            self.count -= 1


class Session:
    """A model ready to run, on all cores, or on one thread a call while calls fill the cores.

    Measured on two cores, ResNet-50, ten requests outstanding: calls of one thread each reach what
    two independent loops reach, calls that share two threads 0.88 to 0.94 of it; a request that is
    alone takes half as long on two threads. So there are two sessions, at twice the memory, where
    several calls can fill the cores; elsewhere the wide one does.
    """

    def __init__(self, model: Model, cores: int, at_work: AtWork, *, is_crowded: bool) -> None:
        self._at_work = at_work
        self._cores = cores
        content = model.content()
        self._wide = _open(model, content, cores)
        needs_both = is_crowded and cores > 1
        self._narrow = _open(model, content, 1) if needs_both else self._wide
        self.outputs = [o.name for o in self._wide.get_outputs()]

    @property
    def threads(self) -> int:
        """How many threads a run that starts now may use."""
        is_full = self._at_work.count >= self._cores and self._narrow is not self._wide
        return 1 if is_full else self._cores

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """The outputs, in the model's order, for one batch of inputs by name."""
        session = self._narrow if self.threads == 1 else self._wide
        outputs: Sequence[NDArray[Any]] = session.run(None, dict(feeds))
        return outputs

    def warm(self, feeds: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """What `run` does, having done it both ways."""
        if self._narrow is not self._wide:
            self._narrow.run(None, dict(feeds))
        outputs: Sequence[NDArray[Any]] = self._wide.run(None, dict(feeds))
        return outputs


def _open(model: Model, content: bytes | None, threads: int) -> Any:
    # From 1.29 on it sends Microsoft the names, hashes and run times of models unless told not to,
    # when it is imported, and keeps a database for that in the user's cache.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The threads of a call spin while it runs, which is worth 0.3 of the 1.6 ms that a small model
    # takes on two cores. They stop with it, or they would take the cores from decoding.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # an error is raised too, and told with its request
    try:
        given = str(model.path) if content is None else content
        return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(f"ONNX Runtime cannot load `{model.name}`: {error}") from error
    finally:
        _trim()


def _trim() -> None:
    """Give back what loading freed: the model as it was read, as large as its weights."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """glibc's, or None where the C library has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


class Sessions:
    """The sessions of an app: one Session a model file, however many stages and flows name it.

    `stages` are all stages of the app: their instances say how crowded it can get.
    """

    def __init__(self, cores: int, stages: Iterable[StagePlan] = ()) -> None:
        self.at_work = AtWork()
        self._cores = cores
        self._stages = [s for s in stages if s.device == "cpu"]
        self._lock = threading.Lock()
        self._sessions: dict[Path, Session] = {}

    def of(self, model: Model) -> Session:
        """The session of a model file. Raises EngineError where it cannot be loaded."""
        with self._lock:
            if model.path not in self._sessions:
                is_crowded = self._is_crowded(model.path)
                self._sessions[model.path] = Session(
                    model, self._cores, self.at_work, is_crowded=is_crowded
                )
            return self._sessions[model.path]

    def _is_crowded(self, path: Path) -> bool:
        """Whether several instances run a model, in an app whose instances can fill the cores."""
        callers = sum(s.instances for s in self._stages if s.model and s.model.path == path)
        return callers > 1 and sum(s.instances for s in self._stages) >= self._cores
