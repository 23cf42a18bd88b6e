"""Closed-loop load: C requests outstanding, each answered before its client asks again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """One closed loop. Latencies in milliseconds, of the requests wholly within its time.

    `qps` counts every request answered in that time: to leave out those asked before it began
    would cost a loop of ten more than a loop of two.
    """

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
    """The requests that ended within the measured time."""

    def __init__(self, warm_s: float, seconds: float) -> None:
        self.start_s = time.perf_counter() + warm_s
        self.end_s = self.start_s + seconds
        self.latencies: list[float] = []
        self.early = 0
        self.failures = 0

    def add(self, began_s: float, ended_s: float) -> bool:
        """Note a request. False when it is time to stop."""
        if self.start_s <= ended_s <= self.end_s:
            if began_s >= self.start_s:
                self.latencies.append(ended_s - began_s)
            else:
                self.early += 1
        return ended_s < self.end_s

    def result(self, what: str, clients: int, usage: dict[str, float]) -> Result:
        seconds = self.end_s - self.start_s
        ordered = sorted(self.latencies)
        mean = sum(ordered) / max(1, len(ordered))
        requests = len(ordered) + self.early
        qps = requests / seconds
        return Result(
            what,
            clients,
            round(qps, 1),
            round(percentile(ordered, 0.5) * 1e3, 4),
            round(percentile(ordered, 0.9) * 1e3, 4),
            round(percentile(ordered, 0.99) * 1e3, 4),
            requests,
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
    run: Callable[[Coroutine[Any, Any, None]], object] | None = None,
) -> Result:
    """C coroutines on one event loop: that of `run`, else uvloop where it is installed."""
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
        (run or fastest_loop())(everyone())
    return tally.result(what, clients, usage.report())


def fastest_loop() -> Callable[[Coroutine[Any, Any, None]], object]:
    """What runs a coroutine on uvloop, or on asyncio's own loop without it."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    run: Callable[[Coroutine[Any, Any, None]], object] = uvloop.run
    return run


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


MAPPED = 200_000  # items of one call of `map`, at least


def map_client(
    what: str,
    flow: Any,
    items: Sequence[Any],
    clients: int,
    seconds: float,
    warm_s: float = 0.5,
    sampler: Callable[[], Sampler] | None = None,
) -> Result:
    """`map` over a long list, with C items under way, again and again.

    A latency is from an item's being sent to its turn.
    """
    tally = Tally(warm_s, seconds)
    many = list(items) * -(-MAPPED // len(items))
    with (sampler or Sampler)() as usage, _sending(flow) as sent_s:
        while time.perf_counter() < tally.end_s:
            sent_s.clear()
            for answer in flow.map(many, ahead=clients, errors="return"):
                tally.failures += isinstance(answer, Exception)
                if not tally.add(sent_s.popleft(), time.perf_counter()):
                    break
    return tally.result(what, clients, usage.report())


@contextlib.contextmanager
def _sending(flow: Any) -> Iterator[deque[float]]:
    """When each item of a `map` was sent, in their order: `map` itself keeps no times."""
    scheduler, sent_s = flow._scheduler, deque[float]()
    submit_many = scheduler.submit_many

    def submit_and_note(*args: Any) -> Any:
        now_s = time.perf_counter()
        lot = submit_many(*args)
        sent_s.extend([now_s] * len(lot))
        return lot

    scheduler.submit_many = submit_and_note
    try:
        yield sent_s
    finally:
        del scheduler.submit_many


class Sampler:
    """Cores used by this process and its ended children, and by all others; and its memory."""

    def __enter__(self) -> Sampler:
        self._start_s = time.perf_counter()
        self._cpu_s, self._all_s = _cpu_seconds(), machine_cpu_seconds()
        return self

    def __exit__(self, *failure: object) -> None:
        self._seconds = time.perf_counter() - self._start_s
        self._used_s = _cpu_seconds() - self._cpu_s
        self._others_s = machine_cpu_seconds() - self._all_s - self._used_s

    def report(self) -> dict[str, float]:
        return {
            "cores": round(self._used_s / self._seconds, 2),
            "others": round(max(0.0, self._others_s / self._seconds), 2),
            "memory_mib": round(resident_bytes() / 2**20, 1),
        }


class PoolSampler(Sampler):
    """What this process and the workers of a pool use."""

    def __init__(self, workers: Sequence[int]) -> None:
        import psutil

        self._workers = [psutil.Process(worker) for worker in workers]
        self._seen_s: dict[int, float] = {}  # by process; one that has ended used no more

    def __enter__(self) -> PoolSampler:
        super().__enter__()
        self._workers_s = self._cpu_s_of_workers()
        return self

    def __exit__(self, *failure: object) -> None:
        super().__exit__(*failure)
        used_s = self._cpu_s_of_workers() - self._workers_s
        self._used_s += used_s
        self._others_s -= used_s

    def _cpu_s_of_workers(self) -> float:
        import psutil

        for worker in self._workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen_s[worker.pid] = sum(worker.cpu_times()[:2])
        return sum(self._seen_s.values())


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def machine_cpu_seconds() -> float:
    """Seconds that the machine's cores were busy, those its host took away included."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _wait, irq, softirq, steal = file.readline().split()[1:9]
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(results: Sequence[Result]) -> str:
    """Results as a Markdown table."""
    rows = ["| | C | QPS | p50 ms | p99 ms | cores | other |", "|---|---|---|---|---|---|---|"]
    for r in results:
        other = ", ".join(
            f"{k} {v:g}" for k, v in r.usage.items() if k not in ("cores", "others", "memory_mib")
        )
        failed = f" {r.failures} failed" if r.failures else ""
        rows.append(
            f"| {r.what} | {r.clients} | {r.qps:,.0f} | {_short(r.p50_ms)} | {_short(r.p99_ms)} | "
            f"{r.usage.get('cores', 0):.2f} | {other}{failed} |"
        )
    return "\n".join(rows)


def _short(value_ms: float) -> str:
    return f"{value_ms:.3f}" if value_ms < 1 else f"{value_ms:.1f}"
