"""Metrics of running flows as Prometheus text (prometheus.io, "Exposition formats").

Layer 4, and the only file importing prometheus_client. The counts are kept by the scheduler; here
they are named and written out when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowlang import __version__
from flowlang.runtime.metrics import BATCH_SIZES, Histogram

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from flowlang.app import App

KIND = b"text/plain; version=0.0.4; charset=utf-8"


def metrics_text(app: App | None, state: str, refusals: Mapping[str, int]) -> bytes:
    """Everything that is counted, in Prometheus' text format.

    `state` is the server's, and `refusals` are those of requests that are of no flow, by code.
    """
    from prometheus_client import generate_latest

    class Source:
        def collect(self) -> Iterable[Metric]:
            return _metrics(app, state, refusals)

    return bytes(generate_latest(Source()))


def _metrics(app: App | None, state: str, refusals: Mapping[str, int]) -> Iterator[Metric]:
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
    if app is not None:
        yield from _of_flows(app)
        yield from _of_stages(app)


def _of_flows(app: App) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    requests = CounterMetricFamily(
        "flowlang_requests", "Requests by their outcome: ok, or an error's code.",
        labels=["flow", "code"],
    )  # fmt: skip
    seconds = _histogram("flowlang_request_seconds", "From a request's arrival to its answer.")
    inside = GaugeMetricFamily(
        "flowlang_requests_inside", "Requests taken and not yet answered.", labels=["flow"]
    )
    limit = GaugeMetricFamily(
        "flowlang_requests_limit", "Requests that may be inside at once.", labels=["flow"]
    )
    for name, entrance in app.scheduler.entrances.items():
        for code, count in entrance.counts.outcomes.items():
            requests.add_metric([name, code], count)
        _add(seconds, [name], entrance.counts.latency_s)
        inside.add_metric([name], entrance.outstanding)
        limit.add_metric([name], entrance.limit)
    return iter((requests, seconds, inside, limit))


def _of_stages(app: App) -> Iterator[Metric]:
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
        named = [f"{stage.plan.index + 1} {stage.plan.name}", stage.plan.device]
        waiting.add_metric(named, len(stage.batcher.waiting))
        instances.add_metric(named, stage.plan.instances - stage.lost)
        busy.add_metric(named, stage.counts.busy_s)
        for code, count in stage.counts.failures.copy().items():
            failures.add_metric([*named, code], count)
        _add(sizes, named, _by_size(stage.counts.sizes.copy()))
        _add(waited, named, stage.counts.waited_s)
    return iter((waiting, instances, busy, failures, sizes, waited))


def _histogram(name: str, text: str, labels: Sequence[str] = ("flow",)) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    return HistogramMetricFamily(name, text, labels=list(labels))


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
