"""Waiting for what other threads do."""

from __future__ import annotations

import time
from collections.abc import Callable

LONG_S = 20.0  # far beyond what anything waited for takes


def eventually(is_so: Callable[[], bool]) -> bool:
    """Whether something comes true before LONG_S are over."""
    end_s = time.monotonic() + LONG_S
    while not is_so() and time.monotonic() < end_s:
        time.sleep(0.002)
    return is_so()
