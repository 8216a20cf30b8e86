"""What one server shows of itself: a registry of its own to be scraped, and spans if it is to send some."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from spotjax.fleet.status import FleetStatus
from spotjax.telemetry.collector import ServerCollector
from spotjax.telemetry.instances import InstanceReport
from spotjax.telemetry.recorder import Recorder
from spotjax.telemetry.tracing import Tracing, open_export


class ServerTelemetry:
    """Of one server; several may be in one process.

    Args:
      status: the service as it is; None before there is one.
      endpoint: where spans go to by OTLP; empty for nowhere.

    Attributes:
      registry: what is scraped.
      recorder: the observer of the service.
      instances: what workers say of themselves; to be set by who knows.

    Raises:
      ConfigError: spans are wanted, and OpenTelemetry is not installed.
    """

    def __init__(self, status: Callable[[], FleetStatus | None], endpoint: str = "") -> None:
        self._export = open_export(endpoint) if endpoint else None
        self.recorder = Recorder(Tracing(self._export.provider) if self._export is not None else None)
        self.instances: Callable[[], Mapping[str, InstanceReport]] = dict
        self.registry = CollectorRegistry()
        self.registry.register(ServerCollector(self.recorder, status, lambda: self.instances()))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    async def close(self) -> None:
        """Hands over the spans that are left, as far as that can be done in short time."""
        if self._export is not None:
            await self._export.close()
