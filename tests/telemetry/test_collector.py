"""What is scraped: every metric that has a name, no other, with the labels that were promised; and of who is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from scraped import Scraped

from spotjax import __version__
from spotjax.engine.observer import Work
from spotjax.fleet.notices.intervals import NoticeRecord
from spotjax.fleet.status import CapacityStatus, FleetStatus, InstanceStatus, ReplicaStatus
from spotjax.meshes.instance import DeviceRef, InstanceState
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.protocol.control import DeviceMemory, StageWork, Vitals
from spotjax.telemetry import metrics
from spotjax.telemetry.collector import MOST_SOURCES, ServerCollector
from spotjax.telemetry.instances import InstanceReport
from spotjax.telemetry.recorder import Recorder

PLACEMENT = Placement(
    7, MeshShape(1, 2, 1), ((0, 2), (2, 4)),
    {Position(0, 0, 0): DeviceRef("a", 0), Position(0, 1, 0): DeviceRef("b", 0)},
)  # fmt: skip
STATUS = FleetStatus(
    model="tiny",
    ready=True,
    draining=False,
    placement=PLACEMENT,
    instances=(
        InstanceStatus("a", "box", InstanceState.READY, 1),
        InstanceStatus("b", "box", InstanceState.READY, 1),
        InstanceStatus("c", "box", InstanceState.GONE, 1, price_class="on_demand"),
    ),
    replicas=(ReplicaStatus(0, 3, 2, 10, 40, 5),),
    queued=4,
    requests_running=9,
    requests_finished=1,
    tokens_committed=2,
    reconfigurations=1,
    uptime_seconds=1.0,
    notices=(NoticeRecord("gce", 3, 1), NoticeRecord("signal", 2)),
    capacity=CapacityStatus("gce", 2, "", "", 1.5, 0, 3.0, 0, (), (), on_demand_per_hour=4.5, spent=12.25),
    epoch=7,
    log_problem="disk full",
    work=Work(100, 80, 30, 12, 1),
)
VITALS = Vitals(
    (StageWork(0, 1, 20, 0.5),), (DeviceMemory(0, 3, 8),), sent=1, received=2, moved=3, loaded=4, backup=5, resident=6,
    cpu_seconds=7.5, compiled=8,
)  # fmt: skip
REPORTS = {"a": InstanceReport(VITALS, 0.25), "b": InstanceReport(None, 1.0)}


def everything() -> Scraped:
    return Scraped(Recorder(), lambda: STATUS, lambda: REPORTS)


def test_every_metric_is_there_and_no_other() -> None:
    names = {metric.name.removesuffix("_total") for metric in metrics.ALL.values()}
    assert everything().families == names


def test_samples_have_the_labels_that_the_metric_names() -> None:
    promised = {sample: metric for metric in metrics.ALL.values() for sample in metric.samples}
    for name, labels in everything().samples:
        assert [label for label, _ in labels if label != "le"] == sorted(promised[name].labels)


def test_values_are_those_of_the_status() -> None:
    scraped = everything()
    assert (scraped(metrics.RUNNING), scraped(metrics.WAITING)) == (3, 6)
    assert scraped(metrics.KV_USAGE, replica="0") == 0.25
    assert [scraped(metrics.KV_PAGES, replica="0", state=state) for state in ("used", "cached", "free")] == [10, 5, 25]
    assert (scraped(metrics.PREFIX_QUERIES), scraped(metrics.PREFIX_HITS)) == (80, 30)
    assert (scraped(metrics.RECOMPUTED), scraped(metrics.PREEMPTED)) == (12, 1)
    assert (scraped(metrics.EPOCH), scraped(metrics.LOG_PROBLEM), scraped(metrics.READY)) == (7, 1, 1)
    assert [scraped(metrics.MESH, axis=axis) for axis in ("data", "stage", "tensor")] == [1, 2, 1]
    assert scraped(metrics.INSTANCES, state="ready", price_class="spot") == 2
    assert scraped(metrics.INSTANCES, state="gone", price_class="on_demand") == 1
    assert scraped(metrics.INSTANCES, state="noticed", price_class="spot") == 0
    assert (scraped(metrics.NOTICES, source="gce"), scraped(metrics.NOTICES_WITHDRAWN, source="gce")) == (3, 1)
    assert (scraped(metrics.COST), scraped(metrics.COST_RATE), scraped(metrics.ON_DEMAND_RATE)) == (12.25, 1.5, 4.5)
    assert scraped(metrics.WANTED) == 2
    assert scraped(metrics.INFO, version=__version__, model="tiny") == 1


def test_workers_are_told_apart_and_those_that_are_gone_are_not_there() -> None:
    reports = dict(REPORTS)
    assert {dict(labels)["worker"] for _, labels in everything().samples if "worker" in dict(labels)} == {"a", "b"}
    scraped = everything()
    assert scraped(metrics.STAGE_TIME, "_sum", worker="a", replica="0", stage="1") == 0.5
    assert scraped(metrics.MOVED, worker="a", source="checkpoint") == 4
    assert scraped(metrics.DEVICE_LIMIT, worker="a", device="0") == 8
    assert scraped(metrics.CPU, worker="a") == 7.5
    assert scraped(metrics.HEARTBEAT_AGE, worker="b") == 1.0
    del reports["a"]
    left = Scraped(Recorder(), lambda: STATUS, lambda: reports)
    assert {dict(labels)["worker"] for _, labels in left.samples if "worker" in dict(labels)} == {"b"}


def test_a_server_that_starts_says_so() -> None:
    scraped = Scraped(Recorder())
    assert scraped(metrics.READY) == 0
    assert scraped(metrics.GENERATION_TOKENS) == 0
    with pytest.raises(KeyError):
        scraped(metrics.RUNNING)


def test_sources_of_notices_do_not_become_more_and_more_series() -> None:
    many = tuple(NoticeRecord(f"source-{number:03}", given=1) for number in range(1000))
    scraped = Scraped(Recorder(), lambda: replace(STATUS, notices=many))
    sources = [labels for name, labels in scraped.samples if name == metrics.NOTICES.name]
    assert len(sources) == MOST_SOURCES + 1
    assert scraped(metrics.NOTICES, source="other") == 1000 - MOST_SOURCES


def test_openmetrics_parses_with_units() -> None:
    registry = CollectorRegistry()
    registry.register(ServerCollector(Recorder(), lambda: STATUS, lambda: REPORTS))
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}
    assert families["spotjax_migration_bytes"].unit == "bytes"
    assert families["spotjax_time_to_first_token_seconds"].unit == "seconds"
    assert {f.type for f in families.values()} == {"counter", "gauge", "histogram", "summary"}
