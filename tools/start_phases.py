"""What a start of a service was made of, by the log lines of its processes, and how ways to start compare."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Way:
    """A way to start again.

    Attributes:
      name: for people.
      asks_again: a new service is asked everything again; otherwise the old one goes on.
      kv: it finds its KV in the checkpoint.
      compiled: it finds compiled programs.
    """

    name: str
    asks_again: bool = False
    kv: bool = False
    compiled: bool = True


@dataclass(frozen=True)
class Start:
    """A start; seconds, one after another.

    Attributes:
      processes: from nothing until the last worker has its devices and looks for the controller.
      programs: until all workers have opened the model and compiled or loaded their programs.
      parameters: until all parameters are on the devices.
      kv: until the mesh runs, with the KV that there is.
      first_token: until the first token that a client had not seen, of any request.
      last_token: until such a token of every request.
      parameter_bytes: read from files.
      kept: sequences that went on with KV.
    """

    processes: float
    programs: float
    parameters: float
    kv: float
    first_token: float
    last_token: float
    parameter_bytes: int
    kept: int

    @property
    def to_first(self) -> float:
        """From nothing to the first token."""
        return self.processes + self.programs + self.parameters + self.kv + self.first_token

    @property
    def to_last(self) -> float:
        """From nothing to a token of every request."""
        return self.to_first + self.last_token


def what_happened(begin: float, records: Sequence[Mapping[str, Any]], firsts: Sequence[float]) -> Start:
    """A start by the log lines of its processes and the arrivals of first new tokens; Unix times.

    Raises:
      KeyError: there was no mesh.
    """
    joining = max(float(record["time"]) for record in records if record["message"].startswith("joining the fleet"))
    events: dict[str, Mapping[str, Any]] = {}
    for record in records:
        events.setdefault(record.get("event", ""), record)
    plan, precopy, switch = (events[kind] for kind in ("plan", "precopy", "switch"))
    moments = [begin, joining, *(float(record["time"]) for record in (plan, precopy, switch)), min(firsts), max(firsts)]
    processes, programs, parameters, kv, first, last = (b - a for a, b in itertools.pairwise(moments))
    loaded, kept = int(precopy["bytes_loaded"]), int(switch["kept"])
    return Start(processes, programs, parameters, kv, first, last, loaded, kept)


def medians(way: Way, starts: Sequence[Start]) -> dict[str, Any]:
    """One line of the table."""
    row: dict[str, Any] = {"way": way.name}
    for name in ("processes", "programs", "parameters", "kv", "first_token", "last_token", "to_first", "to_last"):
        row[name] = statistics.median(getattr(start, name) for start in starts)
    row["parameter_MB_per_second"] = statistics.median(s.parameter_bytes / s.parameters / 1e6 for s in starts)
    return row | {"with_kv": starts[-1].kept}


def compared(starts: Mapping[Way, Sequence[Start]]) -> list[dict[str, Any]]:
    """What new services take over what those take that go on: medians of the ratios of every turn."""
    return [
        {"ways": f"{other.name} / {way.name}"}
        | {
            name: statistics.median(
                getattr(b, name) / getattr(a, name) for a, b in zip(starts[way], starts[other], strict=True)
            )
            for name in ("to_first", "to_last")
        }
        for way in starts
        if not way.asks_again
        for other in starts
        if other.asks_again
    ]
