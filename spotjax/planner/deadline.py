"""Just-in-time arrangement: after how many more token steps decoding stops for a change of the mesh. Changes nothing.

SpotServe (Miao et al. 2024, section 4.1): before a preemption, the most steps after which the migration still fits,
S = argmax { l_exe(S) < T- - T_mig }; for an acquisition, the fewest after which the newcomer is ready,
S = argmin { l_exe(S) >= T+ }. The original decides once for each static batch; here steps end at token boundaries under
continuous batching, sequences that finish on the way need no migration, and every notice makes a new arrangement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, inf

import numpy as np
from numpy.typing import NDArray

MARGIN = 0.2
"""Share by which steps and transfers may take longer, or shorter, than expected."""

LONGEST_PLAN = 1_000_000
"""Steps that are looked ahead at most."""


class Saved(StrEnum):
    """What of the running sequences goes over."""

    KV = "kv"
    SOME_KV = "some kv"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class RunningSequence:
    """A sequence on the replicas that are about to change.

    Attributes:
      key: unique among them.
      bytes: KV that would have to move after the stop: all of it, less what was pre-copied.
      remaining: tokens that it will still generate at most.
      recompute_seconds: time to compute its KV again.
      held_by: instances that hold its KV; without any of them it is lost.
    """

    key: str
    bytes: int
    remaining: int
    recompute_seconds: float
    held_by: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast things go.

    Attributes:
      step_seconds: between two token boundaries.
      in_flight_seconds: until the boundary that ends the step under way.
      bandwidth: bytes per second at which KV moves, all links of the plan together.
      fixed_seconds: of a migration, whatever its size: stop, switch, epoch.
      bytes_per_step: KV that one step adds to each sequence.
      margin: share by which all of that may be wrong.

    Raises:
      ValueError: a step or the bandwidth is not above 0.
    """

    step_seconds: float
    in_flight_seconds: float = 0.0
    bandwidth: float = 1e9
    fixed_seconds: float = 0.0
    bytes_per_step: int = 0
    margin: float = MARGIN

    def __post_init__(self) -> None:
        if self.step_seconds <= 0 or self.bandwidth <= 0:
            raise ValueError(f"a step and the bandwidth must be above 0, got {self.step_seconds} and {self.bandwidth}")


@dataclass(frozen=True, slots=True)
class Departure:
    """An instance that goes: at ``deadline``, in monotonic seconds, or before; in the past when it is gone already."""

    instance: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """An instance that can serve from ``ready_at``, in monotonic seconds."""

    instance: str
    ready_at: float


@dataclass(frozen=True, slots=True)
class Arrangement:
    """When to stop, and for what.

    Attributes:
      steps: whole steps to run after the one under way; then decoding stops.
      saved: what goes over.
      moving: keys of the sequences whose KV moves, in the order in which it should.
      recomputed: keys of those whose KV is computed again.
      departing: instances that the mesh is changed without.
      joining: instances that it is changed for.
      delayed: instances that must wait for the next change, because they are ready too late for this one.
      reason: one line.
    """

    steps: int
    saved: Saved
    moving: tuple[str, ...]
    recomputed: tuple[str, ...]
    departing: tuple[str, ...]
    joining: tuple[str, ...] = ()
    delayed: tuple[str, ...] = ()
    reason: str = ""


def arrange(
    now: float,
    departures: Sequence[Departure],
    arrivals: Sequence[Arrival],
    sequences: Sequence[RunningSequence],
    pace: Pace,
    busy_until: float = 0.0,
    precopied_at: float = 0.0,
) -> Arrangement | None:
    """The next stop, given every notice that stands at ``now``; None if there is none.

    Call it again with the notices that stand whenever one comes, is withdrawn, or turns out wrong. An instance that
    died before its deadline is a departure whose deadline has passed: decoding stops at once, and the KV that it held
    is lost. Departures go before arrivals: what is not ready by the stop that they demand joins with the next change,
    so that an earlier arrangement stays feasible.

    Args:
      now: monotonic seconds.
      departures: instances that go.
      arrivals: instances that come.
      sequences: all that run on the mesh.
      pace: how fast things go.
      busy_until: a migration under way ends then, and the next cannot start before.
      precopied_at: everything that moves before the stop has moved by then.
    """
    if departures:
        return _before_departure(now, departures, arrivals, sequences, pace, max(busy_until, precopied_at))
    if arrivals:
        ready = max(arrival.ready_at for arrival in arrivals)
        steps = steps_until(max(ready, busy_until, precopied_at) - now, pace)
        moving = [sequence for sequence in sequences if sequence.remaining > steps]
        return Arrangement(
            steps,
            Saved.KV,
            saving_order(moving),
            (),
            (),
            joining=tuple(arrival.instance for arrival in arrivals),
            reason=f"{steps} steps until {ready - now:.3g} s from now, when all newcomers are ready",
        )
    return None


def steps_until(seconds: float, pace: Pace) -> int:
    """The fewest whole steps after the one under way that take at least ``seconds``, even if they are fast."""
    left = seconds - pace.in_flight_seconds * (1 - pace.margin)
    return max(0, ceil(left / (pace.step_seconds * (1 - pace.margin)) - 1e-9))


