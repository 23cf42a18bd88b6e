"""Closed-loop load: C requests outstanding, each answered before its client asks again."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """One closed loop. Latencies in milliseconds, of the answered requests."""

    what: str
    clients: int
    qps: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    requests: int
    failures: int
    # queries a second times mean latency: the requests really outstanding
    outstanding: float
    usage: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which a share of an ordered sequence lies."""
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Tally:
    """Latencies of the requests that ended within the measured time."""

    def __init__(self, warm_s: float, seconds: float) -> None:
        self.start_s = time.perf_counter() + warm_s
        self.end_s = self.start_s + seconds
        self.latencies: list[float] = []
        self.failures = 0

    def add(self, began_s: float, ended_s: float) -> bool:
        """Note a request. False when it is time to stop."""
        if began_s >= self.start_s and ended_s <= self.end_s:
            self.latencies.append(ended_s - began_s)
        return ended_s < self.end_s

    def result(self, what: str, clients: int, usage: dict[str, float]) -> Result:
        seconds = self.end_s - self.start_s
        ordered = sorted(self.latencies)
        mean = sum(ordered) / max(1, len(ordered))
        qps = len(ordered) / seconds
        return Result(
            what,
            clients,
            round(qps, 1),
            round(percentile(ordered, 0.5) * 1e3, 4),
            round(percentile(ordered, 0.9) * 1e3, 4),
            round(percentile(ordered, 0.99) * 1e3, 4),
            len(ordered),
            self.failures,
            round(qps * mean, 2),
            usage,
        )


def asyncio_clients(
    what: str,
    call: Callable[[Any], Any],
    items: Sequence[Any],
    clients: int,
    seconds: float,
    warm_s: float = 0.5,
    sampler: Callable[[], Sampler] | None = None,
) -> Result:
    """C coroutines on one event loop (uvloop where it is installed)."""
    tally = Tally(warm_s, seconds)
    source = itertools.cycle(items)

    async def client() -> None:
        more = True
        while more:
            began_s = time.perf_counter()
            try:
                await call(next(source))
            except Exception:
                tally.failures += 1
            more = tally.add(began_s, time.perf_counter())

    async def everyone() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    with (sampler or Sampler)() as usage:
        try:
            import uvloop

            uvloop.run(everyone())
        except ImportError:
            asyncio.run(everyone())
    return tally.result(what, clients, usage.report())


def thread_clients(
    what: str,
    call: Callable[[Any], Any],
    items: Sequence[Any],
    clients: int,
    seconds: float,
    warm_s: float = 0.5,
    sampler: Callable[[], Sampler] | None = None,
) -> Result:
    """C threads, each blocked on its own request."""
    tally = Tally(warm_s, seconds)
    source = itertools.cycle(items)

    def client() -> None:
        more = True
        while more:
            began_s = time.perf_counter()
            try:
                call(next(source))
            except Exception:
                tally.failures += 1
            more = tally.add(began_s, time.perf_counter())

    threads = [threading.Thread(target=client) for _ in range(clients)]
    with (sampler or Sampler)() as usage:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return tally.result(what, clients, usage.report())


class Sampler:
    """Cores used by this process and its memory, over the time it is open."""

    def __enter__(self) -> Sampler:
        self._start_s = time.perf_counter()
        self._cpu_s = _cpu_seconds()
        return self

    def __exit__(self, *failure: object) -> None:
        self._seconds = time.perf_counter() - self._start_s
        self._used_s = _cpu_seconds() - self._cpu_s

    def report(self) -> dict[str, float]:
        return {
            "cores": round(self._used_s / self._seconds, 2),
            "memory_mib": round(resident_bytes() / 2**20, 1),
        }


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(results: Sequence[Result]) -> str:
    """Results as a Markdown table."""
    rows = ["| | C | QPS | p50 ms | p99 ms | cores | other |", "|---|---|---|---|---|---|---|"]
    for r in results:
        other = ", ".join(
            f"{k} {v:g}" for k, v in r.usage.items() if k not in ("cores", "memory_mib")
        )
        failed = f" {r.failures} failed" if r.failures else ""
        rows.append(
            f"| {r.what} | {r.clients} | {r.qps:,.0f} | {r.p50_ms:.2f} | {r.p99_ms:.2f} | "
            f"{r.usage.get('cores', 0):.2f} | {other}{failed} |"
        )
    return "\n".join(rows)
