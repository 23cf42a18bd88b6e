"""Models on the CPU: one ONNX Runtime session a model, shared by its instances.

Layer 3, and the only file importing onnxruntime. `InferenceSession.run` may be called from several
threads at once, so N instances are N concurrent calls and the weights are held once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlang.diagnostics import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPE = {"f32": "float32", "f16": "float16", "f64": "float64", "u8": "uint8", "i8": "int8",
          "u16": "uint16", "i16": "int16", "i32": "int32", "i64": "int64", "bool": "bool"}  # fmt: skip


def numpy_dtype(name: str) -> str:
    """numpy's name of one of our dtypes."""
    return _DTYPE[name]


class Session:
    """A model ready to run."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads of one call take the cores from another call's and from decoding.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot load `{path.name}`: {error}") from error
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """The outputs, in the model's order, for one batch of inputs by name."""
        outputs: Sequence[NDArray[Any]] = self._session.run(None, dict(feeds))
        return outputs


class Sessions:
    """The sessions of an app: one a model file, however many stages and flows name it."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._sessions: dict[Path, Session] = {}

    def of(self, path: Path) -> Session:
        """The session of a model file. Raises EngineError where it cannot be loaded."""
        with self._lock:
            if path not in self._sessions:
                self._sessions[path] = Session(path, self._threads)
            return self._sessions[path]
