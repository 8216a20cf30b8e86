"""Metrics as a scraper sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from spotjax.fleet.status import FleetStatus
from spotjax.telemetry.collector import ServerCollector
from spotjax.telemetry.instances import InstanceReport
from spotjax.telemetry.metrics import Metric
from spotjax.telemetry.recorder import Recorder


class Scraped:
    """Samples by metric and labels."""

    def __init__(
        self,
        recorder: Recorder,
        status: Callable[[], FleetStatus | None] = lambda: None,
        instances: Callable[[], Mapping[str, InstanceReport]] = dict,
    ) -> None:
        registry = CollectorRegistry()
        registry.register(ServerCollector(recorder, status, instances))
        self.families = {family.name for family in registry.collect()}
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in registry.collect()
            for sample in family.samples
        }

    def __call__(self, metric: Metric, suffix: str = "", **labels: str) -> float:
        return self.samples[metric.name + suffix, tuple(sorted(labels.items()))]
