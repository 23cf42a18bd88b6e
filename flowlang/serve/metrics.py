"""Metrics of running flows as Prometheus text (prometheus.io, "Exposition formats").

Layer 4, and the only file importing prometheus_client. The counts are kept by the scheduler, which
goes when others take over from its flows; here they are added up, named, and written out when
somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowlang import __version__
from flowlang.diagnostics import Draining
from flowlang.runtime.metrics import BATCH_SIZES, FlowCounts, Histogram, StageCounts, Succession

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from flowlang.app import App
    from flowlang.runtime.entrance import Stage
    from flowlang.runtime.scheduler import Scheduler

KIND = b"text/plain; version=0.0.4; charset=utf-8"


class _Counted:
    """What flows and stages have counted, by the names that metrics have for them."""

    def __init__(self) -> None:
        self.flows: dict[str, FlowCounts] = {}
        self.stages: dict[tuple[str, str], StageCounts] = {}

    @classmethod
    def by(cls, scheduler: Scheduler) -> _Counted:
        """What a scheduler counts, now and from now on."""
        found = cls()
        found.flows = {name: e.counts for name, e in scheduler.entrances.items()}
        found.stages = {_labels(stage): stage.counts for stage in scheduler.stages}
        return found

    def merge(self, other: _Counted) -> None:
        for name, counts in other.flows.items():
            self.flows.setdefault(name, FlowCounts()).merge(counts)
        for labels, of_stage in other.stages.items():
            self.stages.setdefault(labels, StageCounts()).merge(of_stage)


class Counts:
    """The flows there are, and what was counted of those that they have taken over from."""

    def __init__(self) -> None:
        self.app: App | None = None
        self._past = _Counted()
        self._succession = Succession(self._past.merge)

    def follow(self, app: App) -> None:
        """These are the flows from now on. Those before go on to count what they still have."""
        self.app = app
        self._succession.follow(app.scheduler, _Counted.by(app.scheduler))

    def total(self) -> _Counted:
        """Everything that was counted, whoever did."""
        living = self._succession.living()
        found = _Counted()
        for counted in (self._past, *living[:-1]):
            found.merge(counted)
        for counts in found.flows.values():  # who takes over answers, and counts, what was left
            counts.failures.pop(Draining.code, None)
        for counted in living[-1:]:
            found.merge(counted)
        return found


def _labels(stage: Stage) -> tuple[str, str]:
    return f"{stage.plan.index + 1} {stage.plan.name}", stage.plan.place


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
        total = counts.total()
        yield from _of_flows(total, counts.app)
        yield from _of_stages(total, counts.app)


def _of_flows(total: _Counted, app: App) -> Iterator[Metric]:
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
    for name, counts in total.flows.items():
        for code, count in counts.outcomes.items():
            requests.add_metric([name, code], count)
        _add(seconds, [name], counts.latency_s)
    for name, entrance in app.scheduler.entrances.items():
        inside.add_metric([name], entrance.outstanding)
        limit.add_metric([name], entrance.limit)
    return iter((requests, seconds, inside, limit))


def _of_stages(total: _Counted, app: App) -> Iterator[Metric]:
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
    for named, counts in total.stages.items():
        busy.add_metric(named, counts.busy_s)
        for code, count in counts.failures.items():
            failures.add_metric([*named, code], count)
        _add(sizes, named, _by_size(counts.sizes))
        _add(waited, named, counts.waited_s)
    return iter((waiting, instances, busy, failures, sizes, waited))


def _histogram(name: str, text: str, labels: Sequence[str] = ("flow",)) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    return HistogramMetricFamily(name, text, labels=list(labels))


def _add(family: Any, labels: Sequence[str], counted: Histogram) -> None:
    """A histogram's buckets, each with all that fell up to its bound."""
    buckets, total = [], 0
    for bound, count in zip((*counted.bounds, float("inf")), counted.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else f"{bound:g}", total))
    family.add_metric(list(labels), buckets, counted.sum)


def _by_size(sizes: Mapping[int, int]) -> Histogram:
    found = Histogram(BATCH_SIZES)
    for size, count in sizes.items():
        found.add(size, count)
    return found
