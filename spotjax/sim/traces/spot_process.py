"""A synthetic spot market, fitted from a recorded one, for fleets of any size and traces of any length.

The model, a birth-death process with batches in continuous time:

- Grants come as a Poisson process; each brings a batch of instances, of a size drawn from those that were recorded.
- Every instance lives under a constant hazard, so lives are exponential. They end in batches too: removals come at such
  a rate that each instance has just that hazard, their sizes are drawn from those that were recorded, and who goes is
  drawn evenly from those that are there.

What is kept of the record: hazard, grant rate, distributions of batch sizes, hence mean life and mean fleet. What is
not: the shape of lives (they become exponential), and when one event makes the next one more likely (hours in which a
whole zone is short). A record that jumps between nothing and everything is better replayed than modelled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import ConfigError
from spotjax.sim.workload import SpotEvent, SpotTrace

Sizes: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SpotProcess:
    """The statistics of a spot market.

    Attributes:
      grants: instances granted per second.
      hazard: chance per second that an instance which is there goes.
      grant_sizes: (instances in a batch of grants, how many such batches were recorded).
      removal_sizes: the same of removals.

    Raises:
      ConfigError: a rate is not positive, or there are no sizes or one below 1.
    """

    grants: float
    hazard: float
    grant_sizes: Sizes
    removal_sizes: Sizes

    def __post_init__(self) -> None:
        if not (0 < self.grants < np.inf and 0 < self.hazard < np.inf):
            raise ConfigError(
                f"a spot process needs positive rates, got grants {self.grants} / s, hazard {self.hazard} / s"
            )
        for sizes in (self.grant_sizes, self.removal_sizes):
            if not sizes or min(min(entry) for entry in sizes) < 1:
                raise ConfigError(f"sizes of batches are (instances, how often), both at least 1, got {sizes}")

    @property
    def mean_life(self) -> float:
        """Seconds that an instance lives on average."""
        return 1 / self.hazard

    @property
    def mean_instances(self) -> float:
        """Instances that are there on average in the long run (Little's law)."""
        return self.grants / self.hazard

    def sample(self, instances: int, duration: float, seed: int, batch_scale: float = 1.0, name: str = "") -> SpotTrace:
        """Draws a trace of a market in which ``instances`` are there on average; so many are there at the start.

        Hazard and sizes stay as they are and grants are scaled, as if more such markets were used side by side: a
        larger fleet loses a smaller part of itself at a time, more often. With ``batch_scale`` above 1 every batch, of
        both kinds, is so many times larger (rounded, at least 1) and comes less often: ``instances / mean_instances``
        gives a large fleet that loses the recorded part of itself at a time.

        Args:
          instances: the mean size of the fleet.
          duration: seconds.
          seed: of the random numbers.
          batch_scale: factor on the sizes of batches.
          name: of the trace.

        Raises:
          ConfigError: an argument is not positive.
        """
        if instances < 1 or not 0 < duration < np.inf or not 0 < batch_scale < np.inf:
            raise ConfigError(f"cannot sample {instances} instances for {duration} s at a batch scale of {batch_scale}")
        generator = np.random.default_rng(seed)
        came, gone = (_batches(sizes, batch_scale) for sizes in (self.grant_sizes, self.removal_sizes))
        grants_per_second = self.hazard * instances / came.mean()
        there = [f"i-{number}" for number in range(instances)]
        given, now, events = instances, 0.0, [SpotEvent(0.0, added=tuple(there))]
        while True:
            # A removal takes at most all: by the mean of what it can take, each instance has the hazard exactly.
            removals_per_second = self.hazard * len(there) / np.minimum(gone, len(there)).mean() if there else 0.0
            now += generator.exponential(1 / (grants_per_second + removals_per_second))
            if now >= duration:
                return SpotTrace(name or f"spot process x{instances}", tuple(events), duration)
            if generator.uniform(0, grants_per_second + removals_per_second) < grants_per_second:
                new = tuple(f"i-{given + number}" for number in range(generator.choice(came)))
                given += len(new)
                there += new
                events.append(SpotEvent(now, added=new))
            else:
                size = min(int(generator.choice(gone)), len(there))
                lost = {there[index] for index in generator.choice(len(there), size, replace=False)}
                events.append(SpotEvent(now, removed=tuple(name for name in there if name in lost)))
                there = [name for name in there if name not in lost]


def _batches(sizes: Sizes, scale: float) -> NDArray[np.int64]:
    """Every recorded batch by its size, scaled."""
    recorded = np.repeat(*np.transpose(sizes))
    return np.maximum(1, np.rint(recorded * scale)).astype(np.int64)


def fit(trace: SpotTrace) -> SpotProcess:
    """Estimates a process from a trace.

    Hazard: instances that went over instance-seconds there. Grants: instances that came after second 0 over the
    duration. (Both are maximum likelihood, for batches of one.) A batch is all that comes, or goes, at one time.
    On-demand instances are left out: no market gave them.

    Raises:
      ConfigError: no spot instance comes after second 0, or none goes.
    """
    there: dict[str, bool] = {}
    came, gone = Counter[float](), Counter[float]()
    lived, last = 0.0, 0.0
    for event in trace.events:
        lived += sum(not on_demand for on_demand in there.values()) * (event.seconds - last)
        last = event.seconds
        there |= dict.fromkeys(event.added, event.on_demand)
        if event.seconds > 0 and not event.on_demand:
            came[event.seconds] += len(event.added)
        gone[event.seconds] += sum(not there.pop(name) for name in event.removed)
    lived += sum(not on_demand for on_demand in there.values()) * (trace.duration - last)
    grants, removals = (Counter(count for count in counts.values() if count) for counts in (came, gone))
    if not grants or not removals:
        raise ConfigError(
            f"spot trace {trace.name}: a process is fitted from instances that come after 0 s and that go"
        )
    return SpotProcess(
        grants=sum(came.values()) / trace.duration,
        hazard=sum(gone.values()) / lived,
        grant_sizes=tuple(sorted(grants.items())),
        removal_sizes=tuple(sorted(removals.items())),
    )
