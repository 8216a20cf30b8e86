"""Puts what was recorded, and what is, into the form that is scraped. A prometheus_client collector.

Values are read on the event loop's thread. Series of instances that are gone are not there any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from spotjax import __version__
from spotjax.engine.request import FinishReason
from spotjax.fleet.observer import Outcome, Path
from spotjax.fleet.status import CapacityStatus, FleetStatus
from spotjax.meshes.instance import InstanceState, PriceClass
from spotjax.telemetry import metrics
from spotjax.telemetry.histogram import Histogram
from spotjax.telemetry.instances import InstanceReport
from spotjax.telemetry.metrics import Metric
from spotjax.telemetry.recorder import Recorder

MOST_SOURCES = 32
"""Sources of notices that have a series of their own: their names are workers' to choose."""


class Value(NamedTuple):
    """A sample: values of a metric's labels, in order, and its own."""

    labels: tuple[str, ...]
    value: float


def alone(metric: Metric, value: float) -> Family:
    """A metric without labels."""
    return labelled(metric, [Value((), value)])


def labelled(metric: Metric, values: Iterable[Value]) -> Family:
    """A counter or gauge."""
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def distribution(metric: Metric, histograms: Mapping[tuple[str, ...], Histogram]) -> Family:
    """A histogram, by the values of its labels."""
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
    for labels, histogram in histograms.items():
        family.add_metric(labels, histogram.buckets(), histogram.sum)
    return family


class ServerCollector(Collector):
    """All metrics of one server.

    Args:
      recorder: what happened.
      status: what is; None while there is nothing to serve yet.
      instances: what workers say.
    """

    def __init__(
        self,
        recorder: Recorder,
        status: Callable[[], FleetStatus | None],
        instances: Callable[[], Mapping[str, InstanceReport]],
    ) -> None:
        self._recorder, self._status, self._instances = recorder, status, instances

    def describe(self) -> Iterable[Family]:
        """Nothing is checked when this is registered: there is one of these in a registry."""
        return ()

    def collect(self) -> Iterator[Family]:
        """Every metric that there is something to say of."""
        status = self._status()
        yield labelled(metrics.INFO, [Value((__version__, status.model if status else ""), 1.0)])
        yield alone(metrics.READY, float(status is not None and status.ready))
        yield alone(metrics.DRAINING, float(status is not None and status.draining))
        yield from of_requests(self._recorder)
        yield from of_migrations(self._recorder)
        if status is not None:
            yield from of_engine(status)
            yield from of_fleet(status)
            if status.capacity is not None:
                yield from of_cost(status.capacity)
        yield from of_instances(self._instances())


def of_requests(recorder: Recorder) -> Iterator[Family]:
    """What happened to requests."""
    r = recorder
    yield labelled(metrics.SUCCESS, [Value((str(reason),), r.success[reason]) for reason in FinishReason])
    yield alone(metrics.PROMPT_TOKENS, r.prompt_tokens)
    yield alone(metrics.GENERATION_TOKENS, r.generation_tokens)
    yield distribution(metrics.QUEUE_TIME, {(): r.queue_time})
    yield distribution(metrics.TTFT, {(): r.first_token})
    yield distribution(metrics.INTER_TOKEN, {(): r.inter_token})
    yield distribution(metrics.E2E, {(): r.whole})
    yield distribution(metrics.STEP_TIME, {("prefill",): r.steps[True], ("decode",): r.steps[False]})
    yield distribution(metrics.COMMIT_TIME, {(): r.commits})


def of_migrations(recorder: Recorder) -> Iterator[Family]:
    """What happened to the mesh."""
    r = recorder
    ways = [(path, outcome) for path in get_args(Path) for outcome in get_args(Outcome)]
    yield labelled(metrics.MIGRATIONS, [Value(way, r.migrations[way]) for way in ways])
    yield distribution(metrics.MIGRATION_TIME, {(): r.migration_time})
    yield distribution(metrics.MIGRATION_PAUSE, {(): r.migration_pause})
    yield labelled(
        metrics.MIGRATION_BYTES,
        [
            Value(kind, r.migration_bytes[kind])
            for kind in (("instance", "parameters"), ("checkpoint", "parameters"), ("instance", "kv"))
        ],
    )
    yield alone(metrics.RESUMED, r.resumed)


