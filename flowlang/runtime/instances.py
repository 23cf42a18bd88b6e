"""How the instances of a physical plan are made, and what they share.

Layer 3. The one table from devices to modules: a module that needs a heavy package is imported
here, when the first stage asks for it.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from flowlang.diagnostics import EngineError
from flowlang.plan import graph
from flowlang.plan.physical import PhysicalPlan, StagePlan
from flowlang.runtime.stage import Instance

if TYPE_CHECKING:
    from flowlang.runtime.gpu import GpuResources
    from flowlang.runtime.modules import Keeper
    from flowlang.runtime.ort import Sessions
    from flowlang.runtime.seal import Key
    from flowlang.runtime.trt import Plans

# The interpreter lets a thread run for 5 ms before another gets its turn. A lane that comes back
# from the GPU would wait that long for a client's thread, which is several batches.
SWITCH_INTERVAL_S = 0.0005


class Instances:
    """Makes instances; owns the sessions and engines they share. Called from the lanes' threads."""

    def __init__(
        self, plan: PhysicalPlan, engines: Path | None = None, key: Key | None = None
    ) -> None:
        self._plan = plan
        self._engines = engines
        self._key = key  # engines are encrypted where there is one
        self._lock = threading.Lock()
        self._sessions: Sessions | None = None
        self._plans: Plans | None = None
        self._resources: dict[int, GpuResources] = {}
        self._importing = threading.Lock()
        self._kept: dict[str, Keeper] = {}  # by path, the folders of operators, as they were first
        self._modules: dict[Path, ModuleType] = {}  # the files of operators, run
        self._failed: dict[Path, str] = {}  # why a file cannot be run, which it is once

    def make(self, stage: StagePlan, number: int) -> Instance:
        """The instance of a stage with this number (from 0). Raises EngineError."""
        if stage.device == "gpu":
            from flowlang.runtime.gpu import GpuInstance

            gpu = stage.gpus[number]
            return GpuInstance(stage, gpu, self._resources_of(gpu))
        if stage.nodes[0].op == graph.PYTHON:
            from flowlang.runtime.python import PythonInstance

            return PythonInstance(
                stage, self._module_of(stage.nodes[0].params[graph.FUNCTION].path)
            )
        from flowlang.runtime.cpu import CpuInstance
        from flowlang.runtime.ort import Sessions

        with self._lock:
            if self._sessions is None:
                self._sessions = Sessions(self._plan.machine.cores, self._plan.stages)
        return CpuInstance(stage, self._sessions)

    def _module_of(self, path: Path) -> ModuleType:
        """A file of operators, as it was when the first of them was asked for.

        It may change while the app starts or runs, or go away, and an instance be made anew.
        """
        from flowlang.runtime.python import module_of

        with self._importing:
            if path in self._failed:
                raise EngineError(self._failed[path])
            if path not in self._modules:
                try:
                    self._modules[path] = module_of(path, self._kept)
                except EngineError as error:
                    self._failed[path] = str(error)
                    raise
            return self._modules[path]

    def _resources_of(self, gpu: int) -> GpuResources:
        with self._lock:
            if gpu not in self._resources:
                sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
                self._resources[gpu] = self._new_resources(gpu)
            return self._resources[gpu]

    def _new_resources(self, gpu: int) -> GpuResources:
        from flowlang.runtime import cuda, trt
        from flowlang.runtime.engine_store import EngineStore, default_directory
        from flowlang.runtime.gpu import GpuResources, decodings_of

        if self._plans is None:
            store = EngineStore(self._engines or default_directory(), self._key)
            self._plans = trt.Plans(store)
        decodings = decodings_of(self._plan, gpu)
        return GpuResources(trt.Engines(self._plans, cuda.gpu(gpu)), decodings)

    def close(self) -> None:
        for resources in self._resources.values():
            resources.close()
        self._resources.clear()
        self._sessions = None
