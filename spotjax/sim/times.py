"""How long a replica of one shape takes for prompts and steps: a ``LatencyModel`` with its pipeline, remembered."""

from __future__ import annotations

from spotjax.meshes.layout import LayerRanges
from spotjax.meshes.shape import MeshShape
from spotjax.planner import latency
from spotjax.planner.latency import LatencyModel, Work, stages_of

CONTEXT_STEP = 64
"""Contexts that differ by less than this share one remembered step time."""


class ReplicaTimes:
    """Seconds of one replica.

    Args:
      model: seconds of single stages.
      shape, layers: the replica's pipeline; the data degree does not matter.
      scale: everything takes so many times what the model says.
    """

    def __init__(self, model: LatencyModel, shape: MeshShape, layers: LayerRanges, scale: float = 1.0) -> None:
        self.model, self.shape, self.layers, self.scale = model, shape, layers, scale
        self._steps: dict[tuple[int, int], float] = {}
        self._prefills: dict[int, tuple[float, float]] = {}

    def step(self, batch: int, context: int) -> float:
        """Between two tokens of a sequence when ``batch`` sequences of that average length decode, P in flight."""
        key = batch, context // CONTEXT_STEP
        seconds = self._steps.get(key)
        if seconds is None:
            middle = key[1] * CONTEXT_STEP + CONTEXT_STEP // 2
            seconds = latency.step_seconds(self.model, self.shape, self.layers, batch, middle) * self.scale
            self._steps[key] = seconds
        return seconds

    def prefill(self, tokens: int) -> tuple[float, float]:
        """(Until the prompt's first token, how long the slowest stage is kept from other work) for a prompt."""
        seconds = self._prefills.get(tokens)
        if seconds is None:
            work = Work.prefill(tokens)
            slowest = max(self.model.stage_seconds(stage, self.shape.tensor, work) for stage in stages_of(self.layers))
            whole = latency.prefill_seconds(self.model, self.shape, self.layers, tokens)
            seconds = whole * self.scale, slowest * self.scale
            self._prefills[tokens] = seconds
        return seconds
