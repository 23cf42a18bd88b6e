"""Engines built ahead of time, so that serving starts at once.

Layer 3.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowlang.diagnostics import EngineError
from flowlang.plan.physical import PhysicalPlan
from flowlang.runtime.engine_store import EngineStore


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that is now in the store. `took_s` is 0 where it already was."""

    model: str
    path: Path
    took_s: float
    reason: str


def build_engines(
    plan: PhysicalPlan, store: EngineStore, progress: Callable[[str, str], None]
) -> list[Built]:
    """Build every engine the plan needs and the store does not have.

    `progress` is told the model and the step TensorRT is at. Raises EngineError where there is no
    GPU, nothing to build, or an engine that cannot be built or kept.
    """
    from flowlang.runtime import cuda, trt
    from flowlang.runtime.gpu import spec_of

    wanted = {(spec_of(s), gpu): None for s in plan.stages if s.device == "gpu" for gpu in s.gpus}
    if not wanted:
        raise EngineError("nothing to build: no stage of this flow runs a model on a GPU")
    built = []
    for spec, number in wanted:
        cuda.use(number)
        key = spec.key(cuda.gpu(number))
        found = store.load(key)
        started_s = time.monotonic()
        if found.engine is None:
            name = spec.model.name
            store.check_place()
            progress(name, found.reason)
            told = functools.partial(progress, name)
            store.build(key, functools.partial(trt.build, spec, key, told))
            kept = store.load(key)
            if kept.engine is None:
                raise EngineError(f"the engine of `{name}` was built, but not kept: {kept.reason}")
        took_s = time.monotonic() - started_s if found.engine is None else 0.0
        built.append(Built(spec.model.name, store.path(key), took_s, found.reason))
    return built