def steps_before(
    seconds: float, sequences: Sequence[RunningSequence], pace: Pace, not_before: float = 0.0
) -> int | None:
    """The most steps after which all KV still moves within ``seconds``, even if all is slow; None if it never does.

    Args:
      seconds: from now until the deadline.
      sequences: those that have not finished by the stop move.
      pace: how fast things go.
      not_before: seconds from now before which the migration cannot start.
    """
    most = min(LONGEST_PLAN, max(0, int(seconds / pace.step_seconds)))
    steps = np.arange(most + 1)
    slow = 1 + pace.margin
    stop = (pace.in_flight_seconds + steps * pace.step_seconds) * slow
    move = (pace.fixed_seconds + _bytes_after(steps, sequences, pace.bytes_per_step) / pace.bandwidth) * slow
    fitting = np.flatnonzero(np.maximum(stop, not_before) + move < seconds)
    return int(fitting[-1]) if len(fitting) else None


def steps_alone(seconds: float, pace: Pace) -> int:
    """The most steps that end within ``seconds`` even if they are slow, when nothing has to move after them."""
    left = seconds / (1 + pace.margin) - pace.in_flight_seconds
    return max(0, ceil(left / pace.step_seconds - 1e-9) - 1)


def saving_order(sequences: Iterable[RunningSequence]) -> tuple[str, ...]:
    """Keys, those first whose KV takes longest to compute again per byte that must move."""

    def value(sequence: RunningSequence) -> tuple[float, str]:
        return -sequence.recompute_seconds / max(sequence.bytes, 1), sequence.key

    return tuple(sequence.key for sequence in sorted(sequences, key=value))


def _before_departure(
    now: float,
    departures: Sequence[Departure],
    arrivals: Sequence[Arrival],
    sequences: Sequence[RunningSequence],
    pace: Pace,
    start: float,
) -> Arrangement:
    gone = {departure.instance for departure in departures if departure.deadline <= now}
    left = min((departure.deadline for departure in departures if departure.deadline > now), default=inf) - now
    departing = tuple(departure.instance for departure in departures)
    not_before = max(0.0, start - now)
    lost = tuple(sequence.key for sequence in sequences if sequence.held_by & gone)
    sequences = [sequence for sequence in sequences if sequence.key not in lost]
    steps = 0 if left == inf else steps_before(left, sequences, pace, not_before)
    if steps is not None:
        # Running on without anybody to serve would only delay the change.
        steps = 0 if gone else min(steps, max((sequence.remaining for sequence in sequences), default=0))
        moving = saving_order(sequence for sequence in sequences if sequence.remaining > steps)
        saved, recomputed = Saved.KV, tuple[str, ...]()
        reason = f"{steps} more steps leave time to move all KV within {left:.3g} s"
        if gone:
            reason = f"{', '.join(sorted(gone))} is gone: stop now and move the KV that is left"
    else:
        moving = _that_fit(left - not_before, sequences, pace, not_before)
        recomputed = tuple(sequence.key for sequence in sequences if sequence.key not in moving)
        saved, steps = (Saved.SOME_KV, 0) if moving else (Saved.TOKENS, 0 if gone else steps_alone(left, pace))
        reason = (
            f"not all KV moves within {left:.3g} s: stop now and save that of {len(moving)} of {len(sequences)}"
            if moving
            else f"no KV moves within {left:.3g} s: {steps} more steps, then tokens only"
        )
    stop = now + pace.in_flight_seconds + steps * pace.step_seconds
    joining = tuple(arrival.instance for arrival in arrivals if arrival.ready_at <= max(stop, start))
    delayed = tuple(arrival.instance for arrival in arrivals if arrival.instance not in joining)
    return Arrangement(steps, saved, moving, (*lost, *recomputed), departing, joining, delayed, reason)


def _bytes_after(steps: NDArray[np.intp], sequences: Sequence[RunningSequence], growth: int) -> NDArray[np.float64]:
    """KV to move if decoding stops after each number of steps: that of sequences that are not finished by then."""
    ends = np.sort(np.array([sequence.remaining for sequence in sequences], dtype=np.int64))
    order = np.argsort([sequence.remaining for sequence in sequences], kind="stable")
    sizes = np.array([sequences[number].bytes for number in order], dtype=np.float64)
    before = np.concatenate([[0.0], np.cumsum(sizes)])
    finished = np.searchsorted(ends, steps, side="right")
    total: NDArray[np.float64] = before[-1] - before[finished] + (len(sequences) - finished) * (steps * float(growth))
    return total


def _that_fit(seconds: float, sequences: Sequence[RunningSequence], pace: Pace, not_before: float) -> tuple[str, ...]:
    """Sequences whose KV moves in time if decoding stops at the next boundary: the dearest to compute again per byte.

    A greedy knapsack (Dantzig 1957).
    """
    slow = 1 + pace.margin
    left = seconds - max(0.0, pace.in_flight_seconds * slow - not_before) - pace.fixed_seconds * slow
    sizes = {sequence.key: sequence.bytes for sequence in sequences}
    taken: list[str] = []
    for key in saving_order(sequences):
        needed = sizes[key] / pace.bandwidth * slow
        if needed < left:
            left -= needed
            taken.append(key)
    return tuple(taken)
