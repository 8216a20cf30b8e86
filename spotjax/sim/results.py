"""What came of one simulated run: a column per fact of its requests, and the numbers that are quoted from them.

Three rules keep the numbers honest. A request that is unfinished at the end counts with its age, a lower bound of its
latency, so that no system looks good by falling behind. Only finished requests earn anything: cost is shared by their
tokens alone. Percentiles are interpolated. Where the artifact of SpotServe counts otherwise, its way is given beside
ours. What is drawn or compared is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import ConfigError
from spotjax.meshes.layout import LayerRanges
from spotjax.planner.latency import LatencyModel, Work, stages_of
from spotjax.sim.distribution import Distribution, Seconds
from spotjax.sim.world import Change, World

Counts = NDArray[np.int64]
SmallCounts = NDArray[np.int32]


@dataclass(frozen=True)
class Summary:
    """The numbers of one run. Distributions are None if no request counts for them.

    Attributes:
      scenario, system: names.
      seed: of the generators of the scenario.
      duration: simulated seconds.
      requests: those that came.
      finished: those whose last token came in time.
      censored: those that did not finish; they are counted with their age.
      lost: those of the censored that the system gave up.
      restarted: requests that began again from nothing at least once.
      restarts: how often that happened.
      recomputed: positions whose KV was there and was computed again.
      latency: seconds from arrival to the last token; of a censored request its age at the end.
      latency_finished: the same of finished requests only.
      latency_published: of finished requests only and with ``published_percentile``, as SpotServe's artifact has it.
      time_to_first_token: seconds from arrival to the first token; the age at the end without one.
      largest_gap: seconds that a client waited longest between two tokens; of requests that have a token.
      latency_per_token: ``latency`` of a request divided by the output tokens that it asked for, seconds per token.
      request_throughput: finished requests per simulated second.
      output_throughput: output tokens of finished requests per simulated second.
      prompt_tokens, output_tokens: of finished requests.
      spot_hours, on_demand_hours: instance-hours paid for.
      usd: what they cost.
      prefill_share: share of the cost that is put down to prompts; None if it is shared by tokens.
      usd_per_million_tokens: ``usd`` over prompt and output tokens of finished requests; None without any.
      usd_per_million_prompt_tokens, usd_per_million_output_tokens: the two shares of the cost over their own tokens.
      usd_published: 1e-5 USD per token as SpotServe counts, (1e5 * usd) / (prompt and output tokens of finished
        requests); theirs are always 640 for each request.
      changes: of the mesh.
      stall: seconds without a token for sequences that a change stopped, added up over changes.
      longest_stall: seconds of the longest.
      bytes_moved: from device to device.
      bytes_loaded: from the checkpoint.
    """

    scenario: str
    system: str
    seed: int
    duration: float
    requests: int
    finished: int
    censored: int
    lost: int
    restarted: int
    restarts: int
    recomputed: int
    latency: Distribution | None
    latency_finished: Distribution | None
    latency_published: Distribution | None
    time_to_first_token: Distribution | None
    largest_gap: Distribution | None
    latency_per_token: Distribution | None
    request_throughput: float
    output_throughput: float
    prompt_tokens: int
    output_tokens: int
    spot_hours: float
    on_demand_hours: float
    usd: float
    prefill_share: float | None
    usd_per_million_tokens: float | None
    usd_per_million_prompt_tokens: float | None
    usd_per_million_output_tokens: float | None
    usd_published: float | None
    changes: int
    stall: float
    longest_stall: float
    bytes_moved: int
    bytes_loaded: int

    def number(self, name: str) -> float:
        """One of them by name, such as ``usd`` or ``latency.p99``; nan if it is None.

        Raises:
          ConfigError: there is no number of that name.
        """
        first, _, part = name.partition(".")
        value = getattr(self, first, "")
        if part and value is not None:
            value = getattr(value, part, "") if isinstance(value, Distribution) else ""
        if value is None:
            return nan
        if not isinstance(value, int | float):
            raise ConfigError(f"results have no number {name!r}; there are usd, latency.p99 and the like")
        return float(value)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one run. Columns have a row for every request that came, in order of arrival.

    Attributes:
      scenario, system: names.
      seed: of the generators of the scenario.
      duration: simulated seconds.
      arrival: seconds from the start.
      prompt, output: tokens.
      first_token, finish: seconds from the start, nan if it did not come in time.
      largest_gap: seconds between two tokens.
      restarts: times that it began again from nothing.
      recomputed: positions.
      lost: whether the system gave it up.
      instances: (seconds, instances paid for from then on) at every change of their number.
      changes: of the mesh, in order.
      spot_hours, on_demand_hours: instance-hours paid for.
      usd: what they cost.
    """

    scenario: str
    system: str
    seed: int
    duration: float
    arrival: Seconds
    prompt: Counts
    output: Counts
    first_token: Seconds
    finish: Seconds
    largest_gap: Seconds
    restarts: SmallCounts
    recomputed: SmallCounts
    lost: NDArray[np.bool_]
    instances: tuple[tuple[float, int], ...]
    changes: tuple[Change, ...]
    spot_hours: float
    on_demand_hours: float
    usd: float

    @classmethod
    def of(cls, world: World, system: str, seed: int = 0) -> Outcome:
        """From a world whose time is over. What its replicas foresaw for later than that has not happened."""
        scenario, book, end = world.scenario, world.book, world.scenario.spot.duration
        trace = scenario.requests
        count = int(np.searchsorted(trace.arrival, end, side="right"))
        first_token, finish, gap = (
            np.array(column[:count], dtype=np.float64) for column in (book.first_token, book.finish, book.largest_gap)
        )
        for times in (first_token, finish):
            times[times > end] = np.nan
        last_token = np.array(book.last_token[:count], dtype=np.float64)
        going_on = np.isnan(finish) & (np.array(book.generated[:count]) < trace.output[:count])
        gap = np.where(going_on, np.fmax(gap, end - last_token), gap)  # its client is waiting now
        gap = np.fmin(gap, end - first_token)
        restarts, recomputed = (np.array(column[:count], dtype=np.int32) for column in (book.restarts, book.recomputed))
        lost = np.zeros(count, dtype=np.bool_)
        lost[sorted(book.lost)] = True
        return cls(
            scenario.name, system, seed, end, trace.arrival[:count], trace.prompt[:count], trace.output[:count],
            first_token, finish, gap, restarts, recomputed, lost & np.isnan(finish), tuple(world.counts),
            tuple(world.changes), *world.hours(), world.cost(),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Which requests got their last token in time."""
        return ~np.isnan(self.finish)

    def latency(self) -> Seconds:
        """Seconds from arrival to the last token; until the end for those that did not finish."""
        return np.where(self.finished, self.finish, self.duration) - self.arrival

    def latency_finished(self) -> Seconds:
        """Seconds from arrival to the last token, of finished requests only."""
        finished = self.finished
        return self.finish[finished] - self.arrival[finished]

    def time_to_first_token(self) -> Seconds:
        """Seconds from arrival to the first token; until the end for those without one."""
        return np.where(np.isnan(self.first_token), self.duration, self.first_token) - self.arrival

    def waiting(self, times: Seconds) -> Counts:
        """How many requests had come and had no token yet, at each of some times."""
        return self._open(times, self.first_token)

    def unfinished(self, times: Seconds) -> Counts:
        """How many requests had come and were not finished, at each of some times."""
        return self._open(times, self.finish)

    def _open(self, times: Seconds, ends: Seconds) -> Counts:
        ended = np.sort(ends)  # nan last: these end after every time
        return np.searchsorted(self.arrival, times, side="right") - np.searchsorted(ended, times, side="right")

    def summary(self, prefill_share: float | None = None) -> Summary:
        """The numbers of this run.

        Args:
          prefill_share: share of the cost that prompts caused, such as ``estimate_prefill_share`` gives. Without it
            cost is shared by tokens, which makes a prompt token as dear as an output token.
        """
        finished = self.finished
        prompt, output = int(self.prompt[finished].sum()), int(self.output[finished].sum())
        tokens, latency, done = prompt + output, self.latency(), self.latency_finished()
        for_prompts = prefill_share if prefill_share is not None else prompt / tokens if tokens else 0.0
        stalls = [change.stall for change in self.changes]
        return Summary(
            scenario=self.scenario,
            system=self.system,
            seed=self.seed,
            duration=self.duration,
            requests=len(self),
            finished=len(done),
            censored=len(self) - len(done),
            lost=int(self.lost.sum()),
            restarted=int((self.restarts > 0).sum()),
            restarts=int(self.restarts.sum()),
            recomputed=int(self.recomputed.sum()),
            latency=Distribution.of(latency),
            latency_finished=Distribution.of(done),
            latency_published=Distribution.as_published(done),
            time_to_first_token=Distribution.of(self.time_to_first_token()),
            largest_gap=Distribution.of(self.largest_gap[~np.isnan(self.first_token)]),
            latency_per_token=Distribution.of(latency / self.output),
            request_throughput=len(done) / self.duration,
            output_throughput=output / self.duration,
            prompt_tokens=prompt,
            output_tokens=output,
            spot_hours=self.spot_hours,
            on_demand_hours=self.on_demand_hours,
            usd=self.usd,
            prefill_share=prefill_share,
            usd_per_million_tokens=_per_million(self.usd, tokens),
            usd_per_million_prompt_tokens=_per_million(self.usd * for_prompts, prompt),
            usd_per_million_output_tokens=_per_million(self.usd * (1 - for_prompts), output),
            usd_published=1e5 * self.usd / tokens if tokens else None,
            changes=len(self.changes),
            stall=sum(stalls),
            longest_stall=max(stalls, default=0.0),
            bytes_moved=sum(change.moved for change in self.changes),
            bytes_loaded=sum(change.loaded for change in self.changes),
        )


def _per_million(usd: float, tokens: int) -> float | None:
    return 1e6 * usd / tokens if tokens else None


def estimate_prefill_share(
    model: LatencyModel, tensor: int, layers: LayerRanges, batch: int, prompt: int, output: int
) -> float:
    """Share of the slowest stage's time that goes into prompts, with ``batch`` sequences decoding at once.

    An estimate for requests that all look the same; what it splits is cost, never latency.
    """

    def slowest(work: Work) -> float:
        return max(model.stage_seconds(stage, tensor, work) for stage in stages_of(layers))

    prefill = slowest(Work.prefill(prompt))
    decode = output * slowest(Work.decode(batch, prompt + output // 2)) / batch
    return prefill / (prefill + decode)
