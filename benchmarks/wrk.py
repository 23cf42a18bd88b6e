"""Load from `wrk`, a process of its own: C connections, each asking again once it is answered."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import PoolSampler, Result

SCRIPT = Path(__file__).with_name("post.lua")
TIMEOUT_S = 10


class Silent(RuntimeError):
    """A server that answers nothing any more."""


def check_installed() -> None:
    """Raises SystemExit where there is no wrk."""
    if shutil.which("wrk") is None:
        raise SystemExit("the load comes from wrk, which is not installed: apt install wrk")


def version() -> str:
    """As `wrk -v` tells it, which ends with a status of 1."""
    told = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    return told.split()[1]


def load(
    what: str,
    url: str,
    files: Sequence[Path],
    clients: int,
    seconds: float,
    processes: Sequence[int] = (),
    threads: int = 1,
) -> Result:
    """Files posted in turn. What `processes` and wrk itself use is measured; whole seconds.

    Raises Silent where nothing at all was answered.
    """
    command = [
        *("wrk", "--threads", str(threads), "--connections", str(clients)),
        *("--duration", f"{max(1, round(seconds))}s", "--timeout", f"{TIMEOUT_S}s"),
        *("--script", str(SCRIPT), url, "--", *map(str, files)),
    ]
    with PoolSampler(processes) as usage:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["requests"]:
        raise Silent(f"{what} answered none of {clients} clients")
    qps = found["requests"] / found["microseconds"] * 1e6
    p50, p90, p99 = (found[name] / 1e3 for name in ("p50", "p90", "p99"))
    return Result(
        what,
        clients,
        round(qps, 1),
        p50,
        p90,
        p99,
        found["requests"],
        found["failures"],
        round(qps * found["mean"] / 1e6, 2),
        usage.report(),
    )
