"""What operators see of the fleet: a snapshot, events, and the report of a reconfiguration. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spotjax.engine.observer import NO_WORK, Work
from spotjax.fleet.notices.intervals import NoticeRecord
from spotjax.meshes.instance import InstanceState, PriceClass
from spotjax.meshes.placement import Placement


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """One instance as operators see it.

    Attributes:
      name: of the instance.
      type: name of its instance type.
      state: where it is in its life.
      devices: number of devices.
      positions: mesh positions that its devices hold, by device index; devices without one are spare.
      zone: where the machine is; empty if it was not told.
      price_class: what it was rented as.
      address: HOST:PORT at which other instances reach it; empty for devices of this process.
      advised: a source says that it may or will be taken, now or later: it is time to look for another one.
      seconds_left: until its deadline, of one that has notice; None for others.
    """

    name: str
    type: str
    state: InstanceState
    devices: int
    positions: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    zone: str = ""
    price_class: PriceClass = "spot"
    address: str = ""
    advised: bool = False
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """Load of one replica.

    Attributes:
      data: which one.
      running, waiting: sequences.
      pages_used: KV pages that running sequences need.
      pages_total: KV pages.
      pages_cached: KV pages that none needs, kept for prompts that begin alike until others are needed.
      tokens_prefilled: positions that were computed by prefill since the replica was formed.
      tokens_reused: positions whose KV was found in the prefix cache since then.
    """

    data: int
    running: int
    waiting: int
    pages_used: int
    pages_total: int
    pages_cached: int = 0
    tokens_prefilled: int = 0
    tokens_reused: int = 0


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes that a change of the mesh brings to an instance, as it was planned.

    Attributes:
      source: the instance that they come from, which may be the same; empty for the checkpoint.
      target: the instance that needs them.
      bytes: all of them together.
    """

    source: str
    target: str
    bytes: int


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """Something happened that operators want to know.

    Attributes:
      time: Unix time in seconds.
      kind: ``ready recovered registered joined notice withdrawn lost plan precopy arranged saving saved stop switch
        draining log requested released stockout cap``.
      epoch: epoch at the time.
      message: one line for people.
      fields: the same as data (instance, bytes, seconds ...).
      number: counts the events of one controller from 1; 0 where nobody counts.
      flows: of a ``plan`` what parameters come from where, of a ``switch`` what KV did.
    """

    time: float
    kind: str
    epoch: int
    message: str
    fields: Mapping[str, str | int | float] = field(default_factory=dict)
    number: int = 0
    flows: tuple[Flow, ...] = ()


@dataclass(frozen=True, slots=True)
class MachineStatus:
    """One machine that a controller rents, or may be renting.

    Attributes:
      name, type, zone, price_class: what it was asked for as.
      price: USD per hour.
      state: what the provider says of it; ``not listed`` if it says nothing.
      standing: where it stands with the fleet: ``coming up leaving away dead absent``.
    """

    name: str
    type: str
    zone: str
    price_class: PriceClass
    price: float
    state: str
    standing: str


@dataclass(frozen=True, slots=True)
class CapacityStatus:
    """What a controller that buys its own capacity wants, has and spends.

    Attributes:
      provider: who rents machines out.
      wanted: instances.
      why: so many.
      waiting: what stands in the way of more; empty if nothing does.
      cost_per_hour: USD per hour of all machines that may exist.
      most_per_hour: cap on it; 0 for none.
      spent_today: USD since midnight UTC, at most.
      spent: USD ever, at most.
      most_per_day: cap on it; 0 for none.
      machines: all that may exist.
      actions: what was done last, the oldest first.
      on_demand_per_hour: USD per hour of the same machines on demand; 0 if the price of one is not known.
    """

    provider: str
    wanted: int
    why: str
    waiting: str
    cost_per_hour: float
    most_per_hour: float
    spent_today: float
    most_per_day: float
    machines: tuple[MachineStatus, ...]
    actions: tuple[FleetEvent, ...]
    on_demand_per_hour: float = 0.0
    spent: float = 0.0


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """A snapshot of the whole service.

    Attributes:
      model: name of the served model.
      ready: requests are being served.
      draining: no new requests are taken.
      placement: the current epoch's mesh, or None while no instance holds one.
      instances: every instance known, gone ones included.
      replicas: load of every replica.
      queued: accepted requests that no replica has taken yet.
      requests_running: accepted requests that are not finished.
      requests_finished: requests that ended since start.
      tokens_committed: output tokens committed since start.
      reconfigurations: epoch switches since start.
      uptime_seconds: since the service became ready.
      notices: what the notices of every source have come to since start.
      capacity: of a controller that buys its own; None for others.
      epoch: of the last mesh.
      log_problem: why nothing can be recorded at the moment, empty if all is well.
      work: what schedulers have done since start.
    """

    model: str
    ready: bool
    draining: bool
    placement: Placement | None
    instances: tuple[InstanceStatus, ...]
    replicas: tuple[ReplicaStatus, ...]
    queued: int
    requests_running: int
    requests_finished: int
    tokens_committed: int
    reconfigurations: int
    uptime_seconds: float
    notices: tuple[NoticeRecord, ...] = ()
    capacity: CapacityStatus | None = None
    epoch: int = 0
    log_problem: str = ""
    work: Work = NO_WORK


@dataclass(frozen=True, slots=True)
class Reconfiguration:
    """What one change of the mesh did.

    Attributes:
      epoch: the new epoch.
      before, after: placements, None where no mesh could be formed.
      bytes_in_place: needed bytes that stayed where they were.
      bytes_moved: bytes moved between devices, parameters and KV.
      bytes_loaded: bytes read from the checkpoint.
      precopy_seconds: parameters were brought into place while decoding went on.
      pause_seconds: from the token boundary at which decoding stopped to the switch.
      requests_kept: running sequences that went on with their KV.
      requests_recomputed: running sequences whose KV is computed again.
    """

    epoch: int
    before: Placement | None
    after: Placement | None
    bytes_in_place: int
    bytes_moved: int
    bytes_loaded: int
    precopy_seconds: float
    pause_seconds: float
    requests_kept: int
    requests_recomputed: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What a save on request has come to.

    Attributes:
      directory: the checkpoint.
      parameter_bytes: of parameters; 0 if they were not asked for.
      requests: whose tokens were saved, finished ones that are retained included.
      sequences: unfinished ones whose KV was saved; 0 where the mesh keeps no account of KV.
      positions: of these, what was recorded when their KV was saved; of KV there may be less.
      kv_bytes: of KV, on disk.
      left_out: instances that did not save all their KV.
      seconds: that it took.
    """

    directory: str
    parameter_bytes: int
    requests: int
    sequences: int
    positions: int
    kv_bytes: int
    left_out: tuple[str, ...]
    seconds: float
