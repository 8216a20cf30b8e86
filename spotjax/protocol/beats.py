"""The sign of life that a worker's heartbeat process sends to the controller; ``fleet.leases`` keeps count of them."""

from __future__ import annotations

import msgspec


class Beat(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The worker process of this incarnation of the instance exists and is not stopped. A frame without payload.

    Attributes:
      instance: name of the instance.
      incarnation: the registration that the beat belongs to; beats of an earlier one prolong nothing.
    """

    instance: str
    incarnation: str
