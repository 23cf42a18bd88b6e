"""Metrics of running flows as Prometheus text (prometheus.io, "Exposition formats").

Layer 4, and the only file importing prometheus_client. The counts are kept by the scheduler; here
they are named and written out when somebody asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowlang import __version__
from flowlang.diagnostics import Draining
from flowlang.runtime.metrics import BATCH_SIZES, FlowCounts, Histogram, StageCounts

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from flowlang.app import App
    from flowlang.runtime.entrance import Stage

KIND = b"text/plain; version=0.0.4; charset=utf-8"


class Counts:
    """The flows there are, and what was counted of those that they have taken over from."""

    def __init__(self) -> None:
        self.app: App | None = None
        self._flows: dict[str, list[FlowCounts]] = {}  # those of one name, whatever their app
        self._stages: dict[tuple[str, str], list[StageCounts]] = {}

    def follow(self, app: App) -> None:
        """These are the flows from now on. Those before go on to count what they still have."""
        self.app = app
        for name, entrance in app.scheduler.entrances.items():
            self._flows.setdefault(name, []).append(entrance.counts)
        for stage in app.scheduler.stages:
            self._stages.setdefault(_labels(stage), []).append(stage.counts)

    def of_flows(self) -> Iterator[tuple[str, Mapping[str, int], Histogram]]:
        """Of each flow its name, its outcomes and its latencies."""
        entrances = self.app.scheduler.entrances if self.app is not None else {}
        for name, counts in self._flows.items():
            now = entrances[name].counts if name in entrances else None
            outcomes: Counter[str] = Counter()
            for counted in counts:
                outcomes.update(counted.outcomes)
                if counted is not now:  # who takes over answers, and counts, what was left
                    outcomes[Draining.code] -= counted.failures.get(Draining.code, 0)
            if not outcomes[Draining.code]:
                del outcomes[Draining.code]
            yield name, outcomes, _sum([counted.latency_s for counted in counts])

    def of_stages(self) -> Iterable[tuple[tuple[str, str], list[StageCounts]]]:
        """Of each stage its labels, and its counts."""
        return self._stages.items()


def _labels(stage: Stage) -> tuple[str, str]:
    return f"{stage.plan.index + 1} {stage.plan.name}", stage.plan.device


def metrics_text(counts: Counts, state: str, refusals: Mapping[str, int]) -> bytes:
    """Everything that is counted, in Prometheus' text format.

    `state` is the server's, and `refusals` are those of requests that are of no flow, by code.
    """
    from prometheus_client import generate_latest

    class Source:
        def collect(self) -> Iterable[Metric]:
            return _metrics(counts, state, refusals)

    return bytes(generate_latest(Source()))


def _metrics(counts: Counts, state: str, refusals: Mapping[str, int]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    info = GaugeMetricFamily("flowlang_info", "The version that runs.", labels=["version"])
    info.add_metric([__version__], 1)
    yield info
    ready = GaugeMetricFamily("flowlang_ready", "1 while requests are let in, else 0.")
    ready.add_metric([], float(state == "ready"))
    yield ready
    refused = CounterMetricFamily(
        "flowlang_refusals", "Requests refused that are of no flow, by code.", labels=["code"]
    )
    for code, count in refusals.items():
        refused.add_metric([code], count)
    yield refused
    if counts.app is not None:
        yield from _of_flows(counts, counts.app)
        yield from _of_stages(counts, counts.app)


def _of_flows(counts: Counts, app: App) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    requests = CounterMetricFamily(
        "flowlang_requests",
        "Requests by their outcome, ok or an error's code; of several items each is one.",
        labels=["flow", "code"],
    )
    seconds = _histogram("flowlang_request_seconds", "From a request's arrival to its answer.")
    inside = GaugeMetricFamily(
        "flowlang_requests_inside", "Requests taken and not yet answered.", labels=["flow"]
    )
    limit = GaugeMetricFamily(
        "flowlang_requests_limit", "Requests that may be inside at once.", labels=["flow"]
    )
    for name, outcomes, latency_s in counts.of_flows():
        for code, count in outcomes.items():
            requests.add_metric([name, code], count)
        _add(seconds, [name], latency_s)
    for name, entrance in app.scheduler.entrances.items():
        inside.add_metric([name], entrance.outstanding)
        limit.add_metric([name], entrance.limit)
    return iter((requests, seconds, inside, limit))


def _of_stages(counts: Counts, app: App) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ["stage", "device"]
    waiting = GaugeMetricFamily(
        "flowlang_stage_waiting", "Items in a stage's queue.", labels=labels
    )
    instances = GaugeMetricFamily("flowlang_stage_instances", "Instances at work.", labels=labels)
    busy = CounterMetricFamily(
        "flowlang_stage_busy_seconds", "Time that instances worked, added up.", labels=labels
    )
    failures = CounterMetricFamily(
        "flowlang_stage_failures",
        "Items that failed in a stage, by code.",
        labels=[*labels, "code"],
    )
    sizes = _histogram("flowlang_stage_batch_size", "Items a batch held.", labels)
    waited = _histogram(
        "flowlang_stage_wait_seconds", "How long the oldest item of a batch waited.", labels
    )
    for stage in app.scheduler.stages:
        waiting.add_metric(_labels(stage), len(stage.batcher.waiting))
        instances.add_metric(_labels(stage), stage.plan.instances - stage.lost)
    for named, all_there_were in counts.of_stages():
        busy.add_metric(named, sum(counted.busy_s for counted in all_there_were))
        failed: Counter[str] = Counter()
        for counted in all_there_were:
            failed.update(counted.failures.copy())
        for code, count in failed.items():
            failures.add_metric([*named, code], count)
        _add(sizes, named, _sum([_by_size(counted.sizes.copy()) for counted in all_there_were]))
        _add(waited, named, _sum([counted.waited_s for counted in all_there_were]))
    return iter((waiting, instances, busy, failures, sizes, waited))


def _histogram(name: str, text: str, labels: Sequence[str] = ("flow",)) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    return HistogramMetricFamily(name, text, labels=list(labels))


def _sum(histograms: Sequence[Histogram]) -> Histogram:
    """What several histograms of the same bounds hold together."""
    found = Histogram(histograms[0].bounds)
    found.counts = [sum(counts) for counts in zip(*(h.counts for h in histograms), strict=True)]
    found.sum = sum(h.sum for h in histograms)
    return found


def _add(family: Any, labels: Sequence[str], counted: Histogram) -> None:
    """A histogram's buckets, each with all that fell up to its bound."""
    buckets, total = [], 0
    for bound, count in zip((*counted.bounds, float("inf")), list(counted.counts), strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else f"{bound:g}", total))
    family.add_metric(list(labels), buckets, counted.sum)


def _by_size(sizes: Mapping[int, int]) -> Histogram:
    found = Histogram(BATCH_SIZES)
    for size, count in sizes.items():
        found.add(size, count)
    return found
