"""What the servicers serve, once it is there: the server listens before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from spotjax.api.errors import Unavailable
from spotjax.api.validation import ServedModel
from spotjax.fleet.service import Service


@dataclass(slots=True)
class Backend:
    """A service and the model it serves; both None while the server starts.

    Attributes:
      draining: the server was told to end, whether there is a service already or not.
    """

    service: Service | None = None
    model: ServedModel | None = None
    draining: bool = False

    def get(self) -> tuple[Service, ServedModel]:
        """Both.

        Raises:
          Unavailable: the server is starting.
        """
        if self.service is None or self.model is None:
            raise Unavailable("the server is starting, its model is still being loaded")
        return self.service, self.model

    @property
    def ready(self) -> bool:
        """Whether requests are being served and new ones taken."""
        if self.service is None or self.draining:
            return False
        status = self.service.status()
        return status.ready and not status.draining
