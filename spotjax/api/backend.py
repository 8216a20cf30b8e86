"""What the servicers serve, once it is there: the server listens before the model is loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from spotjax.api.access.caller_service import CallerService
from spotjax.api.access.current import current_caller
from spotjax.api.access.gate import Gate, OpenGate
from spotjax.api.access.metering import Meters
from spotjax.api.errors import Unavailable
from spotjax.api.validation import ServedModel
from spotjax.fleet.service import Service
from spotjax.fleet.status import FleetStatus


@dataclass(slots=True)
class Backend:
    """A service and the model it serves; both None while the server starts.

    Attributes:
      draining: the server was told to end, whether there is a service already or not.
      gate: knows who may call.
      meters: what callers have used.
    """

    service: Service | None = None
    model: ServedModel | None = None
    draining: bool = False
    gate: Gate = field(default_factory=OpenGate)
    meters: Meters = field(default_factory=lambda: Meters(time.monotonic))

    def attach(self, service: Service, model: ServedModel) -> None:
        """From now on this is what is served."""
        self.service, self.model = service, model
        service.observe(self.meters)

    def for_caller(self) -> tuple[CallerService, ServedModel]:
        """The service as the current caller sees it, and the model: for all that generates.

        Raises:
          Unavailable: the server is starting.
        """
        (service, model), caller = self.get(), current_caller()
        return CallerService(service, caller, self.meters, model.name), model

    def get(self) -> tuple[Service, ServedModel]:
        """Both, for all that changes and shows the fleet.

        Raises:
          Unavailable: the server is starting.
        """
        if self.service is None or self.model is None:
            raise Unavailable("the server is starting, its model is still being loaded")
        return self.service, self.model

    def status(self) -> FleetStatus | None:
        """The service as it is; None while the server starts."""
        return None if self.service is None else self.service.status()

    @property
    def ready(self) -> bool:
        """Whether requests are being served and new ones taken."""
        if self.service is None or self.draining:
            return False
        status = self.service.status()
        return status.ready and not status.draining
