"""What whoever measures a service is told of it: its engine's part, and every migration from one mesh to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from spotjax.engine.observer import EngineObserver
from spotjax.engine.observer import Unobserved as UnobservedEngine
from spotjax.engine.sequence import Sequence

Path = Literal["first", "planned", "loss", "resume"]
"""Why a mesh changes: there was none before; instances leave or join and all are still there; one is gone; decoding had
stopped for want of instances, or because an earlier controller ended."""
Outcome = Literal["switched", "suspended", "lost", "replanned"]
"""The new mesh decodes; no mesh fits, requests wait; an instance of it went away; others came, so that a better mesh is
planned."""
Phase = Literal["plan", "prepare", "precopy", "wait", "stop", "final", "switch"]
"""Parts of a migration, in order: deciding on the mesh; parameters are brought in place; KV is copied while decoding
goes on; the wait for the token boundary; until it is reached; the rest of the KV is moved; the new replicas start."""
STOPPED: tuple[Phase, ...] = ("stop", "final", "switch")
"""Those in which what changes does not decode."""


class Bytes(NamedTuple):
    """What was brought into place, in bytes.

    Attributes:
      parameters_moved: between devices.
      parameters_loaded: from the checkpoint.
      kv_precopied: between devices, while decoding went on.
      kv_moved: between devices, after it had stopped.
    """

    parameters_moved: int = 0
    parameters_loaded: int = 0
    kv_precopied: int = 0
    kv_moved: int = 0


class Paused(NamedTuple):
    """A sequence that had begun on a replica that was stopped.

    Attributes:
      request_id, choice: which one.
      computed: positions whose KV there was.
      kept: of these, what is on the new mesh.
    """

    request_id: str
    choice: int
    computed: int
    kept: int


@dataclass(frozen=True, slots=True)
class Migration:
    """One attempt to change the mesh, when it is over.

    Attributes:
      path: why.
      outcome: what came of it.
      epoch: of the new mesh; of the one before where there is none.
      began: monotonic seconds.
      phases: those that were gone through, with the monotonic seconds at which each ended.
      bytes: brought into place; of one that came to nothing, as far as it is known.
      pause_seconds: from the moment that decoding was stopped to the switch; 0 without a switch.
      paused: sequences that were stopped and went on.
    """

    path: Path
    outcome: Outcome
    epoch: int
    began: float
    phases: tuple[tuple[Phase, float], ...]
    bytes: Bytes
    pause_seconds: float = 0.0
    paused: tuple[Paused, ...] = ()

    @property
    def ended(self) -> float:
        """Monotonic seconds."""
        return self.phases[-1][1] if self.phases else self.began


class Observer(EngineObserver, Protocol):
    """Follows a service."""

    def migrated(self, migration: Migration) -> None:
        """An attempt to change the mesh is over."""
        ...


class Unobserved(UnobservedEngine):
    """Nobody listens."""

    def migrated(self, migration: Migration) -> None:
        """See ``Observer.migrated``."""


class Underway:
    """A migration on its way. Notes what it goes through, and tells once what came of it.

    Args:
      observer: is told.
      clock: monotonic seconds.
      path: why.
      began: on that clock.
    """

    def __init__(self, observer: Observer, clock: Callable[[], float], path: Path, began: float) -> None:
        self._observer, self._clock, self._path, self._began = observer, clock, path, began
        self._phases: list[tuple[Phase, float]] = []
        self._bytes = Bytes()

    def done(self, phase: Phase, **moved: int) -> None:
        """A phase is over, in which so many bytes were brought into place."""
        self._phases.append((phase, self._clock()))
        self._bytes = self._bytes._replace(**moved)

    def switched(self, epoch: int, pause_seconds: float, paused: Iterable[tuple[Sequence, int]]) -> None:
        """The new mesh decodes. ``paused``: the sequences that were stopped, and what was computed of each then."""
        self.done("switch")
        self._end(
            "switched", epoch, pause_seconds,
            tuple(Paused(s.state.request_id, s.state.choice, before, s.computed) for s, before in paused),
        )  # fmt: skip

    def failed(self, outcome: Outcome, epoch: int) -> None:
        """It came to nothing."""
        self._end(outcome, epoch, 0.0, ())

    def _end(self, outcome: Outcome, epoch: int, pause: float, paused: tuple[Paused, ...]) -> None:
        phases = tuple(self._phases)
        self._observer.migrated(Migration(self._path, outcome, epoch, self._began, phases, self._bytes, pause, paused))
