"""What this machine can run flows on.

Layer 3. Asks the operating system and the drivers; makes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable

from flowlang.diagnostics import FlowError
from flowlang.plan.physical import Machine

GPU_PACKAGES = ("cuda.bindings", "nvidia.dali", "tensorrt")


def this_machine(device: str | None = None) -> Machine:
    """The machine to plan for: the cores this process may use, and its GPUs.

    `device` is `cpu`, `gpu`, `gpu:1`, or None for the GPU where there is one that can be used.
    Raises FlowError for a device there is not, with the reason.
    """
    cores = len(os.sched_getaffinity(0))
    if device == "cpu":
        return Machine(cores)
    wanted = re.fullmatch(r"gpu(?::([0-9]+))?", device or "gpu")
    if wanted is None:
        raise FlowError(f"there is no device `{device}`: it is cpu, gpu or gpu:NUMBER")
    reason = _why_no_gpu()
    if reason is not None:
        if device is None:
            return Machine(cores)
        raise FlowError(f"there is no GPU to run on: {reason}")
    from flowlang.runtime import cuda

    gpus: Iterable[int] = range(cuda.gpu_count())
    if wanted.group(1):
        gpus = (cuda.gpu(int(wanted.group(1))).index,)
    return Machine(cores, "gpu", tuple(gpus))


def _why_no_gpu() -> str | None:
    missing = [name for name in GPU_PACKAGES if not _is_installed(name)]
    if missing:
        return f"{missing[0]} is not installed: pip install 'flowlang[gpu]'"
    from flowlang.runtime.cuda import why_no_gpu

    return why_no_gpu()


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
