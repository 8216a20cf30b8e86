"""How long a mesh takes for a prompt and for a token, given how long one stage takes. Knows no model and no machine.

What one stage takes comes from a ``LatencyModel``: the analytic ``cost.Roofline``, a ``profile.MeasuredProfile``, or
the tables that SpotServe published, ``published.PublishedProfile``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from math import ceil
from typing import NamedTuple, Protocol

from spotjax.meshes.layout import LayerRanges
from spotjax.meshes.shape import MeshShape


class Stage(NamedTuple):
    """A pipeline stage as far as its latency depends on it.

    Attributes:
      layers: how many decoder layers it runs.
      first: it also embeds tokens.
      last: it also computes logits.
    """

    layers: int
    first: bool
    last: bool


class Work(NamedTuple):
    """What a stage computes in one call.

    Attributes:
      tokens: positions computed.
      pairs: (position, attended position) pairs, summed over sequences.
      cached: KV positions read.
      sequences: that the positions belong to; each needs one row of logits.
    """

    tokens: int
    pairs: int
    cached: int
    sequences: int

    @classmethod
    def decode(cls, batch: int, context: int) -> Work:
        """One token of each of ``batch`` sequences that are ``context`` positions long."""
        return cls(batch, batch * context, batch * context, batch)

    @classmethod
    def prefill(cls, tokens: int) -> Work:
        """A whole prompt."""
        return cls(tokens, tokens * (tokens + 1) // 2, tokens, 1)


class LatencyModel(Protocol):
    """Seconds of single stages, of one model on one kind of instance."""

    def stage_seconds(self, stage: Stage, tensor: int, work: Work) -> float:
        """One call of one stage on ``tensor`` devices; infinite where it cannot run on so many."""
        ...

    def hop_seconds(self, tokens: int) -> float:
        """Hidden vectors of ``tokens`` tokens from one stage to the next."""
        ...


class Scaled:
    """Another model's times, all so many times as long, and remembered. A ``LatencyModel``."""

    def __init__(self, model: LatencyModel, scale: float) -> None:
        self._model, self._scale = model, scale
        self._stages: dict[tuple[Stage, int, Work], float] = {}
        self._hops: dict[int, float] = {}

    def stage_seconds(self, stage: Stage, tensor: int, work: Work) -> float:
        """See ``LatencyModel``."""
        key = stage, tensor, work
        if key not in self._stages:
            self._stages[key] = self._model.stage_seconds(*key) * self._scale
        return self._stages[key]

    def hop_seconds(self, tokens: int) -> float:
        """See ``LatencyModel``."""
        if tokens not in self._hops:
            self._hops[tokens] = self._model.hop_seconds(tokens) * self._scale
        return self._hops[tokens]


@lru_cache(maxsize=1024)
def stages_of(layers: LayerRanges) -> Mapping[Stage, int]:
    """How many stages there are of each kind."""
    last = len(layers) - 1
    return Counter(Stage(stop - start, n == 0, n == last) for n, (start, stop) in enumerate(layers))


def through(model: LatencyModel, shape: MeshShape, layers: LayerRanges, work: Work) -> float:
    """Seconds of all stages one after the other, and of the hops between them."""
    stages = stages_of(layers).items()
    seconds = sum(count * model.stage_seconds(stage, shape.tensor, work) for stage, count in stages)
    return seconds + (shape.stage - 1) * model.hop_seconds(work.tokens)


def prefill_seconds(model: LatencyModel, shape: MeshShape, layers: LayerRanges, tokens: int) -> float:
    """Seconds for one prompt of ``tokens`` tokens to go through all stages."""
    return through(model, shape, layers, Work.prefill(tokens))


def step_seconds(model: LatencyModel, shape: MeshShape, layers: LayerRanges, batch: int, context: int) -> float:
    """Seconds between two tokens of a sequence when a replica's ``batch`` sequences go round as P micro-batches.

    A micro-batch goes round no faster than through all stages, and the slowest stage serves every micro-batch once.
    """
    micro_batches = min(shape.stage, batch)
    work = Work.decode(ceil(batch / micro_batches), context)
    slowest = max(model.stage_seconds(stage, shape.tensor, work) for stage in stages_of(layers))
    return max(through(model, shape, layers, work), micro_batches * slowest)