def of_engine(status: FleetStatus) -> Iterator[Family]:
    """Replicas and the log."""
    replicas = status.replicas
    yield alone(metrics.RUNNING, sum(replica.running for replica in replicas))
    yield alone(metrics.WAITING, status.queued + sum(replica.waiting for replica in replicas))
    yield labelled(metrics.KV_USAGE, [Value((str(r.data),), r.pages_used / max(1, r.pages_total)) for r in replicas])
    pages = []
    for r in replicas:
        free = r.pages_total - r.pages_used - r.pages_cached
        for state, count in (("used", r.pages_used), ("cached", r.pages_cached), ("free", free)):
            pages.append(Value((str(r.data), state), count))
    yield labelled(metrics.KV_PAGES, pages)
    yield alone(metrics.PREFIX_QUERIES, status.work.queried)
    yield alone(metrics.PREFIX_HITS, status.work.reused)
    yield alone(metrics.PREEMPTED, status.work.preempted)
    yield alone(metrics.RECOMPUTED, status.work.recomputed)
    yield alone(metrics.LOG_PROBLEM, float(bool(status.log_problem)))


def of_fleet(status: FleetStatus) -> Iterator[Family]:
    """The mesh, its instances and their notices."""
    yield alone(metrics.EPOCH, status.epoch)
    shape = status.placement.shape if status.placement is not None else None
    degrees = {"data": 0, "stage": 0, "tensor": 0}
    if shape is not None:
        degrees = {"data": shape.data, "stage": shape.stage, "tensor": shape.tensor}
    yield labelled(metrics.MESH, [Value((axis,), degree) for axis, degree in degrees.items()])
    kinds = [(state, price) for state in InstanceState for price in get_args(PriceClass)]
    have = [(instance.state, instance.price_class) for instance in status.instances]
    yield labelled(
        metrics.INSTANCES, [Value((str(state), price), have.count((state, price))) for state, price in kinds]
    )
    given: dict[str, float] = {}
    withdrawn: dict[str, float] = {}
    for number, record in enumerate(status.notices):
        source = record.source if number < MOST_SOURCES else "other"
        given[source] = given.get(source, 0) + record.given
        withdrawn[source] = withdrawn.get(source, 0) + record.withdrawn
    yield labelled(metrics.NOTICES, [Value((source,), count) for source, count in given.items()])
    yield labelled(metrics.NOTICES_WITHDRAWN, [Value((source,), count) for source, count in withdrawn.items()])


def of_cost(capacity: CapacityStatus) -> Iterator[Family]:
    """What rented machines cost."""
    yield alone(metrics.COST, capacity.spent)
    yield alone(metrics.COST_RATE, capacity.cost_per_hour)
    yield alone(metrics.ON_DEMAND_RATE, capacity.on_demand_per_hour)
    yield alone(metrics.WANTED, capacity.wanted)


def of_instances(reports: Mapping[str, InstanceReport]) -> Iterator[Family]:
    """What workers say of themselves, by name."""
    yield labelled(metrics.HEARTBEAT_AGE, [Value((name,), report.heartbeat_age) for name, report in reports.items()])
    vitals = {name: report.vitals for name, report in reports.items() if report.vitals is not None}
    if not vitals:
        return
    metric = metrics.STAGE_TIME
    stages = SummaryMetricFamily(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
    for name, v in vitals.items():
        for stage in v.stages:
            stages.add_metric((name, str(stage.replica), str(stage.stage)), stage.steps, stage.seconds)
    yield stages
    moved = {name: (("instance", v.moved), ("checkpoint", v.loaded)) for name, v in vitals.items()}
    yield labelled(
        metrics.MOVED, [Value((name, source), size) for name, both in moved.items() for source, size in both]
    )
    memory = [(name, device) for name, v in vitals.items() for device in v.devices]
    yield labelled(metrics.DEVICE_USED, [Value((name, str(d.device)), d.used) for name, d in memory])
    yield labelled(metrics.DEVICE_LIMIT, [Value((name, str(d.device)), d.limit) for name, d in memory])
    for metric, values in (
        (metrics.SENT, {name: v.sent for name, v in vitals.items()}),
        (metrics.RECEIVED, {name: v.received for name, v in vitals.items()}),
        (metrics.BACKUP, {name: v.backup for name, v in vitals.items()}),
        (metrics.RESIDENT, {name: v.resident for name, v in vitals.items()}),
        (metrics.CPU, {name: v.cpu_seconds for name, v in vitals.items()}),
        (metrics.COMPILED, {name: v.compiled for name, v in vitals.items()}),
    ):
        yield labelled(metric, [Value((name,), float(value)) for name, value in values.items()])
