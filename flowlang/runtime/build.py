"""Engines built ahead of time, so that serving starts at once.

Layer 3.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowlang.diagnostics import EngineError
from flowlang.plan.physical import PhysicalPlan
from flowlang.runtime.engine_store import EngineKey, EngineStore

if TYPE_CHECKING:
    from flowlang.runtime.trt import EngineSpec


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that is now in the store. `took_s` is 0 where it already was.

    `gpu` is the kind of GPU that it is for.
    """

    model: str
    gpu: str
    path: Path
    took_s: float
    reason: str


def build_engines(
    plan: PhysicalPlan, store: EngineStore, progress: Callable[[str, str], None]
) -> list[Built]:
    """Build every engine the plan needs and the store does not have: one for GPUs of a kind.

    `progress` is told the model and the step TensorRT is at. Raises EngineError where there is no
    GPU, nothing to build, or an engine that cannot be built or kept.
    """
    from flowlang.runtime import cuda, trt

    wanted = _wanted(plan)
    if not wanted:
        raise EngineError("nothing to build: no stage of this flow runs a model on a GPU")
    built = []
    for key, (spec, number) in wanted.items():
        found = store.load(key)
        started_s = time.monotonic()
        if found.engine is None:
            name = spec.model.name
            store.check_place()
            cuda.use(number)
            progress(name, found.reason)
            told = functools.partial(progress, name)
            store.build(key, functools.partial(trt.build, spec, key, told))
            kept = store.load(key)
            if kept.engine is None:
                raise EngineError(f"the engine of `{name}` was built, but not kept: {kept.reason}")
        took_s = time.monotonic() - started_s if found.engine is None else 0.0
        built.append(Built(spec.model.name, key.gpu, store.path(key), took_s, found.reason))
    return built


def _wanted(plan: PhysicalPlan) -> dict[EngineKey, tuple[EngineSpec, int]]:
    """What each engine of a plan is built from, and the first GPU that can build it."""
    from flowlang.runtime import cuda
    from flowlang.runtime.gpu import spec_of

    found: dict[EngineKey, tuple[EngineSpec, int]] = {}
    for stage in plan.stages:
        for number in sorted(set(stage.gpus)):
            spec = spec_of(stage)
            found.setdefault(spec.key(cuda.gpu(number)), (spec, number))
    return found
