"""What this machine can run flows on.

Layer 3. Asks the operating system and the drivers; makes nothing.
"""

from __future__ import annotations

import os

from flowlang.diagnostics import FlowError
from flowlang.plan.physical import Machine


def this_machine(device: str | None = None) -> Machine:
    """The machine to plan for: the cores this process may use, and the device asked for.

    Raises FlowError for a device there is not.
    """
    if device not in (None, "cpu"):
        raise FlowError(f"this version runs flows on the CPU only, not on `{device}`")
    return Machine(len(os.sched_getaffinity(0)), device or "cpu")
