"""How the host processes of one TPU slice become one jax runtime and find each other. Inside a slice only.

They are lost together: jax ends a process whose neighbour is gone, and so do we, sooner.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from spotjax.config import ServeConfig
from spotjax.errors import ConfigError
from spotjax.runtime.executables import Devices

ADDRESS_BYTES = 256
SILENCE_SECONDS = 30
"""After which jax ends the processes of a slice if one does not answer; we notice sooner, see ``slice_leader``."""
SHUTDOWN_SECONDS = 5


@dataclass(frozen=True)
class SliceHosts:
    """All hosts of this slice.

    Attributes:
      number: of this one.
      addresses: HOST:PORT of every host's data endpoint.
      devices: of the instance, all hosts together.
    """

    number: int
    addresses: tuple[str, ...]
    devices: Devices

    @classmethod
    def meet(cls, address: str) -> SliceHosts:
        """All hosts tell each other their addresses. Blocks until all have.

        Raises:
          ConfigError: the address is too long.
        """
        encoded = address.encode()
        if len(encoded) > ADDRESS_BYTES:
            raise ConfigError(f"advertise: {address} is longer than {ADDRESS_BYTES} bytes")
        row = np.frombuffer(encoded.ljust(ADDRESS_BYTES, b"\0"), np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(row))
        addresses = tuple(bytes(one).rstrip(b"\0").decode() for one in rows)
        return cls(jax.process_index(), addresses, tuple(jax.devices()))

    def of(self, device: int) -> int:
        """The host that has a device of the instance."""
        return int(self.devices[device].process_index)


def join_runtime(config: ServeConfig) -> None:
    """Makes this process a part of its slice's jax runtime. Blocks until all are there; before any other use of jax.

    Raises:
      ConfigError: the settings do not fit the slice.
    """
    hosts = config.slice_hosts
    # the signal of a preemption is ours, not that of jax's own service
    jax.config.update("jax_enable_preemption_service", False)
    if config.slice_coordinator:
        if config.devices_per_instance % hosts:
            raise ConfigError(
                f"devices_per_instance ({config.devices_per_instance}) must be a multiple of slice_hosts ({hosts})"
            )
        jax.config.update("jax_num_cpu_devices", config.devices_per_instance // hosts)  # of no effect elsewhere
        jax.distributed.initialize(
            config.slice_coordinator,
            hosts,
            config.slice_host,
            cluster_detection_method="deactivate",
            coordinator_bind_address=config.slice_coordinator if config.slice_host == 0 else None,
            heartbeat_timeout_seconds=SILENCE_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    else:
        jax.distributed.initialize(heartbeat_timeout_seconds=SILENCE_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    if jax.process_count() != hosts:
        raise ConfigError(f"slice_hosts is {hosts}, but the slice has {jax.process_count()} hosts")
